"""A temperature fitted on validation images, and how calibrated the test images are before and after it."""

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
        validation: Their predictions at that temperature.
        test: The test images' predictions at that temperature.
        uncalibrated: Their predictions as the network gave them.
        before: Scores of these.
        after: Scores at the temperature.
        curve_before: Their reliability curve.
        curve_after: The same at the temperature.
    """

    temperature: Temperature
    validation: Predictions
    test: Predictions
    uncalibrated: Predictions
    before: CalibrationEstimates
    after: CalibrationEstimates
    curve_before: ReliabilityCurve
    curve_after: ReliabilityCurve


def calibrate(validation: SavedPredictions, test: SavedPredictions) -> Calibration:
    """Fit the temperature on validation images and apply it, untouched, to test images."""
    fitted = fit_temperature(validation.logits, validation.predictions.true)
    calibrated = {
        part: replace(
            saved.predictions,
            probabilities=probabilities_of_logits(saved.logits, temperature=fitted.temperature),
        )
        for part, saved in (("validation", validation), ("test", test))
    }
    true, groups = test.predictions.true, test.clusters
    raw, tempered = test.predictions.probabilities, calibrated["test"].probabilities
    return Calibration(
        temperature=fitted,
        validation=calibrated["validation"],
        test=calibrated["test"],
        uncalibrated=test.predictions,
        before=estimate_calibration(raw, true, groups, confidence=CONFIDENCE),
        after=estimate_calibration(tempered, true, groups, confidence=CONFIDENCE),
        curve_before=reliability_curve(raw, true, groups, confidence=CONFIDENCE),
        curve_after=reliability_curve(tempered, true, groups, confidence=CONFIDENCE),
    )
