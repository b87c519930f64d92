"""Statistics of predictions: pure functions that take arrays and return frozen dataclasses.

The functions in `__init__.pyi` are public: `from pylorus.evaluation import clustered_wilson`. Each is imported on first
use, so that the training loop can use `pylorus.evaluation.confusion` without loading SciPy.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
