"""`pylorus monitor`: follow what a model answers in use, and find what is beyond what chance explains.

Periods of the files that `pylorus predict` writes are compared with the reference in the bundle, the answers on the
run's test images, or with predictions of a period in which the model was accepted.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.core.errors import PylorusError, format_path, normalize_name
from pylorus.core.formatting import format_count, join_names
from pylorus.core.io import read_json, write_atomically, write_text
from pylorus.data.catalog import extract_groups
from pylorus.data.input_format import QUALITY
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.description import Description, UsageReference
from pylorus.deploy.inputs import RECORD_SUFFIX
from pylorus.deploy.monitor_page import (
    ALL,
    Comparison,
    format_alarm,
    format_chance,
    format_reference,
    render_monitor_page,
    sort_alarms,
)
from pylorus.deploy.thresholds import Answers, build_usage_reference, collect_answers
from pylorus.deploy.verified_files import DESCRIPTION, EXPORT_FILES, FILES, SUMS, is_export, open_verified_folder
from pylorus.evaluation.drift import compare_rate, compare_score

PAGE, TABLE = "monitor.html", "monitor.csv"
BEYOND_LIMITS = 3
"""Exit code if something is beyond a limit; 1 and 2 mean that the command itself failed."""
CALENDAR = {"day": "D", "week": "W-SUN", "month": "M"}
"""Periods of the calendar, and what pandas calls them; weeks begin on Monday."""
PRINTED_ALARMS = 12
FEW_IMAGES = 20
"""A period with fewer images shows hardly any drift."""


@dataclass(frozen=True, kw_only=True)
class MonitorOptions:
    """Options of `pylorus monitor`.

    Attributes:
        output: Folder for the page and the table.
        by: day, week, month or a number of images; None: each file is a period, or a week if there are times.
        time: Column of the prediction files with the time of each image; None if they have none.
        date: Regular expression that finds the date of each image in its path; None: dates are not in paths.
        group: Regular expression that finds the patient in a path; None: each image counts as its own patient.
        baseline: Prediction files that take the place of the bundle's reference; empty for the bundle's.
        false_alarms: Probability that a period without drift is beyond any limit, in (0, 1).
    """

    output: Path
    by: str | None = None
    time: str | None = None
    date: str | None = None
    group: str | None = None
    baseline: tuple[Path, ...] = ()
    false_alarms: float = 0.01


@dataclass(frozen=True, eq=False)
class Period:
    """The images of a period.

    Attributes:
        name: Its name, such as 2026-W48.
        rows: Their rows in the table of all predictions.
    """

    name: str
    rows: NDArray[np.int64]


def monitor(folder: Path, files: Sequence[Path], options: MonitorOptions) -> int:
    """Compare predictions with the reference, write the page and the table, and print what is beyond a limit.

    Args:
        folder: Folder of the bundle or export that made the predictions.
        files: Files that `pylorus predict` wrote, in the order of time.
        options: The options.

    Returns:
        The exit code: 0 if nothing is beyond a limit, otherwise `BEYOND_LIMITS`.

    Raises:
        PylorusError: If a file is not of this bundle, or an option does not fit the files.
    """
    description, identity = _read_bundle(folder)
    table = _read_predictions(files, description, identity)
    reference = description.reference
    if options.baseline:
        baseline = _read_predictions(options.baseline, description, identity)
        readable = baseline[baseline["error"] == ""]
        reference = build_usage_reference(_collect(readable, description, options.group), split="baseline")
    if reference is None:
        raise PylorusError(
            f"{folder}: this bundle is from before bundles recorded what they answer on test images. Name predictions "
            "of a period in which the model was accepted: --baseline PREDICTIONS.csv."
        )
    unreadable = int((table["error"] != "").sum())
    table = table[table["error"] == ""].reset_index(drop=True)
    if table.empty:
        raise PylorusError("None of the images in these predictions could be read, so there is nothing to monitor.")
    periods = _split_into_periods(table, options)
    answers = _collect(table, description, options.group)
    comparisons = compare_periods(answers, reference, periods, false_alarms=options.false_alarms)
    notes = tuple(_list_notes(table, reference, periods, options, unreadable))
    _write_table(comparisons, reference, options.output / TABLE)
    sizes = {period.name: len(period.rows) for period in periods}
    page = render_monitor_page(description, comparisons, reference, sizes, notes, false_alarms=options.false_alarms)
    write_text(options.output / PAGE, page)
    _print_result(comparisons, reference, periods, notes, options)
    return BEYOND_LIMITS if any(each.drift.is_beyond for each in comparisons) else 0


def compare_periods(
    answers: Answers, reference: UsageReference, periods: Sequence[Period], *, false_alarms: float
) -> list[Comparison]:
    """Compare each measure of each period, and of all periods together, with the reference.

    Args:
        answers: The answers of all periods.
        reference: The reference; measures that it does not have are left out.
        periods: The periods.
        false_alarms: Probability that a period without drift is beyond any limit. It is shared equally by the measures
            (Bonferroni).
    """
    rates = [name for name in answers.rates if name in reference.rates]
    scores = [name for name in answers.scores if name in reference.scores]
    level = {"false_alarms": false_alarms / (len(rates) + len(scores))}
    every = (
        [*periods, Period(ALL, np.concatenate([period.rows for period in periods]))] if len(periods) > 1 else periods
    )
    comparisons = []
    for period in every:
        groups = None if answers.groups is None else answers.groups[period.rows]
        patients = len(period.rows) if groups is None else len(np.unique(groups))
        for name in rates:
            drift = compare_rate(answers.rates[name][period.rows], reference.rates[name], groups, **level)
            comparisons.append(Comparison(period.name, name, len(period.rows), patients, drift, math.nan))
        for name in scores:
            values = answers.scores[name][period.rows]
            drift = compare_score(values, reference.scores[name], groups, **level)
            median = float(np.median(values))
            comparisons.append(Comparison(period.name, name, len(period.rows), patients, drift, median))
    return comparisons


def _read_bundle(folder: Path) -> tuple[Description, str]:
    """Return the description of a bundle or export and the hash that its predictions record."""
    required = EXPORT_FILES if is_export(folder) else FILES
    with open_verified_folder(folder, required) as files:
        description = read_description(files.contents[DESCRIPTION], where=str(folder / DESCRIPTION))
        return description, hashlib.sha256(files.contents[SUMS]).hexdigest()


def _read_predictions(files: Sequence[Path], description: Description, identity: str) -> pd.DataFrame:
    """Read prediction files of this bundle, with the number of its file for each row."""
    tables = []
    for number, path in enumerate(files):
        if not path.is_file():
            raise PylorusError(f"{path}: there is no such file. Expected a file that pylorus predict wrote.")
        record = read_json(path.with_name(path.name + RECORD_SUFFIX))
        if record is None:
            raise PylorusError(
                f"{path}: {path.name}{RECORD_SUFFIX} is missing, which pylorus predict writes beside it and which says "
                "which bundle made the predictions. Keep both files together."
            )
        found = record.get("request", {}).get("bundle", {}).get(SUMS)
        if found != identity:
            raise PylorusError(
                f"{path}: these predictions are of another bundle (its hash begins with {str(found)[:12]}, that of the "
                f"given one with {identity[:12]}). A new version of a model has a history of its own: predict again "
                "with this bundle, or monitor with the bundle that made the predictions."
            )
        tables.append(_read_table(path, description).assign(file=number, file_name=path.name))
    return pd.concat(tables, ignore_index=True)


def _read_table(path: Path, description: Description) -> pd.DataFrame:
    columns = [f"probability/{name}" for name in description.short_names]
    numbers = [*columns, "unlikeness", *QUALITY]
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            table = pd.read_parquet(path) if suffix == ".parquet" else pd.read_json(path, dtype=False)
    except (ValueError, OSError) as error:
        raise PylorusError(f"{path}: can't be read as a table: {error}") from error
    missing = [name for name in ("path", "error", *columns, "unlikeness") if name not in table]
    if missing:
        raise PylorusError(f"{path}: has no column {join_names(missing)}. Expected a file that pylorus predict wrote.")
    for name in numbers:
        if name in table:
            table[name] = pd.to_numeric(table[name].replace("", np.nan), errors="coerce").astype(np.float64)
    table["error"] = table["error"].fillna("").astype(str)
    broken = (table["error"] == "") & ~np.isfinite(table[[*columns, "unlikeness"]].to_numpy()).all(axis=1)
    if broken.any():
        raise PylorusError(f"{path}: row {int(np.flatnonzero(broken)[0]) + 2} has no probabilities and no error.")
    return table


def _collect(table: pd.DataFrame, description: Description, group: str | None) -> Answers:
    """Return what is monitored of readable rows."""
    has_quality = set(QUALITY) <= set(table.columns) and not table[list(QUALITY)].isna().to_numpy().any()
    groups = None
    if group is not None:
        groups = np.array(extract_groups(list(table["path"]), group, key="--group"))
    return collect_answers(
        table[[f"probability/{name}" for name in description.short_names]].to_numpy(dtype=np.float64),
        table["unlikeness"].to_numpy(dtype=np.float64),
        table[list(QUALITY)].to_numpy(dtype=np.float64) if has_quality else None,
        groups,
        names=description.short_names,
        decision=description.decision,
        abstention=description.abstention,
    )


def _find_date(finder: "re.Pattern[str]", path: str) -> str:
    match = finder.search(normalize_name(path))
    if match is None:
        raise PylorusError(f"--date: the pattern {finder.pattern!r} finds no date in {format_path(path)}.")
    return str(match[1 if finder.groups else 0])


def _split_into_periods(table: pd.DataFrame, options: MonitorOptions) -> list[Period]:
    """Split the readable images into periods, in the order of time."""
    by = options.by
    times = _read_times(table, options)
    if by is not None and by not in CALENDAR and not (by.isdecimal() and int(by) > 0):
        raise PylorusError(f"--by: found {by}, expected day, week, month or a number of images, such as 200.")
    if times is None:
        if by in CALENDAR:
            raise PylorusError(
                f"--by {by}: the time of the images is not known. Name the column that has it with --time COLUMN, or "
                "find it in the paths with --date REGEX; or use --by N for periods of N images in the order given."
            )
        if by is None:
            names = list(dict.fromkeys(zip(table["file"], table["file_name"], strict=True)))
            return [Period(name, np.flatnonzero(table["file"] == number)) for number, name in names]
        order = np.arange(len(table))
    else:
        order = np.argsort(times.to_numpy(), kind="stable")
        if by is None or by in CALENDAR:
            return _split_by_calendar(times, order, by or "week")
    size = int(by)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [
        Period(f"images {size * number + 1} to {size * number + len(rows)}", rows) for number, rows in enumerate(chunks)
    ]


def _split_by_calendar(times: "pd.Series[pd.Timestamp]", order: NDArray[np.int64], by: str) -> list[Period]:
    if by == "week":
        calendar = times.dt.isocalendar()
        names = calendar["year"].astype(str) + "-W" + calendar["week"].astype(str).str.zfill(2)
    else:
        names = times.dt.strftime("%Y-%m-%d" if by == "day" else "%Y-%m")
    labels = names.to_numpy(dtype=str)
    return [Period(name, order[labels[order] == name]) for name in dict.fromkeys(labels[order])]


def _read_times(table: pd.DataFrame, options: MonitorOptions) -> "pd.Series[pd.Timestamp] | None":
    """Return the time of each image, or None if it is not known."""
    if options.time is not None and options.date is not None:
        raise PylorusError("--time and --date: give one of them.")
    if options.time is not None:
        if options.time not in table:
            known = [name for name in table.columns if name not in ("file", "file_name")]
            raise PylorusError(f"--time: no column {options.time}; the predictions have {join_names(known)}.")
        texts, option = table[options.time].astype(str), "--time"
    elif options.date is not None:
        try:
            finder = re.compile(options.date)
        except re.error as error:
            raise PylorusError(f"--date: {options.date!r} is not a regular expression: {error}.") from error
        found = [_find_date(finder, path) for path in table["path"]]
        texts, option = pd.Series(found, index=table.index), "--date"
    else:
        return None
    times = pd.to_datetime(texts, errors="coerce", format="ISO8601", utc=True)
    if times.isna().any():
        bad = str(texts[times.isna()].iloc[0])
        raise PylorusError(
            f"{option}: found {bad[:60]!r}, expected a date such as 2026-11-27, 20261127 or 2026-11-27T08:30."
        )
    return times.dt.tz_convert(None)


def _list_notes(
    table: pd.DataFrame,
    reference: UsageReference,
    periods: Sequence[Period],
    options: MonitorOptions,
    unreadable: int,
) -> Iterator[str]:
    if options.group is None and reference.groups < reference.images:
        yield (
            "Patients are not known: each image counts as its own patient. If patients have several images, the limits "
            "are too narrow and chance alone is beyond them more often than stated. Find the patient in the path with "
            "--group REGEX."
        )
    if options.group is None and options.baseline:
        yield "Patients are not known: each image counts as its own patient, also in the baseline (--group REGEX)."
    if not set(QUALITY) <= set(table.columns) or table[list(QUALITY)].isna().to_numpy().any():
        yield (
            "Some predictions are from before predictions recorded how images look: brightness, redness, sharpness and "
            "field of view are not compared."
        )
    few = [period.name for period in periods if len(period.rows) < FEW_IMAGES]
    if few:
        yield (
            f"{format_count(len(few), 'period')} with fewer than {FEW_IMAGES} images "
            f"({join_names(few, most=3)}): only large changes show there."
        )
    if unreadable:
        yield f"{format_count(unreadable, 'file')} could not be read and {'is' if unreadable == 1 else 'are'} left out."


def _print_result(
    comparisons: Sequence[Comparison],
    reference: UsageReference,
    periods: Sequence[Period],
    notes: Sequence[str],
    options: MonitorOptions,
) -> None:
    images = sum(len(period.rows) for period in periods)
    print(
        f"{format_count(images, 'image')} in {format_count(len(periods), 'period')}, compared with "
        f"{format_reference(reference)}"
    )
    for note in notes:
        print(f"note: {note}")
    alarms = sort_alarms(comparisons)
    print("\nbeyond limits:" if alarms else "\nnothing is beyond its limits")
    for each in alarms[:PRINTED_ALARMS]:
        print(f"  {each.period}: {format_alarm(each, reference)}")
    if len(alarms) > PRINTED_ALARMS:
        print(f"  and {len(alarms) - PRINTED_ALARMS} more: see {TABLE}")
    print(format_chance(len(periods), options.false_alarms))
    print(f"\n{options.output / PAGE}\n{options.output / TABLE}")


def _write_table(comparisons: Sequence[Comparison], reference: UsageReference, path: Path) -> None:
    rows = [
        {
            "period": each.period,
            "images": each.images,
            "patients": each.patients,
            "measure": each.measure,
            "value": each.drift.value,
            "reference": each.drift.reference,
            "low": each.drift.low,
            "high": each.drift.high,
            "p": each.drift.p,
            "beyond": each.drift.is_beyond,
            "median": each.median,
            "reference_median": reference.scores[each.measure].median if each.is_score else math.nan,
        }
        for each in comparisons
    ]
    with write_atomically(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
