"""Whether heat maps show what a network learned: one with other weights must give other maps (Adebayo et al. 2018)."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from pylorus.deploy.explain import coarse_maps
from pylorus.deploy.load import Bundle
from pylorus.deploy.network import laid_out
from pylorus.model.backbone import create_network
from pylorus.model.head import draw_head
from pylorus.percent import percent

MOST_IMAGES, DRAWS = 8, 3
ALIKE = 0.5
"""From this mean rank correlation on, maps with other weights are called alike. Ours: no paper fixes one."""
AT_ONCE = 4

Maps = Callable[[Bundle, NDArray[np.uint8], Sequence[int], nn.Module], Tensor]
"""Gives maps (n, height, width) of a bundle's images (n, size, size, 3), a class each, from a network."""


@dataclass(frozen=True)
class Likeness:
    """How alike maps are to those of the trained network.

    Attributes:
        weights: What was drawn anew, in words.
        mean: Mean rank correlation over images and draws, in [-1, 1]; 0 stands for a map that is empty.
        highest: Of any image and draw.
        empty: Share of its maps in which nothing speaks for the class.
    """

    weights: str
    mean: float
    highest: float
    empty: float

    @property
    def alike(self) -> bool:
        """Whether the maps stay as they were."""
        return self.mean >= ALIKE


@dataclass(frozen=True)
class Sanity:
    """The randomisation check.

    Attributes:
        images: How many had a map to compare with.
        found: With the last layer drawn anew, and with all weights drawn anew.
    """

    images: int
    found: tuple[Likeness, ...]

    @property
    def passed(self) -> bool | None:
        """Whether other weights give other maps; None where no image has a map."""
        return None if not self.images else not any(each.alike for each in self.found)

    @property
    def said(self) -> str:
        """The check in words."""
        if not self.images:
            return (
                "Randomisation check: not possible, since nothing speaks for the class in any of the images looked at."
            )
        lines = [
            f"Randomisation check (Adebayo et al. 2018), {self.images} images, {DRAWS} draws: mean rank correlation of "
            f"the trained network's maps with those after drawing anew"
        ]
        lines += [
            f"  {each.weights}: {each.mean:.2f} (highest {each.highest:.2f}; {percent(each.empty)} % of maps empty)"
            for each in self.found
        ]
        lines.append(
            f"Below {ALIKE}: other weights give other maps."
            if self.passed
            else f"WARNING: {ALIKE} or more: the maps stay much the same with other weights. They show the image or "
            "the architecture more than what the network learned; do not read them as its reasons."
        )
        return "\n".join(lines)

    def plain(self) -> dict[str, object]:
        """For a JSON file."""
        return {
            "passed": self.passed,
            "alike_from": ALIKE,
            "images": self.images,
            "draws": DRAWS,
            "rank_correlation": {
                each.weights: {"mean": each.mean, "highest": each.highest, "empty": each.empty} for each in self.found
            },
        }


def randomisation_check(
    bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], *, maps: Maps | None = None, seed: int = 0
) -> Sanity:
    """Compares the trained network's maps with those of networks whose weights were drawn anew.

    Maps are compared as the last features have them, by Spearman's rank correlation.

    Args:
        bundle: The trained network.
        images: Of shape (n, size, size, 3), as in `heat_map`.
        class_indices: A class an image.
        maps: The explanation to be checked; None: that of `heat_map`.
        seed: Of the draws.
    """
    explained = maps or _grad_cam

    def of(network: nn.Module) -> NDArray[np.float64]:
        parts = [
            explained(bundle, images[at : at + AT_ONCE], class_indices[at : at + AT_ONCE], network)
            for at in range(0, len(images), AT_ONCE)
        ]
        return np.asarray(torch.cat(parts).flatten(1).cpu(), dtype=np.float64)

    trained = of(bundle.classifier.network)
    kept = np.ptp(trained, axis=1) > 0
    found = []
    for weights, drawn in (("the last layer", _with_new_head), ("all weights", _with_new_weights)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            others = [of(drawn(bundle))[kept] for _ in range(DRAWS)] if kept.any() else []
        each = [rank_correlation(*pair) for other in others for pair in zip(trained[kept], other, strict=True)]
        if each:
            empty = float(np.mean([np.ptp(other, axis=1) == 0 for other in others]))
            found.append(Likeness(weights, float(np.mean(each)), max(each), empty))
    return Sanity(int(kept.sum()), tuple(found))


def rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's rank correlation of two flat maps; 0 where one is the same everywhere, or no number.

    Example:
        >>> rank_correlation(np.array([0.1, 0.2, 0.9]), np.array([1.0, 2.0, 3.0]))
        1.0
    """
    if not (np.isfinite(one).all() and np.isfinite(other).all()) or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    found = float(spearmanr(one, other).statistic)
    return 0.0 if math.isnan(found) else round(found, 12)


def _grad_cam(bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], network: nn.Module) -> Tensor:
    return coarse_maps(bundle, images, class_indices, network=network)


def _with_new_head(bundle: Bundle) -> nn.Module:
    network = copy.deepcopy(bundle.classifier.network).cpu()
    draw_head(network)
    return network.to(bundle.device)


def _with_new_weights(bundle: Bundle) -> nn.Module:
    said = bundle.description
    network = create_network(
        said.architecture, said.arguments, classes=len(said.classes), image_size=bundle.input.size
    ).eval()
    draw_head(network)
    return laid_out(network, bundle.device)
