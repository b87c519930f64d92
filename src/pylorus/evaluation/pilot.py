"""Measure a pilot run for the next test set: its figures, and how much the images of a patient resemble each other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.comparison import mcnemar
from pylorus.evaluation.discrimination import compute_area_covariance, compute_placements, compute_structural_components
from pylorus.evaluation.influence import estimate_correlation
from pylorus.evaluation.intervals import check_confidence, compute_quantile
from pylorus.evaluation.predictions import Predictions, align_predictions, encode_groups


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


@dataclass(frozen=True)
class PatientDesign:
    """How images come in patients.

    Attributes:
        images_per_patient: Mean number of images of a patient, >= 1.
        variation: Standard deviation of that number over its mean, >= 0.
        correlation: Intraclass correlation among the images of a patient, in [0, 1].
        low: Lower end of its confidence interval, in [0, 1]; NaN if it was not measured.
        high: Upper end of that interval.
    """

    images_per_patient: float = 1.0
    variation: float = 0.0
    correlation: float = 0.0
    low: float = math.nan
    high: float = math.nan

    @property
    def effect(self) -> float:
        """Factor by which the number of images grows; see `compute_design_effect`."""
        return compute_design_effect(self.images_per_patient, self.correlation, variation=self.variation)

    @property
    def upper(self) -> "PatientDesign | None":
        """The same design with the correlation at the upper end of its interval; None without an interval."""
        return None if math.isnan(self.high) else replace(self, correlation=self.high)


def measure_patient_design(
    values: NDArray[np.generic], groups: NDArray[np.generic] | None, *, confidence: float = 0.95
) -> PatientDesign:
    """Measure images per patient and the correlation within patients, on the predictions of a pilot run.

    The correlation is that of a one-way analysis of variance (Fleiss 2003, 15.2), at least 0. Its interval is that of
    a jackknife over patients of the logarithm of the ratio of the variances between and within patients (Arvesen and
    Schmitz, Biometrics 1970;26:677), with Student's t; its upper end is at least that of the F distribution, since few
    errors may happen to be of as many patients. Of values of two kinds, such as right and wrong, it is also at least
    that of the profile likelihood of a beta-binomial distribution, because a jackknife of few errors misses it often
    (`benchmarks/sample_size.py`). If the values do not vary the correlation is unknown, and 1: images of a patient then
    count as copies of one another, as in `clustered_wilson`.

    Args:
        values: Value of each image, of shape (n,), such as whether it is classified correctly.
        groups: Patient of each image, of shape (n,), or None if each image is its own.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The design; without an interval if each patient has one image.

    Raises:
        ValueError: If there are fewer than two patients, or a value is NaN or infinite.

    Example:
        >>> correct = np.array([True, True, False, False, True, False])
        >>> design = measure_patient_design(correct, np.array(["a", "a", "b", "b", "c", "c"]))
        >>> round(design.correlation, 2), round(design.low, 2), round(design.high, 2)
        (0.5, 0.0, 1.0)
    """
    check_confidence(confidence)
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
    variation = float(sizes.std() / mean)
    if typical == 1:
        return PatientDesign(mean, variation)
    if not spread > 1e-12 * len(numbers):
        return PatientDesign(mean, variation, 1.0, 0.0, 1.0)
    sums = np.bincount(codes, weights=deviations).astype(np.float64)
    correlation = estimate_correlation(sums, sizes, spread)
    low, high = _estimate_correlation_interval(
        sums, sizes, np.bincount(codes, weights=deviations**2).astype(np.float64), confidence
    )
    if len(np.unique(numbers)) == 2:
        successes = np.bincount(codes, weights=numbers == numbers.max()).astype(np.float64)
        high = max(high, _estimate_binary_upper_end(successes, sizes, correlation, confidence))
    return PatientDesign(mean, variation, correlation, min(low, correlation), max(high, correlation))


def _estimate_binary_upper_end(
    successes: NDArray[np.float64], sizes: NDArray[np.float64], correlation: float, confidence: float
) -> float:
    """Estimate the upper end of an intraclass correlation by the profile likelihood of a beta-binomial distribution.

    Args:
        successes: Number of images of one kind of each patient, of shape (patients,).
        sizes: Number of images of each patient, of the same shape.
        correlation: The estimated correlation, in [0, 1].
        confidence: Coverage of the two-sided interval, in (0, 1).
    """
    pairs, counts = np.unique(np.stack([successes, sizes - successes]), axis=1, return_counts=True)
    hits, misses = pairs

    def compute_profile(icc: float) -> float:
        """Return the largest log likelihood at a correlation, over all proportions."""

        def compute_loss(logit: float) -> float:
            scale, proportion = 1 / icc - 1, special.expit(logit)
            shapes = scale * proportion, scale * (1 - proportion)
            terms = special.betaln(hits + shapes[0], misses + shapes[1]) - special.betaln(*shapes)
            return -float(counts @ terms)

        return -float(optimize.minimize_scalar(compute_loss, bounds=(-12, 12), method="bounded").fun)

    least, most = 1e-4, 1 - 1e-4
    best = optimize.minimize_scalar(lambda icc: -compute_profile(icc), bounds=(least, most), method="bounded")
    drop = compute_quantile(confidence) ** 2 / 2

    def compute_gap(icc: float) -> float:
        return compute_profile(icc) + float(best.fun) + drop

    return 1.0 if compute_gap(most) >= 0 else max(correlation, float(optimize.brentq(compute_gap, best.x, most)))


def _estimate_correlation_interval(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], squares: NDArray[np.float64], confidence: float
) -> tuple[float, float]:
    """Estimate the interval of an intraclass correlation by leaving out one patient after the other.

    Args:
        sums: Sum of the deviations of each patient's images from the mean, of shape (patients,).
        sizes: Number of images of each patient, of the same shape.
        squares: Sum of the squared deviations of each patient's images.
        confidence: Coverage, in (0, 1).
    """
    patients, total = len(sizes), float(sizes.sum())
    if patients < 3:
        return 0.0, 1.0
    between_each = sums**2 / sizes
    # Half a patient's worth of the total variance keeps the ratio finite if nothing varies within or between patients.
    least = float(squares.sum()) / total / patients / 2

    def compute_log_ratio(left_out: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the logarithm of the ratio for each row, whose 1 marks the patient that is left out, if any."""
        count, images = patients - left_out, total - left_out * sizes
        shift = (float(sums.sum()) - left_out * sums) ** 2 / images
        own = float(between_each.sum()) - left_out * between_each
        between = np.maximum(own - shift, 0.0) / (count - 1)
        within = np.maximum(float(squares.sum()) - left_out * squares - own, 0.0) / np.maximum(images - count, 1.0)
        return np.log((between + least) / (within + least))

    log_ratio = compute_log_ratio(np.zeros(patients))
    pseudovalues = patients * log_ratio - (patients - 1) * compute_log_ratio(np.ones(patients))
    reach = compute_quantile(confidence, freedom=patients - 1) * float(pseudovalues.std(ddof=1)) / math.sqrt(patients)
    ratios = np.exp(np.clip(float(pseudovalues.mean()) + np.array([-reach, reach]), -700, 700))
    if total > patients:
        smallest = float(special.fdtri(patients - 1, total - patients, (1 - confidence) / 2))
        ratios[1] = max(ratios[1], math.exp(float(log_ratio[0])) / smallest)
    typical = (total - float((sizes**2).sum()) / total) / (patients - 1)
    low, high = np.clip((ratios - 1) / (ratios + typical - 1), 0.0, 1.0)
    return float(low), float(high)


@dataclass(frozen=True, eq=False)
class PilotMeasures:
    """What the predictions of a pilot run say about a class, for the size of the next test set.

    Attributes:
        images: Number of images.
        patients: Number of patients.
        prevalence: Fraction of images of the class, in (0, 1).
        values: Sensitivity, specificity and AUROC, by these names in lower case.
        designs: How images come in patients, for `sensitivity` (images of the class), `specificity` (the others),
            `auroc`, `accuracy` and `calibration` (all), and, if there is a second model, `difference` and
            `auroc difference` (all); without those for which only one patient has images.
        disagreement: Fractions of images that only the first and only the second model classifies correctly, or None.
        areas: AUROC of the first and of the second model, and the correlation of the two, or None.
        log_odds: Logarithm of the odds that the first model gives the class, of shape (images,).
        is_class: Whether each image is of the class, of shape (images,).
    """

    images: int
    patients: int
    prevalence: float
    values: Mapping[str, float]
    designs: Mapping[str, PatientDesign]
    disagreement: tuple[float, float] | None
    areas: tuple[float, float, float] | None
    log_odds: NDArray[np.float64]
    is_class: NDArray[np.bool_]


def measure_pilot(
    predictions: Predictions, class_name: str, other: Predictions | None = None, *, confidence: float = 0.95
) -> PilotMeasures:
    """Measure the figures of a class and how much the images of a patient resemble each other.

    For AUROC the correlation is that of the influence of each image on the area (DeLong's placements), for calibration
    that of the difference between outcome and probability.

    Args:
        predictions: Test predictions of the pilot run.
        class_name: The class of interest.
        other: Those of a second model for the same images, to be compared with.
        confidence: Coverage of the intervals of the correlations, in (0, 1).

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
    share, probability = np.where(positive, prevalence, 1 - prevalence), predictions.probabilities[:, label]
    placements = compute_placements(positive, probability)
    area = float(placements[positive].mean())
    values = {
        "sensitivity": (predicted[positive], groups[positive]),
        "specificity": (~predicted[~positive], groups[~positive]),
        "auroc": ((placements - area) / share, groups),
        "accuracy": (predictions.correct, groups),
        "calibration": (positive - probability, groups),
    }
    disagreement = areas = None
    if other is not None:
        other, counts = align_predictions(predictions, other), mcnemar(predictions, other)
        disagreement = (counts.only_first / counts.images, counts.only_second / counts.images)
        values["difference"] = (predictions.correct.astype(np.int64) - other.correct.astype(np.int64), groups)
        scores = [probability, other.probabilities[:, label]]
        change = placements - compute_placements(positive, scores[1])
        values["auroc difference"] = ((change - float(change[positive].mean())) / share, groups)
        parts = compute_structural_components(positive, scores, None)
        covariance = compute_area_covariance(parts)
        errors = np.sqrt(np.diagonal(covariance))
        correlation = float(covariance[0, 1] / errors.prod()) if (errors > 0).all() else 0.0
        areas = (float(parts.areas[0]), float(parts.areas[1]), min(1.0, max(0.0, correlation)))
    designs = {
        name: measure_patient_design(numbers, patients, confidence=confidence)
        for name, (numbers, patients) in values.items()
        if len(np.unique(patients)) > 1
    }
    figures = {name: float(values[name][0].mean()) for name in ("sensitivity", "specificity")} | {"auroc": area}
    return PilotMeasures(
        images=len(groups),
        patients=len(np.unique(groups)),
        prevalence=prevalence,
        values=figures,
        designs=designs,
        disagreement=disagreement,
        areas=areas,
        log_odds=special.logit(np.clip(probability, 1e-12, 1 - 1e-12)),
        is_class=positive,
    )


def compute_binormal_log_odds(area: float, *, prevalence: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the log-odds of a calibrated model of a given AUROC, if they are normal in both classes (Riley 2021).

    Their variance is σ² = 2 Φ⁻¹(A)² for the area A, and their means are σ² apart; calibration gives the rest.

    Args:
        area: The area, in (0.5, 1).
        prevalence: Fraction of the class among all images, in (0, 1).

    Returns:
        Log-odds and their weights, of shape (n,) each, for sums over the distribution.

    Example:
        >>> values, weights = compute_binormal_log_odds(0.8, prevalence=0.3)
        >>> round(float(weights.sum()), 6), round(float(weights @ special.expit(values)), 4)
        (1.0, 0.3)
    """
    for value, least, name in ((area, 0.5, "the area"), (prevalence, 0.0, "the prevalence")):
        if not least < value < 1:
            raise ValueError(f"{name} is {value:g}; expected a number in ({least:g}, 1)")
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(100)
    deviation = math.sqrt(2) * float(special.ndtri(area))
    middle = float(special.logit(prevalence)) - deviation**2 / 2
    values = np.concatenate([middle + deviation * nodes, middle + deviation**2 + deviation * nodes])
    parts = node_weights / node_weights.sum()
    return values, np.concatenate([(1 - prevalence) * parts, prevalence * parts])
