"""How often a test set was evaluated: every evaluation makes the best of many results a little more optimistic.

Each stage of a run that predicted the test images counts as one evaluation; if every epoch was validated on them, each
epoch counts as well. Test sets are identified by the content of their images and not only by the hash of the split, so
that splits that differ only in the validation images count together. Evaluations are counted from the runs on disk: the
runs of the report, and the other runs in the `outputs` and `multirun` folders in which these lie. Runs that were
deleted or lie elsewhere cannot be counted, so the number is a lower bound and is reported as such.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pylorus.report.saved_run import SavedRun
from pylorus.report.saved_split import compute_image_set_hash
from pylorus.report.scope import STATUS

ROOTS = ("outputs", "multirun")
"""Folders of runs and sweeps: <root>/<day>/<run> and <root>/<day>/<sweep>/<job>."""


@dataclass(frozen=True)
class EvaluationCount:
    """Lower bound of how often one test set was evaluated.

    Attributes:
        splits: Short hashes of the splits that have this test set.
        here: Number of stages in the report that predicted it.
        epochs: Number of epochs in the report that were validated on it.
        elsewhere: Number of stages of other runs in the same folders that predicted it.
        other_runs: Number of these other runs.
    """

    splits: tuple[str, ...]
    here: int
    epochs: int
    elsewhere: int
    other_runs: int

    @property
    def sentence(self) -> str:
        """The count as a sentence."""
        return f"The test set of split {', '.join(self.splits)} was evaluated {self._count_text}"

    @property
    def _count_text(self) -> str:
        total = self.here + self.epochs + self.elsewhere
        parts = [f"{_format_times(self.here)} by the stages of the runs reported here"]
        if self.epochs:
            parts.append(f"{_format_times(self.epochs)} by epochs that were validated on it")
        if self.elsewhere:
            runs = "1 other run" if self.other_runs == 1 else f"{self.other_runs} other runs"
            parts.append(f"{_format_times(self.elsewhere)} by {runs} in the same folders")
        count = f"at least {_format_times(total)}"
        return f"{count}: {', '.join(parts)}. Runs that were deleted or are stored elsewhere are not counted."


def format_evaluation_counts(looks: Sequence[EvaluationCount]) -> tuple[str, ...]:
    """State how often the test sets were evaluated, in one sentence for all sets evaluated equally often."""
    by_count: dict[tuple[int, ...], list[EvaluationCount]] = {}
    for each in looks:
        by_count.setdefault((each.here, each.epochs, each.elsewhere, each.other_runs), []).append(each)
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
                here=sum(len(run.complete_stages) for run in same),
                epochs=sum(
                    _count_validated_epochs(run) for run in same if run.get_setting("data.validation") == "test"
                ),
                elsewhere=sum(elsewhere),
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
        parent.parent / name for folder in own for parent in folder.parents if parent.name in ROOTS for name in ROOTS
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
