"""From a manifest's column to subgroups of the test images, or to the reason why it makes none: never in silence."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pylorus.report.identifying import identifying_reason, is_nearly_unique, is_of_one_patient

MOST_VALUES = 12
"""A column of words makes at most so many subgroups: of more values the rarest are put together."""
MOST_NUMBERS = 5
"""A column with more different numbers than these, such as an age, is cut at its quartiles."""
MOST_QUARTERS = 8
"""Dates of more quarters than these are told by their year."""
MOST_YEARS = 25
"""Dates further apart than so many years are taken for dates of birth."""
SHARES = (0.25, 0.5, 0.75)

NOT_STATED = "not stated"
RARE = "values too rare to be shown"
"""What stands for values that only one patient has."""
OTHER = "other"

DATES = (
    re.compile(r"(?P<year>\d{4})-(?P<month>\d{1,2})(-\d{1,2}([T ].*)?)?"),
    re.compile(r"(?P<year>(19|20)\d\d)(?P<month>0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"),
    re.compile(r"\d{1,2}\.(?P<month>\d{1,2})\.(?P<year>\d{4})"),
    re.compile(r"(?P<year>\d{4})[/.](?P<month>\d{1,2})[/.]\d{1,2}"),
    re.compile(r"\d{1,2}/\d{1,2}/(?P<year>\d{4})"),  # day or month first: only the year is certain
)
"""Forms of dates: 2024-05-03, 20240503, 3.5.2024, 2024/05/03, 05/03/2024."""


@dataclass(frozen=True, eq=False)
class Subgroup:
    """Some of the test images.

    Attributes:
        name: As the report shows it.
        images: Which images belong to it, of shape (images,).
    """

    name: str
    images: NDArray[np.bool_]

    @property
    def is_stated(self) -> bool:
        """Whether the column says something of these images."""
        return self.name != NOT_STATED


@dataclass(frozen=True, eq=False)
class SubgroupColumn:
    """A column of a manifest.

    Attributes:
        name: Of the column.
        subgroups: At least two, or none where the column is left out.
        reason: Why it is left out; empty where it is not. It holds none of the column's values.
    """

    name: str
    subgroups: tuple[Subgroup, ...]
    reason: str = ""


def subgroup_columns(
    about: Mapping[str, NDArray[np.str_]], group: NDArray[np.generic], *, test_column: str | None = None
) -> tuple[SubgroupColumn, ...]:
    """Every column, with its subgroups or the reason why it makes none.

    Args:
        about: A column's name and its values as text, of shape (images,); empty where nothing is known.
        group: The patient of each image, of shape (images,).
        test_column: The column that says which images are tested on, where one does.

    Example:
        >>> sites, ages = np.array(["B", "A", "B", "A"]), np.array(["", "", "", ""])
        >>> site, age = subgroup_columns({"site": sites, "age": ages}, np.arange(4))
        >>> [subgroup.name for subgroup in site.subgroups], age.reason
        (['A', 'B'], 'no test image has a value')
    """
    found = []
    for name, values in about.items():
        named = _named_subgroups(np.asarray(values, dtype=np.str_), group)
        if isinstance(named, str):
            cut = "; it says which images are tested on" if name == test_column else ""
            found.append(SubgroupColumn(name, (), named + cut))
        else:
            found.append(SubgroupColumn(name, named))
    return tuple(found)


def _named_subgroups(values: NDArray[np.str_], group: NDArray[np.generic]) -> tuple[Subgroup, ...] | str:
    """The subgroups of a column's values, or the reason why there are none."""
    known = values != ""
    distinct = sorted(set(values[known].tolist()))
    if not distinct:
        return "no test image has a value"
    if len(distinct) == 1:
        return "all test images have the same value" if known.all() else "only one value is stated"
    dates, numbers = _months(values), _numbers(values)
    if dates is not None:
        if dates[known].max() - dates[known].min() > 12 * MOST_YEARS:
            return "its values look like dates of birth; ages make subgroups"
        return _shared_by_patients(_by_date(values, dates), group)
    reason = identifying_reason(values, group)
    if reason is not None:
        return reason
    if numbers is not None and len(distinct) > MOST_NUMBERS:
        return _shared_by_patients(_by_quartile(numbers), group)
    if len(distinct) > MOST_NUMBERS and is_nearly_unique(values, group):
        return "many patients have a value of their own, which may tell who they are"
    return _by_value(values, group)


def _by_value(values: NDArray[np.str_], group: NDArray[np.generic]) -> tuple[Subgroup, ...] | str:
    """A subgroup a value; of many the most frequent, and the rest together."""
    named = _shared_by_patients(values, group)
    if isinstance(named, str) or len(named) <= MOST_VALUES + sum(each.name in (RARE, NOT_STATED) for each in named):
        return named
    values = np.where(is_of_one_patient(values, group), OTHER, values)
    counts = Counter(values[(values != "") & (values != OTHER)].tolist())
    most = [name for name, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0]))[: MOST_VALUES - 1]]
    return _subgroups(np.where(np.isin(values, ["", *most]), values, OTHER))


def _shared_by_patients(values: NDArray[np.str_], group: NDArray[np.generic]) -> tuple[Subgroup, ...] | str:
    """A subgroup a value that several patients have; those of a single patient together, without the value."""
    if len(set(values.tolist()) - {""}) < 2:
        return "all its values fall into one subgroup"
    found = _subgroups(without_single_patients(values, group))
    return found if sum(each.is_stated for each in found) > 1 else "hardly any of its values is shared by two patients"


def without_single_patients(values: NDArray[np.str_], group: NDArray[np.generic]) -> NDArray[np.str_]:
    """The values, but for those that only one patient has: such a value may be a name, and tells of no subgroup.

    Args:
        values: Of shape (images,), as text; empty where nothing is known.
        group: The patient of each image, of shape (images,).

    Example:
        >>> without_single_patients(np.array(["A", "A", "B"]), np.array([1, 2, 3])).tolist()
        ['A', 'A', 'values too rare to be shown']
    """
    return np.where(is_of_one_patient(values, group), RARE, values)


def _subgroups(values: NDArray[np.str_]) -> tuple[Subgroup, ...]:
    """A subgroup a value, in their order; what is put together and what is not stated come last."""
    last = (OTHER, RARE, "")
    names = [name for name in _in_order(sorted(set(values.tolist()))) if name not in last]
    names += [name for name in last if (values == name).any()]
    return tuple(Subgroup(name or NOT_STATED, values == name) for name in names)


def _in_order(names: list[str]) -> list[str]:
    """Names in the order of their numbers, where all begin with one (`below` before all others)."""
    starts = [re.match(r"(below )?(-?\d+(\.\d+)?)", name) for name in names]
    if not all(starts):
        return names
    keys = {name: (float(start[2]), not start[1]) for name, start in zip(names, starts, strict=True) if start}
    return sorted(names, key=lambda name: (keys[name], name))


def _by_quartile(numbers: NDArray[np.float64]) -> NDArray[np.str_]:
    """The quarter of each number, without the least and the greatest, which are some patient's own."""
    known = np.isfinite(numbers)
    whole = bool((numbers[known] % 1 == 0).all())
    quartiles = np.quantile(numbers[known], SHARES)
    edges = np.unique(np.ceil(quartiles) if whole else [float(f"{edge:.3g}") for edge in quartiles])
    edges = edges[(edges > numbers[known].min()) & (edges <= numbers[known].max())]
    shown = [f"{edge:.10g}" for edge in edges]
    names = [f"below {shown[0]}"] if shown else ["all"]
    names += [f"{low} to below {high}" for low, high in pairwise(shown)]
    names += [f"{shown[-1]} and above"] if shown else []
    place = np.searchsorted(edges, np.where(known, numbers, 0), side="right")
    return np.where(known, np.array(names)[place], "")


def _by_date(values: NDArray[np.str_], months: NDArray[np.float64]) -> NDArray[np.str_]:
    """The quarter or the year of each date; of many years the quartile."""
    known = np.isfinite(months)
    of = np.where(known, months, 0).astype(np.int64)
    quarters = [f"{month // 12} Q{month % 12 // 3 + 1}" for month in of.tolist()]
    by_year = any(DATES[-1].fullmatch(value) for value in values[known].tolist())
    if len(set(np.array(quarters)[known].tolist())) <= MOST_QUARTERS and not by_year:
        return np.where(known, np.array(quarters), "")
    years = np.where(known, of // 12, np.nan)
    if len(set(years[known].tolist())) > MOST_VALUES:
        return _by_quartile(years)
    return np.where(known, np.array([str(month // 12) for month in of.tolist()]), "")


def _months(values: NDArray[np.str_]) -> NDArray[np.float64] | None:
    """Months since the year 0 of dates, nan where nothing is stated; None where a value is no date."""
    found = np.full(len(values), np.nan)
    for place, value in enumerate(values.tolist()):
        if not value:
            continue
        match = next((match for form in DATES if (match := form.fullmatch(value))), None)
        parts = {} if match is None else match.groupdict()
        month = int(parts.get("month") or 1)
        if not parts or not 1 <= month <= 12 or not 1850 <= int(parts["year"]) <= 2150:
            return None
        found[place] = 12 * int(parts["year"]) + month - 1
    return found


def _numbers(values: NDArray[np.str_]) -> NDArray[np.float64] | None:
    """The numbers that values are, nan where nothing is stated; None where one is none, or a code such as 007."""
    known = values[values != ""]
    if any(re.match(r"-?0\d", value) for value in known.tolist()):
        return None
    try:
        numbers = np.where(values == "", "nan", values).astype(np.float64)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers[values != ""]).all() else None
