"""Results of stages on their test images, the source of tables and figures, and the options and labels of a report.

A result has all indices with intervals, at image level and at patient level, the calibration before and after
temperature scaling, and thresholds for a guaranteed sensitivity; temperature and thresholds are fitted on validation
images and applied unchanged to test images. Only results on the same test images may be compared in pairs.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pylorus.core.errors import PylorusError, check_fraction, format_suggestion
from pylorus.core.formatting import join_names
from pylorus.evaluation.calibration import (
    BINS,
    CalibrationEstimates,
    ReliabilityCurve,
    Temperature,
    estimate_calibration,
    fit_temperature,
    probabilities_of_logits,
    reliability_curve,
)
from pylorus.evaluation.comparison import RESAMPLES
from pylorus.evaluation.confusion import ClassMetric, confusion_matrix
from pylorus.evaluation.decisions import (
    ROUNDING,
    OperatingPoint,
    SensitivityThreshold,
    operating_point,
    threshold_at_sensitivity,
)
from pylorus.evaluation.discrimination import RankingEstimates, ranking_of_predictions
from pylorus.evaluation.index_intervals import (
    ClassProportions,
    IndexEstimates,
    Proportion,
    estimate_class_metric,
    indices_of_predictions,
    proportions_of_predictions,
)
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.predictions import Predictions, patient_level
from pylorus.runs.predictions import SavedPredictions
from pylorus.runs.reading import SavedRun, SavedStage

ONLY_STAGE = " only"
"""End of the name of a single stage in the label of a run."""
CONFIDENCE = 0.95
"""Coverage of every interval in a report."""

LEVEL = 0.05
"""Significance level: a difference is significant if its p-value is below it."""

IMAGES_PER_BIN, MIN_CURVE_BINS = 15, 3
"""A reliability diagram has at most `BINS` bins, fewer if they would hold fewer images than this, at least three."""

IMAGES, PATIENTS = "image-level", "patient-level"

INDICES = ("accuracy", "sensitivity", "specificity", "auroc")
"""Figures that can be compared with a margin."""
PUBLISHED = "published"
"""Word that stands for the results of the published study."""


@dataclass(frozen=True)
class Figure:
    """A given figure to compare with.

    Attributes:
        index: One of `INDICES`.
        text: The figure as it was typed.
        value: Its value, in (0, 1).
        counts: Successes and images behind it, whose own uncertainty then counts; None if only the value is given.
    """

    index: str
    text: str
    value: float
    counts: tuple[int, int] | None = None


def parse_figure(text: str) -> Figure | None:
    """Parse a figure such as `sensitivity=0.9` or `sensitivity=135/150`; None for `published`.

    Raises:
        PylorusError: If it has another form, or the value is not between 0 and 1.

    Example:
        >>> parse_figure("sensitivity=135/150").value
        0.9
    """
    if text.lower() == PUBLISHED:
        return None
    name, _, value = (part.strip() for part in text.partition("="))
    names = [index for index in INDICES if index.startswith(name.lower())] if name else []
    expected = "expected NAME=VALUE, such as sensitivity=0.9 or sensitivity=135/150, or the word published"
    if len(names) != 1 or not value:
        hint = format_suggestion(name, INDICES) if value else ""
        raise PylorusError(f'--against: found "{text}", {expected}. NAME is {join_names(INDICES, last="or")}.{hint}')
    try:
        if counted := re.fullmatch(r"(\d+)\s*/\s*(\d+)", value):
            counts = int(counted[1]), int(counted[2])
            figure = Figure(names[0], value, counts[0] / counts[1], counts)
        else:
            figure = Figure(names[0], value, float(value.replace(",", ".")))
    except (ValueError, ZeroDivisionError) as error:
        raise PylorusError(f'--against: found "{text}", {expected}.') from error
    if not 0 < figure.value < 1:
        meant = f" Did you mean {names[0]}={figure.value / 100:g}?" if 1 < figure.value < 100 else ""
        raise PylorusError(f"--against: found {text}, expected a value between 0 and 1.{meant}")
    if figure.counts and figure.index == "auroc":
        raise PylorusError(
            f"--against: found {text}, expected a single value, since an AUROC is no proportion of images."
        )
    return figure


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of a report; the defaults show no name and no image.

    Attributes:
        class_name: Short or full name of the class for which a threshold is fixed; None: the deciding class of the
            first run's configuration (deploy.class_name).
        sensitivity: True sensitivity that this threshold has to guarantee for new patients, in (0, 1]; None: that of
            the first run (deploy.sensitivity).
        guarantee: Confidence of this guarantee, in (0, 1); None: that of the first run (deploy.confidence).
        published: Whether to compare with the results of the published study.
        margin: Largest difference at which a model counts as no worse, in (0, 1), for tests of non-inferiority and
            equivalence; None: that of the runs (deploy.margin).
        reference: Label, model or folder of the run that the others are compared with by the margin; None: the one
            selected on validation images.
        against: Figures that the selected model is compared with by the margin, such as `sensitivity=0.9`,
            `sensitivity=135/150` or `published`.
        thumbnails: Whether to show the worst mistakes as small images.
        names: Whether to show file names, groups, folders and error messages, which may name patients.
        docx: Whether to write a draft of a manuscript as a Word file.
        latex: Whether to write a draft of a manuscript as LaTeX.
        resamples: Number of random exchanges of two models' predictions in tests of macro F1 and similar indices, >= 1.
        seed: Random seed of these exchanges and of permutation tests: the same seed gives the same report.

    Raises:
        PylorusError: If sensitivity is not in (0, 1], guarantee or margin is not in (0, 1), or a figure is not one.
    """

    class_name: str | None = None
    sensitivity: float | None = None
    guarantee: float | None = None
    published: bool = False
    margin: float | None = None
    reference: str | None = None
    against: tuple[str, ...] = ()
    thumbnails: bool = False
    names: bool = False
    docx: bool = False
    latex: bool = False
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sensitivity is not None and not 0 < self.sensitivity <= 1:
            raise PylorusError(
                f"--sensitivity: found {self.sensitivity:g}, expected a proportion in (0, 1], such as 0.95."
            )
        if self.guarantee is not None and not 0 < self.guarantee < 1:
            raise PylorusError(f"--guarantee: found {self.guarantee:g}, expected a proportion in (0, 1), such as 0.9.")
        check_fraction(self.margin, "--margin", example=0.05)
        _ = self.figures

    @property
    def figures(self) -> tuple[Figure | None, ...]:
        """The figures in `against`, each once; None for `published`."""
        return tuple(parse_figure(text) for text in dict.fromkeys(self.against))


def format_stage_label(label: str, stage: str) -> str:
    """Name a stage of a run, unless the label of the run says that it is the only one, or names an ensemble.

    Example:
        >>> format_stage_label("vgg19", "pretrain"), format_stage_label("vgg19 (pretrain only)", "pretrain")
        ('vgg19 pretrain', 'vgg19 (pretrain only)')
        >>> format_stage_label("ensemble of 3 vgg19", "ensemble")
        'ensemble of 3 vgg19'
    """
    return label if f"({stage}{ONLY_STAGE}" in label or label.startswith(f"{stage} of ") else f"{label} {stage}"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration of one stage.

    Attributes:
        temperature: Fitted on the validation images alone.
        validation: Predictions for the validation images after temperature scaling.
        test: Predictions for the test images after temperature scaling.
        uncalibrated: Predictions for the test images before temperature scaling.
        before: Calibration scores of the test images before temperature scaling.
        after: Calibration scores of the test images after temperature scaling.
        curve_before: Reliability curve of the test images before temperature scaling.
        curve_after: Reliability curve of the test images after temperature scaling.
    """

    temperature: Temperature
    validation: Predictions
    test: Predictions
    uncalibrated: Predictions
    before: CalibrationEstimates
    after: CalibrationEstimates
    curve_before: ReliabilityCurve
    curve_after: ReliabilityCurve


def calibrate_predictions(validation: SavedPredictions, test: SavedPredictions) -> Calibration:
    """Fit the temperature on validation images and apply it unchanged to test images."""
    temperature = fit_temperature(validation.logits, validation.predictions.true)
    calibrated = {
        split: replace(
            saved.predictions,
            probabilities=probabilities_of_logits(saved.logits, temperature=temperature.temperature),
        )
        for split, saved in (("validation", validation), ("test", test))
    }
    true, groups = test.predictions.true, test.clusters
    raw, tempered = test.predictions.probabilities, calibrated["test"].probabilities
    bins = min(BINS, max(MIN_CURVE_BINS, len(true) // IMAGES_PER_BIN))
    return Calibration(
        temperature=temperature,
        validation=calibrated["validation"],
        test=calibrated["test"],
        uncalibrated=test.predictions,
        before=estimate_calibration(raw, true, groups, confidence=CONFIDENCE),
        after=estimate_calibration(tempered, true, groups, confidence=CONFIDENCE),
        curve_before=reliability_curve(raw, true, groups, bins=bins, confidence=CONFIDENCE),
        curve_after=reliability_curve(tempered, true, groups, bins=bins, confidence=CONFIDENCE),
    )


@dataclass(frozen=True, eq=False)
class Level:
    """Performance of a set of predictions at one level.

    Attributes:
        name: `IMAGES` or `PATIENTS`.
        predictions: One row per image or per group.
        confusion: Counts of shape (classes, classes); rows are true, columns predicted.
        shares: Indices that are proportions, with Wilson intervals that allow for groups.
        indices: F1, balanced accuracy, macro averages, kappa and MCC, with intervals.
        ranking: AUROC and average precision, with intervals.
        left_out: Number of groups excluded because their images have several true classes; 0 at image level.
    """

    name: str
    predictions: Predictions
    confusion: NDArray[np.int64]
    shares: ClassProportions
    indices: IndexEstimates
    ranking: RankingEstimates
    left_out: int

    def estimate_metric(self, metric: ClassMetric) -> tuple[Estimate, ...]:
        """Return an index of each class with its interval, in the order of the classes."""
        for estimates in (self.shares, self.indices):
            if hasattr(estimates, metric.name):
                by_class: tuple[Estimate, ...] = getattr(estimates, metric.name)
                return by_class
        true, predicted, classes = self.predictions.true, self.predictions.predicted, self.predictions.classes
        groups = self.predictions.clusters if self.name == IMAGES else None
        return estimate_class_metric(metric, true, predicted, groups, classes=classes, confidence=CONFIDENCE)


def evaluate_images(predictions: Predictions) -> Level:
    """Evaluate predictions per image; intervals allow for images of one group."""
    return _evaluate_level(IMAGES, predictions, predictions.clusters, 0)


def group_by_patient(predictions: Predictions) -> tuple[Predictions, int] | None:
    """Reduce predictions to one row per group; None if no group has several images.

    Returns:
        The predictions, and the number of groups excluded because their images have several true classes. None also if
        all groups are excluded.
    """
    groups, images = np.unique(predictions.group, return_inverse=True)
    if len(groups) == len(predictions.true):
        return None
    lowest, highest = np.full(len(groups), predictions.classes), np.full(len(groups), -1)
    np.minimum.at(lowest, images, predictions.true)
    np.maximum.at(highest, images, predictions.true)
    if (lowest < highest).all():
        return None
    patients = patient_level(predictions, leave_out_mixed=True)
    return patients.predictions, len(patients.left_out)


def evaluate_patients(predictions: Predictions) -> Level | None:
    """Evaluate predictions per patient, by the mean of its images; None if that equals image level or is undefined."""
    patients = group_by_patient(predictions)
    return None if patients is None else _evaluate_level(PATIENTS, patients[0], None, patients[1])


def _evaluate_level(
    name: str,
    predictions: Predictions,
    groups: NDArray[np.generic] | None,
    left_out: int,
) -> Level:
    true, predicted, classes = predictions.true, predictions.predicted, predictions.classes
    return Level(
        name=name,
        predictions=predictions,
        confusion=confusion_matrix(true, predicted, classes),
        shares=proportions_of_predictions(true, predicted, groups, classes=classes, confidence=CONFIDENCE),
        indices=indices_of_predictions(true, predicted, groups, classes=classes, confidence=CONFIDENCE),
        ranking=ranking_of_predictions(true, predictions.probabilities, groups, confidence=CONFIDENCE),
        left_out=left_out,
    )


@dataclass(frozen=True)
class SensitivityTarget:
    """Sensitivity that a threshold has to guarantee for new patients.

    Attributes:
        sensitivity: Minimum true sensitivity, in (0, 1].
        confidence: Confidence of the guarantee, in (0, 1).
    """

    sensitivity: float
    confidence: float


@dataclass(frozen=True)
class ThresholdResult:
    """Performance of a decision threshold for one class.

    Attributes:
        level: `image-level` or `patient-level`.
        class_name: Class that counts as positive.
        fixed: The threshold, and the sensitivity that it guarantees for new patients.
        test: Its performance on the test images, without any adjustment.
    """

    level: str
    class_name: str
    fixed: SensitivityThreshold
    test: OperatingPoint


def compute_operating_points(
    calibration: Calibration, *, class_name: str, target: SensitivityTarget
) -> tuple[ThresholdResult, ...]:
    """Determine thresholds of the calibrated probability per image and, if groups have several images, per patient.

    Returns:
        One per level; empty if no validation image is of the class, so that no threshold can be fixed.
    """
    points = [_compute_operating_point(IMAGES, calibration.validation, calibration.test, class_name, target)]
    validation, test = group_by_patient(calibration.validation), group_by_patient(calibration.test)
    if validation is not None and test is not None:
        points.append(_compute_operating_point(PATIENTS, validation[0], test[0], class_name, target))
    return tuple(point for point in points if point is not None)


def _compute_operating_point(
    level: str, validation: Predictions, test: Predictions, class_name: str, target: SensitivityTarget
) -> ThresholdResult | None:
    column = validation.class_names.index(class_name)
    positive = validation.true == column
    if not positive.any():
        return None
    fixed = threshold_at_sensitivity(
        positive,
        validation.probabilities[:, column],
        validation.group,
        sensitivity=target.sensitivity,
        confidence=target.confidence,
        margin=ROUNDING,
    )
    point = operating_point(
        test.true == column,
        test.probabilities[:, column],
        test.clusters,
        threshold=fixed.threshold,
        confidence=CONFIDENCE,
    )
    return ThresholdResult(level, class_name, fixed, point)


@dataclass(frozen=True, eq=False)
class Result:
    """Performance of one stage of a run.

    Attributes:
        run: The run.
        stage: The stage.
        test: Predictions for the test images with the probabilities of the bundle, that is calibrated if there are
            validation predictions.
        images: Indices at image level.
        patients: Indices at patient level; None if no group has several images.
        validation_accuracy: Accuracy on the validation images, by which models are selected; None without validation
            predictions.
        calibration: Calibration; None without validation predictions.
        operating: Thresholds, one per level; empty if none can be fixed.
    """

    run: SavedRun
    stage: SavedStage
    test: SavedPredictions
    images: Level
    patients: Level | None
    validation_accuracy: Proportion | None
    calibration: Calibration | None
    operating: tuple[ThresholdResult, ...]

    @property
    def label(self) -> str:
        """Run and stage as named in tables and figures."""
        return format_stage_label(self.run.label, self.stage.name)

    @property
    def is_shipped(self) -> bool:
        """Whether this is the shipped stage of its run; see `SavedRun.shipped`."""
        return self.run.bundle_stage is not None and self.stage.name == self.run.bundle_stage.name

    @property
    def split(self) -> str:
        """Short hash of the split, as cited in tables."""
        assert self.run.split is not None  # predictions are only read with a split
        return self.run.split.short_hash

    @property
    def levels(self) -> tuple[Level, ...]:
        """Image level and, if available, patient level."""
        return (self.images,) if self.patients is None else (self.images, self.patients)


def compute_results(run: SavedRun, *, class_name: str | None, target: SensitivityTarget) -> tuple[Result, ...]:
    """Compute one result per stage with test predictions.

    Args:
        run: The run.
        class_name: Short name of the class for which a threshold is fixed; there is no threshold if the run lacks it.
        target: Sensitivity that this threshold has to guarantee.
    """
    return tuple(
        _compute_result(run, stage, stage.test, class_name, target) for stage in run.stages if stage.test is not None
    )


def _compute_result(
    run: SavedRun,
    stage: SavedStage,
    test: SavedPredictions,
    class_name: str | None,
    target: SensitivityTarget,
) -> Result:
    validation = stage.validation
    calibration = None if validation is None else calibrate_predictions(validation, test)
    if calibration is not None:
        test = replace(test, predictions=calibration.test)
    operating: tuple[ThresholdResult, ...] = ()
    if calibration is not None and class_name in test.predictions.class_names:
        operating = compute_operating_points(calibration, class_name=str(class_name), target=target)
    return Result(
        run=run,
        stage=stage,
        test=test,
        images=evaluate_images(test.predictions),
        patients=evaluate_patients(test.predictions),
        validation_accuracy=None if validation is None else validation.accuracy,
        calibration=calibration,
        operating=operating,
    )


@dataclass(frozen=True, eq=False)
class ComparableResults:
    """Results on one test set.

    Attributes:
        results: At least one, in the order of runs and stages.
    """

    results: tuple[Result, ...]

    @property
    def candidates(self) -> tuple[Result, ...]:
        """Results among which a winner is chosen: the shipped stage of each run, or the stages of a single run."""
        shipped = tuple(result for result in self.results if result.is_shipped)
        return shipped if len(shipped) > 1 else self.results

    @property
    def runs(self) -> list[str]:
        """Labels of the runs."""
        return list(dict.fromkeys(result.run.label for result in self.results))


def group_by_test_set(results: Sequence[Result]) -> tuple[ComparableResults, ...]:
    """Group results that have the same test images, true classes, groups and class names."""
    by_test: dict[str, list[Result]] = {}
    for result in results:
        by_test.setdefault(compute_test_hash(result), []).append(result)
    return tuple(ComparableResults(tuple(group)) for group in by_test.values())


@lru_cache(maxsize=512)
def compute_test_hash(result: Result) -> str:
    """Return a hash of the test images of a result, their true classes, groups and class names."""
    table = result.test.predictions
    order = np.argsort(table.sample)
    classes = np.array(table.class_names)[table.true[order]]
    columns = (table.sample[order], classes, np.asarray(table.group)[order], np.array(sorted(table.class_names)))
    return hashlib.sha256("\n".join("\t".join(map(str, column.tolist())) for column in columns).encode()).hexdigest()
