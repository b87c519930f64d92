"""From image files to batches: catalog, split, decoding, augmentation, loading. Knows nothing of models.

`draw_part` and `stratified_folds` cut an image set; they take arrays, so that others can simulate them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pylorus.data.draw import draw_part
    from pylorus.data.folds import stratified_folds

__all__ = ["draw_part", "stratified_folds"]

_MODULES = {"draw_part": "pylorus.data.draw", "stratified_folds": "pylorus.data.folds"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and NumPy with it, not before."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
