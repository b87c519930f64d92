"""Check copies: a leak across splits, a contradiction across classes, a double count across patients."""

from collections.abc import Sequence
from itertools import product

from pylorus.data.audit.duplicates import Copies, NearCopy
from pylorus.data.audit.findings import Finding, Item, Severity, format_quantity
from pylorus.data.audit.image_set import ImageSet

SPLITS, CLASSES, GROUPS, WITHIN = "splits", "classes", "groups", "within"
"""Boundaries that copies may cross, the most severe first."""


def check_copies(images: ImageSet, copies: Copies) -> list[Finding]:
    """Return findings about copies.

    Copies across splits and across classes are reported as both. A pair of near copies is reported once, under the most
    severe boundary that it crosses.
    """
    exact_items: dict[str, list[Item]] = {SPLITS: [], CLASSES: [], GROUPS: [], WITHIN: []}
    near_items: dict[str, list[Item]] = {SPLITS: [], CLASSES: [], GROUPS: [], WITHIN: []}
    exact_copies = _merge_exact_copies(copies)
    for members, similarity in exact_copies.items():
        boundaries = _find_crossed_boundaries(images, members)
        for boundary in [each for each in (SPLITS, CLASSES) if each in boundaries] or boundaries[:1]:
            exact_items[boundary].append(Item(members, _format_copy_detail(similarity, boundaries)))
    identical_files = {index: members for members in exact_copies for index in members}
    for copy in sorted(copies.near, key=lambda each: -each.likeness):
        pair, boundaries = _select_worst_pair(images, copy, identical_files)
        near_items[boundaries[0]].append(Item(pair, _format_copy_detail(copy.description, boundaries)))
    return [
        *(_build_copy_finding("copy", boundary, items) for boundary, items in exact_items.items() if items),
        *(_build_copy_finding("near-copy", boundary, items) for boundary, items in near_items.items() if items),
        *_report_uncompared_images(copies),
    ]


def _merge_exact_copies(copies: Copies) -> dict[tuple[int, ...], str]:
    """Return groups of files with identical pixels, and whether their bytes are identical too."""
    by_pixels = dict.fromkeys(copies.same_pixels, "identical pixels")
    covered = {index for members in by_pixels for index in members}
    return by_pixels | {
        members: "identical files" for members in copies.same_bytes if not covered.intersection(members)
    }


def _find_crossed_boundaries(images: ImageSet, files: Sequence[int]) -> list[str]:
    """Return the boundaries that copies cross, the most severe first; never empty."""
    rows = images.table.iloc[list(files)]
    splits = images.has_split and rows["split"].nunique() > 1
    # Without patients and splits, an image and its copy may end up in different splits.
    groups = rows["group"].nunique() > 1 if images.grouped else not images.has_split
    crossed = [(SPLITS, splits), (CLASSES, rows["class"].nunique() > 1), (GROUPS, groups)]
    return [boundary for boundary, is_crossed in crossed if is_crossed] or [WITHIN]


def _select_worst_pair(
    images: ImageSet, copy: NearCopy, identical_files: dict[int, tuple[int, ...]]
) -> tuple[tuple[int, int], list[str]]:
    """Choose the pair to report for a near copy: of identical files, the one across the most severe boundary."""
    # Of identical files, one of each split and class is enough: comparing all pairs could take very long.
    first, second = (
        _select_representatives(images, identical_files.get(index, (index,))) for index in (copy.first, copy.second)
    )
    pairs = product(first, second)
    candidates = [(pair, _find_crossed_boundaries(images, pair)) for pair in pairs]
    severity = (SPLITS, CLASSES, GROUPS, WITHIN)
    return min(candidates, key=lambda each: severity.index(each[1][0]))


def _select_representatives(images: ImageSet, files: tuple[int, ...]) -> list[int]:
    """Return the first of the files of each split and class."""
    rows = images.table.iloc[list(files)][["split", "class"]].reset_index(drop=True)
    return [files[index] for index in rows.drop_duplicates().index]


def _format_copy_detail(similarity: str, boundaries: list[str]) -> str:
    names = {SPLITS: "in two splits", CLASSES: "of two classes", GROUPS: "of two groups"}
    crossed = ", ".join(names[boundary] for boundary in boundaries if boundary in names)
    return f"{similarity}; {crossed}" if crossed else similarity


_SEVERITIES: dict[tuple[str, str], Severity] = {
    ("copy", SPLITS): "leak",
    ("copy", CLASSES): "error",
    ("copy", GROUPS): "warning",
    ("copy", WITHIN): "note",
    ("near-copy", SPLITS): "leak",
    ("near-copy", CLASSES): "warning",
    ("near-copy", GROUPS): "warning",
    ("near-copy", WITHIN): "note",
}
_WHERE = {
    SPLITS: "in more than one split: a model is tested on images that it was trained on.",
    CLASSES: "in more than one class: at most one of the labels is correct.",
    GROUPS: "in more than one group: the groups are the same patient, or a file is assigned to the wrong one.",
    WITHIN: "within one class and group: each counts more than once.",
}
_REMEDIES = {
    SPLITS: "Keep one of each, or move all of them to the same split.",
    CLASSES: "Find out which label is correct, and remove the other file.",
    GROUPS: "Keep one of each, or assign them to one group, so that they stay in one split.",
    WITHIN: "Keep one of each, unless they should count more than once.",
}


def _build_copy_finding(kind: str, boundary: str, items: list[Item]) -> Finding:
    if kind == "copy":
        files = sum(len(item.files) for item in items)
        subject = f"{format_quantity(len(items), 'image')} (in {files:,} files)"
    else:
        subject = f"{format_quantity(len(items), 'pair')} of nearly identical images"
    verb = "occurs" if len(items) == 1 else "occur"
    code = kind if boundary == WITHIN else f"{kind}-across-{boundary}"
    remedy = _REMEDIES[boundary] if kind == "copy" else f"Inspect the pairs. {_REMEDIES[boundary]}"
    return Finding(code, _SEVERITIES[kind, boundary], f"{subject} {verb} {_WHERE[boundary]}", remedy, tuple(items))


def _report_uncompared_images(copies: Copies) -> list[Finding]:
    findings = []
    if copies.blank:
        findings.append(
            Finding(
                "blank",
                "warning",
                f"{format_quantity(len(copies.blank), 'image')} without contrast: nothing can be seen.",
                "Inspect and remove them. They were not compared with other images.",
                tuple(Item((index,)) for index in copies.blank),
            )
        )
    if copies.crowded:
        one = len(copies.crowded) == 1
        findings.append(
            Finding(
                "compared-in-part",
                "note",
                f"{format_quantity(len(copies.crowded), 'image')} {'resembles' if one else 'resemble'} so many others "
                "that only some of these were compared: near copies may have been missed.",
                "Fix the other findings and run the audit again.",
                tuple(Item((index,)) for index in copies.crowded),
            )
        )
    return findings
