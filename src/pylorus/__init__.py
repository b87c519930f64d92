"""Pylorus: train, compare, prove and ship image classifiers for gastroscopy by transfer learning."""

__version__ = "0.1.0"
