"""Cross-validation: what the folds of one configuration say together of images that each tested once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pylorus.evaluation.calibration import CalibrationScores, calibration_scores
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.index_intervals import estimate_overall, indices_of_predictions
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.evaluation.replicates import corrected_resampled_t, summarize_replicates
from pylorus.report.basis import pooled_from
from pylorus.report.candidate import (
    FOLDS,
    Candidate,
    Configuration,
    fold_of,
    index_of,
    pool_predictions,
    test_to_train,
    widen,
)
from pylorus.report.level import IMAGES, PATIENTS, patients_of
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.table import Cell, Column, Number, Row, Table, as_number, in_percent, text_columns


@dataclass(frozen=True, eq=False)
class Pooled:
    """One stage of one configuration over its folds, once for each repeat of the folds.

    Attributes:
        candidate: The configuration and the stage.
        rounds: The predictions of each repeat, all test images together, each by the model that did not see it.
        patients: The same by patient, with how many groups of several true classes were left out; None where no group
            holds several images.
        calibration: Scores of each repeat's calibrated probabilities; None where a fold has no validation predictions.
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
        """Model, stage, and how many folds there are of how many."""
        candidate = self.candidate
        folds = f"{len(candidate.rounds[0])} of {candidate.wanted_folds}"
        return candidate.configuration, candidate.stage, folds


def pool_folds(configurations: Sequence[Configuration]) -> tuple[Pooled, ...]:
    """Pool the folds of each stage of each configuration, and of what it ships, where there are at least two."""
    candidates = [
        candidate
        for each in configurations
        for candidate in each.candidates
        if candidate.kind == FOLDS and len(candidate.rounds[0]) > 1
    ]
    return tuple(_pool(candidate) for candidate in candidates)


def pooled_table(pools: Sequence[Pooled], *, level: str = IMAGES, number: int = 1) -> Table | None:
    """Indices of each configuration over all test images of its folds, whole groups drawn.

    Args:
        pools: At least one, all of the same classes.
        level: `image-level` or `patient-level`.
        number: Which of the report's tables of this kind it is, where there are several sets of classes.

    Returns:
        None at patient level where no group holds several images.
    """
    chosen = [each for each in pools if level == IMAGES or each.patients is not None]
    if not chosen:
        return None
    names = chosen[0].class_names
    repeated = any(len(each.rounds) > 1 for each in chosen)
    rows: list[Row] = []
    for each in chosen:
        rows += _pooled_rows(each, level, repeated=repeated)
    unit = "patients" if level == PATIENTS else "images"
    return Table(
        key=("fold-patients" if level == PATIENTS else "folds") + ("" if number == 1 else f"-{number}"),
        title=f"Cross-validation: all folds pooled{', by patient' if level == PATIENTS else ''}",
        basis=_basis(chosen, level),
        columns=(
            *text_columns("model", "stage", "folds"),
            *(text_columns("repeat") if repeated else ()),
            Column(unit),
            *((Column("groups"),) if level == IMAGES else ()),
            Column("accuracy", unit="%"),
            Column("balanced accuracy", unit="%"),
            Column("macro F1", unit="%"),
            Column("Cohen's κ"),
            Column("MCC"),
            *(Column(name, over="sensitivity", unit="%") for name in names),
            *(Column(name, over="precision", unit="%") for name in names),
        ),
        rows=tuple(rows),
        notes=tuple(_pooled_notes(chosen, level, repeated=repeated)),
    )


def training_table(pools: Sequence[Pooled], *, number: int = 1) -> Table:
    """Each configuration as a procedure: mean and spread over folds, and the calibration of the pool.

    Args:
        pools: At least one.
        number: Of several tables of a report.
    """
    rows = []
    for each in pools:
        candidate = each.candidate
        cells: list[Cell] = list(each.head)
        pooled = [estimate_overall(predictions, confidence=CONFIDENCE) for predictions in each.rounds]
        for name, share in (("accuracy", True), ("macro_f1", True), ("auroc", False)):
            values = np.array([_over_runs(results, name) for results in candidate.by_test.values()])
            summary = summarize_replicates(values)
            mean: Estimate = corrected_resampled_t(
                values, test_to_train=test_to_train(candidate), bounds=(0.0, 1.0), confidence=CONFIDENCE
            )
            if share:
                # A few folds may agree by chance; the patients of the pool say how far they can be trusted at least.
                mean = widen(mean, [estimates[name] for estimates in pooled])
            scale, digits = (100.0, 1) if share else (1.0, 3)
            cells.append(Number(scale * mean.value, digits, (scale * mean.low, scale * mean.high)))
            cells += [Number(scale * value, digits) for value in (summary.deviation, summary.lowest, summary.highest)]
        for name in ("ece", "brier", "nll"):
            scores = [getattr(one, name) for one in each.calibration or ()]
            cells.append(Number(float(np.mean(scores)) if scores else float("nan"), 3))
        rows.append(Row(tuple(cells)))
    spread = ("mean", "SD", "lowest", "highest")
    return Table(
        key="fold-training" + ("" if number == 1 else f"-{number}"),
        title="Cross-validation: the configuration as a procedure, over its folds",
        basis=_basis(pools, IMAGES),
        columns=(
            *text_columns("model", "stage", "folds"),
            *(Column(name, over="accuracy, %") for name in spread),
            *(Column(name, over="macro F1, %") for name in spread),
            *(Column(name, over="macro AUROC") for name in spread),
            *(Column(name, over="calibrated, pooled") for name in ("ECE", "Brier", "NLL")),
        ),
        rows=tuple(rows),
        notes=(
            "Mean over folds, each fold counting once, and SD and range of the folds. The interval of the mean is that "
            f"of the procedure: other patients{_other_values(pools)} and another training set; it allows for training "
            "sets that overlap (Nadeau and Bengio 2003). Of accuracy and macro F1 it is not narrower than that of the "
            "patients of the pool. AUROC, SD, range and calibration have none.",
            "There is no AUROC of the pool: each fold's scores are of another model and not on one scale, so ranking "
            "images of different folds against each other would mean nothing. Its mean over folds stands instead.",
            "Calibration: of the pooled probabilities, each fold at the temperature fitted on its own validation "
            "images.",
        ),
    )


def each_fold_table(pools: Sequence[Pooled], *, number: int = 1) -> Table:
    """The figures of every fold by itself; of folds by a column, such as sites, by the column's value.

    Args:
        pools: At least one, all of the same classes.
        number: Of several tables of a report.
    """
    names = pools[0].class_names
    column = pools[0].candidate.results[0].run.setting("data.fold_column")
    repeated = any(len(each.rounds) > 1 for each in pools)
    return Table(
        key="fold-each" + ("" if number == 1 else f"-{number}"),
        title=f"Cross-validation: each {column or 'fold'} by itself",
        basis=_basis(pools, IMAGES),
        columns=(
            *text_columns("model", "stage", str(column or "fold")),
            *(text_columns("run") if repeated else ()),
            Column("images"),
            Column("groups"),
            Column("accuracy", unit="%"),
            Column("macro F1", unit="%"),
            Column("macro AUROC"),
            *(Column(name, over="sensitivity", unit="%") for name in names),
        ),
        rows=tuple(
            Row(tuple(_fold_cells(each.candidate, result, repeated=repeated)))
            for each in pools
            for result in sorted(each.candidate.results_used, key=_fold_order)
        ),
        notes=(f"Tested on the images of that {column}, by a model trained without them.",) if column else (),
    )


def _pool(candidate: Candidate) -> Pooled:
    patients = [patients_of(each) for each in candidate.pooled]
    calibrated = [[result.calibration for result in each] for each in candidate.rounds]
    calibration = None
    if all(one is not None for each in calibrated for one in each):
        pools = [pool_predictions([one.test for one in each if one is not None]) for each in calibrated]
        calibration = tuple(calibration_scores(each.probabilities, each.true) for each in pools)
    return Pooled(
        candidate,
        candidate.pooled,
        tuple(each for each in patients if each is not None) if all(each is not None for each in patients) else None,
        calibration,
    )


def _pooled_rows(each: Pooled, level: str, *, repeated: bool) -> list[Row]:
    tables = [predictions for predictions, _ in each.patients or ()] if level == PATIENTS else list(each.rounds)
    rows = []
    for predictions, results in zip(tables, each.candidate.rounds, strict=True):
        cells: list[Cell] = [*each.head, *([_repeat_name(results[0])] if repeated else [])]
        cells += [len(predictions.true), *([len(np.unique(predictions.group))] if level == IMAGES else [])]
        rows.append(Row((*cells, *_index_cells(predictions))))
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


def _index_cells(predictions: Predictions) -> list[Cell]:
    groups = predictions.clusters
    shares = proportions_of_predictions(
        predictions.true, predictions.predicted, groups, classes=predictions.classes, confidence=CONFIDENCE
    )
    indices = indices_of_predictions(
        predictions.true,
        predictions.predicted,
        groups,
        classes=predictions.classes,
        confidence=CONFIDENCE,
    )
    cells: list[Cell] = [in_percent(shares.accuracy), in_percent(indices.balanced_accuracy)]
    cells += [in_percent(indices.macro_f1), as_number(indices.cohen_kappa, digits=2), as_number(indices.mcc, digits=2)]
    return [*cells, *(in_percent(share) for kind in (shares.sensitivity, shares.precision) for share in kind)]


def _pooled_notes(pools: Sequence[Pooled], level: str, *, repeated: bool) -> list[str]:
    notes = [
        f"Out of fold: each image was tested once, by the model of the fold that left it{_left_out_too(pools)} out. "
        f"These intervals tell the spread over patients, with the trained models as they are; the table of the "
        f"procedure allows for training too."
    ]
    left_out = sum(left for each in pools for _, left in (each.patients or ())[:1]) if level == PATIENTS else 0
    if level == PATIENTS:
        notes.append("Each patient counts once, by the mean probability of its images.")
    if left_out:
        notes.append(f"Groups of several true classes are left out ({left_out} over all rows).")
    if repeated:
        notes.append(
            "Each repeat of the folds is pooled by itself; the last row of a block is the mean of the repeats."
        )
    missing = [each for each in pools if not each.candidate.is_complete]
    if missing:
        verb = "lacks" if len(missing) == 1 else "lack"
        notes.append(
            f"INCOMPLETE: {len(missing)} of {len(pools)} {verb} folds; such figures hold for the images of the folds "
            "that are there."
        )
    runs = list(dict.fromkeys(result.run.label for each in pools for result in each.candidate.left_out))
    if runs:
        notes.append(f"Left out, since their repeat lacks folds that others have: {', '.join(runs)}.")
    return notes


def _left_out_too(pools: Sequence[Pooled]) -> str:
    """What else a fold leaves out of training, as far as the runs' splits say."""
    runs = {result.run for each in pools for result in each.candidate.results}
    known = all(run.grouped and run.split is not None and not run.split.shared_groups for run in runs)
    return " and its patient" if known else ""


def _basis(pools: Sequence[Pooled], level: str) -> str:
    return pooled_from([result for each in pools for result in each.candidate.results_used], level=level)


def _other_values(pools: Sequence[Pooled]) -> str:
    """What else another time would be other, where folds are the values of a column."""
    column = pools[0].candidate.results[0].run.setting("data.fold_column")
    return "" if column is None else f", another {column}"


def _over_runs(results: Sequence[Result], name: str) -> float:
    """The mean of an index over the runs that tested the same images."""
    if name == "auroc":
        return float(np.mean([result.images.ranking.macro_auroc.value for result in results]))
    return float(np.mean([index_of(result, name) for result in results]))


def _fold_cells(candidate: Candidate, result: Result, *, repeated: bool) -> list[Cell]:
    level = result.images
    cells: list[Cell] = [candidate.configuration, candidate.stage, str(result.run.fold)]
    cells += [_repeat_name(result)] if repeated else []
    cells += [result.test.images, result.test.groups, in_percent(level.shares.accuracy)]
    cells += [in_percent(level.indices.macro_f1), as_number(level.ranking.macro_auroc)]
    return [*cells, *(in_percent(share) for share in level.shares.sensitivity)]


def _fold_order(result: Result) -> tuple[int, str]:
    """Folds by number, named ones by name."""
    fold = str(fold_of(result))
    return (int(fold), "") if fold.isdigit() else (1 << 31, str(result.run.fold))


def _repeat_name(result: Result) -> str:
    """What sets a repeat of the folds apart."""
    seed, split = result.run.setting("seed"), result.run.setting("data.split_seed")
    return f"seed={seed}" + (f", split_seed={split}" if split else "")
