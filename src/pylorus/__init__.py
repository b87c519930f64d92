"""Pylorus: train, compare, validate and ship image classifiers for gastroscopy by transfer learning.

The names in `__init__.pyi` are public: `import pylorus`, then `pylorus.Classifier`. Each is imported on first use.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
