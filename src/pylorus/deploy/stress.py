"""`pylorus stress`: run a model on degraded images, and on what surrounds the tissue alone, and write a page on it."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

from pylorus.core.distributed import compute_seed, map_items
from pylorus.core.errors import PylorusError, UnreadableImageError, check_fraction, format_path, resolve_short_name
from pylorus.core.formatting import format_count, join_names, open_progress_bar
from pylorus.core.io import check_new_folder
from pylorus.data.decode import read_image
from pylorus.data.degradation import (
    DEGRADATIONS,
    GRADES,
    REGIONS,
    compute_content_hash,
    degrade_image,
    draw_field_mask,
    find_surroundings,
    hide_region,
    isolate_region,
)
from pylorus.data.field_of_view import find_field
from pylorus.data.files import RGB
from pylorus.data.input_format import InputFormat
from pylorus.deploy.description import Description
from pylorus.deploy.external import find_labelled_files
from pylorus.deploy.model import InferenceModel
from pylorus.deploy.parity import TrialImages, find_run_images
from pylorus.deploy.predict import load_model
from pylorus.evaluation.calibration import probabilities_of_logits
from pylorus.evaluation.comparison import difference_of_paired, holm
from pylorus.evaluation.index_intervals import clustered_wilson
from pylorus.evaluation.intervals import Estimate, create_undefined_estimate
from pylorus.evaluation.stress import LEVEL, GradeResult, RegionResult, StressResult, chance_test
from pylorus.model.inference import NetworkOutput
from pylorus.report.record_sections import STRESS_FOLDER, STRESS_RECORD
from pylorus.report.stress import build_findings, write_stress_page

log = logging.getLogger(__name__)

MIN_IMAGES = 10
"""Images that must have a region for it to be tested."""
LOGIT_DIGITS = 3
"""Logits that differ by less are equal in the tests against chance."""
WHOLE, BLANK, ALONE, HIDDEN = "whole", "blank", "alone", "hidden"
FILL_IMAGES = 48
"""Images whose fields give the fill colour."""
DEGRADED_VARIANTS = tuple(f"{name}/{grade}" for name in DEGRADATIONS for grade in range(1, GRADES + 1))
REGION_VARIANTS = (BLANK, *(f"{how}/{region}" for how in (ALONE, HIDDEN) for region in REGIONS))


@dataclass(frozen=True, kw_only=True)
class StressOptions:
    """Options of a stress test.

    Attributes:
        class_name: Short name of the class of interest; None for the bundle's own.
        group: Regular expression that finds the patient in a path; None: the manifest's groups, or none.
        names: The bundle's class for each class of the images that has another name; "" to leave its images out.
        root: Folder that the paths of a manifest are relative to; None: the manifest's own.
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
    names: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None
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
        source: Class folders, or a manifest; None for the test images of the bundle's run.
        output: Folder to write to; None for `stress` in the bundle's run, which needs its test images.
        options: The options.

    Raises:
        PylorusError: If the bundle, an image set or an option is invalid.
    """
    _check_options(options)
    if source is None and (options.names or options.root or options.group):
        raise PylorusError("--map, --root and --group are for images that you name: pylorus stress BUNDLE IMAGES …")
    if output is None and source is not None:
        raise PylorusError("--output: expected a folder for the result, such as --output stress.")
    bundle = load_model(folder, options.device, network=options.network, trust=options.trust)
    deciding = _resolve_class(bundle.description, options.class_name)
    unused: list[str] = []
    if source is None:
        images = _find_test_images(folder, bundle.description)
    else:
        images, unused = _find_given_images(source, bundle.description, options)
    target = folder.absolute().parent / STRESS_FOLDER if output is None else output
    outside = [folder] if source is None else [folder, source]
    check_new_folder(
        target, hint="A folder with an earlier stress test is accepted, too.", own=(STRESS_RECORD,), outside=outside
    )
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


def _find_given_images(source: Path, description: Description, options: StressOptions) -> tuple[TrialImages, list[str]]:
    """Find the labelled images that the user named, and say what is to be known about them."""
    files = find_labelled_files(source, description, root=options.root, group=options.group, names=options.names)
    unused = [
        f"{format_count(count, 'image')} of class {name} left out (--map)." for name, count in files.left_out.items()
    ]
    labels = files.table["class"].map({name: label for label, name in enumerate(description.classes)})
    absent = [name for label, name in enumerate(description.short_names) if not (labels == label).any()]
    if absent:
        unused.append(f"There are no images of {join_names(absent)}.")
    if not files.grouped:
        unused.append("No patients are known (--group), so each image counts as one and intervals may be too narrow.")
    images = TrialImages(
        tuple(files.root / path for path in files.table["path"]),
        np.asarray(labels, dtype=np.int64),
        np.array([format_path(name) for name in files.table["group"]], dtype=np.str_),
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


# --- variants ---
# Each image is decoded once. All its variants are one batch, so that variants that do not differ give the same numbers
# to the last bit, whatever the other images are.


@dataclass(frozen=True, eq=False)
class VariantOutputs:
    """What the network says about n images in several variants.

    Attributes:
        variants: Names of the variants: whole, KIND/GRADE, blank (the field's shape only), alone/REGION,
            hidden/REGION.
        logits: float64 of shape (variants, n, classes).
        unlikeness: float64 of shape (variants, n).
        has_border: Whether a border surrounds the field of view, of shape (n,).
        has_overlays: Whether text or plates were detected, of shape (n,).
        rows: Which of the images could be read, indices of shape (n,).
        problems: Why each other image could not be read.
    """

    variants: tuple[str, ...]
    logits: NDArray[np.float64]
    unlikeness: NDArray[np.float64]
    has_border: NDArray[np.bool_]
    has_overlays: NDArray[np.bool_]
    rows: NDArray[np.int64]
    problems: tuple[str, ...] = ()

    def get_logits(self, variant: str) -> NDArray[np.float64]:
        """Return the logits of a variant, of shape (n, classes)."""
        return np.asarray(self.logits[self.variants.index(variant)])


@dataclass(frozen=True, eq=False)
class _Prepared:
    """The variants of an image as the network's input, uint8 of shape (variants, size, size, 3)."""

    images: NDArray[np.uint8]
    has_border: bool
    has_overlays: bool


def compute_variants(
    sources: Sequence[Path | RGB],
    form: InputFormat,
    run_network: Callable[[NDArray[np.uint8]], NetworkOutput],
    variants: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 32,
    progress: bool = True,
) -> VariantOutputs:
    """Run the network on all variants of images.

    Args:
        sources: Files; or decoded images, uint8 RGB of shape (height, width, 3).
        form: How an image is prepared for the network.
        run_network: Function of uint8 RGB images of shape (n, size, size, 3), such as `InferenceModel.run_network`.
        variants: Names of variants; see `VariantOutputs`.
        seed: Seed of the degradations.
        batch: Batch size of the network, in images.
        progress: Whether to show a progress bar.

    Raises:
        PylorusError: If no image can be read.
    """
    cv2.setNumThreads(0)
    fill = _compute_fill(sources, form)

    def prepare(source: Path | RGB) -> _Prepared | str:
        try:
            image = read_image(source, policy=form.policy) if isinstance(source, Path) else source
        except UnreadableImageError as error:
            return str(error)
        return _prepare_variants(image, form, fill, variants, seed)

    logits, unlikeness, flags, rows, problems = [], [], [], [], []
    in_threads = bool(sources) and not isinstance(sources[0], Path)
    results: Any = map_items(prepare, sources, in_threads=in_threads, name=lambda source: str(source)[:200])
    bar = open_progress_bar("stressing images", len(sources), shown=progress)
    with bar, closing(results):
        for row, prepared in enumerate(results):
            bar.update(1)
            if isinstance(prepared, str):
                problems.append(prepared)
                continue
            outputs = [run_network(part) for part in _split_into_batches(prepared.images, batch)]
            logits.append(torch.cat([each.logits for each in outputs]).double().numpy())
            unlikeness.append(torch.cat([each.unlikeness for each in outputs]).double().numpy())
            flags.append((prepared.has_border, prepared.has_overlays))
            rows.append(row)
    if not rows:
        raise PylorusError(f"None of the {format_count(len(sources), 'image')} can be read: {problems[0]}")
    border, overlays = np.array(flags, dtype=bool).T
    return VariantOutputs(
        tuple(variants),
        np.stack(logits, axis=1),
        np.stack(unlikeness, axis=1),
        border,
        overlays,
        np.array(rows, dtype=np.int64),
        tuple(problems),
    )


def _split_into_batches(images: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _compute_fill(sources: Sequence[Path | RGB], form: InputFormat) -> NDArray[np.uint8]:
    """Compute the mean colour inside the fields of view of some images, the same for all of them."""
    colours = []
    for index in np.unique(np.linspace(0, len(sources) - 1, min(FILL_IMAGES, len(sources))).astype(int)):
        source = sources[index]
        try:
            image = read_image(source, policy=form.policy) if isinstance(source, Path) else source
        except UnreadableImageError:
            continue
        colours.append(image[draw_field_mask(find_field(image), image.shape)].mean(axis=0))
    return np.asarray(np.rint(np.mean(colours, axis=0) if colours else np.full(3, 128)), dtype=np.uint8)


def _prepare_variants(
    image: RGB, form: InputFormat, fill: NDArray[np.uint8], variants: Sequence[str], seed: int
) -> _Prepared:
    field, content = find_field(image), compute_content_hash(image)
    surroundings = find_surroundings(image, field)

    def build_variant(variant: str) -> RGB:
        name, _, detail = variant.partition("/")
        if name == WHOLE:
            return image
        if name in (ALONE, BLANK):
            return isolate_region(image, surroundings, detail or None, fill)
        if name == HIDDEN:
            return hide_region(image, surroundings, detail)
        return degrade_image(image, name, int(detail), seed=seed, field=field, content=content)

    images = np.stack([form.prepare_image(build_variant(variant), field=field) for variant in variants])
    return _Prepared(images, surroundings.has_border, bool(surroundings.overlays))


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
            evaluate_regions(outputs, images.labels, groups, calibrate=bundle.calibrate_logits, seed=options.seed)
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
    calibrate: Callable[[NDArray[np.float64]], NDArray[np.float64]] = probabilities_of_logits,
    seed: int = 0,
) -> list[RegionResult]:
    """Test for each region without tissue whether it alone is better than chance, and what hiding it changes.

    Args:
        outputs: The result of `compute_variants`, with the variants `REGION_VARIANTS`.
        true: True classes, of shape (n,).
        groups: Patient of each image, of shape (n,), or None.
        calibrate: Returns the calibrated probabilities of logits, such as `InferenceModel.calibrate_logits`.
        seed: Seed of the permutations.
    """
    whole = calibrate(outputs.get_logits(WHOLE))
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
        hidden = calibrate(outputs.get_logits(f"{HIDDEN}/{region}")[rows])
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
