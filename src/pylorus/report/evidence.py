"""All results of a report, computed once from the saved runs; tables, figures and sentences only present them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pylorus.config import DeployConfig
from pylorus.errors import PylorusError, format_suggestion
from pylorus.report.candidate import Candidate, Configuration, Pool, group_by_configuration, group_into_pools
from pylorus.report.comparison import Comparison
from pylorus.report.labels import set_run_labels
from pylorus.report.looks import EvaluationCount, count_test_evaluations
from pylorus.report.operating import SensitivityTarget
from pylorus.report.options import ReportOptions
from pylorus.report.result import Result, compute_results
from pylorus.report.same_test import ComparableResults, group_by_test_set
from pylorus.report.saved_run import SavedRun, get_class_order, read_config, read_run
from pylorus.report.winner import Winner, find_winner


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that was computed from a set of runs.

    Attributes:
        options: Options of the report.
        class_name: Short name of the class for which a threshold is fixed; None if no run has classes yet.
        aim: Sensitivity and confidence that this threshold has to guarantee.
        runs: All runs, including those without results.
        results: One result per stage with test predictions.
        tests: Results by test set.
        configurations: Results by configuration, with its seeds and folds together.
        pools: Configurations by test images.
        winners: One winner per pool, with all comparisons.
        looks: How often each test set was evaluated.
    """

    options: ReportOptions
    class_name: str | None
    aim: SensitivityTarget
    runs: tuple[SavedRun, ...]
    results: tuple[Result, ...]
    tests: tuple[ComparableResults, ...]
    configurations: tuple[Configuration, ...]
    pools: tuple[Pool, ...]
    winners: tuple[Winner, ...]
    looks: tuple[EvaluationCount, ...]

    def get_run_results(self, run: SavedRun) -> tuple[Result, ...]:
        """Return the results of one run."""
        return tuple(result for result in self.results if result.run is run)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Comparisons that answer a research question, corrected within it, each once."""
        return tuple(dict.fromkeys(each for winner in self.winners for each in (*winner.comparisons, *winner.stages)))

    @property
    def other_comparisons(self) -> tuple[Comparison, ...]:
        """All other pairs on the same test images, unadjusted."""
        return tuple(each for winner in self.winners for each in winner.others)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Candidates that figures overlay: each configuration as shipped, or the stages of a single configuration."""
        if len(self.configurations) == 1:
            return self.configurations[0].stages
        return tuple(each.shipped for each in self.configurations)

    @property
    def replicates(self) -> dict[str, tuple[SavedRun, ...]]:
        """Runs by the label of their configuration; a run without results is listed under its own label."""
        replicates: dict[str, list[SavedRun]] = {}
        labels = {
            result.run: each.label for each in self.configurations for stage in each.stages for result in stage.results
        }
        for run in self.runs:
            replicates.setdefault(labels.get(run, run.label), []).append(run)
        return {label: tuple(runs) for label, runs in replicates.items()}

    @property
    def candidate_results(self) -> tuple[Result, ...]:
        """Results of `candidates`."""
        return tuple(result for each in self.candidates for result in each.results)


def collect_evidence(folders: Sequence[Path], options: ReportOptions) -> Evidence:
    """Read runs and compute everything that the report presents.

    Runs with the same set of classes all use the class order of the first of them.

    Raises:
        PylorusError: If a file is damaged or contradicts another, or no run has the class given in the options.
    """
    orders: dict[frozenset[str], list[str]] = {}
    saved_runs = []
    for folder in folders:
        config = read_config(folder)
        names = get_class_order(config)
        saved_runs.append(read_run(folder, config, order=orders.setdefault(frozenset(names), names)))
    runs = set_run_labels(saved_runs)
    class_name = _resolve_class_name(runs, options)
    aim = _resolve_aim(runs, options)
    results = tuple(
        result for run in runs for result in compute_results(run, class_name=class_name, aim=aim, options=options)
    )
    tests = group_by_test_set(results)
    configurations = group_by_configuration(results)
    pools = group_into_pools(configurations)
    return Evidence(
        options=options,
        class_name=class_name,
        aim=aim,
        runs=runs,
        results=results,
        tests=tests,
        configurations=configurations,
        pools=pools,
        winners=tuple(find_winner(each, class_name=class_name, options=options) for each in pools),
        looks=count_test_evaluations(runs),
    )


def _resolve_class_name(runs: Sequence[SavedRun], options: ReportOptions) -> str | None:
    """Return the short name of the class in the options (short or full name), else that of the first run's bundle."""
    known = dict.fromkeys(name for run in runs for name in run.short_names)
    full = {name: short for run in runs for name, short in zip(run.class_names, run.short_names, strict=True)}
    if options.class_name is None:
        first = next(iter(known), None)
        deciding = runs[0].get_setting("deploy.class_name", first) if runs else first
        return str(full.get(deciding, deciding)) if deciding in {*known, *full} else first
    short_name = options.class_name if options.class_name in known else full.get(options.class_name)
    if short_name is None:
        raise PylorusError(
            f'--class: found "{options.class_name}", expected one of {", ".join(known) or "no class"}.'
            f"{format_suggestion(options.class_name, known)}"
        )
    return short_name


def _resolve_aim(runs: Sequence[SavedRun], options: ReportOptions) -> SensitivityTarget:
    """Return the aim in the options, completed by that of the first run."""
    default = DeployConfig()

    def get_deploy_setting(key: str, fallback: float) -> float:
        return float(runs[0].get_setting(f"deploy.{key}", fallback)) if runs else fallback

    return SensitivityTarget(
        get_deploy_setting("sensitivity", default.sensitivity) if options.sensitivity is None else options.sensitivity,
        get_deploy_setting("confidence", default.confidence) if options.guarantee is None else options.guarantee,
    )
