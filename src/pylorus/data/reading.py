"""The files of an image set, read once: what each of them is, and what becomes of those that give no image."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pylorus.data.content import Root
from pylorus.data.facts import FactTable, facts_of
from pylorus.data.patients import patients_of
from pylorus.data.unreadable import shown
from pylorus.errors import PylorusError, listing


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        store: Folder where facts of images are kept, by content; None: nothing is kept.
        on_error: `fail`: a file that can't be read is an error; `quarantine`: it is left out and listed.
        salt: Of the hashes that stand for DICOM's patients, which then are the groups; None: groups come from paths
            or a manifest.
    """

    store: Path | None = None
    on_error: str = "fail"
    salt: str | None = None


AS_THEY_ARE = Reading()
"""Nothing is kept, nothing is left out."""


def read_files(files: pd.DataFrame, root: Root, reading: Reading) -> tuple[pd.DataFrame, FactTable, list[str]]:
    """Reads every file once.

    Args:
        files: One row a file, with path and group; and sha256, where contents are on record.
        root: What the paths lie below.
        reading: How.

    Returns:
        The files with sample_id, width, height and sha256; what each of them is; and why it gives no image, empty
        where it gives one.

    Raises:
        PylorusError: Names the files that can't be read, unless they may be left out.
    """
    paths = list(files["path"])
    digests = list(files["sha256"]) if "sha256" in files else None
    facts = facts_of(root, paths, store=reading.store, digests=digests)
    reasons: list[str] = list(facts.column("problem"))
    broken = [f"{shown(Path(path))}: {reason}" for path, reason in zip(paths, reasons, strict=True) if reason]
    if broken and reading.on_error == "fail":
        raise PylorusError(
            f"{root}: {len(broken)} of {len(paths)} images can't be read:\n{listing(broken)}\n"
            "Mend them, move them out of the class folders, or leave them out with data.on_error=quarantine, which "
            "lists them in quarantine.csv."
        )
    if reading.salt is not None:
        files = files.assign(group=patients_of(root, paths, reasons, salt=reading.salt))
    found = facts.column("sha256")
    read = files.assign(
        sample_id=[sample_id(path, digest) for path, digest in zip(paths, found, strict=True)],
        width=facts.column("width"),
        height=facts.column("height"),
        sha256=found,
    )
    return read, facts, reasons


def sample_id(path: str, sha256: str) -> str:
    """The id of an image: 16 hexadecimal digits from its path and its content.

    It stands for the image where no name may. Who guesses a file's name can't recompute it without the file's bytes.
    """
    return hashlib.sha256(os.fsencode(f"{path}\0{sha256}")).hexdigest()[:16]
