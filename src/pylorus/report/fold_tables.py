"""Cross-validation: what the folds of one configuration say together of images that each tested once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from omegaconf import OmegaConf

from pylorus.evaluation.index_intervals import indices_of_predictions
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.report.marks import mark_words
from pylorus.report.options import CONFIDENCE, ReportOptions
from pylorus.report.result import Result
from pylorus.report.table import Cell, Column, Row, Table, in_percent, text_columns


@dataclass(frozen=True, eq=False)
class Pooled:
    """One stage of one configuration over its folds.

    Attributes:
        folds: The result of each fold that is there, in their order.
        wanted: How many folds make the whole.
        predictions: Of all test images together, each by the model that did not see it.
    """

    folds: tuple[Result, ...]
    wanted: int
    predictions: Predictions

    @property
    def complete(self) -> bool:
        """Whether every fold is there."""
        return len(self.folds) == self.wanted


def pooled(results: Sequence[Result]) -> tuple[Pooled, ...]:
    """Stages of configurations that differ in nothing but data.fold, at least two folds of each."""
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        fold = result.run.setting("data.fold")
        if fold is not None:
            # A configuration that ran twice counts once: its images must not be pooled twice.
            found.setdefault(_configuration(result), {}).setdefault(str(fold), result)
    made = []
    for by_fold in found.values():
        folds = tuple(by_fold[fold] for fold in sorted(by_fold))
        said = [result.test.predictions for result in folds]
        sample = np.concatenate([one.sample for one in said])
        if len(folds) < 2 or len(np.unique(sample)) < len(sample):
            continue
        together = Predictions(
            sample=sample,
            group=np.concatenate([one.group for one in said]),
            true=np.concatenate([one.true for one in said]),
            probabilities=np.concatenate([one.probabilities for one in said]),
            class_names=said[0].class_names,
        )
        made.append(Pooled(folds, int(folds[0].run.setting("data.folds", len(folds))), together))
    return tuple(made)


def pooled_table(found: Sequence[Pooled], options: ReportOptions, *, number: int = 1) -> Table:
    """Indices of each configuration over all images of its folds, whole groups drawn.

    Args:
        found: At least one, all of the same classes.
        options: Resamples and seed.
        number: Which of the report's tables of this kind it is, where there are several sets of classes.
    """
    names = found[0].predictions.class_names
    missing = [each for each in found if not each.complete]
    runs = [result.run for each in found for result in each.folds]
    notes = [
        "Out of fold: each image was tested once, by the model of the fold that had not seen it or its patient. The "
        "interval tells the spread over patients, not that over training runs.",
    ]
    if missing:
        notes.append(
            f"INCOMPLETE: {len(missing)} of {len(found)} lack folds; their figures hold for the images of those there."
        )
    return Table(
        key="folds" if number == 1 else f"folds-{number}",
        title="Cross-validation: all folds pooled",
        basis=f"Image-level; every image was tested in one fold. {mark_words(runs)}".strip(),
        columns=(
            *text_columns("model", "stage", "folds"),
            Column("images"),
            Column("groups"),
            Column("accuracy", unit="%"),
            Column("macro F1", unit="%"),
            *(Column(name, over="sensitivity", unit="%") for name in names),
            *(Column(name, over="precision", unit="%") for name in names),
        ),
        rows=tuple(_row(each, options) for each in found),
        notes=tuple(notes),
    )


def _row(each: Pooled, options: ReportOptions) -> Row:
    said, first = each.predictions, each.folds[0]
    groups = said.group if len(np.unique(said.group)) < len(said.true) else None
    shares = proportions_of_predictions(said.true, said.predicted, groups, classes=said.classes, confidence=CONFIDENCE)
    indices = indices_of_predictions(
        said.true,
        said.predicted,
        groups,
        classes=said.classes,
        confidence=CONFIDENCE,
    )
    cells: list[Cell] = [first.run.model, first.stage.name, f"{len(each.folds)} of {each.wanted}"]
    cells += [len(said.true), len(np.unique(said.group)), in_percent(shares.accuracy), in_percent(indices.macro_f1)]
    cells += [in_percent(share) for kind in (shares.sensitivity, shares.precision) for share in kind]
    return Row(tuple(cells))


def _configuration(result: Result) -> str:
    """A configuration without its fold, and the stage."""
    plain = OmegaConf.to_container(result.run.config)
    assert isinstance(plain, dict)
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "fold"}
    return json.dumps([plain, result.stage.name], sort_keys=True, default=str)
