"""What a bundle decides by, fixed on validation images, and what that gives on the untouched test images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pylorus.config import DeployConfig
from pylorus.deploy.description import (
    Abstention,
    Decision,
    Figure,
    Figures,
    Guarantee,
    OperatingFigures,
    PredictionSets,
    SetFigures,
)
from pylorus.deploy.description import Calibration as SaidCalibration
from pylorus.deploy.network import UNLIKENESS
from pylorus.errors import PylorusError, did_you_mean
from pylorus.evaluation.bounded_mean import mean_over_groups
from pylorus.evaluation.conformal import fit_set_limits, patients_needed_for_sets, prediction_sets
from pylorus.evaluation.decisions import ROUNDING, operating_point, patients_needed, threshold_at_sensitivity
from pylorus.evaluation.delong import auroc
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import clustered_wilson, proportions_of_predictions, wilson
from pylorus.report.calibrated import Calibration

FALSE_ALARMS = 0.05
"""Share of validation images that each of the two reasons to abstain withholds at most."""


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


def deciding_class(deploy: DeployConfig, *, classes: Sequence[str], short_names: Sequence[str]) -> str:
    """The short name of the class that decides.

    Raises:
        PylorusError: If `deploy.class_name` is none of the classes.
    """
    wanted = deploy.class_name
    if wanted is None or wanted in short_names:
        return short_names[0] if wanted is None else wanted
    if wanted not in classes:
        raise PylorusError(
            f'deploy.class_name: found "{wanted}", expected one of {", ".join(short_names)}.'
            f"{did_you_mean(wanted, [*short_names, *classes])}"
        )
    return short_names[list(classes).index(wanted)]


def fixed_decision(calibration: Calibration, deploy: DeployConfig, *, class_name: str) -> Decision:
    """A threshold for each class that guarantees the sensitivity asked for, or says what it guarantees.

    Args:
        calibration: Predictions of validation images, on which thresholds are fixed, and of test images.
        deploy: The sensitivity and the confidence asked for.
        class_name: Short name of the class that decides.
    """
    validation, test = calibration.validation, calibration.test
    asked = {"sensitivity": deploy.sensitivity, "confidence": deploy.confidence}
    thresholds: dict[str, float | None] = {}
    guarantees: dict[str, Guarantee | None] = {}
    figures = {}
    for column, name in enumerate(validation.class_names):
        positive, scores = validation.true == column, validation.probabilities[:, column]
        thresholds[name] = guarantees[name] = None
        if positive.any():
            found = threshold_at_sensitivity(positive, scores, validation.clusters, margin=ROUNDING, **asked)
            thresholds[name] = found.threshold
            guarantees[name] = Guarantee(
                found.confidence_reached, found.sensitivity_reached, found.images, found.patients
            )
        threshold = thresholds[name]
        point = operating_point(
            test.true == column,
            test.probabilities[:, column],
            test.clusters,
            threshold=2.0 if threshold is None else threshold,
        )
        figures[name] = OperatingFigures(figure(point.sensitivity), figure(point.specificity))
    needed = patients_needed(**asked)
    return Decision(class_name, deploy.sensitivity, deploy.confidence, needed, thresholds, guarantees, figures)


def fixed_sets(calibration: Calibration, coverage: float | None) -> PredictionSets | None:
    """Prediction sets of the coverage asked for, calibrated on validation images; None where it is None."""
    if coverage is None:
        return None
    validation, test = calibration.validation, calibration.test
    limits = fit_set_limits(validation.probabilities, validation.true, validation.clusters, coverage=coverage)
    lowest = tuple(None if each is None else max(0.0, each - ROUNDING) for each in limits.lowest)
    limits = replace(limits, lowest=lowest)
    return PredictionSets(
        coverage=coverage,
        lowest=dict(zip(validation.class_names, limits.lowest, strict=True)),
        patients=dict(zip(validation.class_names, limits.patients, strict=True)),
        patients_needed=patients_needed_for_sets(coverage),
        test=set_figures(test, prediction_sets(test.probabilities, limits)),
    )


def set_figures(predictions: Predictions, members: NDArray[np.bool_]) -> SetFigures:
    """What prediction sets give on some images.

    Args:
        predictions: Of the images, with their true classes.
        members: Which classes are in the set of each, of shape (n, classes).
    """
    groups = predictions.clusters
    covered = members[np.arange(len(members)), predictions.true].astype(np.float64)

    def coverage(chosen: NDArray[np.bool_]) -> Estimate:
        if not chosen.any():
            return Estimate(math.nan, math.nan, math.nan)
        return mean_over_groups(covered[chosen], None if groups is None else groups[chosen])

    share_of_classes = mean_over_groups(members.mean(axis=1), groups)
    size = (
        predictions.classes * each for each in (share_of_classes.value, share_of_classes.low, share_of_classes.high)
    )
    return SetFigures(
        coverage={
            name: figure(coverage(predictions.true == each)) for each, name in enumerate(predictions.class_names)
        },
        size=figure(Estimate(*size)),
    )


def said_calibration(calibration: Calibration) -> SaidCalibration:
    """The temperature and what it does to the test images."""
    fitted = calibration.temperature
    return SaidCalibration(
        fitted.temperature, fitted.identified, fitted.images, calibration.before.ece.value, calibration.after.ece.value
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
    groups = test.clusters
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
    groups = test.clusters
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


def figure(estimate: Estimate) -> Figure:
    """An estimate as JSON can hold it."""
    value, low, high = (
        float(each) if math.isfinite(each) else None for each in (estimate.value, estimate.low, estimate.high)
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
