"""Table of replicates: mean, standard deviation and range over several runs of one configuration."""

from collections.abc import Sequence

import numpy as np

from pylorus.evaluation.comparison import INDICES
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.replicates import ReplicateSummary, summarize_replicates
from pylorus.report.basis import format_test_basis
from pylorus.report.candidate import SET, SPLITS, Candidate, compute_overall_index, ensure_interval_width
from pylorus.report.table import Column, Number, Row, Table, create_text_columns

NAMES = {
    "accuracy": "accuracy, %",
    "balanced_accuracy": "balanced accuracy, %",
    "macro_precision": "macro precision, %",
    "macro_f1": "macro F1, %",
    "cohen_kappa": "Cohen's κ",
    "mcc": "MCC",
}
"""Names in tables of the metrics in `pylorus.evaluation.comparison.INDICES`."""

CORRELATIONS = ("cohen_kappa", "mcc")
"""Metrics in [-1, 1], which are not given in %."""


def has_replicates(candidate: Candidate) -> bool:
    """Return whether it has several runs, or several repeats of its folds, to summarize."""
    return len(candidate.rounds) > 1 or candidate.kind == SPLITS


def build_replicate_table(candidates: Sequence[Candidate]) -> Table:
    """Build the table of every metric over the replicates of each candidate.

    Args:
        candidates: At least one, each with replicates.
    """
    kinds = {each.kind for each in candidates}
    notes = ["SD: standard deviation over the runs (n − 1). Lowest, highest: range over the runs."]
    if kinds - {SPLITS}:
        notes.append(
            "Validation accuracy and macro AUROC have no interval here. The confidence interval of a mean accounts for "
            "both patients and seeds (Obuchowski and Rockette 1995): it refers to other patients and other seeds of "
            "the configuration, and it is not narrower than the intervals of the runs are on average."
        )
    if any(" or " in each.stage for each in candidates):
        notes.append("One stage or another: the shipped stage of each run, if the runs ship different stages.")
    if SPLITS in kinds:
        notes.append(
            "Repeated splits: each run has its own test images, so the spread reflects both training and testing."
        )
    return Table(
        key="replicates",
        title="Replicates: each configuration over its runs",
        basis=format_test_basis([result for each in candidates for result in each.results_used]),
        columns=(
            *create_text_columns("model", "stage", "replicates", "index"),
            Column("mean"),
            Column("SD"),
            Column("lowest"),
            Column("highest"),
        ),
        rows=tuple(row for each in candidates for row in _build_replicate_rows(each)),
        notes=tuple(notes),
    )


def build_summary_cells(summary: ReplicateSummary, *, share: bool, mean: Estimate | None = None) -> tuple[Number, ...]:
    """Return the cells of mean, standard deviation, lowest and highest value.

    Args:
        summary: Summary over the replicates.
        share: Whether the metric is a proportion, which is shown in %.
        mean: The mean with its confidence interval, if there is one.
    """
    scale, digits = (100.0, 1) if share else (1.0, 3)
    interval = None if mean is None else (scale * mean.low, scale * mean.high)
    return (
        Number(scale * summary.mean, digits, interval),
        Number(scale * summary.deviation, digits),
        Number(scale * summary.lowest, digits),
        Number(scale * summary.highest, digits),
    )


def _build_replicate_rows(candidate: Candidate) -> list[Row]:
    head = (candidate.configuration, candidate.stage, candidate.replicate_text)
    rows = []
    if candidate.validation is not None:
        rows.append(Row((*head, "validation accuracy, %", *build_summary_cells(candidate.validation, share=True))))
    if candidate.kind == SPLITS:
        values = np.array(
            [[compute_overall_index(result, name) for name in INDICES] for result in candidate.results_used]
        )
        means: list[Estimate | None] = [None] * len(INDICES)
    else:
        values = candidate.round_indices.values
        means = [
            candidate.estimate_index(index, lowest=-1.0 if name in CORRELATIONS else 0.0)
            for index, name in enumerate(INDICES)
        ]
        means[0] = candidate.accuracy
        if candidate.kind == SET:
            levels = [result.images.indices for result in candidate.results]
            means[1:] = [
                ensure_interval_width(mean, [getattr(level, name) for level in levels])
                for mean, name in zip(means[1:], INDICES[1:], strict=True)
                if mean is not None
            ]
    for index, name in enumerate(INDICES):
        summary = summarize_replicates(values[:, index])
        cells = build_summary_cells(summary, share=name not in CORRELATIONS, mean=means[index])
        rows.append(Row((*head, NAMES[name], *cells)))
    if candidate.kind in (SET, SPLITS):
        areas = np.array([result.images.ranking.macro_auroc.value for result in candidate.results_used])
        rows.append(Row((*head, "macro AUROC", *build_summary_cells(summarize_replicates(areas), share=False))))
    return rows
