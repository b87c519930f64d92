"""A bake-off: what it refuses before it reads images, what it writes, and how it continues."""

import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm import create_model

from pylorus.core.errors import PylorusError
from pylorus.core.io import lock_folder, read_json
from pylorus.launch import bakeoff
from pylorus.launch.bakeoff import BakeoffOptions, run_bakeoff
from pylorus.launch.main import run_overrides
from pylorus.report.bakeoff import BakeoffResult, NetworkResult, plot_accuracy_against_cost
from pylorus.runs.predictions import build_prediction_table, check_predictions, read_predictions
from tests.conftest import TINY

GRID = {"lrs": (1e-3, 3e-2), "weight_decays": (0.0, 0.1), "seeds": 2, "epochs": 3}
COMMON = {"weights": "none", "group": r"patient_\d+", "sizes": (32,), **GRID}


@pytest.fixture
def compare(synthetic_root, tmp_path):
    """Run a bake-off of tiny networks on the synthetic class folders, with a cache of its own."""

    def run(*models, root=synthetic_root, output="output", **options):
        overrides = (f"cache.folder={tmp_path / 'cache'}", "trainer.accelerator=cpu", *options.pop("overrides", ()))
        run_bakeoff(
            root, tmp_path / output, BakeoffOptions(models=models, overrides=overrides, **{**COMMON, **options})
        )
        return tmp_path / output

    return run


# --- refused before any image is read ---


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["resnet5"], {}, 'no resnet5, .*Did you mean "resnet50"'),
        (["resnet50.tv_in2k"], {}, 'no weights "resnet50.tv_in2k"'),
        (["resnet50", "resnet50"], {}, "resnet50 is named twice. Leave one out"),
        (["resnet50", "resnet50.tv_in1k"], {}, "resnet50.tv_in1k is the same network as resnet50"),
        ([], {}, "--models: found none"),
        ([TINY], {"lrs": (0.0,)}, "--lr: found 0, expected more than 0"),
        ([TINY], {"lrs": (0.1, 0.1)}, "--lr: found a value twice"),
        ([TINY], {"weight_decays": (-1.0,)}, "--weight-decay: found -1, expected 0 or more"),
        ([TINY], {"seeds": 0}, "--seeds: found 0, expected at least 1"),
        ([TINY], {"sizes": (64, 64)}, "--image-size: found a size twice"),
        ([TINY], {"overrides": ("optimizer.lr=1",)}, "--set: found optimizer.lr=1, expected KEY=VALUE"),
        ([TINY], {"overrides": ("data.validation=test",)}, "data.validation: found test"),
        ([TINY], {"overrides": ("trainer.batch_size=auto",)}, "trainer.batch_size: found auto"),
        ([TINY], {"weights": "/no/folder"}, "--weights: found /no/folder, expected hub, none, or an existing folder"),
        (["levit_128s"], {"sizes": ()}, "levit_128s has no single linear layer as its head"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_images_are_read(compare, monkeypatch, models, options, message):
    monkeypatch.setattr(bakeoff, "prepare_images", lambda *_: pytest.fail("images were read"))
    with pytest.raises(PylorusError, match=message):
        compare(*models, **options)


def test_a_folder_of_images_that_is_not_there_is_named(compare, tmp_path):
    with pytest.raises(PylorusError, match="ROOT: found .*/imagez, expected an existing folder"):
        compare(TINY, root=tmp_path / "imagez")


def test_all_missing_weights_are_listed_before_images_are_read(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(bakeoff, "prepare_images", lambda *_: pytest.fail("images were read"))
    (tmp_path / "weights").mkdir()
    save_file(create_model(TINY).state_dict(), tmp_path / "weights" / f"{TINY}.safetensors")
    with pytest.raises(PylorusError, match="weights of 2 networks are missing") as caught:
        compare("resnet50", TINY, "vgg19", weights=str(tmp_path / "weights"))
    message = str(caught.value)
    assert f"{tmp_path}/weights/resnet50.tv_in1k.safetensors, from " in message
    assert "timm/resnet50.tv_in1k" in message
    assert "vgg19.tv_in1k.safetensors" in message
    assert not (tmp_path / "output").exists()


def test_weights_of_another_network_are_refused_before_images_are_read(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(bakeoff, "prepare_images", lambda *_: pytest.fail("images were read"))
    (tmp_path / "weights").mkdir()
    save_file(create_model("test_efficientnet").state_dict(), tmp_path / "weights" / "test_resnet.safetensors")
    with pytest.raises(PylorusError, match="test_resnet.safetensors"):
        compare("test_resnet", weights=str(tmp_path / "weights"))


def test_a_folder_of_something_else_is_left_alone(compare, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.txt").write_text("years of work")
    with pytest.raises(PylorusError, match="already exists, expected a new or empty folder"):
        compare(TINY)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["thesis.txt"]


def test_a_second_bakeoff_in_the_folder_waits_for_the_first(compare, tmp_path):
    (tmp_path / "output").mkdir()
    with (
        lock_folder(tmp_path / "output", str),
        pytest.raises(PylorusError, match="another process runs a bake-off in this folder"),
    ):
        compare(TINY)


@pytest.mark.slow
def test_a_folder_whose_bakeoff_failed_before_the_first_network_takes_corrected_options(compare):
    with pytest.raises(PylorusError, match="data.group"):
        compare(TINY, group="patent")
    output = compare(TINY)
    assert read_json(output / "bakeoff.json")["winner"] == TINY


# --- what it writes ---


@pytest.mark.slow
def test_a_bakeoff_writes_its_page_and_continues_where_it_was(compare, capsys, tmp_path):
    output = compare("test_resnet", "test_efficientnet")
    record = read_json(output / "bakeoff.json")
    assert {each["network"] for each in record["networks"]} == {"test_resnet", "test_efficientnet"}
    table = pd.read_csv(output / "tables" / "all-heads.csv")
    assert len(table) == 2 * 2 * 2 * 2 * 2  # networks, learning rates, decays, class weights, seeds
    page = (output / "report.html").read_text()
    assert "RANDOM WEIGHTS" in page
    assert record["winner"] in page
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(record["command"])
    assert "already done" not in printed

    # A third network is compared; the others are not computed again.
    before = {path.name: path.read_bytes() for path in (output / "networks").iterdir()}
    compare("test_resnet", "test_efficientnet", "test_convnext")
    assert capsys.readouterr().out.count("already done") == 2
    assert all((output / "networks" / name).read_bytes() == content for name, content in before.items())

    # Without their results, features are still found in the cache, and give the same.
    shutil.rmtree(output / "networks")
    evaluated = []
    with pytest.MonkeyPatch.context() as patch:
        compute = bakeoff.compute_features
        patch.setattr(bakeoff, "compute_features", lambda *args: evaluated.append(1) or compute(*args))
        patch.setattr("pylorus.model.frozen_prefix.CutNetwork.run_prefix", _fail_for_many_images)
        compare("test_resnet", "test_efficientnet")
    assert len(evaluated) == 2 * 3
    for name, content in before.items():
        if name.endswith(".parquet"):
            assert read_predictions(output / "networks" / name).accuracy == _read(content, tmp_path).accuracy

    with pytest.raises(PylorusError, match=r"has a bake-off of other images:\n  data\.split_seed: it has 0, found 1"):
        compare("test_resnet", overrides=("data.split_seed=1",))


def _fail_for_many_images(self, pixels):
    """Compute the prefix for the samples that a split is verified on, and for no batch of images."""
    from pylorus.model.frozen_prefix import _run_graph

    assert len(pixels) <= 2, "features were computed again"
    return _run_graph(self.network, self.prefix, [pixels])


def _read(content, folder):
    (folder / "copy.parquet").write_bytes(content)
    return read_predictions(folder / "copy.parquet")


def draw_tinted_images(root):
    """Draw images whose class a network of random weights can tell, if not always: noise with a tint."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir(parents=True)
        for number in range(60):
            image = random.normal(110, 40, (40, 40, 3)) + 25 * random.normal(size=3)
            image[..., label] += 45
            path = root / name / f"patient_{label}{number // 2:02d}_{number}.png"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


@pytest.mark.slow
def test_the_chosen_head_is_as_good_as_one_of_the_stage_and_its_command_works(compare, capsys, tmp_path):
    draw_tinted_images(tmp_path / "images")
    grid = {"lrs": (0.1,), "weight_decays": (0.01,), "class_weights": ("none",), "seeds": 1, "epochs": 10}
    output = compare("test_resnet", root=tmp_path / "images", **grid)
    command = read_json(output / "bakeoff.json")["command"]
    words = shlex.split(command)[2:]
    assert {"stage=both", "stages.pretrain.lr=0.1", "seed=0", f"data.root={tmp_path / 'images'}"} <= set(words)
    small = ["stages.finetune.epochs=1", "report=false", "trainer.progress=false"]
    run = run_overrides([*words, *small], tmp_path / "run")
    assert "features pretrain: 152 cached, 0 computed" in capsys.readouterr().out
    assert (run.path / "split.csv").read_bytes() == (output / "data" / "split.csv").read_bytes()
    for split in ("val", "test"):
        ours = read_predictions(output / "networks" / f"test_resnet-{split}.parquet")
        alone = read_predictions(run.get_predictions_path("pretrain", split))
        assert min(ours.accuracy.value, alone.accuracy.value) > 0.5
        assert ours.accuracy.low <= alone.accuracy.value <= ours.accuracy.high
        assert alone.accuracy.low <= ours.accuracy.value <= alone.accuracy.high
        assert (ours.predictions.predicted == alone.predictions.predicted).mean() >= 0.9


@pytest.mark.slow
def test_a_head_with_nan_features_ends_with_a_message(compare, monkeypatch):
    monkeypatch.setattr(bakeoff, "check_linear_head", lambda *_, **__: None)
    compute = bakeoff.compute_features

    def spoil(*args):
        data = compute(*args)
        return type(data)(torch.full_like(data.features, torch.nan), data.label)

    monkeypatch.setattr(bakeoff, "compute_features", spoil)
    with pytest.raises(PylorusError, match="all heads diverged"):
        compare("test_resnet")


# --- the choice, and the comparisons ---


def predict(right, *, split="test"):
    """Predictions that are right for some images, of two classes in turn."""
    images = len(right)
    label = np.arange(images) % 2
    rows = pd.DataFrame({
        "sample_id": [f"image {index}" for index in range(images)],
        "group": [f"image {index}" for index in range(images)],
        "label": label,
    })  # fmt: skip
    logits = np.where(np.eye(2)[np.where(right, label, 1 - label)] > 0, 2.0, 0.0).astype(np.float32)
    return check_predictions(build_prediction_table(rows, logits, names=["A", "B"], split=split))


def build_network(name, right, *, val_accuracy, milliseconds=1.0, weights="from the hub"):
    record = {
        "parameters": 1000, "weight_bytes": 4000, "activation_bytes": 100, "forward_seconds": milliseconds / 1000,
        "seconds": {"features": 1.0, "heads": 1.0}, "val_accuracy": val_accuracy, "val_loss": 0.5,
        "val_accuracy_by_seed": [val_accuracy], "heads": [],
        "chosen": {"lr": 0.1, "weight_decay": 0.0, "class_weights": "none", "loss": "cross_entropy", "seed": 0, "epoch": 1},
    }  # fmt: skip
    val = predict(np.ones(10, dtype=bool), split="val")
    return NetworkResult(name, f"{name}, {weights}", 64, None, val, predict(right), record)


def test_validation_chooses_the_winner_and_its_comparisons_are_corrected():
    right = np.arange(60) >= 3
    worse, equal = np.arange(60) >= 20, np.arange(60) >= 2
    networks = (
        build_network("bad", worse, val_accuracy=0.7),
        build_network("good", right, val_accuracy=0.9, milliseconds=9),
        build_network("same", equal, val_accuracy=0.8),
    )
    result = BakeoffResult(networks, ("A", "B"), is_grouped=True, command="python train.py")
    assert [each.label for each in result.ranked] == ["good", "same", "bad"]
    same, bad = result.contests
    assert bad.corrected == min(1.0, 2 * bad.p_value)  # the smaller of two
    assert same.corrected == 1
    assert bad.difference.value == pytest.approx(17 / 60)
    text = " ".join(result.findings)
    assert "It is better than bad on the test images" in text
    assert "These test images show no difference to same" in text
    assert "same is the fastest: 1.0 ms an image in place of 9.0 ms" in text


def test_a_network_that_validation_did_not_choose_but_is_better_is_named():
    networks = (
        build_network("chosen", np.arange(60) >= 20, val_accuracy=0.9),
        build_network("better", np.arange(60) >= 1, val_accuracy=0.8),
    )
    result = BakeoffResult(networks, ("A", "B"), is_grouped=True, command="")
    assert any(text.startswith("better is better on the test images") for text in result.findings)
    assert not any("It is better than" in text for text in result.findings)


def test_one_network_needs_no_comparison():
    result = BakeoffResult((build_network("only", np.ones(20, dtype=bool), val_accuracy=1.0),), ("A", "B"), True, "")
    assert result.contests == []
    assert len(result.findings) == 1


@pytest.mark.parametrize("milliseconds", [(1.4, 4.1), (3.0, 3.3), (3.0, 80.0)])
def test_the_axis_of_times_has_numbers_whatever_the_times_are(milliseconds):
    networks = tuple(
        build_network(f"network {each}", np.arange(60) >= 5, val_accuracy=0.9, milliseconds=each)
        for each in milliseconds
    )
    figure = plot_accuracy_against_cost(BakeoffResult(networks, ("A", "B"), True, "")).figure
    figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    assert len({each.label1.get_text() for each in ticks if low <= each.get_loc() <= high} - {""}) >= 3
