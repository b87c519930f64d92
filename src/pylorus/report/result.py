"""One stage of one run on its test images: what tables and figures are made of."""

from dataclasses import dataclass, replace

import numpy as np

from pylorus.evaluation.proportion import Proportion, proportions_of_predictions
from pylorus.report.calibrated import Calibration, calibrate
from pylorus.report.level import Level, image_level, patients_level
from pylorus.report.operating import Aim, Operating, operating_points
from pylorus.report.options import CONFIDENCE, ReportOptions
from pylorus.report.saved_predictions import SavedPredictions
from pylorus.report.saved_run import SavedRun, SavedStage


@dataclass(frozen=True, eq=False)
class Result:
    """What a stage of a run is worth.

    Attributes:
        run: The run.
        stage: The stage.
        test: What it said of the test images, with the probabilities that its bundle gives: calibrated, where there
            are validation predictions to calibrate by.
        images: Its indices at image level.
        patients: Its indices at patient level; None where no group holds several images.
        validation_accuracy: By which our own choice of a model is made; None without validation predictions.
        calibration: None without validation predictions.
        operating: Thresholds, one a level; none where nothing can be fixed.
    """

    run: SavedRun
    stage: SavedStage
    test: SavedPredictions
    images: Level
    patients: Level | None
    validation_accuracy: Proportion | None
    calibration: Calibration | None
    operating: tuple[Operating, ...]

    @property
    def label(self) -> str:
        """Run and stage, as tables and figures call them."""
        return f"{self.run.label} {self.stage.name}"

    @property
    def is_shipped(self) -> bool:
        """Whether it stands for its run; see `SavedRun.shipped`."""
        return self.run.shipped is not None and self.stage.name == self.run.shipped.name

    @property
    def split(self) -> str:
        """The split's hash, as tables cite it."""
        assert self.run.split is not None  # no predictions without a split
        return self.run.split.cited

    @property
    def levels(self) -> tuple[Level, ...]:
        """Image level and, where there is one, patient level."""
        return (self.images,) if self.patients is None else (self.images, self.patients)


def results_of(run: SavedRun, *, class_name: str | None, aim: Aim, options: ReportOptions) -> tuple[Result, ...]:
    """One result for each stage that the run finished.

    Args:
        run: The run.
        class_name: The class that a threshold is fixed for; None where the run does not know it.
        aim: What that threshold is to guarantee.
        options: Resamples and seed.
    """
    return tuple(
        _result(run, stage, stage.test, class_name, aim, options) for stage in run.stages if stage.test is not None
    )


def _result(
    run: SavedRun, stage: SavedStage, test: SavedPredictions, class_name: str | None, aim: Aim, options: ReportOptions
) -> Result:
    validation = stage.validation
    calibration = None if validation is None else calibrate(validation, test)
    if calibration is not None:
        test = replace(test, predictions=calibration.test)
    operating: tuple[Operating, ...] = ()
    if calibration is not None and class_name in test.predictions.class_names:
        operating = operating_points(calibration, class_name=str(class_name), aim=aim)
    return Result(
        run=run,
        stage=stage,
        test=test,
        images=image_level(test.predictions),
        patients=patients_level(test.predictions),
        validation_accuracy=None if validation is None else _accuracy(validation),
        calibration=calibration,
        operating=operating,
    )


def _accuracy(saved: SavedPredictions) -> Proportion:
    said = saved.predictions
    found = proportions_of_predictions(
        said.true, np.asarray(said.predicted), saved.clusters, classes=said.classes, confidence=CONFIDENCE
    )
    return found.accuracy
