"""Group DICOM files by patient: a salted hash replaces each PatientID; the salt never leaves this machine."""

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pylorus.data.content import Root
from pylorus.data.dicom import read_patient_pseudonym
from pylorus.data.unreadable import UnreadableImageError, format_path
from pylorus.errors import PylorusError, format_name_list

SALT = "salt"
"""File of the salt in the cache folder. With it, whoever knows a hospital's patient numbers can reverse a hash."""


def ensure_salt(folder: Path) -> str:
    """Return the salt stored in a folder; the first call creates it, readable by its owner only.

    Raises:
        PylorusError: If the folder can't be written to, or the file does not contain a salt.
    """
    path = folder / SALT
    try:
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create_salt(path)
        salt = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PylorusError(f"{path}: can't read or create the salt of the patients' hashes: {error}") from error
    if len(salt) != 64:
        raise PylorusError(
            f"{path}: found {len(salt)} characters, expected a salt of 64. Delete the file to create a new salt."
        )
    return salt


def read_patient_pseudonyms(root: Root, paths: Sequence[str], reasons: Sequence[str], *, salt: str) -> list[str]:
    """Return a pseudonym of the patient of each file.

    Args:
        root: What the paths are relative to.
        paths: Paths of the files.
        reasons: Why each file is unreadable, empty if it is readable; unreadable files get an empty pseudonym.
        salt: Secret that the pseudonyms are hashed with.

    Raises:
        PylorusError: If a readable file names no patient; the message names it.
    """

    def read_pseudonym(path: str, reason: str) -> str | None:
        if reason:
            return ""
        try:
            return read_patient_pseudonym(root / path, salt=salt)
        except UnreadableImageError:
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        patients = list(pool.map(read_pseudonym, paths, reasons))
    nameless = [format_path(Path(path)) for path, patient in zip(paths, patients, strict=True) if patient is None]
    if nameless:
        raise PylorusError(
            f"data.patients=dicom: {len(nameless)} of {len(paths)} files are not DICOM or name no patient:\n"
            f"{format_name_list(nameless)}\nDefine the patients by data.group or by a manifest's column group instead."
        )
    return [str(patient) for patient in patients]


def _create_salt(path: Path) -> None:
    """Write a new salt atomically; if another process was first, its salt stays."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
