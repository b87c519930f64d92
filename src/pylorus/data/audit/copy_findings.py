"""What copies mean: a leak across parts of the split, a contradiction across classes, a false count across patients."""

from collections.abc import Sequence
from itertools import product

from pylorus.data.audit.duplicates import Copies, NearCopy
from pylorus.data.audit.findings import Finding, Item, Severity, counted
from pylorus.data.audit.image_set import ImageSet

SPLITS, CLASSES, GROUPS, WITHIN = "splits", "classes", "groups", "within"
"""What copies may lie across, from the gravest on."""


def copy_findings(images: ImageSet, copies: Copies) -> list[Finding]:
    """Findings about what is there twice.

    Copies across several parts and of several classes at once are told as both. A pair of near copies is told once, as
    the gravest that it is.
    """
    same: dict[str, list[Item]] = {SPLITS: [], CLASSES: [], GROUPS: [], WITHIN: []}
    near: dict[str, list[Item]] = {SPLITS: [], CLASSES: [], GROUPS: [], WITHIN: []}
    exact = _exact(copies)
    for members, how in exact.items():
        places = _across(images, members)
        for place in [each for each in (SPLITS, CLASSES) if each in places] or places[:1]:
            same[place].append(Item(members, _told(how, places)))
    twins = {index: members for members in exact for index in members}
    for copy in sorted(copies.near, key=lambda each: -each.likeness):
        pair, places = _gravest(images, copy, twins)
        near[places[0]].append(Item(pair, _told(copy.told, places)))
    return [
        *(_finding("copy", place, items) for place, items in same.items() if items),
        *(_finding("near-copy", place, items) for place, items in near.items() if items),
        *_not_compared(copies),
    ]


def _exact(copies: Copies) -> dict[tuple[int, ...], str]:
    """Files that show the very same pixels, and whether they are the same files too."""
    found = dict.fromkeys(copies.same_pixels, "pixel by pixel the same")
    within = {index for members in found for index in members}
    return found | {
        members: "byte by byte the same" for members in copies.same_bytes if not within.intersection(members)
    }


def _across(images: ImageSet, files: Sequence[int]) -> list[str]:
    """What files lie across, the gravest first; never empty."""
    rows = images.table.iloc[list(files)]
    splits = images.given_split and rows["split"].nunique() > 1
    # Without patients and parts, every image may go to another part than its copy.
    groups = rows["group"].nunique() > 1 if images.grouped else not images.given_split
    found = [(SPLITS, splits), (CLASSES, rows["class"].nunique() > 1), (GROUPS, groups)]
    return [place for place, true in found if true] or [WITHIN]


def _gravest(images: ImageSet, copy: NearCopy, twins: dict[int, tuple[int, ...]]) -> tuple[tuple[int, int], list[str]]:
    """The pair that a near copy is told as: of several equal files the one in the worst place."""
    # Of equal files one of each part and class is enough: all pairs of many would take for ever.
    first, second = (_one_of_each(images, twins.get(index, (index,))) for index in (copy.first, copy.second))
    pairs = product(first, second)
    judged = [(pair, _across(images, pair)) for pair in pairs]
    order = (SPLITS, CLASSES, GROUPS, WITHIN)
    return min(judged, key=lambda each: order.index(each[1][0]))


def _one_of_each(images: ImageSet, files: tuple[int, ...]) -> list[int]:
    """Of some files the first of each part and class."""
    rows = images.table.iloc[list(files)][["split", "class"]].reset_index(drop=True)
    return [files[index] for index in rows.drop_duplicates().index]


def _told(how: str, places: list[str]) -> str:
    names = {SPLITS: "in two parts", CLASSES: "of two classes", GROUPS: "of two groups"}
    also = ", ".join(names[place] for place in places if place in names)
    return f"{how}; {also}" if also else how


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
    SPLITS: "in several parts of the split: a model is tested on what it was trained on.",
    CLASSES: "in several classes: at most one of the labels is true.",
    GROUPS: "under several groups: they are one patient, or a file went to the wrong one.",
    WITHIN: "within one class and group: they count more than once.",
}
_MENDS = {
    SPLITS: "Keep one of each, or move all of them to one part.",
    CLASSES: "Find out which label is true, and take the other file away.",
    GROUPS: "Keep one of each, or give them one group, so that they stay in one part of a split.",
    WITHIN: "Keep one of each, where they should not count more than once.",
}


def _finding(kind: str, place: str, items: list[Item]) -> Finding:
    if kind == "copy":
        files = sum(len(item.files) for item in items)
        what = f"{counted(len(items), 'image')} (in {files:,} files) {'lies' if len(items) == 1 else 'lie'}"
    else:
        what = f"{counted(len(items), 'pair')} of nearly the same images {'lies' if len(items) == 1 else 'lie'}"
    code = kind if place == WITHIN else f"{kind}-across-{place}"
    mend = _MENDS[place] if kind == "copy" else f"Look at the pairs. {_MENDS[place]}"
    return Finding(code, _SEVERITIES[kind, place], f"{what} {_WHERE[place]}", mend, tuple(items))


def _not_compared(copies: Copies) -> list[Finding]:
    found = []
    if copies.blank:
        found.append(
            Finding(
                "blank",
                "warning",
                f"{counted(len(copies.blank), 'image')} of one shade: nothing can be seen.",
                "Look at them and take them away. They were not compared with others.",
                tuple(Item((index,)) for index in copies.blank),
            )
        )
    if copies.crowded:
        found.append(
            Finding(
                "compared-in-part",
                "note",
                f"{counted(len(copies.crowded), 'image')} look so much like many others that they were compared with "
                "some of them only: near copies may have been missed.",
                "Mend what was found and audit again.",
                tuple(Item((index,)) for index in copies.crowded),
            )
        )
    return found
