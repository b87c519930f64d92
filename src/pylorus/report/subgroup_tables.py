"""Performance in subgroups of the test images: by device, site, sex, age or any other column of the manifest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import format_p_value, join_names
from pylorus.evaluation.comparison import holm
from pylorus.evaluation.discrimination import auroc
from pylorus.evaluation.index_intervals import ClassProportions, proportions_of_predictions
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.populations import calibration_in_the_large, subgroup_difference
from pylorus.report.captions import format_test_basis
from pylorus.report.evidence import Evidence
from pylorus.report.mistakes import Item, Section, Sentences
from pylorus.report.results import CONFIDENCE, LEVEL, ReportOptions, Result
from pylorus.report.subgroup_columns import (
    OTHER,
    RARE_VALUES,
    Subgroup,
    SubgroupColumn,
    get_subgroup_columns,
)
from pylorus.report.table import (
    Cell,
    Column,
    Row,
    Table,
    convert_to_number_cell,
    convert_to_p_value_cell,
    convert_to_percent_cell,
    create_text_columns,
)

UNDEFINED = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class SubgroupColumnTest:
    """Test of whether a metric differs between the subgroups of one column.

    Attributes:
        column: Name of the column.
        subgroups: Number of subgroups compared; images without a value are excluded.
        index: The metric, "accuracy" or "sensitivity of GC".
        p_value: p of the permutation test; NaN if no difference is possible.
        corrected: The p after Holm's correction over the columns tested for this metric.
        family: Number of these columns.
    """

    column: str
    subgroups: int
    index: str
    p_value: float
    corrected: float
    family: int

    @property
    def is_shown(self) -> bool:
        """Whether the difference between the subgroups is statistically significant."""
        return self.corrected < LEVEL


def build_subgroup_section(evidence: Evidence) -> Section:
    """Build the section on subgroups: the tables of each run's shipped stage, the tests, and the omitted columns."""
    items: list[Item] = []
    shipped = [result for result in evidence.results if result.is_shipped and result.test.about]
    for result in shipped:
        columns = [column for column in get_subgroup_columns(result) if column.subgroups]
        if not columns:
            continue
        tests = compute_subgroup_tests(result, columns, class_name=evidence.class_name, options=evidence.options)
        items.append(build_subgroup_table(result, columns))
        if evidence.class_name in result.images.predictions.class_names:
            items.append(build_class_subgroup_table(result, columns, class_name=str(evidence.class_name)))
        items += [
            build_subgroup_test_table(result, tests),
            Sentences(format_subgroup_sentences(result, tests), is_list=True),
        ]
    omitted = build_omitted_column_table(shipped)
    return Section("subgroups", "Subgroups of the test images", (*items, *([omitted] if omitted else [])))


def build_subgroup_table(result: Result, columns: Sequence[SubgroupColumn]) -> Table:
    """Build the table of accuracy and per-class sensitivity in each subgroup.

    Args:
        result: The result on the test images.
        columns: At least one, each with subgroups.
    """
    predictions = result.test.predictions
    rows = []
    for column, subgroup in _list_subgroups(columns):
        proportions = _compute_subgroup_proportions(result, subgroup)
        cells: list[Cell] = [
            *_build_subgroup_head_cells(result, column, subgroup),
            convert_to_percent_cell(proportions.accuracy),
        ]
        rows.append(Row((*cells, *(convert_to_percent_cell(proportion) for proportion in proportions.sensitivity))))
    return Table(
        key=f"subgroups-{result.run.stem}-{result.stage.name}",
        title=f"{result.label}: accuracy and sensitivity in subgroups of the test images",
        basis=format_test_basis([result]),
        columns=(
            *_build_subgroup_head_columns(),
            Column("accuracy", unit="%"),
            *(Column(name, heading="sensitivity", unit="%") for name in predictions.class_names),
        ),
        rows=tuple(rows),
        notes=(
            "Each interval is that of one subgroup, not corrected for the number of subgroups; with many subgroups, "
            "some intervals will not overlap by chance alone. Differences between the subgroups of a column are "
            "tested below.",
            *_format_binning_notes(columns),
        ),
    )


def build_class_subgroup_table(result: Result, columns: Sequence[SubgroupColumn], *, class_name: str) -> Table:
    """Build the table of one class versus the rest: sensitivity, specificity, AUROC and calibration in the large.

    Args:
        result: The result on the test images.
        columns: At least one, each with subgroups.
        class_name: Short name of one of the result's classes.
    """
    class_index = result.test.predictions.class_names.index(class_name)
    rows = []
    for column, subgroup in _list_subgroups(columns):
        proportions, area, calibration = (
            _compute_subgroup_proportions(result, subgroup),
            *_compute_subgroup_ranking(result, subgroup, class_index),
        )
        cells: list[Cell] = [
            *_build_subgroup_head_cells(result, column, subgroup),
            proportions.sensitivity[class_index].total,
        ]
        cells += [
            convert_to_percent_cell(proportions.sensitivity[class_index]),
            convert_to_percent_cell(proportions.specificity[class_index]),
            convert_to_number_cell(area),
        ]
        rows.append(
            Row((*cells, convert_to_percent_cell(calibration)) if result.calibration is not None else tuple(cells))
        )
    calibration_notes = (
        "Calibration in the large: observed proportion minus mean calibrated probability of the class, in percentage "
        "points; values above 0 mean that the model underestimates the class, values below 0 that it overestimates it.",
    )
    return Table(
        key=f"class-subgroups-{result.run.stem}-{result.stage.name}",
        title=f"{result.label}: {class_name} versus the rest in subgroups of the test images",
        basis=format_test_basis([result]),
        columns=(
            *_build_subgroup_head_columns(),
            Column(f"images of {class_name}"),
            Column("sensitivity", unit="%"),
            Column("specificity", unit="%"),
            Column("AUROC"),
            *((Column("calibration in the large", unit="points"),) if result.calibration is not None else ()),
        ),
        rows=tuple(rows),
        notes=(
            f"Sensitivity and specificity: an image counts as {class_name} if that is its most probable class.",
            *(calibration_notes if result.calibration is not None else ()),
        ),
    )


def compute_subgroup_tests(
    result: Result, columns: Sequence[SubgroupColumn], *, class_name: str | None, options: ReportOptions
) -> tuple[SubgroupColumnTest, ...]:
    """Test accuracy, and the sensitivity of one class, for differences between the subgroups of each column.

    Each metric is a family of its own, corrected by Holm's method over the columns. An undefined p counts as 1.

    Args:
        result: The result on the test images.
        columns: The columns with subgroups.
        class_name: Short name of the class; if None or not one of the result's classes, only accuracy is tested.
        options: Provides the seed of the permutations.
    """
    predictions = result.test.predictions
    indices = {"accuracy": np.ones(len(predictions.true), dtype=np.bool_)}
    if class_name in predictions.class_names:
        indices[f"sensitivity of {class_name}"] = predictions.true == predictions.class_names.index(class_name)
    column_tests = []
    for index, is_included in indices.items():
        tests = [_compute_column_test(result, column, is_included, seed=options.seed) for column in columns]
        p_values = np.array([p for _, p in tests])
        corrected = holm(np.where(np.isnan(p_values), 1.0, p_values))
        corrected = np.where(np.isnan(p_values), np.nan, corrected)
        column_tests += [
            SubgroupColumnTest(column.name, subgroups, index, p, float(corrected_p), len(columns))
            for column, (subgroups, p), corrected_p in zip(columns, tests, corrected, strict=True)
        ]
    return tuple(column_tests)


def build_subgroup_test_table(result: Result, tests: Sequence[SubgroupColumnTest]) -> Table:
    """Build the table of these tests, one row per metric and column."""
    unit = "patients" if result.run.has_groups else "images, since patients are unknown"
    return Table(
        key=f"subgroup-differences-{result.run.stem}-{result.stage.name}",
        title=f"{result.label}: tests of difference between the subgroups of each column",
        basis=format_test_basis([result]),
        columns=(
            *create_text_columns("index", "column"),
            Column("subgroups"),
            Column("p"),
            Column("p, corrected"),
        ),
        rows=tuple(
            Row(
                (
                    test.index,
                    test.column,
                    test.subgroups,
                    convert_to_p_value_cell(test.p_value),
                    convert_to_p_value_cell(test.corrected),
                )
            )
            for test in tests
        ),
        notes=(
            f"Permutation test over {unit}, with a chi-square statistic between the subgroups. Images without a value "
            "in the column are excluded. p corrected by Holm's method over the columns tested for the same index.",
        ),
    )


def format_subgroup_sentences(result: Result, tests: Sequence[SubgroupColumnTest]) -> tuple[str, ...]:
    """Say for each metric between which subgroups a difference is shown, is not shown, or cannot be tested."""
    sentences = []
    for index in dict.fromkeys(test.index for test in tests):
        index_tests = [test for test in tests if test.index == index]
        significant = [test for test in index_tests if test.is_shown]
        not_significant = [test.column for test in index_tests if not test.is_shown and not math.isnan(test.p_value)]
        untestable = [test.column for test in index_tests if math.isnan(test.p_value)]
        correction = (
            f" after Holm's correction for {index_tests[0].family} columns" if index_tests[0].family > 1 else ""
        )
        sentences += [
            f"The {index} of {result.label} differs between the subgroups of {test.column} "
            f"({format_p_value(test.corrected, level=LEVEL)}{correction})."
            for test in significant
        ]
        if not_significant:
            sentences.append(
                f"The {index} of {result.label} is not shown to differ between the subgroups of "
                f"{join_names(not_significant)}{correction}; nor is it shown to be the same."
            )
        if untestable:
            sentences.append(
                f"Whether the {index} of {result.label} differs between the subgroups of {join_names(untestable)} "
                f"cannot be tested: all of these images are classified correctly, or none, or they all belong to one "
                f"subgroup."
            )
    return tuple(sentences)


def build_omitted_column_table(results: Sequence[Result]) -> Table | None:
    """Build the table of omitted columns, with the reasons but without their values; None if no column was omitted."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for column in get_subgroup_columns(result):
            if not column.subgroups:
                reasons.setdefault((column.name, column.reason), []).append(result.run.label)
    if not reasons:
        return None
    return Table(
        key="subgroup-columns-left-out",
        title="Manifest columns for which no subgroups were formed",
        basis="Decided from the values of the test images, never from the name of the column.",
        columns=create_text_columns("column", "why", *(("runs",) if len(results) > 1 else ())),
        rows=tuple(
            Row((name, reason, *(_format_run_cell(runs, results) if len(results) > 1 else ())))
            for (name, reason), runs in reasons.items()
        ),
        notes=("If such a column does not identify a person, replace its values by codes (site-1, device-2) or ages.",),
    )


def _format_run_cell(runs: Sequence[str], results: Sequence[Result]) -> tuple[str]:
    return ("all" if len(runs) == len(results) else ", ".join(runs),)


def _list_subgroups(columns: Sequence[SubgroupColumn]) -> list[tuple[SubgroupColumn, Subgroup]]:
    return [(column, subgroup) for column in columns for subgroup in column.subgroups]


def _build_subgroup_head_columns() -> tuple[Column, ...]:
    return (*create_text_columns("column", "subgroup"), Column("images"), Column("groups"))


def _build_subgroup_head_cells(result: Result, column: SubgroupColumn, subgroup: Subgroup) -> list[Cell]:
    groups = len(np.unique(result.test.predictions.group[subgroup.images]))
    return [column.name, subgroup.name, int(subgroup.images.sum()), groups]


def _compute_subgroup_proportions(result: Result, subgroup: Subgroup) -> ClassProportions:
    predictions = result.test.predictions
    return proportions_of_predictions(
        predictions.true[subgroup.images],
        predictions.predicted[subgroup.images],
        _get_subgroup_clusters(result, subgroup.images),
        classes=predictions.classes,
        confidence=CONFIDENCE,
    )


def _compute_subgroup_ranking(result: Result, subgroup: Subgroup, class_index: int) -> tuple[Estimate, Estimate]:
    """Compute AUROC and calibration in the large of the class at a column index."""
    predictions, images = result.test.predictions, subgroup.images
    groups = _get_subgroup_clusters(result, images)
    positive = predictions.true[images] == class_index
    area = auroc(positive, predictions.probabilities[images, class_index], groups, confidence=CONFIDENCE)
    if result.calibration is None:
        return area, UNDEFINED
    calibrated = result.calibration.test.probabilities[images, class_index]
    return area, calibration_in_the_large(positive, calibrated, groups, confidence=CONFIDENCE)


def _get_subgroup_clusters(result: Result, images: NDArray[np.bool_]) -> NDArray[np.generic] | None:
    """Return the group of each selected image, or None if every group has a single image."""
    return result.test.predictions.group[images] if result.test.clusters is not None else None


def _compute_column_test(
    result: Result, column: SubgroupColumn, is_included: NDArray[np.bool_], *, seed: int
) -> tuple[int, float]:
    """Return the number of subgroups with images and the p-value of their difference."""
    subgroup_index = np.full(len(is_included), -1)
    for number, subgroup in enumerate(each for each in column.subgroups if each.is_stated):
        subgroup_index[subgroup.images] = number
    selected = is_included & (subgroup_index >= 0)
    if not selected.any():
        return 0, math.nan
    predictions = result.test.predictions
    difference = subgroup_difference(
        predictions.correct[selected], subgroup_index[selected], predictions.group[selected], seed=seed
    )
    return difference.subgroups, difference.p_value


def _format_binning_notes(columns: Sequence[SubgroupColumn]) -> tuple[str, ...]:
    """Explain how subgroups were formed, as far as it concerns these columns."""
    names = [subgroup.name for _, subgroup in _list_subgroups(columns)]
    notes = []
    if any(name.startswith("below ") for name in names):
        notes.append("Columns with many different numbers are divided at their quartiles.")
    if OTHER in names:
        notes.append("For columns with more than 12 values, the 11 most frequent ones are shown.")
    if RARE_VALUES in names:
        notes.append("Values that occur in only one patient are not shown.")
    return tuple(notes)
