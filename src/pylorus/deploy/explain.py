"""Which part of an image speaks for a class: the heat map of a bundle, and the image with the map over it."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pylorus.data.image import RGB
from pylorus.deploy.last_map import last_map
from pylorus.deploy.load import Bundle
from pylorus.errors import PylorusError

COLOURS = "viridis"
"""From matplotlib: even steps for all eyes, and no colour of a mucosa."""
STRENGTH = 0.65
"""How much of the image the hottest colour hides; where the map is 0 the image is as it was."""


def heat_map(bundle: Bundle, image: RGB, class_index: int) -> NDArray[np.float64]:
    """Where in an image the network finds what speaks for a class: Grad-CAM (Selvaraju et al. 2017).

    Each channel of the last map of features is weighted by the mean gradient of the class's logit; the sum, without
    what speaks against the class, is scaled up to the image's size and divided by its maximum. May be called by
    several threads at once.

    Args:
        bundle: A trained network.
        image: uint8 RGB of shape (size, size, 3) as `bundle.input` reads it: what the network sees, cropped and fitted.
        class_index: Of the class, in the order of the bundle's.

    Returns:
        Shape (size, size), in [0, 1]; all 0 where nothing speaks for the class.

    Raises:
        PylorusError: If the network has no map to look at, or captum is not installed.
        ValueError: If the image or the class is not the bundle's.
    """
    found: NDArray[np.float64] = heat_maps(bundle, image[None], [class_index])[0]
    return found


def heat_maps(bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int]) -> NDArray[np.float64]:
    """As `heat_map`, of images (n, size, size, 3) and a class each; gives (n, size, size)."""
    size = bundle.input.size
    if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
        raise ValueError(f"images: found {images.dtype} of shape {images.shape}, expected uint8 (n, {size}, {size}, 3)")
    if not all(0 <= index < len(bundle.description.classes) for index in class_indices):
        raise ValueError(f"classes: found {class_indices}, expected 0 to {len(bundle.description.classes) - 1}")
    coarse = coarse_maps(bundle, images, class_indices)
    fine = functional.interpolate(coarse[:, None], size=(size, size), mode="bilinear")[:, 0].clamp(min=0)
    highest = fine.amax(dim=(1, 2), keepdim=True)
    return np.asarray(torch.where(highest > 0, fine / highest, 0).cpu(), dtype=np.float64)


def coarse_maps(
    bundle: Bundle, images: NDArray[np.uint8], class_indices: Sequence[int], *, network: nn.Module | None = None
) -> Tensor:
    """The maps as the network's last features have them, before they are scaled: (n, height, width), none below 0.

    Args:
        bundle: As in `heat_map`.
        images: Of shape (n, size, size, 3).
        class_indices: A class an image.
        network: Another network of the bundle's architecture; None: the trained one.
    """
    found = last_map(bundle.classifier.network if network is None else network)
    batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(bundle.device)
    with torch.inference_mode(False), torch.enable_grad():
        # Frozen weights have no gradient; the image's own carries it to the map.
        pixels = bundle.classifier.pixels(batch).detach().requires_grad_()
        target = torch.tensor(class_indices, device=bundle.device)
        method = _captum().LayerGradCam(found.network, found.layer)
        maps: Tensor = method.attribute(pixels, target, relu_attributions=True)
    maps = maps.detach().float()[:, 0]
    if maps.shape[-1] * maps.shape[-2] < 4:
        raise PylorusError(
            f"{bundle.folder}: the last map of {bundle.description.architecture} has {maps.shape[-2]} × "
            f"{maps.shape[-1]} pixels at images of {bundle.input.size}: it says nothing about where."
        )
    return maps


def overlay(image: RGB, heat: NDArray[np.floating[Any]]) -> RGB:
    """The image with the map over it.

    Args:
        image: uint8 RGB of shape (size, size, 3).
        heat: Of shape (size, size), in [0, 1], from `heat_map`.
    """
    colour = matplotlib.colormaps[COLOURS](heat)[..., :3] * 255
    cover = STRENGTH * np.asarray(heat, dtype=np.float64)[..., None]
    return np.asarray(np.rint(image * (1 - cover) + colour * cover), dtype=np.uint8)


def method_of(bundle: Bundle) -> str:
    """What is done, in words, and how fine the map is before it is scaled up.

    Raises:
        PylorusError: As `heat_map`.
    """
    size = bundle.input.size
    height, width = coarse_maps(bundle, np.zeros((1, size, size, 3), dtype=np.uint8), [0]).shape[1:]
    return f"{last_map(bundle.classifier.network).method} ({height} × {width} cells)"


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise PylorusError('heat maps need captum: pip install "pylorus[explain]"') from error
    return attr
