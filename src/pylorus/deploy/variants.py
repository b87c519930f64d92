"""Run a network on variants of images: degraded, with a region alone, with a region hidden.

Each image is decoded once. All its variants are one batch, so that variants that do not differ give the same numbers to
the last bit, whatever the other images are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pylorus.core.distributed import map_items
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.formatting import format_count, open_progress_bar
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
from pylorus.model.inference import NetworkOutput

WHOLE, BLANK, ALONE, HIDDEN = "whole", "blank", "alone", "hidden"
FILL_IMAGES = 48
"""Images whose fields give the fill colour."""
DEGRADED_VARIANTS = tuple(f"{name}/{grade}" for name in DEGRADATIONS for grade in range(1, GRADES + 1))
REGION_VARIANTS = (BLANK, *(f"{how}/{region}" for how in (ALONE, HIDDEN) for region in REGIONS))


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
