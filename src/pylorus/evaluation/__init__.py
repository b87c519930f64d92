"""Evidence from predictions: pure functions, arrays in and frozen dataclasses out.

The functions in `__init__.pyi` are public: `from pylorus.evaluation import clustered_wilson`. Each is imported when it
is first asked for, so that the training loop can use `pylorus.evaluation.confusion` without waiting for SciPy or
statsmodels.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
