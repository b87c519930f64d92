"""Checks of an audit that concern the pixels: quality, shortcuts that reveal the class, and the field of view.

Quality: blurred or dark images, black borders, burned-in text. Fields: what `data.crop=auto` would crop from a sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import format_count, format_percent
from pylorus.data.audit_findings import Finding, ImageSet, Item, Thresholds
from pylorus.data.decode import UnreadableImageError, decode_image
from pylorus.data.fact_store import Facts, extract_fact_column
from pylorus.data.field_of_view import find_field
from pylorus.data.files import RGB, ImageLocation, read_image_bytes
from pylorus.data.image_measures import PLACES
from pylorus.data.overlays import find_overlays

MIN_FRAMES_OF_A_SIZE = 8
"""Images of one size from which shapes are compared between them."""
MIN_SPREAD = {"sharpness": 0.1, "brightness": 4.0}
"""Least spread (log units, grey levels): otherwise small differences in a homogeneous set would be outliers."""

Mask = NDArray[np.bool_]


def check_image_quality(images: ImageSet, facts: Sequence[Facts], thresholds: Thresholds) -> list[Finding]:
    """Return findings about image quality; outliers are relative to the median of the set."""
    indices = np.flatnonzero(extract_fact_column(facts, "problem") == "")
    if not len(indices):
        return []
    classes = images.table["class"].to_numpy()[indices].astype(np.str_)
    border, covered = extract_fact_column(facts, "border")[indices], extract_fact_column(facts, "covered")[indices]
    sharpness, brightness = (
        extract_fact_column(facts, "sharpness")[indices],
        extract_fact_column(facts, "brightness")[indices],
    )
    has_border, rows = border >= thresholds.border, extract_fact_column(facts, "text")[indices]
    has_text = (rows > 0) | find_repeated_text(facts, indices, thresholds)
    return [
        *_check_sharpness_and_brightness(indices, sharpness, brightness, thresholds),
        *_check_borders(indices, border, has_border),
        *_check_shortcut("border", "a black border", has_border, classes, thresholds),
        *_check_text(indices, rows, has_text),
        *_check_overlays(indices, covered),
        *_check_shortcut("text", "signs of burned-in text", has_text, classes, thresholds),
    ]


def measure_deviation_below_median(values: NDArray[np.float64], *, least_spread: float) -> NDArray[np.float64]:
    """Compute how many robust standard deviations each value is below the median, of shape (images,).

    The robust standard deviation is 1.4826 times the median absolute deviation (Rousseeuw and Croux 1993), which
    outliers do not inflate.

    Example:
        >>> measure_deviation_below_median(np.array([10.0, 11, 9, 10, 1]), least_spread=0.1).round(1).tolist()
        [0.0, -0.7, 0.7, 0.0, 6.1]
    """
    median = np.median(values)
    spread = max(1.4826 * float(np.median(np.abs(values - median))), least_spread)
    return np.asarray((median - values) / spread, dtype=np.float64)


def _check_sharpness_and_brightness(
    indices: NDArray[np.int64],
    sharpness: NDArray[np.float64],
    brightness: NDArray[np.float64],
    thresholds: Thresholds,
) -> list[Finding]:
    sharpness = np.log(np.maximum(sharpness, 1e-3))
    has_reference = len(indices) >= thresholds.least_for_outliers
    blur_score = measure_deviation_below_median(sharpness, least_spread=MIN_SPREAD["sharpness"])
    dark_score = measure_deviation_below_median(brightness, least_spread=MIN_SPREAD["brightness"])
    is_black = brightness < thresholds.black
    is_dark = is_black | ((dark_score >= thresholds.outlier) & has_reference)
    is_blurred = (blur_score >= thresholds.outlier) & has_reference & ~is_dark  # dark images have faint edges
    findings = []
    if is_blurred.any():
        relative = np.exp(sharpness - np.median(sharpness))
        findings.append(
            Finding(
                "blurred",
                "warning",
                f"{format_count(int(is_blurred.sum()), 'image')} much less sharp than the others.",
                "Inspect them: out of focus, motion blur or upscaled? A model can't learn from images that "
                "don't show the finding.",
                _build_items(
                    indices,
                    is_blurred,
                    -blur_score,
                    lambda index: f"sharpness {format_percent(relative[index], digits=0)} % of the set's median",
                ),
            )
        )
    if is_dark.any():
        median = np.median(brightness)
        findings.append(
            Finding(
                "dark",
                "warning",
                f"{format_count(int(is_dark.sum()), 'image')} much darker than the others.",
                "Inspect them: was the light off, the lens covered, or the exposure wrong?",
                _build_items(
                    indices,
                    is_dark,
                    brightness,
                    lambda index: f"mean grey level {brightness[index]:.0f}, the set's median is {median:.0f}",
                ),
            )
        )
    return findings


def _check_borders(indices: NDArray[np.int64], border: NDArray[np.float64], has_border: Mask) -> list[Finding]:
    if not has_border.any():
        return []
    percent = np.round(100 * border).astype(int).tolist()
    texts = {value: f"{format_percent(value / 100, digits=0)} % of the frame" for value in set(percent)}
    return [
        Finding(
            "black-border",
            "note",
            f"{format_count(int(has_border.sum()), 'image')} of {len(indices):,} with a black border.",
            "data.crop=auto crops to the field of view; the audit's page shows what it would crop.",
            _build_items(
                indices,
                has_border,
                -border,
                lambda index: texts[percent[index]],
            ),
        )
    ]


def find_repeated_text(facts: Sequence[Facts], indices: NDArray[np.int64], thresholds: Thresholds) -> Mask:
    """Find images with a text-like shape where many images of the same size have one.

    A few letters can't be told from reflections in a single frame; but reflections lie elsewhere in each frame, while a
    console writes at the same places.

    Args:
        facts: Facts of files.
        indices: Indices of the readable images into `facts`.
        thresholds: `repeated` is used.

    Returns:
        Whether each of the readable images has such a shape.
    """
    width, height = (extract_fact_column(facts, name)[indices].astype(np.float64) for name in ("width", "height"))
    digits = "".join(extract_fact_column(facts, "places")[indices])
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)).reshape(-1, PLACES, PLACES)
    near = bits.copy()  # frames are cut out slightly differently: cells beside a shape count as well
    for axis in (1, 2):
        near |= np.roll(near, 1, axis) | np.roll(near, -1, axis)
    # Sizes that differ by up to 5 %: public sets crop frames of one device to slightly different sizes.
    sizes = np.round(np.log(np.stack([width, height], axis=1)) / np.log(1.05)).astype(np.int64)
    is_repeated = np.zeros(len(indices), dtype=bool)
    for size in np.unique(sizes, axis=0):
        members = np.flatnonzero((sizes == size).all(axis=1))
        if len(members) < MIN_FRAMES_OF_A_SIZE:
            continue
        share = near[members].mean(axis=0)
        usual = share >= max(thresholds.repeated, 3 * float(np.median(share)))
        is_repeated[members] = (bits[members].astype(bool) & usual).any(axis=(1, 2))
    return is_repeated


def _check_text(indices: NDArray[np.int64], rows: NDArray[np.int64], has_text: Mask) -> list[Finding]:
    if not has_text.any():
        return []
    return [
        Finding(
            "burned-in-text",
            "warning",
            f"{format_count(int(has_text.sum()), 'image')} of {len(indices):,} with signs of burned-in text: it may "
            "identify the patient or the device.",
            "Export without overlays, or set data.crop=auto, which covers them for the network (data.mask), and check "
            "what remains before you share images.",
            _build_items(
                indices,
                has_text,
                -rows,
                lambda index: f"{format_count(int(rows[index]), 'row')} of text" if rows[index] else "a few letters",
            ),
        )
    ]


def _check_overlays(indices: NDArray[np.int64], covered: NDArray[np.float64]) -> list[Finding]:
    is_covered = covered > 0
    if not is_covered.any():
        return []
    return [
        Finding(
            "overlays",
            "note",
            f"data.mask=overlays would cover text or plates in {format_count(int(is_covered.sum()), 'image')} of "
            f"{len(indices):,}: {format_percent(float(np.median(covered[is_covered])))} % of the frame in the median, "
            f"at most {format_percent(float(covered.max()))} %.",
            "It is the default with data.crop=auto. Inspect the images: what is covered is outlined in the sample of "
            "fields of view.",
            _build_items(
                indices, is_covered, -covered, lambda index: f"{format_percent(covered[index])} % of the frame"
            ),
        )
    ]


def _check_shortcut(
    name: str, feature: str, has_feature: Mask, classes: NDArray[np.str_], thresholds: Thresholds
) -> list[Finding]:
    """Return a finding if something other than the mucosa distinguishes the classes."""
    names, counts = np.unique(classes, return_counts=True)
    proportions = {
        str(each): float(has_feature[classes == each].mean()) for each in names[counts >= thresholds.least_for_shortcut]
    }
    if len(proportions) < 2 or max(proportions.values()) - min(proportions.values()) < thresholds.shortcut:
        return []
    proportions_text = ", ".join(f"{each} {format_percent(share, digits=0)} %" for each, share in proportions.items())
    return [
        Finding(
            f"{name}-tells-the-class",
            "warning",
            f"The proportion of images with {feature} differs between classes ({proportions_text}): a model may "
            "learn this instead of the disease.",
            "Set data.crop=auto, or use images of all classes from the same devices and exports; compare the results "
            "with and without cropping.",
        )
    ]


def _build_items(
    indices: NDArray[np.int64], selected: Mask, rank: NDArray[np.generic], format_detail: Callable[[int], str]
) -> tuple[Item, ...]:
    """Build the occurrences at the selected positions of `indices`, those of the lowest rank first."""
    order = np.argsort(rank, kind="stable")
    order = order[selected[order]]
    files = indices[order].tolist()
    return tuple(Item((file,), format_detail(index)) for file, index in zip(files, order.tolist(), strict=True))


IMAGES_PER_SHAPE = 8
"""Images of each shape on the sheet of fields: half of them the least certain, half of them as they mostly are."""


@dataclass(frozen=True)
class FieldSample:
    """The field of view of one image.

    Attributes:
        file: Index of the image in the image set's table.
        shape: `full` if nothing is cropped, else its shape in words.
        cut: Fraction of the frame that is cropped or blacked out, in [0, 1].
        covered: Fraction of the field that data.mask=overlays covers, in [0, 1].
        reason: Why this is the field, or why none was found.
    """

    file: int
    shape: str
    cut: float
    covered: float
    reason: str


def sample_fields(images: ImageSet, facts: Sequence[Facts]) -> tuple[FieldSample, ...]:
    """Find the fields of view of up to `IMAGES_PER_SHAPE` images of each shape, the commonest shape first.

    Of each shape, the images whose fields are least certain come first. Images are selected by content, so every audit
    selects the same. If nothing would be cropped in any image, there is nothing to show.
    """
    fields = []
    for index in _select_images(facts):
        image = load_image_if_readable(images.root / images.table["path"].iloc[index])
        if image is None:
            continue  # deleted since its facts were computed: there is nothing to show
        field = find_field(image)
        left, top, right, bottom = field.box
        field_pixels = field.measure_area()
        covered = find_overlays(image).draw_mask(image.shape)[top:bottom, left:right]
        covered_pixels = int((covered if field.mask is None else covered & field.mask).sum())
        cut = 1 - field_pixels / (image.shape[0] * image.shape[1])
        fields.append(FieldSample(index, field.shape, cut, covered_pixels / field_pixels, field.reason))
    return tuple(fields)


def load_image_if_readable(path: ImageLocation) -> RGB | None:
    """Decode the image in a file; return None if it is missing or no longer readable."""
    try:
        return decode_image(read_image_bytes(path))
    except UnreadableImageError:
        return None


def check_fields(fields: Sequence[FieldSample], facts: Sequence[Facts]) -> list[Finding]:
    """Return a note on the shapes of the fields of all images, with a sheet of some of each, or nothing."""
    if not fields:
        return []
    outcomes, counts = count_fields(facts)
    by_outcome = dict(zip(outcomes, counts, strict=True))
    outside = extract_fact_column(facts, "outside")[extract_fact_column(facts, "outside") > 0]
    fractions = (
        f" ({format_percent(float(outside.min()), digits=0)} to {format_percent(float(outside.max()), digits=0)} % of "
        "the frame)"
        if len(outside)
        else ""
    )
    whole, unclear = by_outcome.pop(WHOLE, 0), by_outcome.pop(UNCLEAR, 0)
    shapes = [f"{name} {count:,}" for name, count in by_outcome.items()]
    shapes += [f"whole frame {whole:,}"] if whole else []
    shapes += [f"no shape fits {unclear:,}"] if unclear else []
    return [
        Finding(
            "field-of-view",
            "note",
            f"data.crop=auto would crop {sum(by_outcome.values()):,} of {format_count(sum(counts), 'image')}{fractions}"
            f" and leave {whole + unclear:,} unchanged. Fields of view: {', '.join(shapes)}.",
            "Inspect the outlines on the page: of each shape, the least certain come first. If they fit, set "
            "data.crop=auto.",
            tuple(Item((each.file,), _describe_field(each)) for each in fields),
        )
    ]


WHOLE, UNCLEAR = "whole", "unclear"
"""Outcomes of the search for a field, besides its shape: nothing to crop, and ground but no shape that convinces."""


def count_fields(facts: Sequence[Facts]) -> tuple[list[str], list[int]]:
    """Count the images of each outcome of the search for a field, the commonest first; see `Facts.field`."""
    outcomes, counts = np.unique(extract_fact_column(facts, "field").astype(np.str_), return_counts=True)
    order = [index for index in np.argsort(-counts, kind="stable") if outcomes[index]]
    return [str(outcomes[index]) for index in order], [int(counts[index]) for index in order]


def _describe_field(field: FieldSample) -> str:
    percent = format_percent(field.covered)
    return field.reason + (f"; overlays cover {percent} % of it" if field.covered > 0 else "")


def _select_images(facts: Sequence[Facts]) -> list[int]:
    field, digests = extract_fact_column(facts, "field"), extract_fact_column(facts, "sha256")
    certainty = np.where(field == WHOLE, -extract_fact_column(facts, "border"), extract_fact_column(facts, "visible"))
    outcomes, _ = count_fields(facts)
    if set(outcomes) <= {WHOLE}:
        return []
    selected: list[int] = []
    for outcome in outcomes:
        ranked = sorted(np.flatnonzero(field == outcome).tolist(), key=lambda index: (certainty[index], digests[index]))
        worst, others = ranked[: IMAGES_PER_SHAPE // 2], ranked[IMAGES_PER_SHAPE // 2 :]
        usual = sorted(others, key=lambda index: str(digests[index]))[: IMAGES_PER_SHAPE - len(worst)]
        selected += [*worst, *usual]
    return selected
