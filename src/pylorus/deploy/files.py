"""The files of a bundle: each lies in its folder itself and has the hash that SHA256SUMS lists."""

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
"""What a bundle holds beside the list of their hashes."""
MODEL = "model.onnx"
"""What an export holds in place of the weights; see `pylorus.deploy.exported`."""
MOST_SUMS = 65_536


def checked_sums(folder: Path, files: Sequence[str] = FILES) -> dict[str, str]:
    """The hash of each file, as SHA256SUMS lists them and as they are.

    Args:
        folder: Of a bundle or an export.
        files: What it must hold.

    Raises:
        PylorusError: If it is no bundle, or a file is missing, changed, or no ordinary file of this very folder.
    """
    if not folder.is_dir():
        kind = "a file, which is never loaded: it could hold a pickle" if folder.is_file() else "nothing"
        raise PylorusError(f"{folder}: found {kind}, expected a bundle: the folder `model` of a run.")
    if (folder / "model" / SUMS).is_file():
        raise PylorusError(f"{folder}: is a run; its bundle is {folder / 'model'}.")
    listed = _listed(folder, files)
    for name, wanted in listed.items():
        _expect_file(folder / name)
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted:
            raise PylorusError(
                f"{folder / name}: its SHA-256 is {found[:12]}…, expected {wanted[:12]}… ({SUMS}): it was changed or "
                "damaged. Copy the bundle again from where it was made."
            )
    return listed


def _listed(folder: Path, files: Sequence[str]) -> dict[str, str]:
    path = folder / SUMS
    _expect_file(path)
    with path.open("rb") as file:
        lines = file.read(MOST_SUMS + 1)
    listed: dict[str, str] = {}
    for line in lines.decode("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if len(lines) > MOST_SUMS or len(digest) != 64 or set(digest) - set("0123456789abcdef") or name in listed:
            raise PylorusError(f"{path}: found {line[:80]!r}, expected a SHA-256, two spaces and a file's name a line.")
        if name in ("", ".", "..") or set(name) & set("/\\:") or not name.isprintable():
            raise PylorusError(f"{path}: found the name {name[:80]!r}, expected a file of this folder.")
        listed[name] = digest
    missing = [name for name in files if name not in listed]
    if missing and MODEL in listed:
        raise PylorusError(
            f"{folder}: is an export, of which `pylorus predict` makes predictions; this needs the bundle itself: the "
            "folder `model` of the run that it was exported from."
        )
    if missing:
        raise PylorusError(f"{path}: lists no {missing[0]}. Copy the bundle again from where it was made.")
    return listed


def _expect_file(path: Path) -> None:
    """Refuses what is not an ordinary file of this very folder: a link could lead anywhere."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise PylorusError(f"{path}: {error.strerror or error}; expected a file of a bundle.") from error
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no ordinary file"
        raise PylorusError(f"{path}: is {kind}, expected a file: a bundle holds its files itself.")
