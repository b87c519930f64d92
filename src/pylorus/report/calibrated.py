"""A temperature fitted on validation images, and how calibrated the test images are before and after it."""

from dataclasses import dataclass, replace

from pylorus.evaluation.calibration import (
    CalibrationScores,
    Temperature,
    calibration_scores,
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
        before: Scores of the test images as the network gave them.
        after: Scores at the temperature.
        curve_before: Their reliability curve.
        curve_after: The same at the temperature.
    """

    temperature: Temperature
    validation: Predictions
    test: Predictions
    before: CalibrationScores
    after: CalibrationScores
    curve_before: ReliabilityCurve
    curve_after: ReliabilityCurve


def calibrate(validation: SavedPredictions, test: SavedPredictions) -> Calibration:
    """Fits the temperature on validation images and applies it, untouched, to test images."""
    fitted = fit_temperature(validation.logits, validation.predictions.true)
    tempered = {
        part: replace(
            saved.predictions,
            probabilities=probabilities_of_logits(saved.logits, temperature=fitted.temperature),
        )
        for part, saved in (("validation", validation), ("test", test))
    }
    true, groups = test.predictions.true, test.clusters
    raw, mended = test.predictions.probabilities, tempered["test"].probabilities
    return Calibration(
        temperature=fitted,
        validation=tempered["validation"],
        test=tempered["test"],
        before=calibration_scores(raw, true),
        after=calibration_scores(mended, true),
        curve_before=reliability_curve(raw, true, groups, confidence=CONFIDENCE),
        curve_after=reliability_curve(mended, true, groups, confidence=CONFIDENCE),
    )
