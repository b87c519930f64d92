"""Tables of configurations with several runs: pooled folds of a cross-validation, and the spread over replicates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pylorus.evaluation.calibration import CalibrationScores, calibration_scores
from pylorus.evaluation.comparison import INDICES
from pylorus.evaluation.index_intervals import estimate_overall, indices_of_predictions, proportions_of_predictions
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.predictions import Predictions, concat_predictions
from pylorus.evaluation.replicates import (
    ReplicateSummary,
    corrected_resampled_t,
    ensure_interval_width,
    summarize_replicates,
)
from pylorus.report.candidate import (
    FOLDS,
    SET,
    SPLITS,
    Candidate,
    Configuration,
    compute_overall_index,
    compute_test_train_ratio,
    get_fold,
)
from pylorus.report.captions import format_pooled_basis, format_test_basis
from pylorus.report.results import CONFIDENCE, IMAGES, PATIENTS, Result, group_by_patient
from pylorus.report.table import (
    Cell,
    Column,
    Number,
    Row,
    Table,
    convert_to_number_cell,
    convert_to_percent_cell,
    create_text_columns,
)

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


@dataclass(frozen=True, eq=False)
class FoldPool:
    """Pooled predictions of one stage of one configuration over its folds, once per repeat of the folds.

    Attributes:
        candidate: The configuration and the stage.
        rounds: The predictions of each repeat: all test images, each predicted by the model not trained on it.
        patients: The same per patient, with the number of groups excluded for having several true classes; None if no
            group has several images.
        calibration: Scores of each repeat's calibrated probabilities; None if a fold has no validation predictions.
    """

    candidate: Candidate
    rounds: tuple[Predictions, ...]
    patients: tuple[tuple[Predictions, int], ...] | None
    calibration: tuple[CalibrationScores, ...] | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Short names of the classes."""
        return self.rounds[0].class_names

    @property
    def head(self) -> tuple[str, str, str]:
        """Model, stage, and the number of finished folds out of all folds, as text."""
        candidate = self.candidate
        folds = f"{len(candidate.rounds[0])} of {candidate.fold_count}"
        return candidate.configuration, candidate.stage, folds


def collect_fold_pools(configurations: Sequence[Configuration]) -> tuple[FoldPool, ...]:
    """Pool the folds of each stage of each configuration, and of its shipped stage, if there are at least two."""
    candidates = [
        candidate
        for each in configurations
        for candidate in each.candidates
        if candidate.kind == FOLDS and len(candidate.rounds[0]) > 1
    ]
    return tuple(_build_fold_pool(candidate) for candidate in candidates)


def build_pooled_fold_table(pools: Sequence[FoldPool], *, level: str = IMAGES, number: int = 1) -> Table | None:
    """Build the table of metrics of each configuration over all test images of its folds, clustered by group.

    Args:
        pools: At least one, all of the same classes.
        level: `image-level` or `patient-level`.
        number: Number of the table if the report has several, one per set of classes.

    Returns:
        The table; None at patient level if no group has several images.
    """
    shown_pools = [each for each in pools if level == IMAGES or each.patients is not None]
    if not shown_pools:
        return None
    names = shown_pools[0].class_names
    repeated = any(len(each.rounds) > 1 for each in shown_pools)
    rows: list[Row] = []
    for each in shown_pools:
        rows += _build_pooled_rows(each, level, repeated=repeated)
    unit = "patients" if level == PATIENTS else "images"
    return Table(
        key=("fold-patients" if level == PATIENTS else "folds") + ("" if number == 1 else f"-{number}"),
        title=f"Cross-validation: all folds pooled{', by patient' if level == PATIENTS else ''}",
        basis=_format_fold_basis(shown_pools, level),
        columns=(
            *create_text_columns("model", "stage", "folds"),
            *(create_text_columns("repeat") if repeated else ()),
            Column(unit),
            *((Column("groups"),) if level == IMAGES else ()),
            Column("accuracy", unit="%"),
            Column("balanced accuracy", unit="%"),
            Column("macro F1", unit="%"),
            Column("Cohen's κ"),
            Column("MCC"),
            *(Column(name, heading="sensitivity", unit="%") for name in names),
            *(Column(name, heading="precision", unit="%") for name in names),
        ),
        rows=tuple(rows),
        notes=tuple(_format_pooled_notes(shown_pools, level, repeated=repeated)),
    )


def build_fold_training_table(pools: Sequence[FoldPool], *, number: int = 1) -> Table:
    """Build the table of each configuration as a procedure: mean and spread over folds, and pooled calibration.

    Args:
        pools: At least one.
        number: Number of the table if the report has several.
    """
    rows = []
    for each in pools:
        candidate = each.candidate
        cells: list[Cell] = list(each.head)
        pooled = [estimate_overall(predictions, confidence=CONFIDENCE) for predictions in each.rounds]
        for name, is_percentage in (("accuracy", True), ("macro_f1", True), ("auroc", False)):
            values = np.array([_calculate_run_mean(results, name) for results in candidate.by_test.values()])
            summary = summarize_replicates(values)
            mean: Estimate = corrected_resampled_t(
                values, test_to_train=compute_test_train_ratio(candidate), bounds=(0.0, 1.0), confidence=CONFIDENCE
            )
            if is_percentage:
                # A few folds may agree by chance: do not go below the width of the pooled patients' interval.
                mean = ensure_interval_width(mean, [estimates[name] for estimates in pooled])
            scale, digits = (100.0, 1) if is_percentage else (1.0, 3)
            cells.append(Number(scale * mean.value, digits, (scale * mean.low, scale * mean.high)))
            cells += [Number(scale * value, digits) for value in (summary.deviation, summary.lowest, summary.highest)]
        for name in ("ece", "brier", "nll"):
            scores = [getattr(one, name) for one in each.calibration or ()]
            cells.append(Number(float(np.mean(scores)) if scores else float("nan"), 3))
        rows.append(Row(tuple(cells)))
    statistics = ("mean", "SD", "lowest", "highest")
    return Table(
        key="fold-training" + ("" if number == 1 else f"-{number}"),
        title="Cross-validation: the configuration as a procedure, over its folds",
        basis=_format_fold_basis(pools, IMAGES),
        columns=(
            *create_text_columns("model", "stage", "folds"),
            *(Column(name, heading="accuracy, %") for name in statistics),
            *(Column(name, heading="macro F1, %") for name in statistics),
            *(Column(name, heading="macro AUROC") for name in statistics),
            *(Column(name, heading="calibrated, pooled") for name in ("ECE", "Brier", "NLL")),
        ),
        rows=tuple(rows),
        notes=(
            "Mean over folds with equal weight, and SD and range over folds. The confidence interval of the mean "
            f"refers to the procedure: other patients{_format_other_value(pools)} and another training set; it "
            f"accounts for overlapping training sets (Nadeau and Bengio 2003). For accuracy and macro F1 it is not "
            f"narrower than that of the pooled patients; for AUROC there is no such bound. SD, range and calibration "
            f"have no interval.",
            "There is no AUROC of the pool: the scores of each fold come from a different model and are not on the "
            "same scale, so ranking images of different folds against each other would be meaningless. The mean over "
            "folds is given instead.",
            "Calibration: scores of the pooled probabilities, each fold with the temperature fitted on its own "
            "validation images.",
        ),
    )


def build_single_fold_table(pools: Sequence[FoldPool], *, number: int = 1) -> Table:
    """Build the table of each fold separately; folds defined by a column, such as site, are named by its values.

    Args:
        pools: At least one, all of the same classes.
        number: Number of the table if the report has several.
    """
    names = pools[0].class_names
    column = pools[0].candidate.results[0].run.get_setting("data.fold_column")
    repeated = any(len(each.rounds) > 1 for each in pools)
    return Table(
        key="fold-each" + ("" if number == 1 else f"-{number}"),
        title=f"Cross-validation: each {column or 'fold'} separately",
        basis=_format_fold_basis(pools, IMAGES),
        columns=(
            *create_text_columns("model", "stage", str(column or "fold")),
            *(create_text_columns("run") if repeated else ()),
            Column("images"),
            Column("groups"),
            Column("accuracy", unit="%"),
            Column("macro F1", unit="%"),
            Column("macro AUROC"),
            *(Column(name, heading="sensitivity", unit="%") for name in names),
        ),
        rows=tuple(
            Row(tuple(_build_fold_cells(each.candidate, result, repeated=repeated)))
            for each in pools
            for result in sorted(each.candidate.results_used, key=_get_fold_sort_key)
        ),
        notes=(f"Each row: tested on the images of that {column} by a model trained without them.",) if column else (),
    )


def _build_fold_pool(candidate: Candidate) -> FoldPool:
    patient_levels = [group_by_patient(each) for each in candidate.round_predictions]
    calibrated = [[result.calibration for result in each] for each in candidate.rounds]
    calibration = None
    if all(one is not None for each in calibrated for one in each):
        pools = [concat_predictions([one.test for one in each if one is not None]) for each in calibrated]
        calibration = tuple(calibration_scores(each.probabilities, each.true) for each in pools)
    return FoldPool(
        candidate,
        candidate.round_predictions,
        tuple(each for each in patient_levels if each is not None)
        if all(each is not None for each in patient_levels)
        else None,
        calibration,
    )


def _build_pooled_rows(each: FoldPool, level: str, *, repeated: bool) -> list[Row]:
    tables = [predictions for predictions, _ in each.patients or ()] if level == PATIENTS else list(each.rounds)
    rows = []
    for predictions, results in zip(tables, each.candidate.rounds, strict=True):
        cells: list[Cell] = [*each.head, *([_format_repeat_name(results[0])] if repeated else [])]
        cells += [len(predictions.true), *([len(np.unique(predictions.group))] if level == IMAGES else [])]
        rows.append(Row((*cells, *_build_pooled_metric_cells(predictions))))
    if len(rows) > 1:
        values = [[cell.value for cell in row.cells if isinstance(cell, Number)] for row in rows]
        means = np.mean(values, axis=0)
        numbers = [cell for cell in rows[0].cells if isinstance(cell, Number)]
        first = len(rows[0].cells) - len(numbers)
        mean_cells = [Number(float(mean), cell.digits) for mean, cell in zip(means, numbers, strict=True)]
        rows.append(
            Row((*each.head, f"mean of {len(tables)}", *rows[0].cells[len(each.head) + 1 : first], *mean_cells), True)
        )
    return rows


def _build_pooled_metric_cells(predictions: Predictions) -> list[Cell]:
    groups = predictions.clusters
    proportions = proportions_of_predictions(
        predictions.true, predictions.predicted, groups, classes=predictions.classes, confidence=CONFIDENCE
    )
    indices = indices_of_predictions(
        predictions.true,
        predictions.predicted,
        groups,
        classes=predictions.classes,
        confidence=CONFIDENCE,
    )
    cells: list[Cell] = [
        convert_to_percent_cell(proportions.accuracy),
        convert_to_percent_cell(indices.balanced_accuracy),
    ]
    cells += [
        convert_to_percent_cell(indices.macro_f1),
        convert_to_number_cell(indices.cohen_kappa, digits=2),
        convert_to_number_cell(indices.mcc, digits=2),
    ]
    return [
        *cells,
        *(
            convert_to_percent_cell(proportion)
            for kind in (proportions.sensitivity, proportions.precision)
            for proportion in kind
        ),
    ]


def _format_pooled_notes(pools: Sequence[FoldPool], level: str, *, repeated: bool) -> list[str]:
    notes = [
        f"Out-of-fold predictions: each image was tested once, by the model of the fold that excluded it"
        f"{_format_excluded_patient(pools)} from training. These confidence intervals account for the sampling of "
        f"patients and treat the trained models as fixed; the table of the procedure also accounts for variation from "
        f"training."
    ]
    excluded = (
        sum(excluded_groups for each in pools for _, excluded_groups in (each.patients or ())[:1])
        if level == PATIENTS
        else 0
    )
    if level == PATIENTS:
        notes.append("Each patient counts once, with the mean probability over the patient's images.")
    if excluded:
        notes.append(f"Groups with more than one true class are excluded ({excluded} over all rows).")
    if repeated:
        notes.append(
            "Each repeat of the folds is pooled separately; the last row of a block is the mean over the repeats."
        )
    incomplete = [each for each in pools if not each.candidate.is_complete]
    if incomplete:
        verb = "lacks" if len(incomplete) == 1 else "lack"
        notes.append(
            f"INCOMPLETE: {len(incomplete)} of {len(pools)} {verb} folds; these results refer only to the images of "
            "the available folds."
        )
    runs = list(dict.fromkeys(result.run.label for each in pools for result in each.candidate.incomplete_repeats))
    if runs:
        notes.append(f"Excluded because their repeat lacks folds that others have: {', '.join(runs)}.")
    return notes


def _format_excluded_patient(pools: Sequence[FoldPool]) -> str:
    """Say that a fold also excludes the patient of each image, if the runs' splits show it."""
    runs = {result.run for each in pools for result in each.candidate.results}
    excludes_patient = all(
        run.has_groups and run.split is not None and not run.split.groups_in_several_splits for run in runs
    )
    return " and its patient" if excludes_patient else ""


def _format_fold_basis(pools: Sequence[FoldPool], level: str) -> str:
    return format_pooled_basis([result for each in pools for result in each.candidate.results_used], level=level)


def _format_other_value(pools: Sequence[FoldPool]) -> str:
    """Name the further source of variation if folds are the values of a column: another value, such as another site."""
    column = pools[0].candidate.results[0].run.get_setting("data.fold_column")
    return "" if column is None else f", another {column}"


def _calculate_run_mean(results: Sequence[Result], name: str) -> float:
    """Return the mean of a metric over the runs that tested the same images."""
    if name == "auroc":
        return float(np.mean([result.images.ranking.macro_auroc.value for result in results]))
    return float(np.mean([compute_overall_index(result, name) for result in results]))


def _build_fold_cells(candidate: Candidate, result: Result, *, repeated: bool) -> list[Cell]:
    level = result.images
    cells: list[Cell] = [candidate.configuration, candidate.stage, str(result.run.fold)]
    cells += [_format_repeat_name(result)] if repeated else []
    cells += [result.test.images, result.test.groups, convert_to_percent_cell(level.shares.accuracy)]
    cells += [convert_to_percent_cell(level.indices.macro_f1), convert_to_number_cell(level.ranking.macro_auroc)]
    return [*cells, *(convert_to_percent_cell(proportion) for proportion in level.shares.sensitivity)]


def _get_fold_sort_key(result: Result) -> tuple[int, str]:
    """Return the sort key of a fold: numbered folds by number, then named ones by name."""
    fold = str(get_fold(result))
    return (int(fold), "") if fold.isdigit() else (1 << 31, str(result.run.fold))


def _format_repeat_name(result: Result) -> str:
    """Name a repeat of the folds by its seeds."""
    seed, split = result.run.get_setting("seed"), result.run.get_setting("data.split_seed")
    return f"seed={seed}" + (f", split_seed={split}" if split else "")


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
