"""The report of a validation on images from elsewhere: the figures of a run's report, beside those of the development.

The images take the place of the test images of a run, so that all tables and figures are computed as in its report.
Calibration and threshold are those that the bundle stores; nothing is fitted on these images.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from pylorus.core.formatting import (
    DASH,
    format_count,
    format_p_value,
    format_percent_with_unit,
    join_names,
)
from pylorus.evaluation.calibration import (
    BINS,
    estimate_calibration,
    probabilities_of_logits,
    reliability_curve,
)
from pylorus.evaluation.decisions import operating_point
from pylorus.report.candidate import group_by_configuration, group_into_pools
from pylorus.report.captions import set_run_labels
from pylorus.report.development import (
    ComparedFigure,
    StoredModel,
    build_class_calibration_table,
    build_comparison_row,
    build_prevalence_items,
    compare_with_development,
    format_comparison,
    format_threshold_sentences,
)
from pylorus.report.evidence import Evidence, find_winner
from pylorus.report.headline import KeyFigure, build_headline
from pylorus.report.mistakes import Item, Section, Sentences
from pylorus.report.page import (
    build_decision_section,
    build_index_section,
    build_test_figure_section,
    write_page,
)
from pylorus.report.record_sections import build_method_section, build_mistake_section, present_stress_records
from pylorus.report.results import (
    CONFIDENCE,
    IMAGES,
    IMAGES_PER_BIN,
    MIN_CURVE_BINS,
    Calibration,
    ReportOptions,
    Result,
    SensitivityTarget,
    ThresholdResult,
    evaluate_images,
    evaluate_patients,
    group_by_test_set,
)
from pylorus.report.study_tables import build_confusion_table, build_study_metric_table
from pylorus.report.subgroup_tables import build_subgroup_section
from pylorus.report.summary import Summary
from pylorus.report.table import (
    Column,
    Number,
    Table,
    create_rows,
    create_text_columns,
)
from pylorus.runs.folder import KEY, ShippedStage
from pylorus.runs.predictions import SavedPredictions
from pylorus.runs.reading import HASH_DIGITS, SavedRun, SavedSplit, SavedStage


@dataclass(frozen=True, eq=False, kw_only=True)
class ExternalSet:
    """Predicted images from elsewhere.

    Attributes:
        test: Their predictions, with the bundle's calibrated probabilities; the logits are those before the
            calibration, up to a constant for each image.
        why: Why the model abstains, of shape (images,): "", "unsure" or "unlike".
        split: Their rows, as those of a test set.
        image_set: Hash of their contents.
        grouped: Whether their patients are known.
        unreadable: Number of files that could not be read.
        unpredicted: Number of images for which the network's output is not finite.
        left_out: Number of images of each class that was left out on purpose.
        prevalence: Stated proportion of the class of interest; None if none was.
        copies: Copies of development images among them: how many images were `compared`, the number of `copies` and a
            `summary` in words.
        splits: Number of images in each split that their folders or their manifest state; empty if they state none.
        stress: What `pylorus stress` found with the model, by where its page is.
        augmentation: What test-time augmentation gains on these images, line by line; empty if it was not measured.
    """

    test: SavedPredictions
    why: NDArray[np.str_]
    split: SavedSplit
    image_set: str
    grouped: bool
    unreadable: int
    unpredicted: int
    left_out: Mapping[str, int]
    prevalence: float | None
    copies: Mapping[str, Any]
    splits: Mapping[str, int]
    stress: Mapping[str, Mapping[str, Any]]
    augmentation: tuple[str, ...] = ()


def write_external_report(
    model: StoredModel,
    external: ExternalSet,
    evaluation: Mapping[str, Any],
    looks: Mapping[str, Any],
    output: Path,
    *,
    names: bool = False,
) -> Path:
    """Write the report of a validation: report.html, tables/ and figures/.

    Args:
        model: What the bundle stores.
        external: The predicted images.
        evaluation: Their evaluation, as `pylorus predict` records it.
        looks: How often the model was evaluated on these images.
        output: Folder to write to.
        names: Whether to show file names and groups.

    Returns:
        Path of the page.
    """
    evidence = collect_external_evidence(model, external, output, names=names)
    comparison = compare_with_development(model, evaluation)
    first = Section(
        "development",
        "Development and external images",
        tuple(_build_items(model, external, evaluation, comparison)),
        is_appendix=False,
    )
    sections = (
        first,
        _build_class_section(evidence),
        build_index_section(evidence),
        build_subgroup_section(evidence),
        build_decision_section(evidence),
        _build_prevalence_section(evaluation, external),
        present_stress_records(external.stress),
        *(
            [Section("augmentation", "Test-time augmentation", (Sentences(_capitalize(external.augmentation)),))]
            if external.augmentation
            else []
        ),
        build_test_figure_section(evidence),
        _build_mistake_section(evidence),
        build_method_section(evidence),
    )
    return write_page(output, _build_summary(model, external, evaluation, evidence, comparison, looks), sections)


def _capitalize(lines: Iterable[str]) -> tuple[str, ...]:
    """Return lines of the terminal as paragraphs: without indentation, each with a capital letter."""
    return tuple(line.strip()[:1].upper() + line.strip()[1:] for line in lines)


def _build_class_section(evidence: Evidence) -> Section:
    """Build the study's tables of the external images."""
    items = (build_study_metric_table(evidence.results), build_confusion_table(evidence.results))
    return Section("results", "External images in the format of the study", items, is_appendix=False)


def _build_prevalence_section(evaluation: Mapping[str, Any], external: ExternalSet) -> Section:
    """Build the section of figures uncorrected and corrected for the frequencies of the classes."""
    items = tuple(build_prevalence_items(evaluation, basis=_format_basis(external)))
    return Section("prevalence", "Prevalence", items, is_appendix=False)


def _build_mistake_section(evidence: Evidence) -> Section:
    """Build the section of the worst mistakes; a validation shows no images."""
    section = build_mistake_section(evidence)
    return replace(section, items=tuple(item for item in section.items if isinstance(item, Table)))


def collect_external_evidence(model: StoredModel, external: ExternalSet, output: Path, *, names: bool) -> Evidence:
    """Compute everything that a run's report presents of its test images, for images from elsewhere."""
    config = OmegaConf.create(
        {
            "data": {
                "kind": "folders",
                "classes": list(model.classes),
                "short_names": list(model.short_names),
                "validation": "val",
                "group": "(patients)" if external.grouped else None,
            },
            "deploy": {"class_name": model.deciding},
        }
    )
    stage = SavedStage(model.stage, "loss", None, None, external.test)
    bundle = {"architecture": model.architecture, "shipped": asdict(ShippedStage(model.stage, KEY, {}))}
    run = SavedRun(output, {"state": "finished"}, config, external.split, (stage,), bundle=bundle)
    (run,) = set_run_labels([run])
    result = _compute_result(run, model, external)
    configurations = group_by_configuration([result])
    pools = group_into_pools(configurations)
    options = ReportOptions(names=names)
    stored = model.threshold
    target = SensitivityTarget(stored.sensitivity, stored.confidence) if stored else SensitivityTarget(0.95, 0.9)
    return Evidence(
        options=options,
        class_name=model.deciding,
        target=target,
        margin=None,
        runs=(run,),
        results=(result,),
        tests=group_by_test_set([result]),
        configurations=configurations,
        pools=pools,
        winners=tuple(find_winner(each, class_name=model.deciding, options=options) for each in pools),
        evaluation_counts=(),
    )


def _compute_result(run: SavedRun, model: StoredModel, external: ExternalSet) -> Result:
    calibrated, groups = external.test.predictions, external.test.clusters
    raw = replace(calibrated, probabilities=probabilities_of_logits(external.test.logits, temperature=1.0))
    bins = min(BINS, max(MIN_CURVE_BINS, len(calibrated.true) // IMAGES_PER_BIN))
    scores = [
        estimate_calibration(each.probabilities, each.true, groups, confidence=CONFIDENCE) for each in (raw, calibrated)
    ]
    curves = [
        reliability_curve(each.probabilities, each.true, groups, bins=bins, confidence=CONFIDENCE)
        for each in (raw, calibrated)
    ]
    operating: tuple[ThresholdResult, ...] = ()
    if model.threshold is not None:
        column = model.short_names.index(model.deciding)
        point = operating_point(
            calibrated.true == column,
            calibrated.probabilities[:, column],
            groups,
            threshold=model.threshold.threshold,
            confidence=CONFIDENCE,
        )
        operating = (ThresholdResult(IMAGES, model.deciding, model.threshold, point),)
    return Result(
        run=run,
        stage=run.stages[0],
        test=external.test,
        images=evaluate_images(calibrated),
        patients=evaluate_patients(calibrated),
        validation_accuracy=None,
        calibration=Calibration(
            temperature=model.temperature,
            validation=calibrated,
            test=calibrated,
            uncalibrated=raw,
            before=scores[0],
            after=scores[1],
            curve_before=curves[0],
            curve_after=curves[1],
        ),
        operating=operating,
    )


def _build_items(
    model: StoredModel,
    external: ExternalSet,
    evaluation: Mapping[str, Any],
    comparison: tuple[ComparedFigure, ...],
) -> Iterator[Item]:
    """Yield the tables and sentences that compare the images with those of the development."""
    images, patients = external.test.images, external.test.groups
    of_patients = f" of {format_count(patients, 'group')} (patients)" if external.grouped else ""
    development = f" of {format_count(model.groups, 'group')}" if model.groups else ""
    basis = (
        f"Image-level; development: {format_count(model.images, 'test image')}{development}; external: "
        f"{format_count(images, 'image')}{of_patients}."
    )
    notes = [
        "Development: as stored with the model. External minus development; proportions in percentage points. "
        "Intervals of the differences are combined from the two intervals (MOVER), as for different images of "
        "different patients. Whether the external images are the development's test images, where this would not "
        "hold, is not checked: fingerprints are of training and validation images only. "
        f"p is corrected for the {sum(not math.isnan(each.p_value) for each in comparison)} rows that have one (Holm). "
        "Accuracy and precision depend on how frequent each class is: see the table of images by class."
    ]
    if not external.grouped:
        notes.append(
            "Patients are not known: each external image counts as a patient, so its intervals may be too narrow."
        )
    if model.is_optimistic:
        notes.append("The development figures are optimistic: that run validated on its test images.")
    yield Table(
        key="development",
        title="Figures on the development test images and on the external images",
        basis=basis,
        columns=(
            *create_text_columns("figure"),
            Column("development"),
            Column("external"),
            Column("difference"),
            Column("p, corrected"),
        ),
        rows=tuple(build_comparison_row(each) for each in comparison),
        notes=tuple(notes),
    )
    yield _build_class_table(model, external)
    yield build_class_calibration_table(model, evaluation, basis=_format_basis(external))
    sentences = list(format_threshold_sentences(model, evaluation))
    if sentences:
        yield Sentences(tuple(sentences))


def _format_basis(external: ExternalSet) -> str:
    """Say which images a table of all external images is based on."""
    of_patients = f" of {format_count(external.test.groups, 'group')} (patients)" if external.grouped else ""
    return f"Image-level; {format_count(external.test.images, 'image')}{of_patients}."


def _build_class_table(model: StoredModel, external: ExternalSet) -> Table:
    counts = np.bincount(external.test.predictions.true, minlength=len(model.short_names))
    rows = [
        (
            f"{short} ({name})" if short != name else name,
            model.counts.get(short, 0),
            Number(100 * model.counts.get(short, 0) / max(1, model.images)),
            int(count),
            Number(100 * count / external.test.images),
        )
        for short, name, count in zip(model.short_names, model.classes, counts, strict=True)
    ]
    return Table(
        key="classes",
        title="Images by class",
        basis="Readable images.",
        columns=(
            *create_text_columns("class"),
            *(
                column
                for heading in ("development, test", "external")
                for column in (Column("images", heading=heading), Column("share", heading=heading, unit="%"))
            ),
        ),
        rows=create_rows(rows),
    )


def _build_summary(
    model: StoredModel,
    external: ExternalSet,
    evaluation: Mapping[str, Any],
    evidence: Evidence,
    comparison: tuple[ComparedFigure, ...],
    looks: Mapping[str, Any],
) -> Summary:
    """Summarize the validation for the head of the page."""
    headline = build_headline(evidence)
    if headline is not None:
        answered, unlike = (evaluation[key]["value"] for key in ("answered", "unlike"))
        headline = replace(
            headline,
            label=f"{model.architecture}, as shipped, on images from elsewhere",
            figures=tuple(replace(each, name=each.name.replace("Test", "External")) for each in headline.figures),
            verdict=headline.verdict.replace("test image", "external image"),
            basis=headline.basis.replace("test image", "external image"),
            answered=f"It answers {format_percent_with_unit(answered)} of the external images; "
            f"{format_percent_with_unit(unlike)} are unlike its training images.",
        )
    copies = [f"{external.copies['summary']} validation.json lists them."] if external.copies["copies"] else []
    return Summary(
        title=f"External validation of {evidence.runs[0].label}",
        subtitle=f"Evaluated {time.strftime('%Y-%m-%d')}. The test images of the tables are the external images.",
        marks=(),
        headline=headline,
        findings=tuple(format_comparison(comparison)),
        warnings=(*copies, *collect_warnings(model, external, evaluation, looks)),
        facts=tuple(_build_facts(external, looks)),
    )


def collect_warnings(
    model: StoredModel, external: ExternalSet, evaluation: Mapping[str, Any], looks: Mapping[str, Any]
) -> list[str]:
    """Return what a reader must know before the figures, but for copies of development images, as sentences."""
    sentences = format_looks(looks, external.test.images)
    if external.splits:
        parts = join_names([f"{count:,} {split}" for split, count in external.splits.items()])
        sentences.append(
            f"The images are divided into splits ({parts}): all of them were evaluated. To evaluate one split, name "
            "its folder, or a manifest of its rows."
        )
    counts = np.bincount(external.test.predictions.true, minlength=len(model.short_names))
    missing = [name for name, count in zip(model.short_names, counts, strict=True) if not count]
    if missing:
        sentences.append(
            f"No external image is of {join_names(missing, last='or')}: what depends on it is not estimated."
        )
    if not external.grouped:
        sentences.append(
            "Patients are not known (--group, or a column `group`): each image counts as a patient, and intervals may "
            "be too narrow."
        )
    for name, count in external.left_out.items():
        sentences.append(f"{format_count(count, 'image')} of class {name} left out (--map).")
    if external.unreadable:
        sentences.append(f"{format_count(external.unreadable, 'file')} could not be read; quarantine.csv lists them.")
    if external.unpredicted:
        sentences.append(f"{format_count(external.unpredicted, 'image')} without a finite output of the network.")
    unlike = evaluation["unlike_images"]
    if unlike["foreign"]:
        shares = (unlike["unlike"] / unlike["images"], unlike["promised"])
        share, promised = map(format_percent_with_unit, shares)
        sentences.append(
            f"The images are foreign to the model: {share} are unlike its training images, where at most {promised} of "
            f"images like those are expected ({format_p_value(unlike['p'])})."
        )
    sentences += model.limits
    return sentences + [str(each["findings"][0]) for each in external.stress.values() if each.get("shortcuts")]


def format_looks(looks: Mapping[str, Any], images: int) -> list[str]:
    """Say how many of the images this model was evaluated on before.

    Args:
        looks: How often the model was evaluated, as `pylorus.deploy.external.record_look` returns it.
        images: Number of images.
    """
    sentences = []
    if looks["images seen"]:
        earlier = format_count(looks["earlier looks"], "earlier validation")
        span = " to ".join(dict.fromkeys(str(time)[:10] for time in looks["seen"]))
        sentences.append(
            f"This model was evaluated on {looks['images seen']:,} of these {format_count(images, 'image')} before, in "
            f"{earlier} ({span}): the more often, the less the figures say about new patients."
        )
    if looks["recalibrated on"]:
        sentences.append(
            f"This model was recalibrated on {looks['recalibrated on']:,} of these {format_count(images, 'image')}: "
            "figures on them are optimistic."
        )
    if not looks["recorded in"]:
        sentences.append(
            "This evaluation could not be recorded beside the bundle, whose folder can't be written to: later reports "
            "will not count it."
        )
    if looks["looks without images"]:
        count = format_count(looks["looks without images"], "earlier validation")
        sentences.append(
            f"{count} of this model by an older Pylorus did not record which images: whether these are among them is "
            "not known."
        )
    return sentences


def _build_facts(external: ExternalSet, looks: Mapping[str, Any]) -> Iterator[KeyFigure]:
    groups = f"of {external.test.groups:,} groups" if external.grouped else "each its own group"
    yield KeyFigure("External images", f"{external.test.images:,}", groups)
    yield KeyFigure("Image set", external.image_set[:HASH_DIGITS], "first digits of the hash of its contents")
    compared, copies, summary = (external.copies[key] for key in ("compared", "copies", "summary"))
    detail = f"of {compared:,} compared with the fingerprints in the model" if compared else summary
    yield KeyFigure("Copies of development images", f"{copies:,}" if compared else DASH, detail)
    detail = f"this one included; {looks['all sets']} of any set"
    yield KeyFigure("Evaluations of this set", str(looks["this set"]), detail)
