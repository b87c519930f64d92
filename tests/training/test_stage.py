"""The table that a stage prints states on which images its best epoch was chosen."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from pylorus.config.schema import CacheConfig, StageConfig
from pylorus.core.distributed import PARALLEL_JOBS
from pylorus.core.io import write_text
from pylorus.data.dataset import DeviceMemory
from pylorus.hardware import Engine
from pylorus.launch.train import run
from pylorus.model.classifier import StagePlan
from pylorus.runs.folder import RunFolder
from pylorus.runs.predictions import build_prediction_table, check_predictions
from pylorus.training import batch_size
from pylorus.training.batch_size import StepCost
from pylorus.training.stage import StageResult, count_device_bytes, log_stage_table, resolve_device_memory
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("epochs", "validated_on", "title"),
    [
        (4, "val", "s: epoch 1 of 4, best by loss on validation images"),
        (4, "test", "s: epoch 1 of 4, best by loss on the test images"),
        (1, "val", "s: after its only epoch"),
    ],
)
def test_the_title_states_what_selected_the_epoch(caplog, epochs, validated_on, title):
    rows = pd.DataFrame({"sample_id": ["a", "b"], "group": ["a", "b"], "label": [0, 1]})
    logits = np.eye(2, dtype=np.float32)
    table = build_prediction_table(rows, logits, names=["GC", "GU"], split="val")
    predictions = {part: check_predictions(table) for part in ("val", "test")}
    with caplog.at_level(logging.INFO, logger="pylorus"):
        log_stage_table(
            StagePlan("s", StageConfig(), 0, 0), StageResult(epochs, 1, predictions), validated_on=validated_on
        )
    assert title in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("stages.pretrain.views=2",)])
def test_images_and_features_on_the_device_give_the_same_model_bit_for_bit(
    compose_config, synthetic_root, tmp_path, words
):
    networks = []
    for name in ("true", "false"):
        folder = RunFolder(tmp_path / name)
        config = compose_config(
            "data=folders", f"data.root={synthetic_root}", "data.image_size=32", "model=timm", f"model.name={TINY}",
            "trainer=cpu", "model.weights=none", "report=false", "trainer.progress=false", "trainer.batch_size=8",
            "augment=light", "stages.pretrain.epochs=2", "stages.finetune.epochs=2", f"cache.folder={tmp_path}/{name}-",
            f"cache.on_device={name}", *words,
        )  # fmt: skip
        with folder.set_starting([]):
            write_text(folder.config, OmegaConf.to_yaml(config))
        run(folder)
        networks.append(load_file(folder.path / "model" / "model.safetensors"))
    assert networks[0].keys() == networks[1].keys()
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])


def test_a_gpu_holds_images_unless_told_otherwise():
    engine = Engine("cuda", "bf16", 1, {})
    assert resolve_device_memory(CacheConfig(), engine) == DeviceMemory(torch.device("cuda"), 0.25)
    assert resolve_device_memory(CacheConfig(on_device=False), engine) is None
    assert resolve_device_memory(CacheConfig(on_device=True), engine).share == 1
    assert resolve_device_memory(CacheConfig(), Engine("cpu", "32", 1, {})) is None


def test_the_search_for_a_batch_size_leaves_space_for_the_images_that_a_gpu_will_hold(monkeypatch):
    monkeypatch.setattr(DeviceMemory, "has_space", lambda self, size: size <= 1000 * self.share)
    engine, size = Engine("cuda", "bf16", 1, {}), {"images": 10, "image_size": 2}  # 120 bytes
    assert count_device_bytes(CacheConfig(), engine, **size) == 120
    assert count_device_bytes(CacheConfig(), engine, images=100, image_size=2) == 0  # more than a quarter
    assert count_device_bytes(CacheConfig(on_device=False), engine, **size) == 0
    assert count_device_bytes(CacheConfig(on_device=True), Engine("cpu", "32", 1, {}), **size) == 0


def test_reserved_memory_makes_the_batch_smaller(compose_config, monkeypatch):
    class Trial:
        """A GPU of 1,000 bytes on which a step takes 10 bytes per image."""

        free = 1000

        def __init__(self, request):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def measure_step(self, size):
            return StepCost(10 * size, 1.0)

    monkeypatch.delenv(PARALLEL_JOBS, raising=False)  # tests that run side by side share the memory
    monkeypatch.setattr(batch_size, "TrialProcess", Trial)
    monkeypatch.setattr(batch_size, "_build_request", lambda *_: None)
    config = compose_config("model=small", "trainer.batch_size=auto")
    sizes = [
        batch_size.resolve_batch_size(
            config.trainer, config, None, Engine("cuda", "bf16", 1, {}), images=1000, reserved=reserved
        )[0]
        for reserved in (0, 300)
    ]
    assert sizes == [64, 32]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_only_full_training_batches_are_compiled_and_the_model_stays_the_same(
    compose_config, synthetic_root, tmp_path, monkeypatch, stage
):
    sizes, networks = [], []

    def compile_network(module, **_):
        def run_compiled(*inputs):
            sizes.append(len(inputs[0]))
            return module(*inputs)

        return run_compiled

    monkeypatch.setattr(torch, "compile", compile_network)
    for name in ("true", "false"):
        folder = RunFolder(tmp_path / name)
        config = compose_config(
            "data=folders", f"data.root={synthetic_root}", "data.image_size=32", "model=timm", f"model.name={TINY}",
            "trainer=cpu", "model.weights=none", "report=false", "trainer.progress=false", "trainer.batch_size=4",
            "augment=none", f"stage={stage}", f"stages.{stage}.epochs=2", f"trainer.compile={name}",
            "averaging=mean",  # whose statistics of batch norm are estimated by batches that are no training
        )  # fmt: skip
        with folder.set_starting([]):
            write_text(folder.config, OmegaConf.to_yaml(config))
        run(folder)
        networks.append(load_file(folder.path / "model" / "model.safetensors"))
    assert sizes == [4] * 2 * 5  # of six batches an epoch, the last of three images
    assert all(torch.equal(networks[0][key], networks[1][key]) for key in networks[0])
