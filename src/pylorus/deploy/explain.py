"""Check that heat maps show what a network learned: other weights must give other maps (Adebayo et al. 2018)."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_count, format_number, format_percent
from pylorus.data.files import RGB
from pylorus.deploy.model import Bundle, build_network
from pylorus.model.inference import BundleClassifier, move_to_device
from pylorus.model.weights import init_head

POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class FeatureTap(nn.Module):
    """Wrap a module so that its output passes through `map` as (n, channels, height, width), whatever its own layout.

    Args:
        part: Module that returns maps (n, channels, height, width) or (n, height, width, channels), or tokens
            (n, tokens, channels).
        channels_last: Whether the maps are (n, height, width, channels).
        prefix: Number of tokens before those of the image, such as a class token.
    """

    def __init__(self, part: nn.Module, *, channels_last: bool = False, prefix: int = 0) -> None:
        super().__init__()
        self.part, self.channels_last, self.prefix = part, channels_last, prefix
        self.map = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the module's output, unchanged."""
        output = self.part(inputs)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise PylorusError(
                "a heat map needs a last feature map or a square grid of tokens; this network has neither."
            )
        if output.ndim == 4:
            if not self.channels_last:
                return self.map(output)  # type: ignore[no-any-return]
            return self.map(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
        # Some networks add the class token only after their last block.
        count = output.shape[1]
        prefix = next(
            (candidate for candidate in (self.prefix, 0) if math.isqrt(count - candidate) ** 2 == count - candidate),
            None,
        )
        if prefix is None:
            raise PylorusError(f"a heat map needs a square grid of tokens; this network has {count} tokens.")
        prefix_tokens, tokens = output[:, :prefix], output[:, prefix:]
        side = math.isqrt(count - prefix)
        square = self.map(tokens.transpose(1, 2).reshape(len(tokens), -1, side, side))
        return torch.cat([prefix_tokens, square.flatten(2).transpose(1, 2)], dim=1)


class _Features(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.forward_features(pixels)  # type: ignore[no-any-return]


class _FeaturesAndHead(nn.Module):
    def __init__(self, features: nn.Module, network: Any) -> None:
        super().__init__()
        self.features, self.network = features, network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.forward_head(self.features(pixels))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class LastMap:
    """A network and its last feature map.

    Attributes:
        network: Module that returns logits (n, classes) for normalised images.
        layer: Its module whose output is the feature map, (n, channels, height, width).
        method: Description of where Grad-CAM is applied.
    """

    network: nn.Module
    layer: nn.Module
    method: str


def find_last_map(network: Any) -> LastMap:
    """Find the last feature map before the head of a timm model.

    The modules are copies that share the model's tensors, so hooks on them don't affect others who use the model at the
    same time.

    Args:
        network: A timm model; it is not changed.

    Raises:
        PylorusError: If it has a class token but blocks of an unknown type.
    """
    tensors = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    network_copy = copy.deepcopy(network, tensors)
    prefix = int(getattr(network_copy, "num_prefix_tokens", 0) or 0)
    if prefix:
        blocks = getattr(network_copy, "blocks", None)
        block: Any = blocks[-1] if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
        if not hasattr(block, "norm1"):
            raise PylorusError(
                "a heat map needs the tokens that enter the last block; they are not accessible in "
                f"{type(network_copy).__name__}."
            )
        tap = block.norm1 = FeatureTap(block.norm1, prefix=prefix)
        return LastMap(network_copy, tap.map, "Grad-CAM on the tokens that enter the last block, as a square grid")
    pool = _find_last_pool(network_copy)
    if pool is not None:
        layers, index = pool
        tap = layers[index - 1] = FeatureTap(layers[index - 1])
        return LastMap(network_copy, tap.map, "Grad-CAM on the last feature map before the last pooling")
    tap = FeatureTap(_Features(network_copy), channels_last=getattr(network_copy, "output_fmt", None) == "NHWC")
    return LastMap(_FeaturesAndHead(tap, network_copy), tap.map, "Grad-CAM on the last feature map before pooling")


def _find_last_pool(network: Any) -> tuple[nn.Sequential, int] | None:
    """Return the pooling that ends a network's features, as in VGG: its container and index; None if there is none."""
    info = getattr(network, "feature_info", None)
    if not info:
        return None
    name = (info[-1] if isinstance(info, list) else info.info[-1])["module"]
    parent, _, index = name.rpartition(".")
    layers = dict(network.named_modules()).get(parent)  # not every name that timm reports is a module
    if not (isinstance(layers, nn.Sequential) and index.isdigit() and isinstance(layers[int(index)], POOLS)):
        return None
    return layers, int(index)


COLORMAP = "viridis"
"""matplotlib colormap: perceptually uniform, safe for color-blind readers, and unlike the colors of mucosa."""
MAX_OPACITY = 0.65
"""Opacity of the map at its maximum, in [0, 1]; where the map is 0, the image is unchanged."""


def compute_heat_map(bundle: Bundle, image: RGB, class_index: int) -> NDArray[np.float64]:
    """Compute where in an image the network finds support for a class, by Grad-CAM (Selvaraju et al. 2017).

    Each channel of the last feature map is weighted by the mean gradient of the class's logit; the positive part of
    the sum is scaled up to the image's size and divided by its maximum. Safe to call from several threads.

    Args:
        bundle: A trained model.
        image: uint8 RGB of shape `bundle.input.shape`, preprocessed by `bundle.input`: cropped and resized.
        class_index: Index of the class in the bundle's class order.

    Returns:
        float64 of shape (size, size), in [0, 1]; all 0 if nothing supports the class.

    Raises:
        PylorusError: If the network has no usable feature map, or captum is not installed.
        ValueError: If the shape or dtype of the image, or the class index, does not match the bundle.
    """
    heat: NDArray[np.float64] = compute_heat_maps(bundle, image[None], [class_index])[0]
    return heat


def compute_heat_maps(bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int]) -> NDArray[np.float64]:
    """Compute heat maps of shape (n, size, size) for images (n, *bundle.input.shape), one class each; see
    `compute_heat_map`.
    """
    size, shape = bundle.input.size, bundle.input.shape
    if images.shape[1:] != shape or images.dtype != np.uint8:
        expected = f"uint8 (n, {', '.join(map(str, shape))})"
        raise ValueError(f"images: found {images.dtype} of shape {images.shape}, expected {expected}")
    if not all(0 <= index < len(bundle.description.classes) for index in class_indices):
        raise ValueError(f"classes: found {class_indices}, expected 0 to {len(bundle.description.classes) - 1}")
    coarse = compute_coarse_maps(bundle, images, class_indices)
    return np.asarray(_scale_maps(coarse, (size, size)).cpu(), dtype=np.float64)


def _scale_maps(maps: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scale maps (n, height, width) to another resolution, and each to a maximum of 1, or 0 if nothing supports it."""
    fine = functional.interpolate(maps[:, None], size=shape, mode="bilinear")[:, 0].clamp(min=0)
    maximum = fine.amax(dim=(1, 2), keepdim=True)
    return torch.where(maximum > 0, fine / maximum, 0)


def compute_coarse_maps(
    bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], *, network: nn.Module | None = None
) -> Tensor:
    """Compute the heat maps at the resolution of the last features: shape (n, height, width), values >= 0, not scaled.

    Those of an ensemble are the mean of its networks' maps, each scaled to a maximum of 1, at the finest resolution.

    Args:
        bundle: A trained model.
        images: uint8 RGB of shape (n, *bundle.input.shape).
        class_indices: One class index per image.
        network: Another network of the bundle's architecture, of an ensemble a module list of such networks; None for
            the trained one.
    """
    forms = {(form.crop, form.fit) for form in bundle.input.forms}
    if len(forms) > 1:
        raise PylorusError(
            f"{bundle.folder}: its networks see different parts of an image (data.crop or data.fit differ), so that "
            "their heat maps can't be averaged. Explain its members: pylorus explain RUN/model"
        )
    others: Sequence[Any] = [None] * len(bundle.networks)
    if network is not None:
        others = list(network) if isinstance(network, nn.ModuleList) and bundle.members else [network]
    maps = [
        _compute_network_maps(each, bundle.select_input(images, number), class_indices, others[number])
        for number, each in enumerate(bundle.networks)
    ]
    if len(maps) == 1:
        return maps[0]
    height, width = max((each.shape[1:] for each in maps), key=math.prod)
    return torch.stack([_scale_maps(each, (height, width)) for each in maps]).mean(dim=0)


def _compute_network_maps(
    bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], network: nn.Module | None
) -> Tensor:
    """Compute the coarse maps of a single network; see `compute_coarse_maps`."""
    assert isinstance(bundle.classifier, BundleClassifier)
    target_map = find_last_map(bundle.classifier.network if network is None else network)
    batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(bundle.device)
    with torch.inference_mode(False), torch.enable_grad():
        # Frozen weights have no gradient; that of the pixels carries it back to the feature map.
        pixels = bundle.classifier.normalize_images(batch).detach().requires_grad_()
        targets = torch.tensor(class_indices, device=bundle.device)
        method = _import_captum().LayerGradCam(target_map.network, target_map.layer)
        maps: Tensor = method.attribute(pixels, targets, relu_attributions=True)
    maps = maps.detach().float()[:, 0]
    if maps.shape[-1] * maps.shape[-2] < 4:
        raise PylorusError(
            f"{bundle.folder}: the last feature map of {bundle.description.architecture} has only {maps.shape[-2]} × "
            f"{maps.shape[-1]} cells for images of {bundle.input.size} pixels: too few to localize anything."
        )
    return maps


def render_overlay(image: RGB, heat: NDArray[np.floating[Any]]) -> RGB:
    """Overlay a heat map on its image.

    Args:
        image: uint8 RGB of shape (size, size, 3).
        heat: Heat map of shape (size, size), in [0, 1], from `compute_heat_map`.

    Returns:
        uint8 RGB of shape (size, size, 3).
    """
    color = matplotlib.colormaps[COLORMAP](heat)[..., :3] * 255
    opacity = MAX_OPACITY * np.asarray(heat, dtype=np.float64)[..., None]
    return np.asarray(np.rint(image * (1 - opacity) + color * opacity), dtype=np.uint8)


def format_heat_map_method(bundle: Bundle) -> str:
    """Describe the method and the resolution of the map before it is scaled up.

    Raises:
        PylorusError: As `compute_heat_map`.
    """
    coarse = compute_coarse_maps(bundle, np.zeros((1, *bundle.input.shape), dtype=np.uint8), [0])
    height, width = coarse.shape[1:]
    methods = dict.fromkeys(find_last_map(each.network).method for each in bundle.networks)
    averaged = f", mean over {len(bundle.members)} networks" if bundle.members else ""
    return f"{'; '.join(methods)} ({height} × {width} cells{averaged})"


def _import_captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise PylorusError('heat maps need the package captum: pip install "pylorus[explain]"') from error
    return attr


MAX_IMAGES, DRAWS = 8, 3
SIMILARITY_LIMIT = 0.5
"""Maps with other weights count as alike from this mean rank correlation on. Our choice: no paper sets a limit."""
BATCH = 4

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
        return self.mean >= SIMILARITY_LIMIT


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
        count = format_count(self.images, "image")
        lines = [
            f"Randomisation check (Adebayo et al. 2018), {count}, {DRAWS} draws: mean rank correlation between "
            f"the trained network's maps and those after randomizing"
        ]
        lines += [
            f"  {each.weights}: {format_number(each.mean, 2)} (highest {format_number(each.highest, 2)}; "
            f"{format_percent(each.empty)} % of maps "
            f"empty)"
            for each in self.found
        ]
        lines.append(
            f"Passed: below {SIMILARITY_LIMIT}, so other weights give other maps."
            if self.has_passed
            else f"WARNING: {SIMILARITY_LIMIT} or more: the maps hardly change with other weights. They show the image "
            "or the architecture more than what the network learned; do not read them as its reasons."
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for a JSON file."""
        return {
            "passed": self.has_passed,
            "alike_from": SIMILARITY_LIMIT,
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
        images: uint8 RGB of shape (n, *bundle.input.shape), as in `heat_map`.
        class_indices: One class index per image.
        maps: The method to check; None for Grad-CAM as in `heat_map`.
        seed: Random seed of the new weights.
    """
    compute_maps = maps or _compute_grad_cam

    def compute_flat_maps(network: nn.Module) -> NDArray[np.float64]:
        batches = [
            compute_maps(bundle, images[at : at + BATCH], class_indices[at : at + BATCH], network)
            for at in range(0, len(images), BATCH)
        ]
        return np.asarray(torch.cat(batches).flatten(1).cpu(), dtype=np.float64)

    trained = compute_flat_maps(bundle.network)
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
    if bundle.members:
        return nn.ModuleList(map(_copy_with_random_head, bundle.members))
    network = copy.deepcopy(bundle.network).cpu()
    init_head(network)
    return network.to(bundle.device)  # type: ignore[no-any-return]


def _create_random_network(bundle: Bundle) -> nn.Module:
    if bundle.members:
        return nn.ModuleList(map(_create_random_network, bundle.members))
    if isinstance(bundle.factory, nn.Module):
        raise PylorusError(
            "The comparison with randomized networks needs the class or function that builds the network, not a "
            "module. Pass that, or leave the comparison out (--no-sanity)."
        )
    network = build_network(bundle.description, bundle.factory, where=str(bundle.folder)).eval()
    init_head(network)
    return move_to_device(network, bundle.device)
