"""`pylorus validate`: figures on images from elsewhere, beside those that the bundle holds of its development."""

import dataclasses
import html
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.deploy import external as external_module
from pylorus.deploy import predict as predict_module
from pylorus.deploy.augmented import explain_gain
from pylorus.deploy.external import ValidateOptions, validate_bundle
from pylorus.deploy.model import load_bundle
from pylorus.deploy.predict import PredictOptions, predict
from pylorus.deploy.thresholds import find_calibrated_prevalence
from pylorus.deploy.validation import evaluate_prevalence_shift
from pylorus.evaluation import estimate_prevalence
from pylorus.evaluation.predictions import Predictions

CLASSES = ("gastric_cancer", "gastric_ulcer", "chronic_gastritis")
PATIENT = r"patient_\d+"

pytestmark = pytest.mark.usefixtures("skip_rendering")  # the documented commands render such a page


@pytest.fixture(scope="module")
def loaded_bundle(bundle_folder):
    return load_bundle(bundle_folder)


@pytest.fixture(autouse=True)
def load_bundle_once(loaded_bundle, monkeypatch):
    monkeypatch.setattr(external_module, "load_model", lambda *_, **__: loaded_bundle)


@pytest.fixture
def other_site(synthetic_root, tmp_path):
    """Some images of each class under other names of classes."""
    for new, old in zip(("Ca", "Ulkus", "chronic_gastritis"), CLASSES, strict=True):
        (tmp_path / "site" / new).mkdir(parents=True)
        for path in sorted((synthetic_root / old).rglob("*.*"))[:4]:
            shutil.copy(path, tmp_path / "site" / new)
    return tmp_path / "site"


def test_the_gain_of_test_time_augmentation_is_measured_beside_unchanged_figures(
    bundle_copy, other_site, tmp_path, capsys
):
    output, options = tmp_path / "out", ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"}, tta="flips")
    validate_bundle(bundle_copy, other_site, output, options)
    printed, record = capsys.readouterr().out, read_record(output)
    gain = record["tta"]
    plain, averaged = (pd.read_parquet(output / f"predictions{name}.parquet") for name in ("", "-tta"))
    for side, table in (("without", plain), ("with", averaged)):
        right = table["predicted"] == table["true"]
        assert gain["figures"]["accuracy"][side] == pytest.approx(right.mean())
        of_truth = [row[f"probability/{row['true']}"] for _, row in table.iterrows()]
        assert gain["figures"]["log_loss"][side] == pytest.approx(-np.log(of_truth).mean())
    for figure in gain["figures"].values():
        assert figure["difference"]["value"] == pytest.approx(figure["with"] - figure["without"])
    assert gain["images"] == 12
    assert "4 passes of the network" in printed
    assert explain_gain(gain) in printed
    assert explain_gain(gain) in html.unescape((output / "report.html").read_text())
    validate_bundle(bundle_copy, other_site, output, dataclasses.replace(options, tta=None))
    without = read_record(output)
    assert "tta" not in without
    assert without["evaluation"] == record["evaluation"]
    assert not (output / "predictions-tta.csv").exists()


def read_record(output):
    return json.loads((output / "validation.json").read_text())


def test_the_figures_of_the_runs_own_test_images_are_those_of_the_bundle(
    trained_run, bundle_copy, loaded_bundle, synthetic_root, tmp_path, capsys
):
    split = pd.read_csv(trained_run.path / "split.csv", dtype=str)
    rows = split[split["split"] == "test"]
    manifest = tmp_path / "site.csv"
    rows[["path", "class", "group", "split"]].rename(columns={"class": "label"}).to_csv(manifest, index=False)
    output = tmp_path / "out"
    validate_bundle(bundle_copy, manifest, output, ValidateOptions(root=synthetic_root))
    capsys.readouterr()
    evaluation, description = read_record(output)["evaluation"], loaded_bundle.description
    assert evaluation["accuracy"] == vars(description.test.accuracy)
    assert evaluation["balanced_accuracy"] == vars(description.test.balanced_accuracy)
    assert evaluation["macro_auroc"] == vars(description.test.macro_auroc)
    for name in description.short_names:
        assert evaluation["auroc"][name] == vars(description.test.auroc[name])
    assert evaluation["decision"]["sensitivity"] == vars(description.decision.test["GC"].sensitivity)
    assert evaluation["answered"] == vars(description.abstention.answered_test)
    validate_bundle(bundle_copy, manifest, output, ValidateOptions(root=synthetic_root))
    assert read_record(output)["evaluation"] == evaluation  # to the last digit, from the rows that it saved
    guaranteed = loaded_bundle.description.decision.get_threshold("GC")
    assert not guaranteed.is_guaranteed
    at_least = f"{np.floor(round(1000 * guaranteed.sensitivity_reached, 6)) / 10:.1f}"  # a lower bound is rounded down
    text = (output / "report.html").read_text()
    assert f"the {at_least} % guaranteed for new patients" in text.replace("\u00a0", " ")
    assert "too few patients to guarantee the target of 95 %" in text.replace("\u00a0", " ")
    assert "sets are different images" not in text
    assert "Whether the external images are the development's test images" in html.unescape(text)
    table = pd.read_csv(output / "tables" / "development.csv", na_values="–")
    assert (table["difference"].dropna() == 0).all()
    assert len(table) == 19
    assert list(table["figure"][:3]) == ["accuracy", "balanced accuracy", "macro AUROC"]
    assert table["development"][:3].notna().all()
    saved = pd.read_parquet(trained_run.get_predictions_path(trained_run.shipped.name, "test"))
    scores = saved[[f"logit/{name}" for name in description.short_names]].to_numpy()
    by_hand = roc_auc_score(saved["true"] == "GC", _softmax(scores / description.calibration.temperature)[:, 0])
    assert table.set_index("figure").loc["AUROC for GC", "external"] == pytest.approx(by_hand, abs=1e-6)
    matrix = pd.read_csv(output / "tables" / "classes.csv")
    assert list(matrix.iloc[:, 1]) == list(matrix.iloc[:, 3])


def _softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_other_names_of_classes_are_mapped_and_classes_left_out(bundle_copy, other_site, tmp_path):
    with pytest.raises(PylorusError, match=r"2 classes that the model does not have:\n.*Ca\n.*Ulkus\n") as refused:
        validate_bundle(bundle_copy, other_site, tmp_path / "out", ValidateOptions())
    assert "--map Ca=GC" in str(refused.value)
    assert str(refused.value).endswith("--map Ca=")
    assert not (tmp_path / "out").exists()
    names = {"Ca": "GC", "Ulkus": "", "chronic_gastritis": "CG"}
    page = validate_bundle(bundle_copy, other_site, tmp_path / "out", ValidateOptions(names=names, group=PATIENT))
    record = read_record(tmp_path / "out")
    assert record["classes left out"] == {"Ulkus": 4}
    assert record["images"] == 8
    text = page.read_text()
    assert "No external image is of GU" in text
    assert "4 images of class Ulkus left out" in text
    assert "patient_" not in text  # the default shows no name
    with pytest.raises(PylorusError, match='"Krebs" is not among the classes of the images'):
        validate_bundle(bundle_copy, other_site, tmp_path / "new", ValidateOptions(names={"Krebs": "GC"}))
    with pytest.raises(PylorusError, match='"Polyp" is no class of the model'):
        validate_bundle(bundle_copy, other_site, tmp_path / "new", ValidateOptions(names={"Ca": "Polyp"}))


def test_each_look_at_a_set_is_counted_beside_the_bundle(bundle_copy, other_site, tmp_path):
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    for time in (1, 2):
        page = validate_bundle(bundle_copy, other_site, tmp_path / f"out-{time}", options)
        assert read_record(tmp_path / f"out-{time}")["looks"]["this set"] == time
        assert f"<dd>{time}<small>this one included; {time} of any set" in page.read_text()
    (other_site / "Ca" / "new.jpg").write_bytes(next((other_site / "Ulkus").iterdir()).read_bytes())
    validate_bundle(bundle_copy, other_site, tmp_path / "out-3", options)
    looks = read_record(tmp_path / "out-3")["looks"]
    assert (looks["this set"], looks["all sets"]) == (1, 3) or looks["this set"] == 3  # a copy is no new content
    text = (bundle_copy.parent / f"{bundle_copy.name}.looks.jsonl").read_text()
    assert len(text.splitlines()) == 3
    assert "patient" not in text.replace('"patients"', "")
    assert "jpg" not in text
    load_bundle(bundle_copy)  # the record does not break the bundle


def test_images_of_another_set_that_were_looked_at_before_are_counted_on_the_page_and_the_terminal(
    bundle_copy, other_site, tmp_path, capsys
):
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    validate_bundle(bundle_copy, other_site, tmp_path / "out-1", options)
    assert "before" not in capsys.readouterr().out
    overlapping = tmp_path / "overlapping"
    for name, images in (("Ca", 3), ("Ulkus", 2)):
        (overlapping / name).mkdir(parents=True)
        for number, path in enumerate(sorted((other_site / name).iterdir())[:images]):
            shutil.copy(path, overlapping / name / f"renamed-{number}.jpg")
    page = validate_bundle(bundle_copy, overlapping, tmp_path / "out-2", options)
    looks = read_record(tmp_path / "out-2")["looks"]
    assert (looks["this set"], looks["all sets"], looks["images seen"], looks["earlier looks"]) == (1, 2, 5, 1)
    said = "This model was evaluated on 5 of these 5 images before, in 1 earlier validation"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in page.read_text()
    lines = (bundle_copy.parent / f"{bundle_copy.name}.looks.jsonl").read_text().splitlines()
    assert not any(path.stem in lines[0] for path in other_site.rglob("*.*"))
    older = {name: value for name, value in json.loads(lines[0]).items() if name != "hashes of images"}
    (bundle_copy.parent / f"{bundle_copy.name}.looks.jsonl").write_text(json.dumps(older) + "\n")
    validate_bundle(bundle_copy, overlapping, tmp_path / "out-3", options)
    assert read_record(tmp_path / "out-3")["looks"]["images seen"] == 0
    assert "by an older Pylorus did not record which images" in " ".join(capsys.readouterr().out.split())


def test_splits_classes_left_out_and_unreadable_files_are_said_on_the_page_and_the_terminal(
    bundle_copy, other_site, tmp_path, capsys
):
    root = tmp_path / "split"
    shutil.copytree(other_site, root / "test")
    (root / "test" / "Ca" / "broken.jpg").write_bytes(b"no image")
    (root / "test" / "Polyp").mkdir()  # empty, and no class of the model
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": ""})
    page = validate_bundle(bundle_copy, root, tmp_path / "out", options).read_text()
    terminal = " ".join(capsys.readouterr().out.split())
    for said in (
        "The images are divided into splits (8 test): all of them were evaluated",
        "4 images of class Ulkus left out",
        "1 file could not be read; quarantine.csv lists them",
        "No external image is of GU",
    ):
        assert said in terminal
        assert said in page
    assert read_record(tmp_path / "out")["splits"] == {"test": 8}


def test_a_bundle_of_an_older_pylorus_without_balanced_accuracy_is_validated_and_that_is_said(
    bundle_copy, loaded_bundle, other_site, tmp_path, monkeypatch
):
    test = dataclasses.replace(loaded_bundle.description.test, balanced_accuracy=None, macro_auroc=None)
    older = dataclasses.replace(loaded_bundle, description=dataclasses.replace(loaded_bundle.description, test=test))
    monkeypatch.setattr(external_module, "load_model", lambda *_, **__: older)
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    page = validate_bundle(bundle_copy, other_site, tmp_path / "out", options).read_text()
    assert "this bundle, of an older Pylorus, does not hold it" in page
    table = pd.read_csv(tmp_path / "out" / "tables" / "development.csv", na_values="–").set_index("figure")
    assert table.loc[["balanced accuracy", "macro AUROC"], "development"].isna().all()
    assert table.loc[["balanced accuracy", "macro AUROC"], "external"].notna().all()


def test_the_biases_of_a_recalibrated_bundle_are_part_of_its_calibration_only(
    bundle_copy, loaded_bundle, other_site, tmp_path, monkeypatch
):
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    validate_bundle(bundle_copy, other_site, tmp_path / "out", options)
    calibration = dataclasses.replace(loaded_bundle.description.calibration, bias=(0.5, -0.2, 0.1))
    description = dataclasses.replace(loaded_bundle.description, calibration=calibration)
    recalibrated = dataclasses.replace(loaded_bundle, description=description)
    monkeypatch.setattr(external_module, "load_model", lambda *_, **__: recalibrated)
    validate_bundle(bundle_copy, other_site, tmp_path / "recalibrated", options)
    first, second = (
        pd.read_csv(tmp_path / name / "tables" / "calibration.csv", dtype=str) for name in ("out", "recalibrated")
    )
    assert list(first.iloc[0, 3:]) == list(second.iloc[0, 3:])  # before the calibration
    assert list(first.iloc[1, 3:]) != list(second.iloc[1, 3:])


def test_the_page_repeats_what_stress_found_with_this_bundle(bundle_copy, loaded_bundle, other_site, tmp_path):
    output = tmp_path / "out"
    (output / "stress").mkdir(parents=True)
    record = {"SHA256SUMS": loaded_bundle.identity, "images": 12, "source": "images that you gave"}
    record |= {"shortcuts": ["border"], "findings": ["POSSIBLE SHORTCUT: something", "The border tells it."]}
    (output / "stress" / "stress.json").write_text(json.dumps(record))
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    text = validate_bundle(bundle_copy, other_site, output, options).read_text()
    assert text.count("POSSIBLE SHORTCUT: something") == 2  # at the head, and in the section
    assert "12 images, images that you gave (stress/ beside this page)" in text
    (output / "stress" / "stress.json").write_text(json.dumps(record | {"SHA256SUMS": "another bundle"}))
    assert "POSSIBLE SHORTCUT" not in validate_bundle(bundle_copy, other_site, output, options).read_text()


def test_a_look_is_counted_after_a_line_that_was_cut_off_and_beside_the_folder_that_a_link_leads_to(
    bundle_copy, other_site, tmp_path, monkeypatch
):
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    looks = bundle_copy.parent / f"{bundle_copy.name}.looks.jsonl"
    looks.write_text('{"time": "2026-11-27T16:49:06+0000", "bund')
    validate_bundle(bundle_copy, other_site, tmp_path / "out-1", options)
    monkeypatch.chdir(bundle_copy)
    validate_bundle(Path(), other_site, tmp_path / "out-2", options)
    assert read_record(tmp_path / "out-2")["looks"]["this set"] == 2
    assert len(looks.read_text().splitlines()) == 3
    assert not list(bundle_copy.rglob("*looks*"))


def test_an_output_inside_the_bundle_or_the_images_is_refused(bundle_copy, other_site):
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    for folder in (bundle_copy, other_site):
        with pytest.raises(PylorusError, match=f"is inside {folder}, which is only read"):
            validate_bundle(bundle_copy, other_site, folder / "validation", options)
        assert not (folder / "validation").exists()


def test_a_look_that_cannot_be_recorded_is_said(bundle_copy, other_site, tmp_path, capsys):
    (tmp_path / f"{bundle_copy.name}.looks.jsonl").mkdir()  # also root can't write to it
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    page = validate_bundle(bundle_copy, other_site, tmp_path / "out", options)
    assert "could not be recorded beside the bundle" in page.read_text()
    assert "could not be recorded beside the bundle" in " ".join(capsys.readouterr().out.split())
    assert read_record(tmp_path / "out")["looks"]["this set"] == 1


def test_an_output_with_other_files_is_refused_and_an_unreadable_file_listed(bundle_copy, other_site, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.docx").write_text("precious")
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"})
    with pytest.raises(PylorusError, match=r"expected a new or empty folder.* Found: thesis\.docx"):
        validate_bundle(bundle_copy, other_site, output, options)
    (other_site / "Ca" / "broken.jpg").write_bytes(b"no image")
    page = validate_bundle(bundle_copy, other_site, tmp_path / "out", options)
    assert "1 file could not be read" in page.read_text()
    assert "broken.jpg" in (tmp_path / "out" / "quarantine.csv").read_text()
    assert read_record(tmp_path / "out")["evaluation"]["left_out"] == 1
    (other_site / "Ca" / "broken.jpg").unlink()
    assert "could not be read" not in validate_bundle(bundle_copy, other_site, tmp_path / "out", options).read_text()
    assert not (tmp_path / "out" / "quarantine.csv").exists()


def test_an_interrupted_validation_leaves_no_page_of_other_images_and_is_completed_by_the_same_command(
    bundle_copy, loaded_bundle, other_site, tmp_path, monkeypatch
):
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"}, inference=PredictOptions(batch=2))
    output = tmp_path / "out"
    validate_bundle(bundle_copy, other_site, output, options)
    earlier = read_record(output)
    next(iter((other_site / "Ca").iterdir())).unlink()

    batches = itertools.count()

    def fail(batch):
        if next(batches) == 2:
            raise KeyboardInterrupt
        return loaded_bundle.classifier(batch)

    interrupted = dataclasses.replace(loaded_bundle, classifier=fail)
    monkeypatch.setattr(external_module, "load_model", lambda *_, **__: interrupted)
    with pytest.raises(KeyboardInterrupt):
        validate_bundle(bundle_copy, other_site, output, options)
    assert not (output / "report.html").exists()
    assert not (output / "validation.json").exists()
    assert not (output / "predictions.csv").exists()
    looks = bundle_copy.parent / f"{bundle_copy.name}.looks.jsonl"
    assert len(looks.read_text().splitlines()) == 1
    monkeypatch.setattr(external_module, "load_model", lambda *_, **__: loaded_bundle)
    validate_bundle(bundle_copy, other_site, output, options)
    assert read_record(output)["images"] == earlier["images"] - 1
    validate_bundle(bundle_copy, other_site, tmp_path / "at once", options)
    assert read_record(output)["evaluation"] == read_record(tmp_path / "at once")["evaluation"]


def test_words_that_the_command_refuses(bundle_copy, other_site, tmp_path, capsys):
    for words, message in (
        (["--map", "Ca"], "expected NAME=CLASS"),
        (["--map", "Ca=GC", "Ca=GU"], '"Ca" is given twice'),
        (["--map", "=Ca=GC"], '"=Ca" is not among the classes of the images'),
        (["--map", "GC=Ca"], "chronic_gastritis. Did you mean Ca=GC?"),
        (["--map", "Ca=GC", "Ulkus=GU", "--group", "("], "--group: '(' is not a regular expression"),
        (["--prevalence", "3"], "above 0 and below 1"),
        (["--class", "Polyp"], "expected one of GC, GU, CG"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["validate", str(bundle_copy), str(other_site), "--output", str(tmp_path / "out"), *words])
        assert message in str(stopped.value)
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(bundle_copy), str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert "does not exist. Expected class folders, or a manifest" in str(stopped.value)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses such names")
def test_a_name_that_is_not_utf8_is_refused_with_what_to_type(bundle_copy, other_site, tmp_path):
    shutil.copy(next((other_site / "Ca").iterdir()), os.fsencode(other_site / "Ca") + b"/caf\xe9.png")
    with pytest.raises(PylorusError, match=r"(?s)names that are not UTF-8:.*convmv"):
        validate_bundle(bundle_copy, other_site, tmp_path / "out", ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"}))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_and_a_table_without_labels_are_refused_with_what_to_do(bundle_copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PylorusError, match="holds no images. Expected a folder of images for each class"):
        validate_bundle(bundle_copy, tmp_path / "empty", tmp_path / "out", ValidateOptions())
    (tmp_path / "site.csv").write_text("path,class\na.jpg,GC\n")
    with pytest.raises(PylorusError, match='Rename "class" to "label"') as refused:
        validate_bundle(bundle_copy, tmp_path / "site.csv", tmp_path / "out", ValidateOptions())
    assert "data.columns" not in str(refused.value)
    (tmp_path / "site.csv").write_text("path,label\na.jpg,GC\nb.jpg,GU\n")
    with pytest.raises(PylorusError, match=r"(?s)2 of 2 files do not exist.*Set --root to the folder"):
        validate_bundle(bundle_copy, tmp_path / "site.csv", tmp_path / "out", ValidateOptions())


def draw_site(description, *, prevalence, images=2000, seed=1):
    """Draw images of another prevalence whose probabilities are exactly calibrated at the training's proportions."""
    counts = np.array(description.training.images["train"], dtype=float)
    original, generator = counts / counts.sum(), np.random.default_rng(seed)
    true = generator.choice(3, images, p=prevalence)
    features = generator.normal(size=(images, 3)) + 1.5 * np.eye(3)[true]
    joint = original * np.exp(1.5 * features)  # p(features | class) up to a factor of each image
    sample = np.arange(images).astype(str)
    return original, Predictions(
        sample=sample,
        group=sample,
        true=true,
        probabilities=joint / joint.sum(axis=1, keepdims=True),
        class_names=description.short_names,
    )


def test_prevalence_is_estimated_without_labels_and_probabilities_corrected_to_it_are_right(loaded_bundle):
    truth = np.array([0.05, 0.25, 0.7])
    original, drawn = draw_site(loaded_bundle.description, prevalence=truth)
    shift = evaluate_prevalence_shift(drawn, loaded_bundle.description, class_name="GC", prevalence=0.05)
    for name, share in zip(drawn.class_names, truth, strict=True):
        estimate = shift["estimated"]["classes"][name]
        assert estimate["low"] < share < estimate["high"]
        assert estimate["high"] - estimate["low"] < 0.08
        corrected, uncorrected = (
            shift["probabilities"][key]["difference"][name] for key in ("estimated", "uncorrected")
        )
        assert corrected["low"] < 0 < corrected["high"]
        assert abs(corrected["value"]) < 0.03
        if name != "GU":
            assert not uncorrected["low"] < 0 < uncorrected["high"]
    scores = shift["probabilities"]
    assert (
        scores["estimated"]["nll"]["value"] < scores["stated"]["nll"]["value"] < scores["uncorrected"]["nll"]["value"]
    )
    weighted = drawn.probabilities * np.array(list(shift["targets"]["estimated"].values())) / original
    by_hand = weighted / weighted.sum(axis=1, keepdims=True)
    assert scores["estimated"]["accuracy"]["value"] == (by_hand.argmax(axis=1) == drawn.true).mean()
    log_loss = -np.log(by_hand[np.arange(len(by_hand)), drawn.true]).mean()
    assert scores["estimated"]["nll"]["value"] == pytest.approx(log_loss)


def test_a_corrected_threshold_decides_at_a_stated_prevalence_as_the_stored_one_does(loaded_bundle):
    _, drawn = draw_site(loaded_bundle.description, prevalence=[0.1, 0.45, 0.45])
    shift = evaluate_prevalence_shift(drawn, loaded_bundle.description, class_name="GC", prevalence=0.1)
    decisions = {(each["probabilities"], each["kind"]): each for each in shift["decisions"]}
    assert list(decisions) == [
        ("uncorrected", "stored"),
        *((key, kind) for key in ("estimated", "stated") for kind in ("stored", "corrected")),
    ]
    stored, corrected = decisions["uncorrected", "stored"], decisions["stated", "corrected"]
    assert corrected["differently"] == 0
    assert corrected["threshold"] < stored["threshold"]
    for key in ("sensitivity", "specificity", "precision", "npv", "at_prevalence"):
        assert corrected[key] == stored[key]
    only_probabilities = decisions["stated", "stored"]
    assert only_probabilities["differently"] > 0
    assert only_probabilities["sensitivity"]["value"] < stored["sensitivity"]["value"]


def test_corrections_start_from_where_the_probabilities_are_calibrated(loaded_bundle):
    description = loaded_bundle.description
    counts = np.array(description.training.images["train"])
    shares, source = find_calibrated_prevalence(description)
    assert shares == pytest.approx(counts / counts.sum())
    assert source == "of the training images"
    training = dataclasses.replace(description.training, loss="class-weighted cross-entropy")
    shares, source = find_calibrated_prevalence(dataclasses.replace(description, training=training))
    assert shares == pytest.approx([1 / 3] * 3)
    assert "weighted all classes equally" in source
    for text, power in (
        ("logit-adjusted loss", 0),
        ("logit-adjusted loss, tau 1", 0),
        ("logit-adjusted loss, tau 0.5", 0.5),
    ):
        training = dataclasses.replace(description.training, loss=text, images={"train": [10, 40, 90]})
        shares, source = find_calibrated_prevalence(dataclasses.replace(description, training=training))
        expected = np.array([10, 40, 90]) ** power
        assert shares == pytest.approx(expected / expected.sum())
        assert "logit-adjusted" in source


def test_the_page_shows_prevalence_uncorrected_and_corrected(bundle_copy, other_site, tmp_path, capsys):
    options = ValidateOptions(names={"Ca": "GC", "Ulkus": "GU"}, prevalence=0.02)
    page = validate_bundle(bundle_copy, other_site, tmp_path / "out", options).read_text().replace("\u00a0", " ")
    assert "prevalence estimated without labels: GC" in " ".join(capsys.readouterr().out.split())
    assert "assumes that only the frequencies of the classes differ" in page
    assert "the bundle is not changed" in page
    assert "Where 2 % of the images are GC, the PPV" in page
    shift = read_record(tmp_path / "out")["evaluation"]["prevalence_shift"]
    folder = tmp_path / "out" / "tables"
    classes = pd.read_csv(folder / "prevalence.csv", na_values="–").set_index("class")
    assert classes["proportion true, %"].to_numpy() == pytest.approx([100 / 3] * 3, rel=1e-5)
    estimated = [each["value"] for each in shift["estimated"]["classes"].values()]
    assert classes["proportion estimated without labels, %"].to_numpy() == pytest.approx(
        100 * np.array(estimated), rel=1e-4, abs=1e-4
    )
    probabilities = pd.read_csv(folder / "prevalence-probabilities.csv", na_values="–")
    assert list(probabilities["probabilities"]) == [
        "uncorrected",
        "corrected to the estimated prevalence",
        "corrected to the stated prevalence",
    ]
    decisions = pd.read_csv(folder / "prevalence-decisions.csv", na_values="–")
    assert len(decisions) == 5
    validate_bundle(bundle_copy, other_site, tmp_path / "out", dataclasses.replace(options, prevalence=None))
    assert len(pd.read_csv(folder / "prevalence-decisions.csv")) == 3
    assert "stated" not in (folder / "prevalence.csv").read_text().splitlines()[0]


def test_predict_estimates_the_prevalence_of_enough_unlabelled_images(
    bundle_copy, loaded_bundle, synthetic_root, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(predict_module, "load_model", lambda *_, **__: loaded_bundle)
    (tmp_path / "flat").mkdir()
    paths = sorted(path for path in synthetic_root.rglob("*.*") if path.is_file())[:30]
    for number, path in enumerate([*paths, *paths]):
        shutil.copy(path, tmp_path / "flat" / f"{number}-{path.name}")
    files = sorted((tmp_path / "flat").iterdir())
    predict(bundle_copy, list(map(str, files[:49])), tmp_path / "few.csv", PredictOptions())
    assert "prevalence" not in capsys.readouterr().out
    predict(bundle_copy, [str(tmp_path / "flat")], tmp_path / "p.parquet", PredictOptions())
    said = capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "p.parquet")
    columns = [f"probability/{name}" for name in loaded_bundle.description.short_names]
    original, _ = find_calibrated_prevalence(loaded_bundle.description)
    expected = estimate_prevalence(table[columns].to_numpy(), original=original).prevalence
    record = json.loads((tmp_path / "p.parquet.about.json").read_text())["prevalence"]
    assert [each["value"] for each in record["classes"].values()] == pytest.approx([each.value for each in expected])
    assert f"prevalence estimated without labels: GC {100 * expected[0].value:.1f} %" in said
    assert "each image counted as a patient" in said
    predict(bundle_copy, [str(tmp_path / "flat")], tmp_path / "q.csv", PredictOptions(group=PATIENT))
    assert "each image counted as a patient" not in capsys.readouterr().out
