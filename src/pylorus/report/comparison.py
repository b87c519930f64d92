"""Paired comparisons of candidates on the same test images, with Holm's correction within each research question.

There are two questions, each a family of tests of its own: whether the winner is better than each other configuration,
and, within a configuration, whether one stage is better than another. All other pairs are unadjusted and exploratory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import format_p_value, format_percent, format_percent_with_unit
from pylorus.evaluation.comparison import (
    INDICES,
    Difference,
    McNemar,
    delong_test,
    holm,
    mcnemar,
    paired_differences,
    paired_share_difference,
    sign_flip_test,
)
from pylorus.evaluation.discrimination import compute_area_covariance, compute_structural_components
from pylorus.evaluation.intervals import Estimate, compute_satterthwaite_freedom
from pylorus.evaluation.predictions import Predictions, align_predictions
from pylorus.evaluation.replicates import (
    compare_replicates,
    compute_replicate_balance,
    compute_replicate_indices,
    corrected_resampled_t,
)
from pylorus.evaluation.wording import format_better_sentence
from pylorus.report.candidate import (
    FOLDS,
    SET,
    SPLITS,
    Candidate,
    Pool,
    compute_overall_index,
    compute_test_train_ratio,
)
from pylorus.report.results import CONFIDENCE, LEVEL, ReportOptions, Result

UNDEFINED = Difference(math.nan, math.nan, math.nan, math.nan, math.nan)
ACCURACY, AUROC, MACRO_F1 = "accuracy", "auroc", "macro_f1"
F1_POSITION = INDICES.index("macro_f1")


@dataclass(frozen=True, eq=False)
class IndexComparison:
    """Difference of two candidates in one index, first minus second.

    Attributes:
        patients: For the trained models as they are, with patients as the only source of randomness; None if the index
            is not compared in this way (AUROC over models whose scores are not on a common scale).
        training: Allowing for seeds or training sets as well, as far as there are several; None for a single pair of
            models.
    """

    patients: Difference | None
    training: Difference | None

    @property
    def p_value(self) -> float:
        """Larger p-value of the two, since a claim about a configuration has to hold for both; NaN if undefined."""
        values = [difference.p_value for difference in (self.patients, self.training) if difference is not None]
        return max(values, default=math.nan) if not any(map(math.isnan, values)) else math.nan

    @property
    def widest(self) -> Difference:
        """The most conservative difference: the larger p-value and, at each end, the wider interval."""
        if self.training is None or self.patients is None:
            return self.training or self.patients or UNDEFINED
        low = float(np.fmin(self.training.low, self.patients.low))
        high = float(np.fmax(self.training.high, self.patients.high))
        return replace(self.training, low=low, high=high, p_value=self.p_value)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two candidates on the same test images; differences are first minus second.

    Attributes:
        first: First candidate.
        second: Second candidate.
        pool: Pool in which they are compared.
        images: McNemar's exact test for a single pair of models or a single round of folds; None if there are several.
        accuracy: Difference in accuracy.
        macro_f1: Difference in macro F1.
        auroc: Difference in AUROC of the report's class; None if the candidates do not have this class.
        corrected: P-value of each index (accuracy, auroc, macro_f1) after Holm's correction within the family;
            uncorrected in the appendix.
        family: Number of tests for which each index was corrected; 0 in the appendix, which is unadjusted.
        question: Research question of the family; empty in the appendix.
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
    def is_significant(self) -> bool:
        """Whether the difference in accuracy is significant; never in the appendix."""
        return self.family > 0 and self.corrected[ACCURACY] < LEVEL

    @property
    def sentence(self) -> str:
        """Sentence that states whether the difference in accuracy is significant."""
        corrected = self.corrected[ACCURACY]
        if self.images is not None and self.pool.kind == SET:
            return format_better_sentence(
                self.first.label,
                self.second.label,
                self.images,
                corrected_p=corrected if self.family > 1 else None,
                family=self.family,
                level=LEVEL,
                group_word="groups",
            )
        return _format_replicate_sentence(self)

    def is_between(self, candidate: Candidate, other: Candidate) -> bool:
        """Return whether these two candidates are compared, in either order."""
        return {candidate, other} == {self.first, self.second}


def compare_pair(
    first: Candidate, second: Candidate, pool: Pool, *, class_name: str | None, options: ReportOptions
) -> Comparison:
    """Compare two candidates of a pool, without correction for multiple tests.

    One model each: McNemar's test by group, permutation of whole groups, DeLong's test. Several seeds: exact sign-flip
    test of the mean replicate by group, and the variance of Obuchowski and Rockette. Folds and splits: McNemar's test
    by group on the pooled decisions, and the corrected resampled t-test of Nadeau and Bengio over the folds.
    """
    has_class = all(class_name in each.results[0].test.predictions.class_names for each in (first, second))
    is_single = len(first.round_predictions) == len(second.round_predictions) == 1
    paired = [result.run for result in first.results] == [result.run for result in second.results]
    images = None
    if is_single:
        images, accuracy, macro_f1 = _compare_single(first.round_predictions[0], second.round_predictions[0], options)
    elif pool.kind == SPLITS:
        accuracy, macro_f1 = _compare_tests_by_patient(first, second), None
    else:
        accuracy, macro_f1 = _compare_rounds(first.round_predictions, second.round_predictions, allow_for_seeds=False)
        accuracy = replace(accuracy, p_value=_compute_sign_flip_p(first.round_predictions, second.round_predictions))
    training: dict[str, Difference | None] = dict.fromkeys((ACCURACY, MACRO_F1, AUROC))
    if len(first.by_test) > 1:
        training |= _compare_over_tests(first, second, class_name if has_class else None)
    elif pool.kind == SET and not is_single:
        training[ACCURACY], training[MACRO_F1] = _compare_rounds(
            first.round_predictions, second.round_predictions, allow_for_seeds=True, paired=paired
        )
    auroc = None
    if has_class and pool.kind == SET:
        auroc = _compare_auroc(first.round_predictions, second.round_predictions, str(class_name), paired=paired)
    elif has_class:
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
    return replace(comparison, corrected=_collect_p_values(comparison))


def estimate_difference(
    first: Candidate, second: Candidate, pool: Pool, *, class_name: str | None = None, confidence: float = CONFIDENCE
) -> Estimate:
    """Estimate the difference of two candidates in accuracy, or in AUROC of a class, at any confidence.

    One model each: as in `paired_differences` and `delong_test`. Several seeds, folds or splits: the most conservative
    interval, as in `compare_pair`.

    Args:
        first: First candidate.
        second: Second candidate; the difference is first minus second.
        pool: Pool in which they are compared.
        class_name: Class whose AUROC is compared; None: accuracy.
        confidence: Coverage of the interval, in (0, 1).
    """
    rounds = first.round_predictions, second.round_predictions
    if pool.kind == SET and len(rounds[0]) == len(rounds[1]) == 1:
        one, two = rounds[0][0], align_predictions(rounds[0][0], rounds[1][0])
        if class_name is not None:
            return delong_test(one, two, class_name=class_name, confidence=confidence)
        return paired_share_difference(one.correct, two.correct, one.group, confidence=confidence)
    paired = [result.run for result in first.results] == [result.run for result in second.results]
    if len(first.by_test) > 1:
        key = ACCURACY if class_name is None else AUROC
        patients, training = None, _compare_over_tests(first, second, class_name, confidence=confidence)[key]
        if class_name is None and pool.kind == FOLDS:
            patients = _compare_rounds(*rounds, allow_for_seeds=False, confidence=confidence)[0]
    elif class_name is not None:
        compared = _compare_auroc(*rounds, class_name, paired=paired, confidence=confidence)
        patients, training = compared.patients, compared.training
    else:
        patients, training = (
            _compare_rounds(*rounds, allow_for_seeds=seeds, paired=paired and seeds, confidence=confidence)[0]
            for seeds in (False, True)
        )
    return IndexComparison(patients, training).widest


def compute_corrected_family(
    comparisons: Sequence[Comparison], *, question: str, others: Sequence[Comparison] = ()
) -> tuple[Comparison, ...]:
    """Correct the p-values of one research question by Holm's method, separately for each index.

    Args:
        comparisons: Tests that answer the question.
        question: The question in words.
        others: Tests that could have become the question because their images chose it; they enlarge the family.

    Returns:
        The corrected comparisons. An undefined p-value counts as 1, so that the family does not shrink.
    """
    if not comparisons:
        return ()
    family = [*comparisons, *others]
    corrected = {name: _compute_holm([each.corrected[name] for each in family]) for name in (ACCURACY, AUROC, MACRO_F1)}
    return tuple(
        replace(
            each,
            corrected={name: values[position] for name, values in corrected.items()},
            family=len(family),
            question=question,
        )
        for position, each in enumerate(comparisons)
    )


def list_stage_pairs(pool: Pool) -> list[list[tuple[Candidate, Candidate]]]:
    """List the pairs of stages within each configuration of a pool, on the pool's images, the later stage first."""
    return [
        [(later, earlier) for earlier, later in combinations(_filter_tested_on_pool(pool, each.stages), 2)]
        for each in pool.configurations
    ]


def list_other_pairs(pool: Pool, in_question: Sequence[Comparison]) -> list[tuple[Candidate, Candidate]]:
    """List the pairs that belong to no question: shipped candidates, and configurations after the same stage."""
    if len(pool.configurations) < 2:
        return []
    pairs = list(combinations(pool.candidates, 2))
    by_stage: dict[str, list[Candidate]] = {}
    for each in pool.configurations:
        for candidate in _filter_tested_on_pool(pool, each.stages):
            by_stage.setdefault(candidate.stage, []).append(candidate)
    pairs += [pair for group in by_stage.values() for pair in combinations(group, 2) if pair not in pairs]
    return [pair for pair in pairs if not any(each.is_between(*pair) for each in in_question)]


def _filter_tested_on_pool(pool: Pool, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that were tested on all images of the pool, which excludes unfinished stages."""
    tests = set(pool.first.by_test)
    return [each for each in candidates if set(each.by_test) == tests and each.kind == pool.kind]


def _compare_single(
    first: Predictions, second: Predictions, options: ReportOptions
) -> tuple[McNemar, Difference, Difference]:
    differences = paired_differences(
        first, second, seed=options.seed, resamples=options.resamples, confidence=CONFIDENCE
    )
    images = mcnemar(first, second)
    return images, replace(differences.accuracy, p_value=images.p_value), differences.macro_f1


def _stack_predictions(
    first: Sequence[Predictions], second: Sequence[Predictions]
) -> tuple[Predictions, list[Predictions]]:
    """Return the first table of predictions, and all tables aligned to its order of images and classes."""
    reference = first[0]
    return reference, [
        table if table is reference else align_predictions(reference, table) for table in (*first, *second)
    ]


def _compare_rounds(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    *,
    allow_for_seeds: bool,
    paired: bool = False,
    confidence: float = CONFIDENCE,
) -> tuple[Difference, Difference]:
    """Compute the differences in mean accuracy and in mean macro F1 over rounds on the same images."""
    reference, tables = _stack_predictions(first, second)
    indices = compute_replicate_indices(
        reference.true, np.array([table.predicted for table in tables]), reference.group, classes=reference.classes
    )
    contrast = _compute_contrast(first, second)
    accuracy, macro_f1 = (
        compare_replicates(
            indices.values[: len(first), position],
            indices.values[len(first) :, position],
            indices.covariance[position],
            degrees=indices.count_freedom(position, contrast),
            allow_for_seeds=allow_for_seeds,
            paired=paired,
            confidence=confidence,
        )
        for position in (0, F1_POSITION)
    )
    return accuracy, macro_f1


def _compute_contrast(first: Sequence[Predictions], second: Sequence[Predictions]) -> NDArray[np.float64]:
    """Return the weights of all replicates whose weighted sum is the mean of the first minus that of the second."""
    return np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))])


def _compute_sign_flip_p(first: Sequence[Predictions], second: Sequence[Predictions]) -> float:
    reference, tables = _stack_predictions(first, second)
    correct = np.array([table.correct for table in tables])
    return sign_flip_test(compute_replicate_balance(correct[: len(first)], correct[len(first) :], reference.group))


def _compare_auroc(
    first: Sequence[Predictions],
    second: Sequence[Predictions],
    class_name: str,
    *,
    paired: bool,
    confidence: float = CONFIDENCE,
) -> IndexComparison:
    """Compare AUROC on one test set by DeLong's test and, with several seeds, Obuchowski and Rockette's method."""
    if len(first) == len(second) == 1:
        return IndexComparison(delong_test(first[0], second[0], class_name=class_name, confidence=confidence), None)
    reference, tables = _stack_predictions(first, second)
    column = reference.class_names.index(class_name)
    positive = reference.true == column
    if positive.all() or not positive.any():
        return IndexComparison(UNDEFINED, None)
    components = compute_structural_components(
        positive, [table.probabilities[:, column] for table in tables], reference.group
    )
    contrast = _compute_contrast(first, second)
    rarer = min(components.positive_groups, components.negative_groups) - 1
    by_group = contrast @ components.contributions
    degrees = max(1.0, min(float(rarer), compute_satterthwaite_freedom(by_group) if by_group.any() else math.inf))
    patients, training = (
        compare_replicates(
            components.areas[: len(first)],
            components.areas[len(first) :],
            compute_area_covariance(components),
            degrees=degrees,
            allow_for_seeds=allow_for_seeds,
            paired=paired and allow_for_seeds,
            confidence=confidence,
        )
        for allow_for_seeds in (False, True)
    )
    return IndexComparison(patients, training if training.allows_for_training else None)


def _compare_over_tests(
    first: Candidate, second: Candidate, class_name: str | None, *, confidence: float = CONFIDENCE
) -> dict[str, Difference | None]:
    """Compare the means over folds or splits, each averaged over its runs, with Nadeau and Bengio's interval."""
    tests = list(first.by_test)
    ratio = compute_test_train_ratio(first)
    differences: dict[str, Difference | None] = {}
    for name in (ACCURACY, MACRO_F1, AUROC):
        if name == AUROC and class_name is None:
            continue
        values = [
            [
                float(np.mean([_compute_index(result, name, class_name) for result in each.by_test[test]]))
                for test in tests
            ]
            for each in (first, second)
        ]
        differences[name] = corrected_resampled_t(
            np.array(values[0]) - np.array(values[1]), test_to_train=ratio, confidence=confidence
        )
    return differences


def _compare_tests_by_patient(first: Candidate, second: Candidate) -> Difference:
    """Compare accuracy over splits with overlapping test images: exact test by patient, without an interval."""
    balances: dict[str, int] = {}
    unit = math.lcm(*(len(results) for each in (first, second) for results in each.by_test.values()))
    for test, first_results in first.by_test.items():
        second_results = second.by_test[test]
        reference, tables = _stack_predictions(
            [result.test.predictions for result in first_results],
            [result.test.predictions for result in second_results],
        )
        correct = np.array([table.correct for table in tables]).astype(np.int64)
        lead = unit // len(first_results) * correct[: len(first_results)].sum(axis=0)
        lead -= unit // len(second_results) * correct[len(first_results) :].sum(axis=0)
        for group, amount in zip(np.asarray(reference.group).tolist(), lead.tolist(), strict=True):
            balances[str(group)] = balances.get(str(group), 0) + amount
    p_value = sign_flip_test(np.array(list(balances.values()), dtype=np.int64))
    return Difference(float(first.exact_accuracy - second.exact_accuracy), math.nan, math.nan, math.nan, p_value)


def _compute_index(result: Result, name: str, class_name: str | None) -> float:
    return (
        measure_auroc(result.test.predictions, str(class_name))
        if name == AUROC
        else compute_overall_index(result, name)
    )


def measure_auroc(predictions: Predictions, class_name: str) -> float:
    """Compute the AUROC of one class against the rest; NaN if the class or the rest has no images."""
    column = predictions.class_names.index(class_name)
    positive = predictions.true == column
    if positive.all() or not positive.any():
        return math.nan
    return float(compute_structural_components(positive, [predictions.probabilities[:, column]], None).areas[0])


def _collect_p_values(comparison: Comparison) -> dict[str, float]:
    return {
        ACCURACY: comparison.accuracy.p_value,
        MACRO_F1: comparison.macro_f1.p_value,
        AUROC: math.nan if comparison.auroc is None else comparison.auroc.p_value,
    }


def _compute_holm(p_values: Sequence[float]) -> list[float]:
    family = np.array(p_values, dtype=np.float64)
    undefined = np.isnan(family)
    corrected = holm(np.where(undefined, 1.0, family))
    return [float(p) for p in np.where(undefined, np.nan, corrected)]


def _format_replicate_sentence(comparison: Comparison) -> str:
    """State whether the difference in accuracy is significant, for candidates with replicates."""
    pool, widest = comparison.pool, comparison.accuracy.widest
    ahead, behind, sign = comparison.first, comparison.second, 1
    if behind.exact_accuracy > ahead.exact_accuracy:
        ahead, behind, sign = behind, ahead, -1
    where = {
        SET: f"on these {pool.images:,} test images",
        FOLDS: f"on these {pool.images:,} out-of-fold images",
        SPLITS: f"across these {len(ahead.by_test)} splits",
    }[pool.kind]
    p_value = format_p_value(comparison.corrected[ACCURACY])
    if comparison.family > 1:
        p_value += f" after Holm's correction for {comparison.family} comparisons"
    mean = "mean " if pool.kind == SPLITS or len(ahead.rounds) > 1 or len(behind.rounds) > 1 else ""
    higher, lower = (format_percent_with_unit(float(each.exact_accuracy)) for each in (ahead, behind))
    shares = f"{mean}{higher} vs. {lower}"
    if widest.has_interval:
        over = "" if pool.kind == SET else {FOLDS: "(mean over folds) ", SPLITS: "(mean over splits) "}[pool.kind]
        value, low, high = (
            format_percent(sign * each, signed=True)
            for each in (widest.value, *sorted((widest.low, widest.high), reverse=sign < 0))
        )
        shares += f"; difference {over}{value} points, {low} to {high}"
    if ahead.exact_accuracy == behind.exact_accuracy:
        return f"{ahead.label} and {behind.label} are correct equally often {where} ({shares}; {p_value})."
    verdict = "is shown to be better than" if comparison.is_significant else "is not shown to be better than"
    sources = _format_variation_sources(comparison)
    return f"{ahead.label} {verdict} {behind.label} {where} ({shares}; {p_value}, {sources})."


def _format_variation_sources(comparison: Comparison) -> str:
    """State which sources of variation the p-value of accuracy allows for."""
    if comparison.accuracy.training is None:
        return "allowing for patients but not for seeds"
    if comparison.pool.kind != SET:
        return "allowing for patients and for training sets"
    for several, single in ((comparison.first, comparison.second), (comparison.second, comparison.first)):
        if single.replicates == 1:
            return f"allowing for patients and for the seeds of {several.label} but not for those of {single.label}"
    return "allowing for patients and for seeds"
