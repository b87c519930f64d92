"""One pass of the trained network over the run's own images: the features that tell unlike images, in 32 bits."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pylorus.choices import images_a_step, workers
from pylorus.config import AugmentConfig, Config
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.input import InputFormat
from pylorus.data.order import Draw
from pylorus.data.prepare import Images
from pylorus.deploy.network import laid_out, logits_and_features
from pylorus.machine import Engine
from pylorus.model.backbone import Backbone

log = logging.getLogger(__name__)

MOST_IMAGES = {"train": 1000, "val": 5000, "test": 5000}
"""Of each part: classes' means and a threshold's quantile are known by then; the rest would only take time."""


@dataclass(frozen=True, eq=False)
class Passed:
    """What the network says of some images of a part.

    Attributes:
        rows: Their places in the part's table, of shape (n,).
        labels: Their true classes, of shape (n,).
        logits: Of shape (n, classes).
        features: Of shape (n, features).
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    features: Tensor


def pass_over(
    backbone: Backbone, form: InputFormat, images: Images, config: Config, engine: Engine
) -> dict[str, Passed]:
    """What the network says of train, val and test images, none of them augmented, at most `MOST_IMAGES` of them."""
    size = images_a_step(config.trainer)
    served = ImageDataModule(
        images.table,
        images.catalog.root,
        form,
        batch_size=size,
        workers=workers(config, engine)[0],
        policy=AugmentConfig(),
        seed=0,
        cache=config.cache,
        validation=images.validation,
    )
    device = torch.device(engine.accelerator)
    network = laid_out(backbone.network, device).eval()
    mean, std = (255 * torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (backbone.mean, backbone.std))

    def passed(part: str) -> Passed:
        total = len(served.parts[part])
        rows = np.linspace(0, total - 1, min(total, MOST_IMAGES[part])).round().astype(np.int64)
        starts = range(0, len(rows), 2 * size)
        batches = [[Draw(int(row), None) for row in rows[at : at + 2 * size]] for at in starts]
        found = [_said(network, (batch.image.to(device).float() - mean) / std) for batch in served.serve(part, batches)]
        return Passed(
            rows=rows,
            labels=served.parts[part]["label"].to_numpy(dtype=np.int64)[rows],
            logits=torch.cat([logits for logits, _ in found]).numpy(),
            features=torch.cat([features for _, features in found]),
        )

    log.info("model    looks at images once more: by their features foreign ones are told")
    parts = {part: passed(part) for part in MOST_IMAGES}
    network.to("cpu")
    return parts


def mean_directions(passed: Passed, classes: int) -> Tensor:
    """The mean direction of each class's features, unit vectors of shape (classes, features)."""
    each = functional.normalize(passed.features.double(), dim=1)
    labels = torch.from_numpy(passed.labels)
    means = torch.stack([each[labels == label].mean(dim=0) for label in range(classes)])
    return functional.normalize(means, dim=1).float()


def _said(network: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        logits, features = logits_and_features(network, pixels)
    return logits.cpu(), features.cpu()
