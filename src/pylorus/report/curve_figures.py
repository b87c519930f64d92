"""Curves over epochs: accuracy and loss of all models in one plot, and each class's indices of one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pylorus.report.basis import trained_on
from pylorus.report.drawing import (
    INK,
    REPLICATES,
    Drawing,
    legend_above,
    line_style,
    new_figure,
    replicate_style,
    style,
)
from pylorus.report.run_facts import validation_images
from pylorus.report.saved_run import SavedRun, SavedStage

STEEP = 30.0
"""How many times its least value a loss may reach before it is drawn on a logarithmic scale."""

PANELS = (
    ("train/accuracy", "training accuracy, %"),
    ("train/loss", "training loss"),
    ("val/accuracy", "validation accuracy, %"),
    ("val/loss", "validation loss"),
)
CHOSEN = "epoch chosen"
"""What the ring in a legend stands for."""

INDICES = (("precision", "precision, %"), ("sensitivity", "sensitivity, %"), ("f1", "F1, %"))


@dataclass(frozen=True, eq=False)
class Curves:
    """The curves of one stage of one run."""

    run: SavedRun
    stage: SavedStage
    table: pd.DataFrame

    @property
    def epochs(self) -> NDArray[np.int64]:
        """Epochs of the stage, from 1."""
        steps: NDArray[np.int64] = np.asarray(self.table["step"], dtype=np.int64)
        epochs: NDArray[np.int64] = steps - steps[0] + 1
        return epochs

    @property
    def best(self) -> int | None:
        """Place of the epoch that validation named the best, of equals the first; None where nothing names one."""
        monitor = self.stage.monitor
        name = f"val/{monitor}" + ("" if monitor in ("loss", "accuracy") else "/average")
        values = self.of(name)
        if np.isnan(values).all():
            return None
        return int(np.nanargmin(values) if monitor == "loss" else np.nanargmax(values))

    def of(self, name: str) -> NDArray[np.float64]:
        """A metric over the epochs, nan where it is undefined or was not written down."""
        column = f"{self.stage.name}/{name}"
        if column not in self.table:
            return np.full(len(self.table), np.nan)
        return self.table[column].to_numpy(dtype=np.float64)


def curves_of(runs: Sequence[SavedRun]) -> list[Curves]:
    """The curves that there are, run by run."""
    return [
        Curves(run, stage, stage.curves)
        for run in runs
        for stage in run.stages
        if stage.curves is not None and len(stage.curves)
    ]


def training_figure(curves: Sequence[Curves], *, labels: Mapping[SavedRun, str] | None = None) -> Drawing:
    """Accuracy and loss of all models over the epochs of one stage, on training and on validation images.

    Args:
        curves: At least one, all of the same stage.
        labels: What the legend calls each run; runs of one label are replicates, drawn thin around their mean. None:
            each run is its own.
    """
    stage = curves[0].stage.name
    names = {each.run: each.run.label for each in curves} | dict(labels or {})
    groups: dict[str, list[Curves]] = {}
    for each in curves:
        groups.setdefault(names[each.run], []).append(each)
    validated = validation_images([each.run for each in curves])
    with style():
        legend = [*groups, CHOSEN]
        figure = new_figure(4.4, legend=legend)
        panels = figure.subplots(2, 2)
        handles = []
        for number, group in enumerate(groups.values()):
            for axes, (name, _) in zip(panels.flat, PANELS, strict=True):
                line = _draw(axes, group, name, number)
            handles.append(line)
        for axes, (name, title) in zip(panels.flat, PANELS, strict=True):
            _finish(axes, title, loss=name.endswith("loss"), values=np.concatenate([each.of(name) for each in curves]))
        legend_above(figure, [*handles, _best_handle()], legend)
    best = [f"{label} {_percent_at(group, 'val/accuracy')}" for label, group in groups.items()]
    return Drawing(
        key=f"curves-{stage}",
        title=f"Stage {stage}: accuracy and loss over its epochs, on training images and on {validated}",
        basis=trained_on(list(dict.fromkeys(each.run for each in curves))),
        alt=f"Four line plots over epochs. Validation accuracy at the chosen epoch: {', '.join(best)}.",
        figure=figure,
        notes=(_ring_note(curves), *_precision_notes(curves), *_replicate_notes(list(groups.values()))),
    )


def _precision_notes(curves: Sequence[Curves]) -> tuple[str, ...]:
    """Why a curve may differ from the tables, of runs that did not train in 32 bits."""
    precisions = {str(each.run.environment.get("precision", "32")) for each in curves} - {"32"}
    if not precisions:
        return ()
    return (
        f"Curves are measured during training, in {' and '.join(sorted(precisions))}; tables are measured in 32 bits, "
        "as the shipped model computes, and may differ from them.",
    )


def _ring_note(curves: Sequence[Curves]) -> str:
    """What the ring marks; an unfinished stage has not predicted test images yet."""
    tested = [each.stage.test is not None for each in curves]
    whose = (
        "its weights gave the test predictions" if all(tested) else "the best one so far where a stage is unfinished"
    )
    return f"A ring marks the best epoch on {validation_images([each.run for each in curves])}; {whose}."


def index_figure(curves: Sequence[Curves], names: Sequence[str], *, label: str, stem: str) -> Drawing:
    """Precision, sensitivity and F1 of each class on the validation images, over the epochs of one stage.

    Args:
        curves: Of one stage of one run, or of the replicates of a configuration.
        names: Short names of the classes.
        label: What the configuration is called.
        stem: The same for the name of the file.
    """
    stage = curves[0].stage.name
    with style():
        figure = new_figure(2.3, legend=[*names, CHOSEN])
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (index, title) in zip(panels, INDICES, strict=True):
            handles = [_draw(axes, curves, f"val/{index}/{name}", place) for place, name in enumerate(names)]
            _finish(axes, title, loss=False, values=np.array([0.0, 100.0]))
            axes.set_ylim(-3, 103)
        legend_above(figure, [*handles, _best_handle()], [*names, CHOSEN])
    last = ", ".join(f"{name} {_percent_at(curves, f'val/f1/{name}')}" for name in names)
    return Drawing(
        key=f"indices-{stem}-{stage}",
        title=f"{label}, stage {stage}: precision, sensitivity and F1 of each class over epochs",
        basis=trained_on([each.run for each in curves]),
        alt=f"Three line plots over epochs, a line a class. F1 at the chosen epoch: {last}.",
        figure=figure,
        notes=(
            f"On {validation_images([each.run for each in curves])}. A gap in a line: undefined, since no image was "
            "predicted as that class.",
            *_precision_notes(curves),
            *_replicate_notes([curves]),
        ),
    )


def _draw(axes: Axes, curves: Sequence[Curves], name: str, number: int) -> Line2D:
    """One curve, shares in %; of replicates their mean, and each thin; a ring at the epoch chosen, if of validation."""
    scale = 1.0 if name.endswith("loss") else 100.0
    look = line_style(number)
    several = len(curves) > 1
    for each in curves if several else ():
        axes.plot(each.epochs, scale * each.of(name), **replicate_style(number))
    length = min(len(each.table) for each in curves)
    mean = scale * np.mean([each.of(name)[:length] for each in curves], axis=0)
    (line,) = axes.plot(curves[0].epochs[:length], mean, markevery=max(1, length // 10), **look)
    for each in curves if name.startswith("val/") else ():
        best, values = each.best, scale * each.of(name)
        if best is not None and np.isfinite(values[best]):
            axes.plot(
                each.epochs[best],
                values[best],
                marker="o",
                markersize=6 if several else 9,
                markerfacecolor="none",
                markeredgecolor=look["color"],
                markeredgewidth=0.7 if several else 1.0,
            )
    return line


def _replicate_notes(groups: Sequence[Sequence[Curves]]) -> tuple[str, ...]:
    """What thin lines are, where there are any, and how far a mean goes."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return ()
    short = any(len({len(each.table) for each in group}) > 1 for group in several)
    return (REPLICATES + (" It ends where the first of them ends." if short else ""),)


def _best_handle() -> Artist:
    return Line2D([], [], marker="o", markersize=8, linestyle="none", markerfacecolor="none", markeredgecolor=INK)


def _finish(axes: Axes, title: str, *, loss: bool, values: NDArray[np.float64]) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    if loss and len(positive) and positive.max() > STEEP * positive.min():
        axes.set_yscale("log")
        title += " (log scale)"
    axes.set_title(title)
    axes.set_xlabel("epoch of the stage")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _percent_at(curves: Sequence[Curves], name: str) -> str:
    """A share at the chosen epoch; of replicates the mean."""
    values = [np.nan if each.best is None else each.of(name)[each.best] for each in curves]
    mean = float(np.mean(values))
    return "undefined" if np.isnan(mean) else f"{100 * mean:.1f} %" + (" (mean)" if len(values) > 1 else "")
