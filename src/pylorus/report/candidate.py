"""Candidates (configurations with their replicates) and the pools of test images on which they can be compared.

A candidate is a configuration together with a stage: either the stage that each run ships, or a stage given by name.
Runs that differ only in seed, fold or split are its replicates. A winner is chosen among candidates, never among seeds.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from pylorus.core.formatting import join_names
from pylorus.evaluation.confusion import overall_indices
from pylorus.evaluation.index_intervals import ClassProportions, proportions_of_predictions
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.predictions import Predictions, align_predictions, concat_predictions
from pylorus.evaluation.replicates import (
    ReplicateIndices,
    ReplicateSummary,
    compute_replicate_indices,
    ensure_interval_width,
    estimate_replicates,
    summarize_replicates,
)
from pylorus.report.captions import set_run_labels
from pylorus.report.results import (
    CONFIDENCE,
    ComparableResults,
    Result,
    compute_test_hash,
    format_stage_label,
)
from pylorus.runs.reading import MACHINE_KEYS, REPLICATE_KEYS, SavedRun, compute_configuration_key

SET, FOLDS, SPLITS = "set", "folds", "splits"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A configuration after one stage, with its replicates.

    Attributes:
        label: Name in tables and figures.
        configuration: Label of the configuration, without the stage.
        stage: Name of the stage; several names joined by "or" where runs ship different stages.
        results: One result per replicate, in the order of the runs.
        tests: Hash of the test set of each result, from `compute_test_hash`.
    """

    label: str
    configuration: str
    stage: str
    results: tuple[Result, ...]
    tests: tuple[str, ...]

    @property
    def kind(self) -> str:
        """`set`: a single test set; `folds`: disjoint test sets; `splits`: several test sets that overlap."""
        if len(set(self.tests)) == 1:
            return SET
        return FOLDS if self._fold_rounds else SPLITS

    @property
    def rounds(self) -> tuple[tuple[Result, ...], ...]:
        """Groups of results that test the same images exactly once: one per replicate, or one per repeat of the folds.

        Repeats with missing folds are excluded if other repeats are complete. Repeated splits have no rounds, because
        their test sets differ.
        """
        return tuple((result,) for result in self.results) if self.kind == SET else self._fold_rounds

    @cached_property
    def _fold_rounds(self) -> tuple[tuple[Result, ...], ...]:
        if any(get_fold(result) is None for result in self.results):
            return ()
        repeats: dict[tuple[object, ...], dict[str, Result]] = {}
        for result in self.results:
            setting = result.run.get_setting
            repeat = (setting("seed"), setting("data.split_seed"), setting("data.split_file"))
            repeats.setdefault(repeat, {}).setdefault(str(get_fold(result)), result)
        rounds = [tuple(by_fold.values()) for by_fold in repeats.values()]
        rounds = [results for results in rounds if _is_disjoint(results)]
        if not rounds:
            return ()
        largest = max(rounds, key=_count_images)
        images = _collect_sample_names(largest)
        return tuple(results for results in rounds if _collect_sample_names(results) == images)

    @cached_property
    def round_predictions(self) -> tuple[Predictions, ...]:
        """Predictions of each round, with images and classes in the order of the first round."""
        tables = [concat_predictions([result.test.predictions for result in results]) for results in self.rounds]
        return tuple(tables[:1] + [align_predictions(tables[0], table) for table in tables[1:]])

    @cached_property
    def by_test(self) -> dict[str, tuple[Result, ...]]:
        """Results by the hash of their test set; for folds, only the results that belong to a round."""
        in_rounds = (
            {result for results in self.rounds for result in results} if self.kind == FOLDS else set(self.results)
        )
        by_test: dict[str, list[Result]] = {}
        for result, test in zip(self.results, self.tests, strict=True):
            if result in in_rounds:
                by_test.setdefault(test, []).append(result)
        return {test: tuple(results) for test, results in by_test.items()}

    @property
    def results_used(self) -> tuple[Result, ...]:
        """Results on which the reported figures are based."""
        return tuple(result for results in self.by_test.values() for result in results)

    @property
    def incomplete_repeats(self) -> tuple[Result, ...]:
        """Results of repeats with missing folds, excluded because other repeats have these folds."""
        used = set(self.results_used)
        return tuple(result for result in self.results if result not in used)

    def filter_tests(self, tests: frozenset[str]) -> "Candidate":
        """Return the candidate reduced to the results on the given test sets."""
        pairs = [(result, test) for result, test in zip(self.results, self.tests, strict=True) if test in tests]
        results, names = tuple(result for result, _ in pairs), tuple(test for _, test in pairs)
        return replace(self, results=results, tests=names)

    @property
    def replicates(self) -> int:
        """Number of training runs."""
        return len(self.results)

    @property
    def fold_count(self) -> int:
        """Number of folds in a complete cross-validation."""
        return int(self.results[0].run.get_setting("data.folds", len(self.by_test)))

    @property
    def is_complete(self) -> bool:
        """Whether every round has all its folds; always true without folds."""
        return self.kind != FOLDS or all(len(each) == self.fold_count for each in self.rounds)

    @property
    def replicate_text(self) -> str:
        """Number and kind of replicates, such as "3 seeds"; empty for a single run."""
        if self.replicates == 1:
            return ""
        if self.kind == SET:
            return f"{self.replicates} {'seeds' if _has_distinct_seeds(self.results) else 'runs'}"
        if self.kind == SPLITS:
            splits = len(self.by_test)
            return f"{splits} splits" + (f", {self.replicates} runs" if self.replicates > splits else "")
        folds = len(self.rounds[0]) if self.rounds else len(self.by_test)
        return f"{folds} folds" + (f", {len(self.rounds)} times" if len(self.rounds) > 1 else "")

    @cached_property
    def exact_accuracy(self) -> Fraction:
        """Exact accuracy: the mean over the runs of each test set, weighted by its number of images."""
        correct = total = Fraction(0)
        for results in self.by_test.values():
            correct += Fraction(sum(result.images.shares.accuracy.successes for result in results), len(results))
            total += results[0].images.shares.accuracy.total
        return correct / total

    @cached_property
    def shares(self) -> ClassProportions | None:
        """Proportions of each class if every image was tested once: by one run, or in the folds of one repeat."""
        if self.kind == SET and self.replicates == 1:
            return self.results[0].images.shares
        if len(self.round_predictions) != 1:
            return None
        (pooled,) = self.round_predictions
        return proportions_of_predictions(
            pooled.true, pooled.predicted, pooled.group, classes=pooled.classes, confidence=CONFIDENCE
        )

    @cached_property
    def accuracy(self) -> Estimate:
        """Accuracy with an interval that allows for patients and, where several runs share a test set, for seeds."""
        if self.shares is not None:
            return self.shares.accuracy
        if not self.round_predictions:
            return Estimate(float(self.exact_accuracy), float("nan"), float("nan"))
        estimate = self.estimate_index(0)
        if self.kind == SET:
            return ensure_interval_width(estimate, [result.images.shares.accuracy for result in self.results])
        return ensure_interval_width(
            estimate,
            [
                proportions_of_predictions(
                    table.true, table.predicted, table.group, classes=table.classes, confidence=CONFIDENCE
                ).accuracy
                for table in self.round_predictions
            ],
        )

    def estimate_index(self, position: int, *, lowest: float = 0.0) -> Estimate:
        """Estimate the mean of an index over the rounds, with an interval that allows for patients and for seeds.

        Args:
            position: Position of the index in `INDICES`.
            lowest: Lowest value that the index can take.
        """
        indices, rounds = self.round_indices, len(self.round_predictions)
        return estimate_replicates(
            indices.values[:, position],
            indices.covariance[position],
            degrees=indices.count_freedom(position, np.full(rounds, 1 / rounds)),
            bounds=(lowest, 1.0),
            confidence=CONFIDENCE,
        )

    @cached_property
    def round_indices(self) -> ReplicateIndices:
        """Accuracy, macro F1 and the other overall indices of each round, with their covariance over patients."""
        first = self.round_predictions[0]
        predicted = np.array([table.predicted for table in self.round_predictions])
        return compute_replicate_indices(first.true, predicted, first.group, classes=first.classes)

    @property
    def accuracies(self) -> ReplicateSummary:
        """Summary of the test accuracy over the runs."""
        return summarize_replicates(np.array([result.images.shares.accuracy.value for result in self.results_used]))

    @property
    def validation(self) -> ReplicateSummary | None:
        """Summary of the validation accuracy over the runs; None if a run has no validation predictions."""
        accuracies = [result.validation_accuracy for result in self.results_used]
        values = [accuracy.value for accuracy in accuracies if accuracy is not None]
        return summarize_replicates(np.array(values)) if values and len(values) == len(accuracies) else None

    @property
    def representative(self) -> Result:
        """Replicate with the median validation accuracy (the lower of two); the first one without validation."""
        results = list(self.results_used)
        if self.validation is None:
            return results[0]
        order = sorted(
            results, key=lambda result: result.validation_accuracy.value if result.validation_accuracy else 0
        )
        return order[(len(order) - 1) // 2]


@dataclass(frozen=True, eq=False)
class Configuration:
    """A configuration with its runs.

    Attributes:
        label: Name in tables and figures.
        shipped: Candidate of the stage that each run ships.
        stages: One candidate per stage, in order; includes `shipped` if all runs ship the same stage.
        repeated: Runs with the seed and split of another run; such runs count only once.
        unfinished: Runs that did not test all their stages; not replicates of `shipped` if other runs tested all.
    """

    label: str
    shipped: Candidate
    stages: tuple[Candidate, ...]
    repeated: tuple[SavedRun, ...]
    unfinished: tuple[SavedRun, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The stages, followed by the shipped candidate if the runs ship different stages."""
        return self.stages if self.shipped in self.stages else (*self.stages, self.shipped)

    def filter_tests(self, tests: frozenset[str]) -> "Configuration":
        """Return the configuration reduced to the results on the given test sets."""
        stages = {each: each.filter_tests(tests) for each in self.stages if tests & set(each.tests)}
        shipped = stages.get(self.shipped) or self.shipped.filter_tests(tests)
        return replace(self, shipped=shipped, stages=tuple(stages.values()))


@dataclass(frozen=True, eq=False)
class Pool:
    """Configurations whose candidates were tested on the same images and can therefore be compared.

    Attributes:
        kind: `set`, `folds` or `splits`; see `Candidate.kind`.
        configurations: At least one.
        is_restricted: Whether folds were excluded because not every configuration was tested on them.
    """

    kind: str
    configurations: tuple[Configuration, ...]
    is_restricted: bool = False

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Candidates among which a winner is chosen: each configuration as shipped, or the stages of a single one."""
        if len(self.configurations) > 1:
            return tuple(each.shipped for each in self.configurations)
        only = self.configurations[0]
        return only.stages if only.shipped in only.stages else (only.shipped, *only.stages)

    @property
    def first(self) -> Candidate:
        """The shipped candidate of the first configuration, for properties that all candidates share."""
        return self.configurations[0].shipped

    @property
    def images(self) -> int:
        """Number of test images; for repeated splits, an image counts once per split in which it is tested."""
        return sum(results[0].test.images for results in self.first.by_test.values())

    @property
    def scope_text(self) -> str:
        """Phrase that says on which test images a statement holds."""
        if self.is_restricted:
            return f"on the pooled test images of the {len(self.first.by_test)} folds common to all configurations"
        if self.kind == FOLDS:
            return "on the pooled test images of these folds"
        return "across these splits" if self.kind == SPLITS else "on this test set"

    def select_same_test(self, result: Result) -> ComparableResults:
        """Return all results of the pool that have the test images of the given result."""
        key = compute_test_hash(result)
        results = dict.fromkeys(
            candidate_result
            for configuration in self.configurations
            for stage in configuration.stages
            for candidate_result, test in zip(stage.results, stage.tests, strict=True)
            if test == key
        )
        return ComparableResults(tuple(results))


def group_by_configuration(results: Sequence[Result]) -> tuple[Configuration, ...]:
    """Group results by the configuration of their run, in the order of the first run of each configuration."""
    runs = list(dict.fromkeys(result.run for result in results))
    by_key: dict[str, list[SavedRun]] = {}
    for run in runs:
        assert run.split is not None  # it has results
        by_key.setdefault(compute_configuration_key(run.config, run.split), []).append(run)
    firsts = [group[0] for group in by_key.values()]
    if len(firsts) < len(runs):
        labels = [run.label for run in set_run_labels(firsts, left_out=(*REPLICATE_KEYS, *MACHINE_KEYS))]
    else:
        labels = [run.label for run in firsts]
    tests = {result: compute_test_hash(result) for result in results}
    return tuple(
        _build_configuration(label, group, results, tests) for label, group in zip(labels, by_key.values(), strict=True)
    )


def group_into_pools(configurations: Sequence[Configuration]) -> tuple[Pool, ...]:
    """Group configurations by the images that they were tested on, in the order of the first configuration of each.

    Configurations that lack different folds of the same cross-validation are compared on the folds that all of them
    have; a configuration that lacks more than half of the folds gets a pool of its own.
    """
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for each in configurations:
        groups.setdefault(_compute_pool_key(each.shipped), []).append(each)
    pools: list[Pool] = []
    remaining = [Pool(group[0].shipped.kind, tuple(group)) for group in groups.values()]
    while remaining:
        pool = remaining.pop(0)
        related = [other for other in remaining if pool.kind == other.kind == FOLDS and _has_common_folds(pool, other)]
        joined = _join_folds([pool, *related]) if related else None
        pools.append(joined or pool)
        remaining = [other for other in remaining if joined is None or other not in related]
    return tuple(pools)


def format_pool_notes(pools: Sequence[Pool], configurations: Sequence[Configuration]) -> tuple[str, ...]:
    """Explain which configurations are not compared and why, which lack folds, and which runs count only once."""
    sentences = []
    for pool in pools:
        if pool.kind == FOLDS:
            folds = len(pool.first.by_test)
            sentences.append(
                f"The runs of {_join_configuration_labels(pool)} form a cross-validation: each of {folds} disjoint "
                f"folds was tested with a model trained without it. The tables of pooled folds give the joint results."
            )
            if pool.is_restricted:
                sentences.append(f"They are compared on the {folds} folds that all of them were tested on.")
    for each in configurations:
        shipped = each.shipped
        if not shipped.is_complete:
            lengths = " and ".join(dict.fromkeys(str(len(results)) for results in shipped.rounds))
            sentences.append(f"INCOMPLETE: {each.label} was tested on {lengths} of {shipped.fold_count} folds.")
        if shipped.incomplete_repeats:
            names = ", ".join(result.run.label for result in shipped.incomplete_repeats)
            sentences.append(
                f"{names}: excluded from the pooled folds because this repeat lacks folds that another repeat has."
            )
        if each.unfinished:
            names = ", ".join(run.label for run in each.unfinished)
            sentences.append(
                f"{names}: not counted as a replicate of {shipped.label} because not all stages were tested."
            )
        if each.repeated:
            names = ", ".join(run.label for run in each.repeated)
            sentences.append(
                f"{names}: same configuration, seed and split as another run in this report; such runs count only once."
            )
    first = pools[0] if pools else None
    for other in pools[1:]:
        assert first is not None
        sentences.append(
            f"{_join_configuration_labels(other)} and {_join_configuration_labels(first)} are not compared in pairs: "
            f"{_explain_separation(other, first)}. Splits {_format_split_hashes(other)} and "
            f"{_format_split_hashes(first)}."
        )
    return tuple(sentences)


def get_fold(result: Result) -> object:
    """Return the fold on which a result was tested (data.fold); None without folds."""
    return result.run.get_setting("data.fold")


def compute_overall_index(result: Result, name: str) -> float:
    """Compute an index on the test images of a result; its name is one of `pylorus.evaluation.comparison.INDICES`."""
    return float(getattr(overall_indices(result.images.confusion), name))


def compute_test_train_ratio(candidate: Candidate) -> float:
    """Compute the ratio of test images to training images over all runs."""
    splits = [result.run.split for result in candidate.results_used if result.run.split is not None]
    return sum(len(split.get_split_rows("test")) for split in splits) / max(
        1, sum(len(split.get_split_rows("train")) for split in splits)
    )


def _build_configuration(
    label: str, runs: Sequence[SavedRun], results: Sequence[Result], tests: dict[Result, str]
) -> Configuration:
    distinct: dict[tuple[object, ...], SavedRun] = {}
    repeated = []
    for run in runs:
        digest = run.split.sha256 if run.split is not None else None
        if distinct.setdefault((run.get_setting("seed"), digest), run) is not run:
            repeated.append(run)
    own = [result for result in results if result.run in distinct.values()]

    def build_candidate(is_included: Callable[[Result], bool]) -> Candidate:
        included = tuple(result for result in own if is_included(result))
        names = list(dict.fromkeys(result.stage.name for result in included))
        return Candidate(
            format_stage_label(label, names[0]) if len(names) == 1 else f"{label} as shipped ({' or '.join(names)})",
            label,
            " or ".join(names),
            included,
            tuple(tests[result] for result in included),
        )

    stages = {
        name: build_candidate(lambda result, name=name: result.stage.name == name)  # type: ignore[misc]
        for name in dict.fromkeys(result.stage.name for result in own)
    }
    unfinished = [run for run in distinct.values() if len(run.complete_stages) < len(run.stages)]
    if len(unfinished) == len(distinct):
        unfinished = []
    shipped = build_candidate(lambda result: result.is_shipped and result.run not in unfinished)
    shipped = next((each for each in stages.values() if each.results == shipped.results), shipped)
    return Configuration(label, shipped, tuple(stages.values()), tuple(repeated), tuple(unfinished))


def _has_common_folds(first: Pool, second: Pool) -> bool:
    first_tests, second_tests = set(first.first.by_test), set(second.first.by_test)
    common = len(first_tests & second_tests)
    return 2 * common >= len(first_tests | second_tests) and common > 1


def _join_folds(pools: Sequence[Pool]) -> Pool | None:
    """Reduce configurations with missing folds to the folds that all of them have; None if fewer than two remain."""
    configurations = [each for pool in pools for each in pool.configurations]
    tests = frozenset.intersection(*(frozenset(each.shipped.by_test) for each in configurations))
    restricted = [each.filter_tests(tests) for each in configurations]
    if len(tests) < 2 or len({_compute_pool_key(each.shipped) for each in restricted}) > 1:
        return None
    return Pool(FOLDS, tuple(restricted), is_restricted=True)


def _join_configuration_labels(pool: Pool) -> str:
    return join_names([each.label for each in pool.configurations])


def _format_split_hashes(pool: Pool) -> str:
    """Return the short split hashes of a pool's first configuration; beyond three, the rest is counted."""
    splits = list(dict.fromkeys(result.split for result in pool.first.results))
    return ", ".join(splits) if len(splits) < 4 else f"{', '.join(splits[:2])} and {len(splits) - 2} others"


def _explain_separation(first: Pool, second: Pool) -> str:
    if first.kind != second.kind or first.kind == SPLITS:
        return "they were not tested on the same subsets of the images"
    try:
        align_predictions(first.first.round_predictions[0], second.first.round_predictions[0])
    except ValueError as error:
        return str(error)
    return "the images are divided into folds differently"


def _compute_pool_key(candidate: Candidate) -> tuple[object, ...]:
    if candidate.kind != FOLDS:
        return (candidate.kind, *sorted(set(candidate.tests)))
    predictions = candidate.round_predictions[0]
    order = np.argsort(predictions.sample)
    truth = np.array(predictions.class_names)[predictions.true[order]]
    columns = (predictions.sample[order], np.asarray(predictions.group)[order], truth)
    content = "\n".join("\t".join(map(str, column.tolist())) for column in columns)
    # Other folds may test the same images in total, but they divide them differently: no fold-by-fold comparison.
    return (candidate.kind, hashlib.sha256(content.encode()).hexdigest(), *sorted(candidate.by_test))


def _is_disjoint(results: Sequence[Result]) -> bool:
    names = Counter(name for result in results for name in result.test.predictions.sample.tolist())
    return max(names.values()) == 1


def _count_images(results: Sequence[Result]) -> int:
    return sum(result.test.images for result in results)


def _collect_sample_names(results: Sequence[Result]) -> frozenset[str]:
    return frozenset(name for result in results for name in result.test.predictions.sample.tolist())


def _has_distinct_seeds(results: Sequence[Result]) -> bool:
    return len({result.run.get_setting("seed") for result in results}) == len(results)
