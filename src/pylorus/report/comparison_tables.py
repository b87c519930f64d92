"""Pairs of results on the same test images: differences, intervals and p-values in one table."""

import math
from collections.abc import Sequence

from pylorus.evaluation.estimate import Estimate
from pylorus.report.basis import tested_on
from pylorus.report.comparison import Comparison
from pylorus.report.table import Column, Row, Table, as_number, in_percent, p_value, text_columns


def comparison_table(comparisons: Sequence[Comparison], *, class_name: str | None) -> Table:
    """Every pair that was compared, first minus second.

    Args:
        comparisons: At least one.
        class_name: The class whose AUROC was compared; None if none was.
    """
    results = list(dict.fromkeys(each for pair in comparisons for each in (pair.first, pair.second)))
    family = comparisons[0].family
    corrected = (
        f"corrected by Holm's method over the {family} pairs of its column" if family > 1 else "of a single pair"
    )
    return Table(
        key="comparisons",
        title="Differences on the same test images, first minus second",
        basis=tested_on(results),
        columns=(
            *text_columns("first", "second"),
            Column("first alone right", over="images"),
            Column("second alone right", over="images"),
            Column("accuracy, points"),
            Column("p", over="McNemar"),
            Column("macro F1, points"),
            Column("p", over="exchange"),
            Column(f"AUROC {class_name or ''}".strip()),
            Column("p", over="DeLong"),
        ),
        rows=tuple(_row(each) for each in comparisons),
        notes=(
            f"Each p is {corrected}; intervals are of each pair by itself.",
            "A difference is shown where p is below 0.05.",
            "McNemar: exact, the images of a group kept together. Macro F1: the two models' answers exchanged on "
            "whole groups. AUROC: DeLong, in groups Obuchowski.",
        ),
    )


def _row(each: Comparison) -> Row:
    auroc: Estimate = each.auroc or Estimate(math.nan, math.nan, math.nan)
    return Row(
        (
            each.first.label,
            each.second.label,
            each.images.only_first,
            each.images.only_second,
            in_percent(each.differences.accuracy),
            p_value(each.corrected["accuracy"]),
            in_percent(each.differences.macro_f1),
            p_value(each.corrected["macro_f1"]),
            as_number(auroc),
            p_value(each.corrected["auroc"]),
        )
    )
