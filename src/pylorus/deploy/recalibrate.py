"""`pylorus recalibrate`: adapt a bundle's probabilities to another clinic on a few of its labelled images.

The network, its abstention and what it looks for stay as they are: one scale and one bias per class are fitted, and a
new bundle is written that records its parent. The parent stays untouched.
"""

import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.core.errors import PylorusError, format_path
from pylorus.core.formatting import format_count, format_number, format_percent, format_threshold, join_names
from pylorus.core.io import check_new_folder, compute_digest, convert_to_plain, write_json, write_text
from pylorus.data.catalog import Catalog
from pylorus.data.input_format import QUALITY
from pylorus.deploy.bundle_files import build_description
from pylorus.deploy.description import Description, RecalibrationRecord
from pylorus.deploy.external import ValidateOptions, read_labelled_images
from pylorus.deploy.fingerprints import find_development_images, format_comparison
from pylorus.deploy.model import Bundle, load_bundle
from pylorus.deploy.predict import PredictOptions, iter_predicted_rows, resolve_device
from pylorus.deploy.thresholds import build_usage_reference, collect_answers, convert_estimate
from pylorus.deploy.validation import RECALIBRATION, record_look
from pylorus.deploy.verified_files import CARD, DESCRIPTION, SUMS, is_export
from pylorus.evaluation.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE, calibration_scores
from pylorus.evaluation.decisions import ROUNDING
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.recalibration import Recalibration, RecalibrationStudy, study_recalibration

MIN_IMAGES, MIN_PATIENTS, MIN_TOTAL = 10, 5, 50
"""The fewest images, and patients, of each class on which a bundle is recalibrated, and the fewest images in all."""
FEW_IMAGES = 100
"""With fewer images, recalibration made new images worse in many simulations (benchmarks/recalibration.py)."""


@dataclass(frozen=True, kw_only=True)
class RecalibrateOptions:
    """Options of `pylorus recalibrate`.

    Attributes:
        output: Folder of the new bundle: a new or empty one.
        group: Regular expression that finds the patient in a path; None: each image is its own patient, unless a
            manifest has a column group.
        names: The bundle's class for each class of the images that has another name; "" to leave its images out.
        root: Folder that a manifest's paths are relative to; None: that of the manifest.
        batch: Batch size of the network.
        device: auto, cpu, cuda or mps.
        network: See `load_bundle`.
        trust: See `load_bundle`.
    """

    output: Path
    group: str | None = None
    names: Mapping[str, str]
    root: Path | None = None
    batch: int = 32
    device: str = "auto"
    network: Callable[..., Any] | None = None
    trust: tuple[Path, ...] = ()


def recalibrate(folder: Path, source: Path, options: RecalibrateOptions) -> None:
    """Fit scale and biases on labelled images, print what they are worth, and write the new bundle.

    Args:
        folder: The parent bundle.
        source: Folder with class folders, or a manifest.
        options: The options.

    Raises:
        PylorusError: If there are too few images, recalibration does not lower the log loss of images that it has not
            seen, or the bundle, images or options are invalid.
    """
    if is_export(folder):
        raise PylorusError(f"{folder}: is an export. Recalibrate the bundle that it was made from, and export that.")
    check_new_folder(options.output, hint="Choose another --output.", outside=(folder, source))
    bundle = load_bundle(folder, device=resolve_device(options.device), network=options.network, trust=options.trust)
    table = _predict_labelled(bundle, source, options)
    description = bundle.description
    probabilities = table[[f"probability/{name}" for name in description.short_names]].to_numpy(dtype=np.float64)
    true, groups = table["label"].to_numpy(dtype=np.int64), table["group"].to_numpy(dtype=str)
    counts = _check_numbers(true, groups, description)
    unlike = int((table["why"] == "unlike").sum())
    if unlike > description.abstention.promised_false_alarms * len(table):
        print(
            f"note: {format_count(unlike, 'image')} of {len(table):,} are unlike the training images. Recalibration "
            "does not change that: the model abstains on them."
        )
    if len(table) < FEW_IMAGES:
        print(
            f"note: with fewer than {FEW_IMAGES} images, recalibration may make the probabilities of new images worse: "
            "in simulations, in 1 of 7 clinics that see clearly other proportions of classes, and nearly always where "
            "little differs. Label more images, or validate the new bundle on others before use."
        )
    study = study_recalibration(probabilities, true, groups)
    if not study.change.value < 0:
        raise PylorusError(
            "Recalibration would not help: by cross-validation on other patients, the log loss would change from "
            f"{_compute_scores(study.before, true)[0]:.3f} to {_compute_scores(study.after, true)[0]:.3f}. Nothing was "
            "written. Keep the bundle as it is, or label more images."
        )
    recalibrated = _build_description(bundle, table, study, counts)
    _write_bundle(bundle, recalibrated, options.output)
    new = load_bundle(options.output, network=options.network)
    look = record_look(
        options.output, list(table["sha256"]), bundle=str(new.identity), patients=None, purpose=RECALIBRATION
    )
    print("\n".join(_format_result(description, recalibrated, study)))
    if not look["recorded in"]:
        print(
            f"\nnote: the images could not be recorded beside {options.output}, whose folder can't be written to: "
            "pylorus validate will not recognize them."
        )
    print(f"\nnew bundle: {options.output}")


def _predict_labelled(bundle: Bundle, source: Path, options: RecalibrateOptions) -> pd.DataFrame:
    """Predict labelled images, and return the rows of the readable ones with label, group and hash of the file."""
    reading = ValidateOptions(root=options.root, group=options.group, names=options.names)
    labelled = read_labelled_images(source, bundle.description, reading)
    catalog = labelled.catalog
    groups = catalog.table["group" if catalog.grouped else "path"].to_numpy(dtype=str)
    is_new = _select_new_images(bundle, catalog, groups)
    items = [item for item, used in zip(labelled.iter_items(), is_new, strict=True) if used]
    rows = pd.concat(iter_predicted_rows(bundle, items, PredictOptions(batch=options.batch)), ignore_index=True)
    digests = catalog.table["sha256"].to_numpy(dtype=str)
    rows = rows.assign(label=labelled.labels[is_new], group=groups[is_new], sha256=digests[is_new])
    unreadable = rows[rows["error"] != ""]
    if len(unreadable):
        first = unreadable.iloc[0]
        print(f"note: {format_count(len(unreadable), 'file')} left out, the first: {first['path']}: {first['error']}")
    return rows[rows["error"] == ""].reset_index(drop=True)


def _select_new_images(bundle: Bundle, catalog: Catalog, groups: NDArray[np.str_]) -> NDArray[np.bool_]:
    """Return which images the model was not developed on, and say which it was, by the fingerprints of the bundle.

    Raises:
        PylorusError: If it was developed on all of them, or on their patients.
    """
    copies = find_development_images(bundle.fingerprints, catalog.facts, catalog.fact_indices)
    if copies.reason:
        print(
            f"note: {copies.summary} On such images the model is surer than on new ones: make sure that none is "
            "among these."
        )
    matched = [match.index for match in copies.matches]
    is_new = ~np.isin(groups, groups[matched])
    if matched:
        others = int((~is_new).sum()) - len(matched)
        text = (
            f"note: {len(matched):,} of {format_count(copies.compared, 'image')} left out as copies of training or "
            "validation images, on which the model is surer than on new ones"
        )
        text += f"; with them {format_count(others, 'other image')} of the same patients." if others else "."
        record = copies.build_record(list(map(format_path, catalog.table["path"])))
        print("\n".join(format_comparison(record | {"summary": text})))
    if not is_new.any():
        raise PylorusError(
            f"The model was trained or validated on all {format_count(len(groups), 'image')}, or on others of their "
            "patients. Recalibrate on images of new patients."
        )
    return is_new


def _check_numbers(true: NDArray[np.int64], groups: NDArray[np.str_], description: Description) -> tuple[int, ...]:
    """Return the number of images of each class, after checking that they are enough."""
    counts = np.bincount(true, minlength=len(description.classes))
    patients = [len(np.unique(groups[true == label])) for label in range(len(counts))]
    few = [
        f"{name} has {format_count(int(count), 'image')} of {format_count(patient, 'patient')}"
        for name, count, patient in zip(description.short_names, counts, patients, strict=True)
        if count < MIN_IMAGES or patient < MIN_PATIENTS
    ]
    if few:
        raise PylorusError(
            f"Too few images to recalibrate: {join_names(few)}. Expected at least {MIN_IMAGES} readable images of at "
            f"least {MIN_PATIENTS} patients for each class of the bundle."
        )
    if len(true) < MIN_TOTAL:
        raise PylorusError(
            f"Too few images to recalibrate: found {format_count(len(true), 'readable image')} in all, expected at "
            f"least {MIN_TOTAL}. On fewer, recalibration often makes probabilities worse. Label more images."
        )
    return tuple(map(int, counts))


def _build_description(
    bundle: Bundle, table: pd.DataFrame, study: RecalibrationStudy, counts: tuple[int, ...]
) -> Description:
    """Build the description of the new bundle: calibration, thresholds, reference and record are new."""
    old, fitted, names = bundle.description, study.fitted, bundle.description.short_names
    temperature = old.calibration.temperature / fitted.scale
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise PylorusError(
            f"The temperature would be {temperature:g}, expected {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}: these "
            "images do not fit the model. Check their labels."
        )
    bias = fitted.scale * np.asarray(old.calibration.bias or [0.0] * len(names)) + np.asarray(fitted.bias)
    decision = replace(old.decision, thresholds=_carry(old.decision.thresholds, names, fitted))
    sets = old.prediction_sets
    probabilities = fitted.apply(study.before)
    groups = table["group"].to_numpy(dtype=str)
    answers = collect_answers(
        probabilities,
        table["unlikeness"].to_numpy(dtype=np.float64),
        table[list(QUALITY)].to_numpy(dtype=np.float64),
        groups,
        names=names,
        decision=decision,
        abstention=old.abstention,
    )
    true = table["label"].to_numpy(dtype=np.int64)
    (loss_before, brier_before), (loss_after, brier_after) = (
        _compute_scores(values, true) for values in (study.before, study.after)
    )
    return replace(
        old,
        calibration=replace(old.calibration, temperature=float(temperature), bias=tuple(map(float, bias))),
        decision=decision,
        prediction_sets=None if sets is None else replace(sets, lowest=_carry(sets.lowest, names, fitted)),
        reference=build_usage_reference(answers, split="recalibration"),
        recalibration=RecalibrationRecord(
            parent=bundle.identity,
            date=time.strftime("%Y-%m-%d"),
            images=counts,
            groups=len(np.unique(groups)),
            scale=convert_estimate(study.scale),
            bias={name: convert_estimate(value) for name, value in zip(names, study.bias, strict=True)},
            log_loss={"before": loss_before, "after": loss_after},
            brier={"before": brier_before, "after": brier_after},
            observed_over_expected={
                key: {name: counts[label] / float(values[:, label].sum()) for label, name in enumerate(names)}
                for key, values in (("before", study.before), ("after", study.after))
            },
        ),
    )


def _carry(
    thresholds: Mapping[str, float | None], names: Sequence[str], fitted: Recalibration
) -> dict[str, float | None]:
    """Carry thresholds over to the new probabilities so that whatever reached them still does."""
    carried: dict[str, float | None] = {}
    for name, threshold in thresholds.items():
        value = None if threshold is None else fitted.carry_threshold(threshold, names.index(name))
        carried[name] = value if value is None else max(0.0, value * (1 - ROUNDING) - ROUNDING)
    return carried


def _compute_scores(probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> tuple[float, float]:
    """Return mean log loss and Brier score."""
    scores = calibration_scores(probabilities, true)
    return float(scores.nll), float(scores.brier)


def _write_bundle(bundle: Bundle, description: Description, output: Path) -> None:
    """Write the new bundle beside its final place, and move it there once it is complete."""
    content = convert_to_plain(description)
    build_description(content)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        new = Path(temporary) / "model"
        new.mkdir()
        names = [name for name in bundle.sha256 if name not in (DESCRIPTION, CARD)]
        for name in names:
            shutil.copyfile(bundle.folder / name, new / name)
        write_json(new / DESCRIPTION, content)
        card = bundle.contents[CARD].decode("utf-8")
        write_text(new / CARD, _insert_after_title(card, _format_card_section(description)))
        hashes = {name: compute_digest(new / name) for name in bundle.sha256}
        for name in names:
            if hashes[name] != bundle.sha256[name]:
                raise PylorusError(f"{bundle.folder / name}: was changed while it was copied.")
        write_text(new / SUMS, "".join(f"{digest}  {name}\n" for name, digest in hashes.items()))
        if output.is_dir():
            output.rmdir()
        new.rename(output)


def _insert_after_title(card: str, section: str) -> str:
    title, _, rest = card.partition("\n")
    return f"{title}\n\n{section}\n{rest}"


def _format_card_section(description: Description) -> str:
    record = description.recalibration
    assert record is not None
    return (
        f"## Recalibrated on {record.date}\n\n"
        f"Probabilities were adapted to {format_count(sum(record.images), 'image')} of "
        f"{format_count(record.groups, 'patient')} of another clinic: softmax(logits / "
        f"{description.calibration.temperature:.4g} + bias). Log loss {record.log_loss['before']:.3f} before, "
        f"{record.log_loss['after']:.3f} after (cross-validated). Thresholds were carried over so that every image "
        "that reached one still does: guarantees stand, and specificity may be lower. **All figures below, of "
        "thresholds, calibration and test images, are those of the parent before recalibration** (SHA-256 of its "
        f"SHA256SUMS: `{record.parent}`)."
    )


def _format_result(old: Description, new: Description, study: RecalibrationStudy) -> list[str]:
    record = new.recalibration
    assert record is not None

    def format_estimate(estimate: Estimate, *, signed: bool = True) -> str:
        value, low, high = (
            format_number(each, 2, signed=signed) for each in (estimate.value, estimate.low, estimate.high)
        )
        return f"{value} ({low} to {high})"

    width = max(map(len, new.short_names))
    lines = [
        f"{format_count(sum(record.images), 'image')} of {format_count(record.groups, 'patient')}; 95 % intervals by "
        "bootstrap over patients",
        f"scale {format_estimate(study.scale, signed=False)}: the model was "
        f"{'overconfident' if study.fitted.scale < 1 else 'underconfident'} here",
        "",
        "by cross-validation, each patient's images by a fit on others:",
        f"  log loss {record.log_loss['before']:.3f} before, {record.log_loss['after']:.3f} after; change "
        f"{format_estimate(study.change)}",
        f"  Brier score {record.brier['before']:.3f} before, {record.brier['after']:.3f} after",
    ]
    if study.change.high > 0:
        lines.append("  the interval of the change contains 0: it is not shown that recalibration helps")
    ratios = record.observed_over_expected
    for name, count, bias in zip(new.short_names, record.images, study.bias, strict=True):
        lines.append(
            f"  {name:<{width}}  {count:,} images; observed/expected {ratios['before'][name]:.2f} before, "
            f"{ratios['after'][name]:.2f} after; bias {format_estimate(bias)}"
        )
    deciding = new.decision.class_name
    before, after = old.decision.thresholds[deciding], new.decision.thresholds[deciding]
    if before is not None and after is not None:
        column = new.short_names.index(deciding)
        shares = [
            format_percent(float((table[:, column] >= threshold).mean()))
            for table, threshold in ((study.before, before), (study.fitted.apply(study.before), after))
        ]
        text = (
            f"threshold of {deciding}: {format_threshold(before)} before, {format_threshold(after)} after. It was "
            "carried over, not fitted on these images: every image that reached it still does, so its guarantee "
            f"stands; {shares[0]} % of these images were called {deciding} before, {shares[1]} % are now."
        )
        lines += ["", *textwrap.wrap(text, width=110)]
    return lines
