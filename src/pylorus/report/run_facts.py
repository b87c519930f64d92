"""Facts about a run, read from its files, from which the sentences of a report are derived.

A fixed sentence that holds for most runs would be false for some, so every sentence is derived from a fact of the run.
"""

from collections.abc import Sequence
from typing import Any

from pylorus.report.saved_run import SavedRun, SavedStage

SOURCES = {
    "folders": "the folders",
    "manifest": "the column `split` of the manifest",
    "shards": "the shards",
    "synthetic": "the folders",
}
"""Source of a given split, by data.kind."""


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


def format_count(number: int, noun: str) -> str:
    """Format a count with its noun in singular or plural.

    Example:
        >>> format_count(1, "group"), format_count(1200, "group")
        ('1 group', '1,200 groups')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
