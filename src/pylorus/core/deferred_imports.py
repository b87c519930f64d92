"""Modules that other packages import and a run rarely uses, loaded only when something of them is used.

timm imports wandb for a function of its own training script; torchmetrics imports `scipy.signal` to add a name that
SciPy removed, Matplotlib for plots of its own, and transformers, where it is installed, for a score of texts. wandb and
`scipy.signal` are a fifth of the time in which torch, timm and Lightning are imported; on a machine with a GPU,
transformers was 2 of 5 seconds.
"""

import importlib
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

ASKED_OF_ALL = ("__file__", "__warningregistry__", "__wrapped__")
"""Names for which `inspect` and `warnings` look in all loaded modules; they load none."""


class DeferredModule(ModuleType):
    """A module that is loaded, in place, when one of its names is used or changed for the first time."""

    def __getattr__(self, name: str) -> Any:
        """Load the module, and return one of its names, or one of its modules.

        The import system asks for `__path__` to import one of its modules, and for that it is loaded. A statement
        `from package import name` asks too: it gets none, so that a known name does not load the package.
        """
        is_import_statement = name == "__path__" and "importlib" not in sys._getframe(1).f_code.co_filename
        if name in ASKED_OF_ALL or is_import_statement:
            raise AttributeError(f"module {self.__name__!r} is not loaded yet")
        _load(self)
        try:
            return getattr(self, name)
        except AttributeError:
            with suppress(ModuleNotFoundError):
                return importlib.import_module(f"{self.__name__}.{name}")
            raise

    def __setattr__(self, name: str, value: object) -> None:
        """Load the module, and set one of its names."""
        _load(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        """Load the module, and delete one of its names."""
        _load(self)
        delattr(self, name)


class DeferredName:
    """A name of a deferred module, such as a class: the module is loaded when something is done with it.

    Args:
        module: The name of the module.
        name: The name in it.
    """

    def __init__(self, module: str, name: str) -> None:
        self._names = module, name

    def _resolve(self) -> Any:
        module, name = self._names
        loaded = importlib.import_module(module)
        if isinstance(loaded, DeferredModule):
            _load(loaded)
        return getattr(loaded, name)

    def __getattr__(self, attribute: str) -> Any:
        """Load the module, and return an attribute of what has the name."""
        if attribute in ASKED_OF_ALL:
            raise AttributeError(f"module {self._names[0]!r} is not loaded yet")
        return getattr(self._resolve(), attribute)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Load the module, and call what has the name."""
        return self._resolve()(*arguments, **keywords)

    def __instancecheck__(self, instance: object) -> bool:
        """Load the module, and check whether an object is an instance of the class of that name."""
        return isinstance(instance, self._resolve())

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[Any, ...]:
        """Load the module, and return the class of that name: another one derives from it."""
        return (self._resolve(),)


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
    _defer_names("transformers", "AutoModel", "AutoTokenizer")
    drawing = ("plot_confusion_matrix", "plot_curve", "plot_single_or_multi_val")
    _defer_names("torchmetrics.utilities.plot", *drawing, _AX_TYPE=object, _CMAP_TYPE=object, _PLOT_OUT_TYPE=object)


def _defer_names(module: str, *names: str, **known: object) -> None:
    """Defer a module some of whose names are imported, but not used, by others."""
    defer_import(module, **{name: DeferredName(module, name) for name in names}, **known)
