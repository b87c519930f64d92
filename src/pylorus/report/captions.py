"""Sentences about runs for captions and text: choices, basis of a table or figure, caveats, uses of the test set.

A fixed sentence that holds for most runs would be false for some, so every sentence is derived from a fact of the run.

Every evaluation of a test set makes the best of many results a little more optimistic. Each stage that predicted the
test images counts as one, and each epoch if they were used for validation. Test sets are identified by the content of
their images, so that splits that differ only in the validation images count together. The count includes the runs of
the report and the other runs in the `outputs` and `multirun` folders in which these lie; it is a lower bound, because
runs that were deleted or lie elsewhere cannot be counted.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pylorus.config.keys import describe_averaging
from pylorus.core.errors import PylorusError, resolve_short_name
from pylorus.core.privacy import collect_config_values, redact_value
from pylorus.report.results import IMAGES, ONLY_STAGE, PATIENTS, Result, group_by_test_set
from pylorus.runs.folder import STATUS
from pylorus.runs.reading import SavedRun, SavedStage, compute_image_set_hash

SOURCES = {
    "folders": "the folders",
    "manifest": "the column `split` of the manifest",
    "shards": "the shards",
    "synthetic": "the folders",
}
"""Source of a given split, by data.kind."""

RUN_ROOTS = ("outputs", "multirun")
"""Folders of runs and sweeps: <root>/<day>/<run> and <root>/<day>/<sweep>/<job>."""

MAX_CITED_SPLITS = 6
"""If there are more splits than this, they are counted instead of cited."""


def is_validated_on_test(run: SavedRun) -> bool:
    """Return whether epochs, temperature and thresholds were chosen on the test images (data.validation=test)."""
    return bool(run.get_setting("data.validation") == "test")


def format_validation_images(runs: Sequence[SavedRun]) -> str:
    """Name the images that the runs were validated on: validation or test images, with labels if runs differ."""
    on_test = list(dict.fromkeys(run.label for run in runs if is_validated_on_test(run)))
    if not on_test:
        return "the validation images"
    if len(on_test) == len({run.label for run in runs}):
        return "the test images (data.validation=test)"
    return f"the validation images (for {', '.join(on_test)}: the test images, data.validation=test)"


def format_split_seed(run: SavedRun) -> str:
    """Return the key and value that seed the random split: data.split_seed or, in older runs, seed."""
    seed = run.get_setting("data.split_seed")
    return f"seed {run.get_setting('seed', 0)}" if seed is None else f"data.split_seed {seed}"


def format_test_images_origin(run: SavedRun, *, names: bool = False) -> str:
    """Describe how the test images were selected, as a phrase that follows "test images".

    Args:
        run: The run.
        names: Whether to show values of a manifest column, which may name patients.
    """
    column = run.get_setting("data.test_column")
    if run.get_setting("data.split_file") is not None:
        return "those of another run's split (data.split_file)"
    if column is not None:
        return f"those {_format_test_values(run, names=names)} (data.test_column)"
    if run.get_setting("data.fold_column") is not None and run.get_setting("data.fold") is not None:
        value = f" ({run.get_setting('data.fold')})" if names else ""
        column = run.get_setting("data.fold_column")
        return f"those with one value{value} of {column}, excluded from training (data.fold_column)"
    if run.get_setting("data.fold") is not None:
        fold, folds = run.get_setting("data.fold"), run.get_setting("data.folds")
        return f"fold {fold} of folds 0 to {int(folds) - 1}, {_format_random_selection(run)}"
    if "test" in (run.given_parts or ()):
        return f"given by {SOURCES.get(str(run.get_setting('data.kind')), 'the images')}"
    return _format_random_selection(run)


def format_validation_images_origin(run: SavedRun) -> str:
    """Describe how the validation images were selected, as a phrase that follows "validation images"."""
    if run.get_setting("data.split_file") is not None:
        return "those of another run's split (data.split_file)"
    if "val" in (run.given_parts or ()) and run.get_setting("data.test_column") is None:
        return f"given by {SOURCES.get(str(run.get_setting('data.kind')), 'the images')}"
    return f"{_format_random_selection(run)}, from the images that are not test images"


def format_external_test(run: SavedRun, *, names: bool = False) -> str:
    """State what is known about whether the test images are external, that is from another site or period."""
    column = run.get_setting("data.test_column")
    if column is None and run.get_setting("data.fold") is not None:
        column = run.get_setting("data.fold_column")
    origin = format_test_images_origin(run, names=names)
    if run.get_setting("data.split_file") is not None:
        return f"The test images are {origin}; how that split was made is not documented here"
    if column is not None:
        return (
            f"The test images are {origin}; no image with such a value was used for training. Whether this "
            "corresponds to another hospital or another period is for the author to state"
        )
    if "test" in (run.given_parts or ()) and run.get_setting("data.fold") is None:
        return f"The test images are {origin}. Whether they come from another hospital is for the author to state"
    return f"No external test: the test images come from the same data set as the training images ({origin})"


def format_averaging(run: SavedRun, stage: SavedStage) -> str:
    """Describe the weights of a stage if they are an average; else ""."""
    training = stage.training
    if training is None:
        return ""
    settings = run.get_setting("averaging", {})
    return describe_averaging(settings, weights=training.averaged_weights, norms=training.estimated_norms)


def format_depth(run: SavedRun, stage: SavedStage) -> str:
    """Return what a stage trained: its setting `learn`, and for a number or share of blocks the first one trained."""
    learn = str(run.get_setting(f"stages.{stage.name}.learn", "–"))
    if not learn.startswith("last:"):
        return learn
    trained = [str(block["name"]) for block in run.network or [] if block.get("learning", {}).get(stage.name)]
    return f"{learn}, from {trained[0]} on" if trained else learn


def get_peak_learning_rate(run: SavedRun, stage: SavedStage) -> float | None:
    """Return the peak learning rate of a stage (its lr, or optimizer.lr times its lr_factor); None if not recorded."""
    stage_rate = run.get_setting(f"stages.{stage.name}.lr")
    if stage_rate is not None:
        return float(stage_rate)
    rate = run.get_setting("optimizer.lr")
    return None if rate is None else float(rate) * float(run.get_setting(f"stages.{stage.name}.lr_factor", 1.0))


def get_augmentation_name(run: SavedRun, stage: SavedStage) -> str:
    """Return the name of the augmentation of a stage, by default that of the run."""
    return str(run.get_setting(f"stages.{stage.name}.augment") or run.get_setting("augment.name", "none"))


def count_epochs_run(stage: SavedStage) -> int:
    """Return the number of epochs that a stage ran."""
    return 0 if stage.curves is None else len(stage.curves)


def count_excluded_files(run: SavedRun) -> int:
    """Return the number of unreadable files that were excluded."""
    return sum(int(row["files"]) for row in run.audit.get("left_out", []))


def get_weights_source(run: SavedRun) -> str:
    """Return the source of the initial weights: `none`, `hub`, or the name of a file."""
    source: Any = run.bundle.get("weights", {}).get("from") or run.get_setting("model.weights", "")
    return str(source).replace("\\", "/").rpartition("/")[2]


def _format_random_selection(run: SavedRun) -> str:
    unit = "patient (group)" if run.has_groups else "image"
    return f"selected at random by {unit}, stratified by class ({format_split_seed(run)})"


def _format_test_values(run: SavedRun, *, names: bool) -> str:
    column, start = run.get_setting("data.test_column"), run.get_setting("data.test_from")
    values = run.get_setting("data.test_values") or []
    if values:
        shown = f" ({', '.join(map(str, values))})" if names else ""
        return (
            f"with {len(values)} values of {column}{shown}" if len(values) > 1 else f"with one value of {column}{shown}"
        )
    return f"whose {column} is {start} or later" if names else f"whose {column} reaches a given value"


KEYS_WITHOUT_LABEL = (
    "data.root",
    "report",
    "logger.",
    "trainer.progress",
    "trainer.accelerator",
    "data.workers",
    "stages.",
    "run",
)
"""Keys that never appear in a label: folders, loggers and speed. Stages and `run` are shown by the names of stages."""

MAX_SETTINGS = 3
"""Maximum number of settings in a label."""


@dataclass(frozen=True)
class EvaluationCount:
    """Lower bound of how often one test set was evaluated.

    Attributes:
        splits: Short hashes of the splits that have this test set.
        stages: Number of stages in the report that predicted it.
        epochs: Number of epochs in the report that were validated on it.
        other_stages: Number of stages of other runs in the same folders that predicted it.
        other_runs: Number of these other runs.
    """

    splits: tuple[str, ...]
    stages: int
    epochs: int
    other_stages: int
    other_runs: int

    @property
    def sentence(self) -> str:
        """The count as a sentence."""
        return f"The test set of split {', '.join(self.splits)} was evaluated {self._count_text}"

    @property
    def _count_text(self) -> str:
        total = self.stages + self.epochs + self.other_stages
        parts = [f"{_format_times(self.stages)} by the stages of the runs reported here"]
        if self.epochs:
            parts.append(f"{_format_times(self.epochs)} by epochs that were validated on it")
        if self.other_stages:
            runs = "1 other run" if self.other_runs == 1 else f"{self.other_runs} other runs"
            parts.append(f"{_format_times(self.other_stages)} by {runs} in the same folders")
        count = f"at least {_format_times(total)}"
        return f"{count}: {', '.join(parts)}. Runs that were deleted or are stored elsewhere are not counted."


def format_evaluation_counts(looks: Sequence[EvaluationCount]) -> tuple[str, ...]:
    """State how often the test sets were evaluated, in one sentence for all sets evaluated equally often."""
    by_count: dict[tuple[int, ...], list[EvaluationCount]] = {}
    for each in looks:
        by_count.setdefault((each.stages, each.epochs, each.other_stages, each.other_runs), []).append(each)
    return tuple(
        group[0].sentence if len(group) == 1 else f"Each of {len(group)} test sets was evaluated {group[0]._count_text}"
        for group in by_count.values()
    )


def count_test_evaluations(runs: Sequence[SavedRun]) -> tuple[EvaluationCount, ...]:
    """Count the evaluations of each test set that a run of the report predicted, in the order of the runs."""
    tested = [run for run in runs if run.split is not None and run.complete_stages]
    others = _find_other_runs(runs)
    counts = []
    for test_images in dict.fromkeys(run.split.test_set_hash for run in tested if run.split is not None):
        same = [run for run in tested if run.split is not None and run.split.test_set_hash == test_images]
        elsewhere = [
            len(_list_test_predictions(folder)) for folder in others if _read_test_set_hash(folder) == test_images
        ]
        counts.append(
            EvaluationCount(
                splits=tuple(dict.fromkeys(run.split.short_hash for run in same if run.split is not None)),
                stages=sum(len(run.complete_stages) for run in same),
                epochs=sum(
                    _count_validated_epochs(run) for run in same if run.get_setting("data.validation") == "test"
                ),
                other_stages=sum(elsewhere),
                other_runs=len(elsewhere),
            )
        )
    return tuple(counts)


def _count_validated_epochs(run: SavedRun) -> int:
    return sum(len(stage.curves) for stage in run.stages if stage.curves is not None)


def _find_other_runs(runs: Sequence[SavedRun]) -> list[Path]:
    """Find the folders of other runs with test predictions under the same roots as those of the report."""
    own = {run.folder.resolve() for run in runs}
    roots = {
        parent.parent / name
        for folder in own
        for parent in folder.parents
        if parent.name in RUN_ROOTS
        for name in RUN_ROOTS
    }
    folders = {file.parent for root in roots for pattern in ("*/*/", "*/*/*/") for file in root.glob(pattern + STATUS)}
    return sorted(folder for folder in folders - own if _list_test_predictions(folder))


def _list_test_predictions(folder: Path) -> list[Path]:
    return list(folder.glob("*/predictions-test.parquet"))


def _read_test_set_hash(folder: Path) -> str | None:
    """Return the hash of a run's test set; None if its split is unreadable, which is no problem of this report."""
    try:
        with (folder / "split.csv").open(encoding="utf-8", newline="") as file:
            rows: Iterable[dict[str, str]] = csv.DictReader(file)
            return compute_image_set_hash({row["sha256"] for row in rows if row["split"] == "test"})
    except (OSError, KeyError, ValueError):
        return None


def _format_times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


@dataclass(frozen=True)
class Caveat:
    """A caveat: something that limits what the results of a run can show.

    Attributes:
        word: Its text in a caption; the warning is in capitals.
        meaning: Its explanation on the report page.
    """

    word: str
    meaning: str


OPTIMISTIC = Caveat(
    "OPTIMISTIC: validated on the test images",
    "Every epoch was validated on the test images (data.validation=test), as in the published study: the best epoch, "
    "the temperature and the threshold were chosen on the same images on which they are tested. All figures are "
    "optimistic.",
)
SYNTHETIC = Caveat(
    "SYNTHETIC IMAGES: no clinical meaning",
    "The images were generated by a program (data=synthetic). They show that the software works and say nothing about "
    "patients: synthetic images have no clinical meaning.",
)
LEAKING = Caveat(
    "LEAKING: patients or images shared between splits",
    "Groups (patients), identical images or near duplicates occur in more than one split (train, val, test): the model "
    "may have seen what it is tested on. All figures are optimistic.",
)


def count_accepted_leaks(run: SavedRun) -> dict[str, int]:
    """Return how many leaks between splits the user accepted, by kind; empty if there are none."""
    leaks = run.audit.get("accepted_leaks", {})
    return {str(kind): int(count) for kind, count in leaks.items() if count}


def collect_caveats(run: SavedRun) -> tuple[Caveat, ...]:
    """Return the caveats of one run."""
    caveats = []
    if run.get_setting("data.validation") == "test":
        caveats.append(OPTIMISTIC)
    if run.get_setting("data.kind") == "synthetic":
        caveats.append(SYNTHETIC)
    is_shared = run.split is not None and (run.split.groups_in_several_splits or run.split.images_in_several_splits)
    if is_shared or count_accepted_leaks(run):
        caveats.append(LEAKING)
    return tuple(caveats)


def format_caveats(runs: Sequence[SavedRun]) -> str:
    """Format the caveats of several runs for a caption; a caveat that does not hold for all of them names its runs.

    Returns:
        Sentences, each with its full stop; empty if there are no caveats.
    """
    unique = list(dict.fromkeys(runs))
    marks = dict.fromkeys(mark for run in unique for mark in collect_caveats(run))
    sentences = []
    for mark in marks:
        marked = [run.label for run in unique if mark in collect_caveats(run)]
        suffix = "" if len(marked) == len(unique) else f" ({', '.join(marked)})"
        sentences.append(f"{mark.word}{suffix}.")
    return " ".join(sentences)


def format_test_basis(results: Sequence[Result], *, level: str = IMAGES) -> str:
    """Describe the test images and splits behind results.

    Args:
        results: At least one.
        level: `image-level` or `patient-level`.
    """
    test_sets = group_by_test_set(results)
    if len(test_sets) > 1 and all(result.run.get_setting("data.fold") is not None for result in results):
        text = (
            f"{level.capitalize()}; {_format_fold_images(results)}, each with different test images, so rows and "
            "lines of different folds must not be compared."
        )
        return _append_caveats(f"{text} {_format_split_citation(results)}", [each.run for each in results])
    descriptions = [_format_test_images(each.results, level) for each in test_sets]
    if len(test_sets) > 1:
        by_set = [f"{', '.join(each.runs)}: {text}" for each, text in zip(test_sets, descriptions, strict=True)]
        descriptions = [
            f"{len(test_sets)} different test sets, not to be compared with each other. {'; '.join(by_set)}"
        ]
    return _append_caveats(f"{level.capitalize()}; {descriptions[0]}.", [result.run for result in results])


def format_training_basis(runs: Sequence[SavedRun]) -> str:
    """Describe the data behind curves over epochs: the training and validation images of each run."""
    runs = list(dict.fromkeys(runs))
    descriptions = dict.fromkeys(_format_training_images(run) for run in runs)
    if len(descriptions) > MAX_CITED_SPLITS:
        return _append_caveats(f"Image-level; {len(runs)} runs of {len(descriptions)} splits, listed below.", runs)
    if len(descriptions) == 1:
        return _append_caveats(f"Image-level; {next(iter(descriptions))}.", runs)
    return _append_caveats(
        f"Image-level; {'; '.join(f'{run.label}: {_format_training_images(run)}' for run in runs)}.", runs
    )


def format_pooled_basis(results: Sequence[Result], *, level: str = IMAGES) -> str:
    """Describe the data behind the pooled results of folds.

    Args:
        results: The results of all folds, at least one.
        level: `image-level` or `patient-level`.
    """
    text = f"{level.capitalize()}; {_format_fold_images(results)}, each image in exactly one of them."
    return _append_caveats(f"{text} {_format_split_citation(results)}", [each.run for each in results])


def _format_fold_images(results: Sequence[Result]) -> str:
    """Describe the test images of all folds together."""
    images = {name for result in results for name in result.test.predictions.sample.tolist()}
    groups = {name for result in results for name in np.asarray(result.test.predictions.group).tolist()}
    grouping = f" of {len(groups):,} groups" if len(groups) < len(images) else ", each its own group"
    return f"{len(images):,} test images{grouping}, tested in {len(group_by_test_set(results))} folds"


def _format_split_citation(results: Sequence[Result]) -> str:
    splits = list(dict.fromkeys(result.split for result in results))
    if len(splits) > MAX_CITED_SPLITS:
        return f"Splits {splits[0]} and {len(splits) - 1} others."
    return f"Split{'s' if len(splits) > 1 else ''} {', '.join(splits)}."


def _append_caveats(text: str, runs: Sequence[SavedRun]) -> str:
    return f"{text} {format_caveats(runs)}".strip()


def _format_test_images(results: Sequence[Result], level: str) -> str:
    first = results[0]
    groups = f"{first.test.groups:,} groups" if first.test.clusters is not None else "each its own group"
    images = f"{first.test.images:,} test images"
    text = f"{images}, {groups}" if first.test.clusters is None else f"{images} of {groups}"
    if level == PATIENTS and first.patients is not None:
        text = f"{len(first.patients.predictions.true):,} groups, mean probability of their images; {images}"
        if first.patients.left_out:
            text += f"; {first.patients.left_out} groups with more than one true class excluded"
    splits = list(dict.fromkeys(result.split for result in results))
    if len(splits) == 1:
        return f"{text}; split {splits[0]}"
    return f"{text}; splits {', '.join(splits)}, which test on the same images"


def _format_training_images(run: SavedRun) -> str:
    if run.split is None:
        return "split unknown"
    validation_split = "test" if run.get_setting("data.validation") == "test" else "val"
    training, validation = len(run.split.get_split_rows("train")), len(run.split.get_split_rows(validation_split))
    validation_name = "test images as validation" if validation_split == "test" else "validation"
    return f"{training:,} training and {validation:,} {validation_name} images; split {run.split.short_hash}"


def set_run_labels(runs: Sequence[SavedRun], *, left_out: Sequence[str] = ()) -> tuple[SavedRun, ...]:
    """Return the runs, each with a unique label and file stem.

    Args:
        runs: The runs; their order is kept.
        left_out: Further keys and groups of keys that must not appear in a label.
    """
    names = [run.model.partition(".")[0] for run in runs]
    counts = Counter(names)
    candidates = []
    for name, run in zip(names, runs, strict=True):
        others = [
            other for other, other_name in zip(runs, names, strict=True) if other is not run and other_name == name
        ]
        candidates.append(
            f"{name} ({', '.join(_collect_differing_settings(run, others, left_out))})" if counts[name] > 1 else name
        )
    candidates = [name.removesuffix(" ()") for name in candidates]
    counts = Counter(candidates)
    labels = [
        f"{name} [{run.folder.name}]" if counts[name] > 1 else name for name, run in zip(candidates, runs, strict=True)
    ]
    stems = make_file_stems(labels)
    return tuple(replace(run, label=label, stem=stem) for run, label, stem in zip(runs, labels, stems, strict=True))


def make_file_stems(labels: Sequence[str]) -> list[str]:
    """Convert labels to unique stems for file names: ASCII lower-case letters, digits and hyphens."""
    stems: list[str] = []
    for label in labels:
        stem = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "run"
        duplicates = sum(other == stem or other.startswith(f"{stem}--") for other in stems)
        stems.append(f"{stem}--{duplicates + 1}" if duplicates else stem)
    return stems


def _collect_differing_settings(run: SavedRun, others: Sequence[SavedRun], left_out: Sequence[str]) -> list[str]:
    """List the settings in which a run differs from others of its model, as `key=value` without the key's groups."""
    settings, other_settings = (
        collect_config_values(run.config),
        [collect_config_values(other.config) for other in others],
    )
    stages = [stage.name for stage in run.stages]
    differences = []
    if any([stage.name for stage in other.stages] != stages for other in others) and stages:
        differences.append(" + ".join(stages) if len(stages) > 1 else f"{stages[0]}{ONLY_STAGE}")
    for key, value in settings.items():
        if key in left_out or key.startswith((*KEYS_WITHOUT_LABEL, *(f"{name}." for name in left_out))):
            continue
        if any(other.get(key) != value for other in other_settings):
            value_text = run.fold if key == "data.fold" else redact_value(key, value)
            name = "averaging" if key == "averaging.name" else key.rpartition(".")[2]
            differences.append(f"{name}={value_text}")
    return differences[:MAX_SETTINGS]


def resolve_class_name(runs: Sequence[SavedRun], asked: str | None) -> str | None:
    """Return the short name of the class that was asked for, or the deciding class of the first run's configuration.

    Args:
        runs: The runs.
        asked: Short or full name of the class; None: that of the configuration, else the first class.

    Raises:
        PylorusError: If no run has the class that was asked for.
    """
    short_names = {name: short for run in runs for name, short in zip(run.class_names, run.short_names, strict=True)}
    names = {"classes": list(short_names), "short_names": list(short_names.values())}
    if asked is not None:
        return resolve_short_name(asked, **names, where="--class")
    first = next(iter(short_names.values()), None)
    deciding = runs[0].get_setting("deploy.class_name") if runs else None
    try:
        return first if deciding is None else resolve_short_name(deciding, **names, where="deploy.class_name")
    except PylorusError:  # of a run of other classes
        return first
