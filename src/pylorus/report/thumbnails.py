"""Small pictures of single images, for a report that may show them: the only part that looks at images at all."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pylorus.data.image import RGB, UnreadableImageError, decode, fit
from pylorus.report.saved_run import SavedRun

SIDE = 160
"""Pixels of a thumbnail's side."""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture.

    Attributes:
        sample: Id of the image.
        jpeg: The picture in base64, without any of the file's metadata; empty where there is none.
        missing: Why there is none; empty where there is one.
    """

    sample: str
    jpeg: str
    missing: str


def thumbnails_of(run: SavedRun, samples: Sequence[str]) -> dict[str, Thumbnail]:
    """Reads images of a run by their ids; one that is gone or was changed since is said to be."""
    assert run.split is not None
    if run.setting("data.kind") == "shards":
        return {sample: Thumbnail(sample, "", "it lies in a shard") for sample in samples}
    rows = run.split.table.set_index("sample_id")
    root = run.folder / "images" if run.setting("data.kind") == "synthetic" else Path(str(run.setting("data.root", "")))
    return {
        sample: _thumbnail(sample, root / str(rows.loc[sample, "path"]), str(rows.loc[sample, "sha256"]))
        for sample in samples
    }


def _thumbnail(sample: str, path: Path, sha256: str) -> Thumbnail:
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            return Thumbnail(sample, "", "the file has changed since the run")
        image = decode(content)
    except OSError:
        return Thumbnail(sample, "", "the file is not there any more")
    except UnreadableImageError as error:
        return Thumbnail(sample, "", str(error))
    return Thumbnail(sample, small_jpeg(image), "")


def small_jpeg(image: RGB) -> str:
    """An image as a small JPEG in base64, without any of its file's metadata."""
    file = io.BytesIO()
    Image.fromarray(fit(image, size=SIDE, how="pad", interpolation="lanczos")).save(file, format="JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
