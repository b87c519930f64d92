"""The content of model.json: everything needed to use a trained network, and its performance."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config

from pylorus.data.input_format import InputFormat, stack_formats
from pylorus.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE
from pylorus.evaluation.decisions import SensitivityThreshold, SetLimits
from pylorus.evaluation.drift import RateReference, ScoreReference
from pylorus.runs.folder import ShippedStage

FORMAT_VERSION = 2
"""Raised whenever an older Pylorus could not read what a newer one writes. Since version 2, thresholds have guarantees
and the shipped stage is the one with the best validation performance."""
ENSEMBLE_VERSION = 3
"""The version of an ensemble, which an older Pylorus can't read; a bundle of one network still has `FORMAT_VERSION`."""
MAX_MEMBERS = 64  # networks of an ensemble
OUT_OF_FOLD = "out-of-fold"
"""Value of `Training.validated_on` if thresholds were measured on images of which each was held out by some members."""
LARGEST_SIZE = 2048
"""The largest side of the network's input, in pixels."""
Proportion = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
INTENDED_USE = "Research use only. Not a medical device."


@dataclass(frozen=True)
class IntervalEstimate:
    """A proportion, area or mean with its 95 % confidence interval; null where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class InputSpecification:
    """How an image file is turned into the network's input.

    Attributes:
        size: Side of the square input in pixels.
        crop: none or auto; see `pylorus.data.input_format`.
        fit: pad, stretch or crop.
        interpolation: Interpolation of the resize.
        mean: Value subtracted from each channel of pixels in [0, 1].
        std: Value by which each channel is then divided.
        policy: Version of the rules for decoding and resizing in `pylorus.data.decode`.
        mask: none or overlays; see `pylorus.data.input_format`. Bundles from before it existed do not have it.
        finder: Version of the field finder that `crop` used; bundles from before there were several do not have it.
    """

    size: int = field(metadata={"ge": 1, "le": LARGEST_SIZE})
    crop: str
    fit: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    policy: int
    mask: str = "none"
    finder: int = 1

    @property
    def form(self) -> InputFormat:
        """The reader that turns files into pixels, in training and prediction alike."""
        return InputFormat(self.size, self.fit, self.interpolation, self.crop, self.mask, self.policy, self.finder)


@dataclass(frozen=True)
class Weights:
    """The initial weights of the training.

    Attributes:
        source: hub, none (random weights) or the name of a file.
        sha256: SHA-256 of the weights file; null for random weights.
        licence: Licence of these weights; null if unknown.
        accepted_licence: The same licence, if it limits passing on and whoever made or exported the model accepted it;
            otherwise null.
    """

    source: str = field(metadata={"alias": "from"})
    sha256: str | None
    licence: str | None
    accepted_licence: str | None = None


@dataclass(frozen=True)
class StageSummary:
    """A training stage.

    Attributes:
        name: Name of the stage.
        learn: Which layers were trained.
        epochs: Number of epochs that were run.
        best_epoch: The epoch whose weights were used, counted from 1.
        averaging: Of what these weights are the average; "": they are those of its last step.
    """

    name: str
    learn: str
    epochs: Count
    best_epoch: Count
    averaging: str = ""


@dataclass(frozen=True)
class Training:
    """How and on what the network was trained.

    Attributes:
        stages: The stages that led to this network, in order; the shipped one is the last. None of an ensemble.
        seed: The run's random seed.
        precision: 32, bf16 or 16.
        data: folders, manifest, shards or synthetic.
        images: Number of images of each class in each split, in the order of the classes.
        grouped: Whether all images of a patient are in the same split.
        split_sha256: SHA-256 of split.csv.
        validated_on: val; test, in which case all results are optimistic; or, for an ensemble, `OUT_OF_FOLD`.
        loss: What training minimized; a bundle from before this entry minimized cross-entropy.
    """

    stages: tuple[StageSummary, ...]
    seed: int
    precision: str
    data: str
    images: dict[str, tuple[Count, ...]]
    grouped: bool
    split_sha256: str
    validated_on: str
    loss: str = "cross-entropy"


@dataclass(frozen=True)
class Calibration:
    """A temperature fitted on validation images, and the calibration error on the test images.

    Attributes:
        temperature: The logits are divided by it.
        identified: Whether the validation images determine a temperature; otherwise it is 1.
        images: Number of images on which it was fitted.
        ece_before: Expected calibration error on the test images without temperature scaling, in [0, 1].
        ece_after: Expected calibration error with temperature scaling.
        bias: Added to the divided logits, one for each class; empty: nothing is added. See `pylorus recalibrate`.
    """

    temperature: float = field(metadata={"ge": MIN_TEMPERATURE, "le": MAX_TEMPERATURE})
    identified: bool
    images: Count
    ece_before: float
    ece_after: float
    bias: tuple[Annotated[float, Field(ge=-100, le=100)], ...] = ()


@dataclass(frozen=True)
class OperatingMetrics:
    """Performance of a class's threshold on the test images."""

    sensitivity: IntervalEstimate
    specificity: IntervalEstimate


@dataclass(frozen=True)
class Guarantee:
    """What a threshold guarantees for new patients; see `pylorus.evaluation.decisions.SensitivityThreshold`.

    Attributes:
        confidence_reached: The confidence with which the true sensitivity is at least the requested one, in [0, 1].
        sensitivity_reached: The highest sensitivity that is guaranteed at the requested confidence, in [0, 1].
        images: Number of validation images of the class.
        patients: Number of patients (groups) with these images.
    """

    confidence_reached: Proportion
    sensitivity_reached: Proportion
    images: Count
    patients: Count


@dataclass(frozen=True)
class Decision:
    """When an image is called positive for a class.

    Attributes:
        class_name: Short name of the class that decides unless another one is requested.
        sensitivity: The sensitivity that the thresholds should guarantee, in [0, 1].
        confidence: The confidence with which they should guarantee it; null in a bundle of format 1, whose thresholds
            reach the sensitivity on the validation images and guarantee nothing.
        patients_needed: How many positive validation patients that takes; null if no number is sufficient.
        thresholds: Thresholds of the calibrated probability by short name; null if no validation image is of the class.
        guarantees: What they guarantee, by short name; null if there is no threshold, and in a bundle of format 1.
        test: Their performance on the test images, by short name.
    """

    class_name: str = field(metadata={"alias": "class"})
    sensitivity: Proportion
    confidence: Proportion | None
    patients_needed: Count | None
    thresholds: dict[str, Proportion | None]
    guarantees: dict[str, Guarantee | None]
    test: dict[str, OperatingMetrics]

    def get_threshold(self, name: str) -> SensitivityThreshold | None:
        """Return the threshold of a class with its guarantee, or None if nothing is guaranteed."""
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
class SetMetrics:
    """Performance of prediction sets on some images; each patient is weighted equally, as in their calibration.

    Attributes:
        coverage: Proportion of each class's images whose set contains that class, by short name.
        size: Mean number of classes in a set.
    """

    coverage: dict[str, IntervalEstimate]
    size: IntervalEstimate


@dataclass(frozen=True)
class PredictionSets:
    """The probability from which a class is in an image's prediction set.

    Attributes:
        coverage: Proportion of each class's images, of new patients, whose set should contain that class, in (0, 1).
        lowest: The lowest calibrated probability with which a class is in the set, by short name; null if there are
            too few validation patients of the class, which is then in every set.
        patients: Number of validation patients (groups) of each class used for calibration, by short name.
        patients_needed: How many of them it takes before a set can leave a class out.
        test: Performance of the sets on the test images.
    """

    coverage: Proportion
    lowest: dict[str, Proportion | None]
    patients: dict[str, Count]
    patients_needed: Count
    test: SetMetrics

    def get_limits(self, names: tuple[str, ...]) -> SetLimits:
        """Return the limits of the classes in the order of these short names."""
        return SetLimits(
            self.coverage, tuple(self.lowest[name] for name in names), tuple(self.patients[name] for name in names)
        )


@dataclass(frozen=True)
class FalseAlarmGuarantee:
    """What the threshold for out-of-distribution images guarantees for an image of a new patient.

    Attributes:
        confidence: The requested confidence, in (0, 1).
        confidence_reached: The confidence with which the proportion of false alarms is at most the requested one.
        proportion_reached: The lowest proportion of false alarms that is guaranteed at the requested confidence.
        images: Number of validation images.
        patients: Number of patients (groups) with these images.
        patients_needed: How many patients the requested proportion needs; null if no number is sufficient.
    """

    confidence: Proportion
    confidence_reached: Proportion
    proportion_reached: Proportion
    images: Count
    patients: Count
    patients_needed: Count | None


@dataclass(frozen=True)
class Abstention:
    """When the model abstains.

    Attributes:
        method: The measure of distance from the training images.
        unlike_above: Above this distance an image counts as out-of-distribution and the model abstains.
        unsure_below: Below this calibrated probability of the most probable class the model abstains as uncertain.
        false_alarms: Proportion of validation images on which each threshold makes the model abstain at most.
        images: Number of training images from which the class means were computed.
        unlike_test: Proportion of test images flagged as out-of-distribution: the false-alarm rate.
        unsure_test: Proportion of correctly classified test images flagged as uncertain.
        answered_test: Proportion of test images on which the model does not abstain.
        accuracy_answered: Accuracy on these.
        guarantee: What the threshold for out-of-distribution images guarantees; null in an older bundle.
    """

    method: str
    unlike_above: float = field(metadata={"ge": 0, "le": 2})
    unsure_below: Proportion
    false_alarms: float
    images: Count
    unlike_test: IntervalEstimate
    unsure_test: IntervalEstimate
    answered_test: IntervalEstimate
    accuracy_answered: IntervalEstimate
    guarantee: FalseAlarmGuarantee | None = None

    @property
    def promised_false_alarms(self) -> float:
        """The proportion of images like the validation images that are called out-of-distribution at most."""
        reached = 0.0 if self.guarantee is None else self.guarantee.proportion_reached
        return max(self.false_alarms, reached)


@dataclass(frozen=True)
class FingerprintSummary:
    """What fingerprints of the training and validation images the bundle carries; see `pylorus.deploy.fingerprints`.

    Attributes:
        version: Version of the code that computed them.
        images: Number of images.
        compared: Number of images with enough structure that near copies are recognized.
    """

    version: Count
    images: Count
    compared: Count


@dataclass(frozen=True)
class ClassificationMetrics:
    """Performance of the model on some images, without abstentions.

    Attributes:
        images: Number of images.
        groups: Number of groups (patients); intervals keep a group's images together.
        accuracy: Proportion classified correctly.
        sensitivity: Sensitivity of each class, by short name.
        specificity: Specificity of each class, by short name.
        precision: Precision of each class, by short name.
        auroc: Area under the ROC curve of each class against the rest, by short name.
        balanced_accuracy: Mean sensitivity of the classes; null in an older bundle.
        macro_auroc: Mean AUROC of the classes; null in an older bundle.
    """

    images: Count
    groups: Count
    accuracy: IntervalEstimate
    sensitivity: dict[str, IntervalEstimate]
    specificity: dict[str, IntervalEstimate]
    precision: dict[str, IntervalEstimate]
    auroc: dict[str, IntervalEstimate]
    balanced_accuracy: IntervalEstimate | None = None
    macro_auroc: IntervalEstimate | None = None


@dataclass(frozen=True)
class RecalibrationRecord:
    """How a bundle was recalibrated on images of another clinic; see `pylorus recalibrate`.

    Attributes:
        parent: Identity of the bundle that it was made from: the SHA-256 of that bundle's SHA256SUMS.
        date: Day of the recalibration, such as 2026-11-27.
        images: Number of images of each class, in the order of the classes.
        groups: Number of groups (patients).
        scale: By what the parent's calibrated logits were multiplied.
        bias: What was then added for each class, by short name.
        log_loss: Mean log loss of the parent's probabilities (before) and of the new ones by cross-validation (after).
        brier: Brier scores of both.
        observed_over_expected: Observed number of images of a class over the sum of its probabilities, of both, by
            short name.
    """

    parent: str
    date: str
    images: tuple[Count, ...]
    groups: Count
    scale: IntervalEstimate
    bias: dict[str, IntervalEstimate]
    log_loss: dict[str, float]
    brier: dict[str, float]
    observed_over_expected: dict[str, dict[str, float]]


@dataclass(frozen=True)
class UsageReference:
    """What the model answers on the reference images, and how they look, for `pylorus monitor`.

    Attributes:
        split: The images: test (the run's), or recalibration (those of `pylorus recalibrate`).
        images: Number of images.
        groups: Number of groups (patients).
        rates: Proportions of images, by the names of `pylorus.deploy.thresholds.Answers`.
        scores: Distributions of scores, by their names.
    """

    split: str
    images: Count
    groups: Count
    rates: dict[str, RateReference]
    scores: dict[str, ScoreReference]


@dataclass(frozen=True)
class Member:
    """A network of an ensemble, and what it was as the model of its run.

    Attributes:
        bundle: Identity of its run's bundle: the SHA-256 of that bundle's SHA256SUMS.
        architecture: See `Description`.
        arguments: See `Description`.
        network: See `Description`.
        fold: Number of the fold that its run was tested on; null if it was none, or has another name.
        accuracy: Accuracy on its run's test images.
    """

    bundle: str
    architecture: str
    arguments: dict[str, Any]
    network: str | None
    input: InputSpecification
    weights: Weights
    training: Training
    shipped: ShippedStage
    calibration: Calibration
    fold: int | None
    accuracy: IntervalEstimate


@dataclass(frozen=True)
class Gain:
    """What averaging gains on the same images: scores of the ensemble minus those of one network.

    Attributes:
        best: Index of the member that is best on the validation images; null: the mean over the members that voted.
        accuracy: Difference of accuracies; above 0 is better.
        balanced_accuracy: Difference of mean sensitivities of the classes.
        brier: Difference of Brier scores; below 0 is better.
        log_loss: Difference of mean log losses, in nats.
    """

    best: Count | None
    accuracy: IntervalEstimate
    balanced_accuracy: IntervalEstimate
    brier: IntervalEstimate
    log_loss: IntervalEstimate


@dataclass(frozen=True)
class EnsembleCost:
    """What an ensemble costs.

    Attributes:
        parameters: Of all networks.
        bytes: Of their weights and buffers.
        milliseconds: Time for one image in a batch, on the device that made the ensemble.
        times_member: That time relative to the mean of its members.
        device: That device.
    """

    parameters: Count
    bytes: Count
    milliseconds: float
    times_member: float
    device: str


@dataclass(frozen=True)
class Ensemble:
    """The networks of an ensemble, whose logits are those of the mean probability, and how it was measured.

    Attributes:
        members: The networks.
        voters: Fewest and most members that voted on an image on which thresholds or results were measured.
        left_out: Number of test images of its members on which no member may vote.
        gain_images: Number of images on which the gain was measured; 0 if no image has two votes.
        gains: What averaging gains, against the best member and against their mean; empty if it is not known.
        cost: What it costs.
    """

    members: tuple[Member, ...]
    voters: tuple[Count, Count]
    left_out: Count
    gain_images: Count
    gains: tuple[Gain, ...]
    cost: EnsembleCost


@with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
@dataclass(frozen=True)
class Description:
    """The whole content of model.json.

    Attributes:
        format_version: See `FORMAT_VERSION`.
        architecture: Name of the model in timm, or of the user's own network.
        arguments: Further arguments of timm.create_model, as plain values.
        classes: Names of the classes in the order of the logits.
        short_names: Short names of the classes in the same order.
        shipped: The stage of the run whose network this is, and how it was chosen.
        prediction_sets: Null if the run did not request them.
        test: Performance on the run's test images.
        versions: Versions of the packages used for training.
        network: The user's own class or function that built the network, as a dotted path: for messages, never
            imported. Null for a model of timm.
        reference: What the model answers on the run's test images; null in an older bundle.
        recalibration: Null if the calibration is that of the run.
        fingerprints: Fingerprints of the training and validation images; null, or no such entry, if there are none.
        ensemble: The networks whose probabilities are averaged; null, or no such entry, for a single network.
    """

    format_version: int
    architecture: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    short_names: tuple[str, ...]
    input: InputSpecification
    weights: Weights
    training: Training
    shipped: ShippedStage
    calibration: Calibration
    decision: Decision
    prediction_sets: PredictionSets | None
    abstention: Abstention
    test: ClassificationMetrics
    intended_use: str
    versions: dict[str, str]
    network: str | None = None
    reference: UsageReference | None = None
    recalibration: RecalibrationRecord | None = None
    fingerprints: FingerprintSummary | None = None
    ensemble: Ensemble | None = None

    @property
    def form(self) -> InputFormat:
        """How an image file is turned into the input of its network, or of all of them."""
        return stack_formats([each.input.form for each in self.list_networks()])

    def list_networks(self) -> tuple["Description", ...]:
        """Return a description of each network of an ensemble, otherwise this one.

        Such a description holds the architecture, the input, the training and the calibration of that network.
        """
        if self.ensemble is None:
            return (self,)
        names = ("architecture", "arguments", "network", "input", "weights", "training", "shipped", "calibration")
        return tuple(
            replace(self, ensemble=None, **{name: getattr(member, name) for name in names})
            for member in self.ensemble.members
        )
