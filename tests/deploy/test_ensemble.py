"""`pylorus ensemble` puts several runs into one bundle; only networks that did not see an image or its patient judge it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from scipy.special import log_softmax, softmax

import pylorus
from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json, write_json
from pylorus.deploy.card import format_threshold_guarantee
from pylorus.deploy.description import Weights
from pylorus.deploy.ensemble import EnsembleOptions, build_ensemble
from pylorus.deploy.ensemble_card import render_training_section, write_ensemble_page
from pylorus.deploy.ensemble_votes import MemberRun, collect_images
from pylorus.deploy.export import ExportOptions, export
from pylorus.deploy.licences import accept_licences, check_passing_on
from pylorus.deploy.model import load_bundle
from pylorus.deploy.monitor import MonitorOptions, monitor
from pylorus.deploy.onnx import load_export
from pylorus.deploy.predict import PredictOptions, predict_table
from pylorus.deploy.stress import compute_variants
from pylorus.evaluation.calibration import fit_temperature
from pylorus.runs.reading import SavedRun, SavedSplit, read_run


@pytest.fixture(scope="session")
def ensemble_folder(ensemble_runs, tmp_path_factory) -> Path:
    """The ensemble of two seeds of one split. Read it only."""
    output = tmp_path_factory.mktemp("ensemble") / "seeds"
    build_ensemble([ensemble_runs["first"], ensemble_runs["second"]], EnsembleOptions(output=output, device="cpu"))
    return output


def get_probabilities(table):
    return table[[name for name in table if name.startswith("probability/")]].to_numpy()


def test_its_probabilities_are_the_tempered_mean_of_those_of_its_runs(ensemble_runs, ensemble_folder, synthetic_root):
    images, options = [str(synthetic_root)], PredictOptions()
    ensemble = load_bundle(ensemble_folder / "model")
    members = [load_bundle(ensemble_runs[name] / "model") for name in ("first", "second")]
    assert ensemble.input.shape == (160, 96, 3), "both squares of an image are stacked"
    expected = np.mean([get_probabilities(predict_table(each, images, options)) for each in members], axis=0)
    tempered = softmax(np.log(expected) / ensemble.description.calibration.temperature, axis=1)
    table = predict_table(ensemble, images, options)
    np.testing.assert_allclose(get_probabilities(table), tempered, atol=1e-6)
    unlikeness = np.mean([predict_table(each, images, options)["unlikeness"] for each in members], axis=0)
    np.testing.assert_allclose(table["unlikeness"], unlikeness, atol=1e-6)


def read_calibrated(run, split):
    """Return labels and the logarithms of the calibrated probabilities that a run saved, sorted by image."""
    saved = read_run(run)
    stage = saved.stages[0]
    predictions = (stage.validation if split == "val" else stage.test).predictions
    logits = (stage.validation if split == "val" else stage.test).logits
    order = np.argsort(predictions.sample)
    temperature = fit_temperature(stage.validation.logits, stage.validation.predictions.true).temperature
    return predictions.true[order], log_softmax(logits[order] / temperature, axis=1)


def test_its_figures_are_those_of_the_test_images_and_its_gain_is_against_the_best_on_validation(
    ensemble_runs, ensemble_folder
):
    description = load_bundle(ensemble_folder / "model").description
    runs = [ensemble_runs[name] for name in ("first", "second")]
    true, _ = read_calibrated(runs[0], "val")
    tables = [read_calibrated(run, "val")[1] for run in runs]
    temperature = fit_temperature(np.log(np.mean(np.exp(tables), axis=0)), true)
    assert description.calibration.temperature == pytest.approx(temperature.temperature, rel=1e-3)
    ranks = [((table.argmax(1) == true).sum(), table[np.arange(len(true)), true].mean()) for table in tables]
    best = ranks.index(max(ranks))
    truth, _ = read_calibrated(runs[0], "test")
    tests = np.exp([read_calibrated(run, "test")[1] for run in runs])
    mean = softmax(np.log(tests.mean(axis=0)) / description.calibration.temperature, axis=1)
    accuracy = (mean.argmax(1) == truth).mean()
    assert description.test.accuracy.value == pytest.approx(accuracy)
    against_best, against_mean = description.ensemble.gains
    assert (against_best.best, against_mean.best) == (best, None)
    assert against_best.accuracy.value == pytest.approx(accuracy - (tests[best].argmax(1) == truth).mean())
    brier = [((table - np.eye(3)[truth]) ** 2).sum(axis=1).mean() for table in (mean, *tests)]
    assert against_mean.brier.value == pytest.approx(brier[0] - np.mean(brier[1:]), abs=1e-5)
    assert description.ensemble.voters == (2, 2)
    assert description.training.validated_on == "val"


def test_folds_are_judged_out_of_fold_and_what_that_leaves_unknown_is_said(
    ensemble_runs, synthetic_root, tmp_path, capsys
):
    runs = [ensemble_runs["first"], ensemble_runs["fold"]]
    build_ensemble(runs, EnsembleOptions(output=tmp_path / "folds", device="cpu"))
    printed = " ".join(capsys.readouterr().out.split())
    description = load_bundle(tmp_path / "folds" / "model").description
    table = pd.read_parquet(tmp_path / "folds" / "predictions.parquet")
    assert len(table) == 30
    assert set(table["votes"]) == {1}
    for run in runs:
        saved = read_run(run)
        split = saved.split.get_split_rows("test").sort_values("sample_id")
        _, expected = read_calibrated(run, "test")
        own = table.set_index("sha256").loc[list(split["sha256"])]
        columns = [name for name in own if name.startswith("average/")]
        np.testing.assert_allclose(own[columns].to_numpy(), np.exp(expected), atol=1e-5)
    assert description.training.validated_on == "out-of-fold"
    assert description.ensemble.gains == ()
    assert description.reference is None
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "folds" / "model"), str(synthetic_root), "--output", str(tmp_path / "p.csv")])
    with pytest.raises(PylorusError, match="measured by some of its networks at a time.*--baseline"):
        monitor(tmp_path / "folds" / "model", [tmp_path / "p.csv"], MonitorOptions(output=tmp_path / "monitor"))
    assert "of the average of both it is not known" in format_threshold_guarantee(description, "GC")
    for text in (printed, " ".join((tmp_path / "folds" / "model" / "MODEL_CARD.md").read_text().split())):
        assert "How the average of both performs on new images is not known" in text
        assert "What averaging gains is not known" in text
    assert "judges an image, as on these" in text
    assert "correctly classified out-of-fold images" in text
    assert "It does not account for what else was chosen on these images: the temperature." in text
    assert "specificity on out-of-fold images" in text


def test_its_networks_have_a_column_for_the_fold_only_if_one_has_a_fold(ensemble_folder, tmp_path):
    description = load_bundle(ensemble_folder / "model").description
    folds = {member.fold for member in description.ensemble.members}
    assert "fold" in pd.read_csv(ensemble_folder / "tables" / "networks.csv"), folds
    members = tuple(replace(member, fold=None) for member in description.ensemble.members)
    description = replace(description, ensemble=replace(description.ensemble, members=members))
    write_ensemble_page(description, tmp_path, ())
    assert list(pd.read_csv(tmp_path / "tables" / "networks.csv"))[:3] == ["network", "architecture", "seed"]
    assert "fold" not in pd.read_csv(tmp_path / "tables" / "networks.csv")
    assert "| fold |" not in render_training_section(description)


def test_where_some_networks_saw_an_image_the_others_judge_it(ensemble_runs, tmp_path):
    build_ensemble(list(ensemble_runs.values()), EnsembleOptions(output=tmp_path / "mixed", device="cpu"))
    ensemble = load_bundle(tmp_path / "mixed" / "model").description.ensemble
    shared = len(read_run(ensemble_runs["first"]).split.get_split_rows("test"))
    assert ensemble.voters == (1, 2)
    assert [gain.best for gain in ensemble.gains] == [None], "no network may judge all images"
    assert ensemble.gain_images == shared


@pytest.fixture(scope="module")
def exported(ensemble_folder, synthetic_root, tmp_path_factory):
    """The ensemble as one ONNX file."""
    output = tmp_path_factory.mktemp("export") / "onnx"
    pytest.importorskip("onnxscript")
    main(["export", str(ensemble_folder / "model"), "--images", str(synthetic_root), "--output", str(output)])
    return output


def test_one_onnx_file_gives_the_same_answers(exported, ensemble_folder, synthetic_root):
    record = json.loads((exported / "export.json").read_text())
    assert max(record["parity"]["probabilities"]) < 1e-5
    assert "prepared for the networks as 2 squares" in (exported / "README.md").read_text()
    images, options = [str(synthetic_root)], PredictOptions()
    ours = predict_table(load_export(exported), images, options)
    theirs = predict_table(load_bundle(ensemble_folder / "model"), images, options)
    np.testing.assert_allclose(get_probabilities(ours), get_probabilities(theirs), atol=1e-5)
    assert list(ours["why"]) == list(theirs["why"])


def test_the_commands_for_one_model_work_on_it(ensemble_folder, synthetic_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundle, images = str(ensemble_folder / "model"), str(synthetic_root)
    picture = next(synthetic_root.rglob("*.*"))
    for command in (
        ["predict", bundle, images, "--output", "p.csv"],
        ["explain", bundle, str(picture), "--output", "maps"],
        ["monitor", bundle, "p.csv", "--by", "10", "--output", "monitor"],
    ):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code in (0, 3)
    assert "mean over 2 networks" in json.loads((tmp_path / "maps" / "maps.json").read_text())["method"]
    model = pylorus.load_model(ensemble_folder)
    assert model.validate(synthetic_root, group=r"patient_\d+").metrics["groups"] == 15
    loaded = load_bundle(ensemble_folder / "model")
    variants = compute_variants([picture], loaded.input, loaded.run_network, ("whole", "defocus/5"))
    assert (variants.logits[0] != variants.logits[1]).any()
    with pytest.raises(PylorusError, match="an ensemble is exported in fp32 only"):
        export(ensemble_folder / "model", ExportOptions(images=synthetic_root, int8=True, output=tmp_path / "int8"))
    assert not (tmp_path / "int8").exists()


def test_a_heat_map_is_the_mean_of_those_of_its_networks(ensemble_folder):
    from pylorus.deploy.explain import compute_coarse_maps

    bundle = load_bundle(ensemble_folder / "model")
    image = np.random.default_rng(0).integers(0, 255, (1, *bundle.input.shape), dtype=np.uint8)
    parts = [
        compute_coarse_maps(each, bundle.select_input(image, number), [1]) for number, each in enumerate(bundle.members)
    ]
    size = max(part.shape[1] for part in parts)
    scaled = [
        torch.nn.functional.interpolate(part[:, None], size=(size, size), mode="bilinear")[:, 0] for part in parts
    ]
    mean = torch.stack([part / part.max().clamp_min(1e-30) for part in scaled]).mean(dim=0)
    torch.testing.assert_close(compute_coarse_maps(bundle, image, [1]), mean)


def test_each_licence_of_its_networks_has_to_be_accepted_and_one_command_can_do_so(ensemble_folder):
    bundle = load_bundle(ensemble_folder / "model")
    parts = zip(bundle.description.ensemble.members, ("CC BY-NC 4.0", "dinov3-license"), strict=True)
    members = tuple(replace(member, weights=Weights("w.pth", "0" * 64, licence)) for member, licence in parts)
    description = replace(bundle.description, ensemble=replace(bundle.description.ensemble, members=members))

    def accept(*names):
        accepted, contents = accept_licences(description, bundle.contents, names)
        weights = [network.weights for network in accepted.list_networks()]
        return check_passing_on(weights, what="the export", how="type --accept-licence {licence}"), contents

    with pytest.raises(PylorusError) as caught:
        accept()
    assert "type --accept-licence 'CC BY-NC 4.0' --accept-licence dinov3-license: the" in str(caught.value)
    with pytest.raises(PylorusError, match="type --accept-licence dinov3-license: the"):
        accept("cc-by-nc-4.0")
    with pytest.raises(PylorusError, match="found mit, but"):
        accept("cc-by-nc-4.0", "mit")
    warnings, contents = accept("cc-by-nc-4.0", "dinov3-license")
    assert warnings == []
    assert contents["MODEL_CARD.md"].decode().count("made this model or its export accepted this licence") == 2


def test_what_does_not_fit_together_is_refused_and_nothing_is_written(ensemble_runs, tmp_path):
    first, output = ensemble_runs["first"], tmp_path / "new"

    def refuse(words, *runs):
        with pytest.raises(PylorusError, match=words):
            build_ensemble(list(runs), EnsembleOptions(output=output, device="cpu"))
        assert not list(tmp_path.glob("*new*"))

    def change(name, **settings):
        folder = Path(shutil.copytree(first, tmp_path / name))
        config = OmegaConf.load(folder / "config.yaml")
        for key, value in settings.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        OmegaConf.save(config, folder / "config.yaml")
        return folder

    refuse("is named twice", first, first / "model")
    refuse("found 1 run, expected 2 to 64", first)
    refuse("is a copy of", first, change("copy"))
    names = ["gastric_ulcer", "gastric_cancer", "chronic_gastritis"]
    other = change("classes", data__classes=names, data__short_names=["GU", "GC", "CG"])
    refuse("data.classes: found gastric_ulcer, gastric_cancer and .* classes in the same order", first, other)
    refuse("deploy.sensitivity: found 0.8 in", first, change("promise", deploy__sensitivity=0.8))
    optimistic = change("optimistic", data__validation="test")
    stage = optimistic / "pretrain"
    shutil.copy(stage / "predictions-test.parquet", stage / "predictions-val.parquet")
    refuse("validated on its test images", first, optimistic)
    unfinished = change("unfinished")
    write_json(
        unfinished / "status.json", read_json(unfinished / "status.json") | {"state": "interrupted"}, sealed=True
    )
    refuse("is interrupted, expected a finished one. Continue it: pylorus train resume=", first, unfinished)
    refuse("no such folder", first, tmp_path / "missing")


def test_an_ensemble_is_no_run_of_another(ensemble_runs, ensemble_folder, tmp_path):
    for ensemble in (ensemble_folder, ensemble_folder / "model"):
        with pytest.raises(PylorusError, match="is an ensemble, expected a run or a sweep"):
            build_ensemble([ensemble_runs["first"], ensemble], EnsembleOptions(output=tmp_path / "new", device="cpu"))
    with pytest.raises(SystemExit, match="is an ensemble; its bundle is"):
        main(["predict", str(ensemble_folder), str(tmp_path), "--output", str(tmp_path / "p.csv")])


def test_an_image_that_changed_since_its_run_is_named(ensemble_runs, synthetic_root, tmp_path):
    root = Path(shutil.copytree(synthetic_root, tmp_path / "images"))
    runs = [Path(shutil.copytree(ensemble_runs[name], tmp_path / name)) for name in ("first", "second")]
    for run in runs:
        config = OmegaConf.load(run / "config.yaml")
        config.data.root = str(root)
        OmegaConf.save(config, run / "config.yaml")
    path = root / read_run(runs[0]).split.get_split_rows("test")["path"].iloc[0]
    other = next(each for each in root.rglob("*.*") if each != path)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    options = EnsembleOptions(output=tmp_path / "new", device="cpu")
    with pytest.raises(PylorusError, match=f"{path.name}: has changed since the run"):
        build_ensemble(runs, options)
    path.unlink()
    with pytest.raises(PylorusError, match=f"{path.name}: .* no longer exists"):
        build_ensemble(runs, options)
    path.write_bytes(content)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["ensemble"]["members"].pop(), "ensemble.members: found 1, expected 2 to 64"),
        (lambda content: content.update(format_version=2), "format_version 2 with an ensemble"),
        (
            lambda content: content["ensemble"]["members"][1]["input"].update(policy=1),
            "by different rules|input.policy",
        ),
        (lambda content: content["ensemble"]["members"][1].update(architecture="resnet18"), "does not fit"),
        (lambda content: content["input"].update(size=32), "that of a member with the largest images"),
    ],
)
def test_a_damaged_description_is_refused(ensemble_folder, write_hashes, tmp_path, change, words):
    bundle = Path(shutil.copytree(ensemble_folder / "model", tmp_path / "copy"))
    content = json.loads((bundle / "model.json").read_text())
    change(content)
    (bundle / "model.json").write_text(json.dumps(content))
    with pytest.raises(PylorusError, match=words):
        load_bundle(write_hashes(bundle))


# --- votes: no training needed ---


def build_member(rows, *, grouped=True):
    """A run that has the images (content, patient, split), as far as the votes need it."""
    table = pd.DataFrame(rows, columns=["sha256", "group", "split"])
    table = table.assign(path=table["sha256"], sample_id=table["sha256"])
    table["class"] = ["a" if int(name) % 2 else "b" for name in table["sha256"]]
    if not grouped:
        table["group"] = table["path"]
    config = OmegaConf.create({"data": {"classes": ["a", "b"], "root": "/images", "group": "x" if grouped else None}})
    run = SavedRun(Path("/run"), {"state": "finished"}, config, SavedSplit("", table), ())
    return MemberRun(run, SimpleNamespace())


def test_with_one_split_all_networks_vote_and_thresholds_are_fitted_on_validation_images():
    rows = [("1", "p1", "train"), ("2", "p2", "val"), ("3", "p3", "test"), ("4", "p3", "test")]
    images = collect_images([build_member(rows), build_member(rows)])
    assert not images.is_out_of_fold
    assert images.fit_votes.tolist() == [[False, True, False, False]] * 2
    assert images.test_votes.tolist() == [[False, False, True, True]] * 2


def test_a_network_has_no_vote_on_an_image_of_a_patient_on_whom_it_was_developed():
    first = build_member([("1", "p1", "train"), ("2", "p2", "val"), ("3", "p3", "test"), ("4", "p4", "test")])
    # The second run does not hold image 3, but was trained on another image of its patient, and on image 4.
    second = build_member([("5", "p3", "train"), ("4", "p4", "train"), ("6", "p6", "test")])
    images = collect_images([first, second])
    votes = dict(zip(images.table["sha256"], images.test_votes.T.tolist(), strict=True))
    assert images.is_out_of_fold is False
    assert votes["3"] == votes["4"] == [True, False]
    assert votes["6"] == [False, True]


def test_a_run_without_patients_takes_them_from_the_others():
    first = build_member([("1", "p1", "train"), ("2", "p2", "val"), ("3", "p3", "test")])
    second = build_member([("1", "", "test"), ("4", "", "val"), ("3", "", "train"), ("2", "", "test")], grouped=False)
    third = build_member([("5", "p2", "train"), ("2", "p2", "test"), ("1", "p1", "val")])
    images = collect_images([first, second, third])
    votes = dict(zip(images.table["sha256"], images.test_votes.T.tolist(), strict=True))
    assert votes["2"] == [False, True, False], "the third was trained on another image of this patient"
    assert images.left_out == 0


def test_without_an_image_that_may_be_judged_it_is_refused():
    first = build_member([("1", "p1", "train"), ("2", "p2", "val"), ("3", "p1", "test")])
    with pytest.raises(PylorusError, match="was used in the development of the networks that could judge it"):
        collect_images([first, first])
