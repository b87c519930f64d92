"""How a model does in parts of the test images: by device, site, sex, age or whatever a manifest says of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.comparison import holm
from pylorus.evaluation.delong import auroc
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.proportion import ClassProportions, proportions_of_predictions
from pylorus.evaluation.sentence import p_text
from pylorus.evaluation.subgroups import calibration_in_the_large, subgroup_difference
from pylorus.report.basis import tested_on
from pylorus.report.evidence import Evidence
from pylorus.report.options import CONFIDENCE, LEVEL, ReportOptions
from pylorus.report.result import Result
from pylorus.report.section import Item, Section, Sentences
from pylorus.report.subgroup_columns import OTHER, RARE, Subgroup, SubgroupColumn, subgroup_columns
from pylorus.report.table import Cell, Column, Row, Table, as_number, in_percent, p_value, text_columns

UNDEFINED = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class ColumnTest:
    """Whether a result differs between the subgroups of one column.

    Attributes:
        column: Its name.
        subgroups: How many were compared; images of which nothing is stated are left out.
        index: "accuracy" or "sensitivity of GC".
        p_value: Of the permutation test; nan where nothing can differ.
        corrected: After Holm's correction over the columns of the index.
        family: How many columns that is.
    """

    column: str
    subgroups: int
    index: str
    p_value: float
    corrected: float
    family: int

    @property
    def is_shown(self) -> bool:
        """Whether the subgroups are shown to differ."""
        return self.corrected < LEVEL


def columns_of(result: Result) -> tuple[SubgroupColumn, ...]:
    """The columns that the manifest says of a result's test images, each with its subgroups or why it has none."""
    cut_by = result.run.setting("data.test_column") or result.run.setting("data.fold_column")
    return subgroup_columns(result.test.about, result.test.predictions.group, test_column=cut_by)


def subgroup_section(evidence: Evidence) -> Section:
    """The subgroups of each run's final result, what differs between them, and the columns that are left out."""
    items: list[Item] = []
    final = [result for result in evidence.results if result.is_shipped and result.test.about]
    for result in final:
        columns = [column for column in columns_of(result) if column.subgroups]
        if not columns:
            continue
        tests = difference_tests(result, columns, class_name=evidence.class_name, options=evidence.options)
        items.append(subgroup_table(result, columns))
        if evidence.class_name in result.images.predictions.class_names:
            items.append(class_subgroup_table(result, columns, class_name=str(evidence.class_name)))
        items += [difference_table(result, tests), Sentences(difference_sentences(result, tests), listed=True)]
    left_out = left_out_table(final)
    return Section("subgroups", "Subgroups of the test images", (*items, *([left_out] if left_out else [])))


def subgroup_table(result: Result, columns: Sequence[SubgroupColumn]) -> Table:
    """Accuracy and each class's sensitivity in each subgroup.

    Args:
        result: Of the test images.
        columns: Those with subgroups, at least one.
    """
    said = result.test.predictions
    rows = []
    for column, subgroup in _each(columns):
        found = _shares(result, subgroup)
        cells: list[Cell] = [*_head(result, column, subgroup), in_percent(found.accuracy)]
        rows.append(Row((*cells, *(in_percent(share) for share in found.sensitivity))))
    return Table(
        key=f"subgroups-{result.run.stem}-{result.stage.name}",
        title=f"{result.label}: accuracy and sensitivity in subgroups of the test images",
        basis=tested_on([result]),
        columns=(
            *_head_columns(),
            Column("accuracy", unit="%"),
            *(Column(name, over="sensitivity", unit="%") for name in said.class_names),
        ),
        rows=tuple(rows),
        notes=(
            "Each interval is of its subgroup alone and not corrected for the number of subgroups: with many of them "
            "some lie apart by chance. Whether the subgroups of a column differ is tested below.",
            *_binning_notes(columns),
        ),
    )


def class_subgroup_table(result: Result, columns: Sequence[SubgroupColumn], *, class_name: str) -> Table:
    """One class against the rest in each subgroup: sensitivity, specificity, AUROC, calibration in the large.

    Args:
        result: Of the test images.
        columns: Those with subgroups, at least one.
        class_name: Short name of a class that the result knows.
    """
    place = result.test.predictions.class_names.index(class_name)
    rows = []
    for column, subgroup in _each(columns):
        found, area, calibration = _shares(result, subgroup), *_ranking_and_calibration(result, subgroup, place)
        cells: list[Cell] = [*_head(result, column, subgroup), found.sensitivity[place].total]
        cells += [in_percent(found.sensitivity[place]), in_percent(found.specificity[place]), as_number(area)]
        rows.append(Row((*cells, in_percent(calibration)) if result.calibration is not None else tuple(cells)))
    calibrated = (
        "Calibration in the large: observed share less mean calibrated probability of the class, in points; above 0 "
        "the model expects too few of them, below 0 too many.",
    )
    return Table(
        key=f"class-subgroups-{result.run.stem}-{result.stage.name}",
        title=f"{result.label}: {class_name} against the rest in subgroups of the test images",
        basis=tested_on([result]),
        columns=(
            *_head_columns(),
            Column(f"images of {class_name}"),
            Column("sensitivity", unit="%"),
            Column("specificity", unit="%"),
            Column("AUROC"),
            *((Column("calibration in the large", unit="points"),) if result.calibration is not None else ()),
        ),
        rows=tuple(rows),
        notes=(
            f"Sensitivity and specificity: {class_name} where it is the likeliest class.",
            *(calibrated if result.calibration is not None else ()),
        ),
    )


def difference_tests(
    result: Result, columns: Sequence[SubgroupColumn], *, class_name: str | None, options: ReportOptions
) -> tuple[ColumnTest, ...]:
    """Tests accuracy, and the class's sensitivity, for a difference between the subgroups of each column.

    Each index is a family of its own, corrected by Holm's method over the columns. A p that can't be told counts as 1.

    Args:
        result: Of the test images.
        columns: Those with subgroups.
        class_name: Short name of the class; None or one that the result does not know: accuracy alone.
        options: Seed of the permutations.
    """
    said = result.test.predictions
    indices = {"accuracy": np.ones(len(said.true), dtype=np.bool_)}
    if class_name in said.class_names:
        indices[f"sensitivity of {class_name}"] = said.true == said.class_names.index(class_name)
    found = []
    for index, among in indices.items():
        tested = [_test(result, column, among, seed=options.seed) for column in columns]
        p_values = np.array([p for _, p in tested])
        corrected = holm(np.where(np.isnan(p_values), 1.0, p_values))
        corrected = np.where(np.isnan(p_values), np.nan, corrected)
        found += [
            ColumnTest(column.name, subgroups, index, p, float(after), len(columns))
            for column, (subgroups, p), after in zip(columns, tested, corrected, strict=True)
        ]
    return tuple(found)


def difference_table(result: Result, tests: Sequence[ColumnTest]) -> Table:
    """The tests, a row a column and index."""
    whose = "patients" if result.run.grouped else "images, since patients are not known"
    return Table(
        key=f"subgroup-differences-{result.run.stem}-{result.stage.name}",
        title=f"{result.label}: tests of difference between the subgroups of each column",
        basis=tested_on([result]),
        columns=(
            *text_columns("index", "column"),
            Column("subgroups"),
            Column("p"),
            Column("p, corrected"),
        ),
        rows=tuple(
            Row((test.index, test.column, test.subgroups, p_value(test.p_value), p_value(test.corrected)))
            for test in tests
        ),
        notes=(
            f"Permutation test over {whose}: the statistic is a chi-square between the subgroups. Images of which "
            "nothing is stated are left out. Corrected by Holm's method over the columns of an index.",
        ),
    )


def difference_sentences(result: Result, tests: Sequence[ColumnTest]) -> tuple[str, ...]:
    """What is and what is not shown of each index."""
    sentences = []
    for index in dict.fromkeys(test.index for test in tests):
        own = [test for test in tests if test.index == index]
        shown = [test for test in own if test.is_shown]
        rest = [test.column for test in own if not test.is_shown and not math.isnan(test.p_value)]
        nothing = [test.column for test in own if math.isnan(test.p_value)]
        after = f" after Holm's correction for {own[0].family} columns" if own[0].family > 1 else ""
        sentences += [
            f"The {index} of {result.label} differs between the subgroups of {test.column} "
            f"({p_text(test.corrected, level=LEVEL)}{after})."
            for test in shown
        ]
        if rest:
            sentences.append(
                f"The {index} of {result.label} is not shown to differ between the subgroups of {_listed(rest)}"
                f"{after}; nor is it shown to be the same."
            )
        if nothing:
            sentences.append(
                f"Whether the {index} of {result.label} differs between the subgroups of {_listed(nothing)} can't be "
                "told: all of these images are recognised, or none, or one subgroup alone holds them."
            )
    return tuple(sentences)


def left_out_table(results: Sequence[Result]) -> Table | None:
    """The columns that make no subgroups, each with the reason and without its values; None where there is none."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for column in columns_of(result):
            if not column.subgroups:
                reasons.setdefault((column.name, column.reason), []).append(result.run.label)
    if not reasons:
        return None
    return Table(
        key="subgroup-columns-left-out",
        title="Columns of the manifest that make no subgroups",
        basis="Judged by the values of the test images, never by the column's name.",
        columns=text_columns("column", "why", *(("runs",) if len(results) > 1 else ())),
        rows=tuple(
            Row((name, reason, *(_whose(runs, results) if len(results) > 1 else ())))
            for (name, reason), runs in reasons.items()
        ),
        notes=("If such a column names no person, write codes (site-1, device-2) or ages in place of its values.",),
    )


def _whose(runs: Sequence[str], results: Sequence[Result]) -> tuple[str]:
    return ("all" if len(runs) == len(results) else ", ".join(runs),)


def _each(columns: Sequence[SubgroupColumn]) -> list[tuple[SubgroupColumn, Subgroup]]:
    return [(column, subgroup) for column in columns for subgroup in column.subgroups]


def _head_columns() -> tuple[Column, ...]:
    return (*text_columns("column", "subgroup"), Column("images"), Column("groups"))


def _head(result: Result, column: SubgroupColumn, subgroup: Subgroup) -> list[Cell]:
    groups = len(np.unique(result.test.predictions.group[subgroup.images]))
    return [column.name, subgroup.name, int(subgroup.images.sum()), groups]


def _shares(result: Result, subgroup: Subgroup) -> ClassProportions:
    said = result.test.predictions
    return proportions_of_predictions(
        said.true[subgroup.images],
        said.predicted[subgroup.images],
        _clusters(result, subgroup.images),
        classes=said.classes,
        confidence=CONFIDENCE,
    )


def _ranking_and_calibration(result: Result, subgroup: Subgroup, place: int) -> tuple[Estimate, Estimate]:
    """AUROC and calibration in the large of the class at a place."""
    said, images = result.test.predictions, subgroup.images
    groups = _clusters(result, images)
    positive = said.true[images] == place
    area = auroc(positive, said.probabilities[images, place], groups, confidence=CONFIDENCE)
    if result.calibration is None:
        return area, UNDEFINED
    calibrated = result.calibration.test.probabilities[images, place]
    return area, calibration_in_the_large(positive, calibrated, groups, confidence=CONFIDENCE)


def _clusters(result: Result, images: NDArray[np.bool_]) -> NDArray[np.generic] | None:
    """The group of each chosen image where groups hold several, else None."""
    return result.test.predictions.group[images] if result.test.clusters is not None else None


def _test(result: Result, column: SubgroupColumn, among: NDArray[np.bool_], *, seed: int) -> tuple[int, float]:
    """How many subgroups hold images, and the p of their difference."""
    place = np.full(len(among), -1)
    for number, subgroup in enumerate(each for each in column.subgroups if each.is_stated):
        place[subgroup.images] = number
    chosen = among & (place >= 0)
    if not chosen.any():
        return 0, math.nan
    said = result.test.predictions
    found = subgroup_difference(said.correct[chosen], place[chosen], said.group[chosen], seed=seed)
    return found.subgroups, found.p_value


def _binning_notes(columns: Sequence[SubgroupColumn]) -> tuple[str, ...]:
    """How subgroups were made, as far as these columns need it."""
    names = [subgroup.name for _, subgroup in _each(columns)]
    notes = []
    if any(name.startswith("below ") for name in names):
        notes.append("A column of many numbers is cut at its quartiles.")
    if OTHER in names:
        notes.append("Of a column of more than 12 values the 11 most frequent are shown.")
    if RARE in names:
        notes.append("A value that only one patient has is not shown.")
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
