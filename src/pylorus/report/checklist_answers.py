"""What runs can answer of the checklists: one function an item, a sentence or two, nothing where they can't tell."""

from collections.abc import Callable

from pylorus.report.evidence import Evidence
from pylorus.report.marks import marks_of
from pylorus.report.result import Result
from pylorus.report.saved_run import SavedRun
from pylorus.report.table import in_percent

PART_NAMES = {"train": "training", "val": "validation", "test": "test"}


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


def identification(_: Evidence) -> str:
    """What this software does about names."""
    return "Reports and logs name images by ids made of hashes; metadata of files is not read beyond the orientation."


def missing(_: Evidence) -> str:
    """What happens to images that can't be read, or that the model is unsure of."""
    return "An unreadable image stops a run: none is left out in silence. Every test image is answered."


def blinding(_: Evidence) -> str:
    """What the model knows of the truth."""
    return "The model sees pixels only; true classes are joined to its answers afterwards."


def sample_size(evidence: Evidence) -> str:
    """How wide the interval of accuracy is."""
    said = [
        f"{result.label}: accuracy {in_percent(result.images.shares.accuracy).text} % on {result.test.images} images"
        for result in _shipped(evidence)
    ]
    return f"What the size allows: {'; '.join(said)}." if said else ""


def partitions(evidence: Evidence) -> str:
    """Sizes of the parts and how they came to be."""
    return _each(evidence, _partitions)


def disjoint(evidence: Evidence) -> str:
    """Whether parts share patients or images."""
    return _each(evidence, _disjoint)


def models(evidence: Evidence) -> str:
    """Architectures and inputs."""
    return _each(evidence, lambda run: f"{run.model}{_input_size(run)}")


def software(evidence: Evidence) -> str:
    """Versions."""
    return _each(evidence, _software)


def weights(evidence: Evidence) -> str:
    """Where training began."""
    return _each(evidence, _weights)


def training(evidence: Evidence) -> str:
    """Stages, optimiser, augmentation."""
    return _each(evidence, _training)


def selection(evidence: Evidence) -> str:
    """How epoch and model were chosen."""
    epochs = _each(
        evidence, lambda run: ", ".join(f"{s.name}: best epoch by validation {s.monitor}" for s in run.stages)
    )
    return f"{epochs} {' '.join(winner.choice for winner in evidence.winners)} No ensemble.".strip()


def cut_offs(evidence: Evidence) -> str:
    """The threshold."""
    if not any(result.operating for result in evidence.results):
        return ""
    return (
        f"For {evidence.class_name}: fixed on validation images at a sensitivity of at least "
        f"{100 * evidence.options.sensitivity:g} %, applied untouched to the test images. Else: the likeliest class."
    )


def measures(_: Evidence) -> str:
    """What was measured."""
    return (
        "Precision, sensitivity, specificity, NPV, F1, AUROC and average precision of each class; accuracy, balanced "
        "accuracy, macro averages, kappa, MCC; ECE, Brier score and NLL; risk-coverage and net benefit."
    )


def uncertainty(evidence: Evidence) -> str:
    """Intervals and tests."""
    return (
        f"95 % intervals: Wilson, DeLong, bootstrap of whole groups ({evidence.options.resamples:,} resamples). Pairs: "
        "exact McNemar, DeLong, paired bootstrap, with Holm's correction."
    )


def external(evidence: Evidence) -> str:
    """Where the test images come from."""
    return (
        "None in this report: the test images come from the same set as the training images."
        if _shipped(evidence)
        else ""
    )


def cross_table(evidence: Evidence) -> str:
    """Where the confusion matrices stand."""
    return "See the confusion matrices." if evidence.results else ""


def accuracy(evidence: Evidence) -> str:
    """Where the estimates stand."""
    return "See the tables of all indices, with 95 % intervals." if evidence.results else ""


def failures(evidence: Evidence) -> str:
    """Where the mistakes stand."""
    return "See the worst mistakes." if evidence.results else ""


def limitations(evidence: Evidence) -> str:
    """Marks, looks and what is not shown."""
    marks = dict.fromkeys(mark.meaning for run in evidence.runs for mark in marks_of(run))
    looks = [looks.sentence for looks in evidence.looks]
    return " ".join([*marks, *(winner.verdict for winner in evidence.winners), *looks]).strip()


def availability(_: Evidence) -> str:
    """What a run's folder holds."""
    return (
        "A run's folder holds the configuration, the split with the hash of every image, versions, curves and "
        "predictions, from which this report is rebuilt."
    )


def _each(evidence: Evidence, told: Callable[[SavedRun], str]) -> str:
    """What runs tell, said once where all tell the same."""
    said = {run: told(run).strip() for run in evidence.runs}
    different = list(dict.fromkeys(text for text in said.values() if text))
    if len(different) <= 1:
        return f"{different[0].removesuffix('.')}." if different else ""
    return " ".join(f"{run.label}: {text.removesuffix('.')}." for run, text in said.items() if text)


def _shipped(evidence: Evidence) -> list[Result]:
    return [result for result in evidence.results if result.is_shipped]


def _images(run: SavedRun) -> str:
    if run.split is None:
        return ""
    kind = "drawn images" if run.setting("data.kind") == "synthetic" else "images"
    groups = f" of {run.split.table['group'].nunique():,} groups" if run.grouped else ""
    return f"{len(run.split.table):,} {kind}{groups}"


def _preprocessing(run: SavedRun) -> str:
    given = run.bundle.get("input")
    if not given:
        return ""
    return (
        f"Decoded to RGB, made square ({given['fit']}), resized to {given['size']} pixels ({given['interpolation']}), "
        f"normalised by mean {given['mean']} and standard deviation {given['std']}"
    )


def _partitions(run: SavedRun) -> str:
    if run.split is None:
        return ""
    sizes = [f"{len(run.split.part(part)):,} {name}" for part, name in PART_NAMES.items()]
    return f"{', '.join(sizes)} images, stratified by class (seed {run.setting('seed', 0)}, split {run.split.cited})"


def _disjoint(run: SavedRun) -> str:
    if run.split is None:
        return ""
    if not run.grouped:
        return "Images; whether a patient lies in two parts is not known"
    return f"Groups (patients): {run.split.shared_groups} groups and {run.split.shared_images} images in two parts"


def _input_size(run: SavedRun) -> str:
    size = run.bundle.get("input", {}).get("size")
    return f" at {size} pixels, a new head of {len(run.class_names)} classes" if size else ""


def _software(run: SavedRun) -> str:
    packages = run.environment.get("packages", {})
    versions = {**run.bundle.get("versions", {}), **packages}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _weights(run: SavedRun) -> str:
    found = run.bundle.get("weights")
    if not found:
        return ""
    if found["from"] == "none":
        return "Random"
    digest = f", SHA-256 {str(found['sha256'])[:12]}" if found.get("sha256") else ""
    return f"Pretrained ({found['from']}{digest})"


def _training(run: SavedRun) -> str:
    stages = [
        f"{stage.name}: learns {run.setting(f'stages.{stage.name}.learn')}, "
        f"{0 if stage.curves is None else len(stage.curves)} of {run.setting(f'stages.{stage.name}.epochs')} epochs"
        for stage in run.stages
    ]
    if not stages:
        return ""
    size = run.environment.get("batch_size", run.setting("trainer.batch_size"))
    return (
        f"{'; '.join(stages)}; {run.setting('optimizer.name')}, learning rate {run.setting('optimizer.lr')}, batches "
        f"of {size}, augmentation {run.setting('augment.name')}, "
        f"seed {run.setting('seed')}"
    )
