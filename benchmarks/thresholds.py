"""Simulate how often thresholds and prediction sets keep their guarantee for new patients; prints Markdown.

    python benchmarks/thresholds.py           # 2,000 validation sets per condition
    python benchmarks/thresholds.py --quick   # 300

Scores of the positives are standard normal, so that the true sensitivity at any threshold is known. Images of one
patient are correlated in one of two ways: with `normal`, the effects of patient and image are added; with `copies`, an
image has the score of its patient with a probability that gives indicators at any threshold the stated intra-patient
correlation (ICC). "hard" gives 30 images to each of the tenth of the patients with the lowest effects: the sensitivity
over images is then lower than over patients, and the guarantee applies to patients.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pylorus.evaluation.decisions import fit_set_limits, threshold_at_sensitivity

SENSITIVITY, CONFIDENCE, COVERAGE, SETS, SEED = 0.95, 0.90, 0.90, 2000, 20261126


@dataclass(frozen=True)
class Condition:
    """The positive patients of a validation set, their numbers of images, and the correlation of these images."""

    patients: int
    images: str = "1"
    icc: float = 0.0
    alike: str = "normal"

    def __str__(self) -> str:
        return f"{self.patients} × {self.images}, ICC {self.icc:g}" + (f" {self.alike}" if self.icc else "")

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Draw the scores of the images and their patients."""
        effects = generator.standard_normal(self.patients)
        if self.images == "1-30":
            counts = generator.integers(1, 31, self.patients)
        elif self.images == "1 or 30":
            counts = np.where(generator.random(self.patients) < 0.9, 1, 30)
        elif self.images == "hard":
            counts = np.where(effects > special.ndtri(0.1), 1, 30)
        else:
            counts = np.full(self.patients, int(self.images))
        groups = np.repeat(np.arange(self.patients), counts)
        own, noise = effects[groups], generator.standard_normal(len(groups))
        if self.alike == "copies":
            return np.where(generator.random(len(groups)) < np.sqrt(self.icc), own, noise), groups
        return np.sqrt(self.icc) * own + np.sqrt(1 - self.icc) * noise, groups


CONDITIONS = (
    *(Condition(patients) for patients in (14, 20, 44, 45, 50, 100, 300)),
    Condition(50, "5"),
    *(
        Condition(patients, images, icc, alike)
        for alike in ("normal", "copies")
        for patients, images, icc in (
            (50, "5", 0.5),
            (150, "5", 0.3),
            (20, "1-30", 0.3),
            (20, "1-30", 0.7),
            (50, "1-30", 0.3),
            (100, "1-30", 0.7),
            (50, "1 or 30", 0.5),
            (200, "1 or 30", 0.5),
            (100, "30", 0.95),
        )
    ),
    Condition(100, "hard", 0.7),
)


@dataclass(frozen=True)
class Outcome:
    """The result of one rule over all validation sets of a condition.

    Attributes:
        kept: Fraction of the sets in which the true sensitivity is at least the requested one.
        sensitivity: Mean of the true sensitivities.
        guaranteed: Fraction of the sets for which the rule states a guarantee.
    """

    kept: float
    sensitivity: float
    guaranteed: float


@dataclass(frozen=True)
class Simulated:
    """The results of all rules under one condition; coverage is the mean coverage of prediction sets."""

    condition: Condition
    share_of_positives: Outcome
    images_as_patients: Outcome
    by_patient: Outcome
    coverage_of_images_as_patients: float
    coverage_by_patient: float


def simulate(condition: Condition, *, sets: int = SETS, seed: int = SEED) -> Simulated:
    """Draw validation sets, fix a threshold on each in three ways, and compute the known true sensitivity."""
    generator = np.random.default_rng(seed)
    draws = [condition.draw(generator) for _ in range(sets)]

    def fixed(patients_known: bool) -> list[tuple[float, bool]]:
        found = []
        for scores, groups in draws:
            positive, names = np.ones(len(scores), dtype=np.bool_), groups if patients_known else None
            threshold = threshold_at_sensitivity(
                positive, scores, names, sensitivity=SENSITIVITY, confidence=CONFIDENCE
            )
            found.append((threshold.threshold, threshold.is_guaranteed))
        return found

    def covered(patients_known: bool) -> float:
        found = []
        for scores, groups in draws:
            chance = special.ndtr(scores)  # also a probability: uniform, so the coverage is 1 - limit
            limits = fit_set_limits(
                np.stack([chance, 1 - chance], axis=1),
                np.zeros(len(scores), dtype=np.int64),
                groups if patients_known else None,
                coverage=COVERAGE,
            )
            found.append(1.0 if limits.lowest[0] is None else 1 - limits.lowest[0])
        return float(np.mean(found))

    plain = [
        (float(np.sort(scores)[::-1][int(np.ceil(SENSITIVITY * len(scores) - 1e-9)) - 1]), True) for scores, _ in draws
    ]
    truth = true_sensitivity(condition)
    return Simulated(
        condition,
        _outcome(plain, truth),
        _outcome(fixed(False), truth),
        _outcome(fixed(True), truth),
        covered(False),
        covered(True),
    )


def true_sensitivity(condition: Condition) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Return the true sensitivity at given thresholds for an image of a new patient, with equal weight per patient."""
    return lambda thresholds: special.ndtr(-thresholds)


def _outcome(fixed: list[tuple[float, bool]], truth: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Outcome:
    reached = truth(np.array([threshold for threshold, _ in fixed]))
    return Outcome(
        kept=float((reached >= SENSITIVITY).mean()),
        sensitivity=float(reached.mean()),
        guaranteed=float(np.mean([guaranteed for _, guaranteed in fixed])),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="300 validation sets per condition instead of 2,000")
    sets = 300 if parser.parse_args().quick else SETS
    print(
        f"Fraction of {sets:,} validation sets whose threshold has a true sensitivity of {SENSITIVITY:.0%} or more "
        f"(required: {CONFIDENCE:.0%} of them), the mean true sensitivity, the fraction of sets for which it is "
        f"guaranteed, and the mean true coverage of prediction sets (required: {COVERAGE:.0%}).\n"
    )
    print(
        "| positive patients × images | proportion of positives | images as if independent | by patient | "
        "mean sensitivity by patient | guaranteed | set coverage, images as if independent | set coverage by patient |"
    )
    print("|" + " --- |" * 8)
    for condition in CONDITIONS:
        found = simulate(condition, sets=sets)
        print(
            f"| {condition} | {found.share_of_positives.kept:.3f} | {found.images_as_patients.kept:.3f} | "
            f"{found.by_patient.kept:.3f} | {found.by_patient.sensitivity:.3f} | {found.by_patient.guaranteed:.2f} | "
            f"{found.coverage_of_images_as_patients:.3f} | {found.coverage_by_patient:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
