"""Load files as the network's input: decoded, cropped and resized; cached if the frames are large."""

import __future__

import ast
import builtins
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.util import find_spec
from itertools import islice
from mmap import mmap
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import PIL
from numpy.typing import NDArray

from pylorus.cache.shards import Records
from pylorus.cache.store import RecordStore, create_store, load_or_compute_records
from pylorus.config.checks import check_model_name
from pylorus.config.schema import CacheConfig, Config, DataConfig
from pylorus.core.distributed import SINGLE_PROCESS, Processes, count_free_cores, get_threads, map_items
from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json, write_json
from pylorus.data.decode import POLICY_VERSION, decode_image, read_image, resize_image
from pylorus.data.field_of_view import FINDER, crop_to_field, find_field
from pylorus.data.field_shape import FieldOfView
from pylorus.data.files import RGB, ImageLocation, Root
from pylorus.data.first_field_finder import find_field_as_in_version_1
from pylorus.data.overlays import cover_overlays, find_overlays
from pylorus.data.shards import Shards

log = logging.getLogger(__name__)

LARGE_FRAME_RATIO = 2.0
"""Frames with more than this many times the pixels of the network's input are cached by default."""
BLOCK = 64
"""Images that are passed on to the cache at a time."""
FORMATS_FILE = "input-formats.json"
"""File in the folder of all caches with the input format of each model that was trained."""
KIND = "images"
"""Kind of these records in the cache."""
FULL, LENGTH, FORM, SHARED_BYTES = 0, 1, 2, 258
"""Bytes that an `ImageWriter` shares: whether there is no space, and the length and the JSON of the input format."""


@dataclass(frozen=True)
class InputFormat:
    """How a file becomes the network's input, the same in training and in prediction.

    Attributes:
        size: Side of the square in pixels.
        fit: pad, stretch or crop; see `pylorus.data.decode.resize_image`.
        interpolation: Interpolation of the resize.
        crop: none, or auto: crop to the endoscopic field of view; see `pylorus.data.field_of_view`.
        mask: none, or overlays: cover text and plates that the console draws; see `pylorus.data.overlays`.
        policy: Version of the rules for decoding and resizing; see `pylorus.data.decode`.
        finder: Version of the field finder with which `crop=auto` crops; 1 in bundles of earlier releases.
    """

    size: int
    fit: str
    interpolation: str
    crop: str = "none"
    mask: str = "none"
    policy: int = POLICY_VERSION
    finder: int = FINDER

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a prepared image: height, width and channels."""
        return self.size, self.size, 3

    @property
    def forms(self) -> tuple["InputFormat", ...]:
        """The format of each square of a prepared image: this one; several for a `StackedFormat`."""
        return (self,)

    def get_square(self, images: NDArray[np.uint8], number: int = 0) -> NDArray[np.uint8]:
        """Return one of the squares of prepared images, in the order of `forms`.

        Args:
            images: uint8 of shape (…, height, width, 3), as this format prepares them.
            number: Index of the square.

        Returns:
            A view of shape (…, size, size, 3).
        """
        top, size = sum(form.size for form in self.forms[:number]), self.forms[number].size
        return images[..., top : top + size, :size, :]

    def get_key(self) -> dict[str, object]:
        """Everything that the prepared image depends on besides the file's content, as plain values."""
        return {**asdict(self), "pillow": PIL.__version__}

    def load_image(self, path: ImageLocation, sha256: str | None = None) -> RGB:
        """Load the image in a file as uint8 of shape (size, size, 3).

        Args:
            path: Where the image is.
            sha256: SHA-256 of the file's content; None: it may be any.

        Raises:
            UnreadableImageError: Names the file and what is wrong with it.
        """
        return self.prepare_image(read_image(path, policy=self.policy, sha256=sha256))

    def prepare_image(self, image: RGB, half: RGB | None = None, field: FieldOfView | None = None) -> RGB:
        """Mask, crop and resize a decoded image, such as a frame of a video, to uint8 of shape (size, size, 3).

        Args:
            image: RGB, uint8 of shape (height, width, 3).
            half: The image halved as `resize_image` does, if that is known already.
            field: The field of view that `find_field` finds, if that is known already.
        """
        # The field is found in the frame as it is: where its border is covered, it could be found less precisely.
        if self.crop == "none":
            field = None
        elif self.finder == 1:
            field = find_field_as_in_version_1(image)
        elif field is None:
            field = find_field(image)
        frame = cover_overlays(image, find_overlays(image, half)) if self.mask == "overlays" else image
        if field is not None:
            frame = crop_to_field(frame, field)
        half = half if frame is image else None
        return resize_image(
            frame, size=self.size, how=self.fit, interpolation=self.interpolation, policy=self.policy, half=half
        )

    def load_images(self, paths: Sequence[ImageLocation], sha256: Sequence[str | None] = ()) -> NDArray[np.uint8]:
        """Load the images in several files as uint8 of shape (paths, size, size, 3).

        Args:
            paths: Where the images are.
            sha256: SHA-256 of each file's content; empty: it may be any.

        Raises:
            UnreadableImageError: Names the first file that can't be read.
        """
        # Data-loading workers already run in parallel; the main process would leave the other cores idle.
        compute = map if _is_in_worker() else get_threads(count_free_cores()).map
        return np.stack(list(compute(self.load_image, paths, sha256 or [None] * len(paths))))


@dataclass(frozen=True)
class StackedFormat(InputFormat):
    """How a file becomes the input of several networks that take it in different formats; it is decoded once.

    The squares are stacked in one array, one below the other, with black to the right of the smaller ones.

    Attributes:
        others: The formats of the squares below the first one, none larger than that, of the same policy.
    """

    others: tuple[InputFormat, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a prepared image: height, width and channels."""
        return sum(form.size for form in self.forms), self.size, 3

    @property
    def forms(self) -> tuple[InputFormat, ...]:
        """The format of each square of a prepared image, from the top."""
        own = {each.name: getattr(self, each.name) for each in fields(InputFormat)}
        return InputFormat(**own), *self.others

    def prepare_image(self, image: RGB, half: RGB | None = None, field: FieldOfView | None = None) -> RGB:
        """Prepare a decoded image in all formats, as uint8 of shape `shape`; see `InputFormat.prepare_image`."""
        if field is None and any(form.crop != "none" and form.finder != 1 for form in self.forms):
            field = find_field(image)
        stacked = np.zeros(self.shape, dtype=np.uint8)
        for number, form in enumerate(self.forms):
            self.get_square(stacked, number)[:] = form.prepare_image(image, half, field)
        return stacked


def stack_formats(forms: Sequence[InputFormat]) -> InputFormat:
    """Return the format that prepares images in all of these formats, each once, the largest first.

    Example:
        >>> small, large = InputFormat(96, "pad", "bicubic"), InputFormat(224, "pad", "bilinear")
        >>> stack_formats([small, large, small]).shape, stack_formats([small, small]) == small
        ((320, 224, 3), True)
    """
    first, *others = sorted(dict.fromkeys(forms), key=lambda form: -form.size)
    return StackedFormat(**asdict(first), others=tuple(others)) if others else first


def prepare_upload(content: bytes, form: InputFormat, display: InputFormat | None) -> tuple[RGB, RGB | None]:
    """Decode the content of a file and prepare it for the network and, in another format, for the page.

    Raises:
        UnreadableImageError: If it can't be decoded; the message says why.
    """
    image = decode_image(content, policy=form.policy)
    return form.prepare_image(image), None if display is None else display.prepare_image(image)


def describe_image_rules(data: DataConfig) -> dict[str, object]:
    """Return the versions of the rules by which a run's images are prepared, which must not change when it resumes."""
    mask = resolve_mask(data.mask, crop=data.crop)
    return {"policy": POLICY_VERSION, "finder": FINDER if data.crop == "auto" else 1, "mask": mask}


def _is_in_worker() -> bool:
    torch_data = sys.modules.get("torch.utils.data")  # a process that only reads images does not import torch
    return torch_data is not None and torch_data.get_worker_info() is not None


class ImageWriter:
    """Saves the network's input of files that are decoded for another reason, so that they need not be decoded again.

    Processes that are forked from this one prepare images, and this one saves them. In memory that they share, it says
    that there is no more space for any, or which format they have if that is known only later.

    Args:
        form: How a file becomes the network's input; None: not known yet.
        settings: What may be cached, and where.
        find_form: Returns the format once it is known, None until then; it is asked whenever images may be saved.
    """

    def __init__(
        self,
        form: InputFormat | None,
        settings: CacheConfig,
        *,
        find_form: Callable[[], InputFormat | None] = lambda: None,
    ) -> None:
        self._form, self._settings, self._find_form = form, settings, find_form
        self._shared = mmap(-1, SHARED_BYTES)
        self._store: RecordStore | None = None

    def prepare(self, image: RGB, half: RGB | None = None, field: FieldOfView | None = None) -> RGB | None:
        """Return an image as the network's input, uint8 of shape (size, size, 3); None if it is not worth caching.

        Args:
            image: RGB, uint8 of shape (height, width, 3).
            half: The image halved as `resize_image` does, if that is known already.
            field: The field of view that `find_field` finds, if that is known already.
        """
        if self._form is None and self._shared[LENGTH]:
            self._form = InputFormat(**json.loads(self._shared[FORM : FORM + self._shared[LENGTH]]))
        if self._form is None or self._shared[FULL]:
            return None
        is_wanted = is_cached(image.shape[0] * image.shape[1], self._form, self._settings)
        return self._form.prepare_image(image, half, field) if is_wanted else None

    def save(self, digests: Sequence[str], images: Sequence[RGB]) -> None:
        """Save prepared images by the SHA-256 of their files' content, as long as there is space."""
        if self._form is None and (form := self._find_form()) is not None:
            self._form, content = form, json.dumps(asdict(form)).encode()
            self._shared[FORM : FORM + len(content)] = content
            self._shared[LENGTH] = len(content)
        if self._form is None or not len(images) or self._shared[FULL]:
            return
        if self._store is None:
            size = self._form.size**2 * 3
            self._store = create_store(self._settings, kind=KIND, key=self._form.get_key(), record_bytes=size)
        self._shared[FULL] = not self._store.save(digests, images)


def is_cached(pixels: float, form: InputFormat, settings: CacheConfig, *, is_remote: bool = False) -> bool:
    """Return whether images are cached as the network's input: as configured, or if it is worthwhile.

    Args:
        pixels: Pixels of a frame.
        form: How a file becomes the network's input.
        settings: What may be cached.
        is_remote: Whether a frame is downloaded each time that it is read.
    """
    return (is_remote or pixels > LARGE_FRAME_RATIO * form.size**2) if settings.images is None else settings.images


def resolve_mask(mask: str | None, *, crop: str) -> str:
    """Return what is masked, overlays or none: as configured, or overlays if frames are cropped to their field."""
    if mask is not None:
        return mask
    return "overlays" if crop == "auto" else "none"


def resolve_input_format(
    model: str | None, *, image_size: int | None, fit: str, crop: str, mask: str | None = None
) -> InputFormat:
    """Return the input format that a timm model was designed for.

    Args:
        model: Name of the model, preferably with its tag; None: bicubic interpolation, and `image_size` is required.
        image_size: Side of the input in pixels; None: the model's own.
        fit: pad, stretch or crop.
        crop: none, or auto.
        mask: overlays, or none; None: overlays if crop is auto.

    Raises:
        PylorusError: If timm has no such model, or neither a model nor a size is given.
    """
    if model is None:
        if image_size is None:
            raise PylorusError("image_size: found neither image_size nor model, which says the size that it takes.")
        return InputFormat(image_size, fit, "bicubic", crop, resolve_mask(mask, crop=crop))
    from timm.data.config import resolve_data_config  # takes seconds, and only training needs it
    from timm.models import get_pretrained_cfg

    check_model_name(model, where="model")
    pretrained_cfg = get_pretrained_cfg(model, allow_unregistered=True)
    assert pretrained_cfg is not None
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg.to_dict())  # type: ignore[no-untyped-call]
    size = image_size or data_config["input_size"][-1]
    return InputFormat(size, fit, data_config["interpolation"], crop, resolve_mask(mask, crop=crop))


def guess_input_format(config: Config) -> InputFormat | None:
    """Return the input format of the configured model as last used or as timm's files state it; None if unknown.

    It does not import timm, which takes seconds. A wrong guess costs time only: images are cached by their format.
    """
    try:
        known = (read_json(Path(config.cache.folder) / FORMATS_FILE) or {}).get(_format_model_key(config))
        if known is None and config.model._target_ is None:
            known = read_timm_format(config.model.name)
            known = known and (config.data.image_size or known[0], known[1])
        if known is None:
            return None
        mask = resolve_mask(config.data.mask, crop=config.data.crop)
        return InputFormat(known[0], config.data.fit, known[1], config.data.crop, mask)
    except (PylorusError, OSError, AttributeError, TypeError, LookupError):
        return None


class _NamesOfTimm(dict[str, Any]):
    """Global names for functions of timm: those that it does not hold are Python's own, or None."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, None)


@cache
def read_timm_format(model: str) -> tuple[int, str] | None:
    """Read the size and the interpolation of a model from timm's tables of weights, without importing timm.

    Each table is a dictionary of calls such as `_cfg(input_size=(3, 288, 288))`, with functions of the same file. Only
    these functions are run.

    Returns:
        Size and interpolation; None if no table has the model, or one is written in another way.
    """
    architecture, _, tag = model.partition(".")
    spec = find_spec("timm")
    folders = [] if spec is None else spec.submodule_search_locations or []
    pattern = re.compile(rf"[\"']{re.escape(architecture)}[.\"']")
    for path in (path for folder in folders for path in sorted(Path(folder, "models").glob("*.py"))):
        text = path.read_text(encoding="utf-8")
        if "default_cfgs" in text and pattern.search(text):
            with suppress(Exception):  # a file may be written in any way
                by_tag = _evaluate_timm_table(ast.parse(text), architecture)
                chosen = _choose_timm_weights(by_tag, tag)
                return chosen.get("input_size", (3, 224, 224))[-1], chosen.get("interpolation") or "bicubic"
    return None


def _evaluate_timm_table(module: ast.Module, architecture: str) -> dict[str, dict[str, Any]]:
    """Return what a file of timm says of each weights of an architecture, by their tag."""
    functions: list[ast.stmt] = [
        node for node in module.body if isinstance(node, ast.FunctionDef) and "cfg" in node.name
    ]
    names = _NamesOfTimm()
    flags = __future__.annotations.compiler_flag  # the types in their signatures are not evaluated
    exec(compile(ast.Module(functions, []), "timm", "exec", flags=flags), names)
    tables = [node for node in ast.walk(module) if isinstance(node, ast.Dict)]
    return {
        key.value.partition(".")[2]: eval(compile(ast.Expression(call), "timm", "eval"), names)
        for table in tables
        for key, call in zip(table.keys, table.values, strict=True)
        if isinstance(key, ast.Constant)
        and isinstance(key.value, str)
        and key.value.partition(".")[0] == architecture
        and isinstance(call, ast.Call)
    }


def _choose_timm_weights(by_tag: Mapping[str, dict[str, Any]], tag: str) -> dict[str, Any]:
    """Return the weights of a tag, or without one those that timm prefers; LookupError if there are none."""
    if tag:
        return {name.rstrip("*"): content for name, content in by_tag.items()}[tag]
    existing = {
        name: content
        for name, content in by_tag.items()
        if any(content.get(source) for source in ("url", "hf_hub_id", "file"))
    }
    preferred = [""] if "" in existing else [name for name in by_tag if name.endswith("*")]
    return by_tag[next(iter([*preferred, *existing, *by_tag]))]


def save_input_format(config: Config, form: InputFormat) -> None:
    """Save the input format of a model for `guess_input_format`."""
    path = Path(config.cache.folder) / FORMATS_FILE
    with suppress(OSError, PylorusError, TypeError):
        known = read_json(path) or {}
        if known.get(key := _format_model_key(config)) != (entry := [form.size, form.interpolation]):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(path, known | {key: entry})


def _format_model_key(config: Config) -> str:
    return f"{config.model.name} {config.data.image_size or ''}".strip()


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
    if not is_cached(pixels, form, settings, is_remote=isinstance(root, Shards) and root.remote):
        return None
    paths, hashes = [root / path for path in table["path"]], list(table["sha256"])

    def decode_missing(missing: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        log.info("images   decoding %d of %d images once, for the cache (cache.images)", len(missing), len(paths))
        items = [(paths[index], hashes[index]) for index in missing]
        images = map_items(lambda item: form.load_image(*item), items, name=lambda item: str(item[0]))
        while block := list(islice(images, BLOCK)):
            yield np.stack(block).reshape(len(block), -1)

    return load_or_compute_records(
        settings,
        hashes,
        decode_missing,
        kind=KIND,
        key=form.get_key(),
        record_bytes=form.size**2 * 3,
        processes=processes,
    )


QUALITY = ("brightness", "redness", "sharpness", "field")
"""What `measure_quality` measures."""
MIN_VISIBLE = 20
"""A pixel whose largest channel is at most this is black: it is outside the field of view."""
COARSE = 4
"""Sharpness compares differences of neighboring pixels with those in the image reduced by this factor."""


def measure_quality(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Measure how images look, in the pixels that the network sees.

    Args:
        images: uint8 RGB of shape (n, size, size, 3), as `InputFormat` prepares them.

    Returns:
        Shape (n, 4), in the order of `QUALITY`, each in [0, 1]. The first three are of pixels that are not black:
        brightness is their mean luma; redness the red channel's part of their color (a third in a grey image);
        sharpness the mean difference of neighboring pixels over that in the image reduced by `COARSE`, at most 1, which
        blur lowers. Field is the proportion of pixels that are not black.

    Example:
        >>> measure_quality(np.full((1, 8, 8, 3), 51, dtype=np.uint8)).round(2).tolist()
        [[0.2, 0.33, 0.0, 1.0]]
    """
    return np.array([_measure_image_quality(image) for image in images], dtype=np.float64).reshape(-1, len(QUALITY))


def _measure_image_quality(image: RGB) -> tuple[float, float, float, float]:
    brightest = cv2.max(cv2.max(image[..., 0], image[..., 1]), image[..., 2])
    visible = cv2.threshold(brightest, MIN_VISIBLE, 1, cv2.THRESH_BINARY)[1]
    red, green, blue, _ = cv2.mean(image, mask=visible)
    total = red + green + blue
    if total == 0:
        return 0.0, 1 / 3, 0.0, 0.0
    grey, side = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), max(2, len(image) // COARSE)
    fine = _measure_detail(grey, visible)
    coarse = _measure_detail(
        *(cv2.resize(layer, (side, side), interpolation=cv2.INTER_AREA) for layer in (grey, visible))
    )
    brightness = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    field = cv2.countNonZero(visible) / visible.size
    return brightness, red / total, min(1.0, fine / coarse) if coarse else 0.0, field


def _measure_detail(grey: NDArray[Any], visible: NDArray[Any]) -> float:
    """Return the mean absolute difference of neighboring pixels in rows and columns where both are visible."""
    sums = counts = 0.0
    for near, far in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        both = cv2.bitwise_and(visible[near], visible[far])
        count = cv2.countNonZero(both)
        sums += cv2.mean(cv2.absdiff(grey[near], grey[far]), mask=both)[0] * count
        counts += count
    return sums / counts if counts else 0.0
