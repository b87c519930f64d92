"""The files of a bundle: each is in the folder itself and has the hash that SHA256SUMS lists."""

import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path

from pylorus.errors import PylorusError

WEIGHTS, DESCRIPTION, UNLIKE, CARD, SUMS = (
    "model.safetensors",
    "model.json",
    "unlike.safetensors",
    "MODEL_CARD.md",
    "SHA256SUMS",
)
FILES = (WEIGHTS, DESCRIPTION, UNLIKE, CARD)
"""The files of a bundle, apart from the list of their hashes."""
MODEL = "model.onnx"
"""The file that an export has in place of the weights; see `pylorus.deploy.exported`."""
MOST_SUMS = 65_536
"""The largest SHA256SUMS that is read, in bytes."""


def verify_checksums(folder: Path, files: Sequence[str] = FILES) -> dict[str, str]:
    """Verify the files of a bundle against SHA256SUMS.

    Args:
        folder: Folder of a bundle or an export.
        files: Names of the files that it must contain.

    Returns:
        The SHA-256 of each file, by name.

    Raises:
        PylorusError: If the folder is not a bundle, or if a file is missing, changed, or not a regular file in this
            folder.
    """
    if not folder.is_dir():
        kind = "a file, which is never loaded because it could be a pickle" if folder.is_file() else "nothing"
        raise PylorusError(f"{folder}: found {kind}, expected a bundle: the folder `model` of a run.")
    if (folder / "model" / SUMS).is_file():
        raise PylorusError(f"{folder}: this is a run; its bundle is {folder / 'model'}.")
    hashes = _read_checksums(folder, files)
    for name, expected in hashes.items():
        _check_regular_file(folder / name)
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise PylorusError(
                f"{folder / name}: its SHA-256 is {digest[:12]}…, expected {expected[:12]}… ({SUMS}): the file was "
                "changed or damaged. Copy the bundle again from its original location."
            )
    return hashes


def _read_checksums(folder: Path, files: Sequence[str]) -> dict[str, str]:
    path = folder / SUMS
    _check_regular_file(path)
    with path.open("rb") as file:
        content = file.read(MOST_SUMS + 1)
    hashes: dict[str, str] = {}
    for line in content.decode("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if len(content) > MOST_SUMS or len(digest) != 64 or set(digest) - set("0123456789abcdef") or name in hashes:
            raise PylorusError(
                f"{path}: found {line[:80]!r}, expected a SHA-256, two spaces and a file name on each line."
            )
        if name in ("", ".", "..") or set(name) & set("/\\:") or not name.isprintable():
            raise PylorusError(f"{path}: found the name {name[:80]!r}, expected the name of a file in this folder.")
        hashes[name] = digest
    missing = [name for name in files if name not in hashes]
    if missing and MODEL in hashes:
        raise PylorusError(
            f"{folder}: this is an export, which only `pylorus predict` accepts. This command needs the bundle itself: "
            "the folder `model` of the run that it was exported from."
        )
    if missing:
        raise PylorusError(f"{path}: does not list {missing[0]}. Copy the bundle again from its original location.")
    return hashes


def _check_regular_file(path: Path) -> None:
    """Reject anything but a regular file in this folder: a link could lead anywhere."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise PylorusError(f"{path}: {error.strerror or error}; expected a file of a bundle.") from error
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "something that is not a regular file"
        raise PylorusError(f"{path}: found {kind}, expected a file: a bundle contains its files itself.")
