"""Results of one stage of one run on its test images: the source of tables and figures."""

from dataclasses import dataclass, replace

import numpy as np

from pylorus.evaluation.proportion import Proportion, proportions_of_predictions
from pylorus.report.calibrated import Calibration, calibrate_predictions
from pylorus.report.level import Level, evaluate_images, evaluate_patients
from pylorus.report.operating import SensitivityTarget, ThresholdResult, compute_operating_points
from pylorus.report.options import CONFIDENCE, ReportOptions
from pylorus.report.saved_predictions import SavedPredictions
from pylorus.report.saved_run import SavedRun, SavedStage


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
        return f"{self.run.label} {self.stage.name}"

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


def compute_results(
    run: SavedRun, *, class_name: str | None, aim: SensitivityTarget, options: ReportOptions
) -> tuple[Result, ...]:
    """Compute one result per stage with test predictions.

    Args:
        run: The run.
        class_name: Short name of the class for which a threshold is fixed; there is no threshold if the run lacks it.
        aim: Sensitivity that this threshold has to guarantee.
        options: Options of the report.
    """
    return tuple(
        _compute_result(run, stage, stage.test, class_name, aim, options)
        for stage in run.stages
        if stage.test is not None
    )


def _compute_result(
    run: SavedRun,
    stage: SavedStage,
    test: SavedPredictions,
    class_name: str | None,
    aim: SensitivityTarget,
    options: ReportOptions,
) -> Result:
    validation = stage.validation
    calibration = None if validation is None else calibrate_predictions(validation, test)
    if calibration is not None:
        test = replace(test, predictions=calibration.test)
    operating: tuple[ThresholdResult, ...] = ()
    if calibration is not None and class_name in test.predictions.class_names:
        operating = compute_operating_points(calibration, class_name=str(class_name), aim=aim)
    return Result(
        run=run,
        stage=stage,
        test=test,
        images=evaluate_images(test.predictions),
        patients=evaluate_patients(test.predictions),
        validation_accuracy=None if validation is None else _compute_accuracy(validation),
        calibration=calibration,
        operating=operating,
    )


def _compute_accuracy(saved: SavedPredictions) -> Proportion:
    table = saved.predictions
    proportions = proportions_of_predictions(
        table.true, np.asarray(table.predicted), saved.clusters, classes=table.classes, confidence=CONFIDENCE
    )
    return proportions.accuracy
