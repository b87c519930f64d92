"""Fix a bundle's thresholds and limits on validation images, and measure them on the untouched test images."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pylorus.config.schema import DeployConfig
from pylorus.core.errors import resolve_short_name
from pylorus.core.formatting import format_count, format_estimate, format_percent
from pylorus.core.io import convert_to_plain
from pylorus.data.input_format import QUALITY
from pylorus.deploy.description import (
    Abstention,
    ClassificationMetrics,
    Decision,
    Description,
    FalseAlarmGuarantee,
    Guarantee,
    IntervalEstimate,
    OperatingMetrics,
    PredictionSets,
    SetMetrics,
    UsageReference,
)
from pylorus.deploy.description import Calibration as SaidCalibration
from pylorus.evaluation.confusion import compute_class_metric, confusion_matrix, select_class_metrics
from pylorus.evaluation.decisions import (
    ROUNDING,
    count_patients_needed_for_sets,
    fit_set_limits,
    operating_point,
    patients_needed,
    prediction_sets,
    threshold_at_sensitivity,
)
from pylorus.evaluation.discrimination import ranking_of_predictions
from pylorus.evaluation.drift import build_rate_reference, build_score_reference
from pylorus.evaluation.index_intervals import (
    clustered_wilson,
    estimate_class_metric,
    indices_of_predictions,
    proportions_of_predictions,
    wilson,
)
from pylorus.evaluation.influence import compute_group_means, estimate_mean_over_groups
from pylorus.evaluation.intervals import Estimate, compute_confidence_below
from pylorus.evaluation.populations import estimate_prevalence
from pylorus.evaluation.predictions import Predictions
from pylorus.model.inference import LARGER_UNLIKENESS
from pylorus.report.results import Calibration

FALSE_ALARMS = 0.05
"""Each of the two thresholds for abstention makes the model abstain on at most this proportion of validation images."""


@dataclass(frozen=True, eq=False)
class TrainingDistances:
    """Distances of validation and test images from the training images; see `LARGER_UNLIKENESS`.

    Attributes:
        training: Number of training images that they were compared with.
        validation: Distances of shape (validation images,), in [0, 2].
        validation_rows: Row of each of these validation images in the saved predictions.
        test: Distances of shape (test images,), in [0, 2].
        test_rows: Row of each of these test images in the saved predictions of test images.
        test_quality: How these test images look, of shape (test images, 4); see `measure_quality`.
    """

    training: int
    validation: NDArray[np.float64]
    validation_rows: NDArray[np.int64]
    test: NDArray[np.float64]
    test_rows: NDArray[np.int64]
    test_quality: NDArray[np.float64]


def resolve_deciding_class(deploy: DeployConfig, *, classes: Sequence[str], short_names: Sequence[str]) -> str:
    """Return the short name of the class that decides.

    Args:
        deploy: The configuration; without `class_name` the first class decides.
        classes: Full names of the classes.
        short_names: Their short names, in the same order.

    Raises:
        PylorusError: If `deploy.class_name` is not one of the classes.
    """
    name = short_names[0] if deploy.class_name is None else deploy.class_name
    return resolve_short_name(name, classes=classes, short_names=short_names, where="deploy.class_name")


def fit_decision(calibration: Calibration, deploy: DeployConfig, *, class_name: str) -> Decision:
    """Fix a threshold for each class that guarantees the requested sensitivity or, with too few patients, less.

    Args:
        calibration: Predictions of validation images, on which thresholds are fixed, and of test images.
        deploy: The requested sensitivity and confidence.
        class_name: Short name of the class that decides.

    Returns:
        The thresholds, what each guarantees, and their performance on the test images.
    """
    validation, test = calibration.validation, calibration.test
    target = {"sensitivity": deploy.sensitivity, "confidence": deploy.confidence}
    thresholds: dict[str, float | None] = {}
    guarantees: dict[str, Guarantee | None] = {}
    figures = {}
    for column, name in enumerate(validation.class_names):
        positive, scores = validation.true == column, validation.probabilities[:, column]
        thresholds[name] = guarantees[name] = None
        if positive.any():
            fitted = threshold_at_sensitivity(positive, scores, validation.clusters, margin=ROUNDING, **target)
            thresholds[name] = fitted.threshold
            guarantees[name] = Guarantee(
                fitted.confidence_reached, fitted.sensitivity_reached, fitted.images, fitted.patients
            )
        threshold = thresholds[name]
        point = operating_point(
            test.true == column,
            test.probabilities[:, column],
            test.clusters,
            threshold=2.0 if threshold is None else threshold,
        )
        figures[name] = OperatingMetrics(convert_estimate(point.sensitivity), convert_estimate(point.specificity))
    needed = patients_needed(**target)
    return Decision(class_name, deploy.sensitivity, deploy.confidence, needed, thresholds, guarantees, figures)


def fit_prediction_sets(calibration: Calibration, coverage: float | None) -> PredictionSets | None:
    """Calibrate prediction sets of a coverage in (0, 1) on validation images; None if no coverage is requested."""
    if coverage is None:
        return None
    validation, test = calibration.validation, calibration.test
    limits = fit_set_limits(validation.probabilities, validation.true, validation.clusters, coverage=coverage)
    lowest = tuple(None if limit is None else max(0.0, limit - ROUNDING) for limit in limits.lowest)
    limits = replace(limits, lowest=lowest)
    return PredictionSets(
        coverage=coverage,
        lowest=dict(zip(validation.class_names, limits.lowest, strict=True)),
        patients=dict(zip(validation.class_names, limits.patients, strict=True)),
        patients_needed=count_patients_needed_for_sets(coverage),
        test=compute_set_metrics(test, prediction_sets(test.probabilities, limits)),
    )


def compute_set_metrics(predictions: Predictions, members: NDArray[np.bool_]) -> SetMetrics:
    """Compute the coverage and mean size of prediction sets.

    Args:
        predictions: Predictions of n images with their true classes.
        members: Which classes are in the set of each image, of shape (n, classes).
    """
    groups = predictions.clusters
    is_covered = members[np.arange(len(members)), predictions.true].astype(np.float64)

    def estimate_coverage(selected: NDArray[np.bool_]) -> Estimate:
        if not selected.any():
            return Estimate(math.nan, math.nan, math.nan)
        return estimate_mean_over_groups(is_covered[selected], None if groups is None else groups[selected])

    proportion = estimate_mean_over_groups(members.mean(axis=1), groups)
    size = (predictions.classes * bound for bound in (proportion.value, proportion.low, proportion.high))
    return SetMetrics(
        coverage={
            name: convert_estimate(estimate_coverage(predictions.true == label))
            for label, name in enumerate(predictions.class_names)
        },
        size=convert_estimate(Estimate(*size)),
    )


def convert_calibration(calibration: Calibration) -> SaidCalibration:
    """Return the temperature and the calibration error on the test images, as model.json holds them."""
    fitted = calibration.temperature
    return SaidCalibration(
        fitted.temperature, fitted.identified, fitted.images, calibration.before.ece.value, calibration.after.ece.value
    )


def fit_abstention(calibration: Calibration, unlikeness: TrainingDistances, *, confidence: float) -> Abstention:
    """Fix the two thresholds for abstention on validation images, and measure them on the test images.

    Out-of-distribution: a distance that, with the given confidence, at most 5 % of the images of new patients exceed;
    a one-sided tolerance bound over patients (see `threshold_at_sensitivity`). With too few patients it is the largest
    distance of a validation image, and the result states what that guarantees. Uncertain: a calibrated probability of
    the most probable class below that of 95 % of the correctly classified validation images.
    """
    validation, test = calibration.validation, calibration.test
    clusters = None if validation.clusters is None else validation.clusters[unlikeness.validation_rows]
    bound = threshold_at_sensitivity(
        np.ones(len(unlikeness.validation), dtype=np.bool_),
        2 - unlikeness.validation,
        clusters,
        sensitivity=1 - FALSE_ALARMS,
        confidence=confidence,
        margin=ROUNDING,
    )
    unlike_above = 2 - bound.threshold
    confidences = validation.probabilities.max(axis=1)[validation.correct]
    unsure_below = float(np.quantile(confidences, FALSE_ALARMS, method="lower")) if len(confidences) else 0.0
    unsure_below = max(0.0, unsure_below - ROUNDING)
    rows = unlikeness.test_rows
    groups = test.clusters
    groups = None if groups is None else groups[rows]
    is_unlike = unlikeness.test > unlike_above
    is_uncertain = test.probabilities.max(axis=1)[rows] < unsure_below
    correct, answered = test.correct[rows], ~(is_unlike | is_uncertain)
    return Abstention(
        method=LARGER_UNLIKENESS,
        unlike_above=unlike_above,
        unsure_below=unsure_below,
        false_alarms=FALSE_ALARMS,
        images=unlikeness.training,
        unlike_test=estimate_proportion(is_unlike, groups),
        unsure_test=estimate_proportion(is_uncertain, groups, among=correct),
        answered_test=estimate_proportion(answered, groups),
        accuracy_answered=estimate_proportion(correct, groups, among=answered),
        guarantee=FalseAlarmGuarantee(
            confidence=bound.confidence,
            confidence_reached=bound.confidence_reached,
            proportion_reached=1 - bound.sensitivity_reached,
            images=bound.images,
            patients=bound.patients,
            patients_needed=bound.patients_needed,
        ),
    )


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers on n images and how these look, as `pylorus monitor` follows it.

    Attributes:
        rates: Whether each image has a property, of shape (n,): `predicted/NAME`, its most probable class;
            `positive/NAME`, the deciding class reaches its threshold; `abstained`, and the reasons `unlike` and
            `unsure`.
        scores: Scores of shape (n,): `confidence`, the probability of the most probable class; `unlikeness`; and those
            of `pylorus.data.input_format.QUALITY`.
        groups: The group (patient) of each image, of shape (n,); None if each image is its own.
    """

    rates: Mapping[str, NDArray[np.bool_]]
    scores: Mapping[str, NDArray[np.float64]]
    groups: NDArray[np.generic] | None


def collect_answers(
    probabilities: NDArray[np.float64],
    unlikeness: NDArray[np.float64],
    quality: NDArray[np.float64] | None,
    groups: NDArray[np.generic] | None,
    *,
    names: Sequence[str],
    decision: Decision,
    abstention: Abstention,
) -> Answers:
    """Derive what is monitored from a model's output, whichever class decided.

    Args:
        probabilities: Calibrated probabilities of shape (n, classes).
        unlikeness: Distances from the training images, of shape (n,).
        quality: How the images look, of shape (n, 4), as `measure_quality` returns it; None if unknown.
        groups: The group (patient) of each image, of shape (n,); None if each image is its own.
        names: Short names of the classes.
        decision: The bundle's thresholds.
        abstention: When the bundle abstains.
    """
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    rates = {f"predicted/{name}": predicted == column for column, name in enumerate(names)}
    threshold = decision.thresholds[decision.class_name]
    if threshold is not None:
        rates[f"positive/{decision.class_name}"] = probabilities[:, list(names).index(decision.class_name)] >= threshold
    is_unlike = unlikeness > abstention.unlike_above
    is_unsure = (confidence < abstention.unsure_below) & ~is_unlike
    rates |= {"abstained": is_unlike | is_unsure, "unlike": is_unlike, "unsure": is_unsure}
    scores = {"confidence": confidence, "unlikeness": unlikeness}
    if quality is not None:
        scores |= {name: quality[:, column] for column, name in enumerate(QUALITY)}
    return Answers(rates, scores, groups)


def build_usage_reference(answers: Answers, *, split: str) -> UsageReference:
    """Summarize answers as the reference of `pylorus monitor`: counts and histograms, nothing of single images."""
    images = len(answers.scores["confidence"])
    return UsageReference(
        split=split,
        images=images,
        groups=images if answers.groups is None else len(np.unique(answers.groups)),
        rates={name: build_rate_reference(flags, answers.groups) for name, flags in answers.rates.items()},
        scores={name: build_score_reference(scores, answers.groups) for name, scores in answers.scores.items()},
    )


UNUSUAL = 0.01
"""A set of images is called foreign if so many or more would be unlike the training images with at most this chance."""


def assess_unlike_images(
    is_unlike: NDArray[np.bool_], groups: NDArray[np.generic] | None, abstention: Abstention
) -> dict[str, Any]:
    """Test whether more images of a set are out-of-distribution than of images like the validation images.

    The test is exact: binomial with one image per patient. With several, the patients' proportions take the place of
    single images (see `pylorus.evaluation.intervals`).

    Args:
        is_unlike: Whether each image was called out-of-distribution, of shape (n,), n >= 1.
        groups: The patient of each image, of shape (n,); None if each image is its own.
        abstention: The bundle's abstention, with the proportion that it promises.

    Returns:
        As plain values: the number of images and of those that are unlike, the promised proportion, p, and whether the
        set is foreign to the model.
    """
    likes = 1 - compute_group_means(is_unlike.astype(np.float64), groups)
    promised = abstention.promised_false_alarms
    p = 1 - compute_confidence_below(likes, 1 - promised)
    return {
        "images": len(is_unlike),
        "unlike": int(is_unlike.sum()),
        "promised": promised,
        "p": float(np.clip(p, 0, 1)),
        "foreign": bool(p <= UNUSUAL),
    }


def format_unlike_images(tested: Mapping[str, Any]) -> str:
    """Format the result of `assess_unlike_images` as a sentence."""
    images, percent = format_count(tested["images"], "image"), format_percent(tested["unlike"] / tested["images"])
    share = f"{tested['unlike']:,} of {images} ({percent} %)"
    promised = f"{format_percent(tested['promised'])} %"
    if not tested["foreign"]:
        return f"unlike the training images: {share}; at most {promised} are expected if they resemble those"
    p = "p < 0.001" if tested["p"] < 0.001 else f"p = {tested['p']:.3f}"
    return (
        f"FOREIGN to the model: {share} are unlike the training images, where at most {promised} of images like those "
        f"are expected to be ({p}). Its results were measured on other images and may not hold for these."
    )


def compute_classification_metrics(test: Predictions) -> ClassificationMetrics:
    """Compute the model's performance on some images, without abstentions."""
    groups = test.clusters
    proportions = proportions_of_predictions(test.true, test.predicted, groups, classes=test.classes)
    indices = indices_of_predictions(test.true, test.predicted, groups, classes=test.classes)
    ranking = ranking_of_predictions(test.true, test.probabilities, groups)

    def convert_by_class(values: tuple[Estimate, ...]) -> dict[str, IntervalEstimate]:
        return {name: convert_estimate(value) for name, value in zip(test.class_names, values, strict=True)}

    return ClassificationMetrics(
        images=len(test.true),
        groups=len(np.unique(test.group)),
        accuracy=convert_estimate(proportions.accuracy),
        sensitivity=convert_by_class(proportions.sensitivity),
        specificity=convert_by_class(proportions.specificity),
        precision=convert_by_class(proportions.precision),
        auroc=convert_by_class(ranking.auroc),
        balanced_accuracy=convert_estimate(indices.balanced_accuracy),
        macro_auroc=convert_estimate(ranking.macro_auroc),
    )


def estimate_class_metrics(
    test: Predictions, names: Iterable[str], own: Mapping[str, Mapping[str, Mapping[str, float | None]]]
) -> dict[str, dict[str, IntervalEstimate]]:
    """Estimate the indices of a class that tables 1-3 of the run's report show.

    Args:
        test: Predictions of the test images.
        names: Further registered indices: the keys of `metrics` of the run's configuration.
        own: The user's own metrics, as `StageFolder.read_own_metrics` returns them.

    Returns:
        The estimates by label of the metric and short name of the class.
    """
    confusion = confusion_matrix(test.true, test.predicted, test.classes)
    estimates: dict[str, dict[str, IntervalEstimate]] = {}
    for metric in select_class_metrics(names):
        if metric.share is None:
            values = [Estimate(float(value), math.nan, math.nan) for value in compute_class_metric(metric, confusion)]
        else:
            values = list(estimate_class_metric(metric, test.true, test.predicted, test.clusters, classes=test.classes))
        estimates[metric.label] = {
            name: convert_estimate(value) for name, value in zip(test.class_names, values, strict=True)
        }
    return estimates | {
        metric: {
            name: IntervalEstimate(
                *(own.get(key, {}).get(metric, {}).get(name) for key in ("test", "test/low", "test/high"))
            )
            for name in test.class_names
        }
        for metric in own.get("test", {})
    }


def convert_estimate(estimate: Estimate) -> IntervalEstimate:
    """Convert an estimate to values that JSON can hold: None in place of NaN and infinities."""
    value, low, high = (
        float(number) if math.isfinite(number) else None for number in (estimate.value, estimate.low, estimate.high)
    )
    return IntervalEstimate(value, low, high)


def estimate_proportion(
    success: NDArray[np.bool_], groups: NDArray[np.generic] | None, *, among: NDArray[np.bool_] | None = None
) -> IntervalEstimate:
    """Compute the proportion of images with a property, with its confidence interval.

    Args:
        success: Whether each image has the property, of shape (n,).
        groups: The group (patient) of each image, of shape (n,); None if each image is its own.
        among: The images to count, of shape (n,); None for all. Without any the proportion is undefined.
    """
    selected = np.ones(len(success), dtype=np.bool_) if among is None else among
    if not selected.any():
        return convert_estimate(wilson(0, 0))
    return convert_estimate(clustered_wilson(success[selected], None if groups is None else groups[selected]))


# --- prevalence without labels ---

MIN_PREVALENCE_IMAGES = 50
"""The fewest unlabelled images whose prevalence `pylorus predict` prints: even if a model made no error, the interval
of a class of 50 % would extend 14 points to both sides."""
MAX_PREVALENCE_IMAGES = 2000
"""Of more images, this many are drawn for the estimate: it takes many passes over them."""


def find_calibrated_prevalence(description: Description) -> tuple[NDArray[np.float64], str]:
    """Return the class proportions at which a bundle's probabilities are calibrated, and which these are, in words.

    Args:
        description: The content of the bundle's model.json.
    """
    record, training = description.recalibration, description.training
    if record is not None:
        counts, source = np.array(record.images, dtype=np.float64), f"of the recalibration's images ({record.date})"
    elif training.loss.startswith("class-weighted"):
        counts, source = np.ones(len(description.classes)), "equal ones, as training weighted all classes equally"
    elif adjusted := re.match(r"logit-adjusted loss(?:, tau ([\d.e+-]+))?", training.loss):
        # Training leaves counts ** tau to the offset of the loss; the logits learn the rest.
        counts = np.array(training.images["train"], dtype=np.float64) ** (1 - float(adjusted[1] or 1))
        source = "those that the logit-adjusted loss aims at: equal ones with tau 1"
    else:
        counts, source = np.array(training.images["train"], dtype=np.float64), "of the training images"
    return counts / counts.sum(), source


def estimate_site_prevalence(
    probabilities: NDArray[np.float64],
    groups: NDArray[np.generic] | None,
    description: Description,
    *,
    images: int | None = None,
) -> dict[str, Any]:
    """Estimate without labels how frequent the classes are, as plain values; see `estimate_prevalence`.

    Args:
        probabilities: Calibrated probabilities of the bundle, of shape (images, classes).
        groups: The patient of each image, of shape (images,); None if each image is its own.
        description: The content of the bundle's model.json.
        images: Of how many images these were drawn; None if they are all.

    Returns:
        The number of images, of those that were drawn for the estimate and of their groups, which proportions it
        starts from, the estimated one of each class, and why there are none or no intervals, "" if there are.
    """
    original, source = find_calibrated_prevalence(description)
    rows, names = draw_images(len(probabilities)), description.short_names
    record: dict[str, Any] = {
        "images": len(probabilities) if images is None else images,
        "drawn": len(rows),
        "groups": len(rows) if groups is None else len(np.unique(groups[rows])),
        "source": source,
        "original": dict(zip(names, original.tolist(), strict=True)),
        "classes": {},
        "reason": "",
    }
    if not original.all():
        return record | {"reason": "the proportion of a class, from which the estimate starts, is 0"}
    found = estimate_prevalence(probabilities[rows], None if groups is None else groups[rows], original=original)
    record["reason"] = next((each.reason for each in found.prevalence if each.reason), "")
    record["classes"] = {
        name: convert_to_plain(convert_estimate(each)) for name, each in zip(names, found.prevalence, strict=True)
    }
    return record


def draw_images(images: int) -> NDArray[np.int64]:
    """Return the indices of at most `MAX_PREVALENCE_IMAGES` of these images, ascending: always the same random ones."""
    if images <= MAX_PREVALENCE_IMAGES:
        return np.arange(images)
    return np.sort(np.random.default_rng(0).choice(images, MAX_PREVALENCE_IMAGES, replace=False))


def format_estimated_prevalence(estimated: Mapping[str, Any]) -> str:
    """Format the result of `estimate_site_prevalence` as a line."""
    if not estimated["classes"]:
        return f"prevalence not estimated: {estimated['reason']}"
    parts = []
    for name, each in estimated["classes"].items():
        estimate = Estimate.from_saved(each)
        parts.append(f"{name} {format_estimate(estimate.value, estimate.low, estimate.high)}")
    is_sample = estimated["drawn"] < estimated["images"]
    drawn = f"; from {estimated['drawn']:,} images, drawn at random" if is_sample else ""
    each_alone = ", each image counted as a patient" if estimated["groups"] == estimated["drawn"] else ""
    why = f"no intervals, because {estimated['reason']}" if estimated["reason"] else f"95 % intervals{each_alone}"
    return (
        f"prevalence estimated without labels: {', '.join(parts)} ({why}{drawn}; valid if only the "
        "frequencies of the classes differ from the development)"
    )
