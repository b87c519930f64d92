"""Results of a stress test, and the sentences that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pylorus.core.formatting import format_count, format_number, format_p_value, format_percent, join_names
from pylorus.data.degradation import DEGRADATIONS
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.shortcuts import ChanceTest

RECORD, FOLDER = "stress.json", "stress"
"""The record of a stress test, and its folder in a run."""
SUMS = "SHA256SUMS"
"""Key of the record that holds the bundle's identity, and the bundle's list of file hashes."""
LEVEL = 0.001
"""Family-wise level at which a region counts as better than chance: one false alarm in a thousand models."""
MIN_CHANGE = 0.01
"""Mean change of the probabilities, in [0, 1], from which hiding a region counts as a change at all."""


@dataclass(frozen=True)
class GradeResult:
    """A model on images that are degraded in one kind and grade, beside the same images as they are.

    Attributes:
        name: Name of the kind in `DEGRADATIONS`; empty for the images as they are.
        grade: 1 to 5; 0 for the images as they are.
        accuracy: Proportion of correctly classified images.
        sensitivity: Of the class of interest at its stored threshold.
        specificity: Likewise.
        answered: Proportion of images on which the model does not abstain.
        unlike: Proportion of images that it calls unlike the training images.
        accuracy_change: Accuracy minus that on the images as they are, paired.
        sensitivity_change: Likewise.
        specificity_change: Likewise.
        newly_wrong: Images that were classified correctly as they are and are not any more.
        caught: Those among them on which the model abstains.
    """

    name: str
    grade: int
    accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    answered: Estimate
    unlike: Estimate
    accuracy_change: Estimate
    sensitivity_change: Estimate
    specificity_change: Estimate
    newly_wrong: int
    caught: int


@dataclass(frozen=True)
class RegionResult:
    """What a region without tissue tells the network.

    Attributes:
        region: Name in `REGIONS`.
        images: Number of images that have it.
        problem: Why it can't be tested, as text; empty if it was.
        test: The network on the region alone, against chance; None if it can't be tested.
        corrected_p: p of the test, corrected for the number of regions (Holm).
        changed: Proportion of images whose most probable class changes if the region is hidden.
        shift: Mean change of the probabilities if it is hidden: half of the sum over classes, in [0, 1].
        accuracy_change: Accuracy with the region hidden minus that of the images as they are, paired.
    """

    region: str
    images: int
    problem: str = ""
    test: ChanceTest | None = None
    corrected_p: float = float("nan")
    changed: float = float("nan")
    shift: float = float("nan")
    accuracy_change: Estimate | None = None

    @property
    def is_shortcut(self) -> bool:
        """Whether the region alone is better than chance, and hiding it changes what the model says."""
        return self.test is not None and self.corrected_p <= LEVEL and self.shift >= MIN_CHANGE


@dataclass(frozen=True)
class StressResult:
    """All results of a stress test.

    Attributes:
        architecture: Name of the network.
        identity: SHA-256 of the bundle's list of file hashes.
        source: Where the images are from, as text.
        images: Number of images.
        patients: Number of patients; None if they are not known, so that each image counts as one.
        counts: Number of images of each class.
        unused: Sentences on images that were left out.
        deciding: Short name of the class of interest.
        threshold: Its stored threshold; None if it has none.
        margin: Loss of accuracy that counts, in (0, 1).
        seed: Seed of the degradations.
        baseline: The images as they are.
        grades: The degraded images.
        regions: The regions without tissue.
        prepared: What the bundle's preparation does to what surrounds the tissue, as a sentence; may be empty.
    """

    architecture: str
    identity: str
    source: str
    images: int
    patients: int | None
    counts: Mapping[str, int]
    unused: tuple[str, ...]
    deciding: str
    threshold: float | None
    margin: float
    seed: int
    baseline: GradeResult
    grades: tuple[GradeResult, ...]
    regions: tuple[RegionResult, ...]
    prepared: str = ""

    @property
    def basis(self) -> str:
        """The images that all figures are based on."""
        patients = "" if self.patients is None else f" of {format_count(self.patients, 'patient')}"
        return f"{format_count(self.images, 'image')}{patients}, {self.source}."

    def get_grades(self, name: str) -> list[GradeResult]:
        """Return the results of a kind of degradation, grade by grade."""
        return [each for each in self.grades if each.name == name]


def _format_points(change: Estimate) -> str:
    value, low, high = (format_number(100 * end, 1, signed=True) for end in (change.value, change.low, change.high))
    return f"{value} points, {low} to {high}"


def find_first_loss(grades: Sequence[GradeResult], margin: float) -> GradeResult | None:
    """Return the first grade from which on all grades are shown to cost more accuracy than the margin; None if none."""
    first = None
    for result in reversed(grades):
        if not result.accuracy_change.high < -margin:
            break
        first = result
    return first


def format_loss_sentence(grades: Sequence[GradeResult], first: GradeResult, margin: float) -> str:
    """State from which grade on a kind of degradation costs accuracy, and whether abstention catches it."""
    kind = DEGRADATIONS[first.name]
    begin = f"from grade {first.grade} on" if first.grade < len(grades) else f"at grade {first.grade}"
    return (
        f"{kind.title}: {begin} ({kind.describe_grade(first.grade)}) accuracy is shown to fall by more "
        f"than {format_percent(margin, digits=None)} points ({_format_points(first.accuracy_change)}). "
        f"{_format_caught(first)}"
    )


def _format_caught(result: GradeResult) -> str:
    if not result.newly_wrong:
        return ""
    fraction = result.caught / result.newly_wrong
    word = "catches" if fraction >= 0.9 else "catches most of" if fraction > 0.5 else "does not catch"
    return (
        f"Abstention {word} this: the model abstains on {result.caught} of the "
        f"{format_count(result.newly_wrong, 'image')} that it classified correctly before and no longer does."
    )


def build_degradation_sentences(result: StressResult) -> list[str]:
    """State for each kind of degradation what it costs: the losses that are shown, then the others together."""
    losses, safe, doubtful = [], [], []
    for name, kind in DEGRADATIONS.items():
        grades = result.get_grades(name)
        first = find_first_loss(grades, result.margin)
        if first is not None:
            losses.append(format_loss_sentence(grades, first, result.margin))
        elif min(each.accuracy_change.low for each in grades) > -result.margin:
            safe.append(kind.label)
        else:
            doubtful.append(kind.label)
    points = f"{format_percent(result.margin, digits=None)} points"
    if safe:
        losses.append(f"At all grades the loss of accuracy is shown to be less than {points}: {join_names(safe)}.")
    if doubtful:
        losses.append(
            f"Not shown to cost more than {points} of accuracy at all higher grades, but not ruled out by these "
            f"images: {join_names(doubtful)}."
        )
    return losses


def _name_region(region: str) -> str:
    return {"border": "the frame's border", "overlays": "text and plates"}.get(region, f"the corner at the {region}")


def format_region_sentence(result: RegionResult, names: Sequence[str]) -> str:
    """State what a region tells the network, with the figures on which that rests.

    Args:
        result: A region that alone is better than chance.
        names: Short names of the classes.
    """
    assert result.test is not None
    assert result.accuracy_change is not None
    name, test = _name_region(result.region), result.test
    reverse = "" if test.area > 0.5 else "; below 0.5, as without tissue it answers the opposite"
    figures = f"AUROC {format_number(test.area, 3)} for {names[test.label]}, {format_p_value(result.corrected_p)}"
    figures += reverse
    shift = f"the probabilities by {format_number(100 * result.shift, 1)} points on average"
    if not result.is_shortcut:
        return f"The network tells the class by {name} alone ({figures}), but hiding it changes {shift}: hardly used."
    return (
        f"The network tells the class by {name} alone ({figures}). Hiding it changes {shift}, the most probable class "
        f"of {format_percent(result.changed)} % of the images, and accuracy by "
        f"{_format_points(result.accuracy_change)}."
    )


def build_region_sentences(result: StressResult) -> list[str]:
    """State for each region without tissue what it tells the network: findings first, the others together."""
    better = [each for each in result.regions if each.test is not None and each.corrected_p <= LEVEL]
    better.sort(key=lambda each: not each.is_shortcut)
    sentences = [format_region_sentence(each, list(result.counts)) for each in better]
    chance = [each for each in result.regions if each.test is not None and each not in better]
    if chance:
        limit = max(each.test.limit for each in chance if each.test is not None)
        sentences.append(
            f"Not shown to be better than chance: {join_names([_name_region(each.region) for each in chance])}. "
            f"An AUROC above {format_number(limit, 2)} or below {format_number(1 - limit, 2)} would have been found."
        )
    by_problem: dict[str, list[str]] = {}
    for each in result.regions:
        if each.test is None:
            by_problem.setdefault(each.problem, []).append(_name_region(each.region))
    sentences += [f"Not tested, since {problem}: {join_names(names)}." for problem, names in by_problem.items()]
    return sentences


def build_findings(result: StressResult) -> list[str]:
    """Return the sentences at the head of the page: shortcuts first, then what degradation costs."""
    shortcuts = [each for each in result.regions if each.is_shortcut]
    tested = [each for each in result.regions if each.test is not None]
    sentences = []
    if shortcuts:
        sentences.append(
            "POSSIBLE SHORTCUT: the network tells the classes apart by what is not tissue. Its results may not hold "
            "where images do not carry the same marks."
        )
        sentences += [format_region_sentence(each, list(result.counts)) for each in shortcuts]
    elif tested:
        parts = [_name_region(each.region) for each in tested if each.region in ("border", "overlays")]
        sentences.append(
            f"No shortcut was found outside the tissue ({join_names(parts)}): alone, it is not shown to be better than "
            "chance, or hiding it changes next to nothing."
        )
    else:
        sentences.append("No region without tissue could be tested for shortcuts; the section below says why.")
    points = format_percent(result.margin, digits=None)
    losses = [(kind, find_first_loss(result.get_grades(kind), result.margin)) for kind in DEGRADATIONS]
    known = [(DEGRADATIONS[kind].label, first) for kind, first in losses if first is not None]
    if not known:
        kinds = [result.get_grades(kind) for kind in DEGRADATIONS]
        open_kinds = sum(min(each.accuracy_change.low for each in grades) < -result.margin for grades in kinds)
        sentences.append(
            f"No kind of degradation is shown to cost more than {points} points of accuracy; these "
            f"{format_count(result.images, 'image')} do not rule it out for {open_kinds} of {len(kinds)} kinds."
        )
    else:
        parts = [f"{label} from grade {first.grade}" for label, first in known]
        newly_wrong, caught = sum(each.newly_wrong for _, each in known), sum(each.caught for _, each in known)
        sentences.append(
            f"Accuracy is shown to fall by more than {points} points under {join_names(parts)}. At these grades the "
            f"model abstains on {caught:,} of the {newly_wrong:,} images that it classified correctly before and no "
            "longer does."
        )
    silent = [
        f"{kind.label} from grade {first.grade}"
        for kind in DEGRADATIONS.values()
        if (first := find_first_silence(result.get_grades(kind.name))) is not None
    ]
    if silent:
        sentences.append(f"It answers less than half of the images under {join_names(silent)}.")
    return sentences


def find_first_silence(grades: Sequence[GradeResult]) -> GradeResult | None:
    """Return the first grade from which on the model answers less than half of the images; None if it never does."""
    first = None
    for result in reversed(grades):
        if result.answered.value >= 0.5:
            break
        first = result
    return first
