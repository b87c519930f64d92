"""Runs with cached features give the same model as without; the features are reused and never stale."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from pylorus.config.schema import CacheConfig, ModelConfig
from pylorus.core.io import write_text
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import ImageDataset
from pylorus.hardware import Engine
from pylorus.launch.train import run
from pylorus.model.backbone import build_backbone
from pylorus.model.finetuning import resolve_depth
from pylorus.model.frozen_features import build_evaluator
from pylorus.model.frozen_prefix import CannotCutError
from pylorus.model.inference import Evaluator, NormalizingNetwork, compute_split_outputs
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY

WORDS = ["data=folders", r"data.group=patient_\d+", "trainer=cpu", "trainer.progress=false", "data.image_size=32",
         "model=timm", f"model.name={TINY}", "report=false", "stage=finetune", "augment=none",
         "stages.finetune.epochs=3", "optimizer.lr=1e-2"]  # fmt: skip


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Weights whose batch norms are fed sanely: random ones, with the statistics of random pictures."""
    torch.manual_seed(0)
    network = timm.create_model(TINY, num_classes=3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    network(torch.randn(16, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file({name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}, path)
    return path


@pytest.fixture(scope="module")
def train_in(compose_config, synthetic_root, weights_file):
    """Runs one stage in a folder; gives the run's folder. All runs in it share what they keep."""

    def go(place: Path, *words: str) -> RunFolder:
        folder = RunFolder(place / f"run-{len(list(place.iterdir()))}")
        config = compose_config(
            *WORDS,
            f"data.root={synthetic_root}",
            f"model.weights={weights_file}",
            f"cache.folder={place / 'kept'}",
            *words,
        )
        with folder.set_starting(list(words)):
            write_text(folder.config, OmegaConf.to_yaml(config))
        run(folder)
        return folder

    return go


@pytest.fixture
def train_stage(train_in, tmp_path):
    """Runs one stage in the folder of the test."""
    return lambda *words: train_in(tmp_path, *words)


HEAD = ("stages.finetune.learn=head", "trainer.precision=32")


@pytest.fixture(scope="module")
def head_run(train_in, tmp_path_factory):
    """A run that trained the head; what it keeps is beside it. Read it only."""
    return train_in(tmp_path_factory.mktemp("head"), *HEAD)


@pytest.fixture
def run_before(head_run, tmp_path):
    """That run, and a copy of what it keeps for the runs of the test."""
    shutil.copytree(head_run.path.parent / "kept", tmp_path / "kept")
    return head_run


def test_training_computes_no_features_of_test_images(head_run):
    served = pd.read_csv(head_run.path / "split.csv").query("split != 'test'")
    assert f"0 cached, {len(served)} computed" in said(head_run)


def weights(folder):
    return load_file(folder.path / "model" / "model.safetensors")


def logits(folder, part="test"):
    return pd.read_parquet(folder.get_predictions_path("finetune", part)).filter(like="logit/").to_numpy()


def said(folder):
    return (folder.path / "run.log").read_text()


def kept_files(tmp_path, kind="features"):
    return sorted(path for path in (tmp_path / "kept" / kind).rglob("*") if path.is_file())


@pytest.mark.parametrize(("learn", "precision"), [("head", "32"), ("layer4", "bf16"), ("layer3.0.conv2", "32")])
def test_the_cached_run_gives_the_model_of_the_uncached_run_to_within_rounding(train_stage, learn, precision):
    depth = [f"stages.finetune.learn={learn}", f"trainer.precision={precision}"]
    plain, cached = train_stage(*depth, "cache.prefix=false"), train_stage(*depth)
    assert "features finetune: 0 cached, 24 computed" in said(cached)
    start = load_file(plain.path / "model" / "model.safetensors")
    first, second = weights(plain), weights(cached)
    rounding = 1e-5 if precision == "32" else 2e-2
    for name in first:
        far = (first[name].float() - second[name].float()).abs().max()
        assert far <= rounding * max(1.0, float(start[name].float().abs().max())), name
    assert np.allclose(logits(plain), logits(cached), atol=50 * rounding)
    curves = [pd.read_csv(folder.get_stage("finetune").path / "metrics.csv") for folder in (plain, cached)]
    assert np.allclose(curves[0].filter(like="loss"), curves[1].filter(like="loss"), rtol=50 * rounding)


def test_views_give_the_model_of_the_uncached_run_to_within_rounding(train_stage):
    words = ["stages.finetune.learn=layer4", "augment=light", "stages.finetune.views=2", "trainer.precision=32"]
    plain, cached = train_stage(*words, "cache.prefix=false"), train_stage(*words)
    images = len(pd.read_csv(cached.path / "split.csv").query("split == 'train'"))
    assert f"0 cached, {24 + images} computed" in said(cached)
    first, second = weights(plain), weights(cached)
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-5) for name in first)


def test_without_views_only_features_of_unaugmented_images_are_cached(train_stage):
    words = ["stages.finetune.learn=layer4", "augment=light", "trainer.precision=32"]
    plain, cached = train_stage(*words, "cache.prefix=false"), train_stage(*words)
    assert "training images, which are augmented anew in each epoch (stages.finetune.views)" in said(cached)
    first, second = weights(plain), weights(cached)
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-5) for name in first)


def test_another_run_reuses_cached_features_and_gives_the_same_model_bit_for_bit(run_before, train_stage):
    first, second = run_before, train_stage(*HEAD)
    assert "24 cached, 0 computed" in said(second)
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def test_another_learning_rate_or_seed_reuses_cached_features(train_stage):
    words = ("stages.finetune.learn=head", "trainer.precision=bf16")
    first, second = train_stage(*words), train_stage(*words, "optimizer.lr=1e-3", "seed=5")
    served, again = (
        set(pd.read_csv(folder.path / "split.csv").query("split != 'test'")["path"]) for folder in (first, second)
    )
    assert f"{len(again & served)} cached, {len(again - served)} computed" in said(second)


def test_a_changed_weight_file_never_gets_old_features(run_before, train_stage, weights_file, tmp_path):
    changed = {name: tensor.clone() for name, tensor in load_file(weights_file).items()}
    changed["layer1.0.conv1.weight"] += 0.1
    other = tmp_path / "tiny.safetensors"
    save_file(changed, other)
    cached = train_stage(*HEAD, f"model.weights={other}")
    assert "0 cached, 24 computed" in said(cached)
    plain = train_stage(*HEAD, f"model.weights={other}", "cache.prefix=false")
    assert np.allclose(logits(plain), logits(cached), atol=0.1)


@pytest.mark.parametrize("other", ["data.fit=stretch", "data.image_size=48", "trainer.precision=bf16"])
def test_another_preprocessing_or_precision_recomputes_features(run_before, train_stage, other):
    assert "0 cached, 24 computed" in said(train_stage(*HEAD, other))


def test_only_the_features_of_a_changed_image_are_recomputed(train_stage, synthetic_root, tmp_path):
    from PIL import Image

    copy = tmp_path / "images"
    shutil.copytree(synthetic_root, copy)
    split = pd.read_csv(train_stage("stages.finetune.learn=head", f"data.root={copy}").path / "split.csv")
    Image.new("RGB", (48, 48), (200, 40, 40)).save(copy / split.query("split == 'train'")["path"].iloc[0])
    assert "23 cached, 1 computed" in said(train_stage("stages.finetune.learn=head", f"data.root={copy}"))


def test_features_that_do_not_fit_are_not_cached_and_the_run_says_so(train_stage, tmp_path):
    words = ["stages.finetune.learn=layer4", "trainer.precision=32"]
    tight = train_stage(*words, "cache.budget_gib=0", "cache.memory_gib=0")
    assert "The features can't be stored on disk" in said(tight)
    assert "cache.budget_gib" in said(tight)
    assert sum(path.stat().st_size for path in kept_files(tmp_path)) < 2000  # what for, but nothing of the images
    plain = train_stage(*words, "cache.prefix=false")
    assert all(torch.allclose(tensor.float(), weights(tight)[name].float(), atol=1e-5) for name, tensor in weights(plain).items())  # fmt: skip


def test_features_on_disk_and_in_memory_give_the_same_model_bit_for_bit(train_stage):
    first = train_stage("stages.finetune.learn=layer4")
    second = train_stage("stages.finetune.learn=layer4", "cache.memory_gib=0")
    assert "in memory" in said(first)
    assert "mapped from disk" in said(second)
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def test_a_damaged_cache_file_is_detected_and_recomputed(run_before, train_stage, tmp_path):
    largest = max(kept_files(tmp_path), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)
    second = train_stage(*HEAD)
    assert "0 cached, 24 computed" in said(second)
    assert all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(run_before).items())


def test_each_stage_of_a_run_has_its_own_features(train_stage):
    folder = train_stage("stage=both", "stages.pretrain.epochs=2", "stages.finetune.learn=layer4")
    assert "features pretrain: 0 cached, 24 computed" in said(folder)
    assert "features finetune: 0 cached, 24 computed" in said(folder)


def test_a_network_that_cannot_be_split_trains_without_the_cache_and_says_so(train_stage, monkeypatch):
    def refuse(*_):
        raise CannotCutError("its code can't be traced: it decides by its input")

    monkeypatch.setattr("pylorus.model.frozen_features.cut_network", refuse)
    folder = train_stage("stages.finetune.learn=layer4")
    assert "finetune: frozen layers are recomputed in every epoch: its code can't be traced" in said(folder)
    assert folder.read_status()["state"] == "finished"


def test_a_stage_records_its_seconds_and_memory(train_stage):
    folder = train_stage("stages.finetune.learn=layer4")
    speed = json.loads((folder.get_stage("finetune").path / "speed.json").read_text())
    assert speed["epochs"] == 3
    assert 0 < speed["features_seconds"] < speed["seconds"]
    assert 0 < speed["fit_seconds"] < speed["seconds"]
    assert speed["images_per_second"] > 0
    assert speed["peak_memory_mib"] > 100


def test_cached_features_are_readable_by_their_owner_only(head_run):
    folder = head_run.path.parent
    assert (folder / "kept").stat().st_mode & 0o077 == 0
    assert kept_files(folder)


@pytest.fixture
def build_evaluators(synthetic_root, weights_file, tmp_path):
    """Builds evaluators of one network and one image set: of whole images, and of cached features at a depth."""

    def build(learn: str) -> tuple[Evaluator, Evaluator]:
        model = ModelConfig(name=TINY, weights=str(weights_file))
        backbone = build_backbone(model, classes=3, image_size=32)
        data = ImageDataModule(
            synthetic_root, image_size=32, model=TINY, group=r"patient_\d+", workers=0, cache=tmp_path / "kept"
        )
        network = NormalizingNetwork(backbone.network, mean=backbone.mean, std=backbone.std)
        depth, settings = resolve_depth(backbone.network, learn), CacheConfig(folder=str(tmp_path / "kept"))
        return Evaluator(network, data), build_evaluator(network, data, depth, Engine("cpu", "bf16", 1, {}), settings)

    return build


@pytest.mark.parametrize("learn", ["head", "layer4"])
def test_outputs_from_cached_features_are_those_of_the_whole_network(build_evaluators, learn):
    plain, cached = build_evaluators(learn)
    expected = compute_split_outputs(plain, "test", progress=False)
    assert type(cached) is not Evaluator
    for _ in range(2):  # computed, then found
        outputs = compute_split_outputs(cached, "test", progress=False)
        np.testing.assert_allclose(outputs.logits, expected.logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs.features, expected.features, rtol=1e-5, atol=1e-6)


def test_another_evaluation_decodes_and_computes_nothing(build_evaluators, monkeypatch):
    _, cached = build_evaluators("head")
    compute_split_outputs(cached, "test", progress=False)

    def fail(*_):
        raise AssertionError("an image was loaded")

    _, again = build_evaluators("head")
    monkeypatch.setattr(ImageDataset, "load_rows", fail)
    compute_split_outputs(again, "test", progress=False)


@pytest.mark.parametrize("reason", ["cache.prefix=false", "the whole network is trained"])
def test_without_cached_features_images_pass_through_the_whole_network(build_evaluators, reason):
    plain, _ = build_evaluators("head")
    depth = resolve_depth(plain.network.network, "all" if "whole" in reason else "head")
    settings = CacheConfig(prefix="whole" in reason)
    evaluator = build_evaluator(plain.network, plain.image_data, depth, Engine("cpu", "32", 1, {}), settings)
    assert type(evaluator) is Evaluator
