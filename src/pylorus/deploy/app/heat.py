"""Heat maps for the web page if their extra is installed; otherwise the reason why there are none."""

import logging

import cv2
import numpy as np

from pylorus.data.image import RGB
from pylorus.deploy.load import Bundle
from pylorus.errors import PylorusError

log = logging.getLogger(__name__)


def render_heat_overlay(bundle: Bundle, pixels: RGB, display: RGB, class_index: int) -> RGB:
    """Overlay the heat map of a class on the image for the page.

    Args:
        bundle: The trained model.
        pixels: The network's input, uint8 RGB of shape (size, size, 3).
        display: The same image for the page, uint8 RGB, square.
        class_index: Index of the class in the bundle's class order.

    Raises:
        PylorusError: If the network has no usable map, or a package is missing; the message names it.
    """
    from pylorus.deploy.explain import compute_heat_map, render_overlay

    heat = compute_heat_map(bundle, pixels, class_index)
    resized = cv2.resize(heat, (display.shape[1], display.shape[0]), interpolation=cv2.INTER_LINEAR)
    return render_overlay(display, np.clip(resized, 0, 1))


def find_heat_map_problem(bundle: Bundle) -> str:
    """Return why there are no heat maps, found by computing one; empty if they work."""
    size = bundle.input.size
    black = np.zeros((size, size, 3), dtype=np.uint8)
    try:
        render_heat_overlay(bundle, black, black, 0)
    except (PylorusError, ImportError) as error:
        return str(error).removeprefix(f"{bundle.folder}: ")
    except Exception as error:  # the page is useful without heat maps, too
        log.warning("heat maps failed: %s", error, exc_info=True)
        return f"they can't be computed for this network ({type(error).__name__})"
    return ""
