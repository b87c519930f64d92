"""Figures on images from elsewhere beside those that a bundle holds of its development, with their differences.

The two sets are taken to be different images of different patients: intervals of differences are combined from two
intervals, and no test pairs images.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from pylorus.core.formatting import (
    format_number,
    format_p_value,
    format_percent,
    format_percent_at_least,
    format_percent_with_unit,
    format_threshold,
    join_names,
)
from pylorus.evaluation.calibration import Temperature
from pylorus.evaluation.comparison import difference_of_independent, holm
from pylorus.evaluation.decisions import SensitivityThreshold
from pylorus.evaluation.intervals import Estimate
from pylorus.report.mistakes import Sentences
from pylorus.report.results import CONFIDENCE, LEVEL
from pylorus.report.table import (
    Column,
    Number,
    Row,
    Table,
    convert_to_number_cell,
    convert_to_p_value_cell,
    convert_to_percent_cell,
    create_rows,
    create_text_columns,
)

MAX_NAMES = 5
"""Maximum number of figures that a sentence names."""


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredModel:
    """What a bundle stores of its development.

    Attributes:
        folder: Folder of the bundle.
        architecture: Name of the network.
        classes: Names of the classes.
        short_names: Their short names.
        stage: Name of the shipped stage.
        deciding: Short name of the class of interest.
        temperature: By which the logits are divided.
        threshold: Threshold of the class of interest with its guarantee; None if it has none.
        development: Figures on the development test images, under the names of an evaluation.
        counts: Number of development test images of each class, by short name.
        images: Number of development test images.
        groups: Number of their patients; 0 if they were not known.
        is_optimistic: Whether the development validated on its test images.
        limits: Sentences on what its figures do not cover: a recalibration, networks that were measured by turns.
    """

    folder: Path
    architecture: str
    classes: tuple[str, ...]
    short_names: tuple[str, ...]
    stage: str
    deciding: str
    temperature: Temperature
    threshold: SensitivityThreshold | None
    development: Mapping[str, Any]
    counts: Mapping[str, int]
    images: int
    groups: int
    is_optimistic: bool
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparedFigure:
    """A figure on the development test images and on those from elsewhere.

    Attributes:
        name: Name of the figure, to be followed by a verb.
        development: As the bundle holds it.
        external: On the images from elsewhere.
        difference: External minus development, with its interval.
        p_value: Of the difference; NaN if it has no interval.
        corrected: The same, corrected for all figures of the table.
        is_share: Whether it is a proportion, shown in %.
    """

    name: str
    development: Estimate
    external: Estimate
    difference: Estimate
    p_value: float
    corrected: float
    is_share: bool

    @property
    def is_significant(self) -> bool:
        """Whether the difference is significant after the correction."""
        return self.corrected < LEVEL


def compare_with_development(model: StoredModel, evaluation: Mapping[str, Any]) -> tuple[ComparedFigure, ...]:
    """Compare the figures on images from elsewhere with those that the bundle holds.

    The images are different ones, of different patients: intervals of the differences are combined from the two
    intervals (see `difference_of_independent`), and p is that of the interval which just reaches 0 if both intervals
    had the width of a normal distribution on that side. p is corrected by Holm's method over all rows.
    """
    figures = []
    for name, development, external, is_share in _iter_common_figures(model, evaluation):
        difference = difference_of_independent(external, development)
        if not difference.defined:
            difference = replace(difference, reason=development.reason or external.reason)
        figures.append((name, development, external, difference, _compute_p_value(difference), is_share))
    defined = [index for index, figure in enumerate(figures) if not math.isnan(figure[4])]
    corrected = np.full(len(figures), math.nan)
    if defined:
        corrected[defined] = holm(np.array([figures[index][4] for index in defined]))
    return tuple(
        ComparedFigure(name, development, external, difference, p_value, float(value), is_share)
        for (name, development, external, difference, p_value, is_share), value in zip(figures, corrected, strict=True)
    )


def _compute_p_value(difference: Estimate) -> float:
    """Return the two-sided p of a difference of 0 from the half of its 95 % interval that points to 0."""
    if not difference.has_interval:
        return math.nan
    half = difference.value - difference.low if difference.value > 0 else difference.high - difference.value
    if half <= 0:
        return 1.0 if difference.value == 0 else 0.0
    return float(2 * norm.sf(norm.isf((1 - CONFIDENCE) / 2) * abs(difference.value) / half))


def _iter_common_figures(
    model: StoredModel, evaluation: Mapping[str, Any]
) -> Iterator[tuple[str, Estimate, Estimate, bool]]:
    """Yield the figures that both the bundle and the evaluation have, in the order of the table."""
    stored = model.development
    for key, label in {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}.items():
        yield label, *_read_pair(stored[key], evaluation[key]), True
    yield "macro AUROC", *_read_pair(stored["macro_auroc"], evaluation["macro_auroc"]), False
    labels = {
        "sensitivity": "sensitivity for",
        "specificity": "specificity for",
        "precision": "precision for",
        "auroc": "AUROC for",
    }
    for short_name in model.short_names:
        for key, label in labels.items():
            yield (
                f"{label} {short_name}",
                *_read_pair(stored[key].get(short_name), evaluation[key][short_name]),
                key != "auroc",
            )
    decision = evaluation.get("decision")
    if stored["decision"] is not None and decision is not None:
        for key in ("sensitivity", "specificity"):
            name = f"{key} for {model.deciding} at the threshold"
            yield name, *_read_pair(getattr(stored["decision"], key), decision[key]), True
    yield "answered", *_read_pair(stored["answered"], evaluation["answered"]), True
    yield "accuracy of the answers", *_read_pair(stored["accuracy_answered"], evaluation["accuracy_answered"]), True


def _read_pair(development: Any, external: Mapping[str, float | None]) -> tuple[Estimate, Estimate]:
    return _read_estimate(None if development is None else vars(development)), _read_estimate(external)


def _read_estimate(values: Mapping[str, float | None] | None) -> Estimate:
    if values is None:
        return Estimate(math.nan, math.nan, math.nan, reason="this bundle, of an older Pylorus, does not hold it")
    return Estimate.from_saved(values)


def build_comparison_row(figure: ComparedFigure) -> Row:
    """Build a row of the table of both sets: the figure on each, the difference and its corrected p."""
    convert = convert_to_percent_cell if figure.is_share else convert_to_number_cell
    cells = [convert(each) for each in (figure.development, figure.external, figure.difference)]
    return Row(
        (figure.name, *cells, replace(convert_to_p_value_cell(figure.corrected), reason=figure.difference.reason))
    )


def build_class_calibration_table(model: StoredModel, evaluation: Mapping[str, Any], *, basis: str) -> Table:
    """Build the table that compares how frequent each class is with its probability."""
    rows = []
    for name in model.short_names:
        values = evaluation["calibration"][name]
        observed, expected = values["observed"], values["expected"]
        rows.append(
            (
                name,
                Number(100 * observed),
                Number(100 * expected),
                Number(observed / expected if expected else math.nan, 2),
                convert_to_percent_cell(_read_estimate(values["difference"])),
                convert_to_number_cell(_read_estimate(values["slope"]), digits=2),
                convert_to_number_cell(_read_estimate(values["intercept"]), digits=2),
            )
        )
    return Table(
        key="calibration-in-the-large",
        title="Calibration of each class on the external images",
        basis=basis,
        columns=(
            *create_text_columns("class"),
            Column("observed", unit="%"),
            Column("expected", unit="%"),
            Column("observed / expected"),
            Column("observed − expected", unit="points"),
            Column("slope"),
            Column("intercept"),
        ),
        rows=create_rows(rows),
        notes=(
            "Expected: the mean calibrated probability of the class. Where probabilities are right, the line of "
            "recalibration has slope 1 and intercept 0. A slope below 1 means that they are too extreme; an intercept "
            "(with the slope held at 1) above 0, that the class is more frequent than they say.",
        ),
    )


def format_threshold_sentences(model: StoredModel, evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Say how the stored threshold carried over."""
    decision = evaluation.get("decision")
    if decision is None:
        yield f"The bundle has no threshold for {model.deciding}."
        return
    sensitivity = _read_estimate(decision["sensitivity"])
    threshold = model.threshold
    at = f"At the stored threshold of {format_threshold(decision['threshold'])}"
    if not sensitivity.defined:
        yield f"{at}, the sensitivity for {model.deciding} is unknown: no external image is of this class."
        return
    text = (
        f"{at}, {format_percent_with_unit(sensitivity.value)} of the external images of {model.deciding} are found "
        f"(95 % CI {format_percent(sensitivity.low)} to {format_percent(sensitivity.high)})"
    )
    if threshold is None:
        yield f"{text}; the bundle states no guarantee for it."
        return
    promised = threshold.sensitivity if threshold.is_guaranteed else threshold.sensitivity_reached
    guarantee = f"the {format_percent_at_least(promised)} % guaranteed for new patients of the development's hospitals"
    if not threshold.is_guaranteed:
        target = format_percent(threshold.sensitivity, digits=None)
        guarantee += f" (there were too few patients to guarantee the target of {target} %)"
    if sensitivity.high < promised:
        yield f"{text}: shown to be less than {guarantee}. The threshold did not carry over."
    elif sensitivity.low >= promised:
        yield f"{text}: shown to be at least {guarantee}."
    else:
        yield f"{text}. These images do not decide whether it reaches {guarantee}."


def format_prevalence_sentences(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Give PPV and NPV at a stated prevalence."""
    decision = evaluation.get("decision") or {}
    stated = decision.get("at_prevalence")
    if stated is None:
        return
    ppv, npv = (_read_estimate(stated[key]) for key in ("ppv", "npv"))
    if not (ppv.defined and npv.defined):
        yield (
            f"PPV and NPV where {format_percent(stated['prevalence'], digits=None)} % of the images are "
            f"{decision['class']} are unknown: they need both sensitivity and specificity on the external images."
        )
        return
    yield (
        f"Where {format_percent(stated['prevalence'], digits=None)} % of the images are {decision['class']}, the PPV "
        f"is {convert_to_percent_cell(ppv).text} % and the NPV {convert_to_percent_cell(npv).text} %."
    )


CORRECTIONS = {
    "uncorrected": "uncorrected",
    "estimated": "corrected to the estimated prevalence",
    "stated": "corrected to the stated prevalence",
}
"""Names of the probabilities of an evaluation at other prevalences, in the order of the tables."""
ASSUMPTION = (
    "A correction for another prevalence assumes that only the frequencies of the classes differ, and that the images "
    "of each class look here as they did in the development. Other endoscopes or other patients break that: estimate "
    "and correction can then be far off. The corrections serve to read these figures; the bundle is not changed and "
    "its answers stay uncorrected. With labelled images, pylorus recalibrate makes a bundle for another site."
)


def build_prevalence_items(evaluation: Mapping[str, Any], *, basis: str) -> Iterator[Table | Sentences]:
    """Build the content of the section on prevalence: classes, probabilities and decisions, uncorrected and corrected.

    Args:
        evaluation: The evaluation of the external images, with its `prevalence_shift`.
        basis: The images, in full sentences.
    """
    shift = evaluation["prevalence_shift"]
    yield Sentences((ASSUMPTION, *_format_prevalence_findings(evaluation), *format_prevalence_sentences(evaluation)))
    yield _build_prevalence_class_table(shift, basis)
    yield _build_corrected_probability_table(shift, basis)
    if shift["decisions"]:
        yield _build_corrected_decision_table(shift, basis)


def _format_prevalence_findings(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Say whether the estimate agrees with the labels, and what the correction to it changes."""
    shift = evaluation["prevalence_shift"]
    estimated = shift["estimated"]
    if not estimated["classes"]:
        yield f"Without labels, the prevalence can't be estimated: {estimated['reason']}."
        return
    if evaluation["unlike_images"]["foreign"]:
        yield "These images are foreign to the model, so that the assumption is unlikely to hold."
    intervals = {name: _read_estimate(each) for name, each in estimated["classes"].items()}
    observed = {name: each["value"] for name, each in shift["observed"].items()}
    known = [name for name, each in intervals.items() if each.has_interval]
    outside = [name for name in known if not intervals[name].low <= observed[name] <= intervals[name].high]
    if outside:
        named = [
            f"{name} ({format_percent_with_unit(observed[name])}, estimated {convert_to_percent_cell(each).text})"
            for name, each in intervals.items()
            if name in outside
        ]
        yield (
            f"The true proportion lies outside the interval of the estimate for {join_names(named, most=MAX_NAMES)}: "
            "the assumption does not hold here, or the probabilities were not calibrated."
        )
    elif known:
        yield "The true proportion of each class lies in the interval of the estimate."
    before, after = (_read_estimate(shift["probabilities"][key]["nll"]) for key in ("uncorrected", "estimated"))
    if before.defined and after.defined:
        change = "falls" if after.value < before.value else "does not fall"
        yield (
            f"With probabilities corrected to the estimated prevalence, the log loss {change}: "
            f"{format_number(before.value, 3)} before, {format_number(after.value, 3)} after."
        )


def _build_prevalence_class_table(shift: Mapping[str, Any], basis: str) -> Table:
    estimated, targets = shift["estimated"], shift["targets"]
    missing = Estimate(math.nan, math.nan, math.nan, reason=estimated["reason"])
    rows = []
    for name, original in estimated["original"].items():
        value = _read_estimate(estimated["classes"][name]) if estimated["classes"] else missing
        cells = [Number(100 * original), convert_to_percent_cell(replace(value, reason=estimated["reason"]))]
        cells.append(convert_to_percent_cell(_read_estimate(shift["observed"][name])))
        cells += [Number(100 * targets["stated"][name])] if "stated" in targets else []
        cells += [
            convert_to_percent_cell(_read_estimate(each["difference"][name]))
            for each in shift["probabilities"].values()
        ]
        rows.append((name, *cells))
    sample = (
        f" The estimate is from {estimated['drawn']:,} of them, drawn at random."
        if estimated["drawn"] < estimated["images"]
        else ""
    )
    shares = ("where calibrated", "estimated without labels", "true", *(("stated",) if "stated" in targets else ()))
    return Table(
        key="prevalence",
        title="Proportions of the classes, and calibration in the large with probabilities corrected to them",
        basis=f"{basis}{sample}",
        columns=(
            *create_text_columns("class"),
            *(Column(title, heading="proportion", unit="%") for title in shares),
            *(Column(_format_correction(key), heading="observed − expected, points") for key in shift["probabilities"]),
        ),
        rows=create_rows(rows),
        notes=(
            f"Where calibrated: the proportions from which a correction starts, {estimated['source']}. Estimated: the "
            "most likely proportions, given the calibrated probabilities of all images; its interval does not include "
            "that the calibration is itself an estimate. Expected: the mean probability of the class. A stated "
            f"proportion is that of {shift['class']}; the other classes keep their proportions to each other.",
        ),
    )


def _format_correction(key: str) -> str:
    return key if key == "uncorrected" else f"corrected, {key}"


def _build_corrected_probability_table(shift: Mapping[str, Any], basis: str) -> Table:
    infinite = "a true class has the probability 0"
    rows = [
        (
            CORRECTIONS[key],
            convert_to_percent_cell(_read_estimate(each["accuracy"])),
            convert_to_number_cell(_read_estimate(each["brier"])),
            convert_to_number_cell(replace(_read_estimate(each["nll"]), reason=infinite)),
        )
        for key, each in shift["probabilities"].items()
    ]
    return Table(
        key="prevalence-probabilities",
        title="Probabilities uncorrected and corrected for prevalence",
        basis=basis,
        columns=(
            *create_text_columns("probabilities"),
            Column("accuracy", unit="%"),
            Column("Brier score"),
            Column("log loss"),
        ),
        rows=create_rows(rows),
        notes=(
            "All on the same images, with the true proportions of the table above: a correction to a stated prevalence "
            "that is far from theirs makes these figures worse. An estimate counts as half an image at least.",
        ),
    )


def _build_corrected_decision_table(shift: Mapping[str, Any], basis: str) -> Table:
    stated, name = shift["stated"], shift["class"]
    rows = []
    for each in shift["decisions"]:
        values = [each["sensitivity"], each["specificity"], each["precision"], each["npv"]]
        values += [each["at_prevalence"][key] for key in ("ppv", "npv")] if stated is not None else []
        cells = [convert_to_percent_cell(_read_estimate(value)) for value in values]
        at = f"{each['kind']}, {format_threshold(each['threshold'])}"
        rows.append((_format_correction(each["probabilities"]), at, each["differently"], *cells))
    elsewhere = "" if stated is None else f"where {format_percent(stated, digits=None)} % are {name}"
    return Table(
        key="prevalence-decisions",
        title=f"Decision for {name} at the stored and at the corrected threshold",
        basis=basis,
        columns=(
            *create_text_columns("probabilities", "threshold"),
            Column("changed"),
            Column("sensitivity", unit="%"),
            Column("specificity", unit="%"),
            *(
                Column(title, heading=heading, unit="%")
                for heading in ("among these images", *((elsewhere,) if elsewhere else ()))
                for title in ("PPV", "NPV")
            ),
        ),
        rows=create_rows(rows),
        notes=(
            "The corrected threshold on corrected probabilities stands for the stored one on the uncorrected: it keeps "
            "sensitivity and specificity, exactly if the other classes keep their proportions to each other. The "
            "stored threshold on corrected probabilities trades one for the other. Changed: images whose decision "
            "differs from that of the bundle.",
        ),
    )


def format_comparison(comparison: tuple[ComparedFigure, ...]) -> Iterator[str]:
    """Say which figures differ from the development."""
    compared = [each for each in comparison if not math.isnan(each.corrected)]
    lower = [each for each in compared if each.is_significant and each.difference.value < 0]
    higher = [each for each in compared if each.is_significant and each.difference.value > 0]
    for figures, word in ((lower, "lower"), (higher, "higher")):
        if figures:
            named = [f"{each.name} ({_format_difference(each)})" for each in figures]
            yield f"Significantly {word} than on the development test images: {join_names(named, most=MAX_NAMES)}."
    if compared and not lower and not higher:
        accuracy = comparison[0]
        yield (
            f"No figure differs significantly from that on the development test images; the accuracy differs by "
            f"{_format_difference(accuracy)}, 95 % CI {convert_to_percent_cell(accuracy.difference).interval_text}."
        )


def _format_difference(figure: ComparedFigure) -> str:
    if figure.is_share:
        return f"{format_percent(figure.difference.value, signed=True)} points, {format_p_value(figure.corrected)}"
    return f"{figure.difference.value:+.3f}, {format_p_value(figure.corrected)}".replace("-", "−", 1)
