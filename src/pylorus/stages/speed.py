"""Duration and memory of a stage: `speed.json` in its folder."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytorch_lightning as pl
import torch

from pylorus.files import write_json

MIB = 2**20


class SpeedMonitor(pl.Callback):
    """Measure the duration and memory of a stage, starting when this callback is created.

    Args:
        images: Number of training images.
        accelerator: cpu, cuda or mps.

    Attributes:
        features_seconds: Time to find or compute the frozen prefix's features; set by the caller.
        fit_seconds: Time for all epochs, with validation and checkpoints.
    """

    def __init__(self, images: int, accelerator: str) -> None:
        self._images, self._accelerator = images, accelerator
        self._start = time.monotonic()
        self._epoch_start = 0.0
        self._fit_start = 0.0
        self._training: list[float] = []
        self.features_seconds = 0.0
        self.fit_seconds = 0.0
        _reset_peak_memory(accelerator)

    def on_fit_start(self, *_: Any) -> None:
        """Start the clock of the whole fit."""
        self._fit_start = time.monotonic()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock of an epoch."""
        self._epoch_start = time.monotonic()

    def on_validation_start(self, *_: Any) -> None:
        """Stop the clock of an epoch: Lightning validates after its last training batch."""
        if self._accelerator == "cuda":
            torch.cuda.synchronize()
        if self._epoch_start:  # not for an epoch resumed midway
            self._training.append(time.monotonic() - self._epoch_start)

    def on_fit_end(self, *_: Any) -> None:
        """Stop the clock of the whole fit."""
        self.fit_seconds = time.monotonic() - self._fit_start

    def write_speed(self, path: Path) -> None:
        """Write the measurements as JSON: seconds, training images per second, MiB."""
        # The first epoch is a warm-up, unless it is the only one.
        epoch_seconds = self._training[1:] or self._training
        write_json(
            path,
            {
                "seconds": round(time.monotonic() - self._start, 3),
                "features_seconds": round(self.features_seconds, 3),
                "fit_seconds": round(self.fit_seconds, 3),
                "epochs": len(self._training),
                "images_per_second": round(self._images / median(epoch_seconds), 2) if epoch_seconds else None,
                "peak_memory_mib": get_peak_memory("cpu") // MIB,
                "peak_gpu_memory_mib": get_peak_memory("cuda") // MIB if self._accelerator == "cuda" else None,
            },
        )


def _reset_peak_memory(accelerator: str) -> None:
    """Reset the peak memory, where the system supports it."""
    if accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return


def get_peak_memory(accelerator: str) -> int:
    """Return the peak memory of this process in bytes: GPU memory for cuda, else main memory."""
    if accelerator == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)
