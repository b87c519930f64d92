"""Load files as the network's input: decoded, cropped and resized; cached if the frames are large."""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import PIL
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from pylorus.cache.shards import Records
from pylorus.cache.store import load_or_compute_records
from pylorus.config.schema import CacheConfig
from pylorus.core.distributed import SINGLE_PROCESS, Processes
from pylorus.core.errors import PylorusError, format_suggestion
from pylorus.data.decode import POLICY_VERSION, read_image, resize_image
from pylorus.data.field_of_view import crop_to_field
from pylorus.data.files import RGB, ImageLocation, Root
from pylorus.data.shards import Shards

log = logging.getLogger(__name__)

LARGE_FRAME_RATIO = 2.0
"""Frames with more than this many times the pixels of the network's input are cached by default."""
BLOCK = 64
"""Images that are decoded at a time for the cache."""


@dataclass(frozen=True)
class InputFormat:
    """How a file becomes the network's input, the same in training and in prediction.

    Attributes:
        size: Side of the square in pixels.
        fit: pad, stretch or crop; see `pylorus.data.decode.resize_image`.
        interpolation: Interpolation of the resize.
        crop: none, or auto: crop to the endoscopic field of view; see `pylorus.data.field_of_view`.
    """

    size: int
    fit: str
    interpolation: str
    crop: str = "none"

    def get_key(self) -> dict[str, object]:
        """Everything that the prepared image depends on besides the file's content, as plain values."""
        return {**asdict(self), "policy": POLICY_VERSION, "pillow": PIL.__version__}

    def load_image(self, path: ImageLocation) -> RGB:
        """Load the image in a file as uint8 of shape (size, size, 3).

        Raises:
            UnreadableImageError: Names the file and what is wrong with it.
        """
        return self.prepare_image(read_image(path))

    def prepare_image(self, image: RGB) -> RGB:
        """Crop and resize a decoded image, such as a frame of a video, to uint8 of shape (size, size, 3)."""
        if self.crop == "auto":
            image = crop_to_field(image)
        return resize_image(image, size=self.size, how=self.fit, interpolation=self.interpolation)

    def load_images(self, paths: Sequence[ImageLocation]) -> NDArray[np.uint8]:
        """Load the images in several files as uint8 of shape (paths, size, size, 3).

        Raises:
            UnreadableImageError: Names the first file that can't be read.
        """
        # Data-loading workers already run in parallel; the main process would leave the other cores idle.
        threads = 1 if get_worker_info() is not None else min(len(paths), os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            return np.stack(list(pool.map(self.load_image, paths)))


def resolve_input_format(model: str | None, *, image_size: int | None, fit: str, crop: str) -> InputFormat:
    """Return the input format that a timm model was designed for.

    Args:
        model: Name of the model, preferably with its tag; None: bicubic interpolation, and `image_size` is required.
        image_size: Side of the input in pixels; None: the model's own.
        fit: pad, stretch or crop.
        crop: none, or auto.

    Raises:
        PylorusError: If timm has no such model, or neither a model nor a size is given.
    """
    if model is None:
        if image_size is None:
            raise PylorusError("image_size: found neither image_size nor model, which says the size that it takes.")
        return InputFormat(image_size, fit, "bicubic", crop)
    from timm.data.config import resolve_data_config  # takes seconds, and only training needs it
    from timm.models import get_pretrained_cfg, list_models

    if model.split(".")[0] not in list_models():
        raise PylorusError(f'model: timm has no "{model}".{format_suggestion(model.split(".")[0], list_models())}')
    pretrained_cfg = get_pretrained_cfg(model, allow_unregistered=True)
    assert pretrained_cfg is not None
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg.to_dict())  # type: ignore[no-untyped-call]
    return InputFormat(image_size or data_config["input_size"][-1], fit, data_config["interpolation"], crop)


def load_or_decode_images(
    table: pd.DataFrame, root: Root, form: InputFormat, settings: CacheConfig, processes: Processes = SINGLE_PROCESS
) -> Records | None:
    """Load the prepared images of a table's rows from the cache; each is decoded once for all runs.

    The arrays are identical to those that reading the files would give.

    Args:
        table: Rows with path, sha256, width and height.
        root: Root of the paths: a folder or shards.
        form: How a file becomes the network's input.
        settings: What may be cached, and where.
        processes: Each process decodes its share.

    Returns:
        The images in the order of the rows; None if caching is disabled, gains nothing or has no space.

    Raises:
        UnreadableImageError: Names the first file that can't be read.
    """
    pixels = float((table["width"] * table["height"]).median())
    # An image in a remote shard is downloaded once; the cache holds the local copy, within its budget.
    is_worthwhile = pixels > LARGE_FRAME_RATIO * form.size**2 or (isinstance(root, Shards) and root.remote)
    is_enabled = is_worthwhile if settings.images is None else settings.images
    if not is_enabled:
        return None
    paths = [root / path for path in table["path"]]

    def decode_missing(missing: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        log.info("images   decoding %d of %d once, for the cache (cache.images)", len(missing), len(paths))
        for start in range(0, len(missing), BLOCK):
            block = form.load_images([paths[index] for index in missing[start : start + BLOCK]])
            yield block.reshape(len(block), -1)

    return load_or_compute_records(
        settings,
        list(table["sha256"]),
        decode_missing,
        kind="images",
        key=form.get_key(),
        record_bytes=form.size**2 * 3,
        processes=processes,
    )
