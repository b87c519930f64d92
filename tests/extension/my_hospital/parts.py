"""A loss, a metric, an augmentation, a callback, a logger, a network and an image source."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.loggers import Logger


class PolyLoss(torch.nn.Module):
    """Cross-entropy + epsilon (1 - p), of each image (Leng et al. 2022)."""

    def __init__(self, epsilon: float = 1.0) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return cross_entropy + self.epsilon * (1 - torch.exp(-cross_entropy))


def compute_youden(confusion: np.ndarray) -> np.ndarray:
    """Sensitivity + specificity - 1 of each class."""
    present, hits = confusion.sum(axis=1), np.diag(confusion)
    false_alarms = confusion.sum(axis=0) - hits
    return hits / present - false_alarms / (confusion.sum() - present)


def erase_square(image: np.ndarray, seed: int, *, side: int = 8) -> np.ndarray:
    """Black out a square at a random place."""
    top, left = np.random.default_rng(seed).integers(0, image.shape[0] - side, size=2)
    image[top : top + side, left : left + side] = 0
    return image


class CountBatches(pl.Callback):
    """Write the number of training batches to a file."""

    def __init__(self, file: str) -> None:
        self.file, self.batches = Path(file), 0

    def on_train_batch_end(self, *_: object) -> None:
        self.batches += 1

    def on_train_end(self, *_: object) -> None:
        self.file.write_text(str(self.batches))


class JsonLines(Logger):
    """Append each call's metrics to a file, one JSON object per line."""

    name, version = "json-lines", 0

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = Path(file)

    def log_hyperparams(self, params: dict, *_: object, **__: object) -> None:
        self._append({"config": params})

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self._append({"step": step, **metrics})

    def finalize(self, status: str) -> None:
        self._append({"status": status})

    def _append(self, entry: dict) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry, default=str) + "\n")


def create_network(num_classes: int, **arguments: object) -> torch.nn.Module:
    """A network with timm's interface; here one of timm's own with another input."""
    network = timm.create_model("test_resnet", pretrained=False, num_classes=num_classes, **arguments)
    network.pretrained_cfg = {
        "architecture": "hospital_net",
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
    }
    return network


def list_images(folder: str) -> pd.DataFrame:
    """One row per image: here of class folders; a query of an archive would do as well."""
    paths = sorted(path.absolute() for path in Path(folder).glob("*/*") if path.suffix in (".jpg", ".png"))
    return pd.DataFrame({"path": map(str, paths), "label": [path.parent.name for path in paths]})
