"""The worst mistakes: the test images of which the model was surest and wrong, where a failure analysis begins."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pylorus.evaluation.predictions import Predictions
from pylorus.report.basis import tested_on
from pylorus.report.result import Result
from pylorus.report.table import Cell, Column, Number, Row, Table, text_columns

WORST = 12
"""How many are shown."""


@dataclass(frozen=True)
class Mistake:
    """A test image taken for another class.

    Attributes:
        sample: Its id.
        true: Short name of its class.
        predicted: Short name of the class that it was taken for.
        certainty: Calibrated probability of that class, in [0, 1].
        chance: Calibrated probability of the true class, in [0, 1].
        missed_by: How many of the compared results are mistaken about it too.
    """

    sample: str
    true: str
    predicted: str
    certainty: float
    chance: float
    missed_by: int


def worst_mistakes(result: Result, peers: Sequence[Result]) -> tuple[Mistake, ...]:
    """The mistakes of one result, the surest first, at most `WORST`.

    Args:
        result: Whose mistakes.
        peers: Results on the same test images, this one among them.
    """
    said = result.test.predictions
    rows = np.arange(len(said.true))
    certainty, chance = said.probabilities.max(axis=1), said.probabilities[rows, said.true]
    missed = dict.fromkeys(said.sample.tolist(), 0)
    for peer in peers:
        for name in peer.test.predictions.sample[~peer.test.predictions.correct].tolist():
            missed[name] += 1
    return tuple(
        Mistake(
            sample=str(said.sample[row]),
            true=said.class_names[said.true[row]],
            predicted=said.class_names[said.predicted[row]],
            certainty=float(certainty[row]),
            chance=float(chance[row]),
            missed_by=missed[str(said.sample[row])],
        )
        for row in surest_mistakes(said)
    )


def surest_mistakes(said: Predictions) -> list[int]:
    """The places of the mistakes, the surest first, at most `WORST`."""
    certainty = said.probabilities.max(axis=1)
    # Equal certainties go by sample, so that the order does not depend on the file's.
    order = sorted(np.flatnonzero(~said.correct), key=lambda row: (-certainty[row], str(said.sample[row])))
    return [int(row) for row in order[:WORST]]


def mistake_table(result: Result, mistakes: Sequence[Mistake], *, peers: int, names: bool, number: int = 1) -> Table:
    """The worst mistakes; with `names` also file and group, which may name a patient.

    Args:
        result: Whose mistakes.
        mistakes: From `worst_mistakes`.
        peers: How many results were asked about the same images.
        names: Whether file and group are shown.
        number: Of several tables of a report.
    """
    total = int((~result.test.predictions.correct).sum())
    return Table(
        key="worst-mistakes" + (f"-{number}" if number > 1 else ""),
        title=f"{result.label}: the {len(mistakes)} surest of {total} mistakes",
        basis=tested_on([result]),
        columns=(
            *text_columns("sample"),
            *(text_columns("file", "group") if names else ()),
            *text_columns("true", "taken for"),
            Column("certainty", unit="%"),
            Column("probability of the true class", unit="%"),
            *((Column(f"mistaken, of {peers} results"),) if peers > 1 else ()),
        ),
        rows=tuple(Row(tuple(_cells(result, each, peers, names))) for each in mistakes),
        notes=("Samples stand for images by an id that names no file; with --names the report names the files.",)
        if not names
        else (),
    )


def _cells(result: Result, mistake: Mistake, peers: int, names: bool) -> list[Cell]:
    cells: list[Cell] = [mistake.sample]
    if names:
        assert result.run.split is not None
        row = result.run.split.table.set_index("sample_id").loc[mistake.sample]
        cells += [str(row["path"]), str(row["group"])]
    cells += [mistake.true, mistake.predicted, Number(100 * mistake.certainty), Number(100 * mistake.chance)]
    return [*cells, mistake.missed_by] if peers > 1 else cells
