"""Reliability: how sure the model was against how often it was right, before and after the temperature."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pylorus.evaluation.reliability import ReliabilityCurve
from pylorus.report.basis import tested_on
from pylorus.report.calibrated import Calibration
from pylorus.report.drawing import COLOURS, FAINT, WIDTH, Drawing, legend_above, new_figure, style
from pylorus.report.panels import arranged
from pylorus.report.result import Result
from pylorus.report.run_facts import validation_images

LOOKS = (
    {"color": COLOURS[1], "marker": "s", "linestyle": "--", "markerfacecolor": "none"},
    {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
)
"""Before, after."""

LEGEND = ("before", "after", "ideal")


def reliability_figures(results: Sequence[Result]) -> list[Drawing]:
    """Reliability plots of all results, in as many figures as they need.

    Args:
        results: At least one, each with a calibration.
    """
    figures = arranged(results)
    return [_drawing(lines, f"-{number}" if len(figures) > 1 else "") for number, lines in enumerate(figures, start=1)]


def _drawing(lines: Sequence[Sequence[Result | None]], part: str) -> Drawing:
    across = len(lines[0])
    side = WIDTH / max(across, 3)
    shown = [result for line in lines for result in line if result is not None]
    with style():
        figure = new_figure(side * len(lines) * 1.06, width=max(side * across, WIDTH / 2), legend=LEGEND)
        grid = figure.subplots(len(lines), across, squeeze=False, sharex=True, sharey=True)
        for axes, result in zip(grid.flat, [each for line in lines for each in line], strict=True):
            if result is None or result.calibration is None:
                axes.set_axis_off()
            else:
                title = f"{result.run.label}\n{result.stage.name}"
                _panel(axes, title, result.calibration, small=across > 3)
        handles = [Line2D([], [], **look) for look in LOOKS]  # type: ignore[arg-type]
        diagonal = Line2D([], [], color=FAINT, linestyle=":")
        legend_above(figure, [*handles, diagonal], LEGEND)
    errors = ", ".join(
        f"{result.label} {result.calibration.before.ece:.3f} before and {result.calibration.after.ece:.3f} after"
        for result in shown
        if result.calibration is not None
    )
    return Drawing(
        key=f"reliability{part}",
        title="Reliability on test images, before and after the temperature fitted on "
        + validation_images([result.run for result in shown]),
        basis=tested_on(shown),
        alt=f"Accuracy against certainty. Expected calibration error: {errors}.",
        figure=figure,
        notes=("Up to ten bins of equally many images. Bars: 95 % intervals. Below the diagonal: too sure.",),
    )


def _panel(axes: Axes, title: str, calibration: Calibration, *, small: bool) -> None:
    axes.plot([0, 100], [0, 100], color=FAINT, linestyle=":", zorder=1)
    curves = (calibration.curve_before, calibration.curve_after)
    for curve, look in zip(curves, LOOKS, strict=True):
        _curve(axes, curve, look)
    axes.set_title(title, fontsize=6.5 if small else 8.5)
    axes.set_xlabel("mean certainty, %")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(0, 103)
    axes.set_ylim(-3, 103)
    axes.set_aspect("equal")
    axes.label_outer()


def _curve(axes: Axes, curve: ReliabilityCurve, look: dict[str, str]) -> None:
    value = np.array([share.value for share in curve.accuracy])
    ends = np.array([(share.low, share.high) for share in curve.accuracy]).T
    reach = np.abs(ends - value)
    axes.errorbar(
        100 * curve.certainty,
        100 * value,
        yerr=100 * reach,
        elinewidth=0.8,
        capsize=1.5,
        markersize=3.5,
        linewidth=1.2,
        **look,  # type: ignore[arg-type]
    )
