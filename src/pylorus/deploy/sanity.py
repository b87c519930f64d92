"""Check that heat maps show what a network learned: other weights must give other maps (Adebayo et al. 2018)."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from pylorus.deploy.explain import compute_coarse_maps
from pylorus.deploy.load import Bundle
from pylorus.deploy.network import move_to_device
from pylorus.model.backbone import create_network
from pylorus.model.head import init_head
from pylorus.percent import format_percent

MOST_IMAGES, DRAWS = 8, 3
ALIKE = 0.5
"""Maps with other weights count as alike from this mean rank correlation on. Our choice: no paper sets a limit."""
AT_ONCE = 4

Maps = Callable[[Bundle, NDArray[np.uint8], Sequence[int], nn.Module], Tensor]
"""Computes maps (n, height, width) of a bundle's images (n, size, size, 3), one class each, with a given network."""


@dataclass(frozen=True)
class MapSimilarity:
    """How similar maps are to those of the trained network.

    Attributes:
        weights: Which weights were randomized, as text.
        mean: Mean rank correlation over images and draws, in [-1, 1]; an empty map counts as 0.
        highest: Largest rank correlation of any image and draw.
        empty: Fraction of maps in which nothing supports the class, in [0, 1].
    """

    weights: str
    mean: float
    highest: float
    empty: float

    @property
    def is_alike(self) -> bool:
        """Whether the maps are much the same despite other weights."""
        return self.mean >= ALIKE


@dataclass(frozen=True)
class Sanity:
    """Result of the randomisation check.

    Attributes:
        images: Number of images with a map to compare.
        found: Similarity with the last layer randomized, and with all weights randomized.
    """

    images: int
    found: tuple[MapSimilarity, ...]

    @property
    def has_passed(self) -> bool | None:
        """Whether other weights give other maps; None if no image has a map."""
        return None if not self.images else not any(each.is_alike for each in self.found)

    @property
    def summary(self) -> str:
        """The result as text."""
        if not self.images:
            return "Randomisation check: not possible, since all heat maps of the checked images are empty."
        count = "1 image" if self.images == 1 else f"{self.images} images"
        lines = [
            f"Randomisation check (Adebayo et al. 2018), {count}, {DRAWS} draws: mean rank correlation between "
            f"the trained network's maps and those after randomizing"
        ]
        lines += [
            f"  {each.weights}: {each.mean:.2f} (highest {each.highest:.2f}; {format_percent(each.empty)} % of maps empty)"
            for each in self.found
        ]
        lines.append(
            f"Passed: below {ALIKE}, so other weights give other maps."
            if self.has_passed
            else f"WARNING: {ALIKE} or more: the maps hardly change with other weights. They show the image or the "
            "architecture more than what the network learned; do not read them as its reasons."
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for a JSON file."""
        return {
            "passed": self.has_passed,
            "alike_from": ALIKE,
            "images": self.images,
            "draws": DRAWS,
            "rank_correlation": {
                each.weights: {"mean": each.mean, "highest": each.highest, "empty": each.empty} for each in self.found
            },
        }


def run_randomization_check(
    bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], *, maps: Maps | None = None, seed: int = 0
) -> Sanity:
    """Compare the trained network's maps with those of networks whose weights were randomized.

    Maps are compared at the resolution of the last features, by Spearman's rank correlation.

    Args:
        bundle: The trained model.
        images: uint8 RGB of shape (n, size, size, 3), as in `heat_map`.
        class_indices: One class index per image.
        maps: The method to check; None for Grad-CAM as in `heat_map`.
        seed: Random seed of the new weights.
    """
    compute_maps = maps or _compute_grad_cam

    def compute_flat_maps(network: nn.Module) -> NDArray[np.float64]:
        batches = [
            compute_maps(bundle, images[at : at + AT_ONCE], class_indices[at : at + AT_ONCE], network)
            for at in range(0, len(images), AT_ONCE)
        ]
        return np.asarray(torch.cat(batches).flatten(1).cpu(), dtype=np.float64)

    trained = compute_flat_maps(bundle.classifier.network)
    has_map = np.ptp(trained, axis=1) > 0
    likenesses = []
    for weights, randomize in (("the last layer", _copy_with_random_head), ("all weights", _create_random_network)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random_maps = [compute_flat_maps(randomize(bundle))[has_map] for _ in range(DRAWS)] if has_map.any() else []
        correlations = [
            compute_rank_correlation(*pair)
            for maps_of_draw in random_maps
            for pair in zip(trained[has_map], maps_of_draw, strict=True)
        ]
        if correlations:
            empty = float(np.mean([np.ptp(maps_of_draw, axis=1) == 0 for maps_of_draw in random_maps]))
            likenesses.append(MapSimilarity(weights, float(np.mean(correlations)), max(correlations), empty))
    return Sanity(int(has_map.sum()), tuple(likenesses))


def compute_rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation of two flat maps; 0 if one is constant, NaN or infinite.

    Example:
        >>> compute_rank_correlation(np.array([0.1, 0.2, 0.9]), np.array([1.0, 2.0, 3.0]))
        1.0
    """
    if not (np.isfinite(first).all() and np.isfinite(second).all()) or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    correlation = float(spearmanr(first, second).statistic)
    return 0.0 if math.isnan(correlation) else round(correlation, 12)


def _compute_grad_cam(
    bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], network: nn.Module
) -> Tensor:
    return compute_coarse_maps(bundle, images, class_indices, network=network)


def _copy_with_random_head(bundle: Bundle) -> nn.Module:
    network = copy.deepcopy(bundle.classifier.network).cpu()
    init_head(network)
    return network.to(bundle.device)


def _create_random_network(bundle: Bundle) -> nn.Module:
    description = bundle.description
    network = create_network(
        description.architecture, description.arguments, classes=len(description.classes), image_size=bundle.input.size
    ).eval()
    init_head(network)
    return move_to_device(network, bundle.device)
