"""Thumbnails of single images, for reports that may show them; no other part of the report reads images."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pylorus.data.image import RGB, UnreadableImageError, decode_image, resize_image
from pylorus.report.saved_run import SavedRun

SIDE = 160
"""Side length of a thumbnail in pixels."""


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail of an image.

    Attributes:
        sample: Id of the image.
        jpeg: The JPEG in base64, without any metadata of the file; empty if there is none.
        missing: Why there is no thumbnail; empty if there is one.
        overlay: The network's input with its heat map, encoded like `jpeg`; empty if there is no heat map.
    """

    sample: str
    jpeg: str
    missing: str
    overlay: str = ""


def create_thumbnails(
    run: SavedRun, samples: Sequence[str], overlays: Mapping[str, str] | None = None
) -> dict[str, Thumbnail]:
    """Create thumbnails of a run's images; one that is missing or has changed since the run says so instead.

    Args:
        run: The run.
        samples: Ids of its images.
        overlays: Heat maps by image id, from `pylorus.report.maps`.
    """
    return {sample: _create_thumbnail(run, sample, (overlays or {}).get(sample, "")) for sample in samples}


def resolve_image_file(run: SavedRun, sample: str) -> Path:
    """Return the path that an image file had at the time of the run."""
    assert run.split is not None
    root = (
        run.folder / "images"
        if run.get_setting("data.kind") == "synthetic"
        else Path(str(run.get_setting("data.root", "")))
    )
    return root / str(run.split.table.set_index("sample_id").loc[sample, "path"])


def read_run_image(run: SavedRun, sample: str) -> RGB:
    """Read an image of a run.

    Returns:
        RGB image of shape (height, width, 3).

    Raises:
        UnreadableImageError: If it is missing, has changed since the run, or is stored in a shard.
    """
    assert run.split is not None
    if run.get_setting("data.kind") == "shards":
        raise UnreadableImageError("it is stored in a shard")
    try:
        content = resolve_image_file(run, sample).read_bytes()
    except OSError:
        raise UnreadableImageError("the file no longer exists") from None
    if hashlib.sha256(content).hexdigest() != run.split.table.set_index("sample_id").loc[sample, "sha256"]:
        raise UnreadableImageError("the file has changed since the run")
    return decode_image(content)


def _create_thumbnail(run: SavedRun, sample: str, overlay: str) -> Thumbnail:
    try:
        return Thumbnail(sample, encode_thumbnail(read_run_image(run, sample)), "", overlay)
    except UnreadableImageError as error:
        return Thumbnail(sample, "", str(error), overlay)


def encode_thumbnail(image: RGB) -> str:
    """Encode an image as a small JPEG in base64, without any metadata of its file."""
    file = io.BytesIO()
    Image.fromarray(resize_image(image, size=SIDE, how="pad", interpolation="lanczos")).save(
        file, format="JPEG", quality=85
    )
    return base64.b64encode(file.getvalue()).decode()
