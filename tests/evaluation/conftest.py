"""Simulated predictions for the tests of evaluation."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pylorus.evaluation.predictions import Predictions

Said = Callable[..., Predictions]


@pytest.fixture
def simulate_predictions() -> Said:
    """A model of given skill on three classes; images of a group share their class and their difficulty."""

    def draw(
        *, images: int = 120, groups: int | None = None, skill: float = 2.0, seed: int = 0, model: int = 0
    ) -> Predictions:
        generator = np.random.default_rng(seed)
        count = images if groups is None else groups
        group = np.arange(images) % count
        true = generator.integers(0, 3, count)[group]
        ease = skill + (generator.standard_normal(count)[group] if groups else 0.0)
        logits = np.random.default_rng([seed, model]).standard_normal((images, 3))
        logits[np.arange(images), true] += ease
        chance = np.exp(logits)
        return Predictions(
            sample=np.array([f"image-{number:05d}" for number in range(images)]),
            group=np.array([f"patient-{number:05d}" for number in group]),
            true=true,
            probabilities=chance / chance.sum(axis=1, keepdims=True),
            class_names=("GC", "GU", "CG"),
        )

    return draw


@pytest.fixture
def one_hot() -> Callable[[NDArray[np.int64]], Predictions]:
    """A model that answers these classes with certainty, about images whose true class is 0."""

    def sure(answers: NDArray[np.int64]) -> Predictions:
        names = np.array([f"image-{number:05d}" for number in range(len(answers))])
        return Predictions(
            sample=names,
            group=names,
            true=np.zeros(len(answers), dtype=np.int64),
            probabilities=np.eye(2)[answers],
            class_names=("x", "y"),
        )

    return sure


@pytest.fixture
def delong_1988() -> dict[str, NDArray[np.generic]]:
    """The example of DeLong, DeLong and Clarke-Pearson (1988).

    As printed in the SAS/STAT User's Guide, PROC LOGISTIC, "Comparing Receiver Operating Characteristic Curves":
    albumin, total protein, Krebs-Goplerud score, and whether surgery helped, of 43 patients with ovarian cancer.
    """
    rows = """
    3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
    3.8 5.7  5 1  3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
    2.3 4.4  6 1  4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
    3.1 6.6  6 1  4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
    3.7 6.1  5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
    3.3 5.7  6 1  3.7 6.9 5 1  3.6 6.6 5 1
    """
    table = np.array(rows.split(), dtype=float).reshape(-1, 4)
    return {
        "albumin": table[:, 0],
        "protein": table[:, 1],
        "K-G score": 10 - table[:, 2],
        "helped": table[:, 3] == 1,
    }
