"""Salted fingerprints of images, by which copies among other images are found without the images themselves.

Two levels. Exact: keyed hashes (HMAC-SHA-256) of a file's bytes and of its decoded pixels. Near: a code of 256 bits, by
which an image is recognized after it was saved again, scaled, rotated by 90°, mirrored or cropped a little. The code
must be comparable by distance, so it can't be a cryptographic hash: it holds the signs of random projections (Charikar
2002) of the middle frequencies of the image's central part, and the salt determines the projections. The central part
is what a cropped copy still shows; where it is in the other image is searched for there.

A bundle may carry those of its development images, the ones that the network was trained or validated on. Whoever has
fingerprints and an image can find out whether that image is among them. `docs/fingerprints.md` says what else they
reveal.
"""

import hashlib
import hmac
import logging
import secrets
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pylorus.core.distributed import count_free_cores, get_threads
from pylorus.core.errors import PylorusError, format_path
from pylorus.core.formatting import format_count
from pylorus.data.fact_store import FactTable
from pylorus.data.files import Root
from pylorus.data.image_facts import load_or_compute_facts
from pylorus.data.image_measures import (
    ORIENTATIONS,
    THUMBNAIL_SIDE,
    fill_black,
)
from pylorus.deploy.description import FingerprintSummary
from pylorus.deploy.verified_files import DESCRIPTION, FINGERPRINTS, TensorEntry, VerifiedFolder

VERSION = 1
"""Increment when the same image and salt would give another fingerprint."""
SALT_BYTES, DIGEST_BYTES = 32, 16
BITS = 256
"""Bits of a near code."""
MARGIN = 0.1
"""What a copy may lack on each side, as a fraction of the image's side: the code is of what is inside the margins."""
FREQUENCIES = 18
"""Frequencies of the cosine transform on each side, with the constant."""
LEAST_RADIUS = 4.5
"""Frequencies below this radius are left out: images of different subjects share a bright center and a darker edge."""
LEAST_CONTRAST = 0.25
"""Root mean square of the middle frequencies, in grey levels, below which an image has nothing to recognize."""
LEAST_AGREEMENT = 222
"""Bits of a near copy's code that agree. `benchmarks/fingerprints.py` measures what is found and what is not."""
LEAST_CORRELATION = 0.4
"""Estimated correlation from which the search for the best window goes on."""
MOST_CANDIDATES = 16
"""Fingerprints for which the search goes on, per image."""
CUTS = (0.0, 0.1 / 3, 0.2 / 3, 0.1)
"""What the other image may lack on a side, where the search starts."""
SURPLUS = (0.1 / 3, 0.2 / 3, 0.1)
"""What it may show more on both sides of an axis, where the search starts, if the image in training was cropped."""
LEAST_CUT, MOST_CUT = -0.12, 0.12
"""Limits of the search: what the other image lacks on a side; below zero, what it shows more."""
STEPS = (0.0167, 0.0083, 0.0042)
"""Steps in which the search goes on."""
BLOCK = 1024
"""Thumbnails that are processed at once."""

Spectra: TypeAlias = NDArray[np.float32]
Level: TypeAlias = Literal["file", "pixels", "near"]

_frequency = np.arange(FREQUENCIES)
_radius = np.hypot(_frequency[:, None], _frequency)
_SELECTED = (_radius > LEAST_RADIUS) & (_radius < FREQUENCIES - 0.5)
_WEIGHTS = np.sqrt(_radius[_SELECTED] * np.where(np.outer(_frequency, _frequency)[_SELECTED] > 0, 2, 1)).astype(
    np.float32
)
LENGTH = int(_SELECTED.sum())
"""Frequencies from which a code is computed."""


@dataclass(frozen=True)
class Match:
    """An image that is a copy of one with a fingerprint.

    Attributes:
        index: Index of the image among those compared.
        level: `file`: identical bytes; `pixels`: identical pixels; `near`: the same image after some change.
        agreement: Bits of the code that agree; `BITS` for identical files or pixels.
        position: Orientation of the image: index into `ORIENTATIONS`.
    """

    index: int
    level: Level
    agreement: int = BITS
    position: int = 0

    @property
    def description(self) -> str:
        """Description for tables and messages."""
        if self.level != "near":
            return "identical file" if self.level == "file" else "identical pixels"
        change = f", {ORIENTATIONS[self.position]}" if self.position else ""
        return f"near copy{change} ({self.agreement} of {BITS} bits agree)"


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Fingerprints of images; the rows of each array are sorted, so that their order says nothing.

    Attributes:
        salt: 32 bytes that no other set of images has.
        files: Keyed hashes of the files' bytes, uint8 of shape (images, 16).
        pixels: Keyed hashes of the decoded pixels, uint8 of shape (images, 16).
        codes: Near codes, uint8 of shape (images with contrast, 32).
    """

    salt: bytes
    files: NDArray[np.uint8]
    pixels: NDArray[np.uint8]
    codes: NDArray[np.uint8]

    @cached_property
    def projections(self) -> NDArray[np.float32]:
        """The projections that the salt determines: 1 and -1, of shape (LENGTH, BITS)."""
        stream = hashlib.shake_256(self.salt + b"projections").digest(LENGTH * BITS // 8)
        bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8)).reshape(LENGTH, BITS)
        return bits.astype(np.float32) * 2 - 1

    @cached_property
    def signs(self) -> NDArray[np.float32]:
        """The codes as 1 and -1, of shape (codes, BITS)."""
        return np.unpackbits(self.codes, axis=1).astype(np.float32) * 2 - 1


def create_fingerprints(
    files: Sequence[str], pixels: Sequence[str], thumbnails: NDArray[np.uint8], *, salt: bytes | None = None
) -> Fingerprints:
    """Compute the fingerprints of images.

    Args:
        files: Hash of the bytes of each image's file.
        pixels: Hash of each image's decoded pixels.
        thumbnails: Of the images, of shape (images, side, side).
        salt: 32 bytes; None: they are drawn at random.
    """
    salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
    codes = np.zeros((0, BITS // 8), dtype=np.uint8)
    exact = [_sort_rows(_hash_all(salt, level, each)) for level, each in (("file", files), ("pixels", pixels))]
    fingerprints = Fingerprints(salt, exact[0], exact[1], codes)
    blocks = [codes]
    for start in range(0, len(thumbnails), BLOCK):
        spectra = _compute_central_spectra(thumbnails[start : start + BLOCK])
        spectra = spectra[_has_structure(spectra)] * _WEIGHTS
        blocks.append(np.packbits(spectra @ fingerprints.projections > 0, axis=1))
    return replace(fingerprints, codes=_sort_rows(np.concatenate(blocks)))


def _compute_central_spectra(thumbnails: NDArray[np.uint8]) -> Spectra:
    """Return the middle frequencies of the central part of thumbnails, in grey levels, of shape (images, LENGTH)."""
    bases = _build_bases(np.array([[MARGIN, 1 - MARGIN]]))[0]
    return np.asarray((bases @ fill_black(thumbnails) @ bases.T)[:, _SELECTED], dtype=np.float32)


def _has_structure(spectra: Spectra) -> NDArray[np.bool_]:
    """Return whether there is anything to recognize: all blank or smooth images would be copies of each other."""
    return np.asarray(np.linalg.norm(spectra, axis=1) >= LEAST_CONTRAST, dtype=np.bool_)


def _hash_all(salt: bytes, level: str, hashes: Sequence[str]) -> NDArray[np.uint8]:
    """Return keyed hashes of the hashes of files or pixels, of shape (images, 16)."""
    digests = (hmac.digest(salt, f"{level} {value}".encode(), "sha256")[:DIGEST_BYTES] for value in hashes)
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


def _sort_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rows[np.lexsort(rows.T[::-1])])


def _build_bases(windows: NDArray[np.floating]) -> Spectra:
    """Return the cosine transform of windows of one axis, of shape (windows, FREQUENCIES, side).

    Args:
        windows: Where they begin and end, as fractions of the side, of shape (windows, 2).
    """
    begin, end = windows[:, 0, None], windows[:, 1, None]
    inside = ((np.arange(THUMBNAIL_SIDE) + 0.5) / THUMBNAIL_SIDE - begin) / (end - begin)
    weight = np.clip((0.5 - np.abs(inside - 0.5)) * (end - begin) * THUMBNAIL_SIDE + 0.5, 0, 1)
    bases = np.cos(np.pi * _frequency[:, None] * inside[:, None, :]) * weight[:, None, :]
    # Without the share of the constant: an image is recognized if it is brighter.
    bases[:, 1:] -= bases[:, :1] * bases[:, 1:].sum(axis=2, keepdims=True) / bases[:, :1].sum(axis=2, keepdims=True)
    return np.asarray(bases / weight.sum(axis=1)[:, None, None], dtype=np.float32)


def _list_windows(cuts: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return where the central part of an image is in one that lacks something of it at its begin and end.

    Args:
        cuts: What it lacks, as fractions of the image's side, of shape (windows, 2).
    """
    length = 1 - cuts.sum(axis=1)
    return np.stack([(MARGIN - cuts[:, 0]) / length, (1 - MARGIN - cuts[:, 0]) / length], axis=1)


_START_CUTS = np.array([*((begin, end) for begin in CUTS for end in CUTS), *((-more, -more) for more in SURPLUS)])
_START_BASES = _build_bases(_list_windows(_START_CUTS))
_NEIGHBORS = np.array([(begin, end) for begin in (-1, 0, 1) for end in (-1, 0, 1)])


def _compute_spectra(image: Spectra, vertical: Spectra, horizontal: Spectra) -> Spectra:
    """Return the spectra of all windows, of shape (vertical windows × horizontal windows, frequencies, frequencies)."""
    values = vertical.reshape(-1, THUMBNAIL_SIDE) @ image @ horizontal.reshape(-1, THUMBNAIL_SIDE).T
    spectra = values.reshape(len(vertical), FREQUENCIES, len(horizontal), FREQUENCIES).transpose(0, 2, 1, 3)
    return np.asarray(spectra.reshape(-1, FREQUENCIES, FREQUENCIES), dtype=np.float32)


def _orient_image(image: Spectra, position: int) -> Spectra:
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if position >= 4 else image, k=position % 4))


def _normalize_projections(spectra: Spectra, projections: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the projections of unit vectors, of shape (spectra, BITS)."""
    vectors = spectra[:, _SELECTED] * _WEIGHTS
    norm = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return np.asarray((vectors / norm) @ projections, dtype=np.float32)


def find_matches(
    fingerprints: Fingerprints, files: Sequence[str], pixels: Sequence[str], thumbnails: NDArray[np.uint8]
) -> list[Match]:
    """Find copies of the images with fingerprints among others, each once, at the closest level.

    Args:
        fingerprints: Of the images that copies are searched of.
        files: Hash of the bytes of each other image's file.
        pixels: Hash of each one's decoded pixels.
        thumbnails: Of the others, of shape (images, side, side).
    """
    matches: dict[int, Match] = {}
    levels: tuple[tuple[Level, Sequence[str], NDArray[np.uint8]], ...] = (
        ("pixels", pixels, fingerprints.pixels),
        ("file", files, fingerprints.files),  # last, as it is the closest
    )
    for level, hashes, known in levels:
        keys = {row.tobytes() for row in known}
        keyed = _hash_all(fingerprints.salt, level, hashes)
        matches |= {index: Match(index, level) for index, row in enumerate(keyed) if row.tobytes() in keys}
    searched = [index for index in range(len(thumbnails)) if index not in matches]
    results = get_threads(count_free_cores()).map(lambda index: _match_image(fingerprints, thumbnails[index]), searched)
    for index, (agreement, position) in zip(searched, results, strict=True):
        if agreement >= LEAST_AGREEMENT:
            matches[index] = Match(index, "near", agreement, position)
    return [matches[index] for index in sorted(matches)]


def measure_agreements(fingerprints: Fingerprints, thumbnail: NDArray[np.uint8]) -> dict[int, int]:
    """Return how many bits of an image's code agree with those of the fingerprints for which it was searched.

    Args:
        fingerprints: Of the other images.
        thumbnail: Of the image, of shape (side, side).

    Returns:
        The bits of the best window by the index of the code; a code that is not similar at the start has no entry.
    """
    return {code: agreement for code, (agreement, _) in _search_windows(fingerprints, thumbnail).items()}


def _match_image(fingerprints: Fingerprints, thumbnail: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the bits of the most similar code that agree, and the orientation; -1 if there is no candidate."""
    return max(_search_windows(fingerprints, thumbnail).values(), default=(-1, 0))


def _search_windows(fingerprints: Fingerprints, thumbnail: NDArray[np.uint8]) -> dict[int, tuple[int, int]]:
    """Search for the codes of other images in the windows of an image; return agreement and orientation by code."""
    if not len(fingerprints.codes) or not _has_structure(_compute_central_spectra(thumbnail[None]))[0]:
        return {}
    image = fill_black(thumbnail[None])[0]
    oriented = [_orient_image(image, position) for position in range(len(ORIENTATIONS))]
    starts = np.concatenate(
        [
            _normalize_projections(_compute_spectra(each, _START_BASES, _START_BASES), fingerprints.projections)
            for each in oriented
        ]
    )
    scale = np.sqrt(np.pi / 2) / BITS  # the mean of |x| of a standard normal x is √(2/π)
    best, score = np.zeros(len(fingerprints.signs), np.int64), np.zeros(len(fingerprints.signs), np.float32)
    for begin in range(0, len(best), 4096):
        similarity = starts @ fingerprints.signs[begin : begin + 4096].T
        best[begin : begin + 4096] = similarity.argmax(axis=0)
        score[begin : begin + 4096] = similarity.max(axis=0) * scale
    candidates = np.argsort(-score, kind="stable")[:MOST_CANDIDATES]
    windows = len(_START_CUTS) ** 2
    return {
        int(code): (
            _refine_window(
                fingerprints,
                oriented[best[code] // windows],
                int(code),
                *divmod(best[code] % windows, len(_START_CUTS)),
            ),
            int(best[code] // windows),
        )
        for code in candidates
        if score[code] >= LEAST_CORRELATION
    }


def _refine_window(fingerprints: Fingerprints, image: Spectra, code: int, vertical: int, horizontal: int) -> int:
    """Search around a window for the one that fits a code best, and return how many bits agree there."""
    signs = fingerprints.signs[code]
    rows, columns = _START_CUTS[vertical], _START_CUTS[horizontal]
    agreement = -1
    for step in STEPS:
        row_cuts, column_cuts = (np.clip(each + step * _NEIGHBORS, LEAST_CUT, MOST_CUT) for each in (rows, columns))
        bases = [_build_bases(_list_windows(each)) for each in (row_cuts, column_cuts)]
        projected = _normalize_projections(_compute_spectra(image, *bases), fingerprints.projections)
        best = int((projected @ signs).argmax())
        rows, columns = row_cuts[best // len(_NEIGHBORS)], column_cuts[best % len(_NEIGHBORS)]
        agreement = max(agreement, int(((projected[best] > 0) == (signs > 0)).sum()))
    return agreement


def measure_reconstruction(
    thumbnails: NDArray[np.uint8], *, salt: bytes
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Measure how much of images can be rebuilt linearly from their codes by someone who knows the salt.

    Args:
        thumbnails: Images with structure, of shape (images, side, side).
        salt: The salt of the fingerprints.

    Returns:
        Correlation of what is rebuilt with the middle frequencies of the image's central part, and with that part of
        the thumbnail itself; both of shape (images,).
    """
    projections = Fingerprints(salt, *([np.zeros((0, 1), dtype=np.uint8)] * 3)).projections
    spectra = _compute_central_spectra(thumbnails) * _WEIGHTS
    signs = np.where(spectra @ projections > 0, 1, -1).astype(np.float32)
    gram = projections @ projections.T + BITS / 2 * np.eye(LENGTH, dtype=np.float32)
    rebuilt = signs @ np.linalg.solve(gram, projections).T.astype(np.float32)
    low, high = round(MARGIN * THUMBNAIL_SIDE), round((1 - MARGIN) * THUMBNAIL_SIDE)
    central = fill_black(thumbnails)[:, low:high, low:high]
    bases = _build_bases(np.array([[MARGIN, 1 - MARGIN]]))[0][:, low:high]
    full = np.zeros((len(thumbnails), FREQUENCIES, FREQUENCIES), dtype=np.float32)
    full[:, _SELECTED] = rebuilt / _WEIGHTS * np.where(np.outer(_frequency, _frequency)[_SELECTED] > 0, 4, 2)
    pictures = bases.T @ full @ bases

    def correlate(first: Spectra, second: Spectra) -> NDArray[np.float32]:
        first, second = (
            each.reshape(len(each), -1) - each.reshape(len(each), -1).mean(axis=1)[:, None] for each in (first, second)
        )
        norm = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        return np.asarray((first * second).sum(axis=1) / np.maximum(norm, 1e-9), dtype=np.float32)

    cosine = (rebuilt * spectra).sum(axis=1) / (np.linalg.norm(rebuilt, axis=1) * np.linalg.norm(spectra, axis=1))
    return np.asarray(cosine, dtype=np.float32), correlate(pictures, central)


log = logging.getLogger(__name__)

NOT_CARRIED = "not compared: the bundle carries no fingerprints (deploy.fingerprints=true when training)"
NOT_EXPORTED = "not compared: an export carries no fingerprints, only the bundle itself can"
MOST_SHOWN = 10
"""Copies that are listed in a terminal."""


def derive_salt(weights: Mapping[str, Tensor]) -> bytes:
    """Derive the salt of a bundle from its weights: nobody knows it before, and a run that resumes gets it again."""
    digest = hashlib.sha256(b"pylorus fingerprints")
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def build_fingerprints(root: Root, images: pd.DataFrame, *, store: Path, salt: bytes) -> Fingerprints:
    """Compute the fingerprints of a run's training and validation images.

    Args:
        root: What the paths are relative to.
        images: The images, with their path and sha256.
        store: Folder of the cache of facts: images whose facts are there are not read again.
        salt: 32 bytes; see `derive_salt`.
    """
    facts = load_or_compute_facts(root, list(images["path"]), store=store, digests=list(images["sha256"]))
    readable = np.flatnonzero(facts.get_column("problem") == "")
    fingerprints = create_fingerprints(*_select_columns(facts, readable), salt=salt)
    size = 2 * DIGEST_BYTES + BITS // 8
    log.info("model    fingerprints of %s, %d bytes each", format_count(len(readable), "image"), size)
    return fingerprints


def _select_columns(
    facts: FactTable, rows: NDArray[np.integer[Any]]
) -> tuple[Sequence[str], Sequence[str], NDArray[np.uint8]]:
    """Return the hashes of files and pixels and the thumbnails of some images."""
    return list(facts.get_column("sha256")[rows]), list(facts.get_column("pixels")[rows]), facts.thumbnails[rows]


def summarize_fingerprints(fingerprints: Fingerprints) -> FingerprintSummary:
    """Return what model.json says about fingerprints."""
    return FingerprintSummary(VERSION, len(fingerprints.files), len(fingerprints.codes))


def convert_fingerprints(fingerprints: Fingerprints) -> dict[str, Tensor]:
    """Return fingerprints as the tensors of their file in a bundle."""
    arrays = {"files": fingerprints.files, "pixels": fingerprints.pixels, "codes": fingerprints.codes}
    salt = np.frombuffer(fingerprints.salt, dtype=np.uint8)
    return {name: torch.from_numpy(array.copy()) for name, array in {"salt": salt, **arrays}.items()}


def read_fingerprints(files: VerifiedFolder, summary: FingerprintSummary | None) -> Fingerprints | None:
    """Read the fingerprints of a bundle; return None if it carries none.

    Args:
        files: The open files of the bundle.
        summary: What its model.json says about them.

    Raises:
        PylorusError: If the file is missing, damaged, of a newer version, or does not fit model.json.
    """
    tensor_file = files.tensor_files.get(FINGERPRINTS)
    if tensor_file is None or summary is None:
        if tensor_file is None and summary is None:
            return None
        found, expected = (DESCRIPTION, FINGERPRINTS) if tensor_file is None else (FINGERPRINTS, DESCRIPTION)
        raise PylorusError(
            f"{files.folder}: {found} has fingerprints of the development images, {expected} does not. Copy the bundle "
            "again from its original location."
        )
    if summary.version > VERSION:
        raise PylorusError(
            f"{files.folder / DESCRIPTION}: fingerprints.version: found {summary.version}, expected at most {VERSION}. "
            "A newer bundle needs a newer Pylorus."
        )
    shapes = {
        "salt": (SALT_BYTES,),
        "files": (summary.images, DIGEST_BYTES),
        "pixels": (summary.images, DIGEST_BYTES),
        "codes": (summary.compared, BITS // 8),
    }
    entries = {name: TensorEntry(torch.uint8, shape) for name, shape in shapes.items()}
    tensor_file.check_entries(entries, purpose=f"the {summary.images:,} fingerprints of {DESCRIPTION}")
    arrays = {name: tensor.numpy() for name, tensor in tensor_file.read_tensors().items()}
    return Fingerprints(arrays["salt"].tobytes(), arrays["files"], arrays["pixels"], arrays["codes"])


@dataclass(frozen=True)
class DevelopmentCopies:
    """Copies of a bundle's development images among others.

    Attributes:
        compared: Number of images that were compared; 0 if the bundle has no fingerprints.
        matches: The copies, by the index of the image.
        reason: Why nothing was compared; "" if it was.
    """

    compared: int
    matches: tuple[Match, ...]
    reason: str = ""

    @property
    def summary(self) -> str:
        """One or two sentences for a report."""
        if self.reason:
            return f"Copies of training or validation images were {self.reason}."
        images = format_count(self.compared, "image")
        if not self.matches:
            return f"Compared with the fingerprints of the training and validation images: no copy among {images}."
        counts = Counter[str](match.level for match in self.matches)
        words = (
            ("file", "identical file", "identical files"),
            ("pixels", "file with identical pixels", "files with identical pixels"),
            ("near", "near copy", "near copies"),
        )
        kinds = ", ".join(format_count(counts[level], one, many) for level, one, many in words if counts[level])
        verb = "is a copy of a training or validation image"
        if len(self.matches) > 1:
            verb = "are copies of training or validation images"
        return (
            f"{len(self.matches):,} of {images} {verb} ({kinds}). Results on them say "
            "nothing about new patients: remove these files and evaluate again."
        )

    def build_record(self, paths: Sequence[str]) -> dict[str, object]:
        """Return plain values for a record: counts, the summary, and the copies with their paths.

        Args:
            paths: Path of each image, in the order of the matches' indices.
        """
        files = [{"path": paths[match.index], "match": match.description} for match in self.matches]
        return {"compared": self.compared, "copies": len(files), "summary": self.summary, "files": files}


def find_development_images(
    fingerprints: Fingerprints | None,
    facts: FactTable,
    rows: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    *,
    is_export: bool = False,
) -> DevelopmentCopies:
    """Find copies of a bundle's training and validation images.

    Args:
        fingerprints: Those of the bundle; None if it has none.
        facts: Facts of the images to compare.
        rows: Index into `facts` of each image, in the order of the matches' indices; None: all. Files that can't be
            read are not compared.
        is_export: Whether the model is an export of a bundle, which never has fingerprints.
    """
    if fingerprints is None:
        return DevelopmentCopies(0, (), NOT_EXPORTED if is_export else NOT_CARRIED)
    selected = np.arange(len(facts)) if rows is None else np.asarray(rows, dtype=np.int64)
    readable = np.flatnonzero(facts.get_column("problem")[selected] == "")
    matches = find_matches(fingerprints, *_select_columns(facts, selected[readable]))
    return DevelopmentCopies(len(readable), tuple(replace(each, index=int(readable[each.index])) for each in matches))


def compare_files(
    fingerprints: Fingerprints | None, files: Iterable[tuple[str, Path]], *, is_export: bool = False
) -> dict[str, object]:
    """Search image files for copies of a bundle's training and validation images; return plain values for a record.

    Args:
        fingerprints: Those of the bundle; None if it has none, and no file is read then.
        files: Path of each image as tables write it, and its file.
        is_export: See `find_development_images`.
    """
    listed = [] if fingerprints is None else list(files)
    facts = load_or_compute_facts(Path(), [str(file.absolute()) for _, file in listed], store=None)
    copies = find_development_images(fingerprints, facts, is_export=is_export)
    return copies.build_record([path for path, _ in listed])


def format_comparison(record: Mapping[str, Any]) -> list[str]:
    """Return the lines on copies of development images for a terminal, from what `build_record` returned."""
    shown = [f"  {format_path(each['path'])}: {each['match']}" for each in record["files"][:MOST_SHOWN]]
    rest = len(record["files"]) - len(shown)
    return [*textwrap.wrap(record["summary"], width=110), *shown, *([f"  and {rest:,} more"] if rest else [])]
