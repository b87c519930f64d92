"""Files as the network's input: read and fitted to its size, and kept as such where frames are large."""

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

from pylorus.cache.kept import kept_records
from pylorus.cache.records import Records
from pylorus.config import CacheConfig
from pylorus.data.content import Place, Root
from pylorus.data.field import crop_to_field
from pylorus.data.image import POLICY_VERSION, RGB, fit, read
from pylorus.data.shards import Shards
from pylorus.parallel.processes import ALONE, Processes

log = logging.getLogger(__name__)

LARGE = 2.0
"""Frames of more than so many times the pixels of the network's input are kept unless the user says otherwise."""
BLOCK = 64
"""Images that are decoded at a time where they are kept."""


@dataclass(frozen=True)
class InputFormat:
    """How a file becomes the network's input, the same in training and in prediction.

    Attributes:
        size: Side of the square in pixels.
        fit: pad, stretch or crop; see `pylorus.data.image.fit`.
        interpolation: Of the resize.
        crop: none, or auto: to the endoscopic field of view; see `pylorus.data.field`.
    """

    size: int
    fit: str
    interpolation: str
    crop: str = "none"

    def key(self) -> dict[str, object]:
        """All that the fitted image of a file depends on besides its content, as plain values."""
        return {**asdict(self), "policy": POLICY_VERSION, "pillow": PIL.__version__}

    def read(self, path: Place) -> RGB:
        """The image in a file, of shape (size, size, 3).

        Raises:
            UnreadableImageError: Names the file and what is wrong with it.
        """
        return self.fitted(read(path))

    def fitted(self, image: RGB) -> RGB:
        """An image that is read already, such as a video's frame, of shape (size, size, 3)."""
        if self.crop == "auto":
            image = crop_to_field(image)
        return fit(image, size=self.size, how=self.fit, interpolation=self.interpolation)

    def read_all(self, paths: Sequence[Place]) -> NDArray[np.uint8]:
        """The images in some files, of shape (paths, size, size, 3).

        Raises:
            UnreadableImageError: Names the first file that gives no image.
        """
        # A worker is one of many; in the process that computes, the other cores would wait for the decoder.
        threads = 1 if get_worker_info() is not None else min(len(paths), os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            return np.stack(list(pool.map(self.read, paths)))


def kept_images(
    table: pd.DataFrame, root: Root, form: InputFormat, settings: CacheConfig, processes: Processes = ALONE
) -> Records | None:
    """The fitted images of a table's rows, each decoded once for all runs; None where that is not wanted or no gain.

    They are the very arrays that reading the files would give.

    Args:
        table: Rows with path, sha256, width and height.
        root: What the paths lie below.
        form: How a file becomes the network's input.
        settings: What may be kept, and where.
        processes: Each decodes its share.

    Raises:
        UnreadableImageError: Names the first file that gives no image.
    """
    pixels = float((table["width"] * table["height"]).median())
    # Of shards far away each image is fetched once: what is kept is the local copy, within the cache's budget.
    gain = pixels > LARGE * form.size**2 or (isinstance(root, Shards) and root.remote)
    wanted = gain if settings.images is None else settings.images
    if not wanted:
        return None
    paths = [root / path for path in table["path"]]

    def decode(missing: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        log.info("images   %d of %d are decoded, once (cache.images)", len(missing), len(paths))
        for start in range(0, len(missing), BLOCK):
            block = form.read_all([paths[place] for place in missing[start : start + BLOCK]])
            yield block.reshape(len(block), -1)

    return kept_records(
        settings,
        list(table["sha256"]),
        decode,
        kind="images",
        key=form.key(),
        record_bytes=form.size**2 * 3,
        processes=processes,
    )
