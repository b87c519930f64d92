"""A stage's answers to the images of a run, computed as its bundle computes them: by the same code, in fp32."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from pylorus.data.datamodule import ImageDataModule
from pylorus.data.order import Draw
from pylorus.deploy.network import NormalisedNetwork, laid_out
from pylorus.machine.engine import Engine, full_precision
from pylorus.model.backbone import Backbone
from pylorus.model.cut import modes_kept

MOST_IMAGES = {"train": 1000, "val": 5000, "test": 5000}
"""Features of each part: classes' means and a threshold's quantile are known by then; the rest would only take time."""


@dataclass(frozen=True, eq=False)
class PartAnswers:
    """The network's answers to a part of the images.

    Attributes:
        logits: float32 of shape (images, classes), in the order of the part's rows.
        features: float32 of shape (n, features): penultimate features of the rows that `feature_rows` names.
    """

    logits: NDArray[np.float32]
    features: NDArray[np.float32]


def feature_rows(part: str, images: int) -> NDArray[np.int64]:
    """The rows of a part whose features are kept: all, or `MOST_IMAGES` at even distances.

    Args:
        part: train, val or test.
        images: Of the part.
    """
    return np.linspace(0, images - 1, min(images, MOST_IMAGES[part])).round().astype(np.int64)


def answer_part(
    backbone: Backbone, served: ImageDataModule, part: str, engine: Engine, *, progress: bool
) -> PartAnswers:
    """Computes the answers to every image of a part; each process computes its share, and has the whole.

    Args:
        backbone: The network, and how its input is normalised.
        served: The images.
        part: val or test.
        engine: Where to compute.
        progress: Whether to draw a progress bar on a terminal.
    """
    images = len(served.parts[part])
    wanted = feature_rows(part, images)
    rows, logits, features = [], [], []
    silent = not (progress and served.processes.first and sys.stderr.isatty())
    with (
        _computing(backbone, engine) as network,
        tqdm(total=images, desc=f"{part} predictions", leave=False, disable=silent) as bar,
    ):
        for batch in served.loader(part):
            answers = _answer(network, batch.image, engine)
            kept = torch.from_numpy(np.isin(batch.row.numpy(), wanted))
            rows.append(batch.row)
            logits.append(answers[0])
            features.append((batch.row[kept], answers[1][kept]))
            bar.update(served.processes.count * len(batch.row))
    mine = (torch.cat(rows), torch.cat(logits), *(torch.cat(parts) for parts in zip(*features, strict=True)))
    shares = served.processes.gathered(mine)
    all_rows, all_logits, kept_rows, kept_features = (torch.cat(each) for each in zip(*shares, strict=True))
    return PartAnswers(all_logits[torch.argsort(all_rows)].numpy(), kept_features[torch.argsort(kept_rows)].numpy())


def mean_directions(backbone: Backbone, served: ImageDataModule, engine: Engine, *, classes: int) -> Tensor:
    """The mean direction of each class's features over the training images, none of them augmented.

    Args:
        backbone: The network, and how its input is normalised.
        served: The images, of one process.
        engine: Where to compute.
        classes: How many there are.

    Returns:
        Unit vectors of shape (classes, features).
    """
    rows = feature_rows("train", len(served.parts["train"]))
    size = 2 * served.batch_size
    batches = [[Draw(int(row), None) for row in rows[at : at + size]] for at in range(0, len(rows), size)]
    with _computing(backbone, engine) as network:
        features = torch.cat([_answer(network, batch.image, engine)[1] for batch in served.serve("train", batches)])
    labels = torch.from_numpy(served.parts["train"]["label"].to_numpy(dtype=np.int64)[rows])
    directions = functional.normalize(features.double(), dim=1)
    means = torch.stack([directions[labels == label].mean(dim=0) for label in range(classes)])
    return functional.normalize(means, dim=1).float()


@contextmanager
def _computing(backbone: Backbone, engine: Engine) -> Iterator[NormalisedNetwork]:
    """Lays the network out as a bundle does; afterwards it is on the CPU and in its modes again."""
    device = torch.device(engine.accelerator)
    with modes_kept(backbone.network), full_precision():
        network = laid_out(backbone.network, device)
        yield NormalisedNetwork(network, mean=backbone.mean, std=backbone.std).to(device)
        network.to("cpu")


def _answer(network: NormalisedNetwork, image: Tensor, engine: Engine) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        logits, features = network.logits_and_features(image.to(engine.accelerator))
    return logits.cpu(), features.cpu()
