"""Small runs that may have several processes."""

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from pylorus.core.io import write_text
from pylorus.runs.folder import RunFolder
from pylorus.training import batch_size
from tests.conftest import TINY


@pytest.fixture(scope="module", autouse=True)
def forked_processes(fork_server):
    """The processes of a run, as forks; tests/end_to_end/test_runs.py has them started as a run does."""
    forking = SimpleNamespace(**{**vars(subprocess), "Popen": fork_server.start})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batch_size, "subprocess", forking)
        patched.setattr(subprocess_handler, "Popen", lambda args, **more: fork_server.start(list(args), **more))
        yield


WORDS = ["data=folders", r"data.group=patient_\d+", "data.image_size=32", "data.workers=0", "trainer=cpu", "model=timm",
         f"model.name={TINY}", "model.weights=none", "trainer.progress=false", "report=false", "trainer.batch_size=8",
         "augment=light", "loss.class_weights=balanced", "stages.pretrain.augment=none", "stages.finetune.learn=layer3",
         "stages.pretrain.epochs=2", "stages.finetune.epochs=3"]  # fmt: skip


@pytest.fixture(scope="module")
def prepare_run(compose_config, synthetic_root, tmp_path_factory) -> Callable[..., RunFolder]:
    """A folder in which a run may begin, with a cache of its own."""

    def prepare(*words: str) -> RunFolder:
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        words = (f"data.root={synthetic_root}", f"cache.folder={folder.path}/cache", *WORDS, *words)
        with folder.set_starting(list(words)):
            write_text(folder.config, OmegaConf.to_yaml(compose_config(*words)))
        return folder

    return prepare


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "model" / "model.safetensors")


def when(path: Path, act) -> threading.Thread:
    """Acts once a file is there."""

    def watch() -> None:
        for _ in range(2400):
            if path.is_file():
                act()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def expect_alike(found: RunFolder, expected: RunFolder) -> None:
    """The weights, curves and predictions of two runs are the same to within rounding."""
    wanted = weights(expected)
    for name, tensor in weights(found).items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    for stage in ("pretrain", "finetune"):
        curves = [pd.read_csv(folder.get_stage(stage).metrics_path) for folder in (found, expected)]
        pd.testing.assert_frame_equal(*curves, rtol=1e-3, atol=1e-4)
        for part in ("val", "test"):
            predictions = [pd.read_parquet(folder.get_predictions_path(stage, part)) for folder in (found, expected)]
            pd.testing.assert_frame_equal(*predictions, rtol=1e-3, atol=1e-3)
