"""Turn image files into batches: catalog, split, decoding, augmentation, loading. Independent of any model.

`draw_part` and `stratified_folds` split an image set. They take plain arrays, so that they can be used in simulations.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pylorus.data.stratification import draw_part, stratified_folds

__all__ = ["draw_part", "stratified_folds"]

_MODULES = {"draw_part": "pylorus.data.stratification", "stratified_folds": "pylorus.data.stratification"}


def __getattr__(name: str) -> Any:
    """Import a public function, and NumPy with it, on first access."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
