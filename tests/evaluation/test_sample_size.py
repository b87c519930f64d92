"""The size of a test set: equal to the published formulas, and enough where the images of a patient resemble each other."""

import contextlib
import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from pylorus.evaluation import (
    Predictions,
    auroc,
    calibration_line,
    clustered_wilson,
    compute_binormal_log_odds,
    compute_design_effect,
    delong_test,
    measure_patient_design,
    measure_pilot,
    plan_auroc,
    plan_auroc_test,
    plan_calibration_slope,
    plan_observed_expected,
    plan_paired_auroc,
    plan_paired_difference,
    plan_proportion,
    plan_proportion_test,
    wilson,
)

SETS = 200


@pytest.mark.parametrize(
    ("value", "width", "images"),
    # Buderer (1996): half-widths of 0.05 and 0.10; Cochran's 385 for p = 0.5.
    [(0.9, 0.1, 139), (0.9, 0.2, 35), (0.5, 0.1, 385), (0.95, 0.1, 73)],
)
def test_a_proportion_needs_as_many_independent_images_as_the_formula_says(value, width, images):
    assert plan_proportion(value, width=width) == images
    assert plan_proportion(value, width=width, effect=compute_design_effect(5, 0.0)) == images


@pytest.mark.parametrize(("area", "prevalence", "width"), [(0.8, 0.018, 0.1), (0.75, 0.4, 0.05), (0.95, 0.2, 0.08)])
def test_an_auroc_needs_the_smallest_number_that_reaches_the_width(area, prevalence, width):
    def compute_width(n: int) -> float:
        slope = (n / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
        return 2 * 1.959964 * math.sqrt(area * (1 - area) * (1 + slope) / (n * n * prevalence * (1 - prevalence)))

    images = plan_auroc(area, prevalence=prevalence, width=width)
    assert compute_width(images) <= width < compute_width(images - 1)


@pytest.mark.parametrize(("area", "prevalence", "width"), [(0.8, 0.018, 0.1), (0.75, 0.4, 0.05), (0.95, 0.2, 0.08)])
def test_an_auroc_needs_as_many_images_as_pmvalsampsize_says(area, prevalence, width):
    package = pytest.importorskip("pmvalsampsize.pmvalsampsize")
    with contextlib.redirect_stdout(None):
        result = package.pmvalsampsize(
            type="b",
            prevalence=prevalence,
            cstatistic=area,
            cstatciwidth=width,
            lpnormal=(-2.0, 1.0),
            simobs=1000,
            noprint=True,
        )
    # It uses z = 1.96 instead of 1.959964, which may round to another image.
    assert plan_auroc(area, prevalence=prevalence, width=width) == pytest.approx(get_c_statistic_size(result), abs=1)


def get_c_statistic_size(result: dict[str, object]) -> int:
    return int(next(row[1] for row in result["results_table"] if str(row[0]).startswith("Criteria 3")))


@pytest.mark.parametrize(
    ("prevalence", "area", "log_odds", "widths"),
    [
        (0.3, 0.8, (-2.0, 1.0), (0.2, 0.2, 0.1)),
        (0.018, 0.8, (-5.0, 2.5), (0.2, 0.2, 0.1)),
        (0.3, 0.9, (-1.0, 2.0), (0.2, 0.2, 0.1)),
        (0.5, 0.75, (0.0, 1.0), (0.3, 0.4, 0.05)),
    ],
)
def test_calibration_needs_as_many_images_as_pmvalsampsize_says(prevalence, area, log_odds, widths):
    package = pytest.importorskip("pmvalsampsize.pmvalsampsize")
    with contextlib.redirect_stdout(None):
        result = package.pmvalsampsize(
            type="b",
            prevalence=prevalence,
            cstatistic=area,
            oeciwidth=widths[0],
            csciwidth=widths[1],
            cstatciwidth=widths[2],
            lpnormal=log_odds,
            noprint=True,
        )
    observed, slope, _ = (int(row[1]) for row in result["results_table"][:3])
    # It searches the standard error of observed/expected in steps of 0.0001, and simulates the log-odds.
    assert plan_observed_expected(prevalence, width=widths[0]) == pytest.approx(observed, rel=0.01, abs=1)
    drawn = np.random.default_rng(1).normal(*log_odds, 1_000_000)
    assert plan_calibration_slope(drawn, width=widths[1]) == pytest.approx(slope, rel=0.005)


def test_calibration_needs_as_many_images_as_pmvalsampsize_said():
    # Of pmvalsampsize 0.2.1 for a prevalence of 0.3 and log-odds from N(-2, 1).
    assert plan_observed_expected(0.3, width=0.2) == pytest.approx(898, rel=0.005)
    drawn = np.random.default_rng(1).normal(-2, 1, 1_000_000)
    assert plan_calibration_slope(drawn, width=0.2) == pytest.approx(4315, rel=0.005)


@pytest.mark.parametrize(("area", "prevalence", "width"), [(0.8, 0.3, 0.3), (0.9, 0.2, 0.4)])
def test_the_interval_of_a_planned_calibration_slope_is_as_wide_as_planned(area, prevalence, width):
    values, weights = compute_binormal_log_odds(area, prevalence=prevalence)
    images = plan_calibration_slope(values, weights=weights, width=width)
    generator, deviation = np.random.default_rng(6), math.sqrt(2) * ndtri(area)
    middle = math.log(prevalence / (1 - prevalence)) - deviation**2 / 2
    widths = []
    for _ in range(SETS):
        positive = generator.random(images) < prevalence
        odds = middle + deviation**2 * positive + deviation * generator.normal(size=images)
        slope = calibration_line(positive, 1 / (1 + np.exp(-odds))).slope
        widths.append(slope.high - slope.low)
    assert np.mean(widths) == pytest.approx(width, rel=0.05)


@pytest.mark.parametrize(
    ("area", "reference", "margin", "power"), [(0.9, 0.8, None, 0.8), (0.8, 0.7, None, 0.9), (0.9, 0.9, 0.05, 0.8)]
)
def test_a_planned_comparison_of_an_auroc_with_a_figure_has_its_power(area, reference, margin, power):
    images = plan_auroc_test(area, reference=reference, prevalence=0.3, margin=margin, power=power)
    generator, shown = np.random.default_rng(8), 0
    for _ in range(500):
        shown += auroc(*draw_scores(generator, area=area, **SINGLE, patients=images)).low > reference - (margin or 0)
    assert shown / 500 == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(("areas", "margin", "power"), [((0.9, 0.85), None, 0.8), ((0.9, 0.9), 0.05, 0.8)])
def test_a_planned_comparison_of_two_aurocs_has_its_power(areas, margin, power):
    generator = np.random.default_rng(9)

    def draw_pair(images: int) -> list[Predictions]:
        positive, alike = np.arange(images) < round(images * 0.3), generator.normal(size=images)
        names, pair = np.arange(images).astype(str), []
        for area in areas:
            own = math.sqrt(0.5) * (alike + generator.normal(size=images))
            score = ndtr(math.sqrt(2) * ndtri(area) * positive + own)
            pair.append(
                Predictions(names, names, np.where(positive, 0, 1), np.column_stack([score, 1 - score]), ("x", "y"))
            )
        return pair

    first, second = draw_pair(10_000)
    measured = measure_pilot(first, "x", second).areas
    assert measured[:2] == pytest.approx(areas, abs=0.02)
    images = plan_paired_auroc(*areas, correlation=measured[2], prevalence=0.3, margin=margin, power=power)
    shown = 0
    for _ in range(300):
        difference = delong_test(*draw_pair(images), class_name="x")
        if margin is None:
            shown += difference.p_value < 0.05
        else:  # the interval of a report is wider than this, DeLong's own
            shown += difference.value - 1.96 * difference.standard_error > -margin
    assert shown / 300 == pytest.approx(power, abs=0.05)


@pytest.mark.parametrize(
    ("value", "width", "images_per_patient", "icc"), [(0.9, 0.06, 3, 0.5), (0.8, 0.1, 5, 0.1), (0.85, 0.08, 8, 0.2)]
)
def test_the_interval_of_a_planned_sensitivity_is_as_wide_as_planned(value, width, images_per_patient, icc):
    effect = compute_design_effect(images_per_patient, icc)
    patients = math.ceil(plan_proportion(value, width=width, effect=effect) / images_per_patient)
    generator = np.random.default_rng(20)
    scale, groups = 1 / icc - 1, np.repeat(np.arange(patients), images_per_patient)
    widths = []
    for _ in range(SETS):
        own = generator.beta(value * scale, (1 - value) * scale, patients)  # the ICC of this distribution is exact
        estimate = clustered_wilson(generator.random(len(groups)) < own[groups], groups)
        widths.append(estimate.high - estimate.low)
    assert np.mean(widths) == pytest.approx(width, rel=0.05)


SINGLE = {"prevalence": 0.3, "images_per_patient": 1, "icc": 0.0}


def draw_scores(generator, *, area, prevalence, patients, images_per_patient, icc):
    """Draw binormal scores of patients of one class each, whose images resemble each other."""
    groups = np.repeat(np.arange(patients), images_per_patient)
    positive = (np.arange(patients) < round(patients * prevalence))[groups]
    own, rest = generator.normal(size=patients)[groups], generator.normal(size=len(groups))
    return positive, math.sqrt(2) * ndtri(area) * positive + math.sqrt(icc) * own + math.sqrt(1 - icc) * rest, groups


@pytest.mark.parametrize(
    ("area", "prevalence", "width", "images_per_patient", "icc"),
    [(0.8, 0.3, 0.1, 1, 0.0), (0.9, 0.2, 0.1, 1, 0.0), (0.8, 0.3, 0.1, 3, 0.3), (0.9, 0.3, 0.06, 4, 0.3)],
)
def test_the_interval_of_a_planned_auroc_is_as_wide_as_planned(area, prevalence, width, images_per_patient, icc):
    generator = np.random.default_rng(20)
    story = {"area": area, "prevalence": prevalence, "images_per_patient": images_per_patient, "icc": icc}
    positive, scores, groups = draw_scores(generator, patients=3000, **story)
    pilot = measure_pilot(
        Predictions(
            np.array([str(index) for index in range(len(groups))]),
            groups,
            np.where(positive, 0, 1),
            np.column_stack([ndtr(scores), 1 - ndtr(scores)]),
            ("x", "y"),
        ),
        "x",
    )
    effect = pilot.designs["auroc"].effect
    patients = math.ceil(plan_auroc(area, prevalence=prevalence, width=width, effect=effect) / images_per_patient)
    widths = []
    for _ in range(SETS):
        estimate = auroc(*draw_scores(generator, patients=patients, **story))
        widths.append(estimate.high - estimate.low)
    assert np.mean(widths) == pytest.approx(width, rel=0.05)


@pytest.mark.parametrize("icc", [0.1, 0.4, 0.8])
def test_the_correlation_of_a_pilot_is_found(icc):
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 8, 4000)
    own = generator.beta(0.8 * (1 / icc - 1), 0.2 * (1 / icc - 1), 4000)
    groups = np.repeat(np.arange(4000), sizes)
    design = measure_patient_design(generator.random(len(groups)) < own[groups], groups)
    assert design.correlation == pytest.approx(icc, abs=0.03)
    assert design.images_per_patient == pytest.approx(4, abs=0.1)
    assert design.variation == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("value", "icc", "patients"), [(0.8, 0.3, 60), (0.8, 0.05, 100), (0.9, 0.6, 100)])
def test_the_interval_of_the_correlation_covers_it(value, icc, patients):
    generator, scale, covered = np.random.default_rng(2), 1 / icc - 1, 0
    groups = np.repeat(np.arange(patients), 3)
    for _ in range(400):
        own = generator.beta(value * scale, (1 - value) * scale, patients)
        design = measure_patient_design(generator.random(len(groups)) < own[groups], groups)
        covered += design.low <= icc <= design.high
    assert covered / 400 >= 0.91


@pytest.mark.parametrize("icc", [0.3, 0.6])
def test_the_interval_of_the_correlation_covers_it_where_a_pilot_has_few_errors(icc):
    generator, scale, covered = np.random.default_rng(7), 1 / icc - 1, 0
    groups = np.repeat(np.arange(30), 3)
    for _ in range(150):
        own = generator.beta(0.95 * scale, 0.05 * scale, 30)
        design = measure_patient_design(generator.random(len(groups)) < own[groups], groups)
        covered += design.low <= icc <= design.high
    assert covered / 150 >= 0.9


def test_a_pilot_without_variation_counts_images_of_a_patient_as_copies():
    design = measure_patient_design(np.ones(6, dtype=bool), np.repeat([1, 2, 3], 2))
    assert (design.correlation, design.effect) == (1.0, 2.0)


def test_a_planned_comparison_of_two_models_has_its_power():
    images = plan_paired_difference(0.10, 0.05, power=0.8)
    counts = np.random.default_rng(3).multinomial(images, [0.10, 0.05, 0.85], size=20_000)
    statistic = np.abs(counts[:, 0] - counts[:, 1]) / np.sqrt(counts[:, 0] + counts[:, 1])
    assert np.mean(statistic > 1.96) == pytest.approx(0.8, abs=0.02)


def test_a_planned_test_of_non_inferiority_has_its_power():
    images = plan_paired_difference(0.06, 0.06, margin=0.05, power=0.9)
    counts = np.random.default_rng(4).multinomial(images, [0.06, 0.06, 0.88], size=20_000) / images
    lead = counts[:, 0] - counts[:, 1]
    error = np.sqrt((counts[:, 0] + counts[:, 1] - lead**2) / images)
    assert np.mean(lead - 1.96 * error > -0.05) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("value", "margin", "power"), [(0.9, 0.05, 0.8), (0.85, 0.1, 0.9)])
def test_a_planned_proportion_is_shown_to_be_no_worse_by_the_interval_of_a_report(value, margin, power):
    images = plan_proportion_test(value, reference=value, margin=margin, power=power)
    found = np.random.default_rng(5).binomial(images, value, size=20_000)
    low = {int(count): wilson(int(count), images).low for count in np.unique(found)}
    assert np.mean([low[count] > value - margin for count in found.tolist()]) == pytest.approx(power, abs=0.05)


def test_a_planned_comparison_with_a_figure_has_its_power():
    images = plan_proportion_test(0.9, reference=0.8, power=0.8)
    found = np.random.default_rng(5).binomial(images, 0.9, size=20_000) / images
    assert np.mean(np.abs(found - 0.8) > 1.96 * math.sqrt(0.16 / images)) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_proportion(1.0, width=0.1), "the proportion is 1"),
        (lambda: plan_proportion(0.9, width=1.5), "the width is 1.5"),
        (lambda: plan_proportion(0.9, width=1e-6), "more than"),
        (lambda: plan_auroc(0.4, prevalence=0.2, width=0.1), "the area is 0.4"),
        (lambda: plan_paired_difference(0.1, 0.1), "two fractions that differ"),
        (lambda: plan_paired_difference(0.05, 0.1, margin=0.05), "worse by the margin"),
        (lambda: plan_paired_difference(0.7, 0.6), "a sum in"),
        (lambda: plan_proportion_test(0.8, reference=0.9, margin=0.05), "worse than 0.9"),
        (lambda: plan_proportion_test(0.9, reference=0.04, margin=0.05), "every proportion is no worse"),
        (lambda: compute_design_effect(0.5, 0.1), "0.5 images per patient"),
        (lambda: measure_patient_design(np.ones(3, dtype=bool), np.zeros(3, dtype=int)), "at least two"),
    ],
)
def test_what_cannot_be_planned_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
