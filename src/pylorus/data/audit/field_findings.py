"""Check fields of view: what `data.crop=auto` would crop from a sample of the images."""

from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.data.audit.findings import Finding, Item, format_quantity
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.content import ImageLocation, read_image_bytes
from pylorus.data.facts import Facts
from pylorus.data.field import find_field
from pylorus.data.image import RGB, UnreadableImageError, decode_image

IMAGES_PER_CLASS = 12
"""Images per class in the sample: finding a field is the slowest step, and a class has few devices."""
LEAST_BORDER = 0.02
"""Fraction of the frame: with less black at its edge, there is nothing to crop."""


@dataclass(frozen=True)
class FieldSample:
    """The field of view of one image.

    Attributes:
        file: Index of the image in the image set's table.
        shape: `full` if nothing is cropped, else its shape in words.
        cut: Fraction of the frame that is cropped or blacked out, in [0, 1].
        reason: Why this is the field, or why none was found.
    """

    file: int
    shape: str
    cut: float
    reason: str


def sample_fields(images: ImageSet, facts: Sequence[Facts]) -> tuple[FieldSample, ...]:
    """Find the fields of view of up to `IMAGES_PER_CLASS` images per class.

    Images are selected by content, so every audit selects the same. Images without a black edge are skipped: they
    are all field.
    """
    fields = []
    for index in _select_images(images, facts):
        image = load_image_if_readable(images.root / images.table["path"].iloc[index])
        if image is None:
            continue  # deleted since its facts were computed: there is nothing to show
        field = find_field(image)
        left, top, right, bottom = field.box
        field_pixels = (right - left) * (bottom - top) if field.mask is None else int(field.mask.sum())
        fields.append(
            FieldSample(index, field.shape, 1 - field_pixels / (image.shape[0] * image.shape[1]), field.reason)
        )
    return tuple(fields)


def load_image_if_readable(path: ImageLocation) -> RGB | None:
    """Decode the image in a file; return None if it is missing or no longer readable."""
    try:
        return decode_image(read_image_bytes(path))
    except UnreadableImageError:
        return None


def check_fields(fields: Sequence[FieldSample]) -> list[Finding]:
    """Return a note on how many of the images would be cropped, or nothing if there are none."""
    cropped = [each for each in fields if each.shape != "full"]
    if not fields:
        return []
    fractions = sorted(each.cut for each in cropped)
    range_of_fractions = f" ({fractions[0]:.0%} to {fractions[-1]:.0%} of the frame)" if cropped else ""
    return [
        Finding(
            "field-of-view",
            "note",
            f"In a sample of {format_quantity(len(fields), 'image')} with a black edge, data.crop=auto would crop "
            f"{len(cropped)}{range_of_fractions} and leave {len(fields) - len(cropped)} unchanged.",
            "Inspect the outlines below. If they fit, set data.crop=auto.",
            tuple(Item((each.file,), each.reason) for each in fields),
        )
    ]


def _select_images(images: ImageSet, facts: Sequence[Facts]) -> list[int]:
    selected: list[int] = []
    for _, rows in images.table.groupby("class"):
        candidates = [
            (facts[index].sha256, index)
            for index in map(int, rows.index)
            if facts[index].readable and facts[index].border >= LEAST_BORDER
        ]
        selected += [index for _, index in sorted(candidates)[:IMAGES_PER_CLASS]]
    return sorted(selected)
