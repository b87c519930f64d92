"""What `pylorus.evaluation` exports, so that others can simulate it."""

import subprocess
import sys

import numpy as np
import pytest

import pylorus.evaluation

NAMES = (
    "auroc",
    "clustered_wilson",
    "delong_test",
    "indices_of_confusion",
    "indices_of_predictions",
    "mcnemar",
    "net_benefit",
    "paired_differences",
    "proportions_of_predictions",
    "ranking_of_predictions",
    "threshold_at_sensitivity",
)


@pytest.mark.parametrize("name", NAMES)
def test_public_functions_are_exported_by_name(name):
    assert name in pylorus.evaluation.__all__
    assert callable(getattr(pylorus.evaluation, name))


def test_every_exported_name_is_there_and_is_no_module():
    for name in pylorus.evaluation.__all__:
        assert callable(getattr(pylorus.evaluation, name)), name


@pytest.mark.slow
def test_the_package_is_imported_without_scipy():
    code = "import sys, pylorus.evaluation.confusion; sys.exit('scipy' in sys.modules or 'statsmodels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_exported_function_computes():
    found = pylorus.evaluation.clustered_wilson(np.array([True, False, True]), None)
    assert found.low < found.value < found.high
