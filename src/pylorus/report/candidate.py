"""Candidates: configurations with their replicates, and the pools of test images on which they may be compared.

A candidate is a configuration together with a stage: the one that each run ships, or one by its name. Runs that differ
in nothing but seed, fold or split are its replicates. A winner is chosen among candidates, never among seeds.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from pylorus.evaluation.confusion import overall_indices
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.predictions import Predictions, aligned
from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.evaluation.replicates import (
    ReplicateIndices,
    ReplicateSummary,
    estimate_replicates,
    indices_of_replicates,
    summarize_replicates,
)
from pylorus.report.labels import labelled
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.same_test import SameTest, name_test
from pylorus.report.saved_run import SavedRun
from pylorus.report.saved_split import SavedSplit, name_of_images

REPLICATE_KEYS = ("seed", "data.fold", "data.split_seed", "data.split_file")
"""Keys in which replicates of one configuration may differ."""

MACHINE_KEYS = (
    "report",
    "cache",
    "logger",
    "data.root",
    "data.workers",
    "trainer.accelerator",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.devices",
    "trainer.nodes",
    "trainer.progress",
    "trainer.strategy",
    "trainer.threads",
)
"""Keys and groups that say where and how fast a run computes; they change its result by rounding at most.

The precision and the batch size are no such keys: they change what is learnt. Images are told by their content.
"""

SET, FOLDS, SPLITS = "set", "folds", "splits"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A configuration after one stage, with its replicates.

    Attributes:
        label: What tables and figures call it.
        configuration: The same without the stage.
        stage: Name of the stage; several names joined by "or" where runs ship different ones.
        results: One for each replicate, in the order of the runs.
        tests: What each result was tested on, by `name_test`.
    """

    label: str
    configuration: str
    stage: str
    results: tuple[Result, ...]
    tests: tuple[str, ...]

    @property
    def kind(self) -> str:
        """`set`: one set of test images; `folds`: parts that are tested once each; `splits`: several that overlap."""
        if len(set(self.tests)) == 1:
            return SET
        return FOLDS if self._fold_rounds else SPLITS

    @property
    def rounds(self) -> tuple[tuple[Result, ...], ...]:
        """Results that together test the same images once: each replicate of a test set, each repeat of the folds.

        Repeats that lack folds are left out where others have them. Of repeated splits none test the same images.
        """
        return tuple((result,) for result in self.results) if self.kind == SET else self._fold_rounds

    @cached_property
    def _fold_rounds(self) -> tuple[tuple[Result, ...], ...]:
        if any(fold_of(result) is None for result in self.results):
            return ()
        repeats: dict[tuple[object, ...], dict[str, Result]] = {}
        for result in self.results:
            setting = result.run.setting
            repeat = (setting("seed"), setting("data.split_seed"), setting("data.split_file"))
            repeats.setdefault(repeat, {}).setdefault(str(fold_of(result)), result)
        rounds = [tuple(by_fold.values()) for by_fold in repeats.values()]
        rounds = [each for each in rounds if _are_disjoint(each)]
        if not rounds:
            return ()
        largest = max(rounds, key=_count_images)
        images = _sample_names(largest)
        return tuple(each for each in rounds if _sample_names(each) == images)

    @cached_property
    def pooled(self) -> tuple[Predictions, ...]:
        """The predictions of each round, images and classes in the order of the first."""
        tables = [pool_predictions([result.test.predictions for result in each]) for each in self.rounds]
        return tuple(tables[:1] + [aligned(tables[0], table) for table in tables[1:]])

    @cached_property
    def by_test(self) -> dict[str, tuple[Result, ...]]:
        """The results by what they were tested on; of folds those of the rounds alone."""
        in_rounds = {result for each in self.rounds for result in each} if self.kind == FOLDS else set(self.results)
        by_test: dict[str, list[Result]] = {}
        for result, test in zip(self.results, self.tests, strict=True):
            if result in in_rounds:
                by_test.setdefault(test, []).append(result)
        return {test: tuple(results) for test, results in by_test.items()}

    @property
    def results_used(self) -> tuple[Result, ...]:
        """The results that its figures rest on."""
        return tuple(result for results in self.by_test.values() for result in results)

    @property
    def left_out(self) -> tuple[Result, ...]:
        """Results of repeats that lack folds, where other repeats have them."""
        used = set(self.results_used)
        return tuple(result for result in self.results if result not in used)

    def restrict(self, tests: frozenset[str]) -> "Candidate":
        """The candidate with those results alone that were tested on some sets of images."""
        pairs = [(result, test) for result, test in zip(self.results, self.tests, strict=True) if test in tests]
        results, names = tuple(result for result, _ in pairs), tuple(test for _, test in pairs)
        return replace(self, results=results, tests=names)

    @property
    def replicates(self) -> int:
        """How many runs it was trained in."""
        return len(self.results)

    @property
    def wanted_folds(self) -> int:
        """How many folds make a whole."""
        return int(self.results[0].run.setting("data.folds", len(self.by_test)))

    @property
    def is_complete(self) -> bool:
        """Whether no fold of a round is missing; always so without folds."""
        return self.kind != FOLDS or all(len(each) == self.wanted_folds for each in self.rounds)

    @property
    def replicate_words(self) -> str:
        """What its replicates are, such as "3 seeds"; empty for a single run."""
        if self.replicates == 1:
            return ""
        if self.kind == SET:
            return f"{self.replicates} {'seeds' if _differ_in_seed(self.results) else 'runs'}"
        if self.kind == SPLITS:
            splits = len(self.by_test)
            return f"{splits} splits" + (f", {self.replicates} runs" if self.replicates > splits else "")
        folds = len(self.rounds[0]) if self.rounds else len(self.by_test)
        return f"{folds} folds" + (f", {len(self.rounds)} times" if len(self.rounds) > 1 else "")

    @cached_property
    def share(self) -> Fraction:
        """Share of the test images recognised, exactly: each test set's mean over its runs, weighted by its images."""
        right = total = Fraction(0)
        for results in self.by_test.values():
            right += Fraction(sum(result.images.shares.accuracy.successes for result in results), len(results))
            total += results[0].images.shares.accuracy.total
        return right / total

    @cached_property
    def accuracy(self) -> Estimate:
        """That share with its interval: for patients, and for seeds where several saw the same test images."""
        if self.kind == SET and self.replicates == 1:
            return self.results[0].images.shares.accuracy
        if not self.pooled:
            return Estimate(float(self.share), float("nan"), float("nan"))
        first = self.pooled[0]
        shares = proportions_of_predictions(
            first.true, first.predicted, first.group, classes=first.classes, confidence=CONFIDENCE
        )
        if len(self.pooled) == 1:
            return shares.accuracy
        estimate = self.estimate_index(0)
        if self.kind == SET:
            return widen(estimate, [result.images.shares.accuracy for result in self.results])
        return widen(
            estimate,
            [
                proportions_of_predictions(
                    each.true, each.predicted, each.group, classes=each.classes, confidence=CONFIDENCE
                ).accuracy
                for each in self.pooled
            ],
        )

    def estimate_index(self, place: int, *, lowest: float = 0.0) -> Estimate:
        """Mean of an index over the rounds, by its place in `INDICES`, allowing for patients and for seeds."""
        indices, rounds = self.round_indices, len(self.pooled)
        return estimate_replicates(
            indices.values[:, place],
            indices.covariance[place],
            degrees=indices.count_freedom(place, np.full(rounds, 1 / rounds)),
            bounds=(lowest, 1.0),
            confidence=CONFIDENCE,
        )

    @cached_property
    def round_indices(self) -> ReplicateIndices:
        """Accuracy, macro F1 and their like of each round, and how they vary with the patients."""
        first = self.pooled[0]
        answers = np.array([each.predicted for each in self.pooled])
        return indices_of_replicates(first.true, answers, first.group, classes=first.classes)

    @property
    def accuracies(self) -> ReplicateSummary:
        """Test accuracy over its runs."""
        return summarize_replicates(np.array([result.images.shares.accuracy.value for result in self.results_used]))

    @property
    def validation(self) -> ReplicateSummary | None:
        """Validation accuracy over its runs; None where one has no validation predictions."""
        accuracies = [result.validation_accuracy for result in self.results_used]
        values = [each.value for each in accuracies if each is not None]
        return summarize_replicates(np.array(values)) if values and len(values) == len(accuracies) else None

    @property
    def representative(self) -> Result:
        """The replicate of median validation accuracy, of two the lower; the first where there is no validation."""
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
        label: What tables and figures call it.
        shipped: The candidate of the stage that each run ships.
        stages: A candidate for each stage, in their order; `shipped` is one of them where all runs ship the same.
        repeated: Runs that repeat another of the same seed and split, which count once.
        unfinished: Runs that did not test all their stages, which are no replicates of `shipped` where others did.
    """

    label: str
    shipped: Candidate
    stages: tuple[Candidate, ...]
    repeated: tuple[SavedRun, ...]
    unfinished: tuple[SavedRun, ...]

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Its stages, and what its runs ship where they ship different stages."""
        return self.stages if self.shipped in self.stages else (*self.stages, self.shipped)

    def restrict(self, tests: frozenset[str]) -> "Configuration":
        """The configuration with those results alone that were tested on some sets of images."""
        stages = {each: each.restrict(tests) for each in self.stages if tests & set(each.tests)}
        shipped = stages.get(self.shipped) or self.shipped.restrict(tests)
        return replace(self, shipped=shipped, stages=tuple(stages.values()))


@dataclass(frozen=True, eq=False)
class Pool:
    """Configurations whose candidates were tested on the same images, so that they may be compared.

    Attributes:
        kind: `set`, `folds` or `splits`, as of a candidate.
        configurations: At least one.
        is_restricted: Whether folds were left out that not every configuration was tested on.
    """

    kind: str
    configurations: tuple[Configuration, ...]
    is_restricted: bool = False

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Among what a winner is chosen: what each configuration ships; of a single one its stages."""
        if len(self.configurations) > 1:
            return tuple(each.shipped for each in self.configurations)
        only = self.configurations[0]
        return only.stages if only.shipped in only.stages else (only.shipped, *only.stages)

    @property
    def first(self) -> Candidate:
        """The first configuration's candidate, for what all share."""
        return self.configurations[0].shipped

    @property
    def images(self) -> int:
        """How many test images there are; of repeated splits, how many tests of images."""
        return sum(results[0].test.images for results in self.first.by_test.values())

    @property
    def place(self) -> str:
        """Where something is shown: on what."""
        if self.is_restricted:
            return f"on the pooled test images of the {len(self.first.by_test)} folds that all were tested on"
        if self.kind == FOLDS:
            return "on the pooled test images of these folds"
        return "over these splits" if self.kind == SPLITS else "on this test set"

    def same_test(self, result: Result) -> SameTest:
        """All results of the pool on the test images of one of them."""
        key = name_test(result)
        results = dict.fromkeys(
            other
            for each in self.configurations
            for stage in each.stages
            for other, test in zip(stage.results, stage.tests, strict=True)
            if test == key
        )
        return SameTest(tuple(results))


def configurations_of(results: Sequence[Result]) -> tuple[Configuration, ...]:
    """Sorts results by the configuration of their run, in the order of the first run of each."""
    runs = list(dict.fromkeys(result.run for result in results))
    by_key: dict[str, list[SavedRun]] = {}
    for run in runs:
        assert run.split is not None  # it has results
        by_key.setdefault(configuration_key(run.config, run.split), []).append(run)
    firsts = [group[0] for group in by_key.values()]
    if len(firsts) < len(runs):
        named = labelled(firsts, untold=(*REPLICATE_KEYS, *MACHINE_KEYS))
        labels = [run.label for run in named]
    else:
        labels = [run.label for run in firsts]
    tests = {result: name_test(result) for result in results}
    return tuple(
        _configuration(label, group, results, tests) for label, group in zip(labels, by_key.values(), strict=True)
    )


def pools_of(configurations: Sequence[Configuration]) -> tuple[Pool, ...]:
    """Sorts configurations by the images that they were tested on, in the order of the first of each.

    Where configurations lack different folds of the same parts, they are compared on the folds that all have; one that
    lacks more than half of them stands by itself.
    """
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for each in configurations:
        groups.setdefault(_pool_key(each.shipped), []).append(each)
    pools: list[Pool] = []
    waiting = [Pool(group[0].shipped.kind, tuple(group)) for group in groups.values()]
    while waiting:
        pool = waiting.pop(0)
        related = [other for other in waiting if pool.kind == other.kind == FOLDS and _have_common_folds(pool, other)]
        joined = _join_folds([pool, *related]) if related else None
        pools.append(joined or pool)
        waiting = [other for other in waiting if joined is None or other not in related]
    return tuple(pools)


def describe_pools(pools: Sequence[Pool], configurations: Sequence[Configuration]) -> tuple[str, ...]:
    """Which configurations are not compared and why, which lack folds, and which runs count once."""
    sentences = []
    for pool in pools:
        if pool.kind == FOLDS:
            parts = len(pool.first.by_test)
            sentences.append(
                f"The runs of {_name_all(pool)} are folds: they test {parts} different parts of the images, each by a "
                "model that was trained without it; the tables of pooled folds say what they show together."
            )
            if pool.is_restricted:
                sentences.append(f"They are compared on the {parts} folds that all of them were tested on.")
    for each in configurations:
        shipped = each.shipped
        if not shipped.is_complete:
            lengths = " and ".join(dict.fromkeys(str(len(folds)) for folds in shipped.rounds))
            sentences.append(f"INCOMPLETE: of {each.label} {lengths} of {shipped.wanted_folds} folds were tested.")
        if shipped.left_out:
            names = ", ".join(result.run.label for result in shipped.left_out)
            sentences.append(
                f"{names}: left out of the pooled folds, since that repeat lacks folds that another one has."
            )
        if each.unfinished:
            names = ", ".join(run.label for run in each.unfinished)
            sentences.append(
                f"{names}: not among the runs of {shipped.label}, since not all of its stages were tested."
            )
        if each.repeated:
            names = ", ".join(run.label for run in each.repeated)
            sentences.append(f"{names}: configuration, seed and split of another run reported here, so it counts once.")
    first = pools[0] if pools else None
    for other in pools[1:]:
        assert first is not None
        sentences.append(
            f"{_name_all(other)} and {_name_all(first)} are not compared pair by pair: {_why_apart(other, first)}. "
            f"Splits {_cite_splits(other)} and {_cite_splits(first)}."
        )
    return tuple(sentences)


def configuration_key(config: DictConfig, split: SavedSplit) -> str:
    """A name of a configuration: what is left without the keys that replicates and machines differ in.

    Images are told by their content; those of folds, whose runs need not hold the same ones, by their root. Whether
    there are folds counts, which of them does not.
    """
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    folds = OmegaConf.select(config, "data.fold", default=None) is not None
    root = OmegaConf.select(config, "data.root", default=None)
    images = str(root) if folds else name_of_images(set(split.table["sha256"]))
    settings = _without(plain, "", (*REPLICATE_KEYS, *MACHINE_KEYS))
    return json.dumps([settings, folds, images], sort_keys=True, default=str)


def widen(mean: Estimate, singles: Sequence[Estimate]) -> Estimate:
    """An interval of a mean that is on neither side narrower than those of its replicates are on average.

    Where replicates make hardly a mistake, their spread says little, and the interval of each single one more.
    """
    if not all(each.has_interval for each in singles):
        return mean
    below = float(np.mean([each.value - each.low for each in singles]))
    above = float(np.mean([each.high - each.value for each in singles]))
    low, high = mean.value - below, mean.value + above
    if mean.has_interval:
        low, high = min(low, mean.low), max(high, mean.high)
    return Estimate(mean.value, low, high)


def fold_of(result: Result) -> object:
    """The fold that a result was tested on, as its configuration has it; None without folds."""
    return result.run.setting("data.fold")


def index_of(result: Result, name: str) -> float:
    """An index of a result's test images by its name in `pylorus.evaluation.comparison.INDICES`."""
    return float(getattr(overall_indices(result.images.confusion), name))


def test_to_train(candidate: Candidate) -> float:
    """Test images for each training image, over all its runs."""
    splits = [result.run.split for result in candidate.results_used if result.run.split is not None]
    return sum(len(split.part("test")) for split in splits) / max(1, sum(len(split.part("train")) for split in splits))


def pool_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of disjoint sets of images as those of one set."""
    return Predictions(
        sample=np.concatenate([part.sample for part in parts]),
        group=np.concatenate([np.asarray(part.group) for part in parts]),
        true=np.concatenate([part.true for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        class_names=parts[0].class_names,
    )


def _configuration(
    label: str, runs: Sequence[SavedRun], results: Sequence[Result], tests: dict[Result, str]
) -> Configuration:
    distinct: dict[tuple[object, ...], SavedRun] = {}
    repeated = []
    for run in runs:
        digest = run.split.sha256 if run.split is not None else None
        if distinct.setdefault((run.setting("seed"), digest), run) is not run:
            repeated.append(run)
    own = [result for result in results if result.run in distinct.values()]

    def candidate(chosen: Callable[[Result], bool]) -> Candidate:
        chosen_results = tuple(result for result in own if chosen(result))
        names = list(dict.fromkeys(result.stage.name for result in chosen_results))
        return Candidate(
            f"{label} {names[0]}" if len(names) == 1 else f"{label} as shipped ({' or '.join(names)})",
            label,
            " or ".join(names),
            chosen_results,
            tuple(tests[result] for result in chosen_results),
        )

    stages = {
        name: candidate(lambda result, name=name: result.stage.name == name)  # type: ignore[misc]
        for name in dict.fromkeys(result.stage.name for result in own)
    }
    unfinished = [run for run in distinct.values() if len(run.finished_stages) < len(run.stages)]
    if len(unfinished) == len(distinct):
        unfinished = []
    shipped = candidate(lambda result: result.is_shipped and result.run not in unfinished)
    shipped = next((each for each in stages.values() if each.results == shipped.results), shipped)
    return Configuration(label, shipped, tuple(stages.values()), tuple(repeated), tuple(unfinished))


def _have_common_folds(one: Pool, other: Pool) -> bool:
    ours, theirs = set(one.first.by_test), set(other.first.by_test)
    return 2 * len(ours & theirs) >= len(ours | theirs) and len(ours & theirs) > 1


def _join_folds(pools: Sequence[Pool]) -> Pool | None:
    """Configurations of the same folds, some of which lack some, on the folds that all have; None if these are few."""
    configurations = [each for pool in pools for each in pool.configurations]
    tests = frozenset.intersection(*(frozenset(each.shipped.by_test) for each in configurations))
    restricted = [each.restrict(tests) for each in configurations]
    if len(tests) < 2 or len({_pool_key(each.shipped) for each in restricted}) > 1:
        return None
    return Pool(FOLDS, tuple(restricted), is_restricted=True)


def _name_all(pool: Pool) -> str:
    names = [each.label for each in pool.configurations]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cite_splits(pool: Pool) -> str:
    """The hashes of the splits of a pool's first configuration; beyond three they are counted."""
    splits = list(dict.fromkeys(result.split for result in pool.first.results))
    return ", ".join(splits) if len(splits) < 4 else f"{', '.join(splits[:2])} and {len(splits) - 2} others"


def _why_apart(one: Pool, other: Pool) -> str:
    if one.kind != other.kind or one.kind == SPLITS:
        return "they were not tested on the same parts of the images"
    try:
        aligned(one.first.pooled[0], other.first.pooled[0])
    except ValueError as error:
        return str(error)
    return "the folds are other parts of the images"


def _pool_key(candidate: Candidate) -> tuple[object, ...]:
    if candidate.kind != FOLDS:
        return (candidate.kind, *sorted(set(candidate.tests)))
    predictions = candidate.pooled[0]
    order = np.argsort(predictions.sample)
    truth = np.array(predictions.class_names)[predictions.true[order]]
    parts = (predictions.sample[order], np.asarray(predictions.group)[order], truth)
    content = "\n".join("\t".join(map(str, part.tolist())) for part in parts)
    # Folds of another cut test the same images, but are other parts of them: fold by fold they can't be compared.
    return (candidate.kind, hashlib.sha256(content.encode()).hexdigest(), *sorted(candidate.by_test))


def _without(values: dict[Any, Any], above: str, keys: Sequence[str]) -> dict[str, Any]:
    return {
        str(name): _without(value, f"{above}{name}.", keys) if isinstance(value, dict) else value
        for name, value in values.items()
        if f"{above}{name}" not in keys
    }


def _are_disjoint(results: Sequence[Result]) -> bool:
    names = Counter(name for result in results for name in result.test.predictions.sample.tolist())
    return max(names.values()) == 1


def _count_images(results: Sequence[Result]) -> int:
    return sum(result.test.images for result in results)


def _sample_names(results: Sequence[Result]) -> frozenset[str]:
    return frozenset(name for result in results for name in result.test.predictions.sample.tolist())


def _differ_in_seed(results: Sequence[Result]) -> bool:
    return len({result.run.setting("seed") for result in results}) == len(results)
