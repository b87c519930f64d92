"""Sentences that say what a comparison shows, and what it does not."""

import math

from pylorus.evaluation.comparison import Difference, McNemar
from pylorus.evaluation.decisions import SensitivityThreshold
from pylorus.evaluation.estimate import Estimate

MORE_FIGURES = 4
"""So many more figures a p-value is printed with, at most, to stand on its own side of the level."""


def better_sentence(
    first: str,
    second: str,
    test: McNemar,
    *,
    corrected_p: float | None = None,
    family: int = 1,
    level: float = 0.05,
    group_word: str = "patients",
) -> str:
    """Say whether one of two models is shown to recognise more of the same images.

    The model that recognises more is named first, whichever was given first.

    Args:
        first: Name of the test's first model.
        second: Name of its second model.
        test: From `mcnemar`.
        corrected_p: The p after `holm` over a family of tests; it decides instead of the test's own.
        family: How many tests the family has; required to be above 1 where a corrected p is given.
        level: What p must stay below to show a difference, in (0, 1).
        group_word: What the groups are, named where they hold several images.

    Raises:
        ValueError: If level is not in (0, 1), or a corrected p comes without its family.

    Example:
        >>> test = McNemar(images=450, groups=450, right_first=409, right_second=401,
        ...                only_first=30, only_second=22, p_value=0.332)
        >>> better_sentence("ResNet50", "VGG19", test)
        'ResNet50 is not shown to be better than VGG19 on these 450 images (90.9 % against 89.1 %, p = 0.33).'
    """
    _check_level(level)
    if corrected_p is not None and family < 2:
        raise ValueError(f"a corrected p needs the size of its family; family is {family}")
    p_value = test.p_value if corrected_p is None else corrected_p
    where = f"on these {_count(test.images)} images"
    if test.groups < test.images:
        where += f" of {_count(test.groups)} {group_word}"
    said = p_text(p_value, level=level)
    if corrected_p is not None:
        said += f" after Holm's correction for {family} comparisons"
    if test.right_first == test.right_second:
        share = percent(test.right_first / test.images)
        return f"{first} and {second} are right equally often {where} ({share} each, {said})."
    ahead, behind, right = first, second, (test.right_first, test.right_second)
    if right[0] < right[1]:
        ahead, behind, right = second, first, (right[1], right[0])
    verdict = "is shown to be better than" if p_value < level else "is not shown to be better than"
    shares = f"{percent(right[0] / test.images)} against {percent(right[1] / test.images)}"
    return f"{ahead} {verdict} {behind} {where} ({shares}, {said})."


def paired_sentence(
    first: str, second: str, difference: Difference, *, index: str, images: int, level: float = 0.05
) -> str:
    """Say whether an index of two models differs on the same images.

    Args:
        first: Name of the one model.
        second: Name of the other.
        difference: First minus second, from `delong_test` or `paired_differences`.
        index: What it is a difference of, as "macro F1".
        images: How many images both saw.
        level: What p must stay below to show a difference, in (0, 1).

    Raises:
        ValueError: If level is not in (0, 1).

    Example:
        >>> found = Difference(value=0.018, low=-0.012, high=0.048, standard_error=0.015, p_value=0.24)
        >>> print(paired_sentence("ResNet50", "VGG19", found, index="macro F1", images=450))
        ResNet50 and VGG19 are not shown to differ in macro F1 on these 450 images (+0.018, p = 0.24).
    """
    _check_level(level)
    where = f"in {index} on these {_count(images)} images"
    if math.isnan(difference.value) or math.isnan(difference.p_value):
        return f"Whether {first} and {second} differ {where} can't be told."
    verdict = "differ" if difference.p_value < level else "are not shown to differ"
    return (
        f"{first} and {second} {verdict} {where} ({difference.value:+.3f}, {p_text(difference.p_value, level=level)})."
    )


def unpaired_sentence(
    first: str,
    second: str,
    difference: Estimate,
    *,
    index: str,
    images: tuple[int, int],
    confidence: float = 0.95,
) -> str:
    r"""Say whether an index of two models differs where they were tested on different images.

    Args:
        first: Name of the one model.
        second: Name of the other, as "VGG19 (published)".
        difference: First minus second, from `difference_of_independent`.
        index: What it is a difference of, as "accuracy".
        images: How many images each was tested on.
        confidence: The confidence of the interval, in (0, 1).

    Example:
        >>> found = Estimate(value=0.018, low=-0.022, high=0.057)
        >>> said = unpaired_sentence("Ours", "the published VGG19", found, index="F1", images=(200, 450))
        >>> print(said.replace(" (", "\n("))
        Ours and the published VGG19 are not shown to differ in F1, on 200 and 450 different images
        (+0.018, 95 % interval -0.022 to +0.057).
    """
    where = f"in {index}, on {_count(images[0])} and {_count(images[1])} different images"
    if not difference.has_interval:
        return f"Whether {first} and {second} differ {where} can't be told."
    apart = difference.low > 0 or difference.high < 0
    verdict = "differ" if apart else "are not shown to differ"
    ends = f"{confidence * 100:g} % interval {difference.low:+.3f} to {difference.high:+.3f}"
    return f"{first} and {second} {verdict} {where} ({difference.value:+.3f}, {ends})."


def guarantee_sentence(
    found: SensitivityThreshold, *, class_name: str, grouped: bool = True, part: str = "validation"
) -> str:
    r"""Say what a threshold guarantees of the sensitivity, or why it does not guarantee what was asked for.

    Args:
        found: From `threshold_at_sensitivity`.
        class_name: Name of the class that is called.
        part: Of what images the threshold was fixed: validation, or test where these are the same.
        grouped: Whether it is known which images are of one patient; if not, each image counts as a patient.

    Example:
        >>> found = SensitivityThreshold(0.12, 0.95, 0.9, 0.954, 0.962, images=80, patients=60, patients_needed=45)
        >>> said = guarantee_sentence(found, class_name="GC")
        >>> print(said.replace(" is at", "\n is at"))
        At the threshold of 0.12 the true sensitivity for GC
         is at least 95 % with 90 % confidence, for patients like the 60 validation patients with GC.
    """
    wanted, sure = f"{100 * found.sensitivity:g} %", f"{100 * found.confidence:g} %"
    unit = "patient" if grouped else "image"
    count = f"{_count(found.patients)} {part} {unit}{'s' if found.patients != 1 else ''} with {class_name}"
    unknown = "" if grouped else " Patients are not known, so that each image counts as one."
    verb = "are" if found.patients != 1 else "is"
    place = f"At the threshold of {threshold_text(found.threshold)}"
    if found.is_guaranteed:
        return (
            f"{place} the true sensitivity for {class_name} is at least {wanted} "
            f"with {sure} confidence, for {unit}s like the {count}.{unknown}"
        )
    needed = (
        "no number of them can guarantee that"
        if found.patients_needed is None
        else f"{_count(found.patients_needed)} are needed"
    )
    reached = (
        f", and at least {wanted} with {percent_at_least(found.confidence_reached)} % confidence"
        if found.sensitivity < 1
        else ""
    )
    return (
        f"The {part} set is too small to guarantee a sensitivity of {wanted} for {class_name} with {sure} "
        f"confidence: there {verb} {count}, and {needed}. {place}, the lowest "
        f"probability of {class_name} among them, the true sensitivity is at least "
        f"{percent_at_least(found.sensitivity_reached)} % with {sure} confidence{reached}.{unknown}"
    )


def threshold_text(threshold: float) -> str:
    """A threshold rounded down to four figures, so that what is called positive at it is positive at the printed one.

    Example:
        >>> threshold_text(0.32996), threshold_text(0.5), threshold_text(0.0000123456), threshold_text(0.0)
        ('0.3299', '0.5', '1.234e-05', '0')
    """
    if threshold <= 0:
        return f"{threshold:.4g}"
    unit = 10.0 ** (math.floor(math.log10(threshold)) - 3)
    return f"{math.floor(threshold / unit + 1e-9) * unit:.4g}"


def percent_at_least(share: float) -> str:
    """A share that is a lower bound, in %, rounded down to one digit.

    Example:
        >>> percent_at_least(0.8736), percent_at_least(0.9)
        ('87.3', '90.0')
    """
    return f"{math.floor(1000 * share + 1e-9) / 10:.1f}"


def p_text(p_value: float, *, level: float = 0.05) -> str:
    """A p-value as it is printed: two figures, more where rounding would move it to the other side of the level.

    Args:
        p_value: In [0, 1], or nan.
        level: What p must stay below to show a difference, in (0, 1).

    Example:
        >>> p_text(0.3317), p_text(0.0496), p_text(0.00002), p_text(1.0), p_text(float("nan"))
        ('p = 0.33', 'p = 0.0496', 'p < 0.001', 'p = 1', 'p undefined')
        >>> p_text(0.05), p_text(0.0499999999)
        ('p = 0.050', 'p < 0.05')
    """
    if math.isnan(p_value):
        return "p undefined"
    if p_value < 0.001 <= level:
        return "p < 0.001"
    if p_value > 0.995:
        return "p = 1"
    figures = max(2, 1 - math.floor(math.log10(p_value))) if p_value else 2
    for digits in range(figures, figures + MORE_FIGURES):
        text = f"{p_value:.{digits}f}"
        if (float(text) < level) == (p_value < level):
            return f"p = {text}"
    return f"p < {level:g}" if p_value < level else f"p = {level:g}"


def percent(share: float) -> str:
    """A share as it is printed.

    Example:
        >>> percent(409 / 450), percent(float("nan"))
        ('90.9 %', 'undefined')
    """
    return "undefined" if math.isnan(share) else f"{share * 100:.1f} %"


def _count(number: int) -> str:
    return f"{number:,}"


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number in (0, 1), such as 0.05")
