"""ROC curves, one class against the rest, of all compared results in one panel a class."""

from collections.abc import Sequence

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pylorus.report.basis import tested_on
from pylorus.report.drawing import FAINT, Drawing, legend_above, legend_below, line_style, new_figure, style
from pylorus.report.result import Result
from pylorus.report.table import as_number

MOST = 12
"""Most classes drawn; the AUROC of every class stands in the tables."""


def roc_figure(results: Sequence[Result]) -> Drawing:
    """ROC curves of the test images.

    Args:
        results: At least one; classes are those of the first, a result without a class is left out of its panel.
    """
    names = results[0].images.predictions.class_names[:MOST]
    across = min(3, len(names))
    lines = -(-len(names) // across)
    with style():
        figure = new_figure(lines * (2.45 + 0.168 * len(results)), legend=[result.label for result in results])
        grid = figure.subplots(lines, across, squeeze=False)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", linewidth=1)
            handles, labels = [], []
            for number, result in enumerate(results):
                points = _points(result, name)
                if points is None:
                    continue
                look = line_style(number) | {"marker": ""}
                handles += axes.plot(100 * points[0], 100 * points[1], **look)
                labels.append(_area(result, name))
            axes.set_title(f"{name} against the rest")
            axes.set_xlabel("100 − specificity, %")
            axes.set_ylabel("sensitivity, %")
            axes.set_xlim(-2, 102)
            axes.set_ylim(-2, 102)
            axes.set_aspect("equal", anchor="N")  # what is too high is left below, for the legend
            legend_below(axes, handles, labels)
        every = [Line2D([], [], **(line_style(number) | {"marker": ""})) for number in range(len(results))]
        legend_above(figure, every, [result.label for result in results])
    areas = "; ".join(f"{name}: {', '.join(f'{each.label} {_area(each, name)}' for each in results)}" for name in names)
    return Drawing(
        key="roc",
        title="ROC curves on test images, each class against the rest",
        basis=tested_on(results),
        alt=f"Sensitivity against 100 minus specificity. Area under the curve: {areas}.",
        figure=figure,
        notes=("Below each panel: area under the curve with its 95 % interval. Dotted: chance.",),
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


def _area(result: Result, name: str) -> str:
    names = result.images.predictions.class_names
    if name not in names:
        return "undefined"
    found = as_number(result.images.ranking.auroc[names.index(name)], digits=2)
    return found.text if found.value == found.value else "undefined"
