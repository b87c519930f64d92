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
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.core.errors import PylorusError, format_path, normalize_name
from pylorus.core.formatting import format_count, join_names
from pylorus.core.io import check_writable_folder, compute_digest, read_json, write_atomically, write_text
from pylorus.data.catalog import extract_groups
from pylorus.data.input_format import QUALITY
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.description import Description, UsageReference
from pylorus.deploy.inputs import RECORD_SUFFIX
from pylorus.deploy.monitor_page import (
    ALL,
    DECAY,
    EVERY,
    PERIOD,
    RECENT,
    Comparison,
    explain_reference,
    format_alarm,
    format_chance,
    format_period,
    format_reference,
    render_monitor_page,
    sort_alarms,
)
from pylorus.deploy.thresholds import Answers, build_usage_reference, collect_answers
from pylorus.deploy.verified_files import DESCRIPTION, EXPORT_FILES, FILES, SUMS, is_export, open_verified_folder
from pylorus.evaluation.drift import (
    RateReference,
    Sample,
    ScoreReference,
    accumulate_samples,
    compare_sample,
    summarize_rate,
    summarize_score,
)

PAGE, TABLE = "monitor.html", "monitor.csv"
BEYOND_LIMITS = 3
"""Exit code if something is beyond a limit; 1 and 2 mean that the command itself failed."""
CALENDAR = {"day": "D", "week": "W-SUN", "month": "M"}
"""Periods of the calendar, and what pandas calls them; weeks begin on Monday."""
PRINTED_ALARMS = 12
FEW_IMAGES = 20
"""A period with fewer images shows hardly any drift."""
FEW_PATIENTS = 50
"""With fewer patients in the reference, false alarms are more frequent than stated; see docs/monitor.md."""
SUM_TOLERANCE = 1e-4
"""How far the probabilities of an image may be from a sum of 1: a table that another program saved has fewer digits."""
DATES = "acquired"
"""Column of the predictions with the day on which the image of a DICOM file was acquired."""


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
    check_writable_folder(options.output, hint="Choose another --output.")
    description, identity = _read_bundle(folder)
    table = _read_predictions(files, description, identity)
    reference = description.reference
    if options.baseline:
        baseline = _read_predictions(options.baseline, description, identity)
        readable = baseline[baseline["error"] == ""]
        reference = build_usage_reference(_collect(readable, description, options.group), split="baseline")
    if reference is None:
        why = "is from before bundles recorded what they answer on test images"
        if description.ensemble is not None:
            why = "was measured by some of its networks at a time, so that it does not say what all of them answer"
        raise PylorusError(
            f"{folder}: this bundle {why}. Name predictions of a period in which the model was accepted: --baseline "
            "PREDICTIONS.csv."
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
    _print_result(description, comparisons, reference, periods, notes, options)
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
            (Bonferroni) and, from the second period on, by the period itself and the average of the recent ones.
    """
    rates = [name for name in answers.rates if name in reference.rates]
    scores = [name for name in answers.scores if name in reference.scores]
    tests = (len(rates) + len(scores)) * min(2, len(periods))
    patients = reference.groups if reference.groups < reference.images else None
    level: dict[str, Any] = {"false_alarms": false_alarms / tests, "patients": patients}
    comparisons: dict[tuple[str, str, str], Comparison] = {}
    every = Period(ALL, np.concatenate([period.rows for period in periods]))
    for name in (*rates, *scores):
        samples: list[Sample] = []
        history: list[tuple[int, int]] = []
        for period in (*periods, every):
            groups = None if answers.groups is None else answers.groups[period.rows]
            counts = len(period.rows), len(period.rows) if groups is None else len(np.unique(groups))
            known: RateReference | ScoreReference
            if name in reference.rates:
                known, median = reference.rates[name], math.nan
                sample = summarize_rate(answers.rates[name][period.rows], known, groups)
            else:
                known, values = reference.scores[name], answers.scores[name][period.rows]
                sample, median = summarize_score(values, known, groups), float(np.median(values))
            drift = compare_sample(sample, known, **level)
            window = EVERY if period is every else PERIOD
            comparisons[period.name, window, name] = Comparison(period.name, window, name, *counts, drift, median)
            samples.append(sample)
            history.append(counts)
            if window == PERIOD and len(samples) > 1:
                drift = compare_sample(accumulate_samples(samples, decay=DECAY), known, **level)
                counts = sum(images for images, _ in history), sum(groups for _, groups in history)
                comparisons[period.name, RECENT, name] = Comparison(period.name, RECENT, name, *counts, drift, median)
    return [
        comparisons[period.name, window, name]
        for period in (*periods, *((every,) if len(periods) > 1 else ()))
        for window in (PERIOD, RECENT, EVERY)
        for name in (*rates, *scores)
        if (period.name, window, name) in comparisons
    ]


def _read_bundle(folder: Path) -> tuple[Description, str]:
    """Return the description of a bundle or export and the hash that its predictions record."""
    required = EXPORT_FILES if is_export(folder) else FILES
    with open_verified_folder(folder, required) as files:
        description = read_description(files.contents[DESCRIPTION], where=str(folder / DESCRIPTION))
        return description, hashlib.sha256(files.contents[SUMS]).hexdigest()


def _read_predictions(files: Sequence[Path], description: Description, identity: str) -> pd.DataFrame:
    """Read prediction files of this bundle, with the number of its file for each row."""
    tables: list[pd.DataFrame] = []
    digests: dict[str, Path] = {}
    for number, path in enumerate(files):
        if not path.is_file():
            raise PylorusError(f"{path}: there is no such file. Expected a file that pylorus predict wrote.")
        digest = compute_digest(path)
        if digest in digests:
            twice = "is given twice" if path == digests[digest] else f"holds the same predictions as {digests[digest]}"
            raise PylorusError(f"{path}: {twice}, so that its images would count twice. Name it once.")
        digests[digest] = path
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
        if record.get("request", {}).get("tta") is not None:
            raise PylorusError(
                f"{path}: these predictions were made with --tta, but what they are compared with was measured without "
                "it. Predict again without --tta."
            )
        tables.append(_read_table(path, description).assign(file=number, file_name=path.name))
    return pd.concat(tables, ignore_index=True)


def _read_table(path: Path, description: Description) -> pd.DataFrame:
    """Read the rows of a prediction file, after checking their numbers; the index of a CSV file counts its lines."""
    columns = [f"probability/{name}" for name in description.short_names]
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
            table = table[(table.fillna("") != "").any(axis=1)].copy()
        else:
            table = pd.read_parquet(path) if suffix == ".parquet" else pd.read_json(path, dtype=False)
    except (ValueError, OSError) as error:
        raise PylorusError(f"{path}: can't be read as a table: {error}") from error
    missing = [name for name in ("path", "error", *columns, "unlikeness") if name not in table]
    if missing:
        raise PylorusError(f"{path}: has no column {join_names(missing)}. Expected a file that pylorus predict wrote.")
    table["error"] = table["error"].astype(object).fillna("").astype(str)
    readable = table["error"] == ""
    for name in (*columns, "unlikeness", *QUALITY):
        if name not in table:
            continue
        written = table[name]
        values = pd.to_numeric(written.replace("", np.nan), errors="coerce").astype(np.float64)
        is_wrong, expected = ~values.between(-np.inf, np.inf, inclusive="neither"), "a number"
        if name in columns:
            is_wrong, expected = ~values.between(0, 1), "a probability, from 0 to 1"
        elif name in QUALITY:  # an older Pylorus did not write them
            is_wrong &= ~(written.isna() | (written == ""))
        _check_rows(path, suffix, is_wrong & readable, written, f"column {name}", expected)
        table[name] = values
    total = table[columns].sum(axis=1)
    names = f"columns {join_names(columns)}"
    _check_rows(path, suffix, (abs(total - 1) > SUM_TOLERANCE) & readable, total.round(6), names, "a sum of 1")
    return table.reset_index(drop=True)


def _check_rows(
    path: Path, suffix: str, is_wrong: "pd.Series[bool]", found: "pd.Series[Any]", where: str, expected: str
) -> None:
    """Refuse a table with wrong rows; name the first one by its line in a CSV file, otherwise by its number."""
    if is_wrong.any():
        index = int(is_wrong.to_numpy().argmax())
        row = f"line {is_wrong.index[index] + 2}" if suffix == ".csv" else f"row {index + 1}"
        value = str(found.iloc[index])[:60] or "nothing"
        raise PylorusError(
            f"{path}: {row}, {where}: found {value}, expected {expected}. Was the file changed after pylorus predict "
            "wrote it? Predict again."
        )


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
            undated = int((table[DATES] == "").sum()) if DATES in table else len(table)
            some = "" if undated == len(table) else f" for {undated:,} of {len(table):,}"
            raise PylorusError(
                f"--by {by}: the time of the images is not known{some}. Name the column that has it with --time "
                "COLUMN, or find it in the paths with --date REGEX; or use --by N for periods of N images in the "
                "order given."
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
    elif DATES in table and (table[DATES] != "").all():
        texts, option = table[DATES].astype(str), DATES
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
            "Patients are not known: as many images per patient as in the reference are assumed. If patients have "
            "more, the limits are too narrow. Find the patient in the path with --group REGEX."
        )
    if options.group is None and options.baseline:
        yield "Patients are not known: each image counts as its own patient, also in the baseline (--group REGEX)."
    if not set(QUALITY) <= set(table.columns) or table[list(QUALITY)].isna().to_numpy().any():
        yield (
            "Some predictions are from before predictions recorded how images look: brightness, redness, sharpness and "
            "field of view are not compared."
        )
    if reference.groups < reference.images and reference.groups < FEW_PATIENTS:
        yield (
            f"The reference has only {format_count(reference.groups, 'patient')}, so that it is uncertain how much "
            "images of one patient resemble each other. The limits are wider for it; still, chance alone may be beyond "
            "them two to three times as often as stated."
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
    description: Description,
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
    print(explain_reference(reference, validated_on=description.training.validated_on))
    for note in notes:
        print(f"note: {note}")
    alarms = sort_alarms(comparisons)
    print("\nbeyond limits:" if alarms else "\nnothing is beyond its limits")
    for each in alarms[:PRINTED_ALARMS]:
        print(f"  {format_period(each)}: {format_alarm(each, reference)}")
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
            "window": each.window,
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
