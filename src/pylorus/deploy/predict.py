"""`pylorus predict`: write a row of predictions for each image, in constant memory and resumable after a kill."""

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
from pylorus.data.unreadable import UnreadableImageError, format_path
from pylorus.deploy.answers import InferenceModel
from pylorus.deploy.evaluate import evaluate_predictions, format_prediction_summary
from pylorus.deploy.exported import is_export, load_export
from pylorus.deploy.files import SUMS
from pylorus.deploy.load import load_bundle
from pylorus.deploy.network import NetworkOutput
from pylorus.deploy.parts import ResumableTable
from pylorus.deploy.sources import Item, Sources
from pylorus.errors import PylorusError, format_suggestion
from pylorus.machine.engine import count_usable_cores, list_accelerators, set_full_precision, set_malloc_options
from pylorus.model.weights import compute_sha256

PART_ROWS, PART_SECONDS = 2000, 60.0
"""A part is written after this many rows or seconds: a kill loses no more than that."""
AHEAD = 3
"""Number of batches that are read ahead while the network computes."""
TEXTS = ("path", "true", "predicted", "decision", "prediction_set", "why", "error")
FIRST_CODE, MOST_COUNTED = 2, 100
"""The exit code is 0 if all files could be read, else 2 + the number of unreadable files, 102 at most; 1 and 2 are for
other errors."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of a prediction.

    Attributes:
        class_name: Short name of the class that decides; None for the bundle's own.
        frames_every: Seconds between two frames of a video; None to accept no videos.
        evaluate: Whether it is an error if no evaluation is possible; otherwise there is one only if folders are named
            after classes.
        group: Regular expression that finds the patient in a path; intervals then keep a patient's images together.
        batch: Batch size of the network, in images.
        device: auto, cpu, cuda or mps.
    """

    class_name: str | None = None
    frames_every: float | None = None
    evaluate: bool = False
    group: str | None = None
    batch: int = 32
    device: str = "auto"


def predict(folder: Path, inputs: list[str], output: Path, options: PredictOptions) -> int:
    """Write a row of predictions for each image, and an evaluation if folders are named after classes.

    Args:
        folder: Folder of a bundle or an export.
        inputs: Files, folders and patterns.
        output: The file to write; its name ends in .csv, .parquet or .json.
        options: The options.

    Returns:
        The exit code; see `FIRST_CODE`.

    Raises:
        PylorusError: If the bundle, an input or an option is invalid.
    """
    bundle = _load_model(folder, options.device)
    description = bundle.description
    short_names = description.short_names
    if options.class_name is not None and description.decision.thresholds.get(options.class_name) is None:
        raise PylorusError(
            f'--class: found "{options.class_name}", which has no threshold.'
            f"{format_suggestion(options.class_name, short_names)} Expected one of {', '.join(short_names)}."
        )
    class_names = tuple(zip(description.classes, short_names, strict=True))
    sources = Sources(tuple(inputs), class_names, options.frames_every)
    whole_table_options = {"group": options.group, "evaluate": options.evaluate}
    parts = ResumableTable(output, _build_request(bundle, inputs, options), also=whole_table_options)
    record = parts.load_record()
    if record is not None:
        print(f"already complete: {output}")
    else:
        sources.check_inputs()
        with parts.lock_parts(), _print_resume_hint():
            _predict_remaining(bundle, sources, parts, options)
            record = _finalize_output(bundle, parts, options)
    print(format_prediction_summary(record, bundle.description))
    print(f"\npredictions: {output}")
    unreadable = int(str(record["unreadable"]))
    return FIRST_CODE + min(unreadable, MOST_COUNTED) if unreadable else 0


@contextmanager
def _print_resume_hint() -> Iterator[None]:
    """Print how to resume a prediction when the user interrupts it."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; finished rows are saved: run the same command to continue", file=sys.stderr)
        raise


def _predict_remaining(
    bundle: InferenceModel, sources: Sources, parts: ResumableTable, options: PredictOptions
) -> None:
    """Predict the images that are not predicted yet."""
    done = parts.read_finished_keys()
    if len(done):
        print(f"already predicted: {len(done):,} image{'' if len(done) == 1 else 's'}")
    remaining = (item for item in sources.iter_items() if item.key not in done)
    rows: list[pd.DataFrame] = []
    last_write = time.monotonic()
    with tqdm(desc="images", unit="", initial=len(done), disable=not sys.stderr.isatty()) as bar:
        try:
            for items, images in read_ahead(remaining, bundle.input, options.batch):
                rows.append(_predict_rows(bundle, items, images, options.class_name))
                bar.update(len(items))
                if sum(map(len, rows)) >= PART_ROWS or time.monotonic() - last_write > PART_SECONDS:
                    parts.add_part(pd.concat(rows, ignore_index=True))
                    rows, last_write = [], time.monotonic()
        finally:  # also when the user interrupts the prediction
            if rows:
                parts.add_part(pd.concat(rows, ignore_index=True))


def _finalize_output(bundle: InferenceModel, parts: ResumableTable, options: PredictOptions) -> dict[str, object]:
    """Merge the parts into the output file and return the record of the prediction."""
    images = unreadable = labelled = 0
    for table in parts.iter_tables():
        images += len(table)
        unreadable += int((table["error"] != "").sum())
        labelled += int((table["true"] != "").sum())
    if not images:
        raise PylorusError(
            "There are no images in the inputs. In a folder, only files with the suffix of an image format are used."
        )
    if options.evaluate and not labelled:
        names = ", ".join(bundle.description.classes)
        raise PylorusError(f"--evaluate: no image is in a folder named after a class ({names}).")
    record: dict[str, object] = {"images": images, "unreadable": unreadable}
    if labelled:
        record["evaluation"] = evaluate_predictions(parts.iter_tables(), bundle.description, options)
    unused = {"true"} if not labelled else set()
    unused |= {"second"} if options.frames_every is None else set()
    columns = [name for name in next(parts.iter_tables()).columns if name not in unused]
    parts.merge_parts(record, columns=columns)
    return {"request": parts.request, **record}


def _build_request(bundle: InferenceModel, inputs: list[str], options: PredictOptions) -> dict[str, object]:
    description = bundle.description
    return {
        "bundle": {"architecture": description.architecture, SUMS: compute_sha256(bundle.folder / SUMS)},
        "intended use": description.intended_use,
        "inputs": [format_path(Path(path).absolute()) for path in inputs],
        "class": options.class_name or description.decision.class_name,
        "frames every": options.frames_every,
    }


def read_ahead(items: Iterable[Item], form: InputFormat, size: int) -> Iterator[tuple[list[Item], list[RGB | str]]]:
    """Read images in background threads, ahead of the network.

    Args:
        items: The images to read.
        form: How files are turned into the network's input.
        size: Batch size.

    Yields:
        Batches of items, each item with its image or with the reason why there is none.
    """
    cv2.setNumThreads(0)
    remaining = iter(items)
    waiting: deque[tuple[list[Item], list[Future[RGB | str]]]] = deque()
    with ThreadPoolExecutor(max(2, count_usable_cores())) as pool:
        while batch := list(islice(remaining, size)):
            waiting.append((batch, [pool.submit(_read_image, item, form) for item in batch]))
            if len(waiting) > AHEAD:
                first, futures = waiting.popleft()
                yield first, [future.result() for future in futures]
        for last, futures in waiting:
            yield last, [future.result() for future in futures]


def _read_image(item: Item, form: InputFormat) -> RGB | str:
    if item.error:
        return item.error
    try:
        return form.load_image(item.source) if isinstance(item.source, Path) else form.prepare_image(item.source)
    except UnreadableImageError as error:
        return str(error).removeprefix(f"{item.path}: ")
    except Exception as error:  # one bad file must not end the prediction of all others
        return f"damaged: {error or type(error).__name__}"


def _predict_rows(
    bundle: InferenceModel, items: list[Item], images: list[RGB | str], class_name: str | None
) -> pd.DataFrame:
    """Predict a batch and return its rows; rows without an image have only an error."""
    names = bundle.description.short_names
    deciding = class_name or bundle.description.decision.class_name
    errors = np.array([image if isinstance(image, str) else "" for image in images], dtype=object)
    probabilities, unlikeness = np.full((len(items), len(names)), np.nan), np.full(len(items), np.nan)
    predicted, decision, members, why = (np.full(len(items), "", dtype=object) for _ in range(4))
    readable = [image for image in images if not isinstance(image, str)]
    if readable:
        rows = np.flatnonzero(errors == "")
        output = bundle.run_network(np.stack(readable))
        finite = (output.logits.isfinite().all(dim=1) & output.unlikeness.isfinite()).numpy()
        errors[rows[~finite]] = "the network's output is NaN or infinite for this image"
        rows = rows[finite]
        if len(rows):
            predictions = bundle.apply_thresholds(
                NetworkOutput(output.logits[finite], output.unlikeness[finite]), class_name=class_name
            )
            probabilities[rows], unlikeness[rows] = predictions.probabilities, predictions.unlikeness
            predicted[rows] = np.array(names, dtype=object)[predictions.predicted]
            decision[rows] = np.where(predictions.positive, deciding, f"not {deciding}")
            why[rows] = predictions.why
            if predictions.sets is not None:
                members[rows] = [format_prediction_set(names, row) for row in predictions.sets]
    table = pd.DataFrame({"path": [item.path for item in items]})
    table["second"] = np.array([np.nan if item.second is None else item.second for item in items], dtype=np.float64)
    table["true"] = ["" if item.label is None else names[item.label] for item in items]
    table["predicted"] = predicted
    for index, name in enumerate(names):
        table[f"probability/{name}"] = probabilities[:, index]
    table["decision"] = decision
    if bundle.description.prediction_sets is not None:
        table["prediction_set"] = members
    table["abstain"] = why != ""
    table["why"] = why
    table["unlikeness"] = unlikeness
    table["error"] = errors
    return table.astype({name: "str" for name in TEXTS if name in table})


def format_prediction_set(names: Sequence[str], members: NDArray[np.bool_]) -> str:
    """Format a prediction set for a table.

    Args:
        names: Short names of all classes.
        members: Whether each class is in the set, of shape (classes,).

    Example:
        >>> format_prediction_set(["GC", "GU", "CG"], np.array([True, False, True])), format_prediction_set(["GC", "GU"], np.zeros(2, dtype=bool))
        ('{GC, CG}', '{}')
    """
    return f"{{{', '.join(name for name, member in zip(names, members, strict=True) if member)}}}"


def _load_model(folder: Path, device: str) -> InferenceModel:
    if not is_export(folder):
        return load_bundle(folder, device=resolve_device(device))
    if device not in ("auto", "cpu"):
        raise PylorusError(f"--device: found {device}, but an export runs on the CPU only. Use the bundle itself.")
    resolve_device("cpu")
    return load_export(folder)


def resolve_device(name: str) -> torch.device:
    """Resolve the device to compute on, and set up this process for it (threads, memory, full precision).

    Args:
        name: auto, cpu, cuda or mps.

    Raises:
        PylorusError: If this machine does not have the device.
    """
    available = list_accelerators()
    if name not in ("auto", *available):
        raise PylorusError(f"--device: found {name}, which this machine does not have. Use auto or cpu.")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(count_usable_cores())
    set_malloc_options()
    set_full_precision()
    return torch.device(available[0] if name == "auto" else name)
