"""Find copies among images, and leaks: copies of images or patients in more than one split.

Copies are files with identical bytes, files with identical pixels, and near copies: the same image re-encoded, scaled,
cropped, rotated or mirrored, or two almost indistinguishable frames. If Pylorus makes the split, copies are kept
together; if the split is given, copies across it are reported.

Near copies are found without comparing all pairs. A hash of 64 bits is divided into four bands. If two hashes differ
in at most 7 bits, then at least one band differs in at most one bit (pigeonhole principle; Norouzi 2012), so looking up
17 keys per image in each band's sorted list finds them. If they differ in at most 3 bits, one band is identical and one
key is enough; this is how rotated and mirrored copies are found in very large sets. Candidate pairs are then confirmed
on the thumbnails.
"""

import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pylorus.core.distributed import count_free_cores, get_threads
from pylorus.core.errors import PylorusError, format_name_list
from pylorus.core.io import create_private_folder, write_text
from pylorus.data.audit_findings import Pair, Thresholds
from pylorus.data.catalog import Catalog
from pylorus.data.decode import DECODER_VERSION
from pylorus.data.fact_store import Facts, extract_fact_column, extract_thumbnails
from pylorus.data.image_facts import VERSION
from pylorus.data.image_measures import (
    ORIENTATIONS,
    Window,
    align_thumbnails,
    compute_contrast,
    compute_descriptors,
    compute_hashes,
    compute_similarity,
    reduce_thumbnails,
    transform_thumbnails,
)

CODE_VERSION = 3
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
CENTERED = (Window(), Window(0.92), Window(0.84))
CORNERS = tuple(Window(0.9, 0.05 * right, 0.05 * down) for right, down in itertools.product((-1, 1), repeat=2))
"""Windows of an image that a cropped copy may show; those of the corners are searched for only in upright copies."""
CELL_SIZE, SEARCHED_CELLS = 512, 12
"""Descriptors in a cell on average, and how many cells are searched for the neighbors of one."""

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
        scale: Side of the second's content in the first, as a proportion of the first's: not 1 if one was cropped.
        angle: Further rotation in degrees, clockwise in the order of the pixels.
    """

    first: int
    second: int
    distance: int
    likeness: float
    position: int
    scale: float = 1.0
    angle: float = 0.0

    @property
    def description(self) -> str:
        """Description for messages."""
        changes = [ORIENTATIONS[self.position]] if self.position else []
        if abs(self.scale - 1) > 0.015:
            changes.append(f"cropped to {100 * min(self.scale, 1 / self.scale):.0f} %")
        if abs(self.angle) > 0.5:
            changes.append(f"rotated by {abs(self.angle):.0f}°")
        relation = f"the same image, {' and '.join(changes)}" if changes else "nearly identical images"
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
    thumbnails = extract_thumbnails(facts, compared)
    reduced = _reduce_in_blocks(thumbnails)
    near, crowded = _find_near_copies(reduced, thresholds)
    near = [
        each
        for each in near
        if _has_same_shape(facts[compared[each.first]], facts[compared[each.second]], each.position)
    ]
    near = sorted([*near, *_find_cropped_copies(thumbnails, reduced, near, thresholds)], key=_get_pair)
    # `compared` is increasing, so the first of a pair stays the first.
    near = [replace(each, first=compared[each.first], second=compared[each.second]) for each in near]
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
        compute_contrast(reduce_thumbnails(extract_thumbnails(facts, indices[start : start + BLOCK_SIZE])))
        >= least_contrast
        for start in range(0, len(indices), BLOCK_SIZE)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.bool_)


def _reduce_in_blocks(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint8]:
    starts = range(0, max(1, len(thumbnails)), BLOCK_SIZE)
    return np.concatenate([reduce_thumbnails(thumbnails[start : start + BLOCK_SIZE]) for start in starts])


def _get_pair(copy: NearCopy) -> tuple[int, int]:
    return copy.first, copy.second


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


def _find_cropped_copies(
    thumbnails: NDArray[np.uint8], reduced: NDArray[np.uint8], known: Sequence[NearCopy], thresholds: Thresholds
) -> list[NearCopy]:
    """Find near copies that the hashes miss: images that were cropped, or rotated by a few degrees.

    Args:
        thumbnails: Stored thumbnails of shape (images, side, side).
        reduced: The same, reduced for hashes and descriptors.
        known: Near copies that were found already.
        thresholds: Limits of the audit.
    """
    if len(thumbnails) < 2:
        return []
    [whole] = compute_descriptors(reduced, [Window()])
    positions = range(1 if len(thumbnails) > thresholds.many else len(ORIENTATIONS))
    windows = [CENTERED if position else CENTERED + CORNERS for position in positions]
    variants = [(position, window) for position in positions for window in windows[position]]
    cells = DescriptorCells(whole)

    def search(position: int) -> list[tuple[Pairs, NDArray[np.float32]]]:
        queries = compute_descriptors(transform_thumbnails(reduced, position), windows[position])
        return [cells.find_neighbors(each, least=thresholds.neighbor, most=thresholds.neighbors) for each in queries]

    threads = get_threads(count_free_cores())
    neighbors = itertools.chain.from_iterable(threads.map(search, positions))
    found = [(pairs, cosines, np.full(len(pairs), number)) for number, (pairs, cosines) in enumerate(neighbors)]
    pairs, cosines, numbers = (np.concatenate(each) for each in zip(*found, strict=True))
    candidates = _select_candidates(pairs, cosines, {_get_pair(each) for each in known}, most=thresholds.neighbors)

    def confirm(candidate: int) -> NearCopy | None:
        position, window = variants[numbers[candidate]]
        query, other = pairs[candidate]
        oriented = transform_thumbnails(thumbnails[query : query + 1], position)
        alignment = align_thumbnails(oriented[0], thumbnails[other], window)
        if alignment.likeness < thresholds.likeness:
            return None
        hashes = [
            compute_hashes(each)[0]
            for each in (transform_thumbnails(reduced[query : query + 1], position), reduced[other : other + 1])
        ]
        distance = int(np.bitwise_count(hashes[0] ^ hashes[1]))
        scale = alignment.scale if query < other else 1 / alignment.scale
        # A rotation by 90° is undone by one by 270°, every other orientation by itself.
        undone = position if query < other else {1: 3, 3: 1}.get(position, position)
        first, second = sorted((int(query), int(other)))
        return NearCopy(first, second, distance, alignment.likeness, undone, scale, alignment.angle)

    confirmed = threads.map(confirm, candidates)
    return [copy for copy in confirmed if copy is not None]


def _select_candidates(
    pairs: Pairs, cosines: NDArray[np.float32], known: set[tuple[int, int]], *, most: int
) -> list[int]:
    """Select candidates to confirm: each pair once, with its highest cosine, and at most `most` pairs per image."""
    seen, counts = set(known), defaultdict[int, int](int)
    selected = []
    for candidate in np.argsort(-cosines, kind="stable").tolist():
        first, second = sorted(pairs[candidate].tolist())
        if (first, second) not in seen and min(counts[first], counts[second]) < most:
            seen.add((first, second))
            counts[first] += 1
            counts[second] += 1
            selected.append(candidate)
    return selected


class DescriptorCells:
    """Unit vectors that are divided into cells, so that neighbors are found without comparing all pairs.

    Args:
        descriptors: Unit vectors of shape (images, length). Each belongs to the cell of the most similar of some of
            them, which are drawn with a fixed seed. A small set has a single cell.
    """

    def __init__(self, descriptors: NDArray[np.float32]) -> None:
        count = max(1, len(descriptors) // CELL_SIZE)
        count = 1 if count <= SEARCHED_CELLS else count
        self.descriptors = descriptors
        self.centers = descriptors[np.random.default_rng(0).choice(len(descriptors), count, replace=False)]
        self._cell = self._rank_cells(descriptors, 1)[:, 0]
        order, starts = np.argsort(self._cell, kind="stable"), np.cumsum(np.bincount(self._cell, minlength=count))
        self.members = np.split(order, starts[:-1])
        self._position = np.empty(len(order), dtype=np.int64)  # of each descriptor in its cell
        self._position[order] = np.concatenate([np.arange(len(each)) for each in self.members])

    def _rank_cells(self, descriptors: NDArray[np.float32], most: int) -> NDArray[np.int64]:
        """Return the cells of the most similar centers, of shape (descriptors, at most `most`)."""
        most = min(most, len(self.centers))
        ranks = np.zeros((len(descriptors), most), dtype=np.int64)
        if len(self.centers) > 1:
            for start in range(0, len(descriptors), BLOCK_SIZE):
                cosines = descriptors[start : start + BLOCK_SIZE] @ self.centers.T
                ranks[start : start + BLOCK_SIZE] = np.argpartition(-cosines, most - 1, axis=1)[:, :most]
        return ranks

    def find_neighbors(
        self, queries: NDArray[np.float32], *, least: float, most: int
    ) -> tuple[Pairs, NDArray[np.float32]]:
        """Find the nearest other descriptors of each query.

        Args:
            queries: Unit vectors, one for each descriptor, with which it is not compared itself.
            least: Cosine from which a descriptor is a neighbor.
            most: Number of neighbors per query and cell, the nearest of which are returned.

        Returns:
            Pairs of a query and a descriptor, and their cosines of shape (pairs,).
        """
        ranks = self._rank_cells(queries, SEARCHED_CELLS)
        order = np.argsort(ranks, axis=None, kind="stable")
        bounds = np.searchsorted(ranks.reshape(-1)[order], np.arange(len(self.centers) + 1))
        pairs, cosines = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
        for cell, members in enumerate(self.members):
            searching = order[bounds[cell] : bounds[cell + 1]] // ranks.shape[1]
            for start in range(0, len(searching), 1024):
                rows = searching[start : start + 1024]
                block = queries[rows] @ self.descriptors[members].T
                own = np.flatnonzero(self._cell[rows] == cell)
                block[own, self._position[rows[own]]] = -1
                has_near = block.max(axis=1, initial=-1) >= least
                rows, block = rows[has_near], block[has_near]
                is_near = block >= least
                crowded = np.flatnonzero(np.count_nonzero(is_near, axis=1) > most)  # the others lose none
                if len(crowded):
                    is_near[crowded] &= block[crowded] >= np.partition(block[crowded], -most, axis=1)[:, -most, None]
                row, column = np.nonzero(is_near)
                pairs.append(np.stack([rows[row], members[column]], axis=1))
                cosines.append(block[row, column])
        return np.concatenate(pairs), np.concatenate(cosines)


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
