"""Pairs of candidates on the same test images: what differs, corrected by Holm's method within the question asked.

Two questions are asked, each a family of its own: whether the winner is better than each other configuration, and,
within a configuration, whether one stage is better than another. All other pairs are unadjusted and answer nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.comparison import (
    INDICES,
    Difference,
    McNemar,
    delong_test,
    holm,
    mcnemar,
    paired_differences,
    sign_flip_test,
)
from pylorus.evaluation.delong import covariance, structural_components
from pylorus.evaluation.interval import compute_satterthwaite_freedom
from pylorus.evaluation.predictions import Predictions, aligned
from pylorus.evaluation.replicates import (
    compare_replicates,
    corrected_resampled_t,
    indices_of_replicates,
    replicate_balance,
)
from pylorus.evaluation.sentence import better_sentence, p_text, percent
from pylorus.report.candidate import FOLDS, SET, SPLITS, Candidate, Pool, index_of, test_to_train
from pylorus.report.options import CONFIDENCE, LEVEL, ReportOptions
from pylorus.report.result import Result

UNDEFINED = Difference(math.nan, math.nan, math.nan, math.nan, math.nan)
ACCURACY, AUROC, MACRO_F1 = "accuracy", "auroc", "macro_f1"
F1_PLACE = INDICES.index("macro_f1")


@dataclass(frozen=True, eq=False)
class IndexComparison:
    """How two candidates differ in one index, first minus second.

    Attributes:
        patients: With the trained models as they are: other patients are the only chance; None where the index is not
            compared in this way (AUROC over models whose scores are not on one scale).
        training: Allowing for other seeds or other training sets as well, as far as there are several; None for a
            single pair of models.
    """

    patients: Difference | None
    training: Difference | None

    @property
    def p_value(self) -> float:
        """The larger of the two, since a claim about a configuration has to outlast both chances; nan if undefined."""
        values = [each.p_value for each in (self.patients, self.training) if each is not None]
        return max(values, default=math.nan) if not any(map(math.isnan, values)) else math.nan

    @property
    def widest(self) -> Difference:
        """The difference that allows for most, with the larger p and, at each end, the wider interval."""
        if self.training is None or self.patients is None:
            return self.training or self.patients or UNDEFINED
        low = float(np.fmin(self.training.low, self.patients.low))
        high = float(np.fmax(self.training.high, self.patients.high))
        return replace(self.training, low=low, high=high, p_value=self.p_value)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two candidates on the same test images; differences are first minus second.

    Attributes:
        first: The one.
        second: The other.
        pool: Where they were compared.
        images: McNemar's exact test of a single pair of models or of a single round of folds; None with several.
        accuracy: Share of test images recognised.
        macro_f1: Its like for all classes together.
        auroc: Of the class that the report asks about; None where the candidates do not know it.
        corrected: Each index's p after Holm's correction within the family: accuracy, auroc, macro_f1. Its own p in
            the appendix.
        family: How many tests each index was corrected for; 0 in the appendix, which is unadjusted.
        question: What the family asks; empty in the appendix.
    """

    first: Candidate
    second: Candidate
    pool: Pool
    images: McNemar | None
    accuracy: IndexComparison
    macro_f1: IndexComparison
    auroc: IndexComparison | None
    corrected: dict[str, float]
    family: int = 0
    question: str = ""

    @property
    def is_shown(self) -> bool:
        """Whether one is shown to recognise more images than the other; never in the appendix."""
        return self.family > 0 and self.corrected[ACCURACY] < LEVEL

    @property
    def sentence(self) -> str:
        """What is and what is not shown of accuracy."""
        corrected = self.corrected[ACCURACY]
        if self.images is not None and self.pool.kind == SET:
            return better_sentence(
                self.first.label,
                self.second.label,
                self.images,
                corrected_p=corrected if self.family > 1 else None,
                family=self.family,
                level=LEVEL,
                group_word="groups",
            )
        return _replicate_sentence(self)

    def of(self, candidate: Candidate, other: Candidate) -> bool:
        """Whether it compares these two, in either order."""
        return {candidate, other} == {self.first, self.second}


def compare_pair(
    first: Candidate, second: Candidate, pool: Pool, *, class_name: str | None, options: ReportOptions
) -> Comparison:
    """Compares two candidates of a pool, not yet corrected.

    One model each: McNemar by group, exchange of whole groups, DeLong. Several seeds: exact sign-flip test by group of
    the mean replicate, and the variance of Obuchowski and Rockette. Folds and splits: McNemar by group on the pooled
    decisions, and the corrected resampled t of Nadeau and Bengio over the folds.
    """
    knows = all(class_name in each.results[0].test.predictions.class_names for each in (first, second))
    single = len(first.pooled) == len(second.pooled) == 1
    paired = [result.run for result in first.results] == [result.run for result in second.results]
    images = None
    if single:
        images, accuracy, macro_f1 = _compare_single(first.pooled[0], second.pooled[0], options)
    elif pool.kind == SPLITS:
        accuracy, macro_f1 = _compare_tests_by_patient(first, second), None
    else:
        accuracy, macro_f1 = _compare_rounds(first.pooled, second.pooled, allow_for_seeds=False)
        accuracy = replace(accuracy, p_value=_flip(first.pooled, second.pooled))
    training: dict[str, Difference | None] = dict.fromkeys((ACCURACY, MACRO_F1, AUROC))
    if len(first.by_test) > 1:
        training |= _compare_over_tests(first, second, class_name if knows else None)
    elif pool.kind == SET and not single:
        training[ACCURACY], training[MACRO_F1] = _compare_rounds(
            first.pooled, second.pooled, allow_for_seeds=True, paired=paired
        )
    auroc = None
    if knows and pool.kind == SET:
        auroc = _compare_auroc(first.pooled, second.pooled, str(class_name), paired=paired)
    elif knows:
        auroc = IndexComparison(None, training[AUROC])
    comparison = Comparison(
        first,
        second,
        pool,
        images,
        IndexComparison(accuracy, training[ACCURACY]),
        IndexComparison(macro_f1, training[MACRO_F1]),
        auroc,
        corrected={},
    )
    return replace(comparison, corrected=_p_values(comparison))


def correct_family(
    comparisons: Sequence[Comparison], *, question: str, others: Sequence[Comparison] = ()
) -> tuple[Comparison, ...]:
    """Corrects the p-values of one question by Holm's method, each index by itself.

    Args:
        comparisons: The question's tests.
        question: What they ask.
        others: Tests that could have been the question's as well, since their images chose it; they are corrected for.

    Returns:
        The comparisons. A p that can't be told counts as 1 in its family, so that the family does not shrink.
    """
    if not comparisons:
        return ()
    every = [*comparisons, *others]
    corrected = {name: _holm([each.corrected[name] for each in every]) for name in (ACCURACY, AUROC, MACRO_F1)}
    return tuple(
        replace(
            each,
            corrected={name: values[place] for name, values in corrected.items()},
            family=len(every),
            question=question,
        )
        for place, each in enumerate(comparisons)
    )


def stage_pairs(pool: Pool) -> list[list[tuple[Candidate, Candidate]]]:
    """For each configuration of a pool the pairs of its stages on the pool's images, the later stage first."""
    return [
        [(later, earlier) for earlier, later in combinations(_on_images_of(pool, each.stages), 2)]
        for each in pool.configurations
    ]


def other_pairs(pool: Pool, in_question: Sequence[Comparison]) -> list[tuple[Candidate, Candidate]]:
    """Pairs that no question asks about: shipped candidates, and configurations after the same stage."""
    if len(pool.configurations) < 2:
        return []
    pairs = list(combinations(pool.candidates, 2))
    by_stage: dict[str, list[Candidate]] = {}
    for each in pool.configurations:
        for candidate in _on_images_of(pool, each.stages):
            by_stage.setdefault(candidate.stage, []).append(candidate)
    pairs += [pair for group in by_stage.values() for pair in combinations(group, 2) if pair not in pairs]
    return [pair for pair in pairs if not any(each.of(*pair) for each in in_question)]


def _on_images_of(pool: Pool, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those candidates that were tested on all images of the pool: a stage that a run did not finish was not."""
    wanted = set(pool.first.by_test)
    return [each for each in candidates if set(each.by_test) == wanted and each.kind == pool.kind]


def _compare_single(
    first: Predictions, second: Predictions, options: ReportOptions
) -> tuple[McNemar, Difference, Difference]:
    differences = paired_differences(
        first, second, seed=options.seed, resamples=options.resamples, confidence=CONFIDENCE
    )
    images = mcnemar(first, second)
    return images, replace(differences.accuracy, p_value=images.p_value), differences.macro_f1


def _stack(first: Sequence[Predictions], second: Sequence[Predictions]) -> tuple[Predictions, list[Predictions]]:
    """The first of all predictions, and all in its order of images and classes."""
    reference = first[0]
    return reference, [each if each is reference else aligned(reference, each) for each in (*first, *second)]


def _compare_rounds(
    first: Sequence[Predictions], second: Sequence[Predictions], *, allow_for_seeds: bool, paired: bool = False
) -> tuple[Difference, Difference]:
    """Differences of mean accuracy and of mean macro F1 over rounds on the same images."""
    reference, every = _stack(first, second)
    indices = indices_of_replicates(
        reference.true, np.array([each.predicted for each in every]), reference.group, classes=reference.classes
    )
    split = len(first)
    contrast = _contrast(first, second)
    accuracy, macro_f1 = (
        compare_replicates(
            indices.values[:split, place],
            indices.values[split:, place],
            indices.covariance[place],
            degrees=indices.count_freedom(place, contrast),
            allow_for_seeds=allow_for_seeds,
            paired=paired,
            confidence=CONFIDENCE,
        )
        for place in (0, F1_PLACE)
    )
    return accuracy, macro_f1


def _contrast(first: Sequence[Predictions], second: Sequence[Predictions]) -> NDArray[np.float64]:
    """Weights of all replicates whose sum is the mean of the first less that of the second."""
    return np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))])


def _flip(first: Sequence[Predictions], second: Sequence[Predictions]) -> float:
    reference, every = _stack(first, second)
    correct = np.array([each.correct for each in every])
    return sign_flip_test(replicate_balance(correct[: len(first)], correct[len(first) :], reference.group))


def _compare_auroc(
    first: Sequence[Predictions], second: Sequence[Predictions], class_name: str, *, paired: bool
) -> IndexComparison:
    """Difference of AUROC on one set of test images: DeLong, and with several seeds Obuchowski and Rockette."""
    if len(first) == len(second) == 1:
        return IndexComparison(delong_test(first[0], second[0], class_name=class_name, confidence=CONFIDENCE), None)
    reference, every = _stack(first, second)
    column = reference.class_names.index(class_name)
    positive = reference.true == column
    if positive.all() or not positive.any():
        return IndexComparison(UNDEFINED, None)
    parts = structural_components(positive, [each.probabilities[:, column] for each in every], reference.group)
    contrast = _contrast(first, second)
    rarer = min(parts.positive_groups, parts.negative_groups) - 1
    each_group = contrast @ parts.contributions
    degrees = max(1.0, min(float(rarer), compute_satterthwaite_freedom(each_group) if each_group.any() else math.inf))
    patients, training = (
        compare_replicates(
            parts.areas[: len(first)],
            parts.areas[len(first) :],
            covariance(parts),
            degrees=degrees,
            allow_for_seeds=seeds,
            paired=paired and seeds,
            confidence=CONFIDENCE,
        )
        for seeds in (False, True)
    )
    return IndexComparison(patients, training if training.allows_for_training else None)


def _compare_over_tests(first: Candidate, second: Candidate, class_name: str | None) -> dict[str, Difference | None]:
    """Differences of the mean over folds or splits, each the mean of its runs, with Nadeau and Bengio's interval."""
    tests = list(first.by_test)
    ratio = test_to_train(first)
    differences: dict[str, Difference | None] = {}
    for name in (ACCURACY, MACRO_F1, AUROC):
        if name == AUROC and class_name is None:
            continue
        values = [
            [float(np.mean([_index(result, name, class_name) for result in each.by_test[test]])) for test in tests]
            for each in (first, second)
        ]
        differences[name] = corrected_resampled_t(
            np.array(values[0]) - np.array(values[1]), test_to_train=ratio, confidence=CONFIDENCE
        )
    return differences


def _compare_tests_by_patient(first: Candidate, second: Candidate) -> Difference:
    """Difference of accuracy over splits whose test images overlap: exact by patient, without an interval."""
    balances: dict[str, int] = {}
    unit = math.lcm(*(len(results) for each in (first, second) for results in each.by_test.values()))
    for test, ours in first.by_test.items():
        theirs = second.by_test[test]
        reference, every = _stack(
            [result.test.predictions for result in ours], [result.test.predictions for result in theirs]
        )
        correct = np.array([each.correct for each in every]).astype(np.int64)
        lead = unit // len(ours) * correct[: len(ours)].sum(axis=0)
        lead -= unit // len(theirs) * correct[len(ours) :].sum(axis=0)
        for group, amount in zip(np.asarray(reference.group).tolist(), lead.tolist(), strict=True):
            balances[str(group)] = balances.get(str(group), 0) + amount
    p_value = sign_flip_test(np.array(list(balances.values()), dtype=np.int64))
    return Difference(float(first.share - second.share), math.nan, math.nan, math.nan, p_value)


def _index(result: Result, name: str, class_name: str | None) -> float:
    return measure_area(result.test.predictions, str(class_name)) if name == AUROC else index_of(result, name)


def measure_area(predictions: Predictions, class_name: str) -> float:
    """AUROC of one class against the rest; nan where the class, or the rest, has no images."""
    column = predictions.class_names.index(class_name)
    positive = predictions.true == column
    if positive.all() or not positive.any():
        return math.nan
    return float(structural_components(positive, [predictions.probabilities[:, column]], None).areas[0])


def _p_values(comparison: Comparison) -> dict[str, float]:
    return {
        ACCURACY: comparison.accuracy.p_value,
        MACRO_F1: comparison.macro_f1.p_value,
        AUROC: math.nan if comparison.auroc is None else comparison.auroc.p_value,
    }


def _holm(p_values: Sequence[float]) -> list[float]:
    family = np.array(p_values, dtype=np.float64)
    undefined = np.isnan(family)
    corrected = holm(np.where(undefined, 1.0, family))
    return [float(p) for p in np.where(undefined, np.nan, corrected)]


def _replicate_sentence(comparison: Comparison) -> str:
    """What is shown of accuracy where candidates have replicates."""
    pool, widest = comparison.pool, comparison.accuracy.widest
    ahead, behind, sign = comparison.first, comparison.second, 1
    if behind.share > ahead.share:
        ahead, behind, sign = behind, ahead, -1
    where = {
        SET: f"on these {pool.images:,} test images",
        FOLDS: f"on these {pool.images:,} out-of-fold images",
        SPLITS: f"over these {len(ahead.by_test)} splits",
    }[pool.kind]
    p_words = p_text(comparison.corrected[ACCURACY])
    if comparison.family > 1:
        p_words += f" after Holm's correction for {comparison.family} comparisons"
    mean = "mean " if pool.kind == SPLITS or len(ahead.rounds) > 1 or len(behind.rounds) > 1 else ""
    shares = f"{mean}{percent(float(ahead.share))} against {percent(float(behind.share))}"
    if widest.has_interval:
        over = "" if pool.kind == SET else {FOLDS: "(mean over folds) ", SPLITS: "(mean over splits) "}[pool.kind]
        low, high = sorted((100 * sign * widest.low, 100 * sign * widest.high))
        shares += f"; difference {over}{100 * sign * widest.value:+.1f} points, {low:+.1f} to {high:+.1f}"
    if ahead.share == behind.share:
        return f"{ahead.label} and {behind.label} are right equally often {where} ({shares}; {p_words})."
    verdict = "is shown to be better than" if comparison.is_shown else "is not shown to be better than"
    return f"{ahead.label} {verdict} {behind.label} {where} ({shares}; {p_words}, {_chances(comparison)})."


def _chances(comparison: Comparison) -> str:
    """What the p of accuracy allows for."""
    if comparison.accuracy.training is None:
        return "allowing for patients, not for other seeds"
    if comparison.pool.kind != SET:
        return "allowing for patients and for training sets"
    for one, other in ((comparison.first, comparison.second), (comparison.second, comparison.first)):
        if other.replicates == 1:
            return f"allowing for patients and for the seeds of {one.label}, not for other seeds of {other.label}"
    return "allowing for patients and for seeds"
