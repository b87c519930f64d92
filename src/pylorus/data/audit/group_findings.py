"""Check the image set as a whole: class imbalance, and patients in several splits or classes."""

import pandas as pd

from pylorus.data.audit.findings import Finding, Item, format_quantity
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds


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
                f"The regular expression matches no patient in {format_quantity(len(unmatched), 'path')}.",
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
                f"{format_quantity(len(across_splits), 'group')} ({_format_image_count(across_splits)}) "
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
                f"{format_quantity(len(across_classes), 'group')} ({_format_image_count(across_classes)}) "
                f"{'has' if len(across_classes) == 1 else 'have'} images of more than one class.",
                "Check whether the patient really has both findings, or whether the expression matches a date or a "
                "room instead of a patient.",
                tuple(across_classes),
            )
        )
    return findings


def _format_image_count(items: list[Item]) -> str:
    return format_quantity(sum(len(item.files) for item in items), "image")


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
