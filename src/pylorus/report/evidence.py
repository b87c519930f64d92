"""All results of a report, computed once from the saved runs; tables, figures and sentences only present them.

This includes the winner by the study's criterion, the model selected on validation images, and tests of the
differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from pylorus.config.schema import DeployConfig
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_percent, format_percent_with_unit, join_names
from pylorus.report.candidate import (
    FOLDS,
    SET,
    Candidate,
    Configuration,
    Pool,
    group_by_configuration,
    group_into_pools,
)
from pylorus.report.captions import EvaluationCount, count_test_evaluations, resolve_class_name, set_run_labels
from pylorus.report.comparison import (
    Comparison,
    compare_pair,
    compute_corrected_family,
    list_other_pairs,
    list_stage_pairs,
)
from pylorus.report.results import (
    ComparableResults,
    ReportOptions,
    Result,
    SensitivityTarget,
    compute_results,
    group_by_test_set,
)
from pylorus.runs.folder import DAMAGED, KEY, LAST, LOSS, ORDER, explain_choice
from pylorus.runs.reading import SavedRun, get_class_order, read_config, read_run

CHOICE_TEXTS = {
    KEY: "named by deploy.stage",
    LAST: "the last stage; these runs were written by a version that did not compare stages",
}
"""Explains how the shipped stage of several runs was chosen, if not by validation."""

STATED_MARGIN = "deploy.margin"
"""Key of the margin that a run states before it is tested."""

MAX_NAMES = 5
"""Maximum number of names that a sentence lists; the rest is counted."""


@dataclass(frozen=True, eq=False)
class Winner:
    """The best candidates of one pool and the comparisons between its candidates.

    Attributes:
        pool: The pool of candidates.
        leaders: Candidates with the highest test accuracy, the study's criterion; several if they tie.
        preferred: Candidate with the highest validation accuracy, the first of equals; None without validation.
        reference: Candidate with which the others are compared: `preferred`, or else the first of `leaders`.
        comparisons: `reference` against every other candidate, corrected.
        stages: The stages of each configuration against each other, corrected within the configuration.
        others: All other pairs, unadjusted.
    """

    pool: Pool
    leaders: tuple[Candidate, ...]
    preferred: Candidate | None
    reference: Candidate
    comparisons: tuple[Comparison, ...]
    stages: tuple[Comparison, ...]
    others: tuple[Comparison, ...]

    @property
    def best(self) -> tuple[Result, ...]:
        """Results that represent the leaders: of each, the run with the median validation accuracy."""
        return tuple(each.representative for each in self.leaders)

    @property
    def headline_result(self) -> Result | None:
        """Result that represents `preferred`: of several replicates, that with the median validation accuracy."""
        return None if self.preferred is None else self.preferred.representative

    @property
    def comparable_results(self) -> ComparableResults:
        """All results on the test images of the representative run."""
        return self.pool.select_same_test(self.headline_result or self.best[0])

    @property
    def rule(self) -> str:
        """Sentence that names the winner by the study's criterion."""
        first = self.leaders[0]
        names = join_names([each.label for each in self.leaders], most=MAX_NAMES)
        share, spread = format_percent_with_unit(float(first.exact_accuracy)), _format_spread(first)
        if len(self.pool.candidates) == 1:
            return (
                f"{names} classified {share} of the test images correctly{spread}; there is no other candidate to "
                "compare it with."
            )
        verb = "ranks first with" if len(self.leaders) == 1 else "tie at"
        criterion = {
            SET: "highest test accuracy",
            FOLDS: "highest accuracy on the pooled test images of the folds",
        }.get(self.pool.kind, "highest mean test accuracy")
        if self.pool.kind == SET and any(each.replicates > 1 for each in self.pool.candidates):
            criterion += ", averaged over several runs"
        return f"By the study's criterion ({criterion}), {names} {verb} {share}{spread}."

    @property
    def verdict(self) -> str:
        """Sentences that state whether the reference differs significantly from the others; empty if there are none."""
        if not self.comparisons:
            return ""
        name, where = self.reference.label, self.pool.scope_text
        better: list[str] = []
        worse: list[str] = []
        undecided: list[str] = []
        for each in self.comparisons:
            other = each.second if each.first is self.reference else each.first
            outcome = (
                undecided
                if not each.is_significant
                else better
                if self.reference.exact_accuracy > other.exact_accuracy
                else worse
            )
            outcome.append(other.label)
        sentences = []
        if better:
            sentences.append(
                f"{name} is significantly more accurate than {join_names(better, most=MAX_NAMES)} {where}."
            )
        if worse:
            verb = "is" if len(worse) == 1 else "are"
            sentences.append(
                f"{join_names(worse, most=MAX_NAMES)} {verb} significantly more accurate than {name} {where}."
            )
        if undecided:
            sentences.append(
                f"No significant difference in accuracy between {name} and "
                f"{join_names(undecided, last='or', most=MAX_NAMES)} was found {where}."
            )
        return " ".join([*sentences, self._allowance])

    @property
    def _allowance(self) -> str:
        """Sentence that states which sources of variation the tests account for."""
        if self.pool.kind != SET:
            return "These tests account for variation between patients and for overlapping training sets."
        numbers = [candidate.replicates for each in self.comparisons for candidate in (each.first, each.second)]
        if min(numbers) > 1:
            return "These tests account for variation between patients and between seeds."
        if max(numbers) > 1:
            return (
                "These tests account for variation between patients and, for candidates with several runs, between "
                "seeds; a single run may owe its result to a favourable seed."
            )
        return (
            "These tests compare the models as trained, one run each; they do not account for variation between seeds."
        )

    @property
    def choice(self) -> str:
        """Sentences that name the model selected by validation accuracy, without using the test set."""
        if self.preferred is None or self.preferred.validation is None or self.headline_result is None:
            return "No model could be selected by validation accuracy, because there are no validation predictions."
        label = self.preferred.label
        validation = format_percent_with_unit(self.preferred.validation.mean)
        test = format_percent_with_unit(float(self.preferred.exact_accuracy))
        article = "a mean" if self.preferred.replicates > 1 else "an"
        accuracies = f"{article} accuracy of {validation} on validation images and {test} on test images"
        shipped = self.headline_result.run.bundle_stage
        if len(self.pool.configurations) == 1 and shipped is not None and shipped.chosen_by in (KEY, LAST):
            why = explain_choice(shipped) if self.preferred.replicates == 1 else CHOICE_TEXTS[shipped.chosen_by]
            sentence = f"The headline results are those of the shipped stage, {label} ({why}), with {accuracies}."
            return f"{sentence} {self._shipping}".strip()
        if self.headline_result.run.get_setting("data.validation") == "test":
            return (
                f"Validation accuracy would select {label}; but here the validation images are the test images, so "
                "this selection, too, was made on the test set."
            )
        if len(self.pool.candidates) == 1:
            sentence = f"{label} is the only candidate, with {accuracies}."
            return f"{sentence} {self._shipping}".strip()
        sentence = f"The model selected by validation accuracy is {label}, with {accuracies}.{self._ties}"
        return f"{sentence} {self._shipping}".strip()

    @property
    def _ties(self) -> str:
        """Sentence about other candidates of the same validation accuracy; empty without any."""
        best = _round_validation(self.preferred)
        names = [each.label for each in self.pool.candidates if _round_validation(each) == best]
        others = [name for name in names if self.preferred is not None and name != self.preferred.label]
        if not others:
            return ""
        verb = "has" if len(others) == 1 else "have"
        return f" {join_names(others, most=4)} {verb} the same validation accuracy; {self.tie_rule}."

    @property
    def tie_rule(self) -> str:
        """How the model was selected among those of the same validation accuracy, as a clause; empty without a tie."""
        best = _round_validation(self.preferred)
        tied = [each for each in self.pool.candidates if _round_validation(each) == best]
        if self.preferred is None or len(tied) < 2:
            return ""
        if len(self.pool.configurations) > 1:
            return "of these the first is taken"
        rules = {result.run.bundle_stage.chosen_by for result in self.preferred.results if result.run.bundle_stage}
        return {
            frozenset({LOSS}): "of these the one with the lowest validation loss is taken",
            frozenset({ORDER}): "of these, which also have the same validation loss, the latest stage is taken",
        }.get(frozenset(rules), "which of them a run ships depends on its own validation images")

    @property
    def _shipping(self) -> str:
        """Sentences about the shipped models if the selected candidate has several runs."""
        preferred = self.preferred
        if preferred is None or preferred.replicates == 1:
            return ""
        if self.pool.kind == SET:
            return (
                f"Each of its {preferred.replicates} runs ships its own model; the run with the median validation "
                f"accuracy is {preferred.representative.run.label}."
            )
        caveat = (
            "The validation images of one fold are test images of other folds, so this selection was not fully "
            "independent of the pooled test images. "
            if self.pool.kind == FOLDS and len(self.pool.candidates) > 1
            else ""
        )
        return (
            f"{caveat}Each of its runs ships its own model, trained on a subset of the images; the results describe "
            "the configuration, not any single one of these models."
        )


def find_winner(pool: Pool, *, class_name: str | None, options: ReportOptions) -> Winner:
    """Choose the winner among the candidates of a pool and test the research questions."""
    candidates = pool.candidates
    most = max(each.exact_accuracy for each in candidates)
    leaders = tuple(each for each in candidates if each.exact_accuracy == most)
    preferred = _select_preferred(pool)
    reference = preferred or leaders[0]

    def compare_pairs(pairs: Sequence[tuple[Candidate, Candidate]]) -> tuple[Comparison, ...]:
        return tuple(compare_pair(*pair, pool, class_name=class_name, options=options) for pair in pairs)

    stages = tuple(
        comparison
        for each, pairs in zip(pool.configurations, list_stage_pairs(pool), strict=True)
        for comparison in compute_corrected_family(
            compare_pairs(pairs), question=f"the stages of {each.label} against each other"
        )
    )
    if len(pool.configurations) == 1:
        against = tuple(each for each in stages if reference in (each.first, each.second))
        return Winner(pool, leaders, preferred, reference, against, stages, ())
    against_winner = compare_pairs([(reference, each) for each in candidates if each is not reference])
    others = compare_pairs(list_other_pairs(pool, [*against_winner, *stages]))
    is_independent = (
        preferred is not None and pool.kind == SET and reference.results[0].run.get_setting("data.validation") != "test"
    )
    # If the test images influenced which candidate is the reference, any pair could have become the question.
    rivals = [] if is_independent else [each for each in others if {each.first, each.second} <= set(candidates)]
    question = f"{reference.label} against every other configuration"
    if rivals:
        question += (
            ", corrected for all pairs of configurations because it was not selected independently of these images"
        )
    return Winner(
        pool,
        leaders,
        preferred,
        reference,
        compute_corrected_family(against_winner, question=question, others=rivals),
        stages,
        others,
    )


def _select_preferred(pool: Pool) -> Candidate | None:
    if len(pool.configurations) == 1:
        only = pool.configurations[0].shipped
        return only if only.validation is not None else None
    validated = [each for each in pool.candidates if each.validation is not None]
    return max(validated, key=_round_validation, default=None)


def _round_validation(candidate: Candidate | None) -> float:
    """Round a validation accuracy, so that equal means are equal in spite of rounding errors in their sums."""
    return -1.0 if candidate is None or candidate.validation is None else round(candidate.validation.mean, 12)


def _format_spread(candidate: Candidate) -> str:
    """Format the spread of a candidate's runs in parentheses; empty for a single run."""
    summary = candidate.accuracies
    if summary.replicates == 1:
        return ""
    return (
        f" ({candidate.replicate_text}: standard deviation {format_percent(summary.deviation)} percentage points, "
        f"range {format_percent(summary.lowest)} to {format_percent_with_unit(summary.highest)})"
    )


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that was computed from a set of runs.

    Attributes:
        options: Options of the report.
        class_name: Short name of the class for which a threshold is fixed; None if no run has classes yet.
        target: Sensitivity and confidence that this threshold has to guarantee.
        margin: Margin of the tests of non-inferiority and equivalence; None: there are none.
        runs: All runs, including those without results.
        results: One result per stage with test predictions.
        tests: Results by test set.
        configurations: Results by configuration, with its seeds and folds together.
        pools: Configurations by test images.
        winners: One winner per pool, with all comparisons.
        evaluation_counts: How often each test set was evaluated.
    """

    options: ReportOptions
    class_name: str | None
    target: SensitivityTarget
    margin: float | None
    runs: tuple[SavedRun, ...]
    results: tuple[Result, ...]
    tests: tuple[ComparableResults, ...]
    configurations: tuple[Configuration, ...]
    pools: tuple[Pool, ...]
    winners: tuple[Winner, ...]
    evaluation_counts: tuple[EvaluationCount, ...]

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


def collect_evidence(folders: Sequence[Path], options: ReportOptions) -> Evidence:
    """Read runs and compute everything that the report presents.

    Runs with the same set of classes all use the class order of the first of them.

    Raises:
        PylorusError: If a file is damaged or contradicts another, no run has the class given in the options, or these
            compare with a reference or a figure without a margin.
    """
    orders: dict[frozenset[str], list[str]] = {}
    saved_runs = []
    for folder in folders:
        try:
            config = read_config(folder)
            names = get_class_order(config)
            saved_runs.append(read_run(folder, config, order=orders.setdefault(frozenset(names), names)))
        except PylorusError as error:
            if len(folders) == 1:
                raise
            # It is named among the warnings, and the others are reported.
            saved_runs.append(SavedRun(folder, {"state": DAMAGED, "error": str(error)}, OmegaConf.create(), None, ()))
    if all(run.state == DAMAGED for run in saved_runs):
        raise PylorusError(str(saved_runs[0].status["error"]))
    runs = set_run_labels(saved_runs)
    class_name = resolve_class_name(runs, options.class_name)
    target, margin = _resolve_target(runs, options), _resolve_margin(runs, options)
    results = tuple(result for run in runs for result in compute_results(run, class_name=class_name, target=target))
    tests = group_by_test_set(results)
    configurations = group_by_configuration(results)
    pools = group_into_pools(configurations)
    return Evidence(
        options=options,
        class_name=class_name,
        target=target,
        margin=margin,
        runs=runs,
        results=results,
        tests=tests,
        configurations=configurations,
        pools=pools,
        winners=tuple(find_winner(each, class_name=class_name, options=options) for each in pools),
        evaluation_counts=count_test_evaluations(runs),
    )


def _resolve_target(runs: Sequence[SavedRun], options: ReportOptions) -> SensitivityTarget:
    """Return the aim in the options, completed by that of the first run."""
    default = DeployConfig()

    def get_deploy_setting(key: str, fallback: float) -> float:
        return float(runs[0].get_setting(f"deploy.{key}", fallback)) if runs else fallback

    return SensitivityTarget(
        get_deploy_setting("sensitivity", default.sensitivity) if options.sensitivity is None else options.sensitivity,
        get_deploy_setting("confidence", default.confidence) if options.guarantee is None else options.guarantee,
    )


def collect_stated_margins(runs: Sequence[SavedRun]) -> set[float | None]:
    """Return the margins in the configurations of the runs that have results; None stands for no margin."""
    values = (run.get_setting(STATED_MARGIN) for run in runs if run.complete_stages)
    return {None if value is None else float(value) for value in values}


def _resolve_margin(runs: Sequence[SavedRun], options: ReportOptions) -> float | None:
    """Return the margin that was given, or else that of the configuration of all runs."""
    stated = collect_stated_margins(runs)
    if options.margin is not None:
        return options.margin
    if len(stated) == 1 and None not in stated:
        return stated.pop()
    if options.reference is not None or options.against:
        option = "--reference" if options.reference is not None else "--against"
        raise PylorusError(
            f"{option}: has no effect without a margin, the largest difference that counts as no worse. Add it, such "
            "as --margin 0.05."
        )
    return None
