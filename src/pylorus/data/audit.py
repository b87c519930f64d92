"""Audit an image set: collect findings from the facts of its files, and convert them to JSON; no file is opened.

The checks here need no pixels. Copies are a leak across splits, a contradiction across classes, a double count across
patients. Files may be damaged, misnamed, rotated, of unusual size, or have tags that identify a person. The set may
have unbalanced classes, or patients in several splits or classes.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from posixpath import splitext
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus import __version__
from pylorus.core.errors import format_path
from pylorus.core.formatting import format_count
from pylorus.data.audit_findings import (
    SEVERITIES,
    Finding,
    ImageSet,
    Item,
    Severity,
    Thresholds,
    build_unreadable_findings,
    check_class_names,
    check_file_names,
    report_ignored_files,
    sort_by_severity,
)
from pylorus.data.audit_image_checks import FieldSample, check_fields, check_image_quality
from pylorus.data.catalog import compute_sample_id
from pylorus.data.decode import DECODER_VERSION
from pylorus.data.fact_store import Facts, extract_fact_column
from pylorus.data.image_measures import FORMAT_SUFFIXES
from pylorus.data.leakage import Copies, NearCopy, find_copies

FORMAT = 1
"""Version of audit.json; increment when readers of the previous version would fail."""


@dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        images: The files that were audited.
        samples: Sample id of each file, which identifies it where names must not appear.
        readable: Number of files that can be decoded.
        findings: All findings, the most severe first.
        fields: Fields of view of some images.
        thresholds: Limits that the audit used.
    """

    images: ImageSet
    samples: tuple[str, ...]
    readable: int
    findings: tuple[Finding, ...]
    fields: tuple[FieldSample, ...]
    thresholds: Thresholds

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} of severity {name}" for name, count in self.counts.items() if count)
        return f"<Audit of {len(self.samples)} files in {self.images.root}: {counts or 'nothing found'}>"

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings of each severity."""
        return {name: sum(finding.severity == name for finding in self.findings) for name in SEVERITIES}

    @property
    def exit_code(self) -> int:
        """1 if there is a leak or an error, else 0."""
        return int(any(finding.is_blocking for finding in self.findings))

    @property
    def sizes(self) -> pd.DataFrame:
        """Number of files by class (rows) and split (columns); without splits, one column with an empty name."""
        (labels, classes), (parts, splits) = (
            pd.factorize(self.images.table[name], sort=True) for name in ("class", "split")
        )
        counts = np.bincount(labels * len(splits) + parts, minlength=len(classes) * len(splits))
        rows, columns = pd.Index(classes, name="class"), pd.Index(splits, name="split")
        sizes = pd.DataFrame(counts.reshape(len(classes), len(splits)), index=rows, columns=columns)
        return sizes[[name for name in ("train", "val", "test", "") if name in sizes]]


def audit(
    images: ImageSet,
    facts: Sequence[Facts],
    thresholds: Thresholds,
    *,
    fields: Sequence[FieldSample] = (),
    copies: Copies | None = None,
) -> Audit:
    """Run all checks on an image set.

    Args:
        images: Files of the image set.
        facts: Facts of each file, in the order of the table.
        thresholds: Limits of the checks.
        fields: Fields of view of some of the files, from `look_for_fields`.
        copies: Result of `find_copies`; None: copies are searched for.

    Raises:
        ValueError: If the number of facts differs from the number of files.
    """
    if len(facts) != len(images.table):
        raise ValueError(f"found {len(facts)} facts, expected {len(images.table)}: one per file.")
    findings = [
        *check_copies(images, copies if copies is not None else find_copies(facts, thresholds)),
        *check_classes_and_groups(images, thresholds),
        *check_files(images, facts, thresholds),
        *check_image_quality(images, facts, thresholds),
        *check_fields(fields, facts),
    ]
    digests = extract_fact_column(facts, "sha256")
    samples = tuple(compute_sample_id(path, digest) for path, digest in zip(images.table["path"], digests, strict=True))
    readable = int((extract_fact_column(facts, "problem") == "").sum())
    return Audit(images, samples, readable, sort_by_severity(findings), tuple(fields), thresholds)


def convert_audit_to_json(result: Audit, *, names: bool) -> dict[str, Any]:
    """Convert an audit to JSON-compatible values.

    Args:
        result: The audit.
        names: Whether to name paths, the root and groups; else files are identified by sample ids, groups by numbers.
    """
    group_aliases = build_group_aliases(result)
    return {
        "format": FORMAT,
        "pylorus": __version__,
        "decoder": DECODER_VERSION,
        "root": str(result.images.root) if names else None,
        "named": names,
        "grouped": result.images.grouped,
        "files": len(result.images.table),
        "readable": result.readable,
        "counts": result.counts,
        "sizes": {
            str(name): {str(part) or "all": int(count) for part, count in row.items()}
            for name, row in result.sizes.iterrows()
        },
        "ignored": [
            {"path": format_path(each.path), "reason": each.reason} if names else {"reason": each.reason}
            for each in result.images.ignored
        ],
        "thresholds": asdict(result.thresholds),
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "sentence": finding.sentence,
                "mend": finding.remedy,
                "items": [_convert_item_to_json(result, item, group_aliases, names=names) for item in finding.items],
            }
            for finding in result.findings
        ],
    }


def build_group_aliases(result: Audit) -> dict[str, str]:
    """Return an alias of each group for use where names must not appear: hashes could be reversed by guessing."""
    groups = dict.fromkeys(item.group for finding in result.findings for item in finding.items if item.group)
    return {group: f"group {number}" for number, group in enumerate(sorted(groups), start=1)}


def _convert_item_to_json(
    result: Audit, item: Item, group_aliases: Mapping[str, str], *, names: bool
) -> dict[str, Any]:
    values: dict[str, Any] = {"samples": [result.samples[index] for index in item.files]}
    if names:
        # JSON is UTF-8: bytes of a name that are not UTF-8 are escaped.
        paths = result.images.get_values("path", item.files)
        values["paths"] = [path.encode("utf-8", "backslashreplace").decode("utf-8") for path in paths]
    if item.detail or item.content:
        values["detail"] = ": ".join(filter(None, (item.detail, item.content if names else "")))
    if item.group:
        values["group"] = item.group if names else group_aliases[item.group]
    return values


SPLITS, CLASSES, GROUPS, FREE, WITHIN = "splits", "classes", "groups", "set", "within"
"""Boundaries that copies may cross, the most severe first; FREE if neither splits nor groups are defined."""
BOUNDARIES = (SPLITS, CLASSES, GROUPS, FREE, WITHIN)


def check_copies(images: ImageSet, copies: Copies) -> list[Finding]:
    """Return findings about copies.

    Copies across splits and across classes are reported as both. A pair of near copies is reported once, under the most
    severe boundary that it crosses.
    """
    exact_items: dict[str, list[Item]] = {boundary: [] for boundary in BOUNDARIES}
    near_items: dict[str, list[Item]] = {boundary: [] for boundary in BOUNDARIES}
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
    splits, classes, groups = (set(images.get_values(name, files)) for name in ("split", "class", "group"))
    crossed = [
        (SPLITS, images.has_split and len(splits) > 1),
        (CLASSES, len(classes) > 1),
        (GROUPS, images.grouped and len(groups) > 1),
        # Without patients and splits, an image and its copy may end up in different splits.
        (FREE, not images.grouped and not images.has_split),
    ]
    return [boundary for boundary, is_crossed in crossed if is_crossed] or [WITHIN]


def _select_worst_pair(
    images: ImageSet, copy: NearCopy, identical_files: dict[int, tuple[int, ...]]
) -> tuple[tuple[int, int], list[str]]:
    """Choose the pair to report for a near copy: of identical files, the one across the most severe boundary."""
    if copy.first not in identical_files and copy.second not in identical_files:
        return (copy.first, copy.second), _find_crossed_boundaries(images, (copy.first, copy.second))
    # Of identical files, one of each split and class is enough: comparing all pairs could take very long.
    first, second = (
        _select_representatives(images, identical_files.get(index, (index,))) for index in (copy.first, copy.second)
    )
    pairs = product(first, second)
    candidates = [(pair, _find_crossed_boundaries(images, pair)) for pair in pairs]
    return min(candidates, key=lambda each: BOUNDARIES.index(each[1][0]))


def _select_representatives(images: ImageSet, files: tuple[int, ...]) -> list[int]:
    """Return the first of the files of each split and class."""
    keys = zip(images.get_values("split", files), images.get_values("class", files), strict=True)
    first: dict[tuple[str, str], int] = {}
    for index, key in zip(files, keys, strict=True):
        first.setdefault(key, index)
    return list(first.values())


_CROSSED = {SPLITS: "in two splits", CLASSES: "of two classes", GROUPS: "of two groups"}


def _format_copy_detail(similarity: str, boundaries: list[str]) -> str:
    crossed = ", ".join([_CROSSED[boundary] for boundary in boundaries if boundary in _CROSSED])
    return f"{similarity}; {crossed}" if crossed else similarity


_SEVERITIES: dict[tuple[str, str], Severity] = {
    ("copy", SPLITS): "leak",
    ("copy", CLASSES): "error",
    ("copy", GROUPS): "warning",
    ("copy", FREE): "warning",
    ("copy", WITHIN): "note",
    ("near-copy", SPLITS): "leak",
    ("near-copy", CLASSES): "warning",
    ("near-copy", GROUPS): "warning",
    ("near-copy", FREE): "warning",
    ("near-copy", WITHIN): "note",
}
_LOCATIONS = {
    SPLITS: "in more than one split: a model is tested on images that it was trained on.",
    CLASSES: "in more than one class: at most one of the labels is correct.",
    GROUPS: "in more than one group: the groups are the same patient, or a file is assigned to the wrong one.",
    FREE: "more than once: a split could put one into training and another into the test.",
    WITHIN: "within one class and split: each counts more than once.",
}
_REMEDIES = {
    SPLITS: "Keep one of each, or move all of them to the same split.",
    CLASSES: "Find out which label is correct, and remove the other file.",
    GROUPS: "Keep one of each, or assign them to one group, so that they stay in one split.",
    FREE: "Keep one of each, or let Pylorus make the split: it keeps copies together.",
    WITHIN: "Keep one of each, unless they should count more than once.",
}


def _build_copy_finding(kind: str, boundary: str, items: list[Item]) -> Finding:
    if kind == "copy":
        files = sum(len(item.files) for item in items)
        subject = f"{format_count(len(items), 'image')} (in {files:,} files)"
    else:
        subject = f"{format_count(len(items), 'pair')} of nearly identical images"
    verb = "occurs" if len(items) == 1 else "occur"
    code = {WITHIN: kind, FREE: f"{kind}-in-set"}.get(boundary, f"{kind}-across-{boundary}")
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
_FILE_COLUMNS = ("problem", "format", "mode", "width", "height", "orientation", "personal")
"""Facts that the checks of single files need."""


def check_files(images: ImageSet, facts: Sequence[Facts], thresholds: Thresholds) -> list[Finding]:
    """Return findings about single files; see the module docstring."""
    columns = {name: extract_fact_column(facts, name) for name in _FILE_COLUMNS}
    problems = columns["problem"]
    is_readable = problems == ""
    unreadable: list[Item] = []
    for index in np.flatnonzero(~is_readable):
        reason, _, content = problems[index].partition(": it begins with ")
        unreadable.append(Item((int(index),), reason, content=f"it begins with {content}" if content else ""))
    shorter, longer = np.minimum(columns["width"], columns["height"]), np.maximum(columns["width"], columns["height"])
    paths = images.table["path"].to_numpy(dtype=object)
    columns["suffix"] = suffixes = np.array([splitext(path)[1].lower() for path in paths], dtype=object)
    is_usual = np.zeros(len(suffixes), np.bool_)
    for name in set(columns["format"]):
        is_usual |= (columns["format"] == name) & (
            np.isin(suffixes, FORMAT_SUFFIXES[name]) if name in FORMAT_SUFFIXES else True
        )
    selected = {
        "suffix": ~is_usual,
        "mode": ~np.isin(columns["mode"], ("", *USUAL_MODES)),
        "tiny": shorter < thresholds.shortest,
        "huge": longer > thresholds.longest,
        "aspect": longer > thresholds.aspect * shorter,
        "exif": columns["orientation"] != 1,
        "tags": columns["personal"] != "",
    }
    findings = build_unreadable_findings(unreadable)
    for name, is_concerned in selected.items():
        items = [
            Item((index,), _format_file_detail(name, columns, index))
            for index in np.flatnonzero(is_concerned & is_readable).tolist()
        ]
        findings.append(_build_file_finding(name, items, _FINDING_TEXTS[name]))
    return [finding for finding in findings if finding.items]


def _format_file_detail(name: str, columns: Mapping[str, NDArray[Any]], index: int) -> str:
    """Return the detail of a file's problem; `name` is a key of `_FINDING_TEXTS`."""
    if name == "suffix":
        return f"contains {columns['format'][index]}, named {columns['suffix'][index]}"
    if name in ("tiny", "huge", "aspect"):
        return f"{columns['width'][index]} × {columns['height'][index]} pixels"
    if name == "exif":
        return f"orientation {columns['orientation'][index]}"
    return str(columns["mode" if name == "mode" else "personal"][index])


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
    return [
        *_check_imbalance(images, thresholds),
        *_check_groups(images),
        *check_class_names(images),
        *check_file_names(images),
        *report_ignored_files(images),
    ]


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
                "Use --group with a regular expression that matches the patient in the path, or --manifest with a "
                "table that has a column group.",
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
                f"No patient is known for {format_count(len(unmatched), 'file')}.",
                "Use an expression for --group that matches all paths, or a table for --manifest whose column group is "
                "filled in everywhere: each file needs a patient.",
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
    (groups, names), (values, kinds) = (pd.factorize(table[name]) for name in ("group", column))
    if len(np.unique(groups * len(kinds) + values)) == len(names):
        return []
    is_first = ~table[["group", column]].duplicated()
    spanning = table.index[table["group"].isin(table["group"][is_first & table["group"].duplicated()])]
    table = table.loc[spanning]
    files, counts = defaultdict[str, list[int]](list), defaultdict[str, Counter[str]](Counter)
    columns = (table[name].to_numpy(dtype=object) for name in ("group", column))
    for index, group, value in zip(table.index.tolist(), *columns, strict=True):
        files[group].append(index)
        counts[group][value] += 1
    details = {
        group: ", ".join(f"{number:,} {value}" for value, number in values.most_common())
        for group, values in counts.items()
    }
    items = [Item(tuple(files[group]), detail, group=str(group)) for group, detail in details.items()]
    return sorted(items, key=lambda item: (-len(item.files), item.files))
