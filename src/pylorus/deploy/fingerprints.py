"""Fingerprints of the development images in a bundle, and copies of these images among others.

Development images are those that the network was trained or validated on. What the fingerprints are, and what they
reveal, is said in `pylorus.data.fingerprints` and `docs/fingerprints.md`.
"""

import hashlib
import logging
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pylorus.core.errors import PylorusError, format_path
from pylorus.core.formatting import format_count
from pylorus.data.fact_store import FactTable
from pylorus.data.files import Root
from pylorus.data.fingerprints import (
    BITS,
    DIGEST_BYTES,
    SALT_BYTES,
    VERSION,
    Fingerprints,
    Match,
    create_fingerprints,
    find_matches,
)
from pylorus.data.image_facts import load_or_compute_facts
from pylorus.deploy.description import FingerprintSummary
from pylorus.deploy.verified_files import DESCRIPTION, FINGERPRINTS, TensorEntry, VerifiedFolder

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
