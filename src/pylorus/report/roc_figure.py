"""ROC curves, one class against the rest, of all candidates in one panel a class."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pylorus.report.basis import tested_on
from pylorus.report.candidate import Candidate
from pylorus.report.drawing import (
    FAINT,
    REPLICATES,
    Drawing,
    legend_above,
    legend_below,
    line_style,
    new_figure,
    replicate_style,
    style,
)
from pylorus.report.result import Result
from pylorus.report.table import as_number

MOST = 12
"""Most classes drawn; the AUROC of every class stands in the tables."""


def roc_figure(candidates: Sequence[Candidate]) -> Drawing:
    """ROC curves of the test images, a colour a candidate.

    Args:
        candidates: At least one; classes are those of the first, a candidate without a class is left out of its panel.
    """
    names = candidates[0].results[0].images.predictions.class_names[:MOST]
    across = min(3, len(names))
    lines = -(-len(names) // across)
    labels = [each.label for each in candidates]
    with style():
        figure = new_figure(lines * (2.45 + 0.168 * len(candidates)), legend=labels)
        grid = figure.subplots(lines, across, squeeze=False)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", linewidth=1)
            handles, areas = [], []
            for number, candidate in enumerate(candidates):
                handle = _draw(axes, candidate, name, number)
                if handle is not None:
                    handles.append(handle)
                    areas.append(_area(candidate, name))
            axes.set_title(f"{name} against the rest")
            axes.set_xlabel("100 − specificity, %")
            axes.set_ylabel("sensitivity, %")
            axes.set_xlim(-2, 102)
            axes.set_ylim(-2, 102)
            axes.set_aspect("equal", anchor="N")  # what is too high is left below, for the legend
            legend_below(axes, handles, areas)
        every = [Line2D([], [], **(line_style(number) | {"marker": ""})) for number in range(len(candidates))]
        legend_above(figure, every, labels)
    areas_said = "; ".join(
        f"{name}: {', '.join(f'{each.label} {_area(each, name)}' for each in candidates)}" for name in names
    )
    notes = []
    if any(len(each.results) == 1 for each in candidates):
        notes.append("Below each panel: area under the curve with its 95 % interval.")
    if any(len(each.results) > 1 for each in candidates):
        notes.append(REPLICATES)
        notes.append("Below each panel, of several runs: mean and range of their areas under the curve.")
    return Drawing(
        key="roc",
        title="ROC curves on test images, each class against the rest",
        basis=tested_on([result for each in candidates for result in each.results]),
        alt=f"Sensitivity against 100 minus specificity. Area under the curve: {areas_said}.",
        figure=figure,
        notes=(*notes, "Dotted: chance."),
    )


def roc_points(
    positive: NDArray[np.bool_], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates from the strictest to the laxest threshold, both from 0 to 1.

    Args:
        positive: Shape (n,), with at least one of each kind.
        scores: Shape (n,): larger for likelier; equal scores are passed together.

    Example:
        >>> rates = roc_points(np.array([True, False, True]), np.array([0.9, 0.5, 0.5]))
        >>> [rate.tolist() for rate in rates]
        [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0]]
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], positive[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    true = np.append(0, np.cumsum(hits)[last])
    false = np.append(0, np.cumsum(~hits)[last])
    return false / false[-1], true / true[-1]


def _points(result: Result, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The curve of a class; None where it, or the rest, has no test images."""
    said = result.test.predictions
    if name not in said.class_names:
        return None
    column = said.class_names.index(name)
    positive = said.true == column
    if positive.all() or not positive.any():
        return None
    return roc_points(positive, said.probabilities[:, column])


def _draw(axes: Axes, candidate: Candidate, name: str, number: int) -> Line2D | None:
    """A candidate's curve, and those of its runs where there are several; None where no run has one."""
    curves = [points for result in candidate.results if (points := _points(result, name)) is not None]
    if not curves:
        return None
    look = line_style(number) | {"marker": ""}
    if len(candidate.results) == 1:
        (line,) = axes.plot(100 * curves[0][0], 100 * curves[0][1], **look)
        return line
    for false, true in curves:
        axes.plot(100 * false, 100 * true, **replicate_style(number))
    grid = np.linspace(0, 1, 201)
    mean = np.mean([_sensitivity_at(grid, *points) for points in curves], axis=0)
    (line,) = axes.plot(100 * np.append(0.0, grid), 100 * np.append(0.0, mean), **look)
    return line


def _sensitivity_at(
    grid: NDArray[np.float64], false: NDArray[np.float64], true: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The curve read off at given false positive rates; where it rises steeply, its upper end."""
    last = np.append(np.flatnonzero(np.diff(false)), len(false) - 1)
    read: NDArray[np.float64] = np.interp(grid, false[last], true[last])
    return read


def _area(candidate: Candidate, name: str) -> str:
    found = []
    for result in candidate.results:
        names = result.images.predictions.class_names
        if name in names:
            found.append(as_number(result.images.ranking.auroc[names.index(name)], digits=2))
    values = [each.value for each in found if each.value == each.value]
    if not values:
        return "undefined"
    if len(candidate.results) == 1:
        return found[0].text
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
