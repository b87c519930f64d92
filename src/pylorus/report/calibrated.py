"""Temperature scaling fitted on validation images, and the calibration of the test images before and after it."""

from dataclasses import dataclass, replace

from pylorus.evaluation.calibration import (
    CalibrationEstimates,
    Temperature,
    estimate_calibration,
    fit_temperature,
    probabilities_of_logits,
)
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.reliability import ReliabilityCurve, reliability_curve
from pylorus.report.options import CONFIDENCE
from pylorus.report.saved_predictions import SavedPredictions


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
    return Calibration(
        temperature=temperature,
        validation=calibrated["validation"],
        test=calibrated["test"],
        uncalibrated=test.predictions,
        before=estimate_calibration(raw, true, groups, confidence=CONFIDENCE),
        after=estimate_calibration(tempered, true, groups, confidence=CONFIDENCE),
        curve_before=reliability_curve(raw, true, groups, confidence=CONFIDENCE),
        curve_after=reliability_curve(tempered, true, groups, confidence=CONFIDENCE),
    )
