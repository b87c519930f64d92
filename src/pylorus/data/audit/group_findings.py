"""What is wrong with the set as a whole: classes of very different size, patients in two parts or of two classes."""

import pandas as pd

from pylorus.data.audit.findings import Finding, Item, counted
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds


def set_findings(images: ImageSet, thresholds: Thresholds) -> list[Finding]:
    """Class imbalance, and what is wrong with groups; nothing about groups where none are known."""
    return [*_imbalance(images, thresholds), *_groups(images)]


def _imbalance(images: ImageSet, thresholds: Thresholds) -> list[Finding]:
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
            "Collect more of the smallest, or weigh the classes in training; judge by sensitivity of each class, not "
            "by accuracy.",
        )
    ]


def _groups(images: ImageSet) -> list[Finding]:
    if not images.grouped:
        return [
            Finding(
                "no-groups",
                "warning",
                "Nothing tells which images are of one patient: leaks of patients between parts can't be found.",
                "Give --group with a regular expression that finds the patient in the path, or a manifest with a "
                "column group.",
            )
        ]
    known = images.table[images.table["group"] != ""]
    lost = images.table.index[images.table["group"] == ""]
    found = []
    if len(lost):
        found.append(
            Finding(
                "group-not-found",
                "error",
                f"The expression finds no patient in {counted(len(lost), 'path')}.",
                "Rename these files, or write an expression that fits all; each path needs its patient.",
                tuple(Item((int(index),)) for index in lost),
            )
        )
    across = _in_several(known, "split") if images.given_split else []
    if across:
        found.append(
            Finding(
                "group-across-splits",
                "leak",
                f"{counted(len(across), 'group')} ({_patients(across)}) "
                f"{'has' if len(across) == 1 else 'have'} images in several parts of the split.",
                "Move all images of a patient to one part, or let Pylorus make the split (src/pylorus/data/split.py).",
                tuple(across),
            )
        )
    mixed = _in_several(known, "class")
    if mixed:
        found.append(
            Finding(
                "group-with-several-labels",
                "warning",
                f"{counted(len(mixed), 'group')} ({_patients(mixed)}) {'has' if len(mixed) == 1 else 'have'} images "
                "of several classes.",
                "See whether both findings are true of the patient, or the expression takes a date or a room for one.",
                tuple(mixed),
            )
        )
    return found


def _patients(items: list[Item]) -> str:
    return counted(sum(len(item.files) for item in items), "image")


def _in_several(known: pd.DataFrame, column: str) -> list[Item]:
    """Groups with more than one value in a column; those of most images first."""
    values = known.groupby("group")[column].nunique()
    several = known[known["group"].isin(values.index[values > 1])]
    items = [
        Item(
            tuple(int(index) for index in rows.index),
            ", ".join(f"{count:,} {value}" for value, count in rows[column].value_counts().items()),
            group=str(group),
        )
        for group, rows in several.groupby("group")
    ]
    return sorted(items, key=lambda item: (-len(item.files), item.files))
