"""`pylorus audit`: check an image set, print the findings, and write audit.json and the page audit.html.

The page shows the problems of the set with pictures, in one file that opens offline.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape

from pylorus import __version__
from pylorus.core.errors import format_path
from pylorus.core.formatting import format_count
from pylorus.core.io import check_writable_folder, write_json, write_text
from pylorus.data.audit import Audit, audit, build_group_aliases, convert_audit_to_json
from pylorus.data.audit_findings import Finding, Item, Severity, Thresholds
from pylorus.data.audit_image_checks import load_image_if_readable, sample_fields
from pylorus.data.field_of_view import find_field
from pylorus.data.field_shape import FieldOfView
from pylorus.data.files import RGB
from pylorus.data.image_facts import load_or_compute_facts
from pylorus.data.leakage import find_copies
from pylorus.data.overlays import Overlays, find_overlays
from pylorus.data.sources import list_folder_files, list_manifest_files
from pylorus.report.mistakes import THUMBNAIL_SIDE, encode_thumbnail
from pylorus.report.page import load_template, read_package_file

MAX_PICTURED_CASES = 12
"""Maximum number of cases of a finding shown as pictures; the others are listed."""
MAX_PICTURED_FILES = 8
"""Maximum number of files shown per case; the others are counted."""
MAX_LISTED_CASES = 500
"""Maximum number of cases of a finding that are listed; audit.json contains all."""
OUTLINE_COLOR, OVERLAY_COLOR = (255, 60, 60), (60, 220, 255)

LIMITS = (
    "Dark letters on bright ground, slanted or handwritten text, and a few letters that no other image of the size has "
    "are not detected, nor is a second picture over the field of view. A row of reflections may be mistaken for text.",
    "Near copies are detected after re-encoding, resizing, rotation by multiples of 90 degrees, mirroring, rotation by "
    "up to 5 degrees and cropping by up to a tenth from each side; what is changed more, and frames of a video between "
    "which the endoscope moved, may be missed.",
    "Labels are not verified, except that images with two different labels are reported.",
)
GROUP_LIMIT = "Groups are not verified: two names for one patient are detected only if their images are copies."
PRINTED_CASES, PRINTED_FILES = 3, 4
"""Maximum number of cases of a finding that the terminal shows, and of files of a case."""


@dataclass(frozen=True)
class Picture:
    """A file with its thumbnail as base64 JPEG, empty if the file has no image or must not be shown."""

    jpeg: str
    name: str


@dataclass(frozen=True)
class Case:
    """One case of a finding: its files and a description."""

    pictures: tuple[Picture, ...]
    detail: str


@dataclass(frozen=True)
class FindingView:
    """A finding as shown on the page."""

    code: str
    severity: Severity
    sentence: str
    remedy: str
    pictured: tuple[Case, ...]
    listed: tuple[Case, ...]
    left_out: int


def render_audit_page(audit: Audit, *, names: bool) -> str:
    """Render the audit page as HTML.

    Args:
        audit: The audit.
        names: Whether to show file names and pictures; otherwise files are identified by sample id, without pictures.
    """
    return load_template("audit.html.j2").render(
        audit=audit,
        root=str(audit.images.root) if names else "an image set",
        names=names,
        findings=[_build_finding_view(audit, finding, names=names) for finding in audit.findings],
        sizes=audit.sizes,
        limits=(*LIMITS, GROUP_LIMIT) if audit.images.grouped else LIMITS,
        style=Markup(read_package_file("page.css") + read_package_file("audit.css")),
        version=__version__,
    )


def _build_finding_view(audit: Audit, finding: Finding, *, names: bool) -> FindingView:
    has_outline, groups = finding.code in ("field-of-view", "overlays"), {} if names else build_group_aliases(audit)
    # Fields of view have to be checked visually, so the whole sheet is shown, shape by shape.
    limit = len(finding.items) if finding.code == "field-of-view" else MAX_PICTURED_CASES
    pictured = finding.items[:limit] if names else ()
    remaining = finding.items[len(pictured) :]
    return FindingView(
        finding.code,
        finding.severity,
        finding.sentence,
        finding.remedy,
        tuple(_build_case(audit, item, groups, names=names, pictures=True, outline=has_outline) for item in pictured),
        tuple(_build_case(audit, item, groups, names=names, pictures=False) for item in remaining[:MAX_LISTED_CASES]),
        max(0, len(remaining) - MAX_LISTED_CASES),
    )


def _build_case(
    audit: Audit, item: Item, groups: Mapping[str, str], *, names: bool, pictures: bool, outline: bool = False
) -> Case:
    paths = audit.images.table["path"]
    details = [item.detail, item.content if names else ""]
    files = _sort_across_splits(audit, item.files)[:MAX_PICTURED_FILES] if pictures else item.files
    if len(files) < len(item.files):
        omitted = len(item.files) - len(files)
        details.append(f"and {omitted} more {'file' if omitted == 1 else 'files'}")
    if item.group:
        details.append(item.group if names else groups[item.group])
    return Case(
        tuple(
            Picture(
                _encode_thumbnail(audit, index, outline=outline) if pictures else "",
                format_path(paths.iloc[index]) if names else audit.samples[index],
            )
            for index in files
        ),
        ": ".join(filter(None, details)),
    )


def _sort_across_splits(audit: Audit, files: tuple[int, ...]) -> tuple[int, ...]:
    """Order the files of a case in turn from each split and class, so that overlaps between these are visible first."""
    counts: Counter[tuple[str, str]] = Counter()
    ranks = []
    for index in files:
        row = audit.images.table.iloc[index]
        split_and_class = (str(row["split"]), str(row["class"]))
        ranks.append((counts[split_and_class], index))
        counts[split_and_class] += 1
    return tuple(index for _, index in sorted(ranks))


def _encode_thumbnail(audit: Audit, index: int, *, outline: bool) -> str:
    """Encode the thumbnail of a file as base64 JPEG without metadata; empty if the file has no image."""
    image = load_image_if_readable(audit.images.root / audit.images.table["path"].iloc[index])
    if image is None:
        return ""
    if outline:
        image = draw_field_outline(image, find_field(image), find_overlays(image))
    return encode_thumbnail(image)


def draw_field_outline(image: RGB, field: FieldOfView, overlays: Overlays) -> RGB:
    """Draw outlines of the field of view and of overlays on a copy of the image, thick enough for a thumbnail."""
    inside = np.zeros(image.shape[:2], dtype=np.uint8)
    left, top, right, bottom = field.box
    inside[top:bottom, left:right] = 255 if field.mask is None else 255 * field.mask.astype(np.uint8)
    edges, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    covered, _ = cv2.findContours(
        overlays.draw_mask(image.shape).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    canvas, thickness = image.copy(), max(2, max(image.shape) // THUMBNAIL_SIDE * 2)
    cv2.drawContours(canvas, edges, -1, OUTLINE_COLOR, thickness=thickness)
    cv2.drawContours(canvas, covered, -1, OVERLAY_COLOR, thickness=max(1, thickness // 2))
    return np.asarray(canvas, dtype=np.uint8)


AUDIT_PAGE = "audit.html"
COLOURS = {"leak": "bold red", "error": "red", "warning": "yellow", "note": "default"}


def audit_images(root: Path, *, manifest: Path | None, group: str | None, cache: Path | None) -> Audit:
    """Audit an image set; writes nothing but the cache.

    Args:
        root: Folder of the image set.
        manifest: CSV or Parquet file that lists the images; None for class folders.
        group: Regular expression that finds the patient in a path; None for no groups.
        cache: Folder that caches facts about files by content; None for no cache.

    Raises:
        PylorusError: If the folder or manifest holds no image set.
    """
    images = (
        list_folder_files(root, group=group) if manifest is None else list_manifest_files(manifest, root, group=group)
    )
    store = None if cache is None else cache / "facts"
    facts = load_or_compute_facts(root, list(images.table["path"]), store=store)
    copies = find_copies(facts, Thresholds(), store=store)
    return audit(images, facts, Thresholds(), fields=sample_fields(images, facts), copies=copies)


def audit_folder(
    root: Path, output: Path, *, manifest: Path | None, group: str | None, names: bool, cache: Path
) -> int:
    """Audit an image set and write the result.

    Args:
        root: Folder of the image set.
        output: Folder for audit.json and audit.html.
        manifest: CSV or Parquet file that lists the images; None for class folders.
        group: Regular expression that finds the patient in a path; None for no groups.
        names: Whether to show file names and pictures.
        cache: Folder that caches facts about files by content; runs use the same cache.

    Returns:
        The exit code: 1 if there is a leak or an error, else 0.

    Raises:
        PylorusError: If the folder or manifest holds no image set, or the output can't be written to.
    """
    check_writable_folder(output, hint="Choose another --output.")
    result = audit_images(root, manifest=manifest, group=group, cache=cache)
    write_json(output / "audit.json", convert_audit_to_json(result, names=names), indent=None)
    write_text(output / AUDIT_PAGE, render_audit_page(result, names=names))
    _print_findings(result, output, names=names)
    return result.exit_code


def _print_findings(result: Audit, output: Path, *, names: bool) -> None:
    """Print the findings, each with what to do and its first cases."""
    console = Console(highlight=False, soft_wrap=True)
    readable = format_count(result.readable, "readable image")
    console.print(f"{format_count(len(result.samples), 'file')}, {readable}")
    if result.images.ignored:
        ignored = format_count(len(result.images.ignored), "other file or folder", "other files and folders")
        console.print(f"{ignored} beside them, which audit.json lists with reasons")
    groups = {} if names else build_group_aliases(result)
    for finding in result.findings:
        console.print(f"\n[{COLOURS[finding.severity]}]{finding.severity}[/]: {escape(finding.sentence)}")
        for item in finding.items[:PRINTED_CASES]:
            shown = Item(item.files[:PRINTED_FILES], item.detail, item.group, item.content)
            case = _build_case(result, shown, groups, names=names, pictures=False)
            files = " · ".join(picture.name for picture in case.pictures)
            if len(item.files) > PRINTED_FILES:
                files += f" and {format_count(len(item.files) - PRINTED_FILES, 'more file')}"
            detail = f" ({case.detail})" if files and case.detail else case.detail
            console.print(f"    {files}{detail}", markup=False)
        if len(finding.items) > PRINTED_CASES:
            console.print(f"    and {len(finding.items) - PRINTED_CASES:,} more: see {AUDIT_PAGE}")
        console.print(f"  {finding.remedy}", markup=False)
    if not result.findings:
        console.print("no problems found")
    console.print(f"\n{output / AUDIT_PAGE}\n{output / 'audit.json'}", markup=False)
