"""What a run did, read from what it saved: from these facts the sentences of a report are made.

A sentence that holds for most runs is false for some; so no sentence about a run stands without the fact that it says.
"""

from collections.abc import Sequence
from typing import Any

from pylorus.report.saved_run import SavedRun, SavedStage

SOURCES = {
    "folders": "the folders",
    "manifest": "the manifest's column split",
    "shards": "the shards",
    "synthetic": "the folders",
}
"""What gives a part of the split, by data.kind."""


def is_validated_on_test(run: SavedRun) -> bool:
    """Whether epochs, temperature and thresholds were chosen on the test images (data.validation=test)."""
    return bool(run.setting("data.validation") == "test")


def validation_images(runs: Sequence[SavedRun]) -> str:
    """What the runs were validated on: the validation images, or the test images, named where runs differ."""
    on_test = list(dict.fromkeys(run.label for run in runs if is_validated_on_test(run)))
    if not on_test:
        return "the validation images"
    if len(on_test) == len({run.label for run in runs}):
        return "the test images (data.validation=test)"
    return f"the validation images (of {', '.join(on_test)}: the test images, data.validation=test)"


def cut_seed(run: SavedRun) -> str:
    """The key and the value that decide how images are cut into parts: data.split_seed, in older runs seed."""
    seed = run.setting("data.split_seed")
    return f"seed {run.setting('seed', 0)}" if seed is None else f"data.split_seed {seed}"


def test_images_origin(run: SavedRun, *, names: bool = False) -> str:
    """How the test images came to be tested on, as a clause after "test images".

    Args:
        run: The run.
        names: Whether values of a manifest's column, which may name patients, are shown.
    """
    column = run.setting("data.test_column")
    if run.setting("data.split_file") is not None:
        return "those of another run's split (data.split_file)"
    if column is not None:
        return f"those {_tested_values(run, names=names)} (data.test_column)"
    if run.setting("data.fold_column") is not None and run.setting("data.fold") is not None:
        value = f" ({run.setting('data.fold')})" if names else ""
        return (
            f"those of one value{value} of {run.setting('data.fold_column')}, left out of training (data.fold_column)"
        )
    if run.setting("data.fold") is not None:
        fold, folds = run.setting("data.fold"), run.setting("data.folds")
        return f"fold {fold} of the folds 0 to {int(folds) - 1}, {_drawn(run)}"
    if "test" in (run.given_parts or ()):
        return f"given by {SOURCES.get(str(run.setting('data.kind')), 'the images')}"
    return _drawn(run)


def validation_images_origin(run: SavedRun) -> str:
    """How the validation images came to be, as a clause after "validation images"."""
    if run.setting("data.split_file") is not None:
        return "those of another run's split (data.split_file)"
    if "val" in (run.given_parts or ()) and run.setting("data.test_column") is None:
        return f"given by {SOURCES.get(str(run.setting('data.kind')), 'the images')}"
    return f"{_drawn(run)}, from the images that are not tested on"


def external_sentence(run: SavedRun, *, names: bool = False) -> str:
    """What is known of whether the test images are external: from elsewhere, or from another time."""
    column = run.setting("data.test_column")
    if column is None and run.setting("data.fold") is not None:
        column = run.setting("data.fold_column")
    origin = test_images_origin(run, names=names)
    if run.setting("data.split_file") is not None:
        return f"The test images are {origin}; how that was cut is not known here"
    if column is not None:
        return (
            f"The test images are {origin}, and no image of such a value was trained on. Whether that makes another "
            "hospital or another time is for the author to say"
        )
    if "test" in (run.given_parts or ()) and run.setting("data.fold") is None:
        return f"The test images are {origin}. Whether they come from another hospital is for the author to say"
    return f"None: the test images come from the same set as the training images ({origin})"


def learning_rate(run: SavedRun, stage: SavedStage) -> float | None:
    """A stage's peak learning rate: its own, or its share of the optimiser's; None where the run has none."""
    own = run.setting(f"stages.{stage.name}.lr")
    if own is not None:
        return float(own)
    rate = run.setting("optimizer.lr")
    return None if rate is None else float(rate) * float(run.setting(f"stages.{stage.name}.lr_factor", 1.0))


def augmentation(run: SavedRun, stage: SavedStage) -> str:
    """A stage's augmentation: its own, or the run's."""
    return str(run.setting(f"stages.{stage.name}.augment") or run.setting("augment.name", "none"))


def epochs_run(stage: SavedStage) -> int:
    """How many epochs a stage ran."""
    return 0 if stage.curves is None else len(stage.curves)


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> count_of(1, "group"), count_of(1200, "group")
        ('1 group', '1,200 groups')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def files_left_out(run: SavedRun) -> int:
    """How many files could not be read and were left out."""
    return sum(int(row["files"]) for row in run.audit.get("left_out", []))


def weights_source(run: SavedRun) -> str:
    """Where training began: none, hub, or a file's name."""
    source: Any = run.bundle.get("weights", {}).get("from") or run.setting("model.weights", "")
    return str(source).replace("\\", "/").rpartition("/")[2]


def _drawn(run: SavedRun) -> str:
    unit = "patient (group)" if run.grouped else "image"
    return f"drawn at random by {unit}, stratified by class ({cut_seed(run)})"


def _tested_values(run: SavedRun, *, names: bool) -> str:
    column, start = run.setting("data.test_column"), run.setting("data.test_from")
    values = run.setting("data.test_values") or []
    if values:
        shown = f" ({', '.join(map(str, values))})" if names else ""
        return f"of {len(values)} values of {column}{shown}" if len(values) > 1 else f"of one value of {column}{shown}"
    return f"whose {column} is {start} or later" if names else f"whose {column} reaches a given value"
