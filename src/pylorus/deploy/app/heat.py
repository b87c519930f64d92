"""Heat maps for the page, where their extra is installed; where it is not, why there are none."""

import logging

import cv2
import numpy as np

from pylorus.data.image import RGB
from pylorus.deploy.load import Bundle
from pylorus.errors import PylorusError

log = logging.getLogger(__name__)


def heat_over(bundle: Bundle, seen: RGB, shown: RGB, class_index: int) -> RGB:
    """What speaks for a class, laid over a picture of what the network sees.

    Args:
        bundle: A trained network.
        seen: Its input, of shape (size, size, 3).
        shown: The same, larger: a square.
        class_index: Of the class, in the order of the bundle's.

    Raises:
        PylorusError: If the network gives no map, or a package is missing; says which.
    """
    from pylorus.deploy.explain import heat_map, overlay

    heat = heat_map(bundle, seen, class_index)
    larger = cv2.resize(heat, (shown.shape[1], shown.shape[0]), interpolation=cv2.INTER_LINEAR)
    return overlay(shown, np.clip(larger, 0, 1))


def why_no_heat(bundle: Bundle) -> str:
    """Why there are no heat maps, found by trying one; "" where there are."""
    size = bundle.input.size
    black = np.zeros((size, size, 3), dtype=np.uint8)
    try:
        heat_over(bundle, black, black, 0)
    except (PylorusError, ImportError) as error:
        return str(error).removeprefix(f"{bundle.folder}: ")
    except Exception as error:  # without its pictures the page is still of use
        log.warning("no heat maps: %s", error, exc_info=True)
        return f"this network gives none ({type(error).__name__})"
    return ""
