"""Patients of DICOM files as groups: a salted hash in place of each PatientID, and the salt that stays here."""

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pylorus.data.content import Root
from pylorus.data.dicom import patient_of
from pylorus.data.unreadable import UnreadableImageError, shown
from pylorus.errors import PylorusError, listing

SALT = "salt"
"""File in the cache's folder. Who has it and knows a hospital's numbers can find out who a hash stands for."""


def salt_of(folder: Path) -> str:
    """The salt that a folder keeps; made at the first call, for its owner only.

    Raises:
        PylorusError: If the folder can't be written to, or the file is not as it was made.
    """
    path = folder / SALT
    try:
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make(path)
        salt = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PylorusError(f"{path}: the salt of patients' hashes can't be kept there: {error}") from error
    if len(salt) != 64:
        raise PylorusError(f"{path}: found {len(salt)} letters, expected a salt of 64. Remove it to make a new one.")
    return salt


def patients_of(root: Root, paths: Sequence[str], reasons: Sequence[str], *, salt: str) -> list[str]:
    """A stand-in for the patient of each file; empty where the file is unreadable, as `reasons` say.

    Raises:
        PylorusError: If a readable file names no patient; names it.
    """

    def of(path: str, reason: str) -> str | None:
        if reason:
            return ""
        try:
            return patient_of(root / path, salt=salt)
        except UnreadableImageError:
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = list(pool.map(of, paths, reasons))
    nameless = [shown(Path(path)) for path, patient in zip(paths, found, strict=True) if patient is None]
    if nameless:
        raise PylorusError(
            f"data.patients=dicom: {len(nameless)} of {len(paths)} files are no DICOM files or name no patient:\n"
            f"{listing(nameless)}\nGive the patients by data.group or a manifest's column group instead."
        )
    return [str(patient) for patient in found]


def _make(path: Path) -> None:
    """Writes a new salt whole; where another process was first, its salt stays."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
