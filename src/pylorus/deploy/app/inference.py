"""Run inference for the web page: a few processes with limits decode files, one thread runs the network."""

import asyncio
import base64
import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.limited_process import call_limited
from pylorus.data.files import RGB
from pylorus.data.input_format import prepare_upload
from pylorus.deploy.app.security import Upload
from pylorus.deploy.model import Bundle
from pylorus.model.inference import NetworkOutput

log = logging.getLogger(__name__)


def render_heat_overlay(bundle: Bundle, pixels: RGB, display: RGB, class_index: int) -> RGB:
    """Overlay the heat map of a class on the image for the page.

    Args:
        bundle: The trained model.
        pixels: The network's input, uint8 RGB of shape (size, size, 3).
        display: The same image for the page, uint8 RGB, square.
        class_index: Index of the class in the bundle's class order.

    Raises:
        PylorusError: If the network has no usable map, or a package is missing; the message names it.
    """
    from pylorus.deploy.explain import compute_heat_map, render_overlay

    heat = compute_heat_map(bundle, pixels, class_index)
    resized = cv2.resize(heat, (display.shape[1], display.shape[0]), interpolation=cv2.INTER_LINEAR)
    return render_overlay(display, np.clip(resized, 0, 1))


def find_heat_map_problem(bundle: Bundle) -> str:
    """Return why there are no heat maps, found by computing one; empty if they work."""
    size = bundle.input.size
    black = np.zeros((size, size, 3), dtype=np.uint8)
    try:
        render_heat_overlay(bundle, black, black, 0)
    except (PylorusError, ImportError) as error:
        return str(error).removeprefix(f"{bundle.folder}: ")
    except Exception as error:  # the page is useful without heat maps, too
        log.warning("heat maps failed: %s", error, exc_info=True)
        return f"they can't be computed for this network ({type(error).__name__})"
    return ""


DECODER_THREADS = 2
"""Threads that decode files, each in a process of its own with the limits of `core.limited_process`."""
MAX_BATCH = 8
"""Largest batch; after each batch it is the next user's turn."""
MIN_PICTURE_SIDE = 448
"""Minimum side of an image on the page, in pixels."""
JPEG_QUALITY = 85

Row = dict[str, object]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What an answer should hold besides numbers.

    Attributes:
        image: The preprocessed image, as the network sees it.
        heat_map: The same image under the heat map of the predicted class.
    """

    image: bool = False
    heat_map: bool = False


@dataclass(frozen=True)
class DecodedUpload:
    """An uploaded file after decoding; only its small preprocessed images stay in memory.

    Attributes:
        name: File name as the sender gave it.
        pixels: The network's input, uint8 RGB of shape (size, size, 3); None if there is an error.
        display: The same image, large enough for the page; None if no image was requested.
        error: Why the file can't be used; empty if it can.
    """

    name: str
    pixels: RGB | None = None
    display: RGB | None = None
    error: str = ""


class InferenceService:
    """Answers requests for one bundle, from any number of users at once.

    Args:
        bundle: The trained model; only one thread uses it.
    """

    def __init__(self, bundle: Bundle):
        cv2.setNumThreads(0)
        self.bundle = bundle
        self.why_no_heat = find_heat_map_problem(bundle)
        self._readers = ThreadPoolExecutor(DECODER_THREADS, thread_name_prefix="reader")
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")
        for _ in range(DECODER_THREADS):  # the first upload need not wait for their processes
            self._readers.submit(_decode_upload, bundle, Upload("", b""), AnswerOptions())

    async def decode_upload(self, upload: Upload, wanted: AnswerOptions) -> DecodedUpload:
        """Decode and preprocess a file; one that can't be read gets an error."""
        return await _run_in_pool(self._readers, lambda: _decode_upload(self.bundle, upload, wanted))

    async def classify_uploads(self, frames: Sequence[DecodedUpload], wanted: AnswerOptions) -> list[Row]:
        """Return one row per image, in their order, with the columns of `pylorus predict`."""
        rows: list[Row] = []
        for start in range(0, len(frames), MAX_BATCH):
            batch = frames[start : start + MAX_BATCH]
            rows += await _run_in_pool(self._network, lambda batch=batch: self._build_rows(batch, wanted))  # type: ignore[misc]
        return rows

    def close(self) -> None:
        """Stop the threads; pending work is dropped."""
        for pool in (self._readers, self._network):
            pool.shutdown(wait=False, cancel_futures=True)

    def _build_rows(self, frames: Sequence[DecodedUpload], wanted: AnswerOptions) -> list[Row]:
        pixels = [frame.pixels for frame in frames if frame.pixels is not None]
        answers = iter(self._run_inference(np.stack(pixels)) if pixels else [])
        rows = []
        for frame in frames:
            row: Row = {"file": frame.name, "error": frame.error}
            if frame.pixels is not None:
                row |= next(answers)
                if not row["error"] and frame.display is not None:
                    row |= self._encode_images(frame.pixels, frame.display, row, wanted)
            rows.append(row)
        return rows

    def _run_inference(self, images: RGB) -> list[Row]:
        """Run inference on uint8 images of shape (n, size, size, 3); return one row per image."""
        description = self.bundle.description
        class_names, decision_class = description.short_names, description.decision.class_name
        output = self.bundle.run_network(images)
        is_finite = (output.logits.isfinite().all(dim=1) & output.unlikeness.isfinite()).tolist()
        answers = self.bundle.apply_thresholds(
            NetworkOutput(output.logits.nan_to_num(0, 0, 0), output.unlikeness.nan_to_num(0, 0, 0))
        )
        rows: list[Row] = []
        for index, has_output in enumerate(is_finite):
            if not has_output:
                rows.append({"error": "the network's output is NaN or infinite for this image"})
                continue
            probabilities = answers.probabilities[index]
            rows.append(
                {
                    "error": "",
                    "predicted": class_names[answers.predicted[index]],
                    "probability": {name: float(share) for name, share in zip(class_names, probabilities, strict=True)},
                    "decision": decision_class if answers.positive[index] else f"not {decision_class}",
                    "abstain": bool(answers.why[index]),
                    "why": str(answers.why[index]),
                    "unlikeness": float(answers.unlikeness[index]),
                }
            )
            if answers.sets is not None:
                members = zip(class_names, answers.sets[index], strict=True)
                rows[-1]["prediction_set"] = [name for name, member in members if member]
        return rows

    def _encode_images(self, pixels: RGB, display: RGB, row: Row, wanted: AnswerOptions) -> Row:
        encoded: Row = {}
        if wanted.image:
            encoded["image"] = _encode_data_url(display)
        if wanted.heat_map and not self.why_no_heat:
            class_index = self.bundle.description.short_names.index(str(row["predicted"]))
            try:
                encoded["heat_map"] = _encode_data_url(render_heat_overlay(self.bundle, pixels, display, class_index))
            except PylorusError as error:
                log.warning("heat map failed: %s", error)
        return encoded


def _decode_upload(bundle: Bundle, upload: Upload, wanted: AnswerOptions) -> DecodedUpload:
    """Decode an upload in a process that is ended if it takes too much time or memory."""
    if upload.error:
        return DecodedUpload(upload.name, error=upload.error)
    form = bundle.input
    display_form = replace(form, size=max(form.size, MIN_PICTURE_SIDE)) if wanted.image or wanted.heat_map else None
    try:
        return DecodedUpload(upload.name, *call_limited(prepare_upload, upload.content, form, display_form))
    except UnreadableImageError as error:
        return DecodedUpload(upload.name, error=str(error))
    except Exception as error:  # one file must not fail the whole request
        log.warning("failed to read a file: %s", type(error).__name__)
        return DecodedUpload(upload.name, error=f"damaged: {type(error).__name__}")


def _encode_data_url(image: RGB) -> str:
    """Encode an image as a JPEG data URL, without any metadata of the original file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


async def _run_in_pool(pool: ThreadPoolExecutor, act: Callable[[], Result]) -> Result:
    """Run a function in a thread pool without blocking the event loop."""
    return await asyncio.get_running_loop().run_in_executor(pool, act)
