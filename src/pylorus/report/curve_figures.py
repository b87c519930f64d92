"""Figures with curves: metrics over epochs, risk against coverage, and decision curves of net benefit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from pylorus.core.formatting import format_percent, format_percent_with_unit, join_names
from pylorus.evaluation.confusion import get_monitor_column
from pylorus.evaluation.decisions import NetBenefit, RiskCoverage, net_benefit, risk_coverage
from pylorus.report.candidate import Candidate
from pylorus.report.captions import (
    format_averaging,
    format_test_basis,
    format_training_basis,
    format_validation_images,
    make_file_stems,
)
from pylorus.report.evidence import Evidence
from pylorus.report.figure_style import (
    FAINT,
    INK,
    REPLICATES_NOTE,
    Drawing,
    add_legend_above,
    create_figure,
    get_line_style,
    get_replicate_style,
    report_style,
)
from pylorus.report.mistakes import Item, Section, Sentences
from pylorus.report.results import CONFIDENCE, Result, format_stage_label
from pylorus.runs.reading import SavedRun, SavedStage, get_metric_labels

LOG_SCALE_RATIO = 30.0
"""A loss whose maximum exceeds its minimum by more than this factor is plotted on a logarithmic scale."""

PANELS = (
    ("train/accuracy", "training accuracy, %"),
    ("train/loss", "training loss"),
    ("val/accuracy", "validation accuracy, %"),
    ("val/loss", "validation loss"),
)
SELECTED_EPOCH = "selected epoch"
"""Legend entry of the ring."""

COUNT_WORDS = {3: "Three", 4: "Four", 5: "Five"}

BANDS_NOTE = "Bands: pointwise 95 % confidence intervals that account for clustering of images within groups."

MAX_BANDS = 3
"""Maximum number of models whose intervals are drawn: more bands cover each other."""

NO_BANDS_NOTE = f"No intervals are drawn, because those of more than {MAX_BANDS} models cover each other."

SQUARE_WIDTH = 4.6
"""Width of a single-panel figure in inches."""


@dataclass(frozen=True, eq=False)
class StageCurves:
    """The curves of one stage of one run."""

    run: SavedRun
    stage: SavedStage
    table: pd.DataFrame

    @property
    def epochs(self) -> NDArray[np.int64]:
        """Epochs of the stage, starting at 1."""
        steps: NDArray[np.int64] = np.asarray(self.table["step"], dtype=np.int64)
        epochs: NDArray[np.int64] = steps - steps[0] + 1
        return epochs

    @property
    def best(self) -> int | None:
        """Index of the epoch whose weights the stage chose; while it is trained, that of the best one so far."""
        if self.stage.training is not None and self.stage.training.best_epoch <= len(self.table):
            return self.stage.training.best_epoch - 1
        monitor = self.stage.monitor
        values = self.get_metric(get_monitor_column(monitor))
        if np.isnan(values).all():
            return None
        return int(np.nanargmin(values) if monitor == "loss" else np.nanargmax(values))

    def get_metric(self, name: str) -> NDArray[np.float64]:
        """Return a metric over the epochs, NaN where it is undefined or was not recorded."""
        column = f"{self.stage.name}/{name}"
        if column not in self.table:
            return np.full(len(self.table), np.nan)
        return self.table[column].to_numpy(dtype=np.float64)


def collect_curves(runs: Sequence[SavedRun]) -> list[StageCurves]:
    """Return the available curves, run by run."""
    return [
        StageCurves(run, stage, stage.curves)
        for run in runs
        for stage in run.stages
        if stage.curves is not None and len(stage.curves)
    ]


def build_training_section(evidence: Evidence) -> Section:
    """Build the section of training curves: all models in one plot per stage, then the classes of each model."""
    curves = collect_curves(evidence.runs)
    labels = {run: label for label, runs in evidence.replicates.items() for run in runs}
    stages = dict.fromkeys(each.stage.name for each in curves)
    items: list[Item] = [
        plot_training_curves([each for each in curves if each.stage.name == stage], labels=labels) for stage in stages
    ]
    stems = make_file_stems(list(evidence.replicates))
    for stem, (label, runs) in zip(stems, evidence.replicates.items(), strict=True):
        for stage in stages:
            own = [each for each in curves if each.stage.name == stage and each.run in runs]
            if own:
                items.append(plot_class_metric_curves(own, own[0].run.short_names, label=label, stem=stem))
    without = [
        format_stage_label(run.label, stage.name)
        for run in evidence.runs
        for stage in run.stages
        if stage.curves is None
    ]
    if without:
        items.append(Sentences((f"No training curves, because metrics.csv is missing: {'; '.join(without)}.",)))
    return Section("training", "Training", tuple(items))


def plot_training_curves(curves: Sequence[StageCurves], *, labels: Mapping[SavedRun, str] | None = None) -> Drawing:
    """Plot accuracy and loss of all models over the epochs of one stage, on training and validation images.

    Args:
        curves: At least one, all of the same stage.
        labels: Legend label of each run; runs with the same label are replicates, plotted as thin lines around their
            mean. None: each run has its own label.
    """
    stage = curves[0].stage.name
    names = {each.run: each.run.label for each in curves} | dict(labels or {})
    groups: dict[str, list[StageCurves]] = {}
    for each in curves:
        groups.setdefault(names[each.run], []).append(each)
    validation_name = format_validation_images([each.run for each in curves])
    with report_style():
        legend = [*groups, SELECTED_EPOCH]
        figure = create_figure(4.4, legend=legend)
        panels = figure.subplots(2, 2)
        handles = []
        for number, group in enumerate(groups.values()):
            for axes, (name, _) in zip(panels.flat, PANELS, strict=True):
                line = _draw_metric_curve(axes, group, name, number)
            handles.append(line)
        for axes, (name, title) in zip(panels.flat, PANELS, strict=True):
            _format_epoch_axes(
                axes,
                title,
                loss=name.endswith("loss"),
                values=np.concatenate([each.get_metric(name) for each in curves]),
            )
        add_legend_above(figure, [*handles, _create_ring_handle()], legend)
    best = [f"{label} {_format_best_percentage(group, 'val/accuracy')}" for label, group in groups.items()]
    return Drawing(
        key=f"curves-{stage}",
        title=f"Stage {stage}: accuracy and loss over epochs, on training images and {validation_name}",
        basis=format_training_basis(list(dict.fromkeys(each.run for each in curves))),
        alt=f"Four line plots over epochs. Validation accuracy at the selected epoch: {', '.join(best)}.",
        figure=figure,
        notes=(
            _format_ring_note(curves),
            *_format_averaging_notes(curves),
            *_format_precision_notes(curves),
            *_format_curve_replicate_notes(list(groups.values())),
        ),
    )


def _format_precision_notes(curves: Sequence[StageCurves]) -> tuple[str, ...]:
    """Explain why curves may differ from the tables, for runs that did not train in 32-bit precision."""
    precisions = {str(each.run.environment.get("precision", "32")) for each in curves} - {"32"}
    if not precisions:
        return ()
    return (
        f"Curves were measured during training, in {' and '.join(sorted(precisions))} precision; tables were measured "
        "in 32-bit precision, as used by the shipped model, and may differ.",
    )


def _format_averaging_notes(curves: Sequence[StageCurves]) -> tuple[str, ...]:
    """State which curves are of averaged weights, for stages that have some."""
    averages = list(dict.fromkeys(filter(None, (format_averaging(each.run, each.stage) for each in curves))))
    if not averages:
        return ()
    which = "" if all(format_averaging(each.run, each.stage) for each in curves) else " where weights are averaged"
    return (
        f"Validation curves{which} are those of the average once it has begun, at the ring the "
        f"{join_names(averages, last='or')}; "
        "training curves are those of the weights in each step.",
    )


def _format_ring_note(curves: Sequence[StageCurves]) -> str:
    """Explain the ring; an unfinished stage has not predicted test images yet."""
    tested = [each.stage.test is not None for each in curves]
    explanation = (
        "its weights were used for the test predictions" if all(tested) else "in an unfinished stage, the best so far"
    )
    return f"A ring marks the best epoch on {format_validation_images([each.run for each in curves])}; {explanation}."


def plot_class_metric_curves(curves: Sequence[StageCurves], names: Sequence[str], *, label: str, stem: str) -> Drawing:
    """Plot the indices of each class that the runs show on the validation images, over the epochs of one stage.

    Args:
        curves: Curves of one stage of one run, or of the replicates of a configuration.
        names: Short names of the classes.
        label: Label of the configuration.
        stem: The label as a stem for file names.
    """
    stage = curves[0].stage.name
    metrics = {name: label for each in curves for name, label in get_metric_labels(each.run).items()}
    with report_style():
        figure = create_figure(2.3, legend=[*names, SELECTED_EPOCH])
        panels = figure.subplots(1, len(metrics), sharey=True)
        for axes, (metric, metric_label) in zip(panels, metrics.items(), strict=True):
            handles = [
                _draw_metric_curve(axes, curves, f"val/{metric}/{name}", number) for number, name in enumerate(names)
            ]
            _format_epoch_axes(axes, f"{metric_label}, %", loss=False, values=np.array([0.0, 100.0]))
            axes.set_ylim(-3, 103)
        add_legend_above(figure, [*handles, _create_ring_handle()], [*names, SELECTED_EPOCH])
    panel_count = COUNT_WORDS.get(len(metrics), str(len(metrics)))
    scores = ", ".join(f"{name} {_format_best_percentage(curves, f'val/f1/{name}')}" for name in names)
    return Drawing(
        key=f"indices-{stem}-{stage}",
        title=f"{label}, stage {stage}: {join_names(list(metrics.values()))} of each class over epochs",
        basis=format_training_basis([each.run for each in curves]),
        alt=f"{panel_count} line plots over epochs, one line per class. F1 at the selected epoch: {scores}.",
        figure=figure,
        notes=(
            f"On {format_validation_images([each.run for each in curves])}. Gaps in a line: undefined, because no "
            f"image was predicted as that class.",
            *_format_precision_notes(curves),
            *_format_curve_replicate_notes([curves]),
        ),
    )


def _draw_metric_curve(axes: Axes, curves: Sequence[StageCurves], name: str, number: int) -> Line2D:
    """Plot one curve (proportions in %), of replicates the mean and each as a thin line; ring the selected epoch."""
    scale = 1.0 if name.endswith("loss") else 100.0
    line_options = get_line_style(number)
    has_replicates = len(curves) > 1
    for each in curves if has_replicates else ():
        axes.plot(each.epochs, scale * each.get_metric(name), **get_replicate_style(number))
    length = min(len(each.table) for each in curves)
    mean = scale * np.mean([each.get_metric(name)[:length] for each in curves], axis=0)
    (line,) = axes.plot(curves[0].epochs[:length], mean, markevery=max(1, length // 10), **line_options)
    for each in curves if name.startswith("val/") else ():
        best, values = each.best, scale * each.get_metric(name)
        if best is not None and np.isfinite(values[best]):
            axes.plot(
                each.epochs[best],
                values[best],
                marker="o",
                markersize=6 if has_replicates else 9,
                markerfacecolor="none",
                markeredgecolor=line_options["color"],
                markeredgewidth=0.7 if has_replicates else 1.0,
            )
    return line


def _format_curve_replicate_notes(groups: Sequence[Sequence[StageCurves]]) -> tuple[str, ...]:
    """Explain thin lines, if there are any, and where their mean ends."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return ()
    short = any(len({len(each.table) for each in group}) > 1 for group in several)
    return (REPLICATES_NOTE + (" It ends where the shortest of them ends." if short else ""),)


def _create_ring_handle() -> Artist:
    return Line2D([], [], marker="o", markersize=8, linestyle="none", markerfacecolor="none", markeredgecolor=INK)


def _format_epoch_axes(axes: Axes, title: str, *, loss: bool, values: NDArray[np.float64]) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    if loss and len(positive) and positive.max() > LOG_SCALE_RATIO * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        title += " (log scale)"
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_title(title)
    axes.set_xlabel("epoch of the stage")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _format_best_percentage(curves: Sequence[StageCurves], name: str) -> str:
    """Format a proportion at the selected epoch, or its mean over replicates."""
    values = [np.nan if each.best is None else each.get_metric(name)[each.best] for each in curves]
    mean = float(np.mean(values))
    return format_percent_with_unit(mean) + (" (mean)" if len(values) > 1 and not np.isnan(mean) else "")


def plot_risk_coverage(candidates: Sequence[Candidate]) -> Drawing:
    """Plot the error rate among the images that are not referred, most confident first, one colour per candidate.

    Args:
        candidates: At least one.
    """
    labels = [each.label for each in candidates]
    with report_style():
        figure = create_figure(3.2, width=SQUARE_WIDTH, legend=labels)
        axes = figure.subplots()
        handles, half_texts = [], []
        for number, candidate in enumerate(candidates):
            curves = [_compute_risk_coverage(result) for result in candidate.results]
            if len(curves) == 1:
                coverage, risk = curves[0].coverage, curves[0].risk
            else:
                for curve in curves:
                    axes.plot(100 * curve.coverage, 100 * curve.risk, **get_replicate_style(number))
                coverage = np.linspace(max(curve.coverage[0] for curve in curves), 1, 100)
                risk = np.mean([np.interp(coverage, curve.coverage, curve.risk) for curve in curves], axis=0)
            marker_step = max(1, len(coverage) // 8)
            handles += axes.plot(100 * coverage, 100 * risk, markevery=marker_step, **get_line_style(number))
            half_texts.append(
                f"{candidate.label}: {_format_risk_at(coverage, risk, 0.5)} errors in the most confident half"
            )
        axes.set_xlabel("coverage (images not referred), %")
        axes.set_ylabel("error rate among these images, %")
        axes.set_xlim(0, 102)
        axes.set_ylim(bottom=-1)
        add_legend_above(figure, handles, labels)
    return Drawing(
        key="risk-coverage",
        title="Risk-coverage curves on test images: remaining errors if the least confident predictions are referred",
        basis=format_test_basis([result for each in candidates for result in each.results]),
        alt=f"Error rate against proportion of images not referred. {'; '.join(half_texts)}.",
        figure=figure,
        notes=(
            "At 100 % coverage no image is referred, and the error rate is 100 % minus the accuracy.",
            *format_replicate_notes(candidates),
        ),
    )


def plot_net_benefit(candidates: Sequence[Candidate], class_name: str) -> Drawing:
    """Plot the decision curve of one class's calibrated probability, one colour per candidate.

    Args:
        candidates: At least one; each result has a calibration and knows the class.
        class_name: Short name of the class.
    """
    results = [result for each in candidates for result in each.results]
    with report_style():
        labels = [*(each.label for each in candidates), "act on all images", "act on no image"]
        figure = create_figure(3.2, width=SQUARE_WIDTH, legend=labels)
        axes = figure.subplots()
        handles, all_curves = [], []
        for number, candidate in enumerate(candidates):
            curves = [_compute_net_benefit(result, class_name) for result in candidate.results]
            all_curves += curves
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(100 * curve.threshold, curve.model, **get_replicate_style(number))
            mean = np.mean([curve.model for curve in curves], axis=0)
            marker_slice = slice(number * 3, None, 16)
            line_options = get_line_style(number)
            handles += axes.plot(100 * curves[0].threshold, mean, markevery=marker_slice, **line_options)
            if len(curves) == 1 and len(candidates) <= MAX_BANDS:
                steps, ends = 100 * curves[0].threshold, (curves[0].low, curves[0].high)
                axes.fill_between(steps, *ends, color=line_options["color"], alpha=0.12, linewidth=0)
        has_bands = len(candidates) <= MAX_BANDS and any(len(candidate.results) == 1 for candidate in candidates)
        prevalence = float(np.mean([curve.prevalence for curve in all_curves]))
        treat_all = np.mean([curve.treat_all for curve in all_curves], axis=0)
        top = max(0.02, prevalence)
        handles += axes.plot(100 * all_curves[0].threshold, treat_all, color=FAINT, linestyle=":")
        handles.append(axes.axhline(0, color=INK, linewidth=0.8))
        axes.set_ylim(-0.25 * top, 1.12 * top)
        axes.set_xlabel("threshold probability, %")
        axes.set_ylabel("net benefit, true positives per image")
        add_legend_above(figure, handles, labels)
    return Drawing(
        key="net-benefit",
        title=f"Decision curves on test images: net benefit of acting on the probability of {class_name}",
        basis=format_test_basis(results),
        alt="Net benefit against threshold probability, with acting on all images and on none for reference. "
        f"Proportion of {class_name} among the test images: {format_percent(prevalence, digits=0)} %.",
        figure=figure,
        notes=(
            f"Net benefit depends on the proportion of {class_name}, here "
            f"{format_percent(prevalence, digits=0)} %; it may differ in "
            "clinical practice.",
            f"Probabilities were calibrated on {format_validation_images([each.run for each in results])}.",
            *((BANDS_NOTE,) if has_bands else (NO_BANDS_NOTE,) if len(candidates) > MAX_BANDS else ()),
            *format_replicate_notes(candidates),
        ),
    )


def format_replicate_notes(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Explain thin lines, if there are any."""
    return (REPLICATES_NOTE,) if any(len(each.results) > 1 for each in candidates) else ()


def _compute_risk_coverage(result: Result) -> RiskCoverage:
    predictions = result.test.predictions
    return risk_coverage(predictions.correct, predictions.probabilities.max(axis=1))


def _compute_net_benefit(result: Result, class_name: str) -> NetBenefit:
    assert result.calibration is not None
    predictions = result.calibration.test
    column = predictions.class_names.index(class_name)
    probability = np.clip(predictions.probabilities[:, column], 0, 1)
    return net_benefit(predictions.true == column, probability, result.test.clusters, confidence=CONFIDENCE)


def _format_risk_at(coverage: np.ndarray, risk: np.ndarray, proportion: float) -> str:
    """Format the risk at the lowest coverage that reaches a proportion."""
    return format_percent_with_unit(risk[int(np.argmax(coverage >= proportion))])
