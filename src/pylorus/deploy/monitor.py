"""`pylorus monitor`: follow what a model answers in use, and find what is beyond what chance explains.

Periods of the files that `pylorus predict` writes are compared with the reference in the bundle, the answers on the run's
test images, or with predictions of a period in which the model was accepted.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pylorus.core.errors import PylorusError, format_path, normalize_name
from pylorus.core.formatting import format_count, format_number, format_percent, join_names
from pylorus.core.io import read_json, write_atomically, write_text
from pylorus.data.catalog import get_matched_group, parse_group_pattern
from pylorus.data.input_format import QUALITY
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.description import Description, UsageReference
from pylorus.deploy.inputs import RECORD_SUFFIX
from pylorus.deploy.signature import build_manifest_check
from pylorus.deploy.thresholds import Answers, build_usage_reference, collect_answers
from pylorus.deploy.verified_files import DESCRIPTION, SUMS, open_verified_folder
from pylorus.evaluation.drift import Drift, compare_rate, compare_score
from pylorus.report.figure_style import COLOURS, FAINT, Drawing, create_figure, render_svg, report_style
from pylorus.report.headline import KeyFigure
from pylorus.report.mistakes import Item, Section, Sentences
from pylorus.report.page import render_page
from pylorus.report.summary import Summary
from pylorus.report.table import Column, Number, Row, Table, convert_to_p_value_cell, create_text_columns

PAGE, TABLE = "monitor.html", "monitor.csv"
BEYOND_LIMITS = 3
"""Exit code if something is beyond a limit; 1 and 2 mean that the command itself failed."""
CALENDAR = {"day": "D", "week": "W-SUN", "month": "M"}
"""Periods of the calendar, and what pandas calls them; weeks begin on Monday."""
ALL = "all periods"
PRINTED_ALARMS = 12
MAX_TICKS = 8
FEW_IMAGES = 20
"""A period with fewer images shows hardly any drift."""

LABELS = {
    "abstained": "abstained",
    "unlike": "abstained: unlike the training images",
    "unsure": "abstained: unsure",
    "confidence": "confidence",
    "unlikeness": "unlikeness",
    "brightness": "brightness",
    "redness": "redness",
    "sharpness": "sharpness",
    "field": "field of view",
}


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


@dataclass(frozen=True)
class Comparison:
    """A measure of a period compared with the reference.

    Attributes:
        period: Name of the period.
        measure: Name of the measure; see `Answers`.
        images: Number of images of the period.
        patients: Number of its patients.
        drift: The comparison.
        median: Median of a score in the period; NaN for a proportion.
    """

    period: str
    measure: str
    images: int
    patients: int
    drift: Drift
    median: float

    @property
    def is_score(self) -> bool:
        """Whether the measure is a score, not a proportion."""
        return not math.isnan(self.median)


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
    write_text(options.output / PAGE, _render(description, comparisons, reference, periods, notes, options))
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
    import hashlib

    with open_verified_folder(folder, check_manifest=build_manifest_check(())) as files:
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
    broken = (table["error"] == "") & ~np.isfinite(table[[*columns, "unlikeness"]]).all(axis=1)
    if broken.any():
        raise PylorusError(f"{path}: row {int(np.flatnonzero(broken)[0]) + 2} has no probabilities and no error.")
    return table


def _collect(table: pd.DataFrame, description: Description, group: str | None) -> Answers:
    """Return what is monitored of readable rows."""
    has_quality = set(QUALITY) <= set(table.columns) and not table[list(QUALITY)].isna().to_numpy().any()
    groups = None
    if group is not None:
        finder = parse_group_pattern(group, key="--group")
        groups = np.array([_match(finder, path, "--group", "patient", get_matched_group) for path in table["path"]])
    return collect_answers(
        table[[f"probability/{name}" for name in description.short_names]].to_numpy(dtype=np.float64),
        table["unlikeness"].to_numpy(dtype=np.float64),
        table[list(QUALITY)].to_numpy(dtype=np.float64) if has_quality else None,
        groups,
        names=description.short_names,
        decision=description.decision,
        abstention=description.abstention,
    )


def _match(finder: "re.Pattern[str]", path: str, option: str, what: str, extract: Any) -> str:
    match = finder.search(normalize_name(path))
    if match is None:
        raise PylorusError(f"{option}: the pattern {finder.pattern!r} finds no {what} in {format_path(path)}.")
    return str(extract(match))


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
        found = [
            _match(finder, path, "--date", "date", lambda match: match[1 if finder.groups else 0])
            for path in table["path"]
        ]
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


def _get_label(measure: str) -> str:
    kind, _, name = measure.partition("/")
    return {"predicted": f"predicted as {name}", "positive": f"called {name} at the threshold"}.get(kind) or LABELS[
        kind
    ]


def _format_alarm(each: Comparison, reference: UsageReference) -> str:
    drift, images = each.drift, format_count(each.images, "image")
    if each.is_score:
        direction = "higher" if drift.value > 0.5 else "lower"
        share = max(drift.value, 1 - drift.value)
        return (
            f"{_get_label(each.measure)} is {direction}: median {format_number(each.median, 3)} of {images}, reference "
            f"{format_number(reference.scores[each.measure].median, 3)} ({direction} in {format_percent(share, digits=0)} % "
            "of comparisons with a reference image)"
        )
    return (
        f"{_get_label(each.measure)}: {format_percent(drift.value)} % of {images}; limits {format_percent(drift.low)} to "
        f"{format_percent(drift.high)} %, reference {format_percent(drift.reference)} %"
    )


def _format_reference(reference: UsageReference) -> str:
    names = {
        "test": "the run's test images",
        "recalibration": "the images of the recalibration",
        "baseline": "the baseline",
    }
    patients = f" of {format_count(reference.groups, 'patient')}" if reference.groups < reference.images else ""
    return f"{names.get(reference.split, reference.split)} ({format_count(reference.images, 'image')}{patients})"


def _format_chance(periods: int, options: MonitorOptions) -> str:
    expected = options.false_alarms * periods
    return (
        f"Without any drift, a period has a probability of {format_percent(options.false_alarms)} % to be beyond a limit "
        f"of any measure: of {format_count(periods, 'period')}, {format_number(expected, 2)} by chance."
    )


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
        f"{_format_reference(reference)}"
    )
    for note in notes:
        print(f"note: {note}")
    alarms = _sort_alarms(comparisons)
    print("\nbeyond limits:" if alarms else "\nnothing is beyond its limits")
    for each in alarms[:PRINTED_ALARMS]:
        print(f"  {each.period}: {_format_alarm(each, reference)}")
    if len(alarms) > PRINTED_ALARMS:
        print(f"  and {len(alarms) - PRINTED_ALARMS} more: see {TABLE}")
    print(_format_chance(len(periods), options))
    print(f"\n{options.output / PAGE}\n{options.output / TABLE}")


def _sort_alarms(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return what is beyond a limit: all periods together first, then the newest periods."""
    names = list(dict.fromkeys(each.period for each in comparisons))
    alarms = [each for each in comparisons if each.drift.is_beyond]
    return sorted(alarms, key=lambda each: -names.index(each.period))


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


def _render(
    description: Description,
    comparisons: Sequence[Comparison],
    reference: UsageReference,
    periods: Sequence[Period],
    notes: Sequence[str],
    options: MonitorOptions,
) -> str:
    alarms = _sort_alarms(comparisons)
    images = sum(len(period.rows) for period in periods)
    rates = [each for each in comparisons if not each.is_score]
    scores = [each for each in comparisons if each.is_score]
    drawings = [
        _plot_charts(rates, key="rates", title="Proportions of images by period", reference=reference),
        _plot_charts(scores, key="scores", title="Scores by period", reference=reference),
    ]
    concerned = [name for name in dict.fromkeys(each.period for each in alarms) if name != ALL]
    verdict = (
        f"{format_count(len(concerned), 'period')} of {len(periods)} {'is' if len(concerned) == 1 else 'are'} beyond a "
        "limit" + (f": {join_names(concerned[::-1], most=5)}." if concerned else ".")
    )
    if ALL in {each.period for each in alarms}:
        verdict += " All periods together are beyond a limit."
    items: tuple[Item, ...] = (_build_alarm_table(alarms, reference),) if alarms else (Sentences((verdict,)),)
    sections = (
        Section("beyond", "Beyond limits", items, is_appendix=False),
        Section("charts", "Control charts", tuple(drawings), is_appendix=False),
        Section("figures", "All figures", (_build_rate_table(rates), _build_score_table(scores)), is_appendix=True),
        Section("method", "How to read this", (Sentences(METHODS),), is_appendix=False),
    )
    summary = Summary(
        title=f"Monitoring of {description.architecture}: {join_names(description.short_names, most=6)}",
        subtitle=f"{periods[0].name} to {periods[-1].name}" if len(periods) > 1 else periods[0].name,
        marks=(),
        headline=None,
        findings=(verdict, _format_chance(len(periods), options)),
        warnings=tuple(notes),
        facts=(
            KeyFigure("Periods", f"{len(periods):,}", f"{len(concerned)} beyond a limit"),
            KeyFigure("Images", f"{images:,}", "that could be read"),
            KeyFigure("Reference", f"{reference.images:,}", f"images: {_format_reference(reference).split(' (')[0]}"),
        ),
    )
    return render_page(summary, sections, {drawing.key: render_svg(drawing) for drawing in drawings})


METHODS = (
    "A proportion is compared with the reference by the conditional test of two proportions (hypergeometric, mid-p), a "
    "score by Wilcoxon's rank-sum test on classes of the reference's histogram. The limits know how uncertain the "
    "reference itself is: with few reference images they are wide.",
    "The false-alarm probability of a period is shared equally by the measures (Bonferroni). The reference is the same "
    "for all periods: if it happened to be unusual, several periods are beyond a limit together. The row of all periods "
    "finds a small change that lasts.",
    "Images of a patient resemble each other. Where patients are known, images count as fewer independent ones, by the "
    "correlation within the patients of the reference.",
    "An alarm does not say that the model is wrong: it says that images or answers are other than in the reference. "
    "Look at the images of that period; if labels can be had, evaluate (pylorus predict --evaluate). A clinic that sees "
    "the classes in other proportions than the test images needs a baseline of its own (--baseline).",
    "Brightness, redness, sharpness and field of view are measured in the pixels that the network sees, without black: "
    "mean luma; red's part of the color; differences of neighboring pixels relative to those at a quarter of the size, "
    "which blur lowers; and the proportion of pixels that are not black.",
)


def _build_alarm_table(alarms: Sequence[Comparison], reference: UsageReference) -> Table:
    columns = (
        *create_text_columns("period", "measure"),
        Column("images"),
        Column("value"),
        Column("reference"),
        Column("lower limit"),
        Column("upper limit"),
        Column("p"),
    )
    rows = []
    for each in alarms:
        drift, label = each.drift, _get_label(each.measure)
        label += ": higher than a reference image, %" if each.is_score else ", %"
        numbers = (Number(100 * value, 1) for value in (drift.value, drift.reference, drift.low, drift.high))
        rows.append(Row((each.period, label, each.images, *numbers, convert_to_p_value_cell(drift.p))))
    return Table(
        key="beyond",
        title="What is beyond its limits",
        basis=f"Compared with {_format_reference(reference)}.",
        columns=columns,
        rows=tuple(rows),
        notes=(
            "A score is compared by the percentage of pairs of an image of the period and a reference image in which the "
            "former is higher: 50 % without drift. p is of one comparison, not corrected for their number; the limits "
            "are.",
        ),
    )


def _build_rate_table(rates: Sequence[Comparison]) -> Table:
    measures = list(dict.fromkeys(each.measure for each in rates))
    values = {(each.period, each.measure): each for each in rates}
    rows = []
    for name in dict.fromkeys(each.period for each in rates):
        first = values[name, measures[0]]
        cells = (
            Number(100 * drift.value, 1, words=f"{format_percent(drift.value)}{' !' if drift.is_beyond else ''}")
            for drift in (values[name, measure].drift for measure in measures)
        )
        rows.append(Row((name, first.images, first.patients, *cells), strong=name == ALL))
    return Table(
        key="rates",
        title="Proportions of images by period",
        basis="In % of the readable images of the period.",
        columns=(
            *create_text_columns("period"),
            Column("images"),
            Column("patients"),
            *(Column(_get_label(measure), unit="%") for measure in measures),
        ),
        rows=tuple(rows),
        notes=("!: beyond a limit.",),
    )


def _build_score_table(scores: Sequence[Comparison]) -> Table:
    measures = list(dict.fromkeys(each.measure for each in scores))
    values = {(each.period, each.measure): each for each in scores}
    rows = [
        Row(
            (
                name,
                *(
                    Number(
                        each.median, 3, words=f"{format_number(each.median, 3)}{' !' if each.drift.is_beyond else ''}"
                    )
                    for each in (values[name, measure] for measure in measures)
                ),
            ),
            strong=name == ALL,
        )
        for name in dict.fromkeys(each.period for each in scores)
    ]
    return Table(
        key="scores",
        title="Medians of scores by period",
        basis="Of the readable images of the period.",
        columns=(*create_text_columns("period"), *(Column(_get_label(measure)) for measure in measures)),
        rows=tuple(rows),
        notes=("!: beyond a limit.",),
    )


def _plot_charts(comparisons: Sequence[Comparison], *, key: str, title: str, reference: UsageReference) -> Drawing:
    """Plot a control chart for each measure: values by period, with reference and limits."""
    measures = list(dict.fromkeys(each.measure for each in comparisons))
    is_score = comparisons[0].is_score
    columns, rows = 2, -(-len(measures) // 2)
    with report_style():
        figure = create_figure(1.75 * rows)
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for panel, measure in zip(panels.flat, measures, strict=False):
            series = [each for each in comparisons if each.measure == measure and each.period != ALL]
            x = np.arange(len(series))
            low, high, value = (
                100 * np.array([getattr(each.drift, name) for each in series]) for name in ("low", "high", "value")
            )
            panel.fill_between(
                np.append(x, len(x)) - 0.5, np.append(low, low[-1]), np.append(high, high[-1]), step="post",
                color=COLOURS[0], alpha=0.15, linewidth=0,
            )  # fmt: skip
            panel.axhline(100 * series[0].drift.reference, color=FAINT, linestyle="--", linewidth=1)
            panel.plot(x, value, color=COLOURS[0], marker="o")
            beyond = np.array([each.drift.is_beyond for each in series])
            panel.plot(x[beyond], value[beyond], color=COLOURS[1], marker="D", markersize=7, linestyle="")
            panel.set_title(_get_label(measure))
            panel.set_ylabel("higher, %" if is_score else "images, %")
            panel.set_ylim(*((0, 100) if is_score else (0, max(5.0, 1.15 * max(value.max(), high.max())))))
            panel.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, integer=True))
            names = [each.period for each in series]
            panel.xaxis.set_major_formatter(lambda place, _, names=names: _get_tick(names, place))
            panel.tick_params(axis="x", labelrotation=30)
            panel.set_xlim(-0.5, len(series) - 0.5)
        for panel in list(panels.flat)[len(measures) :]:
            panel.set_visible(False)
    beyond = sum(each.drift.is_beyond for each in comparisons if each.period != ALL)
    meaning = (
        "Percentage of pairs of an image of the period and a reference image in which the former's score is higher"
        if is_score
        else "Percentage of images"
    )
    return Drawing(
        key=key,
        title=title,
        basis=f"{meaning}. Shaded: within the limits; dashed: reference; orange diamonds: beyond a limit.",
        alt=f"{title}: {len(measures)} control charts, {beyond} points beyond a limit.",
        figure=figure,
    )


def _get_tick(names: Sequence[str], place: float) -> str:
    """Return the name of the period at a tick, shortened to fit."""
    index = round(place)
    if abs(place - index) > 1e-6 or not 0 <= index < len(names):
        return ""
    name = names[index].removeprefix("images ")
    return name if len(name) <= 14 else f"{name[:13]}…"
