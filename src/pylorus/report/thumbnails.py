"""Small pictures of single images, for a report that may show them: the only part that looks at images at all."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
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
        overlay: The network's input with the heat map over it, as `jpeg`; empty where none was drawn.
    """

    sample: str
    jpeg: str
    missing: str
    overlay: str = ""


def thumbnails_of(
    run: SavedRun, samples: Sequence[str], overlays: Mapping[str, str] | None = None
) -> dict[str, Thumbnail]:
    """Reads images of a run by their ids; one that is gone or was changed since is said to be.

    Args:
        run: The run.
        samples: Ids of its images.
        overlays: Heat maps by these ids, from `pylorus.report.maps`.
    """
    return {sample: _thumbnail(run, sample, (overlays or {}).get(sample, "")) for sample in samples}


def file_of(run: SavedRun, sample: str) -> Path:
    """Where the file of an image lay when the run was made."""
    assert run.split is not None
    root = run.folder / "images" if run.setting("data.kind") == "synthetic" else Path(str(run.setting("data.root", "")))
    return root / str(run.split.table.set_index("sample_id").loc[sample, "path"])


def image_of(run: SavedRun, sample: str) -> RGB:
    """An image of a run, of shape (height, width, 3).

    Raises:
        UnreadableImageError: If it is gone, was changed since, or lies in a shard.
    """
    assert run.split is not None
    if run.setting("data.kind") == "shards":
        raise UnreadableImageError("it lies in a shard")
    try:
        content = file_of(run, sample).read_bytes()
    except OSError:
        raise UnreadableImageError("the file is not there any more") from None
    if hashlib.sha256(content).hexdigest() != run.split.table.set_index("sample_id").loc[sample, "sha256"]:
        raise UnreadableImageError("the file has changed since the run")
    return decode(content)


def _thumbnail(run: SavedRun, sample: str, overlay: str) -> Thumbnail:
    try:
        return Thumbnail(sample, small_jpeg(image_of(run, sample)), "", overlay)
    except UnreadableImageError as error:
        return Thumbnail(sample, "", str(error), overlay)


def small_jpeg(image: RGB) -> str:
    """An image as a small JPEG in base64, without any of its file's metadata."""
    file = io.BytesIO()
    Image.fromarray(fit(image, size=SIDE, how="pad", interpolation="lanczos")).save(file, format="JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()
