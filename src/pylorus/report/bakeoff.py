"""The page of a bake-off: networks by validation, their accuracy on the test images, and what they cost.

`pylorus bakeoff` computes; this module compares the winner with the other networks and writes tables, figure and page.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pylorus.core.formatting import (
    DASH,
    format_bytes,
    format_count,
    format_estimate,
    format_p_value,
    format_percent,
    join_names,
)
from pylorus.evaluation.comparison import holm, mcnemar, paired_share_difference
from pylorus.evaluation.intervals import Estimate
from pylorus.report.figure_style import Drawing, create_figure, get_line_style, report_style
from pylorus.report.headline import KeyFigure
from pylorus.report.mistakes import FileOnly, Listing, Section, Sentences
from pylorus.report.page import write_page
from pylorus.report.results import LEVEL
from pylorus.report.summary import Summary
from pylorus.report.table import (
    Cell,
    Column,
    Number,
    Row,
    Table,
    convert_to_p_value_cell,
    convert_to_percent_cell,
    create_rows,
    create_text_columns,
)
from pylorus.runs.predictions import SavedPredictions

CLEARLY_FASTER = 0.8
"""Time of the forward pass, as a fraction of the winner's, below which a network is said to be faster."""


@dataclass(frozen=True, eq=False)
class NetworkResult:
    """A network with the head that the validation images chose.

    Attributes:
        label: What texts call it.
        weights_name: timm's name of the network, and where its weights are from.
        image_size: Side of the input in pixels.
        licence: Licence of its weights; None if timm names none, or they are random.
        val: Predictions of the head for the validation images.
        test: Predictions of the head for the test images.
        record: What was measured, as plain values: `parameters`, `weight_bytes`, `activation_bytes`, `forward_seconds`
            for an image, `seconds`, `chosen`, `val_accuracy` (mean over the seeds), `val_accuracy_by_seed`, `val_loss`
            and all `heads`.
    """

    label: str
    weights_name: str
    image_size: int
    licence: str | None
    val: SavedPredictions
    test: SavedPredictions
    record: dict[str, Any]

    @property
    def memory_bytes(self) -> int:
        """Memory to classify one image: weights and intermediate results."""
        return int(self.record["weight_bytes"] + self.record["activation_bytes"])

    @property
    def milliseconds(self) -> float:
        """Time of the forward pass for an image."""
        return 1000 * float(self.record["forward_seconds"])

    @property
    def head_text(self) -> str:
        """The settings of the chosen head."""
        chosen = self.record["chosen"]
        weighting = ", balanced" if chosen["class_weights"] == "balanced" else ""
        adjustment = ", logit-adjusted" if chosen["loss"] == "logit_adjusted" else ""
        return f"lr {chosen['lr']:g}, decay {chosen['weight_decay']:g}{weighting}{adjustment}"

    def convert_to_plain(self) -> dict[str, Any]:
        """Return the result as plain values, without the single heads."""
        accuracy = self.test.accuracy
        plain = {"network": self.label, "weights": self.weights_name, "image_size": self.image_size}
        rest = {name: value for name, value in self.record.items() if name != "heads"}
        interval = {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high}
        return {**plain, "licence": self.licence, "test_accuracy": interval, **rest}


def rank_networks(networks: Sequence[NetworkResult]) -> list[NetworkResult]:
    """Order networks by mean validation accuracy over the seeds, the highest first; equal ones by validation loss."""
    return sorted(networks, key=lambda each: (-each.record["val_accuracy"], each.record["val_loss"]))


@dataclass(frozen=True, eq=False)
class Contest:
    """The winner against another network on the test images.

    Attributes:
        difference: Accuracy of the winner minus that of the other, paired, with patients kept together.
        p_value: McNemar's exact test with whole patients, two-sided.
        corrected: The same after Holm's correction over all other networks.
    """

    difference: Estimate
    p_value: float
    corrected: float


@dataclass(frozen=True, eq=False)
class BakeoffResult:
    """Result of a bake-off.

    Attributes:
        networks: The networks, in the order in which they were named.
        classes: Names of the classes.
        is_grouped: Whether patients are known.
        command: The command that fine-tunes the winner.
    """

    networks: tuple[NetworkResult, ...]
    classes: tuple[str, ...]
    is_grouped: bool
    command: str

    @cached_property
    def ranked(self) -> list[NetworkResult]:
        """The networks by validation, the winner first."""
        return rank_networks(self.networks)

    @property
    def winner(self) -> NetworkResult:
        """The network with the highest mean validation accuracy."""
        return self.ranked[0]

    @cached_property
    def contests(self) -> list[Contest]:
        """The winner against each other network, in the order of `ranked`."""
        first, others = self.winner.test, [each.test for each in self.ranked[1:]]
        if not others:
            return []
        p_values = [mcnemar(first.predictions, each.predictions).p_value for each in others]
        corrected = holm(np.array(p_values)).tolist()
        differences = [
            paired_share_difference(first.predictions.correct, each.predictions.correct, first.clusters)
            for each in others
        ]
        return [Contest(*values) for values in zip(differences, p_values, corrected, strict=True)]

    @property
    def basis(self) -> str:
        """What the table's test results are based on."""
        test = self.winner.test
        patients = f" of {format_count(test.groups, 'patient')}" if self.is_grouped else ", each its own patient"
        return (
            f"One head for each network, chosen on {format_count(self.winner.val.images, 'validation image')}; "
            f"{format_count(test.images, 'test image')}{patients}."
        )

    @property
    def findings(self) -> list[str]:
        """The result in sentences."""
        winner, record = self.winner, self.winner.record
        accuracy = winner.test.accuracy
        estimate = format_estimate(accuracy.value, accuracy.low, accuracy.high, label="95 % CI ")
        seeds = len(record["val_accuracy_by_seed"])
        over = f", mean over {seeds} seeds" if seeds > 1 else ""
        sentences = [
            f"{winner.label} has the highest validation accuracy: {format_percent(record['val_accuracy'])} %{over}. On "
            f"the test images its head is right in {estimate}."
        ]
        better, unclear = (
            [
                other.label
                for other, contest in zip(self.ranked[1:], self.contests, strict=True)
                if (contest.corrected < LEVEL) == is_significant
            ]
            for is_significant in (True, False)
        )
        for other, contest in zip(self.ranked[1:], self.contests, strict=True):
            if contest.corrected < LEVEL and contest.difference.value < 0:
                sentences.append(
                    f"{other.label} is better on the test images ({format_p_value(contest.corrected)}, corrected): the "
                    "validation images chose otherwise. Take a larger validation set before you decide."
                )
                better.remove(other.label)
        if better:
            sentences.append(f"It is better than {join_names(better)} on the test images (p < {LEVEL:g}, corrected).")
        if unclear:
            sentences.append(f"These test images show no difference to {join_names(unclear)}.")
        cheaper = [
            each for each in self.ranked[1:] if each.label in unclear and each.milliseconds < winner.milliseconds
        ]
        if cheaper:
            fastest = min(cheaper, key=lambda each: each.milliseconds)
            sentences.append(
                f"Of these, {fastest.label} is the fastest: {format_milliseconds(fastest)} an image in place of "
                f"{format_milliseconds(winner)}."
            )
        if winner.licence is not None:
            sentences.append(f"Licence of the winner's weights, as timm states it: {winner.licence}.")
        return sentences

    @property
    def warnings(self) -> tuple[str, ...]:
        """What limits the result."""
        sentences = []
        random = [each.label for each in self.networks if each.weights_name.endswith("random weights")]
        if random:
            sentences.append(
                f"RANDOM WEIGHTS: {join_names(random)}. Features of an untrained network say nothing of the network."
            )
        if not self.is_grouped:
            sentences.append(
                "No patients are known (--group): images of one patient may be in training and test, and intervals may "
                "be too narrow."
            )
        return tuple(sentences)


def format_milliseconds(network: NetworkResult) -> str:
    """Return the time of the forward pass for an image, with two or three digits."""
    value = network.milliseconds
    return f"{value:.2f} ms" if value < 1 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


# --- tables and figure ---


def build_network_table(result: BakeoffResult) -> Table:
    """Build the table of the networks: accuracy against cost."""
    rows: list[Row] = []
    contests = [None, *result.contests]
    for each, contest in zip(result.ranked, contests, strict=True):
        cells: list[Cell] = [
            each.label,
            each.image_size,
            Number(100 * each.record["val_accuracy"], 1),
            convert_to_percent_cell(each.test.accuracy),
            "" if contest is None else convert_to_percent_cell(contest.difference),
            "" if contest is None else convert_to_p_value_cell(contest.corrected),
            Number(each.milliseconds, 2 if each.milliseconds < 1 else 1),
            Number(each.record["parameters"] / 1e6, 2 if each.record["parameters"] < 1e6 else 1),
            Number(each.memory_bytes / 2**20, 1),
            each.licence or DASH,
        ]
        rows.append(Row(tuple(cells), strong=contest is None))
    return Table(
        key="networks",
        title="Networks by validation accuracy, and what they cost",
        basis=result.basis,
        columns=(
            Column("network", text=True),
            Column("input", unit="px"),
            Column("validation", "accuracy", "%"),
            Column("test", "accuracy", "%"),
            Column("better by", "winner on test", "points"),
            Column("p", "winner on test"),
            Column("an image", unit="ms"),
            Column("parameters", unit="million"),
            Column("memory", unit="MiB"),
            Column("licence", text=True),
        ),
        rows=tuple(rows),
        notes=(
            "Validation: mean over the seeds. It chose the head among many, so it is too high.",
            "Better by: paired, image by image, with patients kept together. p: McNemar's exact test with whole "
            f"patients, corrected for {format_count(max(1, len(result.networks) - 1), 'comparison')} (Holm).",
            "An image: the forward pass, without decoding, in a batch of 8 on the machine of the bake-off. Memory: "
            "weights and intermediate results for one image, in 32 bits.",
            f"Licence: of the weights, as timm states it; {DASH}: none is stated, or the weights are random.",
        ),
    )


def build_choice_table(result: BakeoffResult) -> Table:
    """Build the table of the chosen heads."""
    rows: list[list[Cell]] = []
    for each in result.ranked:
        accuracies = [format_percent(accuracy) for accuracy in each.record["val_accuracy_by_seed"]]
        chosen, seconds = each.record["chosen"], each.record["seconds"]
        rows.append(
            [
                each.label,
                each.weights_name,
                f"{chosen['lr']:g}",
                f"{chosen['weight_decay']:g}",
                str(chosen["class_weights"]),
                str(chosen["loss"]),
                int(chosen["seed"]),
                int(chosen["epoch"]),
                ", ".join(accuracies),
                len(each.record["heads"]),
                Number(seconds["features"], 1),
                Number(seconds["heads"], 1),
            ]
        )
    return Table(
        key="heads",
        title="The head of each network",
        basis=result.basis,
        columns=(
            *create_text_columns("network", "weights", "learning rate", "weight decay", "class weights", "trained by"),
            Column("seed"),
            Column("epoch"),
            Column("validation accuracy by seed", unit="%", text=True),
            Column("heads trained"),
            Column("features", "time", "s"),
            Column("heads", "time", "s"),
        ),
        rows=create_rows(rows),
        notes=("Time of features: of this computation; a later one reads them from the cache.",),
    )


def build_head_table(result: BakeoffResult) -> Table:
    """Build the table of all heads, which is written to a file only."""
    rows: list[list[Cell]] = [
        [
            each.label,
            f"{head['lr']:g}",
            f"{head['weight_decay']:g}",
            head["class_weights"],
            head["loss"],
            head["seed"],
            head["best_epoch"],
            Number(100 * head["val_accuracy"], 2),
            Number(float("nan") if head["val_loss"] is None else head["val_loss"], 4, reason="the head diverged"),
        ]
        for each in result.ranked
        for head in each.record["heads"]
    ]
    return Table(
        key="all-heads",
        title="All heads on the validation images",
        basis=f"{format_count(result.winner.val.images, 'validation image')}.",
        columns=(
            *create_text_columns("network", "learning rate", "weight decay", "class weights", "trained by"),
            Column("seed"),
            Column("epoch"),
            Column("accuracy", "validation", "%"),
            Column("loss", "validation"),
        ),
        rows=create_rows(rows),
    )


def plot_accuracy_against_cost(result: BakeoffResult) -> Drawing:
    """Plot the test accuracy with its interval against the time of the forward pass."""
    with report_style():
        figure = create_figure(3.4)
        axes = figure.subplots()
        for number, each in enumerate(result.ranked):
            accuracy, style = each.test.accuracy, get_line_style(number)
            value = 100 * accuracy.value
            # Rounding may put an end inside the interval by a fraction of the last digit.
            reach = [[max(0.0, value - 100 * accuracy.low)], [max(0.0, 100 * accuracy.high - value)]]
            axes.errorbar(
                [each.milliseconds],
                [value],
                yerr=reach,
                fmt=style["marker"],
                color=style["color"],
                markersize=7 if number == 0 else 4.5,
                capsize=2,
                linewidth=1,
                label=f"{number + 1}  {each.label}",
            )
            position = (each.milliseconds, value)
            axes.annotate(str(number + 1), position, xytext=(5, 3), textcoords="offset points", fontsize=7)
        times = [each.milliseconds for each in result.networks]
        is_wide = max(times) >= 10 * min(times)  # a logarithmic axis within one power of ten has hardly a number on it
        axes.margins(x=0.1)
        # Names beside the points would cover each other.
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=7, title="by validation accuracy"
        )
        axes.set_xlabel(f"forward pass of an image (ms{', logarithmic' if is_wide else ''})")
        axes.set_ylabel("test accuracy (%)")
        if is_wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(f"{value:e}")[0] in "25" else "")
    return Drawing(
        "accuracy-cost",
        "Accuracy on the test images against the time of the forward pass",
        f"{result.basis} Bars: 95 % confidence intervals. The larger symbol is the winner by validation.",
        f"{len(result.networks)} networks. The winner by validation, {result.winner.label}, has "
        f"{format_percent(result.winner.test.accuracy.value)} % and needs {format_milliseconds(result.winner)}.",
        figure,
    )


def wrap_command(command: str, *, width: int = 88) -> str:
    r"""Break a command into lines that a shell joins again; words stay whole.

    Example:
        >>> print(wrap_command("python train.py seed=0 'data.group=a b'", width=22))
        python train.py \
          seed=0 \
          'data.group=a b'
    """
    lines = [""]
    for word in re.findall(r"(?:'[^']*'|\S)+", command):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append(f"  {word}")
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip() if len(lines) == 1 else f"{lines[-1]} {word}"
    return " \\\n".join(lines)


METHODS = (
    "Each network processes each image once, frozen, in 32 bits and without augmentation; the features are cached as "
    "those of runs are. Linear heads are trained on the training images as the stage pretrain trains one: AdamW, the "
    "same order of images, schedule and clipping. A head stops, and is taken, at the epoch with its lowest validation "
    "loss.",
    "Settings are chosen by the highest validation accuracy, mean over the seeds, and the lowest loss among equals; of "
    "the seeds the best one is tested. The network is chosen in the same way. No test image takes part in a choice.",
    "The test images are used once, for one head of each network. Intervals of accuracy are Wilson intervals at the "
    "effective number of images; differences are paired and keep patients together (MOVER).",
    "This compares frozen features. Fine-tuning may change the order, and networks that were trained on other images "
    "than photographs, or at another size, may gain more by it.",
)


def write_bakeoff_page(result: BakeoffResult, output: Path) -> Path:
    """Write page, tables and figure, and return the path of the page."""
    winner = result.winner
    heads = sum(len(each.record["heads"]) for each in result.networks)
    accuracy = winner.test.accuracy
    summary = Summary(
        title=f"Bake-off of {format_count(len(result.networks), 'network')}",
        subtitle=f"Classes: {', '.join(result.classes)}",
        marks=(),
        headline=None,
        findings=tuple(result.findings),
        warnings=result.warnings,
        facts=(
            KeyFigure("Winner by validation", winner.label, winner.head_text),
            KeyFigure(
                "Its test accuracy",
                f"{format_percent(accuracy.value)} %",
                f"95 % CI {format_percent(accuracy.low)} to {format_percent(accuracy.high)}; head only, not fine-tuned",
            ),
            KeyFigure(
                "Its cost",
                format_milliseconds(winner),
                f"an image; {format_bytes(winner.memory_bytes)} of memory; licence: {winner.licence or 'not stated'}",
            ),
            KeyFigure("Heads", f"{heads:,}", f"trained on {format_count(len(result.networks), 'frozen network')}"),
        ),
    )
    sections = (
        Section(
            "networks",
            "Accuracy against cost",
            (build_network_table(result), plot_accuracy_against_cost(result)),
            is_appendix=False,
        ),
        Section(
            "next",
            "Fine-tune the winner",
            (
                Sentences(
                    (
                        "This command trains a head with the settings chosen here, then the whole network, on the same "
                        "split. Its head starts from other random weights, so its figures differ a little from these.",
                    )
                ),
                Listing("Command", wrap_command(result.command)),
            ),
            is_appendix=False,
        ),
        Section("heads", "The chosen heads", (build_choice_table(result), FileOnly(build_head_table(result)))),
        Section("methods", "Methods and limits", (Sentences(METHODS),)),
    )
    return write_page(output, summary, sections)
