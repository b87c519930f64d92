"""Checks of an audit that need no pixels: copies, single files, and the image set as a whole.

Copies are a leak across splits, a contradiction across classes, a double count across patients. Files may be damaged,
misnamed, rotated, of unusual size, or have tags that identify a person. The set may have unbalanced classes, or
patients in several splits or classes.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import PurePosixPath

import pandas as pd

from pylorus.core.formatting import format_count
from pylorus.data.audit_findings import Finding, ImageSet, Item, Severity, Thresholds
from pylorus.data.image_facts import Facts
from pylorus.data.image_measures import FORMAT_SUFFIXES
from pylorus.data.leakage import Copies, NearCopy

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
_LOCATIONS = {
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
        subject = f"{format_count(len(items), 'image')} (in {files:,} files)"
    else:
        subject = f"{format_count(len(items), 'pair')} of nearly identical images"
    verb = "occurs" if len(items) == 1 else "occur"
    code = kind if boundary == WITHIN else f"{kind}-across-{boundary}"
    remedy = _REMEDIES[boundary] if kind == "copy" else f"Inspect the pairs. {_REMEDIES[boundary]}"
    return Finding(code, _SEVERITIES[kind, boundary], f"{subject} {verb} {_LOCATIONS[boundary]}", remedy, tuple(items))


def _report_uncompared_images(copies: Copies) -> list[Finding]:
    findings = []
    if copies.blank:
        findings.append(
            Finding(
                "blank",
                "warning",
                f"{format_count(len(copies.blank), 'image')} without contrast: nothing can be seen.",
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
                f"{format_count(len(copies.crowded), 'image')} {'resembles' if one else 'resemble'} so many others "
                "that only some of these were compared: near copies may have been missed.",
                "Fix the other findings and run the audit again.",
                tuple(Item((index,)) for index in copies.crowded),
            )
        )
    return findings


USUAL_MODES = ("RGB",)


def check_files(images: ImageSet, facts: Sequence[Facts], thresholds: Thresholds) -> list[Finding]:
    """Return findings about single files; see the module docstring."""
    unreadable: list[Item] = []
    kinds: dict[str, list[Item]] = {name: [] for name in ("suffix", "mode", "tiny", "huge", "aspect", "exif", "tags")}
    for index, (path, each) in enumerate(zip(images.table["path"], facts, strict=True)):
        if not each.readable:
            reason, _, content = each.problem.partition(": it begins with ")
            unreadable.append(Item((index,), reason, content=f"it begins with {content}" if content else ""))
            continue
        for name, detail in _find_file_problems(path, each, thresholds):
            kinds[name].append(Item((index,), detail))
    findings = [_build_unreadable_finding(unreadable)]
    findings += [
        _build_file_finding(name, items, each) for name, items in kinds.items() for each in [_FINDING_TEXTS[name]]
    ]
    return [finding for finding in findings if finding.items]


def _find_file_problems(path: str, facts: Facts, thresholds: Thresholds) -> list[tuple[str, str]]:
    """Return the problems of one readable image: keys of `_FINDING_TEXTS`, each with its detail."""
    problems = []
    suffix = PurePosixPath(path).suffix.lower()
    if facts.format and suffix not in FORMAT_SUFFIXES.get(facts.format, (suffix,)):
        problems.append(("suffix", f"contains {facts.format}, named {suffix}"))
    if facts.mode and facts.mode not in USUAL_MODES:
        problems.append(("mode", facts.mode))
    size, (shorter, longer) = f"{facts.width} × {facts.height} pixels", sorted((facts.width, facts.height))
    if shorter < thresholds.shortest:
        problems.append(("tiny", size))
    if longer > thresholds.longest:
        problems.append(("huge", size))
    if longer > thresholds.aspect * shorter:
        problems.append(("aspect", size))
    if facts.orientation != 1:
        problems.append(("exif", f"orientation {facts.orientation}"))
    if facts.personal:
        problems.append(("tags", facts.personal))
    return problems


def _build_unreadable_finding(items: list[Item]) -> Finding:
    return Finding(
        "unreadable",
        "error",
        f"{format_count(len(items), 'file')} can't be read as an image: damaged, truncated or not an image at all.",
        "Copy them again from their source, or move them out of the class folders.",
        tuple(items),
    )


_FINDING_TEXTS: dict[str, tuple[str, Severity, str, str]] = {
    "suffix": (
        "wrong-suffix",
        "warning",
        "in a different format than the file name says.",
        "Pylorus reads them by content; rename them, since other programs rely on the name.",
    ),
    "mode": (
        "colour-mode",
        "note",
        "not plain RGB",
        "They are converted to RGB (src/pylorus/data/decode.py documents how). Check whether they come from "
        "another source.",
    ),
    "tiny": (
        "tiny",
        "warning",
        "with a very short side: there is little to see, and sharpness and text can't be assessed.",
        "Check whether they are previews; replace them by the originals.",
    ),
    "huge": (
        "very-large",
        "note",
        "with a very long side.",
        "Check whether they are single frames; reduce their size if no detail is lost.",
    ),
    "aspect": (
        "odd-proportions",
        "warning",
        "much wider than high or much higher than wide.",
        "Check whether they are strips, scale bars or several frames side by side, and remove these.",
    ),
    "exif": (
        "exif-orientation",
        "note",
        "rotated by an EXIF tag.",
        "Pylorus reads them upright. Programs that ignore the tag show them rotated: save them upright.",
    ),
    "tags": (
        "personal-tags",
        "warning",
        "with tags that may identify a person, a place, a time or a device; their values are neither shown nor stored.",
        "Remove the tags before you share the files, for example with `exiftool -all= -overwrite_original FILES`.",
    ),
}


def _build_file_finding(name: str, items: list[Item], template: tuple[str, Severity, str, str]) -> Finding:
    code, severity, sentence, remedy = template
    if name == "mode":
        modes = ", ".join(f"{count:,} {mode}" for mode, count in Counter(item.detail for item in items).most_common())
        sentence = f"{sentence} but {modes}."
    are = "is" if len(items) == 1 else "are"
    verb = "" if sentence.startswith("with ") else f" {are}"
    return Finding(code, severity, f"{format_count(len(items), 'image')}{verb} {sentence}", remedy, tuple(items))


def check_classes_and_groups(images: ImageSet, thresholds: Thresholds) -> list[Finding]:
    """Return findings about class imbalance and about groups."""
    return [*_check_imbalance(images, thresholds), *_check_groups(images)]


def _check_imbalance(images: ImageSet, thresholds: Thresholds) -> list[Finding]:
    counts = images.table["class"].value_counts()
    ratio = counts.max() / counts.min()
    if ratio < thresholds.imbalance:
        return []
    return [
        Finding(
            "class-imbalance",
            "warning",
            f"The largest class ({counts.idxmax()}, {counts.max():,}) has {ratio:.1f} times as many images as the "
            f"smallest ({counts.idxmin()}, {counts.min():,}).",
            "Collect more images of the smallest class, or weight the classes in training; judge a model by the "
            "sensitivity of each class, not by accuracy.",
        )
    ]


def _check_groups(images: ImageSet) -> list[Finding]:
    if not images.grouped:
        return [
            Finding(
                "no-groups",
                "warning",
                "Patients are not defined: leaks of patients between splits can't be found.",
                "Use --group with a regular expression that matches the patient in the path, or a manifest with a "
                "column group.",
            )
        ]
    with_group = images.table[images.table["group"] != ""]
    unmatched = images.table.index[images.table["group"] == ""]
    findings = []
    if len(unmatched):
        findings.append(
            Finding(
                "group-not-found",
                "error",
                f"The regular expression matches no patient in {format_count(len(unmatched), 'path')}.",
                "Rename these files, or use an expression that matches all paths: each needs a patient.",
                tuple(Item((int(index),)) for index in unmatched),
            )
        )
    across_splits = _find_spanning_groups(with_group, "split") if images.has_split else []
    if across_splits:
        findings.append(
            Finding(
                "group-across-splits",
                "leak",
                f"{format_count(len(across_splits), 'group')} ({_format_image_count(across_splits)}) "
                f"{'has' if len(across_splits) == 1 else 'have'} images in more than one split.",
                "Move all images of a patient to the same split, or let Pylorus make the split.",
                tuple(across_splits),
            )
        )
    across_classes = _find_spanning_groups(with_group, "class")
    if across_classes:
        findings.append(
            Finding(
                "group-with-several-labels",
                "warning",
                f"{format_count(len(across_classes), 'group')} ({_format_image_count(across_classes)}) "
                f"{'has' if len(across_classes) == 1 else 'have'} images of more than one class.",
                "Check whether the patient really has both findings, or whether the expression matches a date or a "
                "room instead of a patient.",
                tuple(across_classes),
            )
        )
    return findings


def _format_image_count(items: list[Item]) -> str:
    return format_count(sum(len(item.files) for item in items), "image")


def _find_spanning_groups(table: pd.DataFrame, column: str) -> list[Item]:
    """Return groups with more than one value in a column, those with most images first."""
    value_counts = table.groupby("group")[column].nunique()
    spanning = table[table["group"].isin(value_counts.index[value_counts > 1])]
    items = [
        Item(
            tuple(int(index) for index in rows.index),
            ", ".join(f"{count:,} {value}" for value, count in rows[column].value_counts().items()),
            group=str(group),
        )
        for group, rows in spanning.groupby("group")
    ]
    return sorted(items, key=lambda item: (-len(item.files), item.files))
