"""Plot confusion matrices as heat maps: shading by proportion of the row, annotated with counts."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pylorus.report.basis import format_test_basis
from pylorus.report.drawing import INK, PAPER, WIDTH, Drawing, create_figure, report_style
from pylorus.report.panels import split_into_panels
from pylorus.report.published import STUDY
from pylorus.report.result import Result
from pylorus.report.study_tables import format_published_basis

READABLE = 12
"""Maximum number of classes for which a panel shows counts."""

FEW = 5
"""With more classes than this, panels are larger."""

NOTE = "Rows: true class; columns: predicted class. Shading: proportion of the true class."


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


Panel = tuple[str, Sequence[str], NDArray[np.int64]]


def _plot_confusion_panels(
    key: str, title: str, basis: str, panels: Sequence[Sequence[Panel | None]], correct: str
) -> Drawing:
    columns = len(panels[0])
    max_classes = max(len(panel[1]) for line in panels for panel in line if panel is not None)
    side = WIDTH / max(columns, 3 if max_classes <= FEW else 2)
    with report_style():
        # The two-line title and the label below need more space than the label on the left.
        figure = create_figure(len(panels) * (side * 1.06 + 0.15), width=side * columns)
        grid = figure.subplots(len(panels), columns, squeeze=False)
        for line, axes_line in zip(panels, grid, strict=True):
            for axes, panel in zip(axes_line, line, strict=True):
                if panel is None:
                    axes.set_axis_off()
                else:
                    _draw_heat_map(axes, *panel, small=columns > 3)
    return Drawing(key, title, basis, f"Heat maps of counts. Correctly classified: {correct}.", figure, (NOTE,))


def _draw_heat_map(axes: Axes, title: str, names: Sequence[str], counts: NDArray[np.int64], *, small: bool) -> None:
    totals = counts.sum(axis=1, keepdims=True)
    proportions = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    axes.pcolormesh(proportions, cmap="Blues", vmin=0, vmax=1.15, edgecolors=PAPER, linewidth=1.5)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=6.5 if small else 8.5)
    positions = np.arange(len(names)) + 0.5
    slanted = max(len(name) for name in names) * len(names) > 24
    axes.set_xticks(positions, names, rotation=35 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(positions, names)
    axes.tick_params(length=0, labelsize=7.5)
    axes.set_xlabel("predicted", fontsize=7.5)
    axes.set_ylabel("true", fontsize=7.5)
    if len(names) > READABLE:
        return
    size = max(4.5, (9 if small else 10) - 0.6 * max(0, len(names) - 3))
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
