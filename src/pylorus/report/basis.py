"""What a table or a figure rests on, in its caption: the level, the images and groups, the split, the marks."""

from collections.abc import Sequence

import numpy as np

from pylorus.report.level import IMAGES, PATIENTS
from pylorus.report.marks import mark_words
from pylorus.report.result import Result
from pylorus.report.same_test import by_test_set
from pylorus.report.saved_run import SavedRun

MOST_SPLITS = 6
"""Splits beyond this number are counted, not cited."""


def tested_on(results: Sequence[Result], *, level: str = IMAGES) -> str:
    """What results on test images rest on.

    Args:
        results: At least one.
        level: `image-level` or `patient-level`.
    """
    sets = by_test_set(results)
    if len(sets) > 1 and all(result.run.setting("data.fold") is not None for result in results):
        said = (
            f"{level.capitalize()}; {_describe_folds(results)}, each of which tests different images, so rows and "
            "lines of different folds are not to be compared."
        )
        return _joined(f"{said} {_cite_splits(results)}", [each.run for each in results])
    told = [_said(each.results, level) for each in sets]
    if len(sets) > 1:
        parts = [f"{', '.join(each.runs)}: {said}" for each, said in zip(sets, told, strict=True)]
        told = [f"{len(sets)} different test sets, not to be compared. {'; '.join(parts)}"]
    return _joined(f"{level.capitalize()}; {told[0]}.", [result.run for result in results])


def trained_on(runs: Sequence[SavedRun]) -> str:
    """What curves over epochs rest on: the training and validation images of each run."""
    runs = list(dict.fromkeys(runs))
    told = dict.fromkeys(_parts_said(run) for run in runs)
    if len(told) > MOST_SPLITS:
        return _joined(f"Image-level; {len(runs)} runs of {len(told)} splits, listed below.", runs)
    if len(told) == 1:
        return _joined(f"Image-level; {next(iter(told))}.", runs)
    return _joined(f"Image-level; {'; '.join(f'{run.label}: {_parts_said(run)}' for run in runs)}.", runs)


def pooled_from(results: Sequence[Result], *, level: str = IMAGES) -> str:
    """What the pooled results of folds rest on.

    Args:
        results: Of all folds, at least one.
        level: `image-level` or `patient-level`.
    """
    said = f"{level.capitalize()}; {_describe_folds(results)}, each image in one of them."
    return _joined(f"{said} {_cite_splits(results)}", [each.run for each in results])


def _describe_folds(results: Sequence[Result]) -> str:
    """The test images of folds together."""
    images = {name for result in results for name in result.test.predictions.sample.tolist()}
    groups = {name for result in results for name in np.asarray(result.test.predictions.group).tolist()}
    whose = f" of {len(groups):,} groups" if len(groups) < len(images) else ", each its own group"
    return f"{len(images):,} test images{whose}, tested in {len(by_test_set(results))} folds"


def _cite_splits(results: Sequence[Result]) -> str:
    splits = list(dict.fromkeys(result.split for result in results))
    if len(splits) > MOST_SPLITS:
        return f"Splits {splits[0]} and {len(splits) - 1} others."
    return f"Split{'s' if len(splits) > 1 else ''} {', '.join(splits)}."


def _joined(said: str, runs: Sequence[SavedRun]) -> str:
    return f"{said} {mark_words(runs)}".strip()


def _said(results: Sequence[Result], level: str) -> str:
    first = results[0]
    groups = f"{first.test.groups:,} groups" if first.test.clusters is not None else "each its own group"
    images = f"{first.test.images:,} test images"
    said = f"{images}, {groups}" if first.test.clusters is None else f"{images} of {groups}"
    if level == PATIENTS and first.patients is not None:
        said = f"{len(first.patients.predictions.true):,} groups, mean probability of their images; {images}"
        if first.patients.left_out:
            said += f"; {first.patients.left_out} groups of several true classes left out"
    splits = list(dict.fromkeys(result.split for result in results))
    if len(splits) == 1:
        return f"{said}; split {splits[0]}"
    return f"{said}; splits {', '.join(splits)}, which test on the same images"


def _parts_said(run: SavedRun) -> str:
    if run.split is None:
        return "split unknown"
    part = "test" if run.setting("data.validation") == "test" else "val"
    training, validation = len(run.split.part("train")), len(run.split.part(part))
    word = "test images as validation" if part == "test" else "validation"
    return f"{training:,} training and {validation:,} {word} images; split {run.split.cited}"
