"""Figures of results: confusion matrices, ROC and precision-recall curves, and reliability diagrams."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pylorus.core.formatting import format_number
from pylorus.evaluation.calibration import BINS, ReliabilityCurve
from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.discrimination import auroc, average_precision
from pylorus.evaluation.predictions import Predictions
from pylorus.report.candidate import Candidate
from pylorus.report.captions import format_test_basis, format_validation_images
from pylorus.report.figure_style import (
    COLOURS,
    FAINT,
    INK,
    PAPER,
    REPLICATES_NOTE,
    TICK_SIZE,
    WIDTH,
    Drawing,
    add_key_below,
    add_legend_above,
    add_legend_below,
    create_figure,
    get_line_style,
    get_replicate_style,
    measure_text,
    replace_undrawable,
    report_style,
    split_into_panels,
    wrap_text,
)
from pylorus.report.results import IMAGES_PER_BIN, Calibration, Result
from pylorus.report.study_tables import STUDY, format_published_basis
from pylorus.report.table import convert_to_number_cell

SCREEN_DPI = 200
"""Dots per inch of a figure that is shown on a screen alone, not in a report."""

MAX_COUNT_CLASSES = 12
"""Maximum number of classes for which a panel shows counts."""

MAX_SMALL_PANEL_CLASSES = 5
"""With more classes than this, panels are larger."""

MATRIX_NOTE = "Rows: true class; columns: predicted class. Shading: proportion of the true class."
"""Note below confusion matrices; where names do not fit at the axes, numbers stand for them and a key is below."""

Panel = tuple[str, Sequence[str], NDArray[np.int64]]

MAX_CLASSES = 12
"""Maximum number of classes plotted; the tables give the AUROC of every class."""

LINE_STYLES = (
    {"color": COLOURS[1], "marker": "s", "linestyle": "--", "markerfacecolor": "none"},
    {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
)
"""Line styles before and after temperature scaling."""

LEGEND_LABELS = ("before", "after", "ideal")


def plot_confusion_matrices(results: Sequence[Result]) -> list[Drawing]:
    """Plot the confusion matrices of all results, in as many figures as needed.

    Args:
        results: At least one.
    """
    figures = split_into_panels(results)
    drawings = []
    for number, lines in enumerate(figures, start=1):
        plotted = [result for line in lines for result in line if result is not None]
        panels = [
            [
                None
                if result is None
                else (_format_panel_title(result), _get_panel_class_names(result), result.images.confusion)
                for result in line
            ]
            for line in lines
        ]
        part = f"-{number}" if len(figures) > 1 else ""
        correct = ", ".join(
            f"{result.label}: {result.images.shares.accuracy.successes} of {result.images.shares.accuracy.total}"
            for result in plotted
        )
        drawings.append(
            _plot_confusion_panels(
                f"confusion-matrices{part}",
                "Confusion matrices of the test images",
                format_test_basis(plotted),
                panels,
                correct,
            )
        )
    return drawings


def plot_confusion_matrix(predictions: Predictions, *, title: str) -> Figure:
    """Plot the confusion matrix of one set of predictions, in the style of the report."""
    counts = confusion_matrix(predictions.true, predictions.predicted, predictions.classes)
    # No caption could explain letters.
    names = [replace_undrawable(name) for name in predictions.class_names]
    figure = _plot_panels([[(title, names, counts)]])
    figure.set_dpi(SCREEN_DPI)
    return figure


def plot_published_confusion_matrices() -> Drawing:
    """Plot table 4 of the study in the style of our figures."""
    stages = list(dict.fromkeys(result.stage for result in STUDY.results))
    panels = [
        [
            (f"{result.model}\n{result.stage}", STUDY.short_names, result.confusion)
            for result in STUDY.results
            if result.stage == stage
        ]
        for stage in stages
    ]
    correct = ", ".join(f"{each.model} {each.stage}: {each.confusion.trace()} of 450" for each in STUDY.results)
    return _plot_confusion_panels(
        "published-confusion-matrices", "As published: confusion matrices", format_published_basis(), panels, correct
    )


def _plot_confusion_panels(
    key: str, title: str, basis: str, panels: Sequence[Sequence[Panel | None]], correct: str
) -> Drawing:
    return Drawing(
        key,
        title,
        basis,
        f"Heat maps of counts. Correctly classified: {correct}.",
        _plot_panels(panels),
        (MATRIX_NOTE,),
    )


def _plot_panels(panels: Sequence[Sequence[Panel | None]]) -> Figure:
    columns = len(panels[0])
    shown = [panel for line in panels for panel in line if panel is not None]
    classes = list(dict.fromkeys(name for _, names, _ in shown for name in names))
    max_classes = max(len(names) for _, names, _ in shown)
    side = WIDTH / max(columns, 3 if max_classes <= MAX_SMALL_PANEL_CLASSES else 2)
    is_numbered = not all(_fit_names(names, side) for _, names, _ in shown)
    width = max(side * columns, WIDTH if is_numbered and max_classes > MAX_SMALL_PANEL_CLASSES else 0)
    key = [f"{number}  {name}" for number, name in enumerate(classes, start=1)] if is_numbered else []
    with report_style():
        # The two-line title and the label below need more space than the label on the left.
        figure = create_figure(len(panels) * (side * 1.06 + 0.15), width=width, key=key)
        grid = figure.subplots(len(panels), columns, squeeze=False)
        for line, axes_line in zip(panels, grid, strict=True):
            for axes, panel in zip(axes_line, line, strict=True):
                if panel is None:
                    axes.set_axis_off()
                    continue
                title, names, counts = panel
                labels = [str(classes.index(name) + 1) for name in names] if is_numbered else names
                _draw_heat_map(axes, title, labels, counts, side=side, small=columns > 3)
        if key:
            add_key_below(figure, key)
    return figure


def _fit_names(names: Sequence[str], side: float) -> bool:
    """Return whether class names fit at both axes of a panel of `side` inches without touching each other."""
    matrix = _measure_matrix(names, side)
    return matrix > 0.45 * side and matrix / len(names) > (0.13 if _is_upright(names, side) else 0.2)


def _measure_matrix(names: Sequence[str], side: float) -> float:
    """Return about how many inches of a panel remain for the matrix beside its labels."""
    return side - 0.4 - max(measure_text(name, TICK_SIZE) for name in names)


def _is_upright(names: Sequence[str], side: float) -> bool:
    """Return whether class names fit side by side below the matrix; else they are slanted."""
    return max(measure_text(name, TICK_SIZE) for name in names) + 0.08 < _measure_matrix(names, side) / len(names)


def _draw_heat_map(
    axes: Axes, title: str, names: Sequence[str], counts: NDArray[np.int64], *, side: float, small: bool
) -> None:
    totals = counts.sum(axis=1, keepdims=True)
    proportions = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    axes.pcolormesh(proportions, cmap="Blues", vmin=0, vmax=1.15, edgecolors=PAPER, linewidth=min(1.5, 15 / len(names)))
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    title_size = 6.5 if small else 8.5
    matrix = _measure_matrix(names, side)
    axes.set_title(wrap_text(title, matrix, title_size, bold=True), fontsize=title_size)
    # With many classes, each number has little space, or only some are written.
    cell = 72 * matrix / len(names)
    step, label_size = max(1, math.ceil(8 / cell)), min(TICK_SIZE, max(5.0, 0.65 * cell))
    positions, slanted = (np.arange(len(names)) + 0.5)[::step], not _is_upright(names, side) and step == 1
    slanted = slanted and not all(name.isdecimal() for name in names)
    axes.set_xticks(positions, names[::step], rotation=35 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(positions, names[::step])
    axes.tick_params(length=0, labelsize=label_size)
    axes.set_xlabel("predicted", fontsize=TICK_SIZE)
    axes.set_ylabel("true", fontsize=TICK_SIZE)
    if len(names) > MAX_COUNT_CLASSES:
        return
    digits = len(str(counts.max()))
    size = min(max(4.5, (9 if small else 10) - 0.6 * max(0, len(names) - 3)), 1.4 * cell / max(digits, 2))
    for (row, column), count in np.ndenumerate(counts):
        axes.text(
            column + 0.5,
            row + 0.5,
            str(count),
            ha="center",
            va="center",
            fontsize=size,
            color=PAPER if proportions[row, column] > 0.6 else INK,
            fontweight="bold" if row == column else "normal",
        )


def _format_panel_title(result: Result) -> str:
    return f"{result.run.label}\n{result.stage.name}"


def _get_panel_class_names(result: Result) -> Sequence[str]:
    return result.images.predictions.class_names


def plot_roc_curves(candidates: Sequence[Candidate]) -> Drawing:
    """Plot ROC curves on the test images, one colour per candidate.

    Args:
        candidates: At least one. Panels are the classes of the first; candidates without a class are omitted there.
    """
    names = candidates[0].results[0].images.predictions.class_names[:MAX_CLASSES]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    labels = [each.label for each in candidates]
    titles = [wrap_text(f"{name} versus the rest", WIDTH / 3 - 0.6, 9, bold=True) for name in names]
    title_lines = sum(
        max(title.count("\n") for title in titles[first : first + columns]) for first in range(0, len(names), columns)
    )
    with report_style():
        height = lines * (2.45 + 0.168 * len(candidates)) + 0.15 * title_lines
        figure = create_figure(height, legend=labels)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_axis_off()
        for axes, name, title in zip(grid.flat, names, titles, strict=False):
            axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", linewidth=1)
            handles, areas = [], []
            for number, candidate in enumerate(candidates):
                handle = _draw_roc_curve(axes, candidate, name, number)
                if handle is not None:
                    handles.append(handle)
                    areas.append(_format_auroc(candidate, name))
            axes.set_title(title)
            axes.set_xlabel("100 − specificity, %")
            axes.set_ylabel("sensitivity, %")
            axes.set_xlim(-2, 102)
            axes.set_ylim(-2, 102)
            axes.set_aspect("equal", anchor="N")  # surplus height stays below, for the legend
            add_legend_below(axes, handles, areas)
        legend_lines = [
            Line2D([], [], **(get_line_style(number) | {"marker": ""})) for number in range(len(candidates))
        ]
        add_legend_above(figure, legend_lines, labels)
    area_text = "; ".join(
        f"{name}: {', '.join(f'{each.label} {_format_auroc(each, name)}' for each in candidates)}" for name in names
    )
    notes = []
    if any(len(each.results) == 1 for each in candidates):
        notes.append("Below each panel: area under the curve with 95 % confidence interval.")
    if any(len(each.results) > 1 for each in candidates):
        notes.append(REPLICATES_NOTE)
        notes.append("Below each panel, for several runs: mean and range of their areas under the curve.")
    return Drawing(
        key="roc",
        title="ROC curves on test images, each class versus the rest",
        basis=format_test_basis([result for each in candidates for result in each.results]),
        alt=f"Sensitivity against 100 minus specificity. Area under the curve: {area_text}.",
        figure=figure,
        notes=(*notes, "Dotted line: chance level."),
    )


def compute_roc_points(
    positive: NDArray[np.bool_], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute false and true positive rates from the strictest to the most lenient threshold, both from 0 to 1.

    Args:
        positive: Whether each image is of the class, of shape (n,), with at least one of each kind.
        scores: Scores of shape (n,), higher if more probable; equal scores share one threshold.

    Example:
        >>> rates = compute_roc_points(np.array([True, False, True]), np.array([0.9, 0.5, 0.5]))
        >>> [rate.tolist() for rate in rates]
        [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0]]
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], positive[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    true = np.append(0, np.cumsum(hits)[last])
    false = np.append(0, np.cumsum(~hits)[last])
    return false / false[-1], true / true[-1]


def _compute_class_roc(result: Result, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the curve of a class; None if the class or the rest has no test images."""
    predictions = result.test.predictions
    if name not in predictions.class_names:
        return None
    column = predictions.class_names.index(name)
    positive = predictions.true == column
    if positive.all() or not positive.any():
        return None
    return compute_roc_points(positive, predictions.probabilities[:, column])


def _draw_roc_curve(axes: Axes, candidate: Candidate, name: str, number: int) -> Line2D | None:
    """Plot a candidate's curve, and those of its runs if there are several; return None if no run has a curve."""
    curves = [points for result in candidate.results if (points := _compute_class_roc(result, name)) is not None]
    if not curves:
        return None
    line_options = get_line_style(number) | {"marker": ""}
    if len(candidate.results) == 1:
        (line,) = axes.plot(100 * curves[0][0], 100 * curves[0][1], **line_options)
        return line
    for false, true in curves:
        axes.plot(100 * false, 100 * true, **get_replicate_style(number))
    grid = np.linspace(0, 1, 201)
    mean = np.mean([_calculate_sensitivity_at(grid, *points) for points in curves], axis=0)
    (line,) = axes.plot(100 * np.append(0.0, grid), 100 * np.append(0.0, mean), **line_options)
    return line


def _calculate_sensitivity_at(
    grid: NDArray[np.float64], false: NDArray[np.float64], true: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Interpolate the curve at a grid of false positive rates; use the upper end of vertical segments."""
    last = np.append(np.flatnonzero(np.diff(false)), len(false) - 1)
    sensitivity: NDArray[np.float64] = np.interp(grid, false[last], true[last])
    return sensitivity


def _format_auroc(candidate: Candidate, name: str) -> str:
    areas = []
    for result in candidate.results:
        names = result.images.predictions.class_names
        if name in names:
            areas.append(convert_to_number_cell(result.images.ranking.auroc[names.index(name)], digits=2))
    values = [each.value for each in areas if each.value == each.value]
    if not values:
        return "undefined"
    if len(candidate.results) == 1:
        return areas[0].text
    return "{} ({} to {})".format(*(format_number(area, 2) for area in (np.mean(values), min(values), max(values))))


def plot_reliability_diagrams(results: Sequence[Result]) -> list[Drawing]:
    """Plot the reliability diagrams of all results, in as many figures as needed.

    Args:
        results: At least one, each with a calibration.
    """
    figures = split_into_panels(results)
    return [
        _plot_reliability_panels(lines, f"-{number}" if len(figures) > 1 else "")
        for number, lines in enumerate(figures, start=1)
    ]


def _plot_reliability_panels(lines: Sequence[Sequence[Result | None]], part: str) -> Drawing:
    columns = len(lines[0])
    side = WIDTH / max(columns, 3)
    plotted = [result for line in lines for result in line if result is not None]
    with report_style():
        figure = create_figure(side * len(lines) * 1.06, width=max(side * columns, WIDTH / 2), legend=LEGEND_LABELS)
        grid = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey=True)
        for axes, result in zip(grid.flat, [each for line in lines for each in line], strict=True):
            if result is None or result.calibration is None:
                axes.set_axis_off()
            else:
                title = f"{result.run.label}\n{result.stage.name}"
                title = wrap_text(title, side - 0.5, 6.5 if columns > 3 else 8.5, bold=True)
                _draw_reliability_panel(axes, title, result.calibration, small=columns > 3)
        handles = [Line2D([], [], **look) for look in LINE_STYLES]  # type: ignore[arg-type]
        diagonal = Line2D([], [], color=FAINT, linestyle=":")
        add_legend_above(figure, [*handles, diagonal], LEGEND_LABELS)
    errors = ", ".join(
        f"{result.label} {format_number(result.calibration.before.ece.value, 3)} before and "
        f"{format_number(result.calibration.after.ece.value, 3)} after"
        for result in plotted
        if result.calibration is not None
    )
    return Drawing(
        key=f"reliability{part}",
        title="Reliability diagrams on test images before and after temperature scaling, fitted on "
        + format_validation_images([result.run for result in plotted]),
        basis=format_test_basis(plotted),
        alt=f"Accuracy against confidence. Expected calibration error: {errors}.",
        figure=figure,
        notes=(
            f"Bins with equal numbers of images: at most {BINS}, fewer if they would hold fewer than {IMAGES_PER_BIN} "
            "images. Bars: 95 % confidence intervals. Below the diagonal: overconfident.",
        ),
    )


def _draw_reliability_panel(axes: Axes, title: str, calibration: Calibration, *, small: bool) -> None:
    axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", zorder=1)
    curves = (calibration.curve_before, calibration.curve_after)
    for curve, line_options in zip(curves, LINE_STYLES, strict=True):
        _draw_reliability_curve(axes, curve, line_options)
    axes.set_title(title, fontsize=6.5 if small else 8.5)
    axes.set_xlabel("mean confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(0, 103)
    axes.set_ylim(-3, 103)
    axes.set_aspect("equal")
    axes.label_outer()


def _draw_reliability_curve(axes: Axes, curve: ReliabilityCurve, line_options: dict[str, str]) -> None:
    accuracy = np.array([proportion.value for proportion in curve.accuracy])
    limits = np.array([(proportion.low, proportion.high) for proportion in curve.accuracy]).T
    lengths = np.abs(limits - accuracy)
    axes.errorbar(
        100 * curve.certainty,
        100 * accuracy,
        yerr=100 * lengths,
        elinewidth=0.8,
        capsize=1.5,
        markersize=3.5,
        linewidth=1.2,
        **line_options,  # type: ignore[arg-type]
    )


def plot_roc_curve(predictions: Predictions, *, title: str) -> Figure:
    """Plot the ROC curve of each class against the rest, of one set of predictions."""

    def draw(axes: Axes, positive: NDArray[np.bool_], scores: NDArray[np.float64], style: dict[str, Any]) -> str:
        false, true = compute_roc_points(positive, scores)
        axes.plot(100 * false, 100 * true, **style)
        return f"AUROC {format_number(auroc(positive, scores).value, 2)}"

    figure, axes = _plot_class_curves(predictions, title, draw)
    axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", linewidth=1)
    axes.set_xlabel("100 − specificity, %")
    axes.set_ylabel("sensitivity, %")
    return figure


def plot_precision_recall_curve(predictions: Predictions, *, title: str) -> Figure:
    """Plot precision against sensitivity of each class against the rest, of one set of predictions."""

    def draw(axes: Axes, positive: NDArray[np.bool_], scores: NDArray[np.float64], style: dict[str, Any]) -> str:
        sensitivity, precision = compute_precision_points(positive, scores)
        start = np.append(0, sensitivity), np.append(precision[0], precision)
        axes.step(100 * start[0], 100 * start[1], where="pre", **style)
        return f"average precision {format_number(average_precision(positive, scores).value, 2)}"

    figure, axes = _plot_class_curves(predictions, title, draw)
    axes.set_xlabel("sensitivity, %")
    axes.set_ylabel("precision, %")
    return figure


def compute_precision_points(
    positive: NDArray[np.bool_], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute sensitivity and precision from the strictest to the most lenient threshold, both from 0 to 1.

    Args:
        positive: Whether each image is of the class, of shape (n,), with at least one that is.
        scores: Scores of shape (n,), higher if more probable; equal scores share one threshold.

    Example:
        >>> rates = compute_precision_points(np.array([True, False, True]), np.array([0.9, 0.5, 0.4]))
        >>> [rate.round(2).tolist() for rate in rates]
        [[0.5, 0.5, 1.0], [1.0, 0.5, 0.67]]
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits = np.cumsum(positive[order])[last]
    return hits / hits[-1], hits / (last + 1)


def _plot_class_curves(predictions: Predictions, title: str, draw: Callable[..., str]) -> tuple[Figure, Axes]:
    """Plot a curve of each class that some of the images, but not all, belong to."""
    labels, handles = [], []
    with report_style():
        figure = create_figure(4.3 + 0.17 * min(predictions.classes, MAX_CLASSES), width=4.2)
        axes = figure.subplots()
        for column, name in enumerate(predictions.class_names[:MAX_CLASSES]):
            positive = predictions.true == column
            if positive.all() or not positive.any():
                continue
            style = get_line_style(column) | {"marker": ""}
            area = draw(axes, positive, predictions.probabilities[:, column], style)
            labels.append(f"{replace_undrawable(name)}: {area}")
            handles.append(Line2D([], [], **style))
        axes.set_title(wrap_text(replace_undrawable(title), 3.6, 8.5, bold=True), fontsize=8.5)
        axes.set_xlim(-2, 102)
        axes.set_ylim(-2, 102)
        axes.set_aspect("equal")
        if handles:
            add_legend_below(axes, handles, labels)
    figure.set_dpi(SCREEN_DPI)
    return figure, axes


def plot_reliability_diagram(calibration: Calibration, *, title: str) -> Figure:
    """Plot the reliability diagram of the test images before and after temperature scaling, of one stage."""
    with report_style():
        figure = create_figure(4.2, width=4.2, legend=LEGEND_LABELS)
        _draw_reliability_panel(figure.subplots(), replace_undrawable(title), calibration, small=False)
        handles = [Line2D([], [], **look) for look in LINE_STYLES]  # type: ignore[arg-type]
        add_legend_above(figure, [*handles, Line2D([], [], color=FAINT, linestyle=":")], LEGEND_LABELS)
    figure.set_dpi(SCREEN_DPI)
    return figure
