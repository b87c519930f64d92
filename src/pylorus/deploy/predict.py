"""`pylorus predict`: write a row of predictions for each image, in constant memory and resumable after a kill."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import groupby, islice, tee
from operator import attrgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pylorus.core.distributed import map_items
from pylorus.core.errors import (
    PylorusError,
    UnreadableImageError,
    explain_interrupt,
    format_path,
    format_suggestion,
)
from pylorus.core.formatting import format_count, open_progress_bar
from pylorus.data.catalog import extract_groups
from pylorus.data.dicom import read_acquisition_date
from pylorus.data.files import RGB
from pylorus.data.input_format import QUALITY, InputFormat, measure_quality
from pylorus.deploy.augmented import augment_model, describe_augmentation, format_augmentation
from pylorus.deploy.card import format_prediction_set
from pylorus.deploy.description import INTENDED_USE, Description
from pylorus.deploy.fingerprints import compare_files, format_comparison
from pylorus.deploy.inputs import RESUME_HINT, Item, ResumableTable, Sources, format_ignored
from pylorus.deploy.model import Bundle, InferenceModel, load_bundle
from pylorus.deploy.onnx import load_export
from pylorus.deploy.thresholds import (
    MIN_PREVALENCE_IMAGES,
    assess_unlike_images,
    draw_images,
    estimate_site_prevalence,
    format_estimated_prevalence,
    format_unlike_images,
)
from pylorus.deploy.validation import evaluate_predictions, format_evaluation
from pylorus.deploy.verified_files import SUMS, is_export
from pylorus.hardware import count_usable_cores, list_accelerators, set_full_precision, set_malloc_options
from pylorus.model.inference import NetworkOutput
from pylorus.runs.process import StopRequest, handle_signals

PART_ROWS, PART_SECONDS = 2000, 60.0
"""A part is written after this many rows or seconds: a kill loses no more than that."""
BATCHES_AHEAD = 3
"""Number of batches that are read ahead while the network computes."""
TEXT_COLUMNS = ("path", "true", "acquired", "predicted", "decision", "prediction_set", "why", "error")
NO_IMAGES = "There are no images in the inputs. In a folder, only files with an image suffix or image content are used."
FIRST_CODE, MAX_COUNTED = 2, 100
"""Exit code: 0 if all files could be read, else 2 + the number of unreadable files, 102 at most; 1 and 2: errors."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of a prediction.

    Attributes:
        class_name: Short name of the class that decides; None for the bundle's own.
        frames_every: Seconds between two frames of a video; None to accept no videos.
        evaluate: Whether an evaluation is required; otherwise there is one if folders are named after classes.
        group: Regular expression that finds the patient in a path; intervals then keep a patient's images together.
        prevalence: Proportion of the deciding class for which the evaluation gives PPV and NPV too; it requires one.
        batch: Batch size of the network, in images.
        device: auto, cpu, cuda or mps.
        network: See `load_model`.
        trust: See `load_model`.
        tta: Kind of test-time augmentation, a key of `COPIES`; None for none.
    """

    class_name: str | None = None
    frames_every: float | None = None
    evaluate: bool = False
    group: str | None = None
    prevalence: float | None = None
    batch: int = 32
    device: str = "auto"
    network: Callable[..., Any] | None = None
    trust: tuple[Path, ...] = ()
    tta: str | None = None


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
    bundle = load_model(folder, options.device, network=options.network, trust=options.trust)
    sources = _build_sources(bundle.description, inputs, options)
    whole_table_options: dict[str, object] = {"group": options.group, "evaluate": options.evaluate}
    whole_table_options |= {} if options.prevalence is None else {"prevalence": options.prevalence}
    parts = ResumableTable(output, _build_request(bundle, inputs, options), also=whole_table_options)
    record = parts.load_record()
    if record is not None:
        print(f"already complete: {output}")
    else:
        sources.check_inputs()
        _check_labels(bundle.description, sources, options)
        with parts.lock_parts(), explain_interrupt(RESUME_HINT), handle_signals() as stop:
            with parts.list_ignored(sources) as listed:
                predict_remaining(bundle, listed.iter_items(), parts, options, stop)
            record = _finalize_output(bundle, parts, options, sources)
    lines = [format_prediction_summary(record, bundle.description), "", *format_ignored(record, output)]
    print("\n".join((*lines, f"predictions: {output}")))
    unreadable = int(str(record["unreadable"]))
    if unreadable == record["images"]:
        print(f"error: no file could be read. {parts.read_first_error()}", file=sys.stderr)
    return FIRST_CODE + min(unreadable, MAX_COUNTED) if unreadable else 0


def predict_table(model: InferenceModel, inputs: Sequence[str | RGB], options: PredictOptions) -> pd.DataFrame:
    """Return the table that `predict` writes, without writing it.

    Args:
        model: A loaded bundle or export.
        inputs: Files, folders and patterns; or decoded images, uint8 RGB of shape (height, width, 3).
        options: The options.

    Raises:
        PylorusError: If an input or an option is invalid, or there are no images.
    """
    sources = _build_sources(model.description, inputs, options)
    sources.check_inputs()
    parts = list(iter_predicted_rows(model, sources.iter_items(), options))
    if not parts:
        raise PylorusError(NO_IMAGES)
    table = pd.concat(parts, ignore_index=True)
    _check_evaluation(model.description, options, labelled=int((table["true"] != "").sum()))
    has_labels, has_dates = (bool((table[name] != "").any()) for name in ("true", "acquired"))
    return table[_select_columns(table, options, is_labelled=has_labels, has_dates=has_dates)]


def iter_predicted_rows(
    model: InferenceModel, items: Iterable[Item], options: PredictOptions
) -> Generator[pd.DataFrame]:
    """Predict images and yield their rows, a batch of `options.batch` at a time."""
    averaged = augment_model(model, options.tta)
    with closing(read_ahead(items, model.input, options.batch)) as batches:
        for batch, images in batches:
            yield _predict_rows(averaged, batch, images, options.class_name)


def _build_sources(description: Description, inputs: Sequence[str | RGB], options: PredictOptions) -> Sources:
    """Return the images of the inputs, after checking the class that decides."""
    short_names = description.short_names
    if options.class_name is not None and description.decision.thresholds.get(options.class_name) is None:
        raise PylorusError(
            f'--class: found "{options.class_name}", which has no threshold.'
            f"{format_suggestion(options.class_name, short_names)} Expected one of {', '.join(short_names)}."
        )
    deciding = options.class_name or description.decision.class_name
    if options.prevalence is not None and description.decision.thresholds.get(deciding) is None:
        raise PylorusError(
            f"--prevalence: class {deciding} has no threshold in this bundle, so it has no PPV or NPV. Leave the "
            "option out, or choose another class with --class."
        )
    names = tuple(zip(description.classes, short_names, strict=True))
    return Sources(tuple(inputs), names, options.frames_every, evaluate=options.evaluate)


def _check_labels(description: Description, sources: Sources, options: PredictOptions) -> None:
    """Check, before anything is predicted, that the paths tell what an evaluation needs: classes and patients."""
    if options.group is not None:
        paths = list(sources.iter_labelled_paths())
        extract_groups(paths, options.group, key="--group")
        _check_evaluation(description, options, labelled=len(paths))
    elif options.evaluate:
        _check_evaluation(description, options, labelled=sum(1 for _ in sources.iter_labelled_paths()))


def _check_evaluation(description: Description, options: PredictOptions, *, labelled: int) -> None:
    """Check that images are labelled if an evaluation is required."""
    if options.evaluate and not labelled:
        option = "--evaluate" if options.prevalence is None else "--prevalence"
        raise PylorusError(f"{option}: no image is in a folder named after a class ({', '.join(description.classes)}).")


def _select_columns(table: pd.DataFrame, options: PredictOptions, *, is_labelled: bool, has_dates: bool) -> list[str]:
    """Return the columns of the output, without labels, seconds of videos or dates if no image has them."""
    unused = {"true"} if not is_labelled else set()
    unused |= {"acquired"} if not has_dates else set()
    unused |= {"second"} if options.frames_every is None else set()
    return [name for name in table.columns if name not in unused]


def predict_remaining(
    bundle: InferenceModel, items: Iterable[Item], parts: ResumableTable, options: PredictOptions, stop: StopRequest
) -> None:
    """Predict the images that are not predicted yet."""
    parts.discard_outdated_parts(list(_predict_rows(bundle, [], [], options.class_name).columns))
    done = parts.read_finished_keys()
    if len(done):
        print(f"already predicted: {format_count(len(done), 'image')}")
    remaining = (item for item in items if item.key not in done)
    rows: list[pd.DataFrame] = []
    last_write = time.monotonic()
    bar = open_progress_bar("predicting images", None, done=len(done))
    with bar, closing(iter_predicted_rows(bundle, remaining, options)) as tables:
        try:
            for table in tables:
                rows.append(table)
                bar.update(len(table))
                if sum(map(len, rows)) >= PART_ROWS or time.monotonic() - last_write > PART_SECONDS:
                    parts.add_part(pd.concat(rows, ignore_index=True))
                    rows, last_write = [], time.monotonic()
                if stop.asked:  # and the exception was raised in a destructor, where Python drops it
                    stop.raise_interrupt()
        finally:  # also when the user interrupts the prediction
            if rows:
                parts.add_part(pd.concat(rows, ignore_index=True))


def _finalize_output(
    bundle: InferenceModel, parts: ResumableTable, options: PredictOptions, sources: Sources
) -> dict[str, object]:
    """Merge the parts into the output file and return the record of the prediction."""
    images = unreadable = labelled = evaluable = dated = 0
    unlike: list[NDArray[np.bool_]] = []
    for table in parts.iter_tables():
        images += len(table)
        unlike.append(table["why"][table["error"] == ""].to_numpy() == "unlike")
        unreadable += int((table["error"] != "").sum())
        labelled += int((table["true"] != "").sum())
        dated += int((table["acquired"] != "").sum())
        evaluable += int(((table["true"] != "") & (table["error"] == "")).sum())
    if not images:
        raise PylorusError(NO_IMAGES)
    _check_evaluation(bundle.description, options, labelled=labelled)
    record: dict[str, object] = {"images": images, "unreadable": unreadable}
    record |= {} if options.tta is None else {"tta": describe_augmentation(options.tta)}
    if evaluable or (labelled and options.evaluate):
        record["evaluation"] = evaluate_predictions(
            parts.iter_tables(),
            bundle.description,
            class_name=options.class_name,
            group=options.group,
            prevalence=options.prevalence,
        )
        files = ((item.path, item.source) for item in sources.iter_items() if item.label is not None)
        record["development_images"] = compare_files(
            bundle.fingerprints if isinstance(bundle, Bundle) else None,
            ((path, source) for path, source in files if isinstance(source, Path)),
            is_export=not isinstance(bundle, Bundle),
        )
    elif images > unreadable:  # with labels, the evaluation tests it, by patient
        tested = assess_unlike_images(np.concatenate(unlike), None, bundle.description.abstention)
        record["unlike_images"] = tested
        # The estimate compares the probabilities with those of the test images, which were computed without tta.
        if images - unreadable >= MIN_PREVALENCE_IMAGES and not tested["foreign"] and options.tta is None:
            record["prevalence"] = _estimate_prevalence(parts, bundle.description, options, images - unreadable)
    table = next(parts.iter_tables())
    columns = _select_columns(table, options, is_labelled=bool(labelled), has_dates=bool(dated))
    return parts.merge_parts(record, columns=columns)


def _estimate_prevalence(
    parts: ResumableTable, description: Description, options: PredictOptions, readable: int
) -> dict[str, Any]:
    """Estimate the prevalence from the rows of readable images; of many images, only those drawn are held in memory.

    The frames of a video are one group. Images are grouped by patient if `--group` finds one in each path.
    """
    is_drawn = np.zeros(readable, dtype=np.bool_)
    is_drawn[draw_images(readable)] = True
    drawn, start = [], 0
    columns = [f"probability/{name}" for name in description.short_names]
    for table in parts.iter_tables():
        rows = table.loc[table["error"] == "", ["path", *columns]]
        drawn.append(rows[is_drawn[start : start + len(rows)]])
        start += len(rows)
    rows = pd.concat(drawn, ignore_index=True)
    groups = list(rows["path"])
    with suppress(PylorusError):
        groups = extract_groups(groups, options.group, key="--group")
    return estimate_site_prevalence(
        rows[columns].to_numpy(dtype=np.float64), np.array(groups, dtype=str), description, images=readable
    )


def _build_request(bundle: InferenceModel, inputs: list[str], options: PredictOptions) -> dict[str, object]:
    description = bundle.description
    absolute = "\n".join(str(Path(path).absolute()) for path in inputs)
    return {
        "bundle": {"architecture": description.architecture, SUMS: bundle.identity},
        "intended use": INTENDED_USE,
        # The hash tells the same words typed in another folder apart, without naming that folder.
        "inputs": {
            "as typed": [format_path(path) for path in inputs],
            "hash of full paths": hashlib.sha256(absolute.encode(errors="surrogateescape")).hexdigest()[:16],
        },
        "class": options.class_name or description.decision.class_name,
        "frames every": options.frames_every,
        **({} if options.tta is None else {"tta": options.tta}),
    }


def read_ahead(items: Iterable[Item], form: InputFormat, size: int) -> Generator[tuple[list[Item], list[RGB | str]]]:
    """Read images on all cores, ahead of the network.

    Args:
        items: The images to read.
        form: How files are turned into the network's input.
        size: Batch size.

    Yields:
        Batches of items, each item with its image or with the reason why there is none.
    """
    cv2.setNumThreads(0)
    listed, remaining = tee(items)
    with closing(_read_images(remaining, form, ahead=BATCHES_AHEAD * size)) as images:
        pairs = zip(images, listed, strict=False)  # in this order: the images end first
        while batch := list(islice(pairs, size)):
            yield (
                [replace(item, acquired=date) if date else item for (_, date), item in batch],
                [image for (image, _), _ in batch],
            )


def _read_images(items: Iterable[Item], form: InputFormat, *, ahead: int) -> Generator[tuple[RGB | str, str]]:
    """Yield what `_read_dated_image` returns for each item; decoded frames of videos stay in this process."""
    for is_frame, group in groupby(items, key=lambda item: not isinstance(item.source, Path)):
        answers: dict[str, Any] = {"name": attrgetter("path"), "on_failure": lambda _, reason: (reason, "")}
        yield from map_items(
            lambda item: _read_dated_image(item, form), group, ahead=ahead, in_threads=is_frame, **answers
        )


def _read_dated_image(item: Item, form: InputFormat) -> tuple[RGB | str, str]:
    """Return an image, or the reason why there is none, and the day of its acquisition, "" if no file states it."""
    image = _read_image(item, form)
    if isinstance(image, str) or not isinstance(item.source, Path):
        return image, ""
    return image, read_acquisition_date(item.source)


def _read_image(item: Item, form: InputFormat) -> RGB | str:
    if item.error:
        return item.error
    try:
        return form.load_image(item.source) if isinstance(item.source, Path) else form.prepare_image(item.source)
    except UnreadableImageError as error:
        return str(error).removeprefix(f"{item.path}: ")
    except Exception as error:  # one bad file must not end the prediction of all others
        return f"damaged: {str(error) or type(error).__name__}"


def _predict_rows(
    bundle: InferenceModel, items: list[Item], images: list[RGB | str], class_name: str | None
) -> pd.DataFrame:
    """Predict a batch and return its rows; rows without an image have only an error."""
    names = bundle.description.short_names
    deciding = class_name or bundle.description.decision.class_name
    errors = np.array([image if isinstance(image, str) else "" for image in images], dtype=object)
    probabilities, unlikeness = np.full((len(items), len(names)), np.nan), np.full(len(items), np.nan)
    quality = np.full((len(items), len(QUALITY)), np.nan)
    predicted, decision, members, why = (np.full(len(items), "", dtype=object) for _ in range(4))
    readable = [image for image in images if not isinstance(image, str)]
    if readable:
        rows = np.flatnonzero(errors == "")
        stacked = np.stack(readable)
        quality[rows] = measure_quality(bundle.input.get_square(stacked))
        output = bundle.run_network(stacked)
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
    table["acquired"] = ["" if error else item.acquired for error, item in zip(errors, items, strict=True)]
    table["predicted"] = predicted
    for index, name in enumerate(names):
        table[f"probability/{name}"] = probabilities[:, index]
    table["decision"] = decision
    if bundle.description.prediction_sets is not None:
        table["prediction_set"] = members
    table["abstain"] = pd.arrays.BooleanArray(why != "", errors != "")  # empty for a file that can't be read
    table["why"] = why
    table["unlikeness"] = unlikeness
    for column, name in enumerate(QUALITY):
        table[name] = quality[:, column]
    table["error"] = errors
    return table.astype({name: "str" for name in TEXT_COLUMNS if name in table})


def load_model(
    folder: Path, device: str = "auto", *, network: Callable[..., Any] | None = None, trust: Sequence[Path] = ()
) -> InferenceModel:
    """Load a bundle or an export.

    Args:
        folder: The folder `model` of a run, or an export of it.
        device: auto, cpu, cuda or mps.
        network: Class, function or module of the user's own that a bundle's network is from; None for a model of timm.
        trust: Files with public keys of which one must have signed it; empty to accept any.

    Raises:
        PylorusError: If the folder is neither, it is incomplete, changed or not signed, or there is no such device.
    """
    if not is_export(folder):
        return load_bundle(folder, device=resolve_device(device), network=network, trust=trust)
    if network is not None:
        raise PylorusError("--network: found an export, which contains its network. Leave the option out.")
    if device not in ("auto", "cpu"):
        raise PylorusError(f"--device: found {device}, but an export runs on the CPU only. Use the bundle itself.")
    resolve_device("cpu")
    return load_export(folder, trust=trust)


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


def format_prediction_summary(record: Mapping[str, Any], description: Description) -> str:
    """Format the summary of a prediction: the number of images, and the evaluation if there is one.

    Args:
        record: The record of the prediction, as its .about.json holds it.
        description: The content of the bundle's model.json.
    """
    reasons = " (the column `error` gives the reasons)" if record["unreadable"] else ""
    lines = [f"images: {record['images']:,}, unreadable: {record['unreadable']:,}{reasons}"]
    lines += format_augmentation(record["tta"]["kind"]) if "tta" in record else []
    evaluation = record.get("evaluation")
    tested = (record if evaluation is None else evaluation).get("unlike_images")
    lines += [] if tested is None else [format_unlike_images(tested)]
    if "prevalence" in record:
        lines.append(format_estimated_prevalence(record["prevalence"]))
    if evaluation is not None:
        lines += ["", *format_evaluation(record, description)]
    if "development_images" in record:  # a record of an older Pylorus has none
        lines += ["", *format_comparison(record["development_images"])]
    return "\n".join(lines)
