"""How many images a test set needs: for an interval of a given width, or to show a difference or non-inferiority.

The formulas are those of the cited papers, for independent images. Images that come in groups (patients) need more: the
argument `effect` multiplies the number by a design effect, from `compute_design_effect`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pylorus.evaluation.auroc import compute_placements
from pylorus.evaluation.comparison import mcnemar
from pylorus.evaluation.influence import estimate_design_effect
from pylorus.evaluation.intervals import check_confidence, compute_quantile
from pylorus.evaluation.predictions import Predictions, align_predictions, encode_groups

MAX_IMAGES = 10**9
"""Larger numbers are refused as impossible."""
MIN_DISTANCE = 1e-12
"""A smaller distance from the margin is a rounding error."""


@dataclass(frozen=True)
class PatientDesign:
    """How images come in patients.

    Attributes:
        images_per_patient: Mean number of images of a patient, >= 1.
        variation: Standard deviation of that number over its mean, >= 0.
        correlation: Intraclass correlation among the images of a patient, in [0, 1].
    """

    images_per_patient: float = 1.0
    variation: float = 0.0
    correlation: float = 0.0

    @property
    def effect(self) -> float:
        """Factor by which the number of images grows; see `compute_design_effect`."""
        return compute_design_effect(self.images_per_patient, self.correlation, variation=self.variation)


def compute_design_effect(images_per_patient: float, correlation: float, *, variation: float = 0.0) -> float:
    """Compute the factor by which images of the same patients must be more than independent ones.

    1 + ((1 + cv²) m - 1) ICC for m images per patient on average, with coefficient of variation cv (Eldridge, Ashby and
    Kerry, Int J Epidemiol 2006;35:1292).

    Args:
        images_per_patient: Mean number of images per patient, >= 1.
        correlation: Intraclass correlation, in [0, 1].
        variation: Standard deviation of the number of images per patient over its mean, >= 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> compute_design_effect(5, 0.25), compute_design_effect(5, 0.0), compute_design_effect(1, 1.0)
        (2.0, 1.0, 1.0)
    """
    if not (1 <= images_per_patient < math.inf and 0 <= correlation <= 1 and 0 <= variation < math.inf):
        raise ValueError(
            f"found {images_per_patient:g} images per patient, a correlation of {correlation:g} and a variation of "
            f"{variation:g}; expected at least 1, a number in [0, 1], and at least 0"
        )
    return 1 + ((1 + variation**2) * images_per_patient - 1) * correlation


def measure_patient_design(values: NDArray[np.generic], groups: NDArray[np.generic] | None) -> PatientDesign:
    """Measure images per patient and the correlation within patients, on the predictions of a pilot run.

    The correlation is that of a one-way analysis of variance (Fleiss 2003, 15.2), at least 0. If the values do not vary
    it is unknown, and 1: images of a patient then count as copies of one another, as in `clustered_wilson`.

    Args:
        values: Value of each image, of shape (n,), such as whether it is classified correctly.
        groups: Patient of each image, of shape (n,), or None if each image is its own.

    Raises:
        ValueError: If there are fewer than two patients, or a value is NaN or infinite.

    Example:
        >>> correct = np.array([True, True, False, False])
        >>> measure_patient_design(correct, np.array(["a", "a", "b", "b"])).correlation
        1.0
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"values have shape {numbers.shape}; expected (n,), all finite")
    codes = encode_groups(groups, length=len(numbers))
    sizes = np.bincount(codes).astype(np.float64)
    if len(sizes) < 2:
        raise ValueError(f"found {len(sizes)} patient; expected at least two, to see how much patients differ")
    mean, typical = float(sizes.mean()), float((sizes**2).sum() / sizes.sum())
    deviations = numbers - numbers.mean()
    spread = float((deviations**2).sum())
    if typical == 1:
        correlation = 0.0
    elif not spread > 1e-12 * len(numbers):
        correlation = 1.0
    else:
        effect = estimate_design_effect(np.bincount(codes, weights=deviations).astype(np.float64), sizes, spread)
        correlation = (effect - 1) / (typical - 1)
    return PatientDesign(mean, float(sizes.std() / mean), min(1.0, max(0.0, correlation)))


@dataclass(frozen=True)
class PilotMeasures:
    """What the predictions of a pilot run say about a class, for the size of the next test set.

    Attributes:
        images: Number of images.
        patients: Number of patients.
        prevalence: Fraction of images of the class, in (0, 1).
        values: Sensitivity, specificity and AUROC, by these names in lower case.
        designs: How images come in patients, for `sensitivity` (images of the class), `specificity` (the others),
            `auroc` and `accuracy` (all), and `difference` (all) if there is a second model; without those for which
            only one patient has images.
        disagreement: Fractions of images that only the first and only the second model classifies correctly, or None.
    """

    images: int
    patients: int
    prevalence: float
    values: Mapping[str, float]
    designs: Mapping[str, PatientDesign]
    disagreement: tuple[float, float] | None


def measure_pilot(predictions: Predictions, class_name: str, other: Predictions | None = None) -> PilotMeasures:
    """Measure the figures of a class and how much the images of a patient resemble each other.

    For AUROC the correlation is that of the influence of each image on the area (DeLong's placements).

    Args:
        predictions: Test predictions of the pilot run.
        class_name: The class of interest.
        other: Those of a second model for the same images, to be compared with.

    Raises:
        ValueError: If there is no such class, all images or none are of it, or the second model has predictions for
            other images.

    Example:
        >>> names, truth = np.array(list("abcdef")), np.array([0, 0, 0, 0, 1, 1])
        >>> patients = np.array(["p", "p", "q", "q", "r", "s"])
        >>> probabilities = np.eye(2)[[0, 0, 1, 1, 1, 0]]
        >>> pilot = measure_pilot(Predictions(names, patients, truth, probabilities, ("x", "y")), "x")
        >>> pilot.values["sensitivity"], pilot.designs["sensitivity"].correlation
        (0.5, 1.0)
    """
    if class_name not in predictions.class_names:
        raise ValueError(f'no class "{class_name}"; expected one of {list(predictions.class_names)}')
    label = predictions.class_names.index(class_name)
    positive, predicted = predictions.true == label, predictions.predicted == label
    if positive.all() or not positive.any():
        raise ValueError(
            f"{int(positive.sum())} of {len(positive)} images are of class {class_name}; expected some of it and some "
            "of others"
        )
    groups, prevalence = np.asarray(predictions.group), float(positive.mean())
    placements = compute_placements(positive, predictions.probabilities[:, label])
    area = float(placements[positive].mean())
    values = {
        "sensitivity": (predicted[positive], groups[positive]),
        "specificity": (~predicted[~positive], groups[~positive]),
        "auroc": ((placements - area) / np.where(positive, prevalence, 1 - prevalence), groups),
        "accuracy": (predictions.correct, groups),
    }
    disagreement = None
    if other is not None:
        other, counts = align_predictions(predictions, other), mcnemar(predictions, other)
        disagreement = (counts.only_first / counts.images, counts.only_second / counts.images)
        values["difference"] = (predictions.correct.astype(np.int64) - other.correct.astype(np.int64), groups)
    designs = {
        name: measure_patient_design(numbers, patients)
        for name, (numbers, patients) in values.items()
        if len(np.unique(patients)) > 1
    }
    figures = {name: float(values[name][0].mean()) for name in ("sensitivity", "specificity")}
    patients_in_all = len(np.unique(groups))
    return PilotMeasures(len(groups), patients_in_all, prevalence, figures | {"auroc": area}, designs, disagreement)


def plan_proportion(value: float, *, width: float, confidence: float = 0.95, effect: float = 1.0) -> int:
    """Compute the number of images for an interval of a proportion, such as a sensitivity (Buderer 1996).

    n = 4 z² p (1 - p) / width². For a sensitivity these are images of the class, for a specificity those of the others.

    Args:
        value: The expected proportion, in (0, 1).
        width: Distance of the interval's ends, in (0, 1).
        confidence: Coverage of the interval, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan_proportion(0.9, width=0.1), plan_proportion(0.9, width=0.1, effect=2.0)
        (139, 277)
    """
    _check_fraction(value, "the proportion")
    _check_fraction(width, "the width")
    check_confidence(confidence)
    return _round_up(4 * compute_quantile(confidence) ** 2 * value * (1 - value) / width**2, effect)


def plan_proportion_test(
    value: float,
    *,
    reference: float,
    margin: float | None = None,
    power: float = 0.8,
    level: float = 0.05,
    effect: float = 1.0,
) -> int:
    """Compute the number of images that show a proportion to differ from a figure, or to be no worse by a margin.

    n = (z_α √(r (1 - r)) + z_β √(p (1 - p)))² / (p - r)² for the figure r (Fleiss, Levin and Paik 2003, chapter 2);
    with a margin m, n = (z_α + z_β)² p (1 - p) / (p - r + m)² (Chow, Shao and Wang 2008, 4.1). z_α is that of a
    two-sided level, which for non-inferiority is one-sided at half of it.

    Args:
        value: The expected proportion, in (0, 1).
        reference: The figure to compare with, in (0, 1).
        margin: The largest difference that counts as no worse, in (0, 1); None: a difference is to be shown.
        power: Probability of a significant result if the proportion is as expected, in (0, 1).
        level: Two-sided significance level, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range, or what is expected is not what is to be shown.

    Example:
        >>> plan_proportion_test(0.9, reference=0.8), plan_proportion_test(0.9, reference=0.9, margin=0.05)
        (108, 283)
    """
    _check_fraction(value, "the proportion")
    _check_fraction(reference, "the figure to compare with")
    _check_test(margin, power, level)
    if margin is None and value == reference:
        raise ValueError(f"found {value:g} and {reference:g}; expected two proportions that differ")
    if margin is not None and not value - reference + margin > MIN_DISTANCE:
        raise ValueError(
            f"found {value:g}, which is worse than {reference:g} by the margin of {margin:g} or more; expected a "
            "proportion that is worse by less, or a larger margin"
        )
    spreads = math.sqrt(reference * (1 - reference)), math.sqrt(value * (1 - value))
    return _plan_test(value - reference, spreads, margin=margin, power=power, level=level, effect=effect)


def plan_auroc(area: float, *, prevalence: float, width: float, confidence: float = 0.95, effect: float = 1.0) -> int:
    """Compute the number of images for an interval of an area under the ROC curve (Newcombe 2006; Riley 2021).

    The smallest n with 2 z SE <= width, where SE² = A (1 - A) (1 + (n/2 - 1) (1 - A) / (2 - A) + (n/2 - 1) A / (1 + A))
    / (n² φ (1 - φ)) for the area A and the prevalence φ.

    Args:
        area: The expected area, in (0.5, 1).
        prevalence: Fraction of the class among all images, in (0, 1).
        width: Distance of the interval's ends, in (0, 1).
        confidence: Coverage of the interval, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan_auroc(0.8, prevalence=0.3, width=0.1)
        359
    """
    if not 0.5 < area < 1:
        raise ValueError(f"the area is {area:g}; expected a number in (0.5, 1), such as 0.9")
    _check_fraction(prevalence, "the prevalence")
    _check_fraction(width, "the width")
    check_confidence(confidence)
    slope = (1 - area) / (2 - area) + area / (1 + area)
    scale = area * (1 - area) / (prevalence * (1 - prevalence)) * (2 * compute_quantile(confidence) / width) ** 2
    # n² = scale (1 + (n/2 - 1) slope): the positive root of a quadratic equation.
    half = scale * slope / 2
    return max(2, _round_up((half + math.sqrt(half**2 + 4 * scale * (1 - slope))) / 2, effect))


def plan_paired_difference(
    only_first: float,
    only_second: float,
    *,
    margin: float | None = None,
    power: float = 0.8,
    level: float = 0.05,
    effect: float = 1.0,
) -> int:
    """Compute the number of images that show a difference of two models on the same images, or non-inferiority.

    n = (z_α √ψ + z_β √(ψ - δ²))² / δ² for McNemar's test (Connor 1987), where ψ is the fraction on which the models
    disagree and δ their difference, first minus second; with a margin m,
    n = (z_α + z_β)² (ψ - δ²) / (δ + m)² (Liu et al. 2002). z_α is that of a two-sided level, which for
    non-inferiority is one-sided at half of it.

    Args:
        only_first: Fraction of images that only the first model classifies correctly, in [0, 1].
        only_second: Fraction that only the second one does, in [0, 1].
        margin: The largest difference by which the first model may be worse, in (0, 1); None: a difference is to be
            shown.
        power: Probability of a significant result if the fractions are as stated, in (0, 1).
        level: Two-sided significance level, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range, or what is expected is not what is to be shown.

    Example:
        >>> plan_paired_difference(0.10, 0.05), plan_paired_difference(0.05, 0.05, margin=0.05)
        (469, 314)
    """
    difference, disagreement = only_first - only_second, only_first + only_second
    if not (only_first >= 0 and only_second >= 0 and 0 < disagreement <= 1):
        raise ValueError(f"found {only_first:g} and {only_second:g}; expected two fractions with a sum in (0, 1]")
    _check_test(margin, power, level)
    if margin is None and difference == 0:
        raise ValueError(f"found {only_first:g} and {only_second:g}; expected two fractions that differ")
    if margin is not None and not difference + margin > MIN_DISTANCE:
        raise ValueError(
            f"found {only_first:g} and {only_second:g}: the first model is worse by the margin of {margin:g} or more; "
            "expected it to be worse by less, or a larger margin"
        )
    spreads = math.sqrt(disagreement), math.sqrt(max(0.0, disagreement - difference**2))
    return _plan_test(difference, spreads, margin=margin, power=power, level=level, effect=effect)


def _plan_test(
    difference: float,
    spreads: tuple[float, float],
    *,
    margin: float | None,
    power: float,
    level: float,
    effect: float,
) -> int:
    """Compute the number of images for a test of a mean difference, or of one that may be down to minus the margin.

    Args:
        difference: The expected difference.
        spreads: Standard deviation of an image's difference if there is none, and as expected.
        margin: See `plan_proportion_test`, as all others.
        power: Likewise.
        level: Likewise.
        effect: Likewise.
    """
    error, miss = compute_quantile(1 - level), float(special.ndtri(power))
    without, expected = spreads
    if margin is None:
        quantiles, distance = error * without + miss * expected, difference
    else:
        quantiles, distance = (error + miss) * expected, difference + margin
    # A negative sum: the power is reached with any number of images.
    return _round_up(max(0.0, quantiles) ** 2 / distance**2, effect)


def _check_test(margin: float | None, power: float, level: float) -> None:
    _check_fraction(power, "the power")
    _check_fraction(level, "the level")
    if margin is not None:
        _check_fraction(margin, "the margin")


def _check_fraction(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value:g}; expected a number in (0, 1), such as 0.1")


def _round_up(images: float, effect: float) -> int:
    """Round up to whole images, but not because of a rounding error."""
    if not effect >= 1:
        raise ValueError(f"the design effect is {effect:g}; expected at least 1")
    if not images * effect < MAX_IMAGES:
        raise ValueError(f"more than {MAX_IMAGES:,} images would be needed")
    return max(1, math.ceil(images * effect - 1e-9))
