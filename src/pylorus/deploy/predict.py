"""`pylorus predict`: what a bundle says of images, a row an image, in constant memory and gone on with after a kill."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pylorus.data.image import RGB
from pylorus.data.input import InputFormat
from pylorus.data.unreadable import UnreadableImageError, shown
from pylorus.deploy.answers import TrainedModel
from pylorus.deploy.evaluate import evaluation_of, told
from pylorus.deploy.exported import is_export, load_exported
from pylorus.deploy.files import SUMS
from pylorus.deploy.load import load_bundle
from pylorus.deploy.network import Output
from pylorus.deploy.parts import Parts
from pylorus.deploy.sources import Item, Sources
from pylorus.errors import PylorusError, did_you_mean
from pylorus.machine.engine import accelerators, keep_freed_memory, take_full_precision, usable_cores
from pylorus.model.weights import sha256

PART_ROWS, PART_SECONDS = 2000, 60.0
"""A part is written after so many rows or so long: what a kill loses at most."""
AHEAD = 3
"""Batches that are read while the network computes."""
TEXTS = ("path", "true", "predicted", "decision", "prediction_set", "why", "error")
FIRST_CODE, MOST_COUNTED = 2, 100
"""The exit code is 0 if all could be read, else 2 + the files that could not, 102 at most; 1 and 2 are other errors."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Choices of a prediction.

    Attributes:
        class_name: Short name of the class that decides; None: the bundle's own.
        frames_every: Seconds between two frames of a video; None: no videos.
        evaluate: Whether an evaluation must be possible; without, it is made where folders have the classes' names.
        group: Regular expression that finds the patient in a path: intervals then keep images of one together.
        batch: Images that the network takes at once.
        device: auto, cpu, cuda or mps.
    """

    class_name: str | None = None
    frames_every: float | None = None
    evaluate: bool = False
    group: str | None = None
    batch: int = 32
    device: str = "auto"


def predict(folder: Path, inputs: list[str], output: Path, options: PredictOptions) -> int:
    """Writes a row an image, and an evaluation where folders have the names of the classes.

    Args:
        folder: The bundle's, or an export's.
        inputs: Files, folders and patterns.
        output: Ends in .csv, .parquet or .json.
        options: See there.

    Returns:
        The exit code; see `FIRST_CODE`.

    Raises:
        PylorusError: If the bundle, an input or an option is not what it should be.
    """
    bundle = _loaded(folder, options.device)
    description = bundle.description
    known = description.short_names
    if options.class_name is not None and description.decision.thresholds.get(options.class_name) is None:
        raise PylorusError(
            f'--class: there is no threshold for "{options.class_name}".{did_you_mean(options.class_name, known)} '
            f"Expected one of {', '.join(known)}."
        )
    named = tuple(zip(description.classes, known, strict=True))
    sources = Sources(tuple(inputs), named, options.frames_every)
    also = {"group": options.group, "evaluate": options.evaluate}
    parts = Parts(output, _request(bundle, inputs, options), also=also)
    record = parts.finished()
    if record is not None:
        print(f"finished before: {output}")
    else:
        sources.check()
        with parts.open(), _kept():
            _predict_rest(bundle, sources, parts, options)
            record = _completed(bundle, parts, options)
    print(told(record, bundle.description))
    print(f"\npredictions: {output}")
    unreadable = int(str(record["unreadable"]))
    return FIRST_CODE + min(unreadable, MOST_COUNTED) if unreadable else 0


@contextmanager
def _kept() -> Iterator[None]:
    """Tells how to go on with a prediction that its user ends."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nwhat is done is kept; the same command goes on", file=sys.stderr)
        raise


def _predict_rest(bundle: TrainedModel, sources: Sources, parts: Parts, options: PredictOptions) -> None:
    """Predicts what is not done yet."""
    done = parts.done()
    if len(done):
        print(f"{len(done):,} images were predicted before")
    wanted = (item for item in sources.items() if item.key not in done)
    rows: list[pd.DataFrame] = []
    began = time.monotonic()
    with tqdm(desc="images", unit="", initial=len(done), disable=not sys.stderr.isatty()) as bar:
        try:
            for items, images in read_ahead(wanted, bundle.input, options.batch):
                rows.append(_rows(bundle, items, images, options.class_name))
                bar.update(len(items))
                if sum(map(len, rows)) >= PART_ROWS or time.monotonic() - began > PART_SECONDS:
                    parts.add(pd.concat(rows, ignore_index=True))
                    rows, began = [], time.monotonic()
        finally:  # also of a prediction that its user ends
            if rows:
                parts.add(pd.concat(rows, ignore_index=True))


def _completed(bundle: TrainedModel, parts: Parts, options: PredictOptions) -> dict[str, object]:
    """Puts the parts together; gives what is on record of the whole."""
    images = unreadable = labelled = 0
    for table in parts.tables():
        images += len(table)
        unreadable += int((table["error"] != "").sum())
        labelled += int((table["true"] != "").sum())
    if not images:
        raise PylorusError("there is no image in what was given; of a folder, only files with an image's suffix count.")
    if options.evaluate and not labelled:
        names = ", ".join(bundle.description.classes)
        raise PylorusError(f"--evaluate: no image lies in a folder that has the name of a class ({names}).")
    record: dict[str, object] = {"images": images, "unreadable": unreadable}
    if labelled:
        record["evaluation"] = evaluation_of(parts.tables(), bundle.description, options)
    left_out = {"true"} if not labelled else set()
    left_out |= {"second"} if options.frames_every is None else set()
    columns = [name for name in next(parts.tables()).columns if name not in left_out]
    parts.close(record, columns=columns)
    return {"request": parts.request, **record}


def _request(bundle: TrainedModel, inputs: list[str], options: PredictOptions) -> dict[str, object]:
    said = bundle.description
    return {
        "bundle": {"architecture": said.architecture, SUMS: sha256(bundle.folder / SUMS)},
        "intended use": said.intended_use,
        "inputs": [shown(Path(given).absolute()) for given in inputs],
        "class": options.class_name or said.decision.class_name,
        "frames every": options.frames_every,
    }


def read_ahead(items: Iterable[Item], form: InputFormat, size: int) -> Iterator[tuple[list[Item], list[RGB | str]]]:
    """Batches of items with their images, or why there is none, read while the network computes."""
    cv2.setNumThreads(0)
    remaining = iter(items)
    waiting: deque[tuple[list[Item], list[Future[RGB | str]]]] = deque()
    with ThreadPoolExecutor(max(2, usable_cores())) as pool:
        while batch := list(islice(remaining, size)):
            waiting.append((batch, [pool.submit(_image, item, form) for item in batch]))
            if len(waiting) > AHEAD:
                first, futures = waiting.popleft()
                yield first, [future.result() for future in futures]
        for last, futures in waiting:
            yield last, [future.result() for future in futures]


def _image(item: Item, form: InputFormat) -> RGB | str:
    if item.error:
        return item.error
    try:
        return form.read(item.source) if isinstance(item.source, Path) else form.fitted(item.source)
    except UnreadableImageError as error:
        return str(error).removeprefix(f"{item.path}: ")
    except Exception as error:  # one file of a million must not end the other rows
        return f"damaged: {error or type(error).__name__}"


def _rows(bundle: TrainedModel, items: list[Item], images: list[RGB | str], class_name: str | None) -> pd.DataFrame:
    """The rows of a batch; those without an image have an error and nothing else."""
    names = bundle.description.short_names
    deciding = class_name or bundle.description.decision.class_name
    errors = np.array([image if isinstance(image, str) else "" for image in images], dtype=object)
    shares, far = np.full((len(items), len(names)), np.nan), np.full(len(items), np.nan)
    predicted, decision, members, why = (np.full(len(items), "", dtype=object) for _ in range(4))
    readable = [image for image in images if not isinstance(image, str)]
    if readable:
        places = np.flatnonzero(errors == "")
        output = bundle.output(np.stack(readable))
        finite = (output.logits.isfinite().all(dim=1) & output.unlikeness.isfinite()).numpy()
        errors[places[~finite]] = "the network gives no number for it"
        places = places[finite]
        if len(places):
            found = bundle.decide(Output(output.logits[finite], output.unlikeness[finite]), class_name=class_name)
            shares[places], far[places] = found.probabilities, found.unlikeness
            predicted[places] = np.array(names, dtype=object)[found.predicted]
            decision[places] = np.where(found.positive, deciding, f"not {deciding}")
            why[places] = found.why
            if found.sets is not None:
                members[places] = [set_text(names, row) for row in found.sets]
    table = pd.DataFrame({"path": [item.path for item in items]})
    table["second"] = np.array([np.nan if item.second is None else item.second for item in items], dtype=np.float64)
    table["true"] = ["" if item.label is None else names[item.label] for item in items]
    table["predicted"] = predicted
    for place, name in enumerate(names):
        table[f"probability/{name}"] = shares[:, place]
    table["decision"] = decision
    if bundle.description.prediction_sets is not None:
        table["prediction_set"] = members
    table["abstain"] = why != ""
    table["why"] = why
    table["unlikeness"] = far
    table["error"] = errors
    return table.astype({name: "str" for name in TEXTS if name in table})


def set_text(names: Sequence[str], members: NDArray[np.bool_]) -> str:
    """A prediction set as tables show it.

    Args:
        names: Short names of all classes.
        members: Which of them are in the set, of shape (classes,).

    Example:
        >>> set_text(["GC", "GU", "CG"], np.array([True, False, True])), set_text(["GC", "GU"], np.zeros(2, dtype=bool))
        ('{GC, CG}', '{}')
    """
    return f"{{{', '.join(name for name, member in zip(names, members, strict=True) if member)}}}"


def _loaded(folder: Path, device: str) -> TrainedModel:
    if not is_export(folder):
        return load_bundle(folder, device=settled_device(device))
    if device not in ("auto", "cpu"):
        raise PylorusError(f"--device: found {device}, but an export computes on the CPU. Take the bundle itself.")
    settled_device("cpu")
    return load_exported(folder)


def settled_device(wanted: str) -> torch.device:
    """The device to compute on, with this process set up for it.

    Args:
        wanted: auto, cpu, cuda or mps.

    Raises:
        PylorusError: If this machine lacks it.
    """
    there = accelerators()
    if wanted not in ("auto", *there):
        raise PylorusError(f"--device: found {wanted}, which this machine lacks. Take auto or cpu.")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    keep_freed_memory()
    take_full_precision()
    return torch.device(there[0] if wanted == "auto" else wanted)
