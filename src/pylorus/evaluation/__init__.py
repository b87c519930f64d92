"""Evidence from predictions: pure functions, arrays in and frozen dataclasses out.

Nothing is imported here, so that the training loop can use `pylorus.evaluation.confusion` without waiting for
SciPy, scikit-learn or statsmodels.
"""
