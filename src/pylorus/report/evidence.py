"""All that a report says, computed once from the saved runs; tables, figures and sentences only show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pylorus.config import DeployConfig
from pylorus.errors import PylorusError, did_you_mean
from pylorus.report.candidate import Candidate, Configuration, Pool, configurations_of, pools_of
from pylorus.report.comparison import Comparison
from pylorus.report.labels import labelled
from pylorus.report.looks import Looks, count_looks
from pylorus.report.operating import Aim
from pylorus.report.options import ReportOptions
from pylorus.report.result import Result, results_of
from pylorus.report.same_test import SameTest, by_test_set
from pylorus.report.saved_run import SavedRun, class_order, read_config, read_run
from pylorus.report.winner import Winner, winner_of


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of some runs.

    Attributes:
        options: What the reader chose.
        class_name: Short name of the class that a threshold is fixed for; None if no run has classes yet.
        aim: What that threshold is to guarantee.
        runs: All runs, also those that gave nothing.
        results: One for each stage that predicted the test images.
        tests: The results by test set.
        configurations: The results by configuration, seeds and folds of one together.
        pools: The configurations by what they were tested on.
        winners: One a pool, with all comparisons.
        looks: How often each test set was looked at.
    """

    options: ReportOptions
    class_name: str | None
    aim: Aim
    runs: tuple[SavedRun, ...]
    results: tuple[Result, ...]
    tests: tuple[SameTest, ...]
    configurations: tuple[Configuration, ...]
    pools: tuple[Pool, ...]
    winners: tuple[Winner, ...]
    looks: tuple[Looks, ...]

    def of_run(self, run: SavedRun) -> tuple[Result, ...]:
        """The results of one run."""
        return tuple(result for result in self.results if result.run is run)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The pairs that a question asks about, corrected within it, each once."""
        return tuple(dict.fromkeys(each for winner in self.winners for each in (*winner.comparisons, *winner.stages)))

    @property
    def other_comparisons(self) -> tuple[Comparison, ...]:
        """All other pairs on the same test images, unadjusted."""
        return tuple(each for winner in self.winners for each in winner.others)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """What figures lay over each other: what each configuration ships; its stages, where there is one."""
        if len(self.configurations) == 1:
            return self.configurations[0].stages
        return tuple(each.shipped for each in self.configurations)

    @property
    def replicates(self) -> dict[str, tuple[SavedRun, ...]]:
        """The runs by the configuration that they are replicates of; one without results is called by its own label."""
        found: dict[str, list[SavedRun]] = {}
        labels = {
            result.run: each.label for each in self.configurations for stage in each.stages for result in stage.results
        }
        for run in self.runs:
            found.setdefault(labels.get(run, run.label), []).append(run)
        return {label: tuple(runs) for label, runs in found.items()}

    @property
    def compared(self) -> tuple[Result, ...]:
        """The results of these candidates."""
        return tuple(result for each in self.candidates for result in each.results)


def gather(folders: Sequence[Path], options: ReportOptions) -> Evidence:
    """Reads runs and computes all that is to be said of them.

    Runs of the same classes are put in the order of the first of them.

    Raises:
        PylorusError: If a file is damaged or contradicts another, or no run knows the chosen class.
    """
    orders: dict[frozenset[str], list[str]] = {}
    found = []
    for folder in folders:
        config = read_config(folder)
        names = class_order(config)
        found.append(read_run(folder, config, order=orders.setdefault(frozenset(names), names)))
    runs = labelled(found)
    class_name = _chosen_class(runs, options)
    aim = _aim(runs, options)
    results = tuple(
        result for run in runs for result in results_of(run, class_name=class_name, aim=aim, options=options)
    )
    tests = by_test_set(results)
    configurations = configurations_of(results)
    pools = pools_of(configurations)
    return Evidence(
        options=options,
        class_name=class_name,
        aim=aim,
        runs=runs,
        results=results,
        tests=tests,
        configurations=configurations,
        pools=pools,
        winners=tuple(winner_of(each, class_name=class_name, options=options) for each in pools),
        looks=count_looks(runs),
    )


def _chosen_class(runs: Sequence[SavedRun], options: ReportOptions) -> str | None:
    """Short name of the class that the reader chose, by its short or full name; else the one of the first run."""
    known = dict.fromkeys(name for run in runs for name in run.short_names)
    full = {name: short for run in runs for name, short in zip(run.class_names, run.short_names, strict=True)}
    if options.class_name is None:
        first = next(iter(known), None)
        deciding = runs[0].setting("deploy.class_name", first) if runs else first
        return str(full.get(deciding, deciding)) if deciding in {*known, *full} else first
    found = options.class_name if options.class_name in known else full.get(options.class_name)
    if found is None:
        raise PylorusError(
            f'--class: found "{options.class_name}", expected one of {", ".join(known) or "no class"}.'
            f"{did_you_mean(options.class_name, known)}"
        )
    return found


def _aim(runs: Sequence[SavedRun], options: ReportOptions) -> Aim:
    """What the reader asks of the threshold; else what the first run asks of its own."""
    default = DeployConfig()

    def setting(key: str, fallback: float) -> float:
        return float(runs[0].setting(f"deploy.{key}", fallback)) if runs else fallback

    return Aim(
        setting("sensitivity", default.sensitivity) if options.sensitivity is None else options.sensitivity,
        setting("confidence", default.confidence) if options.guarantee is None else options.guarantee,
    )
