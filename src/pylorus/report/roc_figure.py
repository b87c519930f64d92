"""Plot one-versus-rest ROC curves of all candidates, one panel per class."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pylorus.report.basis import format_test_basis
from pylorus.report.candidate import Candidate
from pylorus.report.drawing import (
    FAINT,
    REPLICATES,
    Drawing,
    add_legend_above,
    add_legend_below,
    create_figure,
    get_line_style,
    get_replicate_style,
    report_style,
)
from pylorus.report.result import Result
from pylorus.report.table import convert_to_number_cell

MOST = 12
"""Maximum number of classes plotted; the tables give the AUROC of every class."""


def plot_roc_curves(candidates: Sequence[Candidate]) -> Drawing:
    """Plot ROC curves on the test images, one colour per candidate.

    Args:
        candidates: At least one. Panels are the classes of the first; candidates without a class are omitted there.
    """
    names = candidates[0].results[0].images.predictions.class_names[:MOST]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    labels = [each.label for each in candidates]
    with report_style():
        figure = create_figure(lines * (2.45 + 0.168 * len(candidates)), legend=labels)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", linewidth=1)
            handles, areas = [], []
            for number, candidate in enumerate(candidates):
                handle = _draw_roc_curve(axes, candidate, name, number)
                if handle is not None:
                    handles.append(handle)
                    areas.append(_format_auroc(candidate, name))
            axes.set_title(f"{name} versus the rest")
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
        notes.append(REPLICATES)
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
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
