"""Leakage: copies of images and patients in more than one split.

If Pylorus makes the split, copies are kept together; if the split is given, copies across it are reported as leaks.
Copies are files with identical bytes, files with identical pixels, and near copies: the same image re-encoded, scaled,
rotated or mirrored, or two almost indistinguishable frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pylorus.data.audit.duplicates import Copies
from pylorus.data.catalog import Catalog
from pylorus.errors import PylorusError, format_name_list

KINDS = {
    "patient": ("patient", "patients"),
    "file": ("pair of identical files", "pairs of identical files"),
    "pixels": ("pair with identical pixels", "pairs with identical pixels"),
    "near": ("pair of near copies", "pairs of near copies"),
}
"""Kinds of leaks, each with its singular and plural noun."""


@dataclass(frozen=True)
class Pair:
    """Two rows of a catalog that show the same patient or image.

    Attributes:
        kind: One of KINDS.
        first: Row of one image.
        second: Row of the other image.
        told: What they have in common, in words.
    """

    kind: str
    first: int
    second: int
    told: str


def collect_copy_pairs(catalog: Catalog, copies: Copies) -> list[Pair]:
    """Return the copies as pairs of rows; of several identical files, each is paired with the first."""
    row = np.full(len(catalog.facts), -1, dtype=np.int64)
    row[catalog.places] = np.arange(len(catalog.places))
    digest = catalog.table["sha256"].to_numpy()
    pairs = []
    for members in copies.same_bytes:
        rows = [int(row[index]) for index in members]
        pairs += [Pair("file", rows[0], other, "identical files") for other in rows[1:]]
    for members in copies.same_pixels:
        rows = [int(row[index]) for index in members]
        pairs += [
            Pair("pixels", rows[0], other, "identical pixels") for other in rows[1:] if digest[rows[0]] != digest[other]
        ]
    pairs += [Pair("near", int(row[each.first]), int(row[each.second]), each.description) for each in copies.near]
    return pairs


def check_labels(catalog: Catalog, pairs: Sequence[Pair]) -> None:
    """Check that no image has two labels: one of them must be wrong, and which one can't be known here.

    Raises:
        PylorusError: If an image has two labels; the message names both files.
    """
    path, label = catalog.table["path"].to_numpy(), catalog.table["label"].to_numpy()
    contradictory = [pair for pair in pairs if pair.kind != "near" and label[pair.first] != label[pair.second]]
    if contradictory:
        lines = [
            f"{path[pair.first]} ({catalog.classes[label[pair.first]]}) and {path[pair.second]} "
            f"({catalog.classes[label[pair.second]]}): {pair.told}"
            for pair in contradictory
        ]
        count = (
            "2 identical images have"
            if len(contradictory) == 1
            else f"{len(contradictory)} pairs of identical images have"
        )
        raise PylorusError(
            f"{catalog.root}: {count} different labels:\n{format_name_list(lines)}\n"
            "One label of each pair is wrong: remove that file."
        )


def merge_linked_groups(catalog: Catalog, pairs: Sequence[Pair]) -> NDArray[np.str_]:
    """Return what a split must keep together, for each row: its group, or the first of the groups that copies link.

    DICOM patients are identified by their first path: their hashes depend on a salt, and a split must not.
    """
    groups = catalog.table["group"]
    if catalog.hashed:
        groups = catalog.table.groupby("group")["path"].transform("first")
    group_index, names = pd.factorize(groups, sort=True)
    ends = group_index[np.array([[pair.first, pair.second] for pair in pairs], dtype=np.int64).reshape(-1, 2)]
    links = ends[ends[:, 0] != ends[:, 1]]
    if not len(links):
        return groups.to_numpy()
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(names), len(names)))
    _, component = connected_components(graph, directed=False)
    first_group = np.full(component.max() + 1, len(names))
    np.minimum.at(first_group, component, np.arange(len(names)))
    return np.asarray(names.take(first_group[component[group_index]]))


def find_leaks(table: pd.DataFrame, pairs: Sequence[Pair], *, grouped: bool) -> list[Pair]:
    """Return pairs of rows in different splits: of patients, if groups are patients, and of copies."""
    split = table["split"].to_numpy()
    leaked_groups = list(_find_leaked_groups(table)) if grouped else []
    return leaked_groups + [pair for pair in pairs if split[pair.first] != split[pair.second]]


def format_leaks(table: pd.DataFrame, found_leaks: Sequence[Pair]) -> str:
    """Format the error message about leaks: how many of each kind, and the first pairs by name."""
    path = table["path"].to_numpy()
    counts = count_leaks(found_leaks)
    summary = ", ".join(f"{count} {KINDS[kind][count > 1]}" for kind, count in counts.items() if count)
    lines = [f"{path[pair.first]} and {path[pair.second]}: {pair.told}" for pair in found_leaks]
    return (
        f"Found in more than one split: {summary}.\n{format_name_list(lines)}\n"
        "Performance measured on this split would not be valid. Move each pair to one split, remove one of each pair, "
        "let Pylorus make the split (it keeps copies together), or accept the leaks with data.accept_leaks=true: the "
        "report then states them."
    )


def count_leaks(found_leaks: Sequence[Pair]) -> dict[str, int]:
    """Count the leaks of each kind."""
    return {kind: sum(pair.kind == kind for pair in found_leaks) for kind in KINDS}


def _find_leaked_groups(table: pd.DataFrame) -> Iterator[Pair]:
    """Yield a pair for each group in several splits: its first rows in the first two of them."""
    firsts = table.reset_index(drop=True).drop_duplicates(["group", "split"])
    leaked = firsts[firsts["group"].duplicated(keep=False)]
    for group, rows in leaked.groupby("group").groups.items():
        yield Pair("patient", int(rows[0]), int(rows[1]), f"patient {group}")
