"""The result on the first screen of a report: a verdict, its key figures, a confusion matrix, and what was answered.

Everything describes one candidate, the winner: that with the highest validation accuracy, or, without validation
images, the first of those with the highest test accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pylorus.core.formatting import DASH, format_count, format_percent, format_percent_with_unit
from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.wording import format_answered_shares
from pylorus.report.candidate import FOLDS, SET, Candidate, Pool
from pylorus.report.evidence import Evidence, Winner
from pylorus.report.results import Result
from pylorus.report.table import convert_to_number_cell, convert_to_percent_cell
from pylorus.runs.folder import KEY, LAST
from pylorus.runs.predictions import explain_degenerate_predictions

MAX_MATRIX_CLASSES = 8
"""Largest number of classes for which the first screen shows the confusion matrix."""


@dataclass(frozen=True)
class KeyFigure:
    """A key figure at the head of the page: its name, value and details."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True)
class MatrixRow:
    """A row of the confusion matrix.

    Attributes:
        name: The true class; its own column has the same position as its row.
        counts: Images by predicted class.
        fractions: The same as fractions of the row, in [0, 1].
    """

    name: str
    counts: tuple[int, ...]
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class Headline:
    """The result of the winner.

    Attributes:
        label: Name of the winner, and how it was selected.
        verdict: Sentences: what the model achieved, and whether that is better than answering without the image.
        figures: Sensitivity, specificity and AUROC for the class of interest, and accuracy.
        basis: What the figures are based on: decision rule, interval, number of images and patients.
        class_names: Short names of the classes, the columns of the matrix.
        matrix: Rows of the confusion matrix; empty if it would be too large or there is no common test set.
        answered: How many images the shipped model answers and on how many it abstains; empty if unknown.
    """

    label: str
    verdict: str
    figures: tuple[KeyFigure, ...]
    basis: str
    class_names: tuple[str, ...]
    matrix: tuple[MatrixRow, ...]
    answered: str


def build_headline(evidence: Evidence) -> Headline | None:
    """Build the headline of a report; None without results, or with test sets that must not be compared."""
    if len(evidence.winners) != 1:
        return None
    (winner,) = evidence.winners
    chosen = winner.preferred or winner.leaders[0]
    # Several runs share a matrix only if each image is tested once: in the folds of one cross-validation.
    predictions = None if chosen.shares is None else chosen.round_predictions[0]
    return Headline(
        label=f"{chosen.label}, {format_selection(winner)}",
        verdict=_format_verdict(chosen, predictions),
        figures=(*_build_class_figures(chosen, evidence.class_name), build_accuracy_figure(chosen)),
        basis=_format_basis(chosen, winner.pool),
        class_names=chosen.representative.test.predictions.class_names,
        matrix=() if predictions is None else _build_matrix(predictions),
        answered=format_answered_images(chosen.representative) if chosen.replicates == 1 else "",
    )


def _format_verdict(candidate: Candidate, predictions: Predictions | None) -> str:
    """State the accuracy of a candidate, and what makes it worthless: one predicted class, or no better than chance."""
    share = format_percent_with_unit(float(candidate.exact_accuracy))
    if predictions is None:
        mean = f", on average over {candidate.replicate_text}" if candidate.replicate_text else ""
        return f"{candidate.label} classified {share} of the test images correctly{mean}."
    images = len(predictions.true)
    patients = len(np.unique(predictions.group)) if predictions.clusters is not None else 0
    of_groups = f" of {format_count(patients, 'group')}" if patients else ""
    folds = ", each predicted by a model trained without it" if candidate.kind == FOLDS else ""
    sentences = [
        f"{candidate.label} classified {share} of {format_count(images, 'test image')}{of_groups} correctly{folds}."
    ]
    sentences += explain_degenerate_predictions(
        predictions.true, predictions.predicted, predictions.class_names, candidate.accuracy
    )
    return " ".join(sentences)


def _build_class_figures(candidate: Candidate, class_name: str | None) -> list[KeyFigure]:
    """Build the figures for the class of interest; without intervals for several runs on the same images."""
    names = candidate.representative.test.predictions.class_names
    if class_name not in names:
        return []
    column, shares = names.index(str(class_name)), candidate.shares
    if shares is not None:
        figures = [
            _build_figure(f"Sensitivity for {class_name}", shares.sensitivity[column]),
            _build_figure(f"Specificity for {class_name}", shares.specificity[column]),
        ]
    else:
        results = candidate.results_used
        figures = [
            _build_spread_figure(f"{title} for {class_name}", results, attribute, column)
            for title, attribute in (("Sensitivity", "sensitivity"), ("Specificity", "specificity"))
        ]
    if candidate.kind == SET and candidate.replicates == 1:
        area = convert_to_number_cell(candidate.results[0].images.ranking.auroc[column])
        figures.append(KeyFigure(f"AUROC for {class_name}", area.value_text, _format_interval(area.interval_text)))
    return figures


def _build_figure(name: str, estimate: Estimate) -> KeyFigure:
    cell = convert_to_percent_cell(estimate)
    unit = "" if cell.value_text == DASH else " %"
    return KeyFigure(name, f"{cell.value_text}{unit}", _format_interval(cell.interval_text))


def _build_spread_figure(name: str, results: Sequence[Result], attribute: str, column: int) -> KeyFigure:
    values = [getattr(result.images.shares, attribute)[column].value for result in results]
    mean, low, high = (format_percent(value) for value in (np.mean(values), min(values), max(values)))
    return KeyFigure(name, f"{mean} %", f"mean; runs range from {low} to {high}")


def _format_interval(interval: str) -> str:
    return f"95 % CI {interval}" if interval not in ("", DASH) else ""


def build_accuracy_figure(candidate: Candidate) -> KeyFigure:
    """Build the figure of a candidate's test accuracy."""
    name = {SET: "Test accuracy", FOLDS: "Accuracy, folds pooled"}.get(candidate.kind, "Mean test accuracy")
    accuracy = convert_to_percent_cell(candidate.accuracy)
    details = [_format_interval(accuracy.interval_text)]
    if candidate.replicate_text:
        details.append(f"mean of {candidate.replicate_text}" if candidate.kind == SET else candidate.replicate_text)
    return KeyFigure(name, f"{accuracy.value_text} %", "; ".join(filter(None, details)))


def _format_basis(candidate: Candidate, pool: Pool) -> str:
    images = format_count(pool.images, "test image")
    rule = "the most probable class is the answer"
    clusters = candidate.representative.test.clusters is not None
    allowance = (
        "intervals allow for several images per group (patient)" if clusters else "each image counts as a patient"
    )
    return f"Image-level, {images}; {rule}; {allowance}."


def _build_matrix(predictions: Predictions) -> tuple[MatrixRow, ...]:
    if predictions.classes > MAX_MATRIX_CLASSES:
        return ()
    counts = confusion_matrix(predictions.true, predictions.predicted, predictions.classes)
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return tuple(
        MatrixRow(name, tuple(row.tolist()), tuple((row / total).tolist()))
        for name, row, total in zip(predictions.class_names, counts, totals[:, 0], strict=True)
    )


def build_image_figures(candidate: Candidate, pool: Pool) -> list[KeyFigure]:
    """Build the figures on the test images and the split of a candidate."""
    test = candidate.representative.test
    if pool.kind == SET:
        groups = f"of {test.groups:,} groups" if test.clusters is not None else "each its own group"
        return [
            KeyFigure("Test images", f"{test.images:,}", groups),
            KeyFigure("Split", candidate.representative.split, "first digits of the SHA-256 of split.csv"),
        ]
    if pool.kind == FOLDS:
        predictions = candidate.round_predictions[0]
        count = len(set(predictions.group.tolist()))
        groups = f"of {count:,} groups" if count < len(predictions.true) else "each its own group"
        folds = f"{len(candidate.rounds[0])} of {candidate.fold_count}"
        return [
            KeyFigure("Test images", f"{len(predictions.true):,}", f"{groups}, each tested in one fold"),
            KeyFigure("Folds", folds, "each with its own split"),
        ]
    return [KeyFigure("Splits", str(len(candidate.by_test)), "with overlapping test images")]


def format_selection(winner: Winner) -> str:
    """Describe in a few words how the winner was selected."""
    if winner.headline_result is None:
        return "selected by test accuracy"
    shipped = winner.headline_result.run.bundle_stage
    if len(winner.pool.configurations) == 1 and shipped is not None and shipped.chosen_by in (KEY, LAST):
        return "named by deploy.stage" if shipped.chosen_by == KEY else "the last stage, which is in the bundle"
    on_test = winner.headline_result.run.get_setting("data.validation") == "test"
    return "selected by accuracy on these same images" if on_test else "selected by validation accuracy"


def format_answered_images(result: Result) -> str:
    """Say how much of the test set a shipped model answers; empty for another stage, or if no bundle says."""
    abstention = result.run.bundle.get("abstention", {}) if result.is_shipped else {}
    answered, unlike = (abstention.get(name, {}).get("value") for name in ("answered_test", "unlike_test"))
    if answered is None or unlike is None:
        return ""
    return f"{result.label}: the shipped model {format_answered_shares(answered, unlike)}."
