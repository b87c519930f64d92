"""Fields of view: what `data.crop=auto` would cut from some images of each class."""

from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.data.audit.findings import Finding, Item
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.content import Place, contents
from pylorus.data.facts import Facts
from pylorus.data.field import find_field
from pylorus.data.image import RGB, UnreadableImageError, decode

OF_EACH_CLASS = 12
"""Images of a class that are looked at: finding a field takes longer than all else, and a class has few devices."""
LEAST_BORDER = 0.02
"""Share of the frame: with less black at its edge there is nothing to cut."""


@dataclass(frozen=True)
class SeenField:
    """The field of view of one image.

    Attributes:
        file: Its position in the image set's table.
        shape: `full` where nothing is cut away, else its shape in words.
        cut: Share of the frame that is cut away or blacked, in [0, 1].
        reason: Why this is the field, or why none was found.
    """

    file: int
    shape: str
    cut: float
    reason: str


def look_for_fields(images: ImageSet, facts: Sequence[Facts]) -> tuple[SeenField, ...]:
    """The fields of view of up to OF_EACH_CLASS images a class, chosen by content: the same at each audit.

    Images without a black edge are passed over: they are all field.
    """
    seen = []
    for place in _chosen(images, facts):
        image = image_of(images.root / images.table["path"].iloc[place])
        if image is None:
            continue  # gone since it was looked at: then there is nothing to show
        field = find_field(image)
        left, top, right, bottom = field.box
        kept = (right - left) * (bottom - top) if field.mask is None else int(field.mask.sum())
        seen.append(SeenField(place, field.shape, 1 - kept / (image.shape[0] * image.shape[1]), field.reason))
    return tuple(seen)


def image_of(path: Place) -> RGB | None:
    """The image in a file; None where it is gone or can't be read any more."""
    try:
        return decode(contents(path))
    except UnreadableImageError:
        return None


def field_findings(fields: Sequence[SeenField]) -> list[Finding]:
    """One note: in how many images there is something to cut, and where none was found beside a black border."""
    cut = [each for each in fields if each.shape != "full"]
    if not fields:
        return []
    shares = sorted(each.cut for each in cut)
    said = f" ({shares[0]:.0%} to {shares[-1]:.0%} of the frame)" if cut else ""
    return [
        Finding(
            "field-of-view",
            "note",
            f"Of {len(fields)} images with a black edge that were looked at, data.crop=auto would cut {len(cut)}{said} "
            f"and leave {len(fields) - len(cut)} as they are.",
            "Look at the outlines below. Where they fit, set data.crop=auto.",
            tuple(Item((each.file,), each.reason) for each in fields),
        )
    ]


def _chosen(images: ImageSet, facts: Sequence[Facts]) -> list[int]:
    chosen: list[int] = []
    for _, rows in images.table.groupby("class"):
        edged = [
            (facts[place].sha256, place)
            for place in map(int, rows.index)
            if facts[place].readable and facts[place].border >= LEAST_BORDER
        ]
        chosen += [place for _, place in sorted(edged)[:OF_EACH_CLASS]]
    return sorted(chosen)
