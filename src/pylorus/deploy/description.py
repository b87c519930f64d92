"""What model.json says: all that must be known to use a trained network, and what it was found to be worth."""

from dataclasses import dataclass, field
from typing import Any

from pylorus.data.input import InputFormat
from pylorus.evaluation.conformal import SetLimits
from pylorus.evaluation.decisions import SensitivityThreshold
from pylorus.runs.shipped import ShippedStage

FORMAT_VERSION = 2
"""Counts up when an older Pylorus could not read what a newer one writes. Since 2 thresholds have guarantees, and the
shipped stage is the one that validation chose."""
INTENDED_USE = "Research use only. Not a medical device."


@dataclass(frozen=True)
class Figure:
    """A share or an area with its 95 % interval; null where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Input:
    """How a file becomes the network's input.

    Attributes:
        size: Side of the square in pixels.
        crop: none or auto; see `pylorus.data.input`.
        fit: pad, stretch or crop.
        interpolation: Of the resize.
        mean: What is subtracted, a value a channel, of pixels in [0, 1].
        std: What is divided by then.
        policy: Version of the rules in `pylorus.data.image`.
    """

    size: int
    crop: str
    fit: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    policy: int

    @property
    def form(self) -> InputFormat:
        """The one way from files to pixels."""
        return InputFormat(self.size, self.fit, self.interpolation, self.crop)


@dataclass(frozen=True)
class Weights:
    """What training began from.

    Attributes:
        source: hub, none or a file's name.
        sha256: Of that file; null for random weights.
        licence: Of these weights; null where it is not known.
    """

    source: str = field(metadata={"name": "from"})
    sha256: str | None
    licence: str | None


@dataclass(frozen=True)
class TrainedStage:
    """One stage: how deep it learned, how many epochs ran, and the one whose weights were taken, from 1."""

    name: str
    learn: str
    epochs: int
    best_epoch: int


@dataclass(frozen=True)
class Training:
    """How it was trained, and on what.

    Attributes:
        stages: Those that made this network, in their order: the shipped one is the last.
        seed: Of the run.
        precision: 32 or bf16.
        data: folders, manifest, shards or synthetic.
        images: Of each class in each part of the split, in the order of the classes.
        grouped: Whether images of a patient were kept in one part.
        split_sha256: Of split.csv.
        validated_on: val, or test: then every figure is optimistic.
    """

    stages: tuple[TrainedStage, ...]
    seed: int
    precision: str
    data: str
    images: dict[str, tuple[int, ...]]
    grouped: bool
    split_sha256: str
    validated_on: str


@dataclass(frozen=True)
class Calibration:
    """A temperature fitted on validation images, and the calibration of the test images.

    Attributes:
        temperature: What logits are divided by.
        identified: Whether the validation images tell one; if not it is 1.
        images: How many it was fitted on.
        ece_before: Expected calibration error of the test images without it, in [0, 1].
        ece_after: The same with it.
    """

    temperature: float
    identified: bool
    images: int
    ece_before: float
    ece_after: float


@dataclass(frozen=True)
class OperatingFigures:
    """What a class's threshold gives on the test images."""

    sensitivity: Figure
    specificity: Figure


@dataclass(frozen=True)
class Guarantee:
    """What a threshold guarantees for new patients; see `pylorus.evaluation.decisions.SensitivityThreshold`.

    Attributes:
        confidence_reached: The confidence with which the true sensitivity is at least the one asked for, in [0, 1].
        sensitivity_reached: The highest sensitivity that is guaranteed at the confidence asked for, in [0, 1].
        images: How many validation images are of the class.
        patients: How many patients (groups) these are of.
    """

    confidence_reached: float
    sensitivity_reached: float
    images: int
    patients: int


@dataclass(frozen=True)
class Decision:
    """When an image is called positive for a class.

    Attributes:
        class_name: Short name of the class that decides unless another is asked for.
        sensitivity: Which the thresholds are to guarantee.
        confidence: With which they are to guarantee it; null in a bundle of format 1, whose thresholds reach the
            sensitivity on the validation images and guarantee nothing.
        patients_needed: How many positive validation patients that takes; null where no number is enough.
        thresholds: Of the calibrated probability, by short name; null where no validation image is of the class.
        guarantees: What they guarantee, by short name; null where there is no threshold, and in a bundle of format 1.
        test: What they give on the test images, by short name.
    """

    class_name: str = field(metadata={"name": "class"})
    sensitivity: float
    confidence: float | None
    patients_needed: int | None
    thresholds: dict[str, float | None]
    guarantees: dict[str, Guarantee | None]
    test: dict[str, OperatingFigures]

    def fixed_threshold(self, name: str) -> SensitivityThreshold | None:
        """The threshold of a class with its guarantee; None where nothing is guaranteed."""
        threshold, guarantee = self.thresholds[name], self.guarantees[name]
        if threshold is None or guarantee is None or self.confidence is None:
            return None
        return SensitivityThreshold(
            threshold=threshold,
            sensitivity=self.sensitivity,
            confidence=self.confidence,
            confidence_reached=guarantee.confidence_reached,
            sensitivity_reached=guarantee.sensitivity_reached,
            images=guarantee.images,
            patients=guarantee.patients,
            patients_needed=self.patients_needed,
        )


@dataclass(frozen=True)
class SetFigures:
    """What prediction sets give on some images; each patient counts the same, as in their calibration.

    Attributes:
        coverage: Share of each class's images whose set holds that class, by short name.
        size: Mean number of classes in a set.
    """

    coverage: dict[str, Figure]
    size: Figure


@dataclass(frozen=True)
class PredictionSets:
    """From which probability on a class is in an image's prediction set.

    Attributes:
        coverage: Share of each class's images, of new patients, whose set is to hold that class, in (0, 1).
        lowest: The lowest calibrated probability with which a class is in the set, by short name; null where there are
            too few validation patients of the class, which is in every set then.
        patients: How many validation patients (groups) of each class it was calibrated on, by short name.
        patients_needed: How many it takes for a set to leave a class out.
        test: What the sets give on the test images.
    """

    coverage: float
    lowest: dict[str, float | None]
    patients: dict[str, int]
    patients_needed: int
    test: SetFigures

    def limits(self, names: tuple[str, ...]) -> SetLimits:
        """The limits in the order of some short names."""
        return SetLimits(
            self.coverage, tuple(self.lowest[name] for name in names), tuple(self.patients[name] for name in names)
        )


@dataclass(frozen=True)
class Abstention:
    """When the model does not answer.

    Attributes:
        method: How unlike the training images an image is.
        unlike_above: Above this unlikeness it abstains.
        unsure_below: Below this calibrated probability of the likeliest class it abstains.
        false_alarms: Share of validation images that each threshold was fixed to withhold at most.
        images: How many training images the class means are of.
        unlike_test: Share of test images called unlike: the false-alarm rate.
        unsure_test: Share of rightly recognised test images called unsure.
        answered_test: Share of test images that are answered.
        accuracy_answered: Accuracy on these.
    """

    method: str
    unlike_above: float
    unsure_below: float
    false_alarms: float
    images: int
    unlike_test: Figure
    unsure_test: Figure
    answered_test: Figure
    accuracy_answered: Figure


@dataclass(frozen=True)
class Figures:
    """What the model is worth on some images, all of them answered.

    Attributes:
        images: How many.
        groups: Of how many groups (patients); intervals keep them together.
        accuracy: Share recognised.
        sensitivity: Of each class, by short name.
        specificity: As sensitivity.
        precision: As sensitivity.
        auroc: Area under the curve of each class against the rest.
    """

    images: int
    groups: int
    accuracy: Figure
    sensitivity: dict[str, Figure]
    specificity: dict[str, Figure]
    precision: dict[str, Figure]
    auroc: dict[str, Figure]


@dataclass(frozen=True)
class Description:
    """All of model.json.

    Attributes:
        format_version: See `FORMAT_VERSION`.
        architecture: timm's name.
        arguments: Further arguments of timm.create_model, plain values.
        classes: In the order of the logits.
        short_names: One a class.
        shipped: The stage of the run whose network this is, and how it was chosen.
        prediction_sets: Null where the run did not ask for them.
        test: What it is worth on the run's test images.
        versions: Of the packages that trained it.
    """

    format_version: int
    architecture: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    short_names: tuple[str, ...]
    input: Input
    weights: Weights
    training: Training
    shipped: ShippedStage
    calibration: Calibration
    decision: Decision
    prediction_sets: PredictionSets | None
    abstention: Abstention
    test: Figures
    intended_use: str
    versions: dict[str, str]
