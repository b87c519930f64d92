"""Form subgroups of the test images from each column of a manifest, or give the reason why a column has none."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pylorus.core.privacy import find_identifying_reason, is_nearly_unique, is_of_one_patient
from pylorus.report.results import Result

MAX_VALUES = 12
"""Maximum number of subgroups of a text column; if it has more values, the rarest are merged."""
MAX_NUMBERS = 5
"""A column with more different numbers than this, such as age, is divided at its quartiles."""
MAX_QUARTERS = 8
"""Dates in more quarters than this are grouped by year."""
MAX_YEARS = 25
"""Dates that span more years than this are treated as dates of birth."""
QUARTILES = (0.25, 0.5, 0.75)

NOT_STATED = "not stated"
RARE_VALUES = "values too rare to be shown"
"""Name of the subgroup of values that only one patient has."""
OTHER = "other"

DATES = (
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{1,2})(-\d{1,2}([T ].*)?)?"),
    re.compile(r"(?P<year>(19|20)\d\d)(?P<month>0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"),
    re.compile(r"\d{1,2}\.(?P<month>\d{1,2})\.(?P<year>\d{4})"),
    re.compile(r"(?P<year>\d{4})[/.](?P<month>\d{1,2})[/.]\d{1,2}"),
    re.compile(r"\d{1,2}/\d{1,2}/(?P<year>\d{4})"),  # day or month first: only the year is certain
)
"""Formats of dates: 2024-05-03, 20240503, 3.5.2024, 2024/05/03, 05/03/2024."""


@dataclass(frozen=True, eq=False)
class Subgroup:
    """A subgroup of the test images.

    Attributes:
        name: Name shown in the report.
        images: Mask of the images that belong to it, of shape (images,).
    """

    name: str
    images: NDArray[np.bool_]

    @property
    def is_stated(self) -> bool:
        """Whether the column has a value for these images."""
        return self.name != NOT_STATED


@dataclass(frozen=True, eq=False)
class SubgroupColumn:
    """A column of a manifest.

    Attributes:
        name: Name of the column.
        subgroups: At least two, or none if the column is omitted.
        reason: Why the column is omitted, without any of its values; empty if it is not omitted.
    """

    name: str
    subgroups: tuple[Subgroup, ...]
    reason: str = ""


def build_subgroup_columns(
    about: Mapping[str, NDArray[np.str_]], group: NDArray[np.generic], *, test_column: str | None = None
) -> tuple[SubgroupColumn, ...]:
    """Return every column with its subgroups or the reason for having none.

    Args:
        about: Values as text by column name, each of shape (images,); empty where unknown.
        group: The patient of each image, of shape (images,).
        test_column: The column that defines the test images, if there is one.

    Example:
        >>> sites, ages = np.array(["B", "A", "B", "A"]), np.array(["", "", "", ""])
        >>> site, age = build_subgroup_columns({"site": sites, "age": ages}, np.arange(4))
        >>> [subgroup.name for subgroup in site.subgroups], age.reason
        (['A', 'B'], 'no test image has a value')
    """
    columns = []
    for name, values in about.items():
        subgroups = _build_subgroups_or_reason(np.asarray(values, dtype=np.str_), group)
        if isinstance(subgroups, str):
            suffix = "; it defines the test images" if name == test_column else ""
            columns.append(SubgroupColumn(name, (), subgroups + suffix))
        else:
            columns.append(SubgroupColumn(name, subgroups))
    return tuple(columns)


def _build_subgroups_or_reason(values: NDArray[np.str_], group: NDArray[np.generic]) -> tuple[Subgroup, ...] | str:
    """Return the subgroups of a column's values, or the reason why there are none."""
    known = values != ""
    distinct = sorted(set(values[known].tolist()))
    if not distinct:
        return "no test image has a value"
    if len(distinct) == 1:
        return "all test images have the same value" if known.all() else "only one value is given"
    dates, numbers = _parse_months(values), parse_numbers(values)
    if dates is not None:
        if dates[known].max() - dates[known].min() > 12 * MAX_YEARS:
            return "its values look like dates of birth; give ages to form subgroups"
        return _group_by_shared_value(_convert_to_periods(values, dates), group)
    reason = find_identifying_reason(values, group)
    if reason is not None:
        return reason
    if numbers is not None and len(distinct) > MAX_NUMBERS:
        return _group_by_shared_value(_convert_to_quartiles(numbers), group)
    if len(distinct) > MAX_NUMBERS and is_nearly_unique(values, group):
        return "many patients have a value of their own, which could identify them"
    return _group_by_value(values, group)


def _group_by_value(values: NDArray[np.str_], group: NDArray[np.generic]) -> tuple[Subgroup, ...] | str:
    """Form one subgroup per value; of many values the most frequent ones, with the rest merged."""
    subgroups = _group_by_shared_value(values, group)
    if isinstance(subgroups, str) or len(subgroups) <= MAX_VALUES + sum(
        each.name in (RARE_VALUES, NOT_STATED) for each in subgroups
    ):
        return subgroups
    values = np.where(is_of_one_patient(values, group), OTHER, values)
    counts = Counter(values[(values != "") & (values != OTHER)].tolist())
    frequent = [name for name, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))[: MAX_VALUES - 1]]
    return _build_subgroups(np.where(np.isin(values, ["", *frequent]), values, OTHER))


def _group_by_shared_value(values: NDArray[np.str_], group: NDArray[np.generic]) -> tuple[Subgroup, ...] | str:
    """Form one subgroup per value shared by several patients; values of single patients are merged and not named."""
    if len(set(values.tolist()) - {""}) < 2:
        return "all its values fall into one subgroup"
    subgroups = _build_subgroups(replace_single_patient_values(values, group))
    return (
        subgroups
        if sum(each.is_stated for each in subgroups) > 1
        else "hardly any of its values are shared by two patients"
    )


def replace_single_patient_values(values: NDArray[np.str_], group: NDArray[np.generic]) -> NDArray[np.str_]:
    """Replace values that only one patient has by `RARE_VALUES`: such a value may be a name, and it forms no subgroup.

    Args:
        values: Values as text, of shape (images,); empty where unknown.
        group: The patient of each image, of shape (images,).

    Example:
        >>> replace_single_patient_values(np.array(["A", "A", "B"]), np.array([1, 2, 3])).tolist()
        ['A', 'A', 'values too rare to be shown']
    """
    return np.where(is_of_one_patient(values, group), RARE_VALUES, values)


def _build_subgroups(values: NDArray[np.str_]) -> tuple[Subgroup, ...]:
    """Form one subgroup per value, in order; merged and missing values come last."""
    last = (OTHER, RARE_VALUES, "")
    names = [name for name in _sort_subgroup_names(sorted(set(values.tolist()))) if name not in last]
    names += [name for name in last if (values == name).any()]
    return tuple(Subgroup(name or NOT_STATED, values == name) for name in names)


def _sort_subgroup_names(names: list[str]) -> list[str]:
    """Sort names by the numbers they begin with, if all do (`below` comes first)."""
    starts = [re.match(r"(below )?(-?\d+(\.\d+)?)", name) for name in names]
    if not all(starts):
        return names
    keys = {name: (float(start[2]), not start[1]) for name, start in zip(names, starts, strict=True) if start}
    return sorted(names, key=lambda name: (keys[name], name))


def _convert_to_quartiles(numbers: NDArray[np.float64]) -> NDArray[np.str_]:
    """Name the quartile range of each number, without the minimum and maximum, which identify single patients."""
    known = np.isfinite(numbers)
    is_integer = bool((numbers[known] % 1 == 0).all())
    quartiles = np.quantile(numbers[known], QUARTILES)
    edges = np.unique(np.ceil(quartiles) if is_integer else [float(f"{edge:.3g}") for edge in quartiles])
    edges = edges[(edges > numbers[known].min()) & (edges <= numbers[known].max())]
    labels = [f"{edge:.10g}" for edge in edges]
    names = [f"below {labels[0]}"] if labels else ["all"]
    names += [f"{low} to below {high}" for low, high in pairwise(labels)]
    names += [f"{labels[-1]} and above"] if labels else []
    bin_index = np.searchsorted(edges, np.where(known, numbers, 0), side="right")
    return np.where(known, np.array(names)[bin_index], "")


def _convert_to_periods(values: NDArray[np.str_], months: NDArray[np.float64]) -> NDArray[np.str_]:
    """Name the quarter or the year of each date; if there are many years, the quartile range of years."""
    known = np.isfinite(months)
    month_numbers = np.where(known, months, 0).astype(np.int64)
    quarters = [f"{month // 12} Q{month % 12 // 3 + 1}" for month in month_numbers.tolist()]
    by_year = any(DATES[-1].fullmatch(value) for value in values[known].tolist())
    if len(set(np.array(quarters)[known].tolist())) <= MAX_QUARTERS and not by_year:
        return np.where(known, np.array(quarters), "")
    years = np.where(known, month_numbers // 12, np.nan)
    if len(set(years[known].tolist())) > MAX_VALUES:
        return _convert_to_quartiles(years)
    return np.where(known, np.array([str(month // 12) for month in month_numbers.tolist()]), "")


def _parse_months(values: NDArray[np.str_]) -> NDArray[np.float64] | None:
    """Convert dates to months since year 0, NaN for empty values; None if a value is not a date."""
    months = np.full(len(values), np.nan)
    for index, value in enumerate(values.tolist()):
        if not value:
            continue
        match = next((match for form in DATES if (match := form.fullmatch(value))), None)
        parts = {} if match is None else match.groupdict()
        month = int(parts.get("month") or 1)
        if not parts or not 1 <= month <= 12 or not 1850 <= int(parts["year"]) <= 2150:
            return None
        months[index] = 12 * int(parts["year"]) + month - 1
    return months


def parse_numbers(values: NDArray[np.str_]) -> NDArray[np.float64] | None:
    """Convert values to numbers, NaN for empty values; None if one is not a number, or is a code such as 007."""
    known = values[values != ""]
    if any(re.match(r"-?0\d", value) for value in known.tolist()):
        return None
    try:
        numbers = np.where(values == "", "nan", values).astype(np.float64)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers[values != ""]).all() else None


def get_subgroup_columns(result: Result) -> tuple[SubgroupColumn, ...]:
    """Return the manifest's columns for the test images, each with its subgroups or the reason for having none."""
    test_column = result.run.get_setting("data.test_column") or result.run.get_setting("data.fold_column")
    return build_subgroup_columns(result.test.about, result.test.predictions.group, test_column=test_column)
