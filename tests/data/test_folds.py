"""Folds are those of scikit-learn, group by group, so that splits which are out there stay as they are."""

import warnings

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from pylorus.data.stratification import stratified_folds


@pytest.mark.parametrize("trial", range(30))
def test_folds_are_those_of_scikit_learn(trial):
    rng = np.random.default_rng(trial)
    classes, patients, folds = (int(rng.integers(*span)) for span in ((2, 8), (25, 150), (2, 21)))
    rows = int(rng.integers(patients, 4 * patients))
    labels = rng.choice(classes, size=rows, p=rng.dirichlet(np.ones(classes) * 4))
    names = rng.integers(0, patients, rows) if trial % 3 else np.arange(rows)
    groups = np.array([f"patient {name}" for name in names])
    theirs = np.empty(rows, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cutter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=trial)
        for number, (_, held_out) in enumerate(cutter.split(labels, labels, groups)):
            theirs[held_out] = number
    assert np.array_equal(stratified_folds(labels, groups, folds=folds, seed=trial), theirs)
