"""Images that are there twice, and the split: kept in one part where Pylorus cuts, told as leaks where parts are given.

Copies are files of equal content, files of equal pixels, and near copies: the same image saved anew, scaled, rotated
or mirrored, or two frames that can hardly be told apart.
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
from pylorus.errors import PylorusError, listing

KINDS = {
    "patient": ("patient", "patients"),
    "file": ("file, byte by byte the same", "files, byte by byte the same"),
    "pixels": ("pair of the same pixels", "pairs of the same pixels"),
    "near": ("pair of near copies", "pairs of near copies"),
}
"""What may lie in two parts: one of it, and several."""


@dataclass(frozen=True)
class Pair:
    """Two rows of a catalog that show the same.

    Attributes:
        kind: One of KINDS.
        first: Row of one.
        second: Row of the other.
        told: What they have in common.
    """

    kind: str
    first: int
    second: int
    told: str


def pairs_of(catalog: Catalog, copies: Copies) -> list[Pair]:
    """The copies as pairs of rows: of several equal files each with the first of them."""
    row = np.full(len(catalog.facts), -1, dtype=np.int64)
    row[catalog.places] = np.arange(len(catalog.places))
    digest = catalog.table["sha256"].to_numpy()
    found = []
    for members in copies.same_bytes:
        rows = [int(row[place]) for place in members]
        found += [Pair("file", rows[0], other, "the same file") for other in rows[1:]]
    for members in copies.same_pixels:
        rows = [int(row[place]) for place in members]
        found += [
            Pair("pixels", rows[0], other, "the same pixels") for other in rows[1:] if digest[rows[0]] != digest[other]
        ]
    found += [Pair("near", int(row[each.first]), int(row[each.second]), each.told) for each in copies.near]
    return found


def check_labels(catalog: Catalog, pairs: Sequence[Pair]) -> None:
    """Refuses one content under two labels: one of them must be wrong, and nothing here can say which.

    Raises:
        PylorusError: Names both files.
    """
    path, label = catalog.table["path"].to_numpy(), catalog.table["label"].to_numpy()
    torn = [pair for pair in pairs if pair.kind != "near" and label[pair.first] != label[pair.second]]
    if torn:
        lines = [
            f"{path[pair.first]} ({catalog.classes[label[pair.first]]}) and {path[pair.second]} "
            f"({catalog.classes[label[pair.second]]}): {pair.told}"
            for pair in torn
        ]
        raise PylorusError(
            f"{catalog.root}: {len(torn)} pairs of images are the same and have two labels:\n{listing(lines)}\n"
            "One of each pair has a wrong label: take that file away."
        )


def bundles(catalog: Catalog, pairs: Sequence[Pair]) -> NDArray[np.str_]:
    """What a cut keeps in one part, for each row: its group, or the first of the groups that copies join.

    DICOM's patients are told by the first path of each: their hashes hang on a salt, and a split must not.
    """
    groups = catalog.table["group"]
    if catalog.hashed:
        groups = catalog.table.groupby("group")["path"].transform("first")
    code, names = pd.factorize(groups, sort=True)
    ends = code[np.array([[pair.first, pair.second] for pair in pairs], dtype=np.int64).reshape(-1, 2)]
    joined = ends[ends[:, 0] != ends[:, 1]]
    if not len(joined):
        return groups.to_numpy()
    graph = coo_array((np.ones(len(joined)), (joined[:, 0], joined[:, 1])), shape=(len(names), len(names)))
    _, component = connected_components(graph, directed=False)
    first = np.full(component.max() + 1, len(names))
    np.minimum.at(first, component, np.arange(len(names)))
    return np.asarray(names.take(first[component[code]]))


def leaks(table: pd.DataFrame, pairs: Sequence[Pair], *, grouped: bool) -> list[Pair]:
    """Pairs of rows in two parts of a split: of patients, where groups are patients, and of copies."""
    part = table["split"].to_numpy()
    found = list(_torn_groups(table)) if grouped else []
    return found + [pair for pair in pairs if part[pair.first] != part[pair.second]]


def leaks_said(table: pd.DataFrame, found: Sequence[Pair]) -> str:
    """Leaks in words: how many of which kind, and the first pairs by name."""
    path = table["path"].to_numpy()
    counts = counted(found)
    head = ", ".join(f"{count} {KINDS[kind][count > 1]}" for kind, count in counts.items() if count)
    lines = [f"{path[pair.first]} and {path[pair.second]}: {pair.told}" for pair in found]
    return (
        f"In two parts of the split lie {head}:\n{listing(lines)}\n"
        "The test would be no test. Move them to one side, take one of each two away, leave the cut to Pylorus (which "
        "keeps copies together), or accept it with data.accept_leaks=true, which the report then says."
    )


def counted(found: Sequence[Pair]) -> dict[str, int]:
    """How many leaks there are of each kind."""
    return {kind: sum(pair.kind == kind for pair in found) for kind in KINDS}


def _torn_groups(table: pd.DataFrame) -> Iterator[Pair]:
    """A pair for each group in several parts: its first rows in the first two of them."""
    firsts = table.reset_index(drop=True).drop_duplicates(["group", "split"])
    torn = firsts[firsts["group"].duplicated(keep=False)]
    for group, rows in torn.groupby("group").groups.items():
        yield Pair("patient", int(rows[0]), int(rows[1]), f"patient {group}")
