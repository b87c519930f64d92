"""Modules that other packages import and a run rarely uses, loaded only when something of them is used.

timm imports wandb for a function of its own training script, and torchmetrics imports `scipy.signal` to add a name that
SciPy removed. Together they are a fifth of the time in which torch, timm and Lightning are imported.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

ASKED_OF_ALL = ("__file__", "__warningregistry__", "__wrapped__")
"""Names for which `inspect` and `warnings` look in all loaded modules; they load none."""


class DeferredModule(ModuleType):
    """A module that is loaded, in place, when one of its names is used or changed for the first time."""

    def __getattr__(self, name: str) -> Any:
        """Load the module, and return one of its names."""
        if name in ASKED_OF_ALL:
            raise AttributeError(f"module {self.__name__!r} is not loaded yet")
        _load(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        """Load the module, and set one of its names."""
        _load(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        """Load the module, and delete one of its names."""
        _load(self)
        delattr(self, name)


def defer_import(name: str, **known: object) -> None:
    """Let `import name` load the module when it is used, unless it is loaded already or not installed.

    Args:
        name: The module; its parent package is not loaded by this.
        **known: Names of it that may be looked up, by `hasattr` for example, without loading it.
    """
    if name in sys.modules or find_spec(name.partition(".")[0]) is None:
        return
    module = DeferredModule(name)
    # The import system asks for its specification: if that were absent, the module would be loaded.
    vars(module).update(known, __spec__=ModuleSpec(name, None))
    sys.modules[name] = module


def _load(module: ModuleType) -> None:
    """Load a deferred module.

    Raises:
        ImportError: If it can't be found; also whatever it raises itself. It is deferred as before.
    """
    name, names = module.__name__, dict(vars(module))
    parent = name.rpartition(".")[0]
    spec = PathFinder.find_spec(name, importlib.import_module(parent).__path__ if parent else None)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    vars(module).clear()
    vars(module).update(vars(module_from_spec(spec)))
    object.__setattr__(module, "__class__", ModuleType)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        vars(module).clear()
        vars(module).update(names)
        object.__setattr__(module, "__class__", DeferredModule)
        raise
    if parent:
        setattr(sys.modules[parent], name.rpartition(".")[2], module)


def defer_rarely_used() -> None:
    """Defer what timm and torchmetrics import and Pylorus does not use; see the docstring of this module."""
    defer_import("wandb")
    defer_import("scipy.signal", hamming=None)
