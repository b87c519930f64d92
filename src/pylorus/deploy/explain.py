"""Heat maps: which part of an image supports a class, and the image with its heat map overlaid."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pylorus.data.image import RGB
from pylorus.deploy.last_map import find_last_map
from pylorus.deploy.load import Bundle
from pylorus.errors import PylorusError

COLOURS = "viridis"
"""matplotlib colormap: perceptually uniform, safe for color-blind readers, and unlike the colors of mucosa."""
STRENGTH = 0.65
"""Opacity of the map at its maximum, in [0, 1]; where the map is 0, the image is unchanged."""


def compute_heat_map(bundle: Bundle, image: RGB, class_index: int) -> NDArray[np.float64]:
    """Compute where in an image the network finds support for a class, by Grad-CAM (Selvaraju et al. 2017).

    Each channel of the last feature map is weighted by the mean gradient of the class's logit; the positive part of
    the sum is scaled up to the image's size and divided by its maximum. Safe to call from several threads.

    Args:
        bundle: A trained model.
        image: uint8 RGB of shape (size, size, 3), preprocessed by `bundle.input`: cropped and resized.
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
    """Compute heat maps of shape (n, size, size) for images (n, size, size, 3), one class each; see `compute_heat_map`."""
    size = bundle.input.size
    if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
        raise ValueError(f"images: found {images.dtype} of shape {images.shape}, expected uint8 (n, {size}, {size}, 3)")
    if not all(0 <= index < len(bundle.description.classes) for index in class_indices):
        raise ValueError(f"classes: found {class_indices}, expected 0 to {len(bundle.description.classes) - 1}")
    coarse = compute_coarse_maps(bundle, images, class_indices)
    fine = functional.interpolate(coarse[:, None], size=(size, size), mode="bilinear")[:, 0].clamp(min=0)
    maximum = fine.amax(dim=(1, 2), keepdim=True)
    return np.asarray(torch.where(maximum > 0, fine / maximum, 0).cpu(), dtype=np.float64)


def compute_coarse_maps(
    bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], *, network: nn.Module | None = None
) -> Tensor:
    """Compute the heat maps at the resolution of the last features: shape (n, height, width), values >= 0, not scaled.

    Args:
        bundle: A trained model.
        images: uint8 RGB of shape (n, size, size, 3).
        class_indices: One class index per image.
        network: Another network of the bundle's architecture; None for the trained one.
    """
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
    color = matplotlib.colormaps[COLOURS](heat)[..., :3] * 255
    opacity = STRENGTH * np.asarray(heat, dtype=np.float64)[..., None]
    return np.asarray(np.rint(image * (1 - opacity) + color * opacity), dtype=np.uint8)


def format_heat_map_method(bundle: Bundle) -> str:
    """Describe the method and the resolution of the map before it is scaled up.

    Raises:
        PylorusError: As `compute_heat_map`.
    """
    size = bundle.input.size
    height, width = compute_coarse_maps(bundle, np.zeros((1, size, size, 3), dtype=np.uint8), [0]).shape[1:]
    return f"{find_last_map(bundle.classifier.network).method} ({height} × {width} cells)"


def _import_captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise PylorusError('heat maps need the package captum: pip install "pylorus[explain]"') from error
    return attr
