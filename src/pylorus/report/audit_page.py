"""The audit's page: what is wrong with an image set, with pictures; one HTML file that opens offline."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from markupsafe import Markup

from pylorus import __version__
from pylorus.data.audit.audit import Audit, numbered_groups
from pylorus.data.audit.field_findings import image_of
from pylorus.data.audit.findings import Finding, Item, Severity
from pylorus.data.field import FieldOfView, find_field
from pylorus.data.image import RGB
from pylorus.data.unreadable import shown
from pylorus.report.page import file, template
from pylorus.report.thumbnails import SIDE, small_jpeg

PICTURED = 12
"""Cases of a finding that are shown as pictures; the others are listed."""
SIDE_BY_SIDE = 8
"""Files of a case that are shown; the others are counted."""
LISTED = 500
"""Cases of a finding that are listed; audit.json holds all."""
OUTLINE = (255, 60, 60)

LIMITS = (
    "Text over the mucosa, dark letters on a bright bar and letters that touch the field of view are not seen; a logo "
    "or a scale in the border counts as text.",
    "Near copies are found up to a re-encoding, a change of size and a turn by a quarter or a mirror; a crop, a turn "
    "by a few degrees and neighbouring frames of one video may be missed.",
    "Whether a label is true is not judged, but where one image has two of them.",
    "Groups are taken as given: two names for one patient are found only where their images are copies.",
)


@dataclass(frozen=True)
class Picture:
    """A small picture of a file; without one where there is none, or where none may be shown."""

    jpeg: str
    name: str


@dataclass(frozen=True)
class Case:
    """One case of a finding: its files, and what was found there."""

    pictures: tuple[Picture, ...]
    detail: str


@dataclass(frozen=True)
class Told:
    """A finding as the page shows it."""

    code: str
    severity: Severity
    sentence: str
    mend: str
    pictured: tuple[Case, ...]
    listed: tuple[Case, ...]
    left_out: int


def audit_page(found: Audit, *, names: bool) -> str:
    """The page as HTML.

    Args:
        found: The audit.
        names: Whether files are named and shown; else they are told by sample id, without pictures.
    """
    return template("audit.html.j2").render(
        found=found,
        root=str(found.images.root) if names else "an image set",
        names=names,
        told=[_told(found, finding, names=names) for finding in found.findings],
        sizes=found.sizes,
        limits=LIMITS,
        style=Markup(file("page.css") + file("audit.css")),
        version=__version__,
    )


def _told(found: Audit, finding: Finding, *, names: bool) -> Told:
    outlined, groups = finding.code == "field-of-view", {} if names else numbered_groups(found)
    # Fields of view are judged by eye, and stand in the order of the classes.
    most = len(finding.items) if outlined else PICTURED
    pictured = finding.items[:most] if names else ()
    rest = finding.items[len(pictured) :]
    return Told(
        finding.code,
        finding.severity,
        finding.sentence,
        finding.mend,
        tuple(_case(found, item, groups, names=names, pictures=True, outlined=outlined) for item in pictured),
        tuple(_case(found, item, groups, names=names, pictures=False) for item in rest[:LISTED]),
        max(0, len(rest) - LISTED),
    )


def _case(
    found: Audit, item: Item, groups: Mapping[str, str], *, names: bool, pictures: bool, outlined: bool = False
) -> Case:
    paths = found.images.table["path"]
    said = [item.detail, item.content if names else ""]
    files = _of_each_part(found, item.files)[:SIDE_BY_SIDE] if pictures else item.files
    if len(files) < len(item.files):
        said.append(f"and {len(item.files) - len(files)} files more")
    if item.group:
        said.append(item.group if names else groups[item.group])
    return Case(
        tuple(
            Picture(
                _jpeg(found, index, outlined=outlined) if pictures else "",
                shown(paths.iloc[index]) if names else found.samples[index],
            )
            for index in files
        ),
        ": ".join(filter(None, said)),
    )


def _of_each_part(found: Audit, files: tuple[int, ...]) -> tuple[int, ...]:
    """Files of a case in turn from each part of the split and each class: what lies across them is seen at once."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for index in files:
        row = found.images.table.iloc[index]
        kind = (str(row["split"]), str(row["class"]))
        turns.append((seen[kind], index))
        seen[kind] += 1
    return tuple(index for _, index in sorted(turns))


def _jpeg(found: Audit, index: int, *, outlined: bool) -> str:
    """A file's picture in base64, without any of its metadata; empty where it gives none."""
    image = image_of(found.images.root / found.images.table["path"].iloc[index])
    if image is None:
        return ""
    if outlined:
        image = with_outline(image, find_field(image))
    return small_jpeg(image)


def with_outline(image: RGB, field: FieldOfView) -> RGB:
    """The image with the edge of its field of view drawn on it, broad enough to be seen in a small picture."""
    inside = np.zeros(image.shape[:2], dtype=np.uint8)
    left, top, right, bottom = field.box
    inside[top:bottom, left:right] = 255 if field.mask is None else 255 * field.mask.astype(np.uint8)
    edges, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = image.copy()
    cv2.drawContours(drawn, edges, -1, OUTLINE, thickness=max(2, max(image.shape) // SIDE * 2))
    return np.asarray(drawn, dtype=np.uint8)
