"""What a bundle decides by, fixed on validation images, and what that gives on the untouched test images."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.deploy.description import Abstention, Decision, Figure, Figures, OperatingFigures
from pylorus.deploy.description import Calibration as SaidCalibration
from pylorus.deploy.network import UNLIKENESS
from pylorus.evaluation.decision import operating_point, threshold_at_sensitivity
from pylorus.evaluation.delong import auroc
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import clustered_wilson, proportions_of_predictions, wilson
from pylorus.report.calibrated import Calibration

SENSITIVITY = 0.95
"""Of the class that decides, wanted on validation images."""
FALSE_ALARMS = 0.05
"""Share of validation images that each of the two reasons to abstain withholds at most."""
ROUNDING = 1e-5
"""By so much a threshold of abstention lies beyond the image that fixes it: batches of another size round otherwise."""


@dataclass(frozen=True, eq=False)
class Unlikeness:
    """How unlike the training images the others are.

    Attributes:
        training: How many training images they were compared with.
        validation: Of shape (validation images,).
        test: Of shape (test images,).
        test_rows: The places of these among the saved predictions of test images.
    """

    training: int
    validation: NDArray[np.float64]
    test: NDArray[np.float64]
    test_rows: NDArray[np.int64]


def fixed_decision(calibration: Calibration) -> Decision:
    """A threshold a class at the wanted sensitivity; the first class decides, as in the report."""
    validation, test = calibration.validation, calibration.test
    thresholds: dict[str, float | None] = {}
    figures = {}
    for column, name in enumerate(validation.class_names):
        positive, scores = validation.true == column, validation.probabilities[:, column]
        found = threshold_at_sensitivity(positive, scores, sensitivity=SENSITIVITY) if positive.any() else None
        point = operating_point(
            test.true == column,
            test.probabilities[:, column],
            clusters(test),
            threshold=2.0 if found is None else found,
        )
        thresholds[name] = found
        figures[name] = OperatingFigures(figure(point.sensitivity), figure(point.specificity))
    return Decision(validation.class_names[0], SENSITIVITY, thresholds, figures)


def said_calibration(calibration: Calibration) -> SaidCalibration:
    """The temperature and what it does to the test images."""
    fitted = calibration.temperature
    return SaidCalibration(
        fitted.temperature, fitted.identified, fitted.images, calibration.before.ece, calibration.after.ece
    )


def fixed_abstention(calibration: Calibration, unlikeness: Unlikeness) -> Abstention:
    """The two thresholds below and above which the model does not answer, and what they withhold of the test images.

    Unlike: above what 95 % of the validation images reach. Unsure: below the likeliest class's calibrated probability
    that 95 % of the rightly recognised validation images reach.
    """
    validation, test = calibration.validation, calibration.test
    unlike_above = float(np.quantile(unlikeness.validation, 1 - FALSE_ALARMS, method="higher")) + ROUNDING
    sure = validation.probabilities.max(axis=1)
    right = sure[validation.correct]
    unsure_below = float(np.quantile(right, FALSE_ALARMS, method="lower")) if len(right) else 0.0
    unsure_below = max(0.0, unsure_below - ROUNDING)
    rows = unlikeness.test_rows
    groups = clusters(test)
    groups = None if groups is None else groups[rows]
    unlike = unlikeness.test > unlike_above
    unsure = test.probabilities.max(axis=1)[rows] < unsure_below
    correct, answered = test.correct[rows], ~(unlike | unsure)
    return Abstention(
        method=UNLIKENESS,
        unlike_above=unlike_above,
        unsure_below=unsure_below,
        false_alarms=FALSE_ALARMS,
        images=unlikeness.training,
        unlike_test=share(unlike, groups),
        unsure_test=share(unsure, groups, among=correct),
        answered_test=share(answered, groups),
        accuracy_answered=share(correct, groups, among=answered),
    )


def figures_of(test: Predictions) -> Figures:
    """What the model is worth on some images, all of them answered."""
    groups = clusters(test)
    shares = proportions_of_predictions(test.true, test.predicted, groups, classes=test.classes)
    areas = [auroc(test.true == each, test.probabilities[:, each], groups) for each in range(test.classes)]

    def by_class(values: tuple[Estimate, ...]) -> dict[str, Figure]:
        return {name: figure(value) for name, value in zip(test.class_names, values, strict=True)}

    return Figures(
        images=len(test.true),
        groups=len(np.unique(test.group)),
        accuracy=figure(shares.accuracy),
        sensitivity=by_class(shares.sensitivity),
        specificity=by_class(shares.specificity),
        precision=by_class(shares.precision),
        auroc=by_class(tuple(areas)),
    )


def clusters(predictions: Predictions) -> NDArray[np.generic] | None:
    """The group of each image where groups hold several, else None."""
    return predictions.group if len(np.unique(predictions.group)) < len(predictions.true) else None


def figure(estimate: Estimate) -> Figure:
    """An estimate as JSON can hold it."""
    value, low, high = (
        None if math.isnan(each) else float(each) for each in (estimate.value, estimate.low, estimate.high)
    )
    return Figure(value, low, high)


def share(
    success: NDArray[np.bool_], groups: NDArray[np.generic] | None, *, among: NDArray[np.bool_] | None = None
) -> Figure:
    """The share of some images, or of those `among` them, with its interval; undefined where there is none."""
    chosen = np.ones(len(success), dtype=np.bool_) if among is None else among
    if not chosen.any():
        return figure(wilson(0, 0))
    return figure(clustered_wilson(success[chosen], None if groups is None else groups[chosen]))
