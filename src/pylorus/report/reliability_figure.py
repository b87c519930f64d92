"""Plot reliability diagrams: accuracy against confidence, before and after temperature scaling."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pylorus.evaluation.reliability import ReliabilityCurve
from pylorus.report.basis import format_test_basis
from pylorus.report.calibrated import Calibration
from pylorus.report.drawing import COLOURS, FAINT, WIDTH, Drawing, add_legend_above, create_figure, report_style
from pylorus.report.panels import split_into_panels
from pylorus.report.result import Result
from pylorus.report.run_facts import format_validation_images

LOOKS = (
    {"color": COLOURS[1], "marker": "s", "linestyle": "--", "markerfacecolor": "none"},
    {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
)
"""Line styles before and after temperature scaling."""

LEGEND = ("before", "after", "ideal")


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
        figure = create_figure(side * len(lines) * 1.06, width=max(side * columns, WIDTH / 2), legend=LEGEND)
        grid = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey=True)
        for axes, result in zip(grid.flat, [each for line in lines for each in line], strict=True):
            if result is None or result.calibration is None:
                axes.set_axis_off()
            else:
                title = f"{result.run.label}\n{result.stage.name}"
                _draw_reliability_panel(axes, title, result.calibration, small=columns > 3)
        handles = [Line2D([], [], **look) for look in LOOKS]  # type: ignore[arg-type]
        diagonal = Line2D([], [], color=FAINT, linestyle=":")
        add_legend_above(figure, [*handles, diagonal], LEGEND)
    errors = ", ".join(
        f"{result.label} {result.calibration.before.ece.value:.3f} before and "
        f"{result.calibration.after.ece.value:.3f} after"
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
            "Up to ten bins with equal numbers of images. Bars: 95 % confidence intervals. Below the diagonal: "
            "overconfident.",
        ),
    )


def _draw_reliability_panel(axes: Axes, title: str, calibration: Calibration, *, small: bool) -> None:
    axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", zorder=1)
    curves = (calibration.curve_before, calibration.curve_after)
    for curve, line_options in zip(curves, LOOKS, strict=True):
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
