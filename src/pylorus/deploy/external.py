"""`pylorus validate`: evaluate a trained model on labelled images from elsewhere, beside its development figures.

Network, calibration, thresholds and abstention are those of the bundle; nothing is fitted on the images. Each
validation leaves a line in a file beside the bundle, so that a report can say how often a set was looked at.
"""

import hashlib
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pylorus import __version__
from pylorus.core.errors import (
    PylorusError,
    explain_interrupt,
    format_name_list,
    format_path,
    format_suggestion,
    normalize_name,
    resolve_short_name,
)
from pylorus.core.formatting import format_command, format_count
from pylorus.core.io import check_new_folder, write_atomically, write_json
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.data.catalog import Catalog, ReadOptions, build_catalog, extract_groups, write_quarantine
from pylorus.data.files import check_names
from pylorus.data.manifest import explain_missing_files, read_manifest_rows
from pylorus.data.walk import IgnoredFiles, list_class_images, log_ignored
from pylorus.deploy.augmented import format_gain, measure_gain
from pylorus.deploy.card import format_comparison_limit
from pylorus.deploy.description import Description
from pylorus.deploy.fingerprints import find_development_images, format_comparison
from pylorus.deploy.inputs import RECORD_SUFFIX, RESUME_HINT, Item, ResumableTable
from pylorus.deploy.model import Bundle, InferenceModel
from pylorus.deploy.predict import PredictOptions, load_model, predict_remaining
from pylorus.deploy.thresholds import format_estimated_prevalence
from pylorus.deploy.validation import (
    evaluate_known_images,
    evaluate_prevalence_shift,
    format_evaluation,
    record_look,
)
from pylorus.deploy.verified_files import SUMS
from pylorus.evaluation.calibration import Temperature
from pylorus.evaluation.predictions import Predictions
from pylorus.report.development import StoredModel
from pylorus.report.external import ExternalSet, collect_warnings, write_external_report
from pylorus.report.page import PAGE
from pylorus.report.record_sections import STRESS_FOLDER, read_stress_record
from pylorus.runs.predictions import SavedPredictions
from pylorus.runs.process import handle_signals
from pylorus.runs.reading import HASH_DIGITS, SavedSplit, compute_image_set_hash

RECORD, TABLE, AUGMENTED_TABLE = "validation.json", "predictions.csv", "predictions-tta.csv"
"""Names of the files of a validation; the last has the predictions with test-time augmentation, if it is measured.

Beside each table is one with the suffix .parquet and all digits: a repeated validation gives the same figures to the
last digit.
"""


@dataclass(frozen=True, kw_only=True)
class ValidateOptions:
    """Options of a validation on images from elsewhere.

    Attributes:
        root: Folder that the paths of a manifest are relative to; None: the manifest's own.
        group: Regular expression that finds the patient in a path; None: the column group of a manifest, if it has one.
        names: The bundle's class for each class of the images that has another name; "" to leave its images out.
        class_name: Short name of the class of interest; None: the bundle's own.
        prevalence: Proportion of this class, in (0, 1), for which PPV and NPV are computed too.
        show_names: Whether the report shows file names and groups, which may identify patients.
        tta: Kind of test-time augmentation whose gain is measured too, a key of `COPIES`; None for none.
        inference: How the network computes.
    """

    root: Path | None = None
    group: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    class_name: str | None = None
    prevalence: float | None = None
    show_names: bool = False
    tta: str | None = None
    inference: PredictOptions = PredictOptions()


@dataclass(frozen=True, eq=False)
class LabelledFiles:
    """Image files of known classes, not read yet.

    Attributes:
        root: Folder that their paths are relative to.
        table: A row for each file, with path, class (the bundle's), split, group and the other columns of a manifest.
        grouped: Whether the groups are patients; otherwise each image is its own.
        left_out: Number of images of each class that was left out on purpose.
    """

    root: Path
    table: pd.DataFrame
    grouped: bool
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class LabelledImages:
    """Images of known classes.

    Attributes:
        catalog: The images; the labels are indices into `catalog.classes`.
        labels: Index of each image's class in the bundle, of shape (images,).
        left_out: Number of images of each class that was left out on purpose.
        splits: Number of images in each split that their folders or their manifest state; empty if they state none.
    """

    catalog: Catalog
    labels: np.ndarray
    left_out: Mapping[str, int]
    splits: Mapping[str, int]

    def iter_items(self) -> Iterator[Item]:
        """Iterate over the images in the order of the catalog."""
        for path, label in zip(self.catalog.table["path"], self.labels.tolist(), strict=True):
            yield Item(format_path(path), self.catalog.root / path, label)

    @property
    def set_hash(self) -> str:
        """Hash of the contents of the images: the same for copies of the set with other names."""
        return compute_image_set_hash(set(self.catalog.table["sha256"]))


def validate_bundle(folder: Path, images: Path, output: Path, options: ValidateOptions) -> Path:
    """Evaluate a bundle on labelled images from elsewhere, and write the report.

    An interrupted validation is resumed by the same command: images are not predicted twice.

    Args:
        folder: Folder of a bundle or an export.
        images: Class folders, or a manifest (.csv or .parquet).
        output: Folder to write to: report.html, tables/, figures/, predictions.csv, validation.json.
        options: The options.

    Returns:
        Path of the report.

    Raises:
        PylorusError: If the bundle, the images or an option is invalid.
    """
    model = load_model(
        folder, options.inference.device, network=options.inference.network, trust=options.inference.trust
    )
    description = model.description
    deciding = _resolve_deciding_class(description, options)
    check_new_folder(
        output,
        hint="A folder with an earlier validation is accepted, too.",
        own=(
            *(RECORD, STRESS_FOLDER),
            *(name for table in (TABLE, AUGMENTED_TABLE) for name in (f".{table}.parts", f"{table}{RECORD_SUFFIX}")),
        ),
        outside=(folder, images),
    )
    labelled = read_labelled_images(images, description, options)
    output.mkdir(parents=True, exist_ok=True)
    table = _predict_images(model, labelled, output, options)
    write_quarantine(labelled.catalog.unreadable, output)  # in a folder that is known as one of a validation
    copies = _find_copies(model, labelled)
    external = _build_external_set(labelled, table, description, options, copies)
    external = replace(external, stress=_read_stress_records(output, folder, str(model.identity)))
    gain = _measure_gain(model, labelled, table, output, options, deciding)
    external = replace(external, augmentation=() if gain is None else tuple(format_gain(gain)))
    record = evaluate_known_images(
        external.test.predictions,
        external.why,
        description,
        left_out=len(labelled.catalog.unreadable) + external.unpredicted,
        class_name=deciding,
        prevalence=options.prevalence,
    )
    shift = evaluate_prevalence_shift(
        external.test.predictions, description, class_name=deciding, prevalence=options.prevalence
    )
    record["prevalence_shift"] = shift
    bundle = {"architecture": description.architecture, SUMS: model.identity}
    patients = labelled.catalog.table["group"].nunique() if labelled.catalog.grouped else None
    digests = list(labelled.catalog.table["sha256"])
    looks = record_look(folder, digests, bundle=str(model.identity), patients=patients)
    complete = {
        "pylorus": __version__,
        "bundle": bundle,
        "request": {"group": "patients" if labelled.catalog.grouped else None},
        "images": external.test.images,
        "image set": labelled.set_hash,
        "looks": looks,
        "classes left out": dict(labelled.left_out),
        "splits": dict(labelled.splits),
        "development_images": copies,
        "evaluation": record,
        **({} if gain is None else {"tta": gain}),
    }
    write_json(output / RECORD, complete)
    stored = _describe_model(description, deciding, folder)
    notes = collect_warnings(stored, external, record, looks)
    lines = [
        line for note in notes for line in textwrap.wrap(note, width=110, initial_indent="- ", subsequent_indent="  ")
    ]
    estimated = textwrap.fill(format_estimated_prevalence(shift["estimated"]), width=110)
    print(
        "\n".join(
            [
                *format_evaluation({name: value for name, value in complete.items() if name != "tta"}, description),
                *("", estimated),
                *(("", *lines) if lines else ()),
                "",
                *format_comparison(copies),
                "",
                *((*external.augmentation, "") if gain is not None else ()),
            ]
        )
    )
    return write_external_report(stored, external, record, looks, output, names=options.show_names)


def _resolve_deciding_class(description: Description, options: ValidateOptions) -> str:
    if options.class_name is None:
        return description.decision.class_name
    names = {"classes": description.classes, "short_names": description.short_names}
    name = resolve_short_name(options.class_name, **names, where="--class")
    if description.decision.thresholds.get(name) is None:
        raise PylorusError(f"--class: the bundle has no threshold for {name}. Choose another class.")
    return name


def find_labelled_files(
    images: Path,
    description: Description,
    *,
    root: Path | None = None,
    group: str | None = None,
    names: Mapping[str, str] | None = None,
) -> LabelledFiles:
    """Find the files of labelled images, class folders or the rows of a manifest, without reading them.

    Args:
        images: Class folders, or a manifest. Folders and rows of a split are used, whatever the split.
        description: The content of the bundle's model.json.
        root: See `ValidateOptions`.
        group: See `ValidateOptions`.
        names: See `ValidateOptions`.

    Raises:
        PylorusError: If they are neither, a class is unknown, or there is no image; the message says what to type.
    """
    if images.is_dir():
        folder, ignored = images, IgnoredFiles()
        rows, _ = list_class_images(images, ignored, for_training=False)
        check_names((path for path, *_ in rows), images)
        table = pd.DataFrame(rows, columns=["path", "class", "split"])
        log_ignored(ignored.files, listed_in="")
    elif images.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet") and images.is_file():
        folder = root or images.parent
        table = read_manifest_rows(images, folder, for_training=False)
        missing = list(table.loc[~table.pop("exists"), "path"])
        if missing:
            raise PylorusError(explain_missing_files(missing, len(table), folder, images, for_training=False))
    else:
        problem = "is neither a folder nor a table" if images.exists() else "does not exist"
        raise PylorusError(f"{images} {problem}. Expected class folders, or a manifest (.csv or .parquet).")
    if table.empty:
        raise PylorusError(f"{images} holds no images. Expected a folder of images for each class.")
    classes = _match_classes(sorted(set(table["class"])), description, names or {}, where=str(images))
    is_left_out = table["class"].map(classes).eq("")
    left_out = {name: int(count) for name, count in Counter(table.loc[is_left_out, "class"]).items()}
    table = table[~is_left_out].reset_index(drop=True)
    table["class"] = table["class"].map(classes)
    if table.empty:
        raise PylorusError(f"{images}: all images are of classes that are left out.")
    grouped = group is not None or "group" in table
    if group is not None or not grouped:
        table["group"] = extract_groups(list(table["path"]), group, key="--group")
    return LabelledFiles(folder, table, grouped, left_out)


def read_labelled_images(images: Path, description: Description, options: ValidateOptions) -> LabelledImages:
    """Find labelled images, and read each once; files that can't be read are left out.

    Args:
        images: Class folders, or a manifest.
        description: The content of the bundle's model.json.
        options: Names of classes, groups and the root of a manifest.

    Raises:
        PylorusError: See `find_labelled_files`; or no image of a class can be read.
    """
    files = find_labelled_files(images, description, root=options.root, group=options.group, names=options.names)
    present = tuple(name for name in description.classes if (files.table["class"] == name).any())
    catalog = build_catalog(
        files.table,
        files.root,
        present,
        short_names=None,
        grouped=files.grouped,
        reading=ReadOptions(on_error="quarantine"),
    )
    index = np.array([description.classes.index(name) for name in present], dtype=np.int64)
    splits = Counter(filter(None, catalog.table["split"]))
    return LabelledImages(catalog, index[catalog.table["label"].to_numpy()], files.left_out, splits)


def _match_classes(
    found: Sequence[str], description: Description, names: Mapping[str, str], *, where: str
) -> dict[str, str]:
    """Return the bundle's class for each class of the images, "" for one that is left out."""
    known = {
        normalize_name(name).casefold(): full
        for full, short in zip(description.classes, description.short_names, strict=True)
        for name in (full, short)
    }
    renamed = {normalize_name(old): new for old, new in names.items()}
    absent = [old for old in renamed if old not in found]
    if absent:
        old, new = absent[0], normalize_name(renamed[absent[0]])
        is_reversed = old.casefold() in known and new in found
        hint = f" Did you mean {format_command([f'{new}={old}'])}?" if is_reversed else format_suggestion(old, found)
        raise PylorusError(f'--map: "{old}" is not among the classes of the images: {", ".join(found)}.{hint}')
    matched, unknown = {}, []
    for name in found:
        target = renamed.get(name, name)
        if name in renamed and not target:
            matched[name] = ""
        elif normalize_name(target).casefold() in known:
            matched[name] = known[normalize_name(target).casefold()]
        elif name in renamed:
            raise PylorusError(
                f'--map: "{target}" is no class of the model: {", ".join(description.classes)}.'
                f"{format_suggestion(target, description.classes)}"
            )
        else:
            unknown.append(name)
    if unknown:
        example = f"{unknown[0]}={description.short_names[0]}"
        raise PylorusError(
            f"{where}: {format_count(len(unknown), 'class', 'classes')} that the model does not have:\n"
            f"{format_name_list(unknown)}\n"
            f"Its classes are {', '.join(description.classes)}. Say which of them each one is, as in "
            f"--map {format_command([example])}, or leave its images out, as in "
            f"--map {format_command([f'{unknown[0]}='])}"
        )
    return matched


def _predict_images(
    model: InferenceModel, labelled: LabelledImages, output: Path, options: ValidateOptions, *, tta: str | None = None
) -> pd.DataFrame:
    """Predict the images and write both tables; return the rows with all digits, in the order of the catalog."""
    request: dict[str, object] = {
        "bundle": {"architecture": model.description.architecture, SUMS: model.identity},
        "image set": labelled.set_hash,
        "labels": hashlib.sha256(labelled.labels.tobytes()).hexdigest()[:HASH_DIGITS],
        "class": _resolve_deciding_class(model.description, options),
    }
    request |= {} if tta is None else {"tta": tta}
    path = output / (TABLE if tta is None else AUGMENTED_TABLE)
    exact = path.with_suffix(".parquet")
    parts = ResumableTable(path, request, also={})
    paths = list(map(format_path, labelled.catalog.table["path"]))
    with suppress(PylorusError):
        if parts.load_record() is not None and exact.is_file():
            return _sort_as(pd.read_parquet(exact), paths)
    # Of other images or another model, which this validation replaces: if it is interrupted, no page of those remains.
    for earlier in (path, exact, output / RECORD, output / PAGE):
        earlier.unlink(missing_ok=True)
    inference = replace(options.inference, class_name=options.class_name and str(request["class"]), tta=tta)
    with parts.lock_parts(), explain_interrupt(RESUME_HINT), handle_signals() as stop:
        predict_remaining(model, labelled.iter_items(), parts, inference, stop)
        table = pd.concat(list(parts.iter_tables()), ignore_index=True)
        with write_atomically(exact) as temporary:
            table.to_parquet(temporary, index=False)
        columns = [name for name in table.columns if name != "second"]
        parts.merge_parts({"images": len(table)}, columns=columns)
    return _sort_as(table, paths)


def _measure_gain(
    model: InferenceModel,
    labelled: LabelledImages,
    table: pd.DataFrame,
    output: Path,
    options: ValidateOptions,
    deciding: str,
) -> dict[str, Any] | None:
    """Predict the images with test-time augmentation too, and measure what it gains; None if that was not asked for."""
    if options.tta is None:
        for name in (AUGMENTED_TABLE, Path(AUGMENTED_TABLE).with_suffix(".parquet").name):
            (output / name).unlink(missing_ok=True)
        (output / f"{AUGMENTED_TABLE}{RECORD_SUFFIX}").unlink(missing_ok=True)
        return None
    augmented = _predict_images(model, labelled, output, options, tta=options.tta)
    is_predicted = ((table["error"] == "") & (augmented["error"] == "")).to_numpy()
    if not is_predicted.any():
        return None
    plain, averaged = (
        _build_predictions(labelled, each, is_predicted, model.description) for each in (table, augmented)
    )
    return measure_gain(plain, averaged, model.description, kind=options.tta, class_name=deciding)


def _build_predictions(
    labelled: LabelledImages, table: pd.DataFrame, chosen: np.ndarray, description: Description
) -> Predictions:
    """Return the predictions of the chosen rows, which are in the order of the catalog."""
    rows = labelled.catalog.table[chosen]
    columns = [f"probability/{name}" for name in description.short_names]
    return Predictions(
        sample=rows["sample_id"].to_numpy(dtype=str),
        group=rows["group"].to_numpy(dtype=str),
        true=labelled.labels[chosen].astype(np.int64),
        probabilities=table.loc[chosen, columns].to_numpy(dtype=np.float64),
        class_names=description.short_names,
    )


def _sort_as(table: pd.DataFrame, paths: Sequence[str]) -> pd.DataFrame:
    """Return the rows in the order of the paths."""
    position = {path: index for index, path in enumerate(paths)}
    return table.iloc[np.argsort([position[path] for path in table["path"]])].reset_index(drop=True)


def _find_copies(model: InferenceModel, labelled: LabelledImages) -> dict[str, object]:
    """Search the images for copies of the model's training and validation images; return plain values."""
    catalog = labelled.catalog
    copies = find_development_images(
        model.fingerprints if isinstance(model, Bundle) else None,
        catalog.facts,
        catalog.fact_indices,
        is_export=not isinstance(model, Bundle),
    )
    return copies.build_record(list(map(format_path, catalog.table["path"])))


def _build_external_set(
    labelled: LabelledImages,
    table: pd.DataFrame,
    description: Description,
    options: ValidateOptions,
    copies: Mapping[str, object],
) -> ExternalSet:
    """Return the predicted images with what the report needs of them."""
    rows, labels = labelled.catalog.table, labelled.labels  # in the order of the predictions
    is_predicted = (table["error"] == "").to_numpy()
    if not is_predicted.any():
        raise PylorusError(f"No image could be predicted. {table['path'].iloc[0]}: {table['error'].iloc[0]}")
    predictions = _build_predictions(labelled, table, is_predicted, description)
    table, rows, labels = table[is_predicted], rows[is_predicted].reset_index(drop=True), labels[is_predicted]
    split = rows[["sample_id", "path", "group", "sha256"]].assign(
        split="test", **{"class": np.array(description.classes, dtype=object)[labels]}
    )
    about = {
        name.removeprefix(MANIFEST_PREFIX): rows[name].fillna("").to_numpy(dtype=str)
        for name in rows.columns
        if name.startswith(MANIFEST_PREFIX)
    }
    calibration = description.calibration
    with np.errstate(divide="ignore"):
        scores = np.maximum(np.log(predictions.probabilities), -700.0) - np.asarray(calibration.bias or 0.0)
    logits = scores * calibration.temperature
    return ExternalSet(
        test=SavedPredictions(predictions, logits, about),
        why=table["why"].to_numpy(dtype=str),
        split=SavedSplit(hashlib.sha256(split.to_csv(index=False).encode()).hexdigest(), split.astype(str)),
        image_set=labelled.set_hash,
        grouped=labelled.catalog.grouped,
        unreadable=len(labelled.catalog.unreadable),
        unpredicted=int((~is_predicted).sum()),
        left_out=labelled.left_out,
        prevalence=options.prevalence,
        copies=copies,
        splits=labelled.splits,
        stress={},
    )


def _read_stress_records(output: Path, bundle: Path, identity: str) -> dict[str, Mapping[str, Any]]:
    """Return what `pylorus stress` found with this bundle, on images of the validation and on those of its run."""
    places = {
        f"{STRESS_FOLDER}/ beside this page": output / STRESS_FOLDER,
        f"{STRESS_FOLDER}/ beside the bundle": bundle.resolve().parent / STRESS_FOLDER,
    }
    records = {place: read_stress_record(folder, identity) for place, folder in places.items()}
    return {place: record for place, record in records.items() if record is not None}


def _describe_model(description: Description, deciding: str, folder: Path) -> StoredModel:
    """Return what the report needs of the bundle."""
    calibration = description.calibration
    return StoredModel(
        folder=folder,
        architecture=description.architecture,
        classes=description.classes,
        short_names=description.short_names,
        stage=description.shipped.name,
        deciding=deciding,
        temperature=Temperature(
            calibration.temperature, calibration.identified, calibration.images, float("nan"), float("nan")
        ),
        threshold=description.decision.get_threshold(deciding),
        development=_collect_development_figures(description, deciding),
        counts=dict(zip(description.short_names, description.training.images.get("test", ()), strict=False)),
        images=description.test.images,
        groups=description.test.groups if description.training.grouped else 0,
        is_optimistic=description.training.validated_on == "test",
        limits=tuple(_format_limits(description)),
    )


def _format_limits(description: Description) -> Iterator[str]:
    """Say what the development's figures do not cover."""
    record = description.recalibration
    if record is not None:
        yield (
            f"The model was recalibrated on {record.date} on {format_count(sum(record.images), 'image')} of "
            f"{format_count(record.groups, 'patient')}: figures on these images are optimistic, and the development's "
            "figures are those before the recalibration."
        )
    if limit := format_comparison_limit(description):
        yield limit


def _collect_development_figures(description: Description, deciding: str) -> dict[str, Any]:
    """Return the figures of the development test set that the bundle holds, under the names of the evaluation."""
    test, abstention = description.test, description.abstention
    return {
        "accuracy": test.accuracy,
        "balanced_accuracy": test.balanced_accuracy,
        "macro_auroc": test.macro_auroc,
        "sensitivity": test.sensitivity,
        "specificity": test.specificity,
        "precision": test.precision,
        "auroc": test.auroc,
        "decision": description.decision.test.get(deciding),
        "answered": abstention.answered_test,
        "unlike": abstention.unlike_test,
        "accuracy_answered": abstention.accuracy_answered,
    }
