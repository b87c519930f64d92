"""Coverage of the intervals and type I error of the tests, counted on simulated studies.

A study draws patients from a large made-up population whose true indices are known. Each patient has one class, one
or several images, and effects of its own on every class's logit, which make its images alike (ICC: the share of the
logit's variance that lies between patients).

    python benchmarks/coverage.py                      # 1,000 studies a condition
    python benchmarks/coverage.py --quick              # 200
    python benchmarks/coverage.py --output FILE.md     # writes the page, too
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.index_intervals import indices_of_predictions
from pylorus.evaluation.mcnemar import mcnemar
from pylorus.evaluation.paired import delong_test, paired_differences
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import clustered_wilson, proportions_of_predictions
from pylorus.evaluation.ranking import ranking_of_predictions

LOWEST, ASKED, MOST = 0.90, 0.93, 0.98
SHARPNESS = 1.5
"""Factor of the logits before the softmax: a model is surer than it should be."""


@dataclass(frozen=True)
class Condition:
    """A population and the size of a study.

    Attributes:
        patients: In each study.
        images: Of each patient: a number, `1-30` (uniform) or `skewed` (90 % have 1, 10 % have 30).
        shares: Of the classes, among patients.
        correlation: Share of the logits' variance that lies between patients.
        skill: Mean distance of the true class's logit from the others, in their standard deviations.
    """

    patients: int
    images: str
    shares: tuple[float, ...]
    correlation: float
    skill: float

    @property
    def name(self) -> str:
        """The condition in words."""
        rare = f"{100 * self.shares[0]:.0f} %"
        alike = f", ICC {self.correlation:g}" if self.correlation else ""
        level = {1.5: "mid", 3.0: "high", 4.4: "near perfect"}.get(self.skill, f"skill {self.skill:g}")
        return f"{self.patients}×{self.images}, {rare}{alike}, {level}"

    def draw_sizes(self, generator: np.random.Generator, patients: int) -> NDArray[np.int64]:
        """Draw how many images each patient has."""
        if self.images == "1-30":
            return generator.integers(1, 31, patients)
        if self.images == "skewed":
            return np.where(generator.random(patients) < 0.9, 1, 30)
        return np.full(patients, int(self.images))

    def draw(
        self, generator: np.random.Generator, *, patients: int | None = None, models: int = 1
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[NDArray[np.float64]]]:
        """Draw true classes, patients, and each model's probabilities; models share a part of the patients' effects."""
        count, classes = patients or self.patients, len(self.shares)
        group = np.repeat(np.arange(count), self.draw_sizes(generator, count))
        true = generator.choice(classes, count, p=self.shares)[group]
        common = 0.5 * generator.standard_normal((count, classes)) if models > 1 else np.zeros((count, classes))
        answers = []
        for _ in range(models):
            between = math.sqrt(self.correlation) * generator.standard_normal((count, classes))
            within = math.sqrt(1 - self.correlation) * generator.standard_normal((len(group), classes))
            logits = (common + between)[group] + within
            logits[np.arange(len(group)), true] += self.skill
            odds = np.exp(SHARPNESS * logits)
            answers.append(odds / odds.sum(axis=1, keepdims=True))
        return true, group, answers


THIRDS = (1 / 3, 1 / 3, 1 / 3)
FIVE, TWO = (0.05, 0.35, 0.6), (0.02, 0.38, 0.6)
MID, HIGH, PERFECT = 1.5, 3.0, 4.4
CONDITIONS = (
    Condition(50, "1", THIRDS, 0.0, MID),
    Condition(500, "1", THIRDS, 0.0, HIGH),
    Condition(50, "5", THIRDS, 0.5, MID),
    Condition(20, "1-30", THIRDS, 0.3, MID),
    Condition(100, "1-30", THIRDS, 0.7, MID),
    Condition(50, "skewed", THIRDS, 0.5, MID),
    Condition(500, "1", FIVE, 0.0, HIGH),
    Condition(500, "1", TWO, 0.0, MID),
    Condition(500, "1", TWO, 0.0, HIGH),
    Condition(200, "5", FIVE, 0.3, HIGH),
    Condition(200, "5", TWO, 0.3, MID),
    Condition(100, "1-30", FIVE, 0.7, MID),
    Condition(20, "1-30", FIVE, 0.3, MID),
    Condition(60, "1", THIRDS, 0.0, PERFECT),
)
PAIRED = (
    Condition(50, "5", THIRDS, 0.3, MID),
    Condition(20, "1-30", THIRDS, 0.6, MID),
    Condition(50, "skewed", THIRDS, 0.6, MID),
    Condition(50, "5", FIVE, 0.3, MID),
    Condition(50, "1-30", FIVE, 0.6, MID),
    Condition(20, "1-30", FIVE, 0.6, MID),
    Condition(10, "5", THIRDS, 0.3, MID),
    Condition(300, "1", THIRDS, 0.0, 2.0),
)
"""Those of the table of type I errors, and two more."""


def estimate_indices(
    true: NDArray[np.int64], group: NDArray[np.int64], chance: NDArray[np.float64]
) -> dict[str, Estimate]:
    """Estimate every index of one model on one study."""
    predicted, classes = chance.argmax(axis=1), chance.shape[1]
    shares = proportions_of_predictions(true, predicted, group, classes=classes)
    indices = indices_of_predictions(true, predicted, group, classes=classes)
    ranking = ranking_of_predictions(true, chance, group)
    return {
        "accuracy": shares.accuracy,
        "sensitivity 0": shares.sensitivity[0],
        "balanced acc.": indices.balanced_accuracy,
        "macro F1": indices.macro_f1,
        "kappa": indices.cohen_kappa,
        "MCC": indices.mcc,
        "macro AUROC": ranking.macro_auroc,
        "macro AP": ranking.macro_average_precision,
        "AUROC 0": ranking.auroc[0],
        "AP 0": ranking.average_precision[0],
        "precision 0": shares.precision[0],
        "F1 0": indices.f1[0],
        "macro precision": indices.macro_precision,
    }


POPULATION = 2_000_000
"""Images from which the true indices of a population are taken."""


@dataclass
class Count:
    """How often an interval held the truth, was missing, or a test rejected."""

    studies: int = 0
    held: int = 0
    missing: int = 0
    undefined: int = 0

    def add(self, estimate: Estimate, truth: float) -> None:
        """Count one study; one in which the index is undefined counts apart."""
        if not estimate.defined:
            self.undefined += 1
            return
        self.studies += 1
        self.missing += not estimate.has_interval
        self.held += estimate.low <= truth <= estimate.high

    @property
    def share(self) -> float:
        """Share of the studies in which the interval held the truth; NaN without studies."""
        return self.held / self.studies if self.studies else math.nan


def count_coverage(condition: Condition, studies: int, seed: int) -> dict[str, Count]:
    """Count how often the interval of each index holds the truth."""
    generator = np.random.default_rng([seed, CONDITIONS.index(condition)])
    patients = round(POPULATION / condition.draw_sizes(generator, 10_000).mean())
    true, group, (chance,) = condition.draw(generator, patients=patients)
    truth = {name: estimate.value for name, estimate in estimate_indices(true, group, chance).items()}
    counts = {name: Count() for name in truth}
    for _ in range(studies):
        true, group, (chance,) = condition.draw(generator)
        for name, estimate in estimate_indices(true, group, chance).items():
            counts[name].add(estimate, truth[name])
    return counts


def count_rejections(condition: Condition, studies: int, seed: int) -> tuple[dict[str, float], dict[str, Count]]:
    """Count rejections at 5 % of two models that are equally good, and the coverage of their differences."""
    generator = np.random.default_rng([seed, 100 + PAIRED.index(condition)])
    names = tuple(f"class {number}" for number in range(len(condition.shares)))
    tests = ("McNemar", "DeLong", "macro F1", "balanced acc.", "kappa", "MCC")
    rejected, valid = dict.fromkeys(tests, 0), dict.fromkeys(tests, 0)
    counts = {name: Count() for name in ("accuracy", *tests[1:])}
    for study in range(studies):
        true, group, chances = condition.draw(generator, models=2)
        sample = np.arange(len(true)).astype(str)
        pair = [Predictions(sample, group, true, chance, names) for chance in chances]
        differences = paired_differences(*pair, seed=study, resamples=1000)
        found = {
            "DeLong": delong_test(*pair, class_name=names[0]),
            "macro F1": differences.macro_f1,
            "balanced acc.": differences.balanced_accuracy,
            "kappa": differences.cohen_kappa,
            "MCC": differences.mcc,
        }
        p_values = {"McNemar": mcnemar(*pair).p_value} | {name: each.p_value for name, each in found.items()}
        for name, p_value in p_values.items():
            valid[name] += not math.isnan(p_value)
            rejected[name] += p_value < 0.05
        for name, estimate in {"accuracy": differences.accuracy, **found}.items():
            counts[name].add(estimate, 0.0)
    return {name: rejected[name] / valid[name] for name in tests}, counts


def count_wilson_coverage(patients: int, images: str, share: float, studies: int, seed: int) -> list[float]:
    """Count the coverage of a clustered proportion at each of the intraclass correlations of `CORRELATIONS`."""
    sizes = Condition(patients, images, THIRDS, 0.0, MID)
    found = []
    for correlation in CORRELATIONS:
        generator = np.random.default_rng([seed, patients, round(1000 * share), round(10 * correlation)])
        held = 0
        for _ in range(studies):
            count = sizes.draw_sizes(generator, patients)
            chance = np.full(patients, share)
            if correlation:
                strength = (1 - correlation) / correlation
                chance = generator.beta(share * strength, (1 - share) * strength, patients)
            group = np.repeat(np.arange(patients), count)
            estimate = clustered_wilson(generator.random(len(group)) < chance[group], group)
            held += estimate.low <= share <= estimate.high
        found.append(held / studies)
    return found


CORRELATIONS = (0.0, 0.1, 0.3, 0.6, 0.9)
PROPORTIONS = (
    (150, "10", 0.9),
    (150, "10", 0.99),
    (20, "1-30", 0.95),
    (150, "1-30", 0.99),
    (50, "skewed", 0.9),
    (500, "skewed", 0.99),
)
