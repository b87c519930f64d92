"""How long a stage took and what memory it needed: `speed.json` in its folder."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

from pylorus.files import write_json

MIB = 2**20


class Speed(pl.Callback):
    """Times a stage from when it is made.

    Args:
        images: In training.
        accelerator: cpu, cuda or mps.

    Attributes:
        features_seconds: To find or compute what is frozen; set by who does it.
        fit_seconds: Of all epochs, with validation and checkpoints.
    """

    def __init__(self, images: int, accelerator: str) -> None:
        self._images, self._accelerator = images, accelerator
        self._began = time.monotonic()
        self._epoch_began = 0.0
        self._fit_began = 0.0
        self._training: list[float] = []
        self.features_seconds = 0.0
        self.fit_seconds = 0.0
        _forget_peak(accelerator)

    def on_fit_start(self, *_: Any) -> None:
        """Starts the clock of the epochs."""
        self._fit_began = time.monotonic()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Starts the clock of an epoch."""
        self._epoch_began = time.monotonic()

    def on_validation_start(self, *_: Any) -> None:
        """Lightning validates when an epoch's training batches are done."""
        if self._accelerator == "cuda":
            torch.cuda.synchronize()
        if self._epoch_began:  # not of an epoch that went on in its middle
            self._training.append(time.monotonic() - self._epoch_began)

    def on_fit_end(self, *_: Any) -> None:
        """Stops the clock of the epochs."""
        self.fit_seconds = time.monotonic() - self._fit_began

    def write(self, path: Path) -> None:
        """Writes what was measured as JSON: seconds, training images a second, MiB."""
        # The first epoch warms up, where there is another.
        steady = self._training[1:] or self._training
        write_json(
            path,
            {
                "seconds": round(time.monotonic() - self._began, 3),
                "features_seconds": round(self.features_seconds, 3),
                "fit_seconds": round(self.fit_seconds, 3),
                "epochs": len(self._training),
                "images_per_second": round(self._images / median(steady), 2) if steady else None,
                "peak_memory_mib": peak_bytes("cpu") // MIB,
                "peak_gpu_memory_mib": peak_bytes("cuda") // MIB if self._accelerator == "cuda" else None,
            },
        )


def _forget_peak(accelerator: str) -> None:
    """Starts the peak of memory anew, where the system can."""
    if accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return


def peak_bytes(accelerator: str) -> int:
    """The most memory that this process held, of a GPU's or of the machine's."""
    if accelerator == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)
