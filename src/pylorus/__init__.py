"""Pylorus: train, compare, validate and ship image classifiers for gastroscopy by transfer learning.

Public names, each imported on first use:

ImageDataModule, Classifier, FreezeBackbone, AverageWeights: for your own Lightning Trainer.
train, load_model, validate, audit, report: what the commands do. They return or take TrainedRun, Model, Validation.
PylorusError: every error that you can fix; its message says how.

`help(pylorus.train)` describes a name.
"""

import lazy_loader

from pylorus.core.deferred_imports import defer_rarely_used

__version__ = "0.1.0"

defer_rarely_used()
_import_name, _list_names, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in __all__:
        from pylorus.core.errors import format_suggestion

        raise AttributeError(f"module 'pylorus' has no attribute {name!r}.{format_suggestion(name, __all__)}")
    return _import_name(name)


def __dir__() -> list[str]:
    return sorted({*_list_names(), "__version__", "__doc__"})
