"""A run in this process: what it writes, and that it repeats bit for bit."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pylorus.core.errors import PylorusError
from pylorus.core.io import write_text
from pylorus.launch.train import run
from pylorus.runs.folder import RunFolder
from pylorus.runs.predictions import read_predictions
from tests.conftest import TINY

FAST = ["trainer=cpu", "data.image_size=32", "stages.pretrain.epochs=2", "stages.finetune.epochs=2", "model=timm",
        f"model.name={TINY}", "model.weights=none", "data.workers=0", "trainer.progress=false", "report=false"]  # fmt: skip
CLASSES = "data.classes=[gastric_cancer,gastric_ulcer,chronic_gastritis]"


@pytest.fixture(scope="module")
def train_run(compose_config, synthetic_root, tmp_path_factory):
    """Run on the synthetic class folders with additional arguments; return the run's folder."""
    from omegaconf import OmegaConf

    def go(*words: str) -> RunFolder:
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        config = compose_config("data=folders", f"data.root={synthetic_root}", r"data.group=patient_\d+", *FAST, *words)
        with folder.set_starting(list(words)):
            write_text(folder.config, OmegaConf.to_yaml(config))
        run(folder)
        return folder

    return go


@pytest.fixture(scope="module")
def two_stage_run(train_run):
    return train_run(CLASSES, "data.short_names=[GC,GU,CG]", "deploy.stage=finetune")


def weights(folder):
    return load_file(folder.path / "model" / "model.safetensors")


def test_a_run_writes_all_documented_files(two_stage_run):
    assert two_stage_run.read_status()["state"] == "finished"
    names = {str(path.relative_to(two_stage_run.path)) for path in two_stage_run.path.rglob("*") if path.is_file()}
    assert {
        "status.json", "config.yaml", "environment.json", "catalog.parquet", "split.csv", "run.log",
        "pretrain/metrics.csv", "pretrain/checkpoints/best.ckpt", "pretrain/predictions-val.parquet",
        "finetune/metrics.csv", "finetune/predictions-test.parquet", "model/model.safetensors", "model/model.json",
        "speed.json",
    } <= names  # fmt: skip
    assert not [name for name in names if "/." in name or name.startswith(".")]


def test_the_timeline_names_every_part_of_the_run(two_stage_run):
    speed = json.loads(two_stage_run.speed.read_text())
    parts = {"imports", "setup", "reading", "features", "pretrain", "finetune", "evaluation", "bundle", "other"}
    assert parts == set(speed["timeline"])
    assert speed["seconds"] == pytest.approx(sum(speed["timeline"].values()), abs=0.001)
    assert speed["seconds"] - speed["timeline"]["other"] > 0.5 * speed["seconds"]


def test_curves_of_both_stages_share_one_axis_under_their_own_names(two_stage_run):
    first, second = (
        pd.read_csv(two_stage_run.get_stage(stage).path / "metrics.csv") for stage in ("pretrain", "finetune")
    )
    assert first["step"].tolist() == [1, 2]
    assert second["step"].tolist() == [3, 4]
    parts, metrics = ("train", "val"), ("precision", "sensitivity", "f1")
    wanted = {f"finetune/{p}/{m}/{c}" for p in parts for m in metrics for c in ("GC", "GU", "CG", "average")}
    assert wanted | {f"finetune/{p}/{m}" for p in parts for m in ("loss", "accuracy")} <= set(second.columns)
    assert not any(name.startswith("pretrain") for name in second.columns)


def test_predictions_cover_every_image_of_the_split(two_stage_run):
    split = pd.read_csv(two_stage_run.path / "split.csv", dtype=str)
    for part in ("val", "test"):
        table = pd.read_parquet(two_stage_run.get_predictions_path("finetune", part))
        rows = split[split["split"] == part]
        assert sorted(table["sample_id"]) == sorted(rows["sample_id"])
        assert read_predictions(two_stage_run.get_predictions_path("finetune", part)).predictions.class_names == (
            "GC",
            "GU",
            "CG",
        )
        short = {"gastric_cancer": "GC", "gastric_ulcer": "GU", "chronic_gastritis": "CG"}
        true = table.set_index("sample_id")["true"]
        assert (true[rows["sample_id"]].to_numpy() == rows["class"].map(short).to_numpy()).all()
        shares = table.filter(like="probability/").to_numpy()
        assert np.allclose(shares.sum(axis=1), 1)
        assert (table["predicted"] == np.array(["GC", "GU", "CG"])[shares.argmax(axis=1)]).all()


def test_predictions_contain_no_file_names(two_stage_run):
    table = pd.read_parquet(two_stage_run.get_predictions_path("finetune", "test"))
    assert not [name for name in table.columns if "path" in name]
    assert ".jpg" not in table.to_csv()


def test_the_bundle_describes_the_model(two_stage_run):
    described = json.loads((two_stage_run.path / "model" / "model.json").read_text())
    assert described["classes"] == ["gastric_cancer", "gastric_ulcer", "chronic_gastritis"]
    assert described["short_names"] == ["GC", "GU", "CG"]
    assert described["input"]["size"] == 32
    assert "Not a medical device" in described["intended_use"]
    assert ".jpg" not in json.dumps(described)


def test_checkpoints_hold_tensors_and_plain_values_only(two_stage_run):
    for stage in ("pretrain", "finetune"):
        checkpoint = torch.load(two_stage_run.get_stage(stage).path / "checkpoints" / "best.ckpt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values())


def test_finetuning_starts_from_the_best_epoch_of_pretraining(train_run, two_stage_run):
    alone = train_run(CLASSES, "data.short_names=[GC,GU,CG]", "stage=pretrain")
    head = torch.load(two_stage_run.get_stage("pretrain").path / "checkpoints" / "best.ckpt", weights_only=True)[
        "state_dict"
    ]
    after = weights(alone)
    assert torch.equal(after["fc.weight"], head["network.fc.weight"])
    torch.manual_seed(0)
    moved = {name for name, tensor in weights(two_stage_run).items() if not torch.equal(tensor, after[name])}
    assert "conv1.0.weight" in moved
    assert "bn1.running_mean" in moved
    assert torch.equal(after["bn1.running_mean"], torch.zeros_like(after["bn1.running_mean"]))


def test_the_same_seed_gives_the_same_model_bit_for_bit_for_any_number_of_workers(train_run, two_stage_run):
    again = train_run(CLASSES, "data.short_names=[GC,GU,CG]", "deploy.stage=finetune", "data.workers=2")
    first, second = weights(two_stage_run), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for stage in ("pretrain", "finetune"):
        assert (two_stage_run.get_stage(stage).path / "metrics.csv").read_bytes() == (
            again.get_stage(stage).path / "metrics.csv"
        ).read_bytes()


def test_another_seed_gives_another_model(train_run, two_stage_run):
    other = train_run(CLASSES, "data.short_names=[GC,GU,CG]", "seed=1", "stage=pretrain")
    assert not torch.equal(weights(other)["fc.weight"], weights(two_stage_run)["fc.weight"])


def test_inferred_classes_are_saved(train_run):
    from pylorus.config.checks import load_config

    folder = train_run("stage=pretrain", "stages.pretrain.epochs=1")
    assert load_config(folder.config).data.classes == ["chronic_gastritis", "gastric_cancer", "gastric_ulcer"]


def test_early_stopping_ends_a_stage(train_run):
    folder = train_run("stage=pretrain", "stages.pretrain.epochs=30", "stages.pretrain.patience=1", "optimizer.lr=0")
    assert len(pd.read_csv(folder.get_stage("pretrain").path / "metrics.csv")) == 2


def test_validation_on_test_images_is_reported_as_optimistic(
    train_run, compose_config, class_folders, synthetic_root, capsys
):
    folder = train_run("stage=pretrain", "stages.pretrain.epochs=1", "data.validation=test")
    assert "OPTIMISTIC" in (folder.path / "run.log").read_text()
    val, test = (pd.read_parquet(folder.get_predictions_path("pretrain", part)) for part in ("val", "test"))
    assert val["sample_id"].tolist() == test["sample_id"].tolist()


def test_a_misspelt_block_stops_the_run_before_its_first_stage(train_run):
    with pytest.raises(PylorusError, match=r'no block "layr4"\..*Did you mean "layer4"'):
        train_run("stages.finetune.learn=layr4")


def test_a_nan_loss_fails_the_run_with_advice(train_run, tmp_path_factory):
    with pytest.raises(PylorusError, match=r"loss.* of stage pretrain became NaN or infinite in epoch \d\. Lower"):
        train_run("stage=pretrain", "optimizer.lr=1e30", "optimizer.clip=null", "optimizer=sgd")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.weights=/nowhere/resnet.safetensors", "expected hub, none, or an existing file"),
        ("model.name=test_resnett", "did you mean"),
        ("stages.finetune.learn=layr4", "layer4"),
        ("optimizer.name=adamx", "did you mean"),
        ("stages.finetune.augment=lihgt", "did you mean"),
        ("augment.transforms={HorizontalFlop: {p: 1}}", "did you mean"),
    ],
)
def test_what_can_be_refused_before_reading_is_refused_before_reading(train_run, tmp_path, word, message):
    with pytest.raises(PylorusError, match=f"(?i){re.escape(message)}"):
        train_run(word, f"cache.folder={tmp_path}")
    assert not (tmp_path / "facts").exists()
