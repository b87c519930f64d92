"""Images that are there twice: byte by byte, pixel by pixel, or as good as that.

Near copies are found without comparing all pairs. A hash of 64 bits is cut into four bands. Where two hashes differ
in at most 7 bits, they differ in at most one bit in one of the bands (pigeonhole; Norouzi 2012): so each image looks
up 17 keys in each band's sorted list. Up to 3 bits one band is the same, and one key is enough: so turned and mirrored
copies are looked for in very large sets. The pairs so found are then confirmed on the thumbnails.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import Facts, column_of, thumbnails_of
from pylorus.data.fingerprint import POSITIONS, contrast, hashes, likeness, turned

BANDS = 4
FARTHEST = 2 * BANDS - 1
"""Bits in which hashes may differ and still be found for certain."""
FLIPS = np.concatenate([[0], 1 << np.arange(16)]).astype(np.uint16)
"""What one key becomes: itself, and each of its bits turned."""

AT_ONCE = 8192
"""Images that are looked up together: all at once would take memory by the square of their number."""

Pairs = NDArray[np.int64]
"""Of shape (pairs, 2): positions of images, the smaller first."""


@dataclass(frozen=True)
class NearCopy:
    """Two images that are as good as the same.

    Attributes:
        first: Position of one image.
        second: Position of the other, after the first.
        distance: Bits in which their hashes differ.
        likeness: Correlation of their fine structure, in [-1, 1].
        position: What the first becomes when laid on the second: index into POSITIONS.
    """

    first: int
    second: int
    distance: int
    likeness: float
    position: int

    @property
    def told(self) -> str:
        """In words."""
        how = "nearly the same image" if not self.position else f"the same image, {POSITIONS[self.position]}"
        return f"{how} (likeness {self.likeness:.3f}, {self.distance} of 64 bits differ)"


@dataclass(frozen=True)
class Copies:
    """What was found twice; positions are those of the facts given.

    Attributes:
        same_bytes: Files of equal content, each with two or more positions.
        same_pixels: Files of equal pixels but not all of equal content.
        near: Near copies among images of different pixels.
        blank: Images that show nothing: they would be near copies of each other, so they are not compared.
        crowded: Images whose hash so many share that they were compared with some of these only.
    """

    same_bytes: tuple[tuple[int, ...], ...]
    same_pixels: tuple[tuple[int, ...], ...]
    near: tuple[NearCopy, ...]
    blank: tuple[int, ...]
    crowded: tuple[int, ...]


def find_copies(facts: Sequence[Facts], thresholds: Thresholds) -> Copies:
    """Everything that is there twice among files."""
    by_bytes, by_pixels = _alike(facts, "sha256"), _alike(facts, "pixels")
    kept = [members[0] for members in by_pixels.values()]
    shows = _shows(facts, kept, thresholds.contrast)
    place = [index for index, shown in zip(kept, shows, strict=True) if shown]
    near, crowded = _near(thumbnails_of(facts, place), thresholds)
    # Positions grow along `place`: the first of a pair stays the first.
    near = [
        replace(each, first=place[each.first], second=place[each.second])
        for each in near
        if _same_shape(facts[place[each.first]], facts[place[each.second]], each.position)
    ]
    return Copies(
        same_bytes=tuple(tuple(members) for members in by_bytes.values() if len(members) > 1),
        same_pixels=tuple(
            tuple(members) for members in by_pixels.values() if len({facts[index].sha256 for index in members}) > 1
        ),
        near=tuple(near),
        blank=tuple(index for index, shown in zip(kept, shows, strict=True) if not shown),
        crowded=tuple(place[index] for index in crowded),
    )


def _shows(facts: Sequence[Facts], places: Sequence[int], least: float) -> NDArray[np.bool_]:
    """Whether images show something, in blocks: a million thumbnails are not held twice for it."""
    parts = [
        contrast(thumbnails_of(facts, places[begin : begin + AT_ONCE])) >= least
        for begin in range(0, len(places), AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)


def near_pairs(
    queries: NDArray[np.uint64], known: NDArray[np.uint64], *, distance: int, most: int
) -> tuple[Pairs, NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of a query and a later known hash that differ in few bits.

    Args:
        queries: Of shape (images,), in one of the positions.
        known: Of shape (images,), as the images are.
        distance: Bits that may differ, at most FARTHEST.
        most: Known images that one key is compared with; of a more crowded key the first are taken.

    Returns:
        The pairs, their distances of shape (pairs,), and positions of images that met a crowded key.

    Raises:
        ValueError: If `distance` is more than the bands can promise.
    """
    if not 0 <= distance <= FARTHEST:
        raise ValueError(f"distance is {distance}; expected 0 to {FARTHEST} bits.")
    flips = FLIPS if distance >= BANDS else FLIPS[:1]
    found, crowded = [np.zeros((0, 2), dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for band in range(BANDS):
        shift = np.uint64(16 * band)
        keys = (known >> shift).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for begin in range(0, len(queries), AT_ONCE):
            part = queries[begin : begin + AT_ONCE]
            wanted = (part >> shift).astype(np.uint16)[:, None] ^ flips
            pairs, many = _sharing_a_key(wanted, keys, order, most=most)
            pairs, many = pairs + np.array([begin, 0]), many + begin
            pairs = pairs[pairs[:, 0] < pairs[:, 1]]
            found.append(pairs[np.bitwise_count(queries[pairs[:, 0]] ^ known[pairs[:, 1]]) <= distance])
            crowded.append(many)
    pairs = np.unique(np.concatenate(found), axis=0)
    differing = np.bitwise_count(queries[pairs[:, 0]] ^ known[pairs[:, 1]]).astype(np.int64)
    return pairs, differing, np.unique(np.concatenate(crowded))


def _sharing_a_key(
    wanted: NDArray[np.uint16], keys: NDArray[np.uint16], order: NDArray[np.int64], *, most: int
) -> tuple[Pairs, NDArray[np.int64]]:
    """Pairs of who wants a key and who has it, and who met a crowded key.

    Args:
        wanted: Of shape (queries, keys): all that each one wants.
        keys: All known keys, sorted.
        order: Whose they are.
        most: Known images that one key is compared with.
    """
    start = np.searchsorted(keys, wanted.reshape(-1), side="left")
    length = np.searchsorted(keys, wanted.reshape(-1), side="right") - start
    asker = np.repeat(np.arange(len(wanted)), wanted.shape[1])
    many = asker[length > most]
    length = np.minimum(length, most)
    offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.stack([np.repeat(asker, length), order[np.repeat(start, length) + offset]], axis=1), many


def _near(thumbnails: NDArray[np.uint8], thresholds: Thresholds) -> tuple[list[NearCopy], NDArray[np.int64]]:
    """Confirmed near copies, each pair once in its best position, and images that met a crowded key."""
    known = hashes(thumbnails)
    best: dict[tuple[int, int], NearCopy] = {}
    crowded = []
    for position in range(len(POSITIONS)):
        moved = turned(thumbnails, position)
        distance = thresholds.turned_distance if position and len(known) > thresholds.many else thresholds.distance
        pairs, distances, many = near_pairs(hashes(moved), known, distance=distance, most=thresholds.crowd)
        crowded.append(many)
        for chunk in range(0, len(pairs), 4096):
            part, bits = pairs[chunk : chunk + 4096], distances[chunk : chunk + 4096]
            alike = likeness(moved[part[:, 0]], thumbnails[part[:, 1]])
            for index in np.flatnonzero(alike >= thresholds.likeness):
                first, second = int(part[index, 0]), int(part[index, 1])
                copy = NearCopy(first, second, int(bits[index]), float(alike[index]), position)
                held = best.get((first, second))
                if held is None or copy.likeness > held.likeness:
                    best[first, second] = copy
    return [best[pair] for pair in sorted(best)], np.unique(np.concatenate(crowded))


def _alike(facts: Sequence[Facts], column: str) -> dict[str, list[int]]:
    """Positions of readable images, by a hash of theirs."""
    members: dict[str, list[int]] = defaultdict(list)
    hashed, problems = column_of(facts, column), column_of(facts, "problem")
    for index, (value, problem) in enumerate(zip(hashed, problems, strict=True)):
        if not problem:
            members[value].append(index)
    return members


def _same_shape(first: Facts, second: Facts, position: int) -> bool:
    """Whether the proportions agree within a twentieth, once turned: a thumbnail has lost them."""
    width, height = (first.height, first.width) if position % 2 else (first.width, first.height)
    return abs(width * second.height / (height * second.width) - 1) <= 0.05
