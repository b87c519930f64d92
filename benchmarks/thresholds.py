"""How often thresholds and prediction sets keep what they promise for new patients, simulated; prints Markdown.

    python benchmarks/thresholds.py           # 2,000 validation sets a condition
    python benchmarks/thresholds.py --quick   # 300

Scores of the positives are standard normal, so that the true sensitivity at any threshold is known. Images of one
patient are alike in one of two ways: `normal`, a patient's effect and an image's add up, or `copies`, an image has its
patient's score with such a chance that indicators at any threshold have the given intra-patient correlation (ICC).
"hard" gives the tenth of the patients with the lowest effects 30 images each: then images are not recognised as often
as patients, and the guarantee is by patient.
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

from pylorus.evaluation.conformal import fit_set_limits
from pylorus.evaluation.decisions import threshold_at_sensitivity

SENSITIVITY, CONFIDENCE, COVERAGE, SETS, SEED = 0.95, 0.90, 0.90, 2000, 20261126


@dataclass(frozen=True)
class Condition:
    """Positive patients of a validation set, how many images they have, and how alike these are."""

    patients: int
    images: str = "1"
    icc: float = 0.0
    alike: str = "normal"

    def __str__(self) -> str:
        return f"{self.patients} × {self.images}, ICC {self.icc:g}" + (f" {self.alike}" if self.icc else "")

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores and patients."""
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
    """What became of one rule over all sets of a condition.

    Attributes:
        kept: Share of the sets in which the true sensitivity is at least the one asked for.
        sensitivity: Mean of the true sensitivities.
        guaranteed: Share of the sets for which the rule says that it is guaranteed.
    """

    kept: float
    sensitivity: float
    guaranteed: float


@dataclass(frozen=True)
class Simulated:
    """All rules under one condition; coverage is that of the true class by prediction sets, a mean over the sets."""

    condition: Condition
    share_of_positives: Outcome
    images_as_patients: Outcome
    by_patient: Outcome
    coverage_of_images_as_patients: float
    coverage_by_patient: float


def simulate(condition: Condition, *, sets: int = SETS, seed: int = SEED) -> Simulated:
    """Draws validation sets, fixes a threshold on each in three ways, and compares with the known truth."""
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
            chance = special.ndtr(scores)  # also a probability: uniform, so that 1 - limit is what is covered
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
    """The share of images of a new patient with a score of at least a threshold, each patient counting the same."""
    return lambda thresholds: special.ndtr(-thresholds)


def _outcome(fixed: list[tuple[float, bool]], truth: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Outcome:
    reached = truth(np.array([threshold for threshold, _ in fixed]))
    return Outcome(
        kept=float((reached >= SENSITIVITY).mean()),
        sensitivity=float(reached.mean()),
        guaranteed=float(np.mean([guaranteed for _, guaranteed in fixed])),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="300 validation sets a condition instead of 2,000")
    sets = 300 if parser.parse_args().quick else SETS
    print(
        f"Share of {sets:,} validation sets whose threshold has a true sensitivity of {SENSITIVITY:.0%} or more "
        f"(asked for: {CONFIDENCE:.0%} of them), the mean true sensitivity, the share of sets for which that is "
        f"said to be guaranteed; and the mean true coverage of prediction sets ({COVERAGE:.0%} asked for).\n"
    )
    print(
        "| positive patients × images | share of the positives | images as if independent | by patient | "
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
