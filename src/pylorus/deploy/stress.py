"""`pylorus stress`: run a model on degraded images, and on what surrounds the tissue alone, and write a page on it."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

from pylorus.core.distributed import compute_seed
from pylorus.core.errors import PylorusError, check_fraction, format_path, normalize_name, resolve_short_name
from pylorus.core.formatting import format_count, join_names
from pylorus.core.io import check_new_folder
from pylorus.data.degradation import (
    REGIONS,
)
from pylorus.data.sources import list_folder_files, list_manifest_files
from pylorus.deploy.description import Description
from pylorus.deploy.model import InferenceModel
from pylorus.deploy.parity import TrialImages, find_run_images
from pylorus.deploy.predict import load_model
from pylorus.deploy.variants import (
    ALONE,
    BLANK,
    DEGRADED_VARIANTS,
    HIDDEN,
    REGION_VARIANTS,
    WHOLE,
    VariantOutputs,
    compute_variants,
)
from pylorus.evaluation.calibration import probabilities_of_logits
from pylorus.evaluation.comparison import difference_of_paired, holm
from pylorus.evaluation.index_intervals import clustered_wilson
from pylorus.evaluation.intervals import Estimate, create_undefined_estimate
from pylorus.evaluation.shortcuts import chance_test
from pylorus.model.inference import NetworkOutput
from pylorus.report.stress import write_stress_page
from pylorus.report.stress_text import FOLDER, LEVEL, RECORD, GradeResult, RegionResult, StressResult, build_findings

log = logging.getLogger(__name__)

MIN_IMAGES = 10
"""Images that must have a region for it to be tested."""
LOGIT_DIGITS = 3
"""Logits that differ by less are equal in the tests against chance."""


@dataclass(frozen=True, kw_only=True)
class StressOptions:
    """Options of a stress test.

    Attributes:
        class_name: Short name of the class of interest; None for the bundle's own.
        group: Regular expression that finds the patient in a path; None: the manifest's groups, or none.
        limit: Most images, chosen evenly from the classes and from as many patients as possible.
        margin: Loss of accuracy that counts, in (0, 1).
        seed: Seed of the degradations and of the permutations.
        batch: Batch size of the network, in images.
        device: auto, cpu, cuda or mps.
        network: See `load_model`.
        trust: See `load_model`.
    """

    class_name: str | None = None
    group: str | None = None
    limit: int = 500
    margin: float = 0.05
    seed: int = 0
    batch: int = 32
    device: str = "auto"
    network: Callable[..., Any] | None = None
    trust: tuple[Path, ...] = ()


def stress(folder: Path, source: Path | None, output: Path | None, options: StressOptions) -> None:
    """Measure what degraded images cost and whether what is not tissue tells the class, and write the page.

    Args:
        folder: Folder of a bundle or an export.
        source: Folder of class folders, or a manifest beside its images; None for the test images of the bundle's run.
        output: Folder to write to; None for `stress` in the bundle's run, which needs its test images.
        options: The options.

    Raises:
        PylorusError: If the bundle, an image set or an option is invalid.
    """
    _check_options(options)
    if output is None and source is not None:
        raise PylorusError("--output: expected a folder for the result, such as --output stress.")
    bundle = load_model(folder, options.device, network=options.network, trust=options.trust)
    deciding = _resolve_class(bundle.description, options.class_name)
    unused: list[str] = []
    if source is None:
        images = _find_test_images(folder, bundle.description)
    else:
        images, unused = find_labelled_images(source, bundle.description, group=options.group)
    target = folder.absolute().parent / FOLDER if output is None else output
    if not (target / RECORD).is_file():
        check_new_folder(target, hint="A folder with an earlier stress test is accepted, too.")
    chosen = select_images(images, options.limit)
    if len(chosen) < len(images):
        unused.append(
            f"{len(chosen):,} of {format_count(len(images), 'image')} were used, evenly from the classes and from as "
            "many patients as possible (--limit)."
        )
    variants = (WHOLE, *DEGRADED_VARIANTS, *REGION_VARIANTS)
    outputs = compute_variants(
        chosen.files, bundle.input, bundle.run_network, variants, seed=options.seed, batch=options.batch
    )
    if outputs.problems:
        count = format_count(len(outputs.problems), "file")
        unused.append(f"{count} could not be read; the first: {outputs.problems[0]}")
    has_patients = len(set(images.groups)) < len(images)
    result = _evaluate(bundle, chosen.select_files(outputs.rows), outputs, deciding, unused, options, has_patients)
    page = write_stress_page(result, target)
    print(f"{format_count(result.images, 'image')}, {result.source}\n")
    print("\n".join(f"- {sentence}" for sentence in (*build_findings(result), *result.unused)))
    print(f"\nstress test: {page}\nnumbers: {target / 'tables'}")


def _check_options(options: StressOptions) -> None:
    if options.limit < MIN_IMAGES:
        raise PylorusError(f"--limit: found {options.limit}, expected at least {MIN_IMAGES}.")
    check_fraction(options.margin, "--margin", example=0.05)
    if options.seed < 0:
        raise PylorusError(f"--seed: found {options.seed}, expected 0 or more.")


def _resolve_class(description: Description, class_name: str | None) -> str:
    if class_name is None:
        return description.decision.class_name
    names = {"classes": description.classes, "short_names": description.short_names}
    return resolve_short_name(class_name, **names, where="--class")


# --- images ---


def find_labelled_images(source: Path, description: Description, *, group: str | None) -> tuple[TrialImages, list[str]]:
    """Find images whose class is known, and say which are left out.

    Args:
        source: Folder with class folders, or a manifest beside its images.
        description: The bundle's description.
        group: Regular expression that finds the patient in a path; None: the manifest's groups, or none.

    Raises:
        PylorusError: If it holds no image of one of the bundle's classes, or no patient is found in a path.
    """
    if source.is_file():
        listed = list_manifest_files(source, source.parent, group=group)
    elif source.is_dir():
        listed = list_folder_files(source, group=group)
    else:
        raise PylorusError(f"{source}: found no such folder or manifest.")
    label_of_name = {
        normalize_name(name): label
        for names in (description.classes, description.short_names)
        for label, name in enumerate(names)
    }
    labels = [label_of_name.get(normalize_name(str(name)), -1) for name in listed.table["class"]]
    known = np.flatnonzero(np.array(labels) >= 0)
    if not len(known):
        found = join_names([str(name) for name in sorted(set(listed.table["class"]))], most=6)
        raise PylorusError(
            f"{source}: found the classes {found}, expected those of the bundle: {', '.join(description.classes)}."
        )
    unused = []
    if len(known) < len(labels):
        others = Counter(str(name) for name, label in zip(listed.table["class"], labels, strict=True) if label < 0)
        named = join_names([f"{name} ({count:,})" for name, count in sorted(others.items())], most=6)
        unused.append(f"Left out, since the bundle has no such class: {named}.")
    absent = [name for label, name in enumerate(description.short_names) if label not in labels]
    if absent:
        unused.append(f"There are no images of {join_names(absent)}.")
    rows = listed.table.iloc[known]
    if listed.grouped and (rows["group"] == "").any():
        path = format_path(rows["path"][rows["group"] == ""].iloc[0])
        raise PylorusError(f"--group: the pattern {group!r} finds no patient in {path}.")
    if not listed.grouped:
        unused.append("No patients are known (--group), so each image counts as one and intervals may be too narrow.")
    root = source.parent if source.is_file() else source
    groups = rows["group"] if listed.grouped else rows["path"]
    images = TrialImages(
        tuple(root / path for path in rows["path"]),
        np.array(labels, dtype=np.int64)[known],
        np.array([str(format_path(Path(name))) for name in groups], dtype=np.str_),
        "images that you gave",
    )
    return images, unused


def _find_test_images(folder: Path, description: Description) -> TrialImages:
    try:
        return find_run_images(folder, description, "test")
    except PylorusError as error:
        raise PylorusError(
            f"{folder}: the test images of its run were not found. Type the folder of class folders, or a manifest: "
            f"pylorus stress {folder} IMAGES --output DIR"
        ) from error


def select_images(images: TrialImages, limit: int) -> TrialImages:
    """Return at most `limit` images, evenly from the classes and from as many patients as possible; deterministic."""
    if len(images) <= limit:
        return images
    order = sorted(range(len(images)), key=lambda row: compute_seed(images.files[row].name, str(images.groups[row])))
    seen: Counter[tuple[int, str]] = Counter()
    turns: list[tuple[int, int]] = []
    for row in order:
        key = int(images.labels[row]), str(images.groups[row])
        turns.append((seen[key], row))  # the first image of each patient, then the second, …
        seen[key] += 1
    position: Counter[int] = Counter()
    ranked = []
    for _, row in sorted(turns, key=lambda turn: turn[0]):
        label = int(images.labels[row])
        ranked.append((position[label], label, row))
        position[label] += 1
    rows = sorted(row for _, _, row in sorted(ranked)[:limit])
    return images.select_files(np.array(rows, dtype=np.int64))


# --- evaluation ---


def _evaluate(
    bundle: InferenceModel,
    images: TrialImages,
    outputs: VariantOutputs,
    deciding: str,
    unused: list[str],
    options: StressOptions,
    has_patients: bool,
) -> StressResult:
    description = bundle.description
    names, groups = description.short_names, images.groups if has_patients else None
    is_finite = bool(np.isfinite(outputs.logits).all() and np.isfinite(outputs.unlikeness).all())
    if not is_finite:
        raise PylorusError("the network's output is NaN or infinite for some images, so nothing can be concluded.")
    grades = evaluate_degradations(bundle, outputs, images.labels, groups, deciding)
    form = bundle.input
    prepared = []
    if form.crop == "auto":
        prepared.append("crops to the field of view and blackens what surrounds it")
    if form.mask == "overlays":
        prepared.append("covers text and plates that it detects")
    counts = np.bincount(images.labels, minlength=len(names))
    return StressResult(
        architecture=description.architecture,
        identity=bundle.identity,
        source=images.source,
        images=len(images),
        patients=len(set(images.groups)) if has_patients else None,
        counts={name: int(count) for name, count in zip(names, counts, strict=True)},
        unused=tuple(unused),
        deciding=deciding,
        threshold=description.decision.thresholds[deciding],
        margin=options.margin,
        seed=options.seed,
        baseline=grades[0],
        grades=tuple(grades[1:]),
        regions=tuple(
            evaluate_regions(
                outputs, images.labels, groups, temperature=description.calibration.temperature, seed=options.seed
            )
        ),
        prepared=f"The bundle {join_names(prepared)} before the network sees an image, here too." if prepared else "",
    )


def evaluate_degradations(
    bundle: InferenceModel,
    outputs: VariantOutputs,
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    deciding: str,
) -> list[GradeResult]:
    """Compare each degraded variant with the images as they are, which come first.

    Args:
        bundle: The model, with its stored calibration, thresholds and limits of abstention.
        outputs: The result of `compute_variants`.
        true: True classes, of shape (n,).
        groups: Patient of each image, of shape (n,), or None.
        deciding: Short name of the class of interest.
    """
    has_threshold = bundle.description.decision.thresholds[deciding] is not None
    positive = true == bundle.description.short_names.index(deciding)
    results: list[GradeResult] = []
    whole = None
    for variant in (WHOLE, *(each for each in outputs.variants if each in DEGRADED_VARIANTS)):
        index = outputs.variants.index(variant)
        answer = bundle.apply_thresholds(
            NetworkOutput(torch.from_numpy(outputs.logits[index]), torch.from_numpy(outputs.unlikeness[index])),
            class_name=deciding,
        )
        whole = whole or answer
        correct, was_correct = answer.predicted == true, whole.predicted == true
        newly_wrong = was_correct & ~correct

        def estimate(flags: NDArray[np.bool_], before: NDArray[np.bool_], among: NDArray[np.bool_]) -> list[Estimate]:
            """Return a proportion among some images, and its change."""
            if not among.any():
                return 2 * [create_undefined_estimate("there are no such images")]
            part = None if groups is None else groups[among]
            change = difference_of_paired(flags[among], before[among], part)
            return [clustered_wilson(flags[among], part), Estimate(change.value, change.low, change.high)]

        everything = np.ones(len(true), dtype=bool)
        accuracy = estimate(correct, was_correct, everything)
        undefined = 2 * [create_undefined_estimate("the class has no stored threshold")]
        sensitivity = estimate(answer.positive, whole.positive, positive) if has_threshold else undefined
        specificity = estimate(~answer.positive, ~whole.positive, ~positive) if has_threshold else undefined
        name, _, grade = variant.partition("/")
        results.append(
            GradeResult(
                "" if variant == WHOLE else name,
                int(grade or 0),
                *(accuracy[0], sensitivity[0], specificity[0]),
                clustered_wilson(answer.why == "", groups),
                clustered_wilson(answer.why == "unlike", groups),
                *(accuracy[1], sensitivity[1], specificity[1]),
                newly_wrong=int(newly_wrong.sum()),
                caught=int((newly_wrong & (answer.why != "")).sum()),
            )
        )
    return results


def evaluate_regions(
    outputs: VariantOutputs,
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[RegionResult]:
    """Test for each region without tissue whether it alone is better than chance, and what hiding it changes.

    Args:
        outputs: The result of `compute_variants`, with the variants `REGION_VARIANTS`.
        true: True classes, of shape (n,).
        groups: Patient of each image, of shape (n,), or None.
        temperature: The model's calibration.
        seed: Seed of the permutations.
    """
    whole = probabilities_of_logits(outputs.get_logits(WHOLE), temperature=temperature)
    results: list[RegionResult] = []
    for region in REGIONS:
        has_region = outputs.has_overlays if region == "overlays" else outputs.has_border
        images = int(has_region.sum())
        # Text in one class only is a shortcut, so images without text take part in its test.
        rows = np.flatnonzero(has_region if region != "overlays" else np.ones(len(true), dtype=bool))
        part = None if groups is None else groups[rows]
        problem = "" if images >= MIN_IMAGES else _explain_absence(region, images)
        if not problem and len(np.unique(true[rows])) < 2:
            problem = "all images that have it are of one class"
        if problem:
            results.append(RegionResult(region, images, problem))
            continue
        scores = log_softmax(outputs.get_logits(f"{ALONE}/{region}")[rows], axis=1)
        if region != "border":
            # What the region adds to the field's shape, whose variation would hide the effect of a small mark.
            scores -= log_softmax(outputs.get_logits(BLANK)[rows], axis=1)
        scores = np.round(scores, LOGIT_DIGITS)
        test = chance_test(scores, true[rows], part, seed=compute_seed(seed, region) % 2**32)
        if test.smallest_p * len(REGIONS) > LEVEL:
            problem = f"{format_count(test.units, 'patient')} are too few to show anything at the level {LEVEL:g}"
            results.append(RegionResult(region, images, problem))
            continue
        hidden = probabilities_of_logits(outputs.get_logits(f"{HIDDEN}/{region}")[rows], temperature=temperature)
        before, after = whole[rows].argmax(axis=1), hidden.argmax(axis=1)
        change = difference_of_paired(after == true[rows], before == true[rows], part)
        results.append(
            RegionResult(
                region,
                images,
                test=test,
                corrected_p=test.p_value,
                changed=float((before != after).mean()),
                shift=float(np.abs(hidden - whole[rows]).sum(axis=1).mean() / 2),
                accuracy_change=Estimate(change.value, change.low, change.high),
            )
        )
    return _correct_p_values(results)


def _explain_absence(region: str, images: int) -> str:
    what = "text or plates were detected" if region == "overlays" else "a border surrounds the field"
    return f"{what} in {'no image' if not images else f'only {images} images'}"


def _correct_p_values(results: list[RegionResult]) -> list[RegionResult]:
    tested = [each for each in results if each.test is not None]
    if not tested:
        return results
    corrected = iter(holm(np.array([each.corrected_p for each in tested])).tolist())
    return [each if each.test is None else replace(each, corrected_p=next(corrected)) for each in results]
