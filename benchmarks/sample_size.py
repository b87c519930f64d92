"""Measure whether the sizes of `pylorus plan` give the width, the power and the coverage that were planned.

Draws test sets of the planned size from populations whose true values are known, evaluates each as a report does, and
prints one Markdown table each: widths and coverage of intervals, power of comparisons, and coverage of the interval of
the correlation within patients. Takes about four minutes on one core.

    python benchmarks/sample_size.py --sets 300
"""

import argparse
import math
import time
from collections.abc import Iterator

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from pylorus.evaluation import Predictions, auroc, clustered_wilson, delong_test
from pylorus.evaluation.comparison import mcnemar, paired_share_difference
from pylorus.evaluation.discrimination import compute_area_covariance, compute_structural_components
from pylorus.evaluation.pilot import compute_design_effect, measure_patient_design
from pylorus.evaluation.sample_size import (
    plan_auroc,
    plan_auroc_test,
    plan_paired_auroc,
    plan_paired_difference,
    plan_proportion,
    plan_proportion_test,
)

Row = tuple[str, int, float, float]


def draw_correct(
    generator: Generator, value: float, patients: int, images: int, icc: float
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Draw whether images are classified correctly, of patients that differ by a beta distribution."""
    groups = np.repeat(np.arange(patients), images)
    if icc == 0:
        return generator.random(len(groups)) < value, groups
    scale = 1 / icc - 1
    own = generator.beta(value * scale, (1 - value) * scale, patients)
    return generator.random(len(groups)) < own[groups], groups


def draw_scores(
    generator: Generator, areas: tuple[float, ...], images: int, prevalence: float, correlation: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Draw normal scores of models for the same images, whose correlation is that within each class."""
    positive = np.arange(images) < round(images * prevalence)
    shared, own = generator.normal(size=images), generator.normal(size=(len(areas), images))
    scores = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return positive, scores + np.sqrt(2) * np.array([ndtri(area) for area in areas])[:, None] * positive


def build_predictions(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> Predictions:
    """Build the predictions of a model for two classes."""
    names = np.arange(len(positive)).astype(str)
    probability = ndtr(scores)
    return Predictions(
        names, names, np.where(positive, 0, 1), np.column_stack([probability, 1 - probability]), ("x", "y")
    )


def measure_widths(sets: int) -> Iterator[tuple[str, int, float, float, float]]:
    """Yield case, size, planned width, mean width and coverage of intervals."""
    for value, width, images, icc in (
        (0.9, 0.1, 1, 0.0),
        (0.9, 0.06, 3, 0.5),
        (0.8, 0.1, 5, 0.1),
        (0.85, 0.08, 8, 0.2),
    ):
        generator, effect = np.random.default_rng(1), compute_design_effect(images, icc)
        patients = math.ceil(plan_proportion(value, width=width, effect=effect) / images)
        estimates = [clustered_wilson(*draw_correct(generator, value, patients, images, icc)) for _ in range(sets)]
        case = f"sensitivity {value:g}, {images} images per patient, ICC {icc:g}"
        yield (case, patients * images, width, *_summarize(estimates, value))
    for area, width, prevalence in ((0.8, 0.1, 0.3), (0.9, 0.1, 0.1), (0.9, 0.06, 0.3), (0.95, 0.04, 0.3)):
        generator, size = np.random.default_rng(2), plan_auroc(area, prevalence=prevalence, width=width)
        estimates = []
        for _ in range(sets):
            positive, scores = draw_scores(generator, (area,), size, prevalence, 0.0)
            estimates.append(auroc(positive, scores[0]))
        yield (f"AUROC {area:g}, {100 * prevalence:g} % of the class", size, width, *_summarize(estimates, area))


def _summarize(estimates: list, true: float) -> tuple[float, float]:
    widths = [each.high - each.low for each in estimates]
    return float(np.mean(widths)), float(np.mean([each.low <= true <= each.high for each in estimates]))


def measure_power(sets: int) -> Iterator[Row]:
    """Yield case, size, planned power and simulated power of the tests of a report."""
    yield from _measure_proportions(sets)
    yield from _measure_areas(sets)
    yield from _measure_paired_areas(sets)


def _measure_proportions(sets: int) -> Iterator[Row]:
    for value, reference, margin, power in (
        (0.9, 0.8, None, 0.8),
        (0.95, 0.9, None, 0.9),
        (0.9, 0.9, 0.05, 0.8),
        (0.85, 0.85, 0.1, 0.9),
    ):
        generator = np.random.default_rng(3)
        size = plan_proportion_test(value, reference=reference, margin=margin, power=power)
        shown = 0
        for _ in range(sets):
            estimate = clustered_wilson(draw_correct(generator, value, size, 1, 0.0)[0], None)
            shown += estimate.low > reference - (margin or 0) or (margin is None and estimate.high < reference)
        yield _describe("sensitivity", value, reference, margin), size, power, shown / sets
    for first, second, margin, power in ((0.1, 0.05, None, 0.8), (0.08, 0.02, None, 0.9), (0.05, 0.05, 0.05, 0.8)):
        generator = np.random.default_rng(4)
        size = plan_paired_difference(first, second, margin=margin, power=power)
        shown = 0
        for _ in range(sets):
            kind = generator.choice(3, size, p=(first, second, 1 - first - second))
            one, two = kind != 1, kind != 0
            names = np.arange(size).astype(str)
            if margin is None:
                tables = [
                    Predictions(names, names, np.zeros(size, int), np.column_stack([each, ~each]) * 1.0, ("x", "y"))
                    for each in (one, two)
                ]
                shown += mcnemar(*tables).p_value < 0.05
            else:
                shown += paired_share_difference(one, two, names).low > -margin
        goal = "differ in accuracy" if margin is None else f"are not worse by {margin:g}"
        yield f"two models {goal}, only one correct: {first:g}, {second:g}", size, power, shown / sets


def _measure_areas(sets: int) -> Iterator[Row]:
    for area, reference, margin in (
        (0.75, 0.5, None),
        (0.8, 0.7, None),
        (0.9, 0.8, None),
        (0.95, 0.9, None),
        (0.9, 0.9, 0.05),
        (0.95, 0.95, 0.03),
    ):
        for prevalence, power in ((0.1, 0.8), (0.3, 0.9)):
            generator = np.random.default_rng(5)
            size = plan_auroc_test(area, reference=reference, prevalence=prevalence, margin=margin, power=power)
            shown = 0
            for _ in range(sets):
                positive, scores = draw_scores(generator, (area,), size, prevalence, 0.0)
                estimate = auroc(positive, scores[0])
                shown += estimate.low > reference - (margin or 0) or (margin is None and estimate.high < reference)
            case = f"{_describe('AUROC', area, reference, margin)}, {100 * prevalence:g} % of the class"
            yield case, size, power, shown / sets


def _measure_paired_areas(sets: int) -> Iterator[Row]:
    for areas, margin in (
        ((0.75, 0.501), None),
        ((0.8, 0.7), None),
        ((0.9, 0.85), None),
        ((0.95, 0.85), None),
        ((0.8, 0.8), 0.1),
        ((0.9, 0.9), 0.05),
        ((0.95, 0.95), 0.03),
    ):
        for prevalence, correlation, power in ((0.1, 0.3, 0.9), (0.3, 0.6, 0.8)):
            if margin is not None and prevalence < 0.2:
                prevalence = 0.2
            generator = np.random.default_rng(6)
            positive, scores = draw_scores(generator, areas, 20_000, prevalence, correlation)
            covariance = compute_area_covariance(compute_structural_components(positive, list(scores), None))
            r = float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
            size = plan_paired_auroc(*areas, correlation=r, prevalence=prevalence, margin=margin, power=power)
            shown = 0
            for _ in range(sets):
                positive, scores = draw_scores(generator, areas, size, prevalence, correlation)
                difference = delong_test(*(build_predictions(positive, each) for each in scores), class_name="x")
                shown += difference.p_value < 0.05 if margin is None else difference.low > -margin
            goal = "differ" if margin is None else f"not worse by {margin:g}"
            case = f"AUROCs {areas[0]:g} and {areas[1]:g} {goal}, {100 * prevalence:g} % of the class, r = {r:.2f}"
            yield case, size, power, shown / sets


def _describe(name: str, value: float, reference: float, margin: float | None) -> str:
    goal = "other than" if margin is None else "not below"
    return f"{name} {value:g} {goal} {reference:g}{f' by {margin:g}' if margin else ''}"


def measure_correlations(sets: int) -> Iterator[tuple[str, int, float]]:
    """Yield case, patients and coverage of the interval of the correlation within patients."""
    for value in (0.8, 0.9, 0.95):
        for patients in (30, 60, 100):
            for icc in (0.1, 0.3, 0.6):
                generator, covered = np.random.default_rng(7), 0
                for _ in range(sets):
                    design = measure_patient_design(*draw_correct(generator, value, patients, 3, icc))
                    covered += design.low <= icc <= design.high
                yield f"sensitivity {value:g}, ICC {icc:g}, 3 images per patient", patients, covered / sets


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", type=int, default=300, help="simulated test sets in each case (default: 300)")
    sets, start = parser.parse_args().sets, time.perf_counter()
    print("| interval | images | planned width | mean width / planned | coverage, % |\n| --- | --: | --: | --: | --: |")
    for case, size, width, mean, coverage in measure_widths(sets):
        print(f"| {case} | {size:,} | {width:g} | {mean / width:.2f} | {100 * coverage:.1f} |", flush=True)
    print("\n| to show | images | planned power, % | simulated, % |\n| --- | --: | --: | --: |")
    for case, size, power, simulated in measure_power(sets):
        print(f"| {case} | {size:,} | {100 * power:g} | {100 * simulated:.1f} |", flush=True)
    print("\n| pilot | patients | coverage of the ICC's interval, % |\n| --- | --: | --: |")
    for case, patients, coverage in measure_correlations(max(100, sets // 2)):
        print(f"| {case} | {patients} | {100 * coverage:.1f} |", flush=True)
    print(f"\n{sets} simulated sets in each case, half as many pilots; {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
