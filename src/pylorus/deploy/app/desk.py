"""Where the page's questions are answered: files are decoded by a few threads, the network serves one at a time."""

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

from pylorus.data.image import RGB, decode
from pylorus.data.unreadable import UnreadableImageError
from pylorus.deploy.app.heat import heat_over, why_no_heat
from pylorus.deploy.app.upload import Upload
from pylorus.deploy.load import Bundle
from pylorus.deploy.network import Output
from pylorus.errors import PylorusError

log = logging.getLogger(__name__)

READERS = 2
"""Files that are decoded at once: a frame of 25 megapixels takes up to 1 GiB for a moment."""
BATCH = 8
"""Images that the network takes at once; then it is the next user's turn."""
PICTURE = 448
"""Least side of a picture on the page, in pixels."""
QUALITY = 85

Row = dict[str, object]
Given = TypeVar("Given")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an answer is to hold beside numbers.

    Attributes:
        image: A picture of what the network sees.
        heat_map: The same with what speaks for the predicted class over it.
    """

    image: bool = False
    heat_map: bool = False


@dataclass(frozen=True)
class Frame:
    """A file that was read; only its small squares are kept.

    Attributes:
        name: What its sender calls it.
        seen: The network's input; None where there is an error.
        shown: The same, large enough for a page; None where none is wanted.
        error: Why there is no image.
    """

    name: str
    seen: RGB | None = None
    shown: RGB | None = None
    error: str = ""


class Desk:
    """Answers for one bundle, for any number of users at once.

    Args:
        bundle: Is asked by one thread only.
    """

    def __init__(self, bundle: Bundle):
        cv2.setNumThreads(0)
        self.bundle = bundle
        self.why_no_heat = why_no_heat(bundle)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")

    async def read(self, upload: Upload, wanted: Wanted) -> Frame:
        """The frame of a file; one that can't be read has an error."""
        return await _in(self._readers, lambda: _frame(self.bundle, upload, wanted))

    async def answers(self, frames: Sequence[Frame], wanted: Wanted) -> list[Row]:
        """A row a frame, in their order, with the words of `pylorus predict`."""
        rows: list[Row] = []
        for start in range(0, len(frames), BATCH):
            some = frames[start : start + BATCH]
            rows += await _in(self._network, lambda some=some: self._rows(some, wanted))  # type: ignore[misc]
        return rows

    def close(self) -> None:
        """Ends the threads; what waits is dropped."""
        for pool in (self._readers, self._network):
            pool.shutdown(wait=False, cancel_futures=True)

    def _rows(self, frames: Sequence[Frame], wanted: Wanted) -> list[Row]:
        seen = [frame.seen for frame in frames if frame.seen is not None]
        answered = iter(self._answered(np.stack(seen)) if seen else [])
        rows = []
        for frame in frames:
            row: Row = {"file": frame.name, "error": frame.error}
            if frame.seen is not None:
                row |= next(answered)
                if not row["error"] and frame.shown is not None:
                    row |= self._pictures(frame.seen, frame.shown, row, wanted)
            rows.append(row)
        return rows

    def _answered(self, images: RGB) -> list[Row]:
        """What the network says of images (n, size, size, 3)."""
        said = self.bundle.description
        names, deciding = said.short_names, said.decision.class_name
        output = self.bundle.output(images)
        finite = (output.logits.isfinite().all(dim=1) & output.unlikeness.isfinite()).tolist()
        found = self.bundle.decide(Output(output.logits.nan_to_num(0, 0, 0), output.unlikeness.nan_to_num(0, 0, 0)))
        rows: list[Row] = []
        for place, good in enumerate(finite):
            if not good:
                rows.append({"error": "the network gives no number for it"})
                continue
            shares = found.probabilities[place]
            rows.append(
                {
                    "error": "",
                    "predicted": names[found.predicted[place]],
                    "probability": {name: float(share) for name, share in zip(names, shares, strict=True)},
                    "decision": deciding if found.positive[place] else f"not {deciding}",
                    "abstain": bool(found.why[place]),
                    "why": str(found.why[place]),
                    "unlikeness": float(found.unlikeness[place]),
                }
            )
            if found.sets is not None:
                members = zip(names, found.sets[place], strict=True)
                rows[-1]["prediction_set"] = [name for name, member in members if member]
        return rows

    def _pictures(self, seen: RGB, shown: RGB, row: Row, wanted: Wanted) -> Row:
        pictures: Row = {}
        if wanted.image:
            pictures["image"] = _data_url(shown)
        if wanted.heat_map and not self.why_no_heat:
            place = self.bundle.description.short_names.index(str(row["predicted"]))
            try:
                pictures["heat_map"] = _data_url(heat_over(self.bundle, seen, shown, place))
            except PylorusError as error:
                log.warning("no heat map: %s", error)
        return pictures


def _frame(bundle: Bundle, upload: Upload, wanted: Wanted) -> Frame:
    if upload.error:
        return Frame(upload.name, error=upload.error)
    form = bundle.input
    try:
        image = decode(upload.content)
        seen = form.fitted(image)
        larger = replace(form, size=max(form.size, PICTURE))
        shown = larger.fitted(image) if wanted.image or wanted.heat_map else None
    except UnreadableImageError as error:
        return Frame(upload.name, error=str(error))
    except Exception as error:  # one file must not cost the others their answer
        log.warning("a file could not be read: %s", type(error).__name__)
        return Frame(upload.name, error=f"damaged: {type(error).__name__}")
    return Frame(upload.name, seen, shown)


def _data_url(image: RGB) -> str:
    """A JPEG without any of the file's own words: tags, names and dates stay behind."""
    written = io.BytesIO()
    Image.fromarray(image).save(written, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


async def _in(pool: ThreadPoolExecutor, act: Callable[[], Given]) -> Given:
    return await asyncio.get_running_loop().run_in_executor(pool, act)
