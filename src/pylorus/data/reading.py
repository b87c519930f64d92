"""Read each file of an image set once: collect its facts, and reject or leave out unreadable files."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pylorus.data.content import Root
from pylorus.data.facts import FactTable, load_or_compute_facts
from pylorus.data.patients import read_patient_pseudonyms
from pylorus.data.unreadable import format_path
from pylorus.errors import PylorusError, format_name_list


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading image files.

    Attributes:
        store: Folder of the cache of image facts; None: nothing is cached.
        on_error: `fail`: a file that can't be read is an error; `quarantine`: it is left out and listed.
        salt: Secret for hashing the patients in DICOM files, which then are the groups; None: groups come from paths
            or a manifest.
    """

    store: Path | None = None
    on_error: str = "fail"
    salt: str | None = None


DEFAULT_READ_OPTIONS = ReadOptions()
"""Default options: nothing is cached, and an unreadable file is an error."""


def read_files(files: pd.DataFrame, root: Root, reading: ReadOptions) -> tuple[pd.DataFrame, FactTable, list[str]]:
    """Read every file once.

    Args:
        files: One row per file, with path and group, and with sha256 if contents are on record.
        root: What the paths are relative to.
        reading: Cache, handling of unreadable files, and salt.

    Returns:
        The files with sample_id, width, height and sha256; the facts of each; and why each is unreadable, empty if it
        is readable.

    Raises:
        PylorusError: If files can't be read and may not be left out; the message names them.
    """
    paths = list(files["path"])
    digests = list(files["sha256"]) if "sha256" in files else None
    facts = load_or_compute_facts(root, paths, store=reading.store, digests=digests)
    reasons: list[str] = list(facts.get_column("problem"))
    unreadable = [f"{format_path(Path(path))}: {reason}" for path, reason in zip(paths, reasons, strict=True) if reason]
    if unreadable and reading.on_error == "fail":
        raise PylorusError(
            f"{root}: {len(unreadable)} of {len(paths)} images can't be read:\n{format_name_list(unreadable)}\n"
            "Replace them, move them out of the class folders, or leave them out with data.on_error=quarantine, which "
            "lists them in quarantine.csv."
        )
    if reading.salt is not None:
        files = files.assign(group=read_patient_pseudonyms(root, paths, reasons, salt=reading.salt))
    hashes = facts.get_column("sha256")
    described = files.assign(
        sample_id=[compute_sample_id(path, digest) for path, digest in zip(paths, hashes, strict=True)],
        width=facts.get_column("width"),
        height=facts.get_column("height"),
        sha256=hashes,
    )
    return described, facts, reasons


def compute_sample_id(path: str, sha256: str) -> str:
    """Compute the id of an image: 16 hexadecimal digits from its path and its content.

    It identifies the image where file names must not appear. It can't be computed from a guessed file name alone.
    """
    return hashlib.sha256(os.fsencode(f"{path}\0{sha256}")).hexdigest()[:16]
