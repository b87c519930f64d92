"""What runs can answer of the checklists: one function an item, made of facts, nothing where these tell nothing."""

from collections.abc import Callable

from pylorus.report.comparison_tables import describe_comparisons
from pylorus.report.evidence import Evidence
from pylorus.report.maps import saved_maps
from pylorus.report.marks import accepted_leaks, marks_of
from pylorus.report.result import Result
from pylorus.report.run_facts import (
    augmentation,
    count_of,
    epochs_run,
    external_sentence,
    files_left_out,
    is_validated_on_test,
    learning_rate,
    test_images_origin,
    validation_images,
    validation_images_origin,
    weights_source,
)
from pylorus.report.saved_run import SavedRun, SavedStage
from pylorus.report.subgroup_tables import columns_of
from pylorus.report.table import in_percent

PART_NAMES = {"train": "training", "val": "validation", "test": "test"}
WITH_MOMENTUM = ("sgd", "momentum", "nesterov", "rmsprop")
"""Beginnings of the names of optimisers that have a momentum."""


def intended_use(evidence: Evidence) -> str:
    """What the bundle says it is for."""
    return _each(evidence, lambda run: str(run.bundle.get("intended_use", "")))


def images(evidence: Evidence) -> str:
    """How many images there are, of what kind."""
    return _each(evidence, _images)


def preprocessing(evidence: Evidence) -> str:
    """How a frame becomes the network's input."""
    return _each(evidence, _preprocessing)


def classes(evidence: Evidence) -> str:
    """Names and short names."""
    return _each(
        evidence,
        lambda run: ", ".join(
            name if name == short else f"{name} ({short})"
            for name, short in zip(run.class_names, run.short_names, strict=True)
        ),
    )


def identification(evidence: Evidence) -> str:
    """Which names the report shows, and what is read of metadata."""
    options = evidence.options
    shown = (
        "This report names files and groups (--names)"
        if options.names
        else "This report names images by ids made of hashes"
    )
    pictures = " and shows test images (--thumbnails)" if options.thumbnails else ""
    return f"{shown}{pictures}. {_each(evidence, _identification)}".strip()


def missing(evidence: Evidence) -> str:
    """What happened to images that can't be read, or that the model is unsure of."""
    answered = "Every test image is answered: no figure here leaves out those of which a model is unsure."
    return f"{_each(evidence, _missing)} {answered if evidence.results else ''}".strip()


def blinding(evidence: Evidence) -> str:
    """What the model knows of the truth."""
    if not evidence.results:
        return ""
    said = "The model is given pixels only; true classes are joined to its answers afterwards."
    return f"{said} {_each(evidence, _not_blind)}".strip()


def sample_size(evidence: Evidence) -> str:
    """How wide the interval of accuracy is."""
    said = [
        f"{result.label}: accuracy {in_percent(result.images.shares.accuracy).text} % on {result.test.images} images"
        for result in _shipped(evidence)
    ]
    return f"What the size allows: {'; '.join(said)}." if said else ""


def partitions(evidence: Evidence) -> str:
    """Sizes of the parts and how they came to be."""
    return _each(evidence, lambda run: _partitions(run, names=evidence.options.names))


def disjoint(evidence: Evidence) -> str:
    """Whether parts share patients or images."""
    return _each(evidence, _disjoint)


def models(evidence: Evidence) -> str:
    """Architectures and inputs."""
    return _each(evidence, lambda run: f"{run.model}{_model_details(run)}")


def software(evidence: Evidence) -> str:
    """Versions."""
    return _each(evidence, _software)


def weights(evidence: Evidence) -> str:
    """Where training began."""
    return _each(evidence, _weights)


def training(evidence: Evidence) -> str:
    """Stages, optimiser, loss, augmentation, devices."""
    return _each(evidence, _training)


def selection(evidence: Evidence) -> str:
    """How epoch and model were chosen."""
    if not evidence.results:
        return ""
    choices = " ".join(winner.choice for winner in evidence.winners)
    return f"{_each(evidence, _epoch_choice)} {choices} No ensemble.".strip()


def cut_offs(evidence: Evidence) -> str:
    """The threshold."""
    results = [result for result in evidence.results if result.operating]
    if not results:
        return "No threshold: the likeliest class." if evidence.results else ""
    runs = [result.run for result in results]
    applied = "" if all(map(is_validated_on_test, runs)) else ", applied untouched to the test images"
    points = [point for result in results for point in result.operating]
    kept = sum(point.fixed.is_guaranteed for point in points)
    guaranteed = {
        0: "no threshold guarantees: there are too few patients",
        len(points): "the threshold guarantees" if len(points) == 1 else "each threshold guarantees",
    }.get(kept, f"{kept} of {len(points)} thresholds guarantee")
    return (
        f"For {evidence.class_name}: fixed on {validation_images(runs)} for a true sensitivity of at least "
        f"{100 * evidence.aim.sensitivity:g} % with {100 * evidence.aim.confidence:g} % confidence (one-sided "
        f"tolerance bound by patient), which {guaranteed}{applied}. "
        "Else: the likeliest class."
    )


def measures(evidence: Evidence) -> str:
    """What was measured."""
    if not evidence.results:
        return ""
    calibrated = any(result.calibration is not None for result in evidence.results)
    patients = any(result.patients is not None for result in evidence.results)
    return (
        "Precision, sensitivity, specificity, NPV, F1, AUROC and average precision of each class; accuracy, balanced "
        "accuracy, macro averages, kappa, MCC; risk-coverage"
        + ("; ECE, Brier score, NLL and net benefit of calibrated probabilities" if calibrated else "")
        + ("; of images and of patients (groups)." if patients else "; of images.")
    )


def uncertainty(evidence: Evidence) -> str:
    """Intervals and tests."""
    if not evidence.results:
        return ""
    clustered = [result.test.clusters is not None for result in evidence.results]
    kept = "images of a group are kept together" if any(clustered) else "each image stands for itself"
    pairs = ""
    if evidence.comparisons:
        pairs = f" {' '.join(describe_comparisons(evidence.comparisons))}"
    return f"95 % intervals ({kept}), by the methods that the last section names.{pairs}"


def explainability(evidence: Evidence) -> str:
    """Whether heat maps were drawn."""
    mapped = [result for result in evidence.results if saved_maps(result.run, stage=result.stage.name).overlays]
    return f"Heat maps of the mistakes of {', '.join(each.label for each in mapped)} were drawn." if mapped else ""


def external(evidence: Evidence) -> str:
    """Where the test images come from."""
    if not evidence.results:
        return ""
    return _each(evidence, lambda run: external_sentence(run, names=evidence.options.names) if _tested(run) else "")


def characteristics(evidence: Evidence) -> str:
    """Which columns of a manifest are counted."""
    columns = _subgroup_columns(evidence)
    return f"Test images and groups by {', '.join(columns)}: see the tables of subgroups." if columns else ""


def cross_table(evidence: Evidence) -> str:
    """Where the confusion matrices stand."""
    return "See the confusion matrices." if evidence.results else ""


def accuracy(evidence: Evidence) -> str:
    """Where the estimates stand."""
    return "See the tables of all indices, with 95 % intervals." if evidence.results else ""


def failures(evidence: Evidence) -> str:
    """Where the mistakes stand."""
    if not evidence.results:
        return ""
    mistaken = any(not result.test.predictions.correct.all() for result in evidence.results)
    return "See the worst mistakes." if mistaken else "No test image was mistaken for another class."


def fairness(evidence: Evidence) -> str:
    """Subgroups: which there are, and what is shown of them."""
    columns = _subgroup_columns(evidence)
    if not columns:
        return ""
    return f"Subgroups by {', '.join(columns)}: see their tables, and what is and is not shown to differ between them."


def limitations(evidence: Evidence) -> str:
    """Marks, looks and what is not shown."""
    marks = dict.fromkeys(mark.meaning for run in evidence.runs for mark in marks_of(run))
    looks = [looks.sentence for looks in evidence.looks]
    return " ".join([*marks, *(winner.verdict for winner in evidence.winners), *looks]).strip()


def availability(evidence: Evidence) -> str:
    """What the runs' folders hold."""
    return _each(evidence, _availability)


def _each(evidence: Evidence, answer: Callable[[SavedRun], str]) -> str:
    """What runs answer: once where all answer the same, else each different answer with the runs that give it."""
    runs_of: dict[str, list[str]] = {}
    for run in evidence.runs:
        runs_of.setdefault(answer(run).strip(), []).append(run.label)
    answers = {text: runs for text, runs in runs_of.items() if text}
    if len(runs_of) == 1:
        return "".join(map(_as_sentence, answers))
    return " ".join(f"{', '.join(runs)}: {_as_sentence(text)}" for text, runs in answers.items())


def _as_sentence(text: str) -> str:
    return f"{text.removesuffix('.')}."


def _shipped(evidence: Evidence) -> list[Result]:
    return [result for result in evidence.results if result.is_shipped]


def _tested(run: SavedRun) -> bool:
    return bool(run.finished_stages)


def _subgroup_columns(evidence: Evidence) -> list[str]:
    """Columns that make subgroups of a final result."""
    found = [column for result in _shipped(evidence) for column in columns_of(result)]
    return list(dict.fromkeys(column.name for column in found if column.subgroups))


def _images(run: SavedRun) -> str:
    if run.split is None:
        return ""
    kind = "drawn images" if run.setting("data.kind") == "synthetic" else "images"
    groups = f" of {run.split.table['group'].nunique():,} groups" if run.grouped else ""
    return f"{len(run.split.table):,} {kind}{groups}"


def _preprocessing(run: SavedRun) -> str:
    form = run.bundle.get("input")
    if not form:
        return ""
    cropped = form.get("crop", run.setting("data.crop")) == "auto"
    crop = "cropped to the field of view where one is found, what lies outside it blacked out, " if cropped else ""
    return (
        f"Decoded to RGB, {crop}made square ({form['fit']}), resized to {form['size']} pixels "
        f"({form['interpolation']}), normalised by mean {form['mean']} and standard deviation {form['std']}"
    )


def _identification(run: SavedRun) -> str:
    if run.setting("data.kind") == "synthetic":
        return "The images are drawn: they are of nobody"
    patients = (
        "Patients are told apart by salted hashes of the DICOM PatientID (data.patients=dicom)"
        if run.setting("data.patients") == "dicom"
        else "Of image files pixels and orientation are used; of other metadata the audit notes that they are there"
    )
    dashboard = run.setting("logger.name")
    shown = run.setting("logger.images") and dashboard in ("tensorboard", "wandb")
    sent = f". Mistaken images were shown in {dashboard} (logger.images=true)" if shown else ""
    named = ". The run's own folder names files (split.csv)" if run.split is not None else ""
    return f"{patients}{named}{sent}"


def _missing(run: SavedRun) -> str:
    if run.split is None:
        return ""
    if run.setting("data.on_error") != "quarantine":
        return "Every file could be read: one that can't be read stops a run (data.on_error=fail)"
    count = files_left_out(run)
    if not count:
        return "Files that can't be read are left out (data.on_error=quarantine); there was none"
    verb = "was" if count == 1 else "were"
    left_out = f"{count_of(count, 'file')} could not be read and {verb} left out (data.on_error=quarantine)"
    return f"{left_out}; the data audit has the counts by class and part"


def _not_blind(run: SavedRun) -> str:
    if not (is_validated_on_test(run) and _tested(run)):
        return ""
    return (
        "The true classes of the test images chose epoch, temperature and threshold (data.validation=test): not blind"
    )


def _partitions(run: SavedRun, *, names: bool) -> str:
    if run.split is None:
        return ""
    parts = {part: name for part, name in PART_NAMES.items() if not (part == "val" and is_validated_on_test(run))}
    sizes = [f"{len(run.split.part(part)):,} {name}" for part, name in parts.items()]
    listed = f"{', '.join(sizes[:-1])} and {sizes[-1]}"
    validation = (
        "No validation images of their own: every epoch was validated on the test images (data.validation=test)"
        if is_validated_on_test(run)
        else f"Validation images: {validation_images_origin(run)}"
    )
    left_out = files_left_out(run)
    unread = f". Files left out since they can't be read: {left_out:,}" if left_out else ""
    return (
        f"{listed} images (split {run.split.cited}). Test images: {test_images_origin(run, names=names)}. "
        f"{validation}{unread}"
    )


def _disjoint(run: SavedRun) -> str:
    if run.split is None:
        return ""
    in_two = [count_of(run.split.shared_images, "identical image")]
    if run.audit:
        leaks = accepted_leaks(run)
        copies = leaks.get("pixels", 0) + leaks.get("near", 0)
        in_two.append("1 near copy" if copies == 1 else f"{copies:,} near copies")
    if not run.grouped:
        return f"Images; in two parts: {' and '.join(in_two)}. Whether a patient lies in two parts is not known"
    dicom = run.setting("data.patients") == "dicom"
    kind = "Patients (by DICOM PatientID)" if dicom else "Groups (patients)"
    return f"{kind}; in two parts: {', '.join([count_of(run.split.shared_groups, 'group'), *in_two])}"


def _model_details(run: SavedRun) -> str:
    size = run.bundle.get("input", {}).get("size")
    said = f" at {size} pixels, a new head of {len(run.class_names)} classes" if size else ""
    arguments = run.setting("model.args") or {}
    with_them = ", ".join(f"{name} {value}" for name, value in arguments.items())
    return f"{said}, with {with_them}" if with_them else said


def _software(run: SavedRun) -> str:
    packages = run.environment.get("packages", {})
    versions = {**run.bundle.get("versions", {}), **packages}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _weights(run: SavedRun) -> str:
    source = weights_source(run)
    if not source:
        return ""
    if source == "none":
        return "Random"
    sha256 = run.bundle.get("weights", {}).get("sha256") or run.environment.get("weights_sha256")
    digest = f", SHA-256 {str(sha256)[:12]}" if sha256 else ""
    if source == "hub":
        return f"Pretrained weights of timm's hub{digest}, a new head"
    return f"Weights of the file {source}{digest}, a new head"


def _training(run: SavedRun) -> str:
    if not run.stages or run.setting("optimizer.name") is None:
        return ""
    details = [*_optimiser(run), *_loss(run), *_machine(run), f"seed {run.setting('seed')}"]
    return f"{'; '.join(_stage(run, stage) for stage in run.stages)}. {', '.join(details)}"


def _stage(run: SavedRun, stage: SavedStage) -> str:
    def own(key: str) -> object:
        return run.setting(f"stages.{stage.name}.{key}")

    rate = learning_rate(run, stage)
    details = [f"learns {own('learn')}", _epochs(run, stage)]
    details += [f"peak learning rate {rate:g} ({own('schedule')})"] if rate is not None else []
    decay = float(run.setting(f"stages.{stage.name}.layer_decay", 1.0))
    details += [f"{decay:g} times that of the layer behind in each layer"] if decay < 1 else []
    details.append(f"augmentation {augmentation(run, stage)}")
    details += [f"{own('views')} variants of each image"] if own("views") is not None else []
    return f"{stage.name}: {', '.join(details)}"


def _epochs(run: SavedRun, stage: SavedStage) -> str:
    done, planned = epochs_run(stage), int(run.setting(f"stages.{stage.name}.epochs", 0))
    patience = run.setting(f"stages.{stage.name}.patience")
    ended = stage.test is not None and done < planned and patience is not None
    return f"{done} of {planned} epochs" + (f" (ended after {patience} without improvement)" if ended else "")


def _optimiser(run: SavedRun) -> list[str]:
    name = str(run.setting("optimizer.name"))
    size = run.environment.get("batch_size", run.setting("trainer.batch_size"))
    found = [name, f"weight decay {run.setting('optimizer.weight_decay', 0):g}"]
    if name.startswith(WITH_MOMENTUM):
        found.append(f"momentum {run.setting('optimizer.momentum', 0):g}")
    if run.setting("optimizer.clip") is not None:
        found.append(f"gradients clipped to a norm of {run.setting('optimizer.clip'):g}")
    return [*found, f"batches of {size}"]


def _loss(run: SavedRun) -> list[str]:
    smoothing = float(run.setting("loss.label_smoothing", 0.0))
    found = ["cross entropy" + (" weighted by class" if run.setting("loss.class_weights") == "balanced" else "")]
    return [*found, f"label smoothing {smoothing:g}"] if smoothing else found


def _machine(run: SavedRun) -> list[str]:
    devices = int(run.setting("trainer.devices", 1)) * int(run.setting("trainer.nodes", 1))
    precision = run.environment.get("precision", run.setting("trainer.precision", "auto"))
    found = [f"precision {precision}"]
    if devices > 1:
        found.append(f"{devices} devices ({run.setting('trainer.strategy', 'ddp')})")
    resumed = int(run.status.get("resumed", 0))
    return [*found, f"resumed {resumed} times" if resumed > 1 else "resumed once"] if resumed else found


def _epoch_choice(run: SavedRun) -> str:
    where = "the test images (data.validation=test)" if is_validated_on_test(run) else "validation images"
    stages = [
        f"{stage.name}: its only epoch"
        if epochs_run(stage) == 1
        else f"{stage.name}: best of {epochs_run(stage)} epochs by {stage.monitor} on {where}"
        for stage in run.finished_stages
    ]
    return ", ".join(stages)


def _availability(run: SavedRun) -> str:
    held = {
        "the configuration": bool(run.config),
        "the split with the hash of every image": run.split is not None,
        "versions": bool(run.environment),
        "curves": any(stage.curves is not None for stage in run.stages),
        "predictions": _tested(run),
        "the trained model": bool(run.bundle),
    }
    listed = ", ".join(what for what, is_there in held.items() if is_there)
    return f"The run's folder holds {listed}; this report is rebuilt from it" if listed else ""
