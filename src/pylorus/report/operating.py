"""A threshold for one class, fixed on validation images for a guaranteed sensitivity and applied to test images."""

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
from pylorus.report.level import IMAGES, PATIENTS, patients_of
from pylorus.report.options import CONFIDENCE


@dataclass(frozen=True)
class Aim:
    """What a threshold is to guarantee for new patients.

    Attributes:
        sensitivity: In (0, 1].
        confidence: In (0, 1).
    """

    sensitivity: float
    confidence: float


@dataclass(frozen=True)
class Operating:
    """What calling an image (or a patient) positive at a threshold gives.

    Attributes:
        level: `image-level` or `patient-level`.
        class_name: The class that is called.
        fixed: The threshold, and what it guarantees of the sensitivity for new patients.
        test: What it gives on the test images, untouched.
    """

    level: str
    class_name: str
    fixed: SensitivityThreshold
    test: OperatingPoint


def operating_points(calibration: Calibration, *, class_name: str, aim: Aim) -> tuple[Operating, ...]:
    """Thresholds of the calibrated probability, of images and, where groups hold several, of patients.

    Returns:
        One a level; none if no validation image is of the class, so that nothing can be fixed.
    """
    found = [_operating(IMAGES, calibration.validation, calibration.test, class_name, aim)]
    validation, test = patients_of(calibration.validation), patients_of(calibration.test)
    if validation is not None and test is not None:
        found.append(_operating(PATIENTS, validation[0], test[0], class_name, aim))
    return tuple(each for each in found if each is not None)


def _operating(level: str, validation: Predictions, test: Predictions, class_name: str, aim: Aim) -> Operating | None:
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
    return Operating(level, class_name, fixed, point)
