"""Threshold for one class, fixed on validation images for a guaranteed sensitivity and applied to test images."""

from dataclasses import dataclass

from pylorus.evaluation.decisions import (
    ROUNDING,
    OperatingPoint,
    SensitivityThreshold,
    operating_point,
    threshold_at_sensitivity,
)
from pylorus.evaluation.predictions import Predictions
from pylorus.report.calibrated import Calibration
from pylorus.report.level import IMAGES, PATIENTS, group_by_patient
from pylorus.report.options import CONFIDENCE


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
    calibration: Calibration, *, class_name: str, aim: SensitivityTarget
) -> tuple[ThresholdResult, ...]:
    """Determine thresholds of the calibrated probability per image and, if groups have several images, per patient.

    Returns:
        One per level; empty if no validation image is of the class, so that no threshold can be fixed.
    """
    points = [_compute_operating_point(IMAGES, calibration.validation, calibration.test, class_name, aim)]
    validation, test = group_by_patient(calibration.validation), group_by_patient(calibration.test)
    if validation is not None and test is not None:
        points.append(_compute_operating_point(PATIENTS, validation[0], test[0], class_name, aim))
    return tuple(point for point in points if point is not None)


def _compute_operating_point(
    level: str, validation: Predictions, test: Predictions, class_name: str, aim: SensitivityTarget
) -> ThresholdResult | None:
    column = validation.class_names.index(class_name)
    positive = validation.true == column
    if not positive.any():
        return None
    fixed = threshold_at_sensitivity(
        positive,
        validation.probabilities[:, column],
        validation.group,
        sensitivity=aim.sensitivity,
        confidence=aim.confidence,
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
