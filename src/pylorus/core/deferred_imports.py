"""Modules that other packages import and a run rarely uses, loaded only when something of them is used.

timm imports wandb for a function of its own training script, and torchmetrics imports `scipy.signal` to add a name that
SciPy removed. Together they are a fifth of the time in which torch, timm and Lightning are imported.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

ASKED_OF_ALL = ("__file__", "__warningregistry__", "__wrapped__")
"""Names for which `inspect` and `warnings` look in all loaded modules; they load none."""


class DeferredModule(ModuleType):
    """A module that is loaded when one of its names is used for the first time."""

    def __getattr__(self, name: str) -> Any:
        """Load the module, unless that has happened, and return one of its names."""
        if sys.modules.get(self.__name__) is self:
            if name in ASKED_OF_ALL:
                raise AttributeError(f"module {self.__name__!r} is not loaded yet")
            del sys.modules[self.__name__]
            try:
                importlib.import_module(self.__name__)
            except BaseException:
                sys.modules[self.__name__] = self
                raise
        return getattr(sys.modules[self.__name__], name)


def defer_import(name: str, **known: object) -> None:
    """Let `import name` load the module when it is used, unless it is loaded already or not installed.

    Args:
        name: The module; its parent package is not loaded by this.
        **known: Names of it that may be looked up, by `hasattr` for example, without loading it.
    """
    if name in sys.modules or find_spec(name.partition(".")[0]) is None:
        return
    module = DeferredModule(name)
    vars(module).update(known)
    module.__spec__ = ModuleSpec(
        name, None
    )  # the import system asks for it, and would load the module if it were absent
    sys.modules[name] = module


def defer_rarely_used() -> None:
    """Defer what timm and torchmetrics import and Pylorus does not use; see the docstring of this module."""
    defer_import("wandb")
    defer_import("scipy.signal", hamming=None)
