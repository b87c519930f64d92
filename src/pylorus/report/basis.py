"""What a table or a figure rests on, in its caption: the level, the images and groups, the split, the marks."""

from collections.abc import Sequence

from pylorus.report.level import IMAGES, PATIENTS
from pylorus.report.marks import mark_words
from pylorus.report.result import Result
from pylorus.report.same_test import by_test_set
from pylorus.report.saved_run import SavedRun


def tested_on(results: Sequence[Result], *, level: str = IMAGES) -> str:
    """What results on test images rest on.

    Args:
        results: At least one.
        level: `image-level` or `patient-level`.
    """
    sets = by_test_set(results)
    told = [_said(each.results, level) for each in sets]
    if len(sets) > 1:
        parts = [f"{', '.join(each.runs)}: {said}" for each, said in zip(sets, told, strict=True)]
        told = [f"{len(sets)} different test sets, not to be compared. {'; '.join(parts)}"]
    return _joined(f"{level.capitalize()}; {told[0]}.", [result.run for result in results])


def trained_on(runs: Sequence[SavedRun]) -> str:
    """What curves over epochs rest on: the training and validation images of each run."""
    told = dict.fromkeys(_parts_said(run) for run in runs)
    if len(told) == 1:
        return _joined(f"Image-level; {next(iter(told))}.", runs)
    return _joined(f"Image-level; {'; '.join(f'{run.label}: {_parts_said(run)}' for run in runs)}.", runs)


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
