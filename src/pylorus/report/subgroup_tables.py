"""How a model does in parts of the test images: by device, site, sex, age or whatever a manifest says of them."""

import re

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.report.basis import tested_on
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.table import Cell, Column, Row, Table, in_percent, text_columns

MOST_VALUES = 12
"""A column of words with more values than these, such as a name, makes no subgroups."""
MOST_NUMBERS = 5
"""A column with more different numbers than these, such as an age, is cut at its quartiles."""
SHARES = (0.25, 0.5, 0.75)
NOT_KNOWN = "not stated"
SINGLE = "values of a single patient"
IDENTIFYING = re.compile(
    r"(^|[^a-z])(name|surname|vorname|nachname|mrn|birth[a-z]*|dob|accession|e?mail|phone|address|id)([^a-z]|$)"
    r"|^(patient|person|case)s?$",
    re.IGNORECASE,
)
"""Names of columns that tell who a patient is: they make no subgroups, however few values they have."""


def subgroup_table(result: Result) -> Table | None:
    """Accuracy and each class's sensitivity in each subgroup; None where no column makes any."""
    said = result.test.predictions
    rows: list[Row] = []
    for column, values in result.test.about.items():
        if IDENTIFYING.search(column):
            continue
        shown = (
            without_single_patients(values, np.asarray(said.group, dtype=np.str_))
            if result.test.clusters is not None
            else values
        )
        for name, chosen in subgroups(shown):
            found = proportions_of_predictions(
                said.true[chosen],
                said.predicted[chosen],
                said.group[chosen] if result.test.clusters is not None else None,
                classes=said.classes,
                confidence=CONFIDENCE,
            )
            cells: list[Cell] = [column, name, int(chosen.sum()), len(np.unique(said.group[chosen]))]
            cells += [in_percent(found.accuracy), *(in_percent(share) for share in found.sensitivity)]
            rows.append(Row(tuple(cells)))
    if not rows:
        return None
    return Table(
        key=f"subgroups-{result.run.stem}-{result.stage.name}",
        title=f"{result.label}: subgroups of the test images",
        basis=tested_on([result]),
        columns=(
            *text_columns("column", "subgroup"),
            Column("images"),
            Column("groups"),
            Column("accuracy", unit="%"),
            *(Column(name, over="sensitivity", unit="%") for name in said.class_names),
        ),
        rows=tuple(rows),
        notes=(
            "Wilson intervals that allow for groups, each for itself and not corrected for their number: with many "
            "subgroups some differ by chance. A column of many numbers is cut at its quartiles.",
        ),
    )


def without_single_patients(values: NDArray[np.str_], group: NDArray[np.generic]) -> NDArray[np.str_]:
    """The values, but for words that only one patient has: such a word may be a name, and tells of no subgroup.

    Args:
        values: Of shape (images,), as text; empty where nothing is known.
        group: The patient of each image, of shape (images,).
    """
    if _numbers(values[values != ""]) is not None:
        return values
    patients = {value: len(set(group[values == value])) for value in set(values.tolist())}
    return np.array([SINGLE if value and patients[value] == 1 else value for value in values.tolist()])


def subgroups(values: NDArray[np.str_]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Names of a column's subgroups and which images belong to each; none where it has one or too many values.

    Args:
        values: Of shape (images,), as text; empty where nothing is known.

    Example:
        >>> [(name, int(chosen.sum())) for name, chosen in subgroups(np.array(["B", "A", "B", ""]))]
        [('A', 1), ('B', 2), ('not stated', 1)]
    """
    known = values != ""
    distinct = sorted(set(values[known].tolist()))
    found: list[tuple[str, NDArray[np.bool_]]] = []
    numbers = _numbers(values[known]) if len(distinct) > MOST_NUMBERS else None
    if numbers is not None:
        spread = np.full(len(values), np.nan)
        spread[known] = numbers
        edges = np.unique([numbers.min(), *np.quantile(numbers, SHARES), numbers.max()])
        for place in range(len(edges) - 1):
            last = place == len(edges) - 2
            chosen = (spread >= edges[place]) & ((spread <= edges[-1]) if last else (spread < edges[place + 1]))
            words = "to" if last else "to below"
            found.append((f"{edges[place]:g} {words} {edges[place + 1]:g}", chosen))
    elif 1 < len(distinct) <= MOST_VALUES:
        found = [(value, values == value) for value in distinct]
    if found and not known.all():
        found.append((NOT_KNOWN, ~known))
    return [(name, chosen) for name, chosen in found if chosen.any()]


def _numbers(values: NDArray[np.str_]) -> NDArray[np.float64] | None:
    try:
        numbers = values.astype(np.float64)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None
