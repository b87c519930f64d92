"""Measure the coverage of the intervals and the type I error of the tests on simulated studies.

A study draws patients from a large simulated population whose true indices are known. Each patient has one class, one
or several images, and effects of its own on the logit of each class, which make its images similar (ICC: the fraction
of the logit's variance that lies between patients).

    python benchmarks/coverage.py                      # 1,000 studies per condition
    python benchmarks/coverage.py --quick              # 200
    python benchmarks/coverage.py --output FILE.md     # also writes the page
"""

import argparse
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation import (
    Estimate,
    Predictions,
    area_under_risk_coverage,
    calibration_line,
    clustered_wilson,
    delong_test,
    estimate_calibration,
    indices_of_predictions,
    paired_differences,
    proportions_of_predictions,
    ranking_of_predictions,
)
from pylorus.evaluation.comparison import mcnemar
from pylorus.evaluation.decisions import net_benefit

LOWEST, ASKED, MOST = 0.90, 0.93, 0.98
SHARPNESS = 1.5
"""Factor of the logits before the softmax, which makes the simulated models overconfident."""


@dataclass(frozen=True)
class Condition:
    """A population and the size of a study.

    Attributes:
        patients: Number of patients in each study.
        images: Number of images of each patient: a number, `1-30` (uniform) or `skewed` (90 % have 1, 10 % have 30).
        shares: Proportions of the classes among patients.
        correlation: Fraction of the logits' variance that lies between patients.
        skill: Mean distance of the true class's logit from the others, in their standard deviations.
    """

    patients: int
    images: str
    shares: tuple[float, ...]
    correlation: float
    skill: float

    @property
    def name(self) -> str:
        """A short description of the condition."""
        rare = f"{100 * self.shares[0]:.0f} %"
        alike = f", ICC {self.correlation:g}" if self.correlation else ""
        level = {1.5: "mid", 3.0: "high", 4.6: "near perfect"}.get(self.skill, f"skill {self.skill:g}")
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
MID, HIGH, PERFECT = 1.5, 3.0, 4.6
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
"""Conditions of the table of type I errors."""


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
        **_estimate_further(true, group, chance, shares.precision[0], indices.f1[0], indices.macro_precision),
    }


MEASURED = 10
"""How many of the indices stand in the tables that asked for this benchmark; the others are ours."""
BENEFIT_AT = 0.2
"""Threshold probability of the net benefit."""


def _estimate_further(
    true: NDArray[np.int64],
    group: NDArray[np.int64],
    chance: NDArray[np.float64],
    *shares: Estimate,
) -> dict[str, Estimate]:
    scores = estimate_calibration(chance, true, group)
    line = calibration_line(true == 0, chance[:, 0], group)
    curve = net_benefit(true == 0, chance[:, 0], group, thresholds=np.array([BENEFIT_AT]))
    return {
        "precision 0": shares[0],
        "F1 0": shares[1],
        "macro precision": shares[2],
        "ECE": scores.ece,
        "Brier": scores.brier,
        "NLL": scores.nll,
        "AURC": area_under_risk_coverage(chance.argmax(axis=1) == true, chance.max(axis=1), group),
        "slope 0": line.slope,
        "intercept 0": line.intercept,
        "net benefit 0": Estimate(float(curve.model[0]), float(curve.low[0]), float(curve.high[0])),
    }


POPULATION = 1_000_000
"""Images from which the true indices of a population are taken."""


@dataclass
class Count:
    """How often an interval contained the true value or was missing, and how often the index was undefined."""

    studies: int = 0
    held: int = 0
    missing: int = 0
    undefined: int = 0

    def add(self, estimate: Estimate, truth: float) -> None:
        """Count one study; studies in which the index is undefined are counted separately."""
        if not estimate.defined:
            self.undefined += 1
            return
        self.studies += 1
        self.missing += not estimate.has_interval
        self.held += estimate.low <= truth <= estimate.high

    @property
    def share(self) -> float:
        """Fraction of the studies in which the interval contained the true value; NaN without studies."""
        return self.held / self.studies if self.studies else math.nan


def count_coverage(condition: Condition, studies: int, seed: int) -> dict[str, Count]:
    """Count how often the interval of each index contains the true value."""
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
    return {name: rejected[name] / max(valid[name], 1) for name in tests}, counts


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


@dataclass(frozen=True)
class Table:
    """A table of proportions.

    Attributes:
        title: Its title.
        columns: Headings of the columns after the first.
        rows: The text of the first column and the cells of each row.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def format(self) -> str:
        """Write the table in Markdown."""
        head = ["condition", *self.columns]
        lines = [" | ".join(head), " | ".join(["---"] * len(head))]
        lines += [" | ".join([name, *cells]) for name, cells in self.rows]
        return f"## {self.title}\n\n" + "\n".join(f"| {line} |" for line in lines)


def mark_coverage(count: Count, studies: int) -> str:
    """Format a coverage, bold if below 0.90, with the percentages of studies without an interval or a value."""
    text = f"{count.share:.3f}".removeprefix("0")
    text = f"**{text}**" if count.share < LOWEST else text
    missing = f", {100 * count.missing / count.studies:.0f} % missing" if count.missing else ""
    absent = f" ({100 * count.undefined / studies:.0f} % undefined)" if count.undefined / studies >= 0.005 else ""
    return text + missing + absent


def judge_coverage(shares: list[float]) -> str:
    """Return a sentence that says in how many cells the coverage is as required."""
    inside = sum(ASKED <= share <= MOST for share in shares)
    below = sum(share < ASKED for share in shares)
    return (
        f"{len(shares)} cells: {inside} ({100 * inside / len(shares):.1f} %) cover {ASKED:.2f} to {MOST:.2f}, "
        f"{below} less, {len(shares) - inside - below} more; the lowest is {min(shares):.3f}, and "
        f"{sum(share < LOWEST for share in shares)} are below {LOWEST:.2f}."
    )


def run(studies: int, seed: int, workers: int) -> str:
    """Run all simulations and return the page."""
    start = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        covered = [pool.submit(count_coverage, condition, studies, seed) for condition in CONDITIONS]
        tested = [pool.submit(count_rejections, condition, studies, seed) for condition in PAIRED]
        clustered = [pool.submit(count_wilson_coverage, *row, studies, seed) for row in PROPORTIONS]
        counts = [each.result() for each in covered]
        pairs = [each.result() for each in tested]
        wilson = [each.result() for each in clustered]
    names = tuple(counts[0])
    cells = [[count[name] for name in names] for count in counts]
    tables = [
        Table(
            f"Coverage of 95 % intervals{title}",
            names[part],
            tuple(
                (condition.name, tuple(mark_coverage(each, studies) for each in row[part]))
                for condition, row in zip(CONDITIONS, cells, strict=True)
            ),
        )
        for title, part in (("", slice(0, MEASURED)), (", further indices", slice(MEASURED, None)))
    ]
    tables.append(
        Table(
            "Coverage of clustered proportions, by intraclass correlation",
            tuple(f"ICC {each:g}" for each in CORRELATIONS),
            tuple(
                (f"{patients}×{images}, p {share:g}", tuple(f"{each:.3f}".removeprefix("0") for each in row))
                for (patients, images, share), row in zip(PROPORTIONS, wilson, strict=True)
            ),
        )
    )
    tests = tuple(pairs[0][0])
    tables.append(
        Table(
            "Type I error at 5 % of two equally good models",
            tests,
            tuple(
                (
                    condition.name,
                    tuple(f"**{errors[t]:.3f}**" if errors[t] > 0.07 else f"{errors[t]:.3f}" for t in tests),
                )
                for condition, (errors, _) in zip(PAIRED, pairs, strict=True)
            ),
        )
    )
    tables.append(
        Table(
            "Coverage of 95 % intervals of differences",
            tuple(pairs[0][1]),
            tuple(
                (condition.name, tuple(mark_coverage(each, studies) for each in counted.values()))
                for condition, (_, counted) in zip(PAIRED, pairs, strict=True)
            ),
        )
    )
    main = [each.share for row in cells for each in row[:MEASURED]] + [each for row in wilson for each in row]
    further = [each.share for row in cells for each in row[MEASURED:]]
    missing = sum(each.missing for row in cells for each in row)
    errors = [value for found, _ in pairs for value in found.values()]
    return "\n\n".join(
        [
            "# Coverage and type I error",
            f"`python benchmarks/coverage.py`: {studies:,} studies per condition, seed {seed}, "
            f"{(time.monotonic() - start) / 60:.0f} minutes with {workers} processes. The standard error of a "
            f"proportion near 0.95 is {100 * math.sqrt(0.95 * 0.05 / studies):.1f} points. Conditions: "
            "patients × images of each, proportion of the rare class, intraclass correlation of the logits, skill. "
            "Bold: below 0.90 or above 0.07.",
            f"Indices of the first table and clustered proportions: {judge_coverage(main)}",
            f"Further indices: {judge_coverage(further)}",
            f"Intervals missing where the index is defined: {missing:,} of "
            f"{sum(each.studies for row in cells for each in row):,}.",
            f"Type I error: at most {max(errors):.3f}; {sum(error > 0.07 for error in errors)} of {len(errors)} cells "
            "above 0.07.",
            *(table.format() for table in tables),
        ]
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="200 studies per condition instead of 1,000")
    parser.add_argument("--studies", type=int, help="studies per condition")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the studies (default: 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--output", type=Path, help="also write the page to this file")
    given = parser.parse_args()
    page = run(given.studies or (200 if given.quick else 1000), given.seed, given.workers)
    print(page)
    if given.output is not None:
        given.output.write_text(page + "\n")


if __name__ == "__main__":
    main()
