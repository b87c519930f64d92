"""Sentences that state what a comparison shows and what it does not show."""

import math

from pylorus.core.formatting import (
    format_count,
    format_number,
    format_p_value,
    format_percent,
    format_percent_at_least,
    format_percent_with_unit,
    format_threshold,
    join_names,
)
from pylorus.evaluation.comparison import Difference, McNemar
from pylorus.evaluation.decisions import SensitivityThreshold
from pylorus.evaluation.intervals import Estimate


def format_better_sentence(
    first: str,
    second: str,
    test: McNemar,
    *,
    corrected_p: float | None = None,
    family: int = 1,
    level: float = 0.05,
    group_word: str = "patients",
) -> str:
    """State whether one of two models is shown to classify more of the same images correctly.

    The model with more correct images is named first, regardless of the order of the arguments.

    Args:
        first: Name of the test's first model.
        second: Name of its second model.
        test: From `mcnemar`.
        corrected_p: p after `holm` over a family of tests, used instead of the test's own.
        family: Number of tests in the family; must be above 1 if a corrected p is given.
        level: Significance level, in (0, 1); a difference is shown if p is below it.
        group_word: Word for the groups, used if they have several images.

    Raises:
        ValueError: If level is not in (0, 1), or a corrected p is given without its family.

    Example:
        >>> test = McNemar(images=450, groups=450, right_first=409, right_second=401,
        ...                only_first=30, only_second=22, p_value=0.332)
        >>> format_better_sentence("ResNet50", "VGG19", test)
        'ResNet50 is not shown to be better than VGG19 on these 450 images (90.9 % vs. 89.1 %, p = 0.33).'
    """
    _check_level(level)
    if corrected_p is not None and family < 2:
        raise ValueError(f"family is {family}; expected at least 2 tests with a corrected p")
    p_value = test.p_value if corrected_p is None else corrected_p
    where = f"on these {format_count(test.images, 'image')}"
    if test.groups < test.images:
        where += f" of {test.groups:,} {group_word}"
    p_part = format_p_value(p_value, level=level)
    if corrected_p is not None:
        p_part += f" after Holm's correction for {family} comparisons"
    if test.right_first == test.right_second:
        accuracy = format_percent_with_unit(test.right_first / test.images)
        return f"{first} and {second} are correct equally often {where} ({accuracy} each, {p_part})."
    better, worse, correct = first, second, (test.right_first, test.right_second)
    if correct[0] < correct[1]:
        better, worse, correct = second, first, (correct[1], correct[0])
    verdict = "is shown to be better than" if p_value < level else "is not shown to be better than"
    accuracies = (
        f"{format_percent_with_unit(correct[0] / test.images)} vs. {format_percent_with_unit(correct[1] / test.images)}"
    )
    return f"{better} {verdict} {worse} {where} ({accuracies}, {p_part})."


def format_paired_sentence(
    first: str,
    second: str,
    difference: Difference,
    *,
    index: str,
    images: int,
    level: float = 0.05,
    in_points: bool = False,
) -> str:
    """State whether an index of two models differs on the same images.

    Args:
        first: Name of the first model.
        second: Name of the second model.
        difference: First minus second, from `delong_test` or `paired_differences`.
        index: Name of the index, such as "macro F1".
        images: Number of images.
        level: Significance level, in (0, 1); a difference is shown if p is below it.
        in_points: Whether the index is given in % elsewhere, so that the difference is in percentage points.

    Raises:
        ValueError: If level is not in (0, 1).

    Example:
        >>> difference = Difference(value=0.018, low=-0.012, high=0.048, standard_error=0.015, p_value=0.24)
        >>> print(format_paired_sentence("ResNet50", "VGG19", difference, index="AUROC of GC", images=450))
        ResNet50 and VGG19 are not shown to differ in AUROC of GC on these 450 images (+0.018, p = 0.24).
    """
    _check_level(level)
    where = f"in {index} on these {format_count(images, 'image')}"
    if math.isnan(difference.value) or math.isnan(difference.p_value):
        return f"It can't be determined whether {first} and {second} differ {where}."
    verdict = "differ" if difference.p_value < level else "are not shown to differ"
    p_value = format_p_value(difference.p_value, level=level)
    amount = _format_difference(difference.value, in_points=in_points)
    return f"{first} and {second} {verdict} {where} ({amount}, {p_value})."


def format_unpaired_sentence(
    first: str,
    second: str,
    difference: Estimate,
    *,
    index: str,
    images: tuple[int, int],
    confidence: float = 0.95,
    in_points: bool = False,
) -> str:
    r"""State whether an index of two models that were tested on different images differs.

    Args:
        first: Name of the first model.
        second: Name of the second model, such as "VGG19 (published)".
        difference: First minus second, from `difference_of_independent`.
        index: Name of the index, such as "accuracy".
        images: Number of test images of each model.
        confidence: Confidence of the interval, in (0, 1).
        in_points: Whether the index is given in % elsewhere, so that the difference is in percentage points.

    Example:
        >>> difference = Estimate(value=0.018, low=-0.022, high=0.057)
        >>> sentence = format_unpaired_sentence(
        ...     "Ours", "the published VGG19", difference, index="F1", images=(200, 450), in_points=True
        ... )
        >>> print(sentence.replace(" (", "\n("))
        Ours and the published VGG19 are not shown to differ in F1, on 200 and 450 different images
        (+1.8 points, 95 % interval −2.2 to +5.7).
    """
    where = f"in {index}, on {images[0]:,} and {images[1]:,} different images"
    if not difference.has_interval:
        return f"It can't be determined whether {first} and {second} differ {where}."
    verdict = "differ" if difference.is_above_zero or difference.is_below_zero else "are not shown to differ"
    low, high = (_format_difference(end, in_points=in_points, unit="") for end in (difference.low, difference.high))
    ends = f"{format_percent(confidence, digits=None)} % interval {low} to {high}"
    amount = _format_difference(difference.value, in_points=in_points)
    return f"{first} and {second} {verdict} {where} ({amount}, {ends})."


def _format_difference(value: float, *, in_points: bool, unit: str = " points") -> str:
    if in_points:
        return f"{format_percent(value, signed=True)}{unit}"
    return format_number(value, 3, signed=True)


def format_guarantee_sentence(
    fixed: SensitivityThreshold, *, class_name: str, grouped: bool = True, part: str = "validation"
) -> str:
    r"""State the sensitivity that a threshold guarantees, or why it does not guarantee the requested one.

    Args:
        fixed: Result of `threshold_at_sensitivity`.
        class_name: Name of the positive class.
        grouped: Whether the patients of the images are known; if not, each image counts as a patient.
        part: Images that the threshold was fixed on: validation, or test if these are the same.

    Example:
        >>> fixed = SensitivityThreshold(0.12, 0.95, 0.9, 0.954, 0.962, images=80, patients=60, patients_needed=45)
        >>> sentence = format_guarantee_sentence(fixed, class_name="GC")
        >>> print(sentence.replace(" is at", "\n is at"))
        At the threshold of 0.12 the true sensitivity for GC
         is at least 95 % with 90 % confidence, for patients like the 60 validation patients with GC.
    """
    sensitivity, confidence = (
        f"{format_percent(share, digits=None)} %" for share in (fixed.sensitivity, fixed.confidence)
    )
    unit = "patient" if grouped else "image"
    count = f"{format_count(fixed.patients, f'{part} {unit}')} with {class_name}"
    unknown = "" if grouped else " The patients are unknown, so each image counts as one."
    verb = "are" if fixed.patients != 1 else "is"
    prefix = f"At the threshold of {format_threshold(fixed.threshold)}"
    if fixed.is_guaranteed:
        return (
            f"{prefix} the true sensitivity for {class_name} is at least {sensitivity} "
            f"with {confidence} confidence, for {unit}s like the {count}.{unknown}"
        )
    needed = (
        "no number can guarantee that" if fixed.patients_needed is None else f"{fixed.patients_needed:,} are needed"
    )
    reached = (
        f", and at least {sensitivity} with {format_percent_at_least(fixed.confidence_reached)} % confidence"
        if fixed.sensitivity < 1
        else ""
    )
    return (
        f"The {part} set is too small to guarantee a sensitivity of {sensitivity} for {class_name} with {confidence} "
        f"confidence: there {verb} {count}, and {needed}. {prefix}, the lowest "
        f"probability of {class_name} among them, the true sensitivity is at least "
        f"{format_percent_at_least(fixed.sensitivity_reached)} % with {confidence} confidence{reached}.{unknown}"
    )


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number in (0, 1), such as 0.05")


def format_answered_shares(answered: float, unlike: float, accuracy: float | None = None) -> str:
    """Say how much of the test images a model answers, and why it abstains on the rest, if there is a rest.

    Args:
        answered: Proportion of the test images that it answers.
        unlike: Proportion on which it abstains since they are unlike the training images.
        accuracy: Accuracy on those that it answers; None: not said.

    Example:
        >>> print(format_answered_shares(1.0, 0.0, 0.9))
        answers all test images, 90.0 % of them correctly
        >>> print(format_answered_shares(0.8, 0.2))
        answers 80.0 % of the test images; 20.0 % are unlike the training images
        >>> print(format_answered_shares(0.7, 0.2))
        answers 70.0 % of the test images; 20.0 % are unlike the training images and it is uncertain about 10.0 %
    """
    unsure = max(0.0, 1 - answered - unlike)
    share = "all" if answered == 1 else "none of the" if answered == 0 else f"{format_percent(answered)} % of the"
    text = f"answers {share} test images"
    if accuracy is not None and answered:
        text += f", {format_percent(accuracy)} % of them correctly"
    reasons = [f"{format_percent(unlike)} % are unlike the training images"] * (unlike > 0)
    reasons += [f"it is uncertain about {format_percent(unsure)} %"] * (unsure > SMALLEST_SHARE)
    return "; ".join([text, " and ".join(reasons)] if reasons else [text])


SMALLEST_SHARE = 1e-9
"""A smaller proportion is a rounding error."""


def format_gain_sentence(
    accuracy: Estimate, balanced_accuracy: Estimate, brier: Estimate, log_loss: Estimate, *, against: str, images: int
) -> str:
    """State what averaging models gains on the same images, and of which scores it is shown.

    Args:
        accuracy: Difference of accuracies, average minus the other.
        balanced_accuracy: Difference of balanced accuracies.
        brier: Difference of Brier scores.
        log_loss: Difference of log losses, in nats.
        against: What the average is compared with, as text.
        images: Number of images.

    Example:
        >>> nothing = Estimate(0.0, -0.01, 0.02)
        >>> sentence = format_gain_sentence(
        ...     nothing, nothing, Estimate(-0.02, -0.03, -0.01), nothing, against="one model", images=120
        ... )
        >>> sentence.rpartition("). ")[2]
        'Averaging is shown to improve the Brier score.'
    """
    scores = {
        "accuracy": (accuracy, True),
        "balanced accuracy": (balanced_accuracy, True),
        "Brier score": (brier, False),
        "log loss": (log_loss, False),
    }
    better, worse, parts = list[str](), list[str](), list[str]()
    for name, (estimate, in_points) in scores.items():  # those in points are better if higher
        value, low, high = (
            format_percent(end, signed=True) if in_points else format_number(end, 3, signed=True)
            for end in (estimate.value, estimate.low, estimate.high)
        )
        interval = f"{low} to {high}" if estimate.has_interval else "no interval"
        parts.append(f"{name} {value}{' points' if in_points else ''} ({interval})")
        higher, lower = (better, worse) if in_points else (worse, better)
        higher += [f"the {name}"] if estimate.is_above_zero else []
        lower += [f"the {name}"] if estimate.is_below_zero else []
    verdict = [f"shown to improve {join_names(better)}"] if better else []
    verdict += [f"shown to worsen {join_names(worse)}"] if worse else []
    return (
        f"Compared with {against}, on the same {format_count(images, 'image')}: {', '.join(parts)} (95 % intervals by "
        "bootstrap over patients; Brier score and log loss are better if lower). Averaging is "
        f"{' and '.join(verdict) or 'not shown to change any of them'}."
    )
