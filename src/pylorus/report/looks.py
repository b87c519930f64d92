"""How often a test set was looked at: every look makes the best figure of many a little better than it should be.

A look is one stage of one run that predicted the test images; where each epoch was validated on them, each epoch is
one more. Test sets are told by the content of their images, not by the split's hash alone, so that a split which only
cuts another validation part counts too. Looks are counted from what lies on the disk, so nothing has to be kept:
in the runs of the report, and in the other runs below the folders `outputs` and `multirun` that these lie in. Runs
that were deleted or lie elsewhere can't be counted: the number is a lower bound, and is said to be.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pylorus.report.saved_run import SavedRun
from pylorus.report.saved_split import name_of_images
from pylorus.report.scope import STATUS

ROOTS = ("outputs", "multirun")
"""Where runs and sweeps land: <root>/<day>/<run>, <root>/<day>/<sweep>/<job>."""


@dataclass(frozen=True)
class Looks:
    """How often one test set was looked at, at least.

    Attributes:
        splits: Hashes of the splits that have this test set, as tables cite them.
        here: Stages of the report's runs that predicted it.
        epochs: Epochs of the report's runs that were validated on it.
        elsewhere: Stages of other runs beside these that predicted it.
        other_runs: How many runs that is.
    """

    splits: tuple[str, ...]
    here: int
    epochs: int
    elsewhere: int
    other_runs: int

    @property
    def sentence(self) -> str:
        """The count as the page says it."""
        return f"The test set of split {', '.join(self.splits)} was looked at {self._words}"

    @property
    def _words(self) -> str:
        total = self.here + self.epochs + self.elsewhere
        parts = [f"{_times(self.here)} by the stages of the runs reported here"]
        if self.epochs:
            parts.append(f"{_times(self.epochs)} by epochs that were validated on it")
        if self.elsewhere:
            parts.append(f"{_times(self.elsewhere)} by {self.other_runs} other runs found beside them")
        count = "once" if total == 1 else f"{total} times, or more"
        return f"{count}: {', '.join(parts)}. Runs that were deleted or lie elsewhere are not counted."


def look_sentences(looks: Sequence[Looks]) -> tuple[str, ...]:
    """How often the test sets were looked at; those looked at equally often, as folds are, in one sentence."""
    alike: dict[tuple[int, ...], list[Looks]] = {}
    for each in looks:
        alike.setdefault((each.here, each.epochs, each.elsewhere, each.other_runs), []).append(each)
    return tuple(
        group[0].sentence if len(group) == 1 else f"Each of {len(group)} test sets was looked at {group[0]._words}"
        for group in alike.values()
    )


def count_looks(runs: Sequence[SavedRun]) -> tuple[Looks, ...]:
    """The looks at each test set that a run of the report predicted, in the order of the runs."""
    seen = [run for run in runs if run.split is not None and run.finished_stages]
    others = _other_runs(runs)
    found = []
    for test_images in dict.fromkeys(run.split.test_images for run in seen if run.split is not None):
        same = [run for run in seen if run.split is not None and run.split.test_images == test_images]
        beside = [len(_predicted(folder)) for folder in others if _test_images(folder) == test_images]
        found.append(
            Looks(
                splits=tuple(dict.fromkeys(run.split.cited for run in same if run.split is not None)),
                here=sum(len(run.finished_stages) for run in same),
                epochs=sum(_epochs(run) for run in same if run.setting("data.validation") == "test"),
                elsewhere=sum(beside),
                other_runs=len(beside),
            )
        )
    return tuple(found)


def _epochs(run: SavedRun) -> int:
    return sum(len(stage.curves) for stage in run.stages if stage.curves is not None)


def _other_runs(runs: Sequence[SavedRun]) -> list[Path]:
    """Folders of runs that predicted a test set and lie beside those of the report."""
    own = {run.folder.resolve() for run in runs}
    roots = {
        parent.parent / name for folder in own for parent in folder.parents if parent.name in ROOTS for name in ROOTS
    }
    found = {file.parent for root in roots for pattern in ("*/*/", "*/*/*/") for file in root.glob(pattern + STATUS)}
    return sorted(folder for folder in found - own if _predicted(folder))


def _predicted(folder: Path) -> list[Path]:
    return list(folder.glob("*/predictions-test.parquet"))


def _test_images(folder: Path) -> str | None:
    """The name of a run's test set; None where its split can't be read, since that is another run's trouble."""
    try:
        with (folder / "split.csv").open(encoding="utf-8", newline="") as file:
            rows: Iterable[dict[str, str]] = csv.DictReader(file)
            return name_of_images({row["sha256"] for row in rows if row["split"] == "test"})
    except (OSError, KeyError, ValueError):
        return None


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
