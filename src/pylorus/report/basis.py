"""Describe the data behind a table or figure for its caption: level, images, groups, split and caveats."""

from collections.abc import Sequence

import numpy as np

from pylorus.report.level import IMAGES, PATIENTS
from pylorus.report.marks import format_caveats
from pylorus.report.result import Result
from pylorus.report.same_test import group_by_test_set
from pylorus.report.saved_run import SavedRun

MOST_SPLITS = 6
"""If there are more splits than this, they are counted instead of cited."""


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
    if len(descriptions) > MOST_SPLITS:
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
    if len(splits) > MOST_SPLITS:
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
