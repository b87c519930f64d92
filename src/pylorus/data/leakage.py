"""Find copies among images, and leaks: copies of images or patients in more than one split.

Copies are files with identical bytes, files with identical pixels, and near copies: the same image re-encoded, scaled,
rotated or mirrored, or two almost indistinguishable frames. If Pylorus makes the split, copies are kept together; if
the split is given, copies across it are reported.

Near copies are found without comparing all pairs. A hash of 64 bits is divided into four bands. If two hashes differ
in at most 7 bits, then at least one band differs in at most one bit (pigeonhole principle; Norouzi 2012), so looking up
17 keys per image in each band's sorted list finds them. If they differ in at most 3 bits, one band is identical and one
key is enough; this is how rotated and mirrored copies are found in very large sets. Candidate pairs are then confirmed
on the thumbnails.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pylorus.core.errors import PylorusError, format_name_list
from pylorus.core.io import create_private_folder, write_text
from pylorus.data.audit_findings import Thresholds
from pylorus.data.catalog import Catalog
from pylorus.data.decode import DECODER_VERSION
from pylorus.data.fact_store import Facts, extract_fact_column, extract_thumbnails
from pylorus.data.image_facts import VERSION
from pylorus.data.image_measures import (
    ORIENTATIONS,
    compute_contrast,
    compute_hashes,
    compute_similarity,
    transform_thumbnails,
)

CODE_VERSION = 1
"""Increment when the same images would give other copies."""
MOST_SAVED = 16
"""Image sets whose copies are cached; those used last are kept."""
BANDS = 4
MAX_DISTANCE = 2 * BANDS - 1
"""Largest Hamming distance of hashes at which every pair is found."""
KEY_MASKS = np.concatenate([[0], 1 << np.arange(16)]).astype(np.uint16)
"""XOR masks of a key: unchanged, and with each one of its bits flipped."""

BLOCK_SIZE = 8192
"""Images per lookup: the memory for all at once would grow with the square of their number."""

Pairs = NDArray[np.int64]
"""Index pairs of shape (pairs, 2), the smaller index first."""


@dataclass(frozen=True)
class NearCopy:
    """Two nearly identical images.

    Attributes:
        first: Index of the first image.
        second: Index of the second image, greater than the first.
        distance: Hamming distance of their hashes, in bits.
        likeness: Correlation of their fine structure, in [-1, 1].
        position: Orientation of the first that matches the second: index into `ORIENTATIONS`.
    """

    first: int
    second: int
    distance: int
    likeness: float
    position: int

    @property
    def description(self) -> str:
        """Description for messages."""
        relation = "nearly identical images" if not self.position else f"the same image, {ORIENTATIONS[self.position]}"
        return f"{relation} (similarity {self.likeness:.3f}, {self.distance} of 64 bits differ)"


@dataclass(frozen=True)
class Copies:
    """Copies among files, as indices into their facts.

    Attributes:
        same_bytes: Groups of two or more files with identical bytes.
        same_pixels: Groups of files with identical pixels, but not all with identical bytes.
        near: Near copies among images with different pixels.
        blank: Images without contrast: all would be near copies of each other, so they are not compared.
        crowded: Images that share a hash key with so many others that only some of these were compared.
    """

    same_bytes: tuple[tuple[int, ...], ...]
    same_pixels: tuple[tuple[int, ...], ...]
    near: tuple[NearCopy, ...]
    blank: tuple[int, ...]
    crowded: tuple[int, ...]


def find_copies(facts: Sequence[Facts], thresholds: Thresholds, *, store: Path | None = None) -> Copies:
    """Find all copies among files, given their facts.

    Args:
        facts: Facts of the files.
        thresholds: Limits of the audit.
        store: Folder of the cache of facts, where the result is saved for the same files; None: it is not cached.
    """
    if store is None:
        return _search_copies(facts, thresholds)
    path = store / "copies" / f"{_compute_key(facts, thresholds)}.json"
    copies = _load_copies(path)
    if copies is None:
        copies = _search_copies(facts, thresholds)
        _save_copies(copies, path)
    return copies


def _compute_key(facts: Sequence[Facts], thresholds: Thresholds) -> str:
    """Hash what the copies depend on: the contents in their order, the thresholds and the versions of the code."""
    versions = (CODE_VERSION, VERSION, DECODER_VERSION)
    key = hashlib.sha256(json.dumps([*versions, asdict(thresholds)]).encode())
    problems = extract_fact_column(facts, "problem") != ""
    key.update("\n".join(np.where(problems, "", extract_fact_column(facts, "sha256"))).encode())
    return key.hexdigest()[:24]


def _load_copies(path: Path) -> Copies | None:
    try:
        content = json.loads(path.read_text())
        copies = Copies(
            same_bytes=tuple(map(tuple, content["same_bytes"])),
            same_pixels=tuple(map(tuple, content["same_pixels"])),
            near=tuple(NearCopy(*values) for values in content["near"]),
            blank=tuple(content["blank"]),
            crowded=tuple(content["crowded"]),
        )
        os.utime(path)  # so that it is not among the oldest
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return copies


def _save_copies(copies: Copies, path: Path) -> None:
    with suppress(OSError):  # the next run searches again
        create_private_folder(path.parent, levels=3)
        write_text(path, json.dumps({**vars(copies), "near": [list(vars(each).values()) for each in copies.near]}))
        oldest_last = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime, reverse=True)
        for each in oldest_last[MOST_SAVED:]:
            each.unlink()


def _search_copies(facts: Sequence[Facts], thresholds: Thresholds) -> Copies:
    by_bytes, by_pixels = _group_by_hash(facts, "sha256"), _group_by_hash(facts, "pixels")
    unique_images = [members[0] for members in by_pixels.values()]
    has_contrast = _has_contrast(facts, unique_images, thresholds.contrast)
    compared = [index for index, visible in zip(unique_images, has_contrast, strict=True) if visible]
    near, crowded = _find_near_copies(extract_thumbnails(facts, compared), thresholds)
    # `compared` is increasing, so the first of a pair stays the first.
    near = [
        replace(each, first=compared[each.first], second=compared[each.second])
        for each in near
        if _has_same_shape(facts[compared[each.first]], facts[compared[each.second]], each.position)
    ]
    return Copies(
        same_bytes=tuple(tuple(members) for members in by_bytes.values() if len(members) > 1),
        same_pixels=tuple(
            tuple(members) for members in by_pixels.values() if len({facts[index].sha256 for index in members}) > 1
        ),
        near=tuple(near),
        blank=tuple(index for index, visible in zip(unique_images, has_contrast, strict=True) if not visible),
        crowded=tuple(compared[index] for index in crowded),
    )


def _has_contrast(facts: Sequence[Facts], indices: Sequence[int], least_contrast: float) -> NDArray[np.bool_]:
    """Return whether images have contrast; in blocks, so that the thumbnails are not copied all at once."""
    blocks = [
        compute_contrast(extract_thumbnails(facts, indices[start : start + BLOCK_SIZE])) >= least_contrast
        for start in range(0, len(indices), BLOCK_SIZE)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.bool_)


def find_near_pairs(
    queries: NDArray[np.uint64], known: NDArray[np.uint64], *, distance: int, most: int
) -> tuple[Pairs, NDArray[np.int64], NDArray[np.int64]]:
    """Find pairs of a query and a later known hash that differ in few bits.

    Args:
        queries: Hashes in one of the orientations, of shape (images,).
        known: Hashes of the images as they are, of shape (images,).
        distance: Maximum number of differing bits, at most `MAX_DISTANCE`.
        most: Maximum number of known images per key; of a more crowded key, the first are compared.

    Returns:
        The pairs, their distances of shape (pairs,), and indices of images that hit a crowded key.

    Raises:
        ValueError: If `distance` is outside the range in which every pair is found.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance is {distance}; expected 0 to {MAX_DISTANCE} bits.")
    flips = KEY_MASKS if distance >= BANDS else KEY_MASKS[:1]
    close_pairs, crowded = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for band in range(BANDS):
        shift = np.uint64(16 * band)
        keys = (known >> shift).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for start in range(0, len(queries), BLOCK_SIZE):
            block = queries[start : start + BLOCK_SIZE]
            wanted = (block >> shift).astype(np.uint16)[:, None] ^ flips
            pairs, overflowing = _join_by_key(wanted, keys, order, most=most)
            pairs, overflowing = pairs + np.array([start, 0]), overflowing + start
            pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            close_pairs.append(pairs[np.bitwise_count(queries[pairs[:, 0]] ^ known[pairs[:, 1]]) <= distance])
            crowded.append(overflowing)
    pairs = np.unique(np.concatenate(close_pairs), axis=0)
    distances = np.bitwise_count(queries[pairs[:, 0]] ^ known[pairs[:, 1]]).astype(np.int64)
    return pairs, distances, np.unique(np.concatenate(crowded))


def _join_by_key(
    wanted: NDArray[np.uint16], keys: NDArray[np.uint16], order: NDArray[np.int64], *, most: int
) -> tuple[Pairs, NDArray[np.int64]]:
    """Join queries with known images by key.

    Args:
        wanted: Keys that each query looks up, of shape (queries, keys).
        keys: All known keys, sorted, of shape (images,).
        order: Index of the image of each key, of shape (images,).
        most: Maximum number of known images per key.

    Returns:
        Pairs of a query and a known image with the same key, and queries that hit a crowded key.
    """
    start = np.searchsorted(keys, wanted.reshape(-1), side="left")
    length = np.searchsorted(keys, wanted.reshape(-1), side="right") - start
    query = np.repeat(np.arange(len(wanted)), wanted.shape[1])
    overflowing = query[length > most]
    length = np.minimum(length, most)
    offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.stack([np.repeat(query, length), order[np.repeat(start, length) + offset]], axis=1), overflowing


def _find_near_copies(
    thumbnails: NDArray[np.uint8], thresholds: Thresholds
) -> tuple[list[NearCopy], NDArray[np.int64]]:
    """Return confirmed near copies, each pair once in its best orientation, and images that hit a crowded key."""
    known = compute_hashes(thumbnails)
    best: dict[tuple[int, int], NearCopy] = {}
    crowded = []
    for position in range(len(ORIENTATIONS)):
        oriented = transform_thumbnails(thumbnails, position)
        distance = thresholds.turned_distance if position and len(known) > thresholds.many else thresholds.distance
        pairs, distances, overflowing = find_near_pairs(
            compute_hashes(oriented), known, distance=distance, most=thresholds.crowd
        )
        crowded.append(overflowing)
        for chunk in range(0, len(pairs), 4096):
            chunk_pairs, bits = pairs[chunk : chunk + 4096], distances[chunk : chunk + 4096]
            similarity = compute_similarity(oriented[chunk_pairs[:, 0]], thumbnails[chunk_pairs[:, 1]])
            for index in np.flatnonzero(similarity >= thresholds.likeness):
                first, second = int(chunk_pairs[index, 0]), int(chunk_pairs[index, 1])
                copy = NearCopy(first, second, int(bits[index]), float(similarity[index]), position)
                previous = best.get((first, second))
                if previous is None or copy.likeness > previous.likeness:
                    best[first, second] = copy
    return [best[pair] for pair in sorted(best)], np.unique(np.concatenate(crowded))


def _group_by_hash(facts: Sequence[Facts], column: str) -> dict[str, list[int]]:
    """Group the indices of readable images by the values of a column with hashes."""
    members: dict[str, list[int]] = defaultdict(list)
    hashes_of_images, problems = extract_fact_column(facts, column), extract_fact_column(facts, "problem")
    for index, (value, problem) in enumerate(zip(hashes_of_images, problems, strict=True)):
        if not problem:
            members[value].append(index)
    return members


def _has_same_shape(first: Facts, second: Facts, position: int) -> bool:
    """Return whether the aspect ratios agree within 5 %, once rotated: thumbnails don't preserve them."""
    width, height = (first.height, first.width) if position % 2 else (first.width, first.height)
    return abs(width * second.height / (height * second.width) - 1) <= 0.05


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
        description: What they have in common, in words.
    """

    kind: str
    first: int
    second: int
    description: str


def collect_copy_pairs(catalog: Catalog, copies: Copies) -> list[Pair]:
    """Return the copies as pairs of rows; of several identical files, each is paired with the first."""
    row = np.full(len(catalog.facts), -1, dtype=np.int64)
    row[catalog.fact_indices] = np.arange(len(catalog.fact_indices))
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
            f"({catalog.classes[label[pair.second]]}): {pair.description}"
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
    lines = [f"{path[pair.first]} and {path[pair.second]}: {pair.description}" for pair in found_leaks]
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
