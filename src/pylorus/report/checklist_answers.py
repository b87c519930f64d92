"""Checklist answers that the runs document: one function per item, empty text where the runs hold no answer."""

from collections.abc import Callable

from pylorus.config.keys import list_loss_details
from pylorus.core.formatting import format_count, format_percent, join_names
from pylorus.evaluation.confusion import CLASS_METRICS
from pylorus.report.captions import (
    collect_caveats,
    count_accepted_leaks,
    count_epochs_run,
    count_excluded_files,
    format_averaging,
    format_depth,
    format_evaluation_counts,
    format_external_test,
    format_test_images_origin,
    format_validation_images,
    format_validation_images_origin,
    get_augmentation_name,
    get_peak_learning_rate,
    get_weights_source,
    is_validated_on_test,
)
from pylorus.report.evidence import Evidence
from pylorus.report.mistakes import read_saved_maps
from pylorus.report.result_tables import explain_comparisons
from pylorus.report.subgroup_columns import get_subgroup_columns
from pylorus.report.table import convert_to_percent_cell
from pylorus.runs.reading import SavedRun, SavedStage

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
WITH_MOMENTUM = ("sgd", "momentum", "nesterov", "rmsprop")
"""Prefixes of the names of optimisers that use momentum."""


def report_intended_use(evidence: Evidence) -> str:
    """Return the intended use that the bundle states."""
    return _merge_run_answers(evidence, lambda run: str(run.bundle.get("intended_use", "")))


def report_images(evidence: Evidence) -> str:
    """Report the number and kind of images."""
    return _merge_run_answers(evidence, _format_image_count)


def report_preprocessing(evidence: Evidence) -> str:
    """Report how a frame is converted to the input of the network."""
    return _merge_run_answers(evidence, _format_preprocessing)


def report_classes(evidence: Evidence) -> str:
    """Report the classes by name and short name."""
    return _merge_run_answers(
        evidence,
        lambda run: ", ".join(
            name if name == short else f"{name} ({short})"
            for name, short in zip(run.class_names, run.short_names, strict=True)
        ),
    )


def report_deidentification(evidence: Evidence) -> str:
    """Report which names appear in this report and which metadata of the images are read."""
    options = evidence.options
    naming = (
        "This report names files and groups (--names)"
        if options.names
        else "This report identifies images by hash-based ids only"
    )
    pictures = " and shows test images (--thumbnails)" if options.thumbnails else ""
    return f"{naming}{pictures}. {_merge_run_answers(evidence, _format_deidentification)}".strip()


def report_missing_data(evidence: Evidence) -> str:
    """Report how unreadable images and uncertain predictions were handled."""
    complete = "Every test image was classified: no result in this report excludes images with uncertain predictions."
    return f"{_merge_run_answers(evidence, _format_missing_data)} {complete if evidence.results else ''}".strip()


def report_blinding(evidence: Evidence) -> str:
    """Report what the model knows of the reference standard."""
    if not evidence.results:
        return ""
    inputs = "The model receives pixels only; the true classes are joined to its predictions afterwards."
    return f"{inputs} {_merge_run_answers(evidence, _format_blinding_caveat)}".strip()


def report_sample_size(evidence: Evidence) -> str:
    """Report the precision of the accuracy that the sample size allows."""
    estimates = [
        f"{result.label}: accuracy {convert_to_percent_cell(result.images.shares.accuracy).text} % on "
        f"{result.test.images} images"
        for result in evidence.results
        if result.is_shipped
    ]
    return f"Precision achieved with this sample size: {'; '.join(estimates)}." if estimates else ""


def report_partitions(evidence: Evidence) -> str:
    """Report the sizes of the splits and how they were made."""
    return _merge_run_answers(evidence, lambda run: _format_partitions(run, names=evidence.options.names))


def report_split_overlaps(evidence: Evidence) -> str:
    """Report whether splits share patients or images."""
    return _merge_run_answers(evidence, _format_split_overlaps)


def report_models(evidence: Evidence) -> str:
    """Report the architectures and input sizes."""
    return _merge_run_answers(evidence, lambda run: f"{run.model}{_format_model_details(run)}")


def report_software(evidence: Evidence) -> str:
    """Report the versions of the software."""
    return _merge_run_answers(evidence, _format_versions)


def report_initial_weights(evidence: Evidence) -> str:
    """Report the initial weights."""
    return _merge_run_answers(evidence, _format_initial_weights)


def report_training(evidence: Evidence) -> str:
    """Report stages, optimiser, loss, augmentation and devices."""
    return _merge_run_answers(evidence, _format_training)


def report_model_selection(evidence: Evidence) -> str:
    """Report how the epoch and the final model were selected."""
    if not evidence.results:
        return ""
    choices = " ".join(winner.choice for winner in evidence.winners)
    return f"{_merge_run_answers(evidence, _format_epoch_choice)} {choices} No ensemble was used.".strip()


def report_thresholds(evidence: Evidence) -> str:
    """Report the decision thresholds and how they were fixed."""
    results = [result for result in evidence.results if result.operating]
    if not results:
        return "No threshold was used: the class with the highest probability is predicted." if evidence.results else ""
    runs = [result.run for result in results]
    applied = "" if all(map(is_validated_on_test, runs)) else ", applied unchanged to the test images"
    points = [point for result in results for point in result.operating]
    met = sum(point.fixed.is_guaranteed for point in points)
    has_patients = all(run.has_groups for run in runs)
    unit, few = ("patient", "patients") if has_patients else ("image, since patients are not known", "images")
    guarantee = {
        0: f"no threshold guarantees this, because there are too few {few} of the class",
        len(points): "the threshold guarantees this" if len(points) == 1 else "each threshold guarantees this",
    }.get(met, f"{met} of {len(points)} thresholds guarantee this")
    return (
        f"For {evidence.class_name}: the threshold was fixed on {format_validation_images(runs)} for a true "
        f"sensitivity of at least {format_percent(evidence.target.sensitivity, digits=None)} % with "
        f"{format_percent(evidence.target.confidence, digits=None)} % "
        f"confidence (one-sided tolerance bound by {unit}){applied}; {guarantee}. "
        "Otherwise, the class with the highest probability is predicted."
    )


def report_measures(evidence: Evidence) -> str:
    """Report the measures of diagnostic accuracy."""
    if not evidence.results:
        return ""
    calibrated = any(result.calibration is not None for result in evidence.results)
    own = {name: None for result in evidence.results for name in result.stage.own_metrics}
    indices = [*(metric.label for metric in CLASS_METRICS.values()), *own]
    patients = any(result.patients is not None for result in evidence.results)
    return (
        f"{indices[0].capitalize()}, {', '.join(indices[1:])}, AUROC and average precision of each class; accuracy, "
        "balanced accuracy, macro averages, kappa and MCC; risk-coverage curves"
        + ("; ECE, Brier score, NLL and net benefit of calibrated probabilities" if calibrated else "")
        + ("; per image and per patient (group)." if patients else "; per image.")
    )


def report_uncertainty(evidence: Evidence) -> str:
    """Report the confidence intervals and tests."""
    if not evidence.results:
        return ""
    clustered = [result.test.clusters is not None for result in evidence.results]
    unit = "allowing for the clustering of images within groups" if any(clustered) else "treating images as independent"
    pairs = ""
    if evidence.comparisons:
        pairs = f" {' '.join(explain_comparisons(evidence.comparisons))}"
    return f"95 % confidence intervals ({unit}), by the methods described in the last section.{pairs}"


def report_explainability(evidence: Evidence) -> str:
    """Report for which results heat maps were computed."""
    mapped = [result for result in evidence.results if read_saved_maps(result.run, stage=result.stage.name).overlays]
    labels = ", ".join(result.label for result in mapped)
    return f"Heat maps were computed for images misclassified by {labels}." if mapped else ""


def report_external_test(evidence: Evidence) -> str:
    """Report where the test images come from."""
    if not evidence.results:
        return ""
    return _merge_run_answers(
        evidence,
        lambda run: format_external_test(run, names=evidence.options.names) if _has_test_predictions(run) else "",
    )


def report_test_images(evidence: Evidence) -> str:
    """Report how many images the models were tested on, and how these were selected."""
    return _merge_run_answers(evidence, lambda run: _format_test_images(run, names=evidence.options.names))


def report_class_balance(evidence: Evidence) -> str:
    """Report how many training images there are of each class, and whether the loss weights the classes."""
    return _merge_run_answers(evidence, _format_class_balance)


def report_characteristics(evidence: Evidence) -> str:
    """Report the columns of the manifest by which test images and groups are counted."""
    columns = _list_subgroup_columns(evidence)
    return f"Test images and groups by {', '.join(columns)}: see the subgroup tables." if columns else ""


def report_confusion_matrices(evidence: Evidence) -> str:
    """Refer to the confusion matrices."""
    return "See the tables of confusion matrices." if evidence.results else ""


def report_accuracy(evidence: Evidence) -> str:
    """Refer to the estimates."""
    return "See the tables of all indices, with 95 % confidence intervals." if evidence.results else ""


def report_failures(evidence: Evidence) -> str:
    """Refer to the misclassified images."""
    if not evidence.results:
        return ""
    has_mistakes = any(not result.test.predictions.correct.all() for result in evidence.results)
    return "See the worst mistakes in the report." if has_mistakes else "No test image was misclassified."


def report_fairness(evidence: Evidence) -> str:
    """Report the subgroups that were compared."""
    columns = _list_subgroup_columns(evidence)
    if not columns:
        return ""
    return f"Subgroups by {', '.join(columns)}: see their tables, which state the significant differences."


def report_limitations(evidence: Evidence) -> str:
    """Report caveats, inconclusive comparisons and how often the test sets were used."""
    marks = dict.fromkeys(mark.meaning for run in evidence.runs for mark in collect_caveats(run))
    ungrouped = [run.label for run in evidence.runs if run.split is not None and not run.has_groups]
    patients = (
        "The patients of the images were not known: images of one patient may be in several parts, and intervals that "
        "count each image as a patient of its own may be too narrow."
        if ungrouped
        else ""
    )
    verdicts = [winner.verdict for winner in evidence.winners]
    return " ".join(filter(None, [*marks, patients, *verdicts, *format_evaluation_counts(evidence.evaluation_counts)]))


def report_availability(evidence: Evidence) -> str:
    """Report what the folders of the runs contain."""
    return _merge_run_answers(evidence, _format_availability)


def _merge_run_answers(evidence: Evidence, answer: Callable[[SavedRun], str]) -> str:
    """Join the answers of all runs: once if they agree, otherwise each answer with the labels of its runs."""
    labels_by_text: dict[str, list[str]] = {}
    for run in evidence.runs:
        labels_by_text.setdefault(answer(run).strip(), []).append(run.label)
    answers = {text: labels for text, labels in labels_by_text.items() if text}
    if len(labels_by_text) == 1:
        return "".join(map(_format_sentence, answers))
    return " ".join(
        f"{join_names(_merge_labels(evidence, labels))}: {_format_sentence(text)}" for text, labels in answers.items()
    )


def _merge_labels(evidence: Evidence, labels: list[str]) -> list[str]:
    """Replace the labels of all runs of a configuration by that of the configuration."""
    by_configuration = {name: [run.label for run in runs] for name, runs in evidence.replicates.items()}
    merged = [
        next((name for name, own in by_configuration.items() if label in own and set(own) <= set(labels)), label)
        for label in labels
    ]
    return list(dict.fromkeys(merged))


def _format_sentence(text: str) -> str:
    return f"{text.removesuffix('.')}."


def _has_test_predictions(run: SavedRun) -> bool:
    return bool(run.complete_stages)


def _list_subgroup_columns(evidence: Evidence) -> list[str]:
    """Return the names of the columns that divide the test images of a shipped stage into subgroups."""
    columns = [column for result in evidence.results if result.is_shipped for column in get_subgroup_columns(result)]
    return list(dict.fromkeys(column.name for column in columns if column.subgroups))


def _format_image_count(run: SavedRun) -> str:
    if run.split is None:
        return ""
    kind = "synthetic images" if run.get_setting("data.kind") == "synthetic" else "images"
    groups = f" of {run.split.table['group'].nunique():,} groups" if run.has_groups else ""
    return f"{len(run.split.table):,} {kind}{groups}"


def _format_preprocessing(run: SavedRun) -> str:
    spec = run.bundle.get("input")
    if not spec:
        return ""
    is_cropped = spec.get("crop", run.get_setting("data.crop")) == "auto"
    crop = (
        "cropped to the field of view if one is found, with everything outside it set to black, " if is_cropped else ""
    )
    mask = (
        "text and flat plates that the console draws covered if they are found, "
        if spec.get("mask", "none") == "overlays"
        else ""
    )
    return (
        f"Decoded to RGB, {mask}{crop}made square ({spec['fit']}), resized to {spec['size']} pixels "
        f"({spec['interpolation']}), normalised with mean {spec['mean']} and standard deviation {spec['std']}"
    )


def _format_deidentification(run: SavedRun) -> str:
    if run.get_setting("data.kind") == "synthetic":
        return "The images are synthetic and show no patient"
    patients = (
        "Patients are distinguished by salted hashes of the DICOM PatientID (data.patients=dicom)"
        if run.get_setting("data.patients") == "dicom"
        else "Only pixels and orientation of the image files are used; the audit notes the presence of other metadata"
    )
    name = run.get_setting("logger.name", "csv")
    dashboard = run.get_setting("logger._target_") if name == "csv" else name
    is_logged = run.get_setting("logger.images") and dashboard
    logged = f". Misclassified images were logged to {dashboard} (logger.images=true)" if is_logged else ""
    named = ". The folder of the run contains file names (split.csv)" if run.split is not None else ""
    return f"{patients}{named}{logged}"


def _format_missing_data(run: SavedRun) -> str:
    if run.split is None:
        return ""
    if run.get_setting("data.on_error") != "quarantine":
        return "Every file could be read: an unreadable file stops the run (data.on_error=fail)"
    count = count_excluded_files(run)
    if not count:
        return "Unreadable files are excluded (data.on_error=quarantine); there were none"
    verb = "was" if count == 1 else "were"
    excluded = f"{format_count(count, 'file')} could not be read and {verb} excluded (data.on_error=quarantine)"
    return f"{excluded}; the data audit gives the counts by class and split"


def _format_blinding_caveat(run: SavedRun) -> str:
    if not (is_validated_on_test(run) and _has_test_predictions(run)):
        return ""
    return (
        "Not blinded: epoch, temperature and threshold were selected with the true classes of the test images "
        "(data.validation=test)"
    )


def _format_partitions(run: SavedRun, *, names: bool) -> str:
    if run.split is None:
        return ""
    names_by_split = {
        split: name for split, name in SPLIT_NAMES.items() if not (split == "val" and is_validated_on_test(run))
    }
    sizes = [f"{len(run.split.get_split_rows(split)):,} {name}" for split, name in names_by_split.items()]
    listed = join_names(sizes)
    validation = (
        "There were no separate validation images: every epoch was validated on the test images (data.validation=test)"
        if is_validated_on_test(run)
        else f"Validation images: {format_validation_images_origin(run)}"
    )
    excluded = count_excluded_files(run)
    unreadable = f". Files excluded because they could not be read: {excluded:,}" if excluded else ""
    return (
        f"{listed} images (split {run.split.short_hash}). Test images: {format_test_images_origin(run, names=names)}. "
        f"{validation}{unreadable}"
    )


def _format_test_images(run: SavedRun, *, names: bool) -> str:
    if run.split is None or not _has_test_predictions(run):
        return ""
    images = format_count(len(run.split.get_split_rows("test")), "test image")
    return f"{images}: {format_test_images_origin(run, names=names)}"


def _format_class_balance(run: SavedRun) -> str:
    if run.split is None or not run.class_names:
        return ""
    counts = [
        f"{short} {run.split.count_by_split(name)[0]:,}"
        for name, short in zip(run.class_names, run.short_names, strict=True)
    ]
    own_loss = run.get_setting("loss._target_")
    weights = (
        f"whether {own_loss} weights the classes is not documented here"
        if own_loss
        else "the loss weights each class inversely to its frequency (loss.class_weights=balanced)"
        if run.get_setting("loss.class_weights") == "balanced"
        else "the loss corrects for the frequencies of the classes (loss=logit_adjusted)"
        if run.get_setting("loss.name") == "logit_adjusted"
        else "the loss does not weight the classes (loss.class_weights=none)"
    )
    return f"Training images: {', '.join(counts)}; {weights}. Probabilities are not adjusted to another prevalence"


def _format_split_overlaps(run: SavedRun) -> str:
    if run.split is None:
        return ""
    overlaps = [format_count(run.split.images_in_several_splits, "identical image")]
    if run.audit:
        leaks = count_accepted_leaks(run)
        copies = leaks.get("pixels", 0) + leaks.get("near", 0)
        overlaps.append("1 near copy" if copies == 1 else f"{copies:,} near copies")
    if not run.has_groups:
        return (
            f"Images; in more than one split: {' and '.join(overlaps)}. Whether patients occur in more than one split "
            "is unknown"
        )
    dicom = run.get_setting("data.patients") == "dicom"
    kind = "Patients (by DICOM PatientID)" if dicom else "Groups (patients)"
    overlaps = [format_count(run.split.groups_in_several_splits, "group"), *overlaps]
    return f"{kind}; in more than one split: {', '.join(overlaps)}"


def _format_model_details(run: SavedRun) -> str:
    size = run.bundle.get("input", {}).get("size")
    details = f" at {size} pixels, with a new classification head for {len(run.class_names)} classes" if size else ""
    arguments = ", ".join(f"{name} {value}" for name, value in (run.get_setting("model.args") or {}).items())
    return f"{details}, {arguments}" if arguments else details


def _format_versions(run: SavedRun) -> str:
    packages = run.environment.get("packages", {})
    versions = {**run.bundle.get("versions", {}), **packages}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _format_initial_weights(run: SavedRun) -> str:
    source = get_weights_source(run)
    if not source:
        return ""
    if source == "none":
        return "Random initialisation"
    if run.get_setting("model._target_"):
        return f"Network and initial weights of {run.get_setting('model._target_')}; new classification head"
    sha256 = run.bundle.get("weights", {}).get("sha256") or run.environment.get("weights_sha256")
    digest = f", SHA-256 {str(sha256)[:12]}" if sha256 else ""
    if source == "hub":
        return f"Pretrained weights from the timm hub{digest}; new classification head"
    return f"Weights from the file {source}{digest}; new classification head"


def _format_training(run: SavedRun) -> str:
    if not run.stages or run.get_setting("optimizer.name") is None:
        return ""
    details = [
        *_list_optimizer_details(run),
        *list_loss_details(run.get_setting("loss", {})),
        *_list_machine_details(run),
        f"seed {run.get_setting('seed')}",
    ]
    return f"{'; '.join(_format_stage(run, stage) for stage in run.stages)}. {', '.join(details)}"


def _format_stage(run: SavedRun, stage: SavedStage) -> str:
    def get_stage_setting(key: str) -> object:
        return run.get_setting(f"stages.{stage.name}.{key}")

    rate = get_peak_learning_rate(run, stage)
    details = [f"trained layers: {format_depth(run, stage)}", _format_epochs(run, stage)]
    details += [f"peak learning rate {rate:g} ({get_stage_setting('schedule')} schedule)"] if rate is not None else []
    decay = float(run.get_setting(f"stages.{stage.name}.layer_decay", 1.0))
    details += [f"layer-wise learning rate decay {decay:g}"] if decay < 1 else []
    details.append(f"augmentation {get_augmentation_name(run, stage)}")
    details += (
        [f"{get_stage_setting('views')} variants of each image"] if get_stage_setting("views") is not None else []
    )
    averaging = format_averaging(run, stage)
    details += [f"weights used: {averaging}"] if averaging else []
    return f"{stage.name}: {', '.join(details)}"


def _format_epochs(run: SavedRun, stage: SavedStage) -> str:
    done, planned = count_epochs_run(stage), int(run.get_setting(f"stages.{stage.name}.epochs", 0))
    patience = run.get_setting(f"stages.{stage.name}.patience")
    is_early_stop = stage.test is not None and done < planned and patience is not None
    reason = f" (stopped early after {patience} epochs without improvement)" if is_early_stop else ""
    return f"{done} of {planned} epochs{reason}"


def _list_optimizer_details(run: SavedRun) -> list[str]:
    name = str(run.get_setting("optimizer.name"))
    size = run.environment.get("batch_size", run.get_setting("trainer.batch_size"))
    details = [name, f"weight decay {run.get_setting('optimizer.weight_decay', 0):g}"]
    if name.startswith(WITH_MOMENTUM):
        details.append(f"momentum {run.get_setting('optimizer.momentum', 0):g}")
    if run.get_setting("optimizer.clip") is not None:
        details.append(f"gradients clipped to a norm of {run.get_setting('optimizer.clip'):g}")
    accumulate = int(run.get_setting("trainer.accumulate", 1))
    if accumulate == 1 or size == "auto":
        return [*details, f"batch size {size}"]
    batches = f"gradients accumulated over {accumulate} batches of {size}"
    return [*details, f"batch size {accumulate * int(size)} ({batches})"]


def _list_machine_details(run: SavedRun) -> list[str]:
    devices = int(run.get_setting("trainer.devices", 1)) * int(run.get_setting("trainer.nodes", 1))
    precision = run.environment.get("precision", run.get_setting("trainer.precision", "auto"))
    details = [f"precision {precision}"]
    if devices > 1:
        details.append(f"{devices} devices ({run.get_setting('trainer.strategy', 'ddp')})")
    resumed = int(run.status.get("resumed", 0))
    return [*details, f"resumed {resumed} times" if resumed > 1 else "resumed once"] if resumed else details


def _format_epoch_choice(run: SavedRun) -> str:
    images_used = "the test images (data.validation=test)" if is_validated_on_test(run) else "the validation images"
    stages = [
        f"{stage.name}: the only epoch"
        if count_epochs_run(stage) == 1
        else f"{stage.name}: best of {count_epochs_run(stage)} epochs by {stage.monitor} on {images_used}"
        for stage in run.complete_stages
    ]
    return ", ".join(stages)


def _format_availability(run: SavedRun) -> str:
    contents = {
        "the configuration": bool(run.config),
        "the split with a hash of every image": run.split is not None,
        "the software versions": bool(run.environment),
        "the training curves": any(stage.curves is not None for stage in run.stages),
        "the predictions": _has_test_predictions(run),
        "the trained model": bool(run.bundle),
    }
    available = [name for name, is_present in contents.items() if is_present]
    return (
        f"The folder of the run contains {join_names(available)}; the report can be rebuilt from it"
        if available
        else ""
    )
