"""The bundle of a run: fitted on validation images, evaluated on test images, the same after a kill."""

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from pylorus.config.schema import Config, DeployConfig
from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.card import render_model_card
from pylorus.deploy.model import load_bundle
from pylorus.deploy.thresholds import assess_unlike_images, format_unlike_images, resolve_deciding_class
from pylorus.evaluation.calibration import fit_temperature, probabilities_of_logits
from pylorus.evaluation.decisions import ROUNDING, fit_set_limits, prediction_sets, threshold_at_sensitivity
from pylorus.launch.train import run
from pylorus.model.inference import compute_unlikeness
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY

NAMES = ("GC", "GU", "CG")


@pytest.fixture(scope="module")
def description(bundle_folder):
    return load_bundle(bundle_folder).description


def saved(trained_run, part, wanted="logit"):
    table = pd.read_parquet(trained_run.get_predictions_path(trained_run.shipped.name, part))
    true = table["true"].map({name: place for place, name in enumerate(NAMES)}).to_numpy(dtype=np.int64)
    return true, table[[f"{wanted}/{name}" for name in NAMES]].to_numpy(dtype=np.float64), table


def test_temperature_and_thresholds_are_fitted_on_validation_images(trained_run, description):
    true, logits, table = saved(trained_run, "val")
    fitted = fit_temperature(logits, true)
    assert description.calibration.temperature == fitted.temperature
    shares = probabilities_of_logits(logits, temperature=fitted.temperature)
    for place, name in enumerate(NAMES):
        groups = table["group"].to_numpy(dtype=str)
        expected = threshold_at_sensitivity(
            true == place, shares[:, place], groups, sensitivity=0.95, confidence=0.9, margin=ROUNDING
        )
        assert description.decision.get_threshold(name) == expected
    fitted_limits = fit_set_limits(shares, true, groups, coverage=0.5)
    for limit, lowest in zip(description.prediction_sets.get_limits(NAMES).lowest, fitted_limits.lowest, strict=True):
        assert limit == (None if lowest is None else max(0.0, lowest - ROUNDING))
    right = shares.argmax(axis=1) == true
    assert (shares.max(axis=1)[right] < description.abstention.unsure_below).mean() <= 0.05


def test_the_card_reports_too_few_validation_patients(bundle_folder, description):
    fixed = description.decision.get_threshold("GC")
    assert not fixed.is_guaranteed
    card = (bundle_folder / "MODEL_CARD.md").read_text()
    assert "The validation set is too small to guarantee a sensitivity of 95 % for GC with 90 % confidence" in card
    assert fixed.patients == 1
    assert "there is 1 validation patient with GC, and 45 are needed" in card
    assert f"at least 95 % with {math.floor(1000 * fixed.confidence_reached) / 10} % confidence" in card


def test_figures_of_prediction_sets_are_those_of_the_test_images(trained_run, bundle_folder, description):
    true, logits, table = saved(trained_run, "test")
    members = prediction_sets(
        probabilities_of_logits(logits, temperature=description.calibration.temperature),
        description.prediction_sets.get_limits(NAMES),
    )
    sizes = pd.Series(members.sum(axis=1)).groupby(table["group"]).mean()
    assert description.prediction_sets.test.size.value == pytest.approx(sizes.mean())
    for place, name in enumerate(NAMES):
        covered = pd.Series(members[true == place, place]).groupby(table["group"][true == place].to_numpy()).mean()
        assert description.prediction_sets.test.coverage[name].value == pytest.approx(covered.mean())
    assert (
        "the set contains the true class with a probability of at least 50 %"
        in (bundle_folder / "MODEL_CARD.md").read_text()
    )


@pytest.mark.parametrize(("name", "short"), [(None, "GC"), ("GU", "GU"), ("gastric_ulcer", "GU")])
def test_the_class_that_decides_may_be_chosen_by_either_name(name, short):
    classes = {"classes": ("gastric_cancer", "gastric_ulcer"), "short_names": ("GC", "GU")}
    assert resolve_deciding_class(DeployConfig(class_name=name), **classes) == short
    with pytest.raises(PylorusError, match=r'deploy.class_name: found "GX", expected one of GC, GU'):
        resolve_deciding_class(DeployConfig(class_name="GX"), **classes)


def test_the_unlikeness_threshold_rejects_at_most_5_percent_of_validation_images(
    trained_run, description, bundle_folder, synthetic_root
):
    bundle = load_bundle(bundle_folder)
    split = pd.read_csv(trained_run.path / "split.csv", dtype=str)

    def far(part):
        images = bundle.input.load_images([synthetic_root / path for path in split[split["split"] == part]["path"]])
        return bundle.predict_images(images).unlikeness

    assert (far("val") > description.abstention.unlike_above + 1e-6).mean() <= 0.05
    assert (far("test") > description.abstention.unlike_above).mean() == pytest.approx(
        description.abstention.unlike_test.value
    )


def test_figures_are_those_of_the_test_images(trained_run, description):
    true, logits, table = saved(trained_run, "test")
    assert description.test.images == len(table)
    assert description.test.groups == table["group"].nunique()
    assert description.test.accuracy.value == pytest.approx((logits.argmax(axis=1) == true).mean())
    assert description.test.accuracy.low < description.test.accuracy.value < description.test.accuracy.high


def test_the_hashes_can_be_checked_with_sha256sum(bundle_folder):
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=bundle_folder, check=False).returncode
        == 0
    )
    listed = {line.split("  ")[1] for line in (bundle_folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in bundle_folder.iterdir()} - {"SHA256SUMS"}


def test_the_unlikeness_file_contains_no_features_of_single_images(bundle_folder):
    found = load_file(bundle_folder / "unlike.safetensors")
    assert [(name, len(tensor)) for name, tensor in found.items()] == [("directions", 3)]


def test_the_card_contains_all_required_facts(bundle_folder, synthetic_root):
    text = (bundle_folder / "MODEL_CARD.md").read_text()
    for part in (
        "Not a medical device",
        "gastric_cancer",
        "95 % confidence intervals",
        "false-alarm rate",
        "Licence",
        "precision 32",
    ):
        assert part in text.replace("\\", "")
    assert "patient_" not in text
    assert str(synthetic_root) not in text
    assert ".jpg" not in text


@pytest.mark.parametrize(
    ("before", "after", "leaks", "present", "absent"),
    [
        ("", "", None, "All images of a patient (group) are in the same split.", "Leakage"),
        ("", "", {"patient": 2, "near": 3}, "patients (2) and copies of images (3)", "are in the same split."),
        ('"grouped": true', '"grouped": false', None, "Patients are unknown", "are in the same split."),
        ('"data": "folders"', '"data": "synthetic"', None, "The images are **synthetic**", "no such text"),
        (
            '"validated_on": "val"',
            '"validated_on": "test"',
            None,
            "test images (data.validation=test)",
            "correctly classified validation images",
        ),
    ],
)
def test_the_card_describes_the_actual_split(bundle_folder, before, after, leaks, present, absent):
    content = (bundle_folder / "model.json").read_text()
    assert before in content
    text = render_model_card(read_description(content.replace(before, after).encode()), leaks=leaks)
    assert present in text
    assert absent not in text


def test_names_in_the_card_are_escaped(bundle_folder):
    content = (bundle_folder / "model.json").read_text().replace("gastric_ulcer", "<script>alert(1)</script>|`*")
    text = render_model_card(read_description(content.encode()))
    assert "<script>" not in text
    assert "\\|\\`\\*" in text


def test_predictions_do_not_depend_on_the_batch_and_use_the_runs_network(trained_run, bundle_folder, synthetic_root):
    bundle = load_bundle(bundle_folder)
    images = bundle.input.load_images(sorted((synthetic_root / "gastric_ulcer").iterdir()))
    whole, single = (
        bundle.run_network(images),
        [bundle.run_network(images[place : place + 1]) for place in range(len(images))],
    )
    for field in ("logits", "unlikeness"):
        assert torch.allclose(getattr(whole, field), torch.cat([getattr(one, field) for one in single]), atol=1e-5)
    with torch.inference_mode():
        pixels = bundle.classifier.normalize_images(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        assert torch.equal(bundle.classifier.network(pixels), whole.logits)


def test_a_bundle_killed_while_written_is_written_again_to_the_same_bytes(trained_run, tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    expected = {path.name: path.read_bytes() for path in (trained_run.path / "model").iterdir()}
    replace = Path.replace
    for name in ("unlike.safetensors", "SHA256SUMS"):
        folder = RunFolder(Path(shutil.copytree(trained_run.path, tmp_path / name)))
        shutil.rmtree(folder.path / "model")
        status = read_json(folder.path / "status.json")
        (folder.path / "status.json").write_text(json.dumps({**status, "state": "failed"}))

        def dying(path, target, name=name):
            if Path(target).name == name:
                raise KilledError
            return replace(path, target)

        with monkeypatch.context() as patched, pytest.raises(KilledError):
            patched.setattr(Path, "replace", dying)
            run(folder)
        run(folder)
        found = {path.name: path.read_bytes() for path in (folder.path / "model").iterdir()}
        assert found.keys() == expected.keys()
        assert [each for each in expected if found[each] != expected[each]] == []


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_convnext.r160_in1k", "test_efficientnet.r160_in1k"])
def test_logits_with_features_equal_those_of_the_network(name):
    import timm

    from pylorus.model.inference import compute_logits_and_features

    network = timm.create_model(name, num_classes=3).eval()
    pixels = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        logits, features = compute_logits_and_features(network, pixels)
        assert torch.equal(logits, network(pixels))
    assert features.shape == (2, network.head_hidden_size)


def test_arguments_that_a_bundle_cannot_store_stop_the_run_at_its_start():
    from pylorus.model.backbone import build_backbone

    config = Config().model
    config.name, config.weights, config.args = TINY, "none", {"drop_rate": {"of": 1}}
    with pytest.raises(PylorusError, match="model.args.drop_rate: found"):
        build_backbone(config, classes=3)


def test_an_older_bundle_still_decides_by_features_alone(bundle_folder, tmp_path, synthetic_root):
    old = Path(shutil.copytree(bundle_folder, tmp_path / "old"))
    (old / "appearance.safetensors").unlink()
    sums = (old / "SHA256SUMS").read_text().splitlines()
    (old / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sums if "appearance" not in line))
    bundle, current = load_bundle(old), load_bundle(bundle_folder)
    images = bundle.input.load_images(sorted((synthetic_root / "gastric_ulcer").iterdir())[:4])
    with torch.inference_mode():
        _, features = bundle.classifier.forward_with_features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    expected = compute_unlikeness(features, load_file(old / "unlike.safetensors")["directions"])
    assert torch.allclose(bundle.run_network(images).unlikeness, expected, atol=1e-6)
    assert not torch.allclose(current.run_network(images).unlikeness, expected, atol=1e-3)


def test_recolored_images_are_called_unlike_although_the_features_hardly_change(bundle_folder, synthetic_root):
    bundle = load_bundle(bundle_folder)
    images = bundle.input.load_images(sorted((synthetic_root / "gastric_ulcer").iterdir()))
    swapped = np.ascontiguousarray(images[..., ::-1])
    assert (bundle.predict_images(swapped).why == "unlike").all()


def test_a_bundle_without_guarantee_promises_what_its_threshold_was_set_for(bundle_folder):
    values = json.loads((bundle_folder / "model.json").read_text())
    assert values["abstention"]["guarantee"]["patients"] > 0
    del values["abstention"]["guarantee"]
    old = read_description(json.dumps(values).encode())
    assert old.abstention.promised_false_alarms == old.abstention.false_alarms == 0.05
    assert "at most 5.0 % of the validation images are flagged" in render_model_card(old)


def test_the_card_says_what_false_alarms_few_patients_guarantee(bundle_folder, description):
    guarantee = description.abstention.guarantee
    assert guarantee.proportion_reached > 0.05
    assert "None of them is flagged" in (bundle_folder / "MODEL_CARD.md").read_text()
    assert description.abstention.promised_false_alarms == guarantee.proportion_reached


@pytest.mark.parametrize(("unlike", "foreign"), [(3, False), (12, True)])
def test_a_set_is_foreign_if_more_images_are_unlike_than_promised(description, unlike, foreign):
    abstention = dataclasses.replace(description.abstention, guarantee=None)
    flags = np.arange(60) < unlike
    tested = assess_unlike_images(flags, None, abstention)
    assert tested["p"] == pytest.approx(stats.binomtest(unlike, 60, 0.05, alternative="greater").pvalue, abs=1e-9)
    assert tested["foreign"] == foreign
    assert ("FOREIGN" in format_unlike_images(tested)) == foreign
    # All images of three patients: three independent observations, not sixty.
    by_patient = assess_unlike_images(flags, np.repeat(np.arange(3), 20), abstention)
    assert by_patient["p"] > tested["p"]
