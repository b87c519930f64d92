"""What several runs of one configuration say together: mean, standard deviation and range over its replicates."""

from collections.abc import Sequence

import numpy as np

from pylorus.evaluation.comparison import INDICES
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.replicates import ReplicateSummary, summarize_replicates
from pylorus.report.basis import tested_on
from pylorus.report.candidate import SET, SPLITS, Candidate, index_of, widen
from pylorus.report.table import Column, Number, Row, Table, text_columns

NAMES = {
    "accuracy": "accuracy, %",
    "balanced_accuracy": "balanced accuracy, %",
    "macro_precision": "macro precision, %",
    "macro_f1": "macro F1, %",
    "cohen_kappa": "Cohen's κ",
    "mcc": "MCC",
}
"""What tables call the indices of `pylorus.evaluation.comparison.INDICES`."""

CORRELATIONS = ("cohen_kappa", "mcc")
"""Indices in [-1, 1], which are not given in %."""


def has_replicates(candidate: Candidate) -> bool:
    """Whether several runs of it, or several repeats of its folds, can be summed up."""
    return len(candidate.rounds) > 1 or candidate.kind == SPLITS


def replicate_table(candidates: Sequence[Candidate]) -> Table:
    """Every index over the replicates of each candidate.

    Args:
        candidates: At least one, each with replicates.
    """
    kinds = {each.kind for each in candidates}
    notes = ["SD: standard deviation over the runs, of n − 1. Lowest, highest: the range of the runs."]
    if kinds - {SPLITS}:
        notes.append(
            "Validation accuracy and macro AUROC have no interval here. That of a mean allows for patients and for "
            "seeds together (Obuchowski and Rockette 1995): other patients and other seeds of the configuration. It "
            "is not narrower than those of the runs are on average."
        )
    if any(" or " in each.stage for each in candidates):
        notes.append("One stage or another: of each run the stage that it ships, where the runs ship different ones.")
    if SPLITS in kinds:
        notes.append("Of repeated splits each run has test images of its own, so the spread is of both.")
    return Table(
        key="replicates",
        title="Replicates: each configuration over its runs",
        basis=tested_on([result for each in candidates for result in each.results_used]),
        columns=(
            *text_columns("model", "stage", "replicates", "index"),
            Column("mean"),
            Column("SD"),
            Column("lowest"),
            Column("highest"),
        ),
        rows=tuple(row for each in candidates for row in _rows(each)),
        notes=tuple(notes),
    )


def summary_cells(summary: ReplicateSummary, *, share: bool, mean: Estimate | None = None) -> tuple[Number, ...]:
    """Mean, standard deviation, lowest and highest.

    Args:
        summary: Over the replicates.
        share: Whether it is a share, which is shown in %.
        mean: The mean with its interval, where there is one.
    """
    scale, digits = (100.0, 1) if share else (1.0, 3)
    interval = None if mean is None else (scale * mean.low, scale * mean.high)
    return (
        Number(scale * summary.mean, digits, interval),
        Number(scale * summary.deviation, digits),
        Number(scale * summary.lowest, digits),
        Number(scale * summary.highest, digits),
    )


def _rows(candidate: Candidate) -> list[Row]:
    head = (candidate.configuration, candidate.stage, candidate.replicate_words)
    rows = []
    if candidate.validation is not None:
        rows.append(Row((*head, "validation accuracy, %", *summary_cells(candidate.validation, share=True))))
    if candidate.kind == SPLITS:
        values = np.array([[index_of(result, name) for name in INDICES] for result in candidate.results_used])
        means: list[Estimate | None] = [None] * len(INDICES)
    else:
        values = candidate.round_indices.values
        means = [
            candidate.estimate_index(place, lowest=-1.0 if name in CORRELATIONS else 0.0)
            for place, name in enumerate(INDICES)
        ]
        means[0] = candidate.accuracy
        if candidate.kind == SET:
            levels = [result.images.indices for result in candidate.results]
            means[1:] = [
                widen(mean, [getattr(level, name) for level in levels])
                for mean, name in zip(means[1:], INDICES[1:], strict=True)
                if mean is not None
            ]
    for place, name in enumerate(INDICES):
        summary = summarize_replicates(values[:, place])
        cells = summary_cells(summary, share=name not in CORRELATIONS, mean=means[place])
        rows.append(Row((*head, NAMES[name], *cells)))
    if candidate.kind in (SET, SPLITS):
        areas = np.array([result.images.ranking.macro_auroc.value for result in candidate.results_used])
        rows.append(Row((*head, "macro AUROC", *summary_cells(summarize_replicates(areas), share=False))))
    return rows
