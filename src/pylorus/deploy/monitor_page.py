"""The page of `pylorus monitor`: what is beyond its limits, control charts, and all figures by period."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from pylorus.core.formatting import format_count, format_number, format_percent, join_names
from pylorus.deploy.description import Description, UsageReference
from pylorus.evaluation.drift import Drift
from pylorus.report.figure_style import COLOURS, FAINT, Drawing, create_figure, render_svg, report_style
from pylorus.report.headline import KeyFigure
from pylorus.report.mistakes import Item, Section, Sentences
from pylorus.report.page import render_page
from pylorus.report.summary import Summary
from pylorus.report.table import Column, Number, Row, Table, convert_to_p_value_cell, create_text_columns

ALL = "all periods"
"""Name of the row of all periods together."""
PERIOD, RECENT, EVERY = "period", "recent", "all"
"""What is compared: the images of a period; the weighted average of it and of those before; all images."""
DECAY = 0.8
"""How much an image counts in the average of recent periods, relative to one of the next period."""
MAX_TICKS = 8
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


@dataclass(frozen=True)
class Comparison:
    """A measure of a period compared with the reference.

    Attributes:
        period: Name of the period.
        window: `PERIOD`, `RECENT` or `EVERY`.
        measure: Name of the measure; see `Answers`.
        images: Number of images of the period; of an average, of all its periods.
        patients: Number of their patients; in an average, a patient of two periods counts twice.
        drift: The comparison.
        median: Median of a score in the period; NaN for a proportion.
    """

    period: str
    window: str
    measure: str
    images: int
    patients: int
    drift: Drift
    median: float

    @property
    def is_score(self) -> bool:
        """Whether the measure is a score, not a proportion."""
        return not math.isnan(self.median)


def get_label(measure: str) -> str:
    """Return the words for a measure; see `pylorus.deploy.thresholds.Answers`."""
    kind, _, name = measure.partition("/")
    return {"predicted": f"predicted as {name}", "positive": f"called {name} at the threshold"}.get(kind) or LABELS[
        kind
    ]


def format_period(each: Comparison) -> str:
    """Name the images of a comparison."""
    return f"recent periods to {each.period}" if each.window == RECENT else each.period


def format_alarm(each: Comparison, reference: UsageReference) -> str:
    """Describe a measure that is beyond a limit, in one line."""
    drift, images = each.drift, format_count(each.images, "image")
    if each.is_score:
        direction = "higher" if drift.value > 0.5 else "lower"
        percent = format_percent(max(drift.value, 1 - drift.value))
        share = f"{direction} in {percent} % of comparisons with a reference image"
        if each.window == RECENT:
            return f"{get_label(each.measure)} is {direction}: {share}"
        return (
            f"{get_label(each.measure)} is {direction}: median {format_number(each.median, 3)} of {images}, reference "
            f"{format_number(reference.scores[each.measure].median, 3)} ({share})"
        )
    basis = "weighted average" if each.window == RECENT else f"of {images}"
    return (
        f"{get_label(each.measure)}: {format_percent(drift.value)} % {basis}; limits "
        f"{format_percent(drift.low)} to {format_percent(drift.high)} %, reference {format_percent(drift.reference)} %"
    )


def explain_reference(reference: UsageReference, *, validated_on: str) -> str:
    """Explain which images the reference is, and why.

    Args:
        reference: The reference.
        validated_on: The split on which the run chose epoch and thresholds: val or test.
    """
    if reference.split == "test" and validated_on == "test":
        return (
            "The reference are the run's test images. The run validated on them too, and fixed its thresholds for "
            "abstention on them: fewer of them exceed these than of new images, so that a higher rate of abstentions "
            "may be no drift. --baseline PREDICTIONS gives a better reference."
        )
    if reference.split == "test":
        return (
            "The reference are the run's test images, on which its results were measured. The validation images would "
            "be a biased one: the thresholds for abstention were fixed on them, so that fewer of them exceed these "
            "than of new images."
        )
    if reference.split == "recalibration":
        return (
            "The reference are the images of this clinic on which the bundle was recalibrated: they were selected and "
            "labelled for that, and may contain the classes in other proportions than the clinic's routine."
        )
    return "The reference are the predictions given as --baseline: a period in which the model was accepted."


def format_reference(reference: UsageReference) -> str:
    """Describe the images of the reference."""
    names = {
        "test": "the run's test images",
        "recalibration": "the images of the recalibration",
        "baseline": "the baseline",
    }
    patients = f" of {format_count(reference.groups, 'patient')}" if reference.groups < reference.images else ""
    return f"{names.get(reference.split, reference.split)} ({format_count(reference.images, 'image')}{patients})"


def format_chance(periods: int, false_alarms: float) -> str:
    """State how many periods are expected to be beyond a limit by chance."""
    average = ", itself or in the average of recent periods" if periods > 1 else ""
    return (
        f"Without any drift, a period has a probability of {format_percent(false_alarms)} % to be beyond a limit of "
        f"any measure{average}: of {format_count(periods, 'period')}, "
        f"{format_number(false_alarms * periods, 2)} by chance."
    )


def sort_alarms(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return what is beyond a limit: all periods together first, then the newest periods."""
    names = list(dict.fromkeys(each.period for each in comparisons))
    alarms = [each for each in comparisons if each.drift.is_beyond]
    return sorted(alarms, key=lambda each: (-names.index(each.period), each.window != PERIOD))


def render_monitor_page(
    description: Description,
    comparisons: Sequence[Comparison],
    reference: UsageReference,
    periods: Mapping[str, int],
    notes: Sequence[str],
    *,
    false_alarms: float,
) -> str:
    """Render the page as HTML.

    Args:
        description: The content of the bundle's model.json.
        comparisons: All comparisons.
        reference: What they are with.
        periods: Number of images of each period, by name, in order.
        notes: What limits the comparison, in full sentences.
        false_alarms: Probability that a period without drift is beyond any limit.
    """
    alarms = sort_alarms(comparisons)
    images = sum(periods.values())
    rates = [each for each in comparisons if not each.is_score]
    scores = [each for each in comparisons if each.is_score]
    rows = [[each for each in group if each.window != RECENT] for group in (rates, scores)]
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
        Section(
            "figures",
            "All figures",
            (_build_rate_table(rows[0]), _build_score_table(rows[1])),
            is_appendix=True,
        ),
        Section("method", "How to read this", (Sentences(METHODS),), is_appendix=False),
    )
    summary = Summary(
        title=f"Monitoring of {description.architecture}: {join_names(description.short_names, most=6)}",
        subtitle=" to ".join(dict.fromkeys((next(iter(periods)), list(periods)[-1]))),
        marks=(),
        headline=None,
        findings=(
            verdict,
            explain_reference(reference, validated_on=description.training.validated_on),
            format_chance(len(periods), false_alarms),
        ),
        warnings=tuple(notes),
        facts=(
            KeyFigure("Periods", f"{len(periods):,}", f"{len(concerned)} beyond a limit"),
            KeyFigure("Images", f"{images:,}", "that could be read"),
            KeyFigure("Reference", f"{reference.images:,}", f"images: {format_reference(reference).split(' (')[0]}"),
        ),
    )
    return render_page(summary, sections, {drawing.key: render_svg(drawing) for drawing in drawings})


METHODS = (
    "A proportion is compared with the reference by the conditional test of two proportions (hypergeometric, mid-p), a "
    "score by Wilcoxon's rank-sum test on classes of the reference's histogram. The limits know how uncertain the "
    "reference itself is: with few reference images they are wide.",
    "The false-alarm probability of a period is shared equally by the measures, and by the period itself and the "
    "recent periods up to it (Bonferroni). The reference is the same for all periods: if it happened to be unusual, "
    "several periods are beyond a limit together.",
    f"A small change that lasts may stay within the limits of each period. It shows in the average of the recent "
    f"periods, in which an image counts {DECAY:g} times as much as one of the next period (EWMA), and in the row of "
    "all periods.",
    "Images of a patient resemble each other. They count as fewer independent ones, by the correlation within the "
    "patients of the reference. That is uncertain if the reference has few patients, so that the limits are wider then "
    "(Korn and Graubard); in simulations with 15 and 30 patients, chance alone was still beyond them up to three times "
    "as often as stated.",
    "An alarm does not say that the model is wrong: it says that images or answers are other than in the reference. "
    "Look at the images of that period; if labels can be had, evaluate (pylorus predict --evaluate). A clinic that "
    "sees the classes in other proportions than the test images needs a baseline of its own (--baseline).",
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
        drift, label = each.drift, get_label(each.measure)
        label += ": higher than a reference image, %" if each.is_score else ", %"
        numbers = (Number(100 * value, 1) for value in (drift.value, drift.reference, drift.low, drift.high))
        rows.append(Row((format_period(each), label, each.images, *numbers, convert_to_p_value_cell(drift.p))))
    return Table(
        key="beyond",
        title="What is beyond its limits",
        basis=f"Compared with {format_reference(reference)}.",
        columns=columns,
        rows=tuple(rows),
        notes=(
            "A score is compared by the percentage of pairs of an image of the period and a reference image in which "
            "the former is higher: 50 % without drift. p is of one comparison, not corrected for their number; "
            "the limits are.",
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
            *(Column(get_label(measure), unit="%") for measure in measures),
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
        columns=(*create_text_columns("period"), *(Column(get_label(measure)) for measure in measures)),
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
            own = [each for each in comparisons if each.measure == measure]
            series = [each for each in own if each.window == PERIOD]
            recent = [each for each in own if each.window == RECENT]
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
            if recent:
                lower, upper, average = (
                    100 * np.array([getattr(each.drift, name) for each in recent]) for name in ("low", "high", "value")
                )
                is_outside = np.array([each.drift.is_beyond for each in recent])
                panel.plot(x[1:], average, color=COLOURS[2], linewidth=1.5)
                for limit in (lower, upper):
                    panel.plot(x[1:], limit, color=COLOURS[2], linewidth=1, linestyle=":")
                panel.plot(x[1:][is_outside], average[is_outside], color=COLOURS[1], marker="s", linestyle="")
            panel.set_title(get_label(measure))
            panel.set_ylabel("higher, %" if is_score else "images, %")
            panel.set_ylim(*((0, 100) if is_score else (0, max(5.0, 1.15 * max(value.max(), high.max())))))
            panel.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, integer=True))
            names = [each.period for each in series]
            panel.xaxis.set_major_formatter(lambda place, _, names=names: _get_tick(names, place))
            panel.tick_params(axis="x", labelrotation=30)
            panel.set_xlim(-0.5, len(series) - 0.5)
        for panel in list(panels.flat)[len(measures) :]:
            panel.set_visible(False)
    beyond_count = sum(each.drift.is_beyond for each in comparisons if each.window == PERIOD)
    recent_count = sum(each.drift.is_beyond for each in comparisons if each.window == RECENT)
    meaning = (
        "Percentage of pairs of an image of the period and a reference image in which the former's score is higher"
        if is_score
        else "Percentage of images"
    )
    return Drawing(
        key=key,
        title=title,
        basis=(
            f"{meaning}. Shaded: within the limits; dashed: reference; diamonds: beyond a limit. Line without points: "
            "average of the recent periods, between its own limits (dotted); squares: it is beyond one."
        ),
        alt=(
            f"{title}: {len(measures)} control charts, {beyond_count} periods and {recent_count} averages of recent "
            "periods beyond a limit."
        ),
        figure=figure,
    )


def _get_tick(names: Sequence[str], place: float) -> str:
    """Return the name of the period at a tick, shortened to fit."""
    index = round(place)
    if abs(place - index) > 1e-6 or not 0 <= index < len(names):
        return ""
    name = names[index].removeprefix("images ")
    return name if len(name) <= 14 else f"{name[:13]}…"
