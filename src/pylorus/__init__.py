"""Pylorus: train, compare, validate and ship image classifiers for gastroscopy by transfer learning."""

__version__ = "0.1.0"
