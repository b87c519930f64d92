"""Between the steps of an epoch, the host never waits for the device: it queues them, and then reads the figures."""

from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from pylorus.core.io import write_text
from pylorus.launch.train import run
from pylorus.model.objectives import EpochMetrics
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY
from tests.waiting import WaitCounter


class EpochWatch(pl.Callback):
    """Counts waits from the first batch of each epoch to its last, everything between the steps included."""

    found: Counter
    steps: int

    def __init__(self) -> None:
        type(self).found, type(self).steps = Counter(), 0
        self._counter = None

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        type(self).steps += 1
        if self._counter is None:
            self._counter = WaitCounter()
            self._counter.__enter__()
            if module.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        if index + 1 == trainer.num_training_batches:
            if module.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            self._counter.__exit__(None, None, None)
            type(self).found += self._counter.found
            self._counter = None


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("trainer", ["cpu", *(["gpu"] if torch.cuda.is_available() else [])])
def test_no_step_waits_for_the_device(compose_config, synthetic_root, tmp_path, stage, trainer):
    words = [
        "data=folders", f"data.root={synthetic_root}", "data.image_size=32", "model=timm", f"model.name={TINY}", f"trainer={trainer}",
        "model.weights=none", "report=false", f"stage={stage}", f"stages.{stage}.epochs=2", "augment=light",
        "trainer.batch_size=4", f"+callbacks.watch._target_={__name__}.EpochWatch",
    ]  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    with folder.set_starting(words):
        write_text(folder.config, OmegaConf.to_yaml(compose_config(*words)))
    run(folder)
    assert EpochWatch.steps == 2 * 6
    assert not EpochWatch.found


def test_a_batch_is_counted_without_waiting():
    metrics = EpochMetrics(3)
    logits, label = torch.eye(3)[[0, 1, 2, 2, 0]], torch.tensor([0, 1, 1, 2, 0])
    with WaitCounter() as counter:
        metrics.add_batch(torch.tensor(0.5), torch.tensor(5.0), logits, label)
        metrics.add_batch(torch.tensor(0.5), torch.tensor(5.0), logits, label)
    assert not counter.found
    assert metrics.confusion.compute().tolist() == [[4, 0, 0], [0, 2, 2], [0, 0, 2]]
