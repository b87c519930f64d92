"""The section of a report on non-inferiority and equivalence: of models on the same images, and against given figures.

A margin in the configuration of the runs was stated before they were tested; one that is given to the report was not,
and the section says so.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pylorus.core.errors import PylorusError, format_suggestion
from pylorus.core.formatting import format_number, format_p_value, format_percent, join_names
from pylorus.evaluation.comparison import difference_of_independent, holm, paired_share_difference
from pylorus.evaluation.discrimination import auroc
from pylorus.evaluation.index_intervals import Proportion, clustered_wilson, wilson
from pylorus.evaluation.intervals import Estimate, MarginTest, compute_margin_test
from pylorus.evaluation.predictions import Predictions, align_predictions
from pylorus.report.candidate import FOLDS, Candidate, Pool
from pylorus.report.captions import format_test_basis
from pylorus.report.comparison import estimate_difference
from pylorus.report.evidence import STATED_MARGIN, Evidence, Winner, collect_stated_margins
from pylorus.report.mistakes import Item, Section, Sentences
from pylorus.report.results import CONFIDENCE, LEVEL, Figure, ReportOptions, Result
from pylorus.report.study_tables import STUDY, compare_with_published, format_published_basis
from pylorus.report.table import (
    Column,
    Number,
    Row,
    Table,
    convert_to_p_value_cell,
    create_text_columns,
)

FIGURES = "figures:"
"""Begins the name of the family of comparisons with given figures."""
MAX_SENTENCES = 12
"""Maximum number of comparisons that are all told in sentences; of more, only accuracy and given figures are."""
ONE_SIDED = LEVEL / 2
"""Level of each one-sided test, that of the shown intervals."""


@dataclass(frozen=True)
class MarginRow:
    """One comparison with a margin.

    Attributes:
        model: Label of the model that is tested.
        reference: Label of what it is compared with.
        index: Name of the figure, as the table shows it.
        test: What the difference shows.
        in_points: Whether the difference is one of proportions.
        family: Comparisons that are corrected together.
        tests: Number of them.
        noninferior_p: p of non-inferiority after Holm's correction; NaN if undefined.
        equivalent_p: The same of equivalence.
    """

    model: str
    reference: str
    index: str
    test: MarginTest
    in_points: bool
    family: str
    tests: int = 1
    noninferior_p: float = float("nan")
    equivalent_p: float = float("nan")

    @property
    def decision(self) -> str:
        """The decision in a few words."""
        if not self.test.difference.has_interval:
            return "can't be decided"
        if self.equivalent_p < ONE_SIDED:
            return "equivalent"
        if self.noninferior_p < ONE_SIDED:
            return "not inferior"
        if self.test.inferior:
            return "inferior"
        return "not shown"

    @property
    def sentence(self) -> str:
        """The decision in a sentence, with the difference, its interval and p."""
        difference, margin = self.test.difference, self.format_amount(self.test.margin)
        index = f"{self.index[0].upper()}{self.index[1:]}"
        if not difference.has_interval:
            reason = f": {difference.reason}" if difference.reason else ""
            return f"{index}: whether {self.model} is inferior to {self.reference} can't be decided{reason}."
        verdict = {
            "equivalent": f"is shown to be equivalent to {self.reference}: the two differ by less than {margin}",
            "not inferior": f"is shown not to be inferior to {self.reference} by {margin} or more",
            "inferior": f"is inferior to {self.reference} by more than {margin}",
            "not shown": f"is not shown to be non-inferior to {self.reference} with a margin of {margin}",
        }[self.decision]
        value, low, high = (
            self.format_amount(end, signed=True) for end in (difference.value, difference.low, difference.high)
        )
        facts = f"difference {value}, 95 % interval {low} to {high}"
        if self.decision != "inferior":
            facts += f"; {format_p_value(self.equivalent_p if self.decision == 'equivalent' else self.noninferior_p)}"
            facts += f" after Holm's correction for {self.tests} comparisons" if self.tests > 1 else ""
        return f"{index}: {self.model} {verdict} ({facts})."

    def format_amount(self, value: float, *, signed: bool = False) -> str:
        """Format a difference, in percentage points if it is one of proportions; a margin has its unit and no sign."""
        if signed:
            return format_percent(value, signed=True) if self.in_points else format_number(value, 3, signed=True)
        points = f"{100 * value:.4g}"
        return f"{points} percentage point{'' if points == '1' else 's'}" if self.in_points else f"{value:.4g}"


def build_margin_section(evidence: Evidence) -> Section:
    """Build the section of non-inferiority and equivalence; empty without a margin or anything to compare."""
    margin = evidence.margin if evidence.results else None
    title = "Non-inferiority and equivalence"
    if margin is None:
        return Section("margins", title, ())
    rows = _correct_rows(_build_rows(evidence, margin))
    if not rows:
        if evidence.options.margin is not None:
            raise PylorusError(
                "--margin: found a single model, so there is nothing to compare. Add another run, or figures, such as "
                "--against sensitivity=0.9 or --against published."
            )
        return Section("margins", title, ())
    in_brief = [row for row in rows if row.index == "accuracy" or row.family.startswith(FIGURES)]
    sentences = Sentences(tuple(row.sentence for row in (rows if len(rows) <= MAX_SENTENCES else in_brief)), True)
    caveat, undecided = format_margin_caveat(evidence, margin), any(row.decision == "not shown" for row in rows)
    reading = (
        "Not shown means that these images do not settle the question: it does not show that the model is inferior. "
        "More patients would narrow the interval (pylorus plan says how many)."
    )
    items: tuple[Item, ...] = (
        Sentences((caveat,)),
        sentences,
        *([Sentences((reading,))] if undecided else []),
        _build_margin_table(evidence, rows),
    )
    return Section("margins", title, items, is_appendix=False)


def format_margin_caveat(evidence: Evidence, margin: float) -> str:
    """State the margin, and whether the configuration of the runs stated it before they were tested."""
    stated, amount = collect_stated_margins(evidence.runs), _format_margin(margin)
    if stated == {margin}:
        whose = "this run" if len(evidence.runs) == 1 else "all these runs"
        return (
            f"The margin is {amount}. It is in the configuration of {whose} ({STATED_MARGIN}), so it was stated before "
            "they were tested. Pylorus can't tell whether other results were known then."
        )
    known = sorted(each for each in stated if each is not None)
    other = (
        f" The configuration states {join_names([_format_margin(each) for each in known])} instead"
        f"{' or nothing' if None in stated else ''} ({STATED_MARGIN})."
        if known and known != [margin]
        else " It is in the configuration of only some of these runs."
        if known
        else ""
    )
    return (
        f"The margin is {amount}. CAVEAT: it was given when this report was written (--margin), after the models were "
        f"tested.{other} A margin that is chosen after the results are seen proves nothing: say where it was fixed "
        f"before, such as in a protocol, or set {STATED_MARGIN} in the next runs."
    )


def _build_rows(evidence: Evidence, margin: float) -> list[MarginRow]:
    """Build all comparisons: of the models of each pool with their reference, and of the winners with the figures."""
    references = [_find_reference(winner, evidence.options) for winner in evidence.winners]
    if evidence.options.reference is not None and not any(references):
        labels = list(dict.fromkeys(each.label for winner in evidence.winners for each in winner.pool.candidates))
        raise PylorusError(
            f'--reference: found "{evidence.options.reference}", expected one of {", ".join(labels)}.'
            f"{format_suggestion(evidence.options.reference, labels)}"
        )
    rows = []
    for winner, reference in zip(evidence.winners, references, strict=True):
        rows += [
            row
            for candidate in (winner.pool.candidates if reference else ())
            if reference is not None and candidate is not reference
            for row in _compare_candidates(candidate, reference, winner.pool, evidence.class_name, margin)
        ]
    figures = evidence.options.figures
    for subject in map(_select_subject, evidence.winners) if figures else ():
        for figure in figures:
            if figure is None:
                rows += _compare_with_study(subject, margin)
            else:
                rows.append(_compare_with_figure(subject, figure, evidence.class_name, margin))
    return rows


@dataclass(frozen=True, eq=False)
class _Subject:
    """What given figures are compared with.

    Attributes:
        label: Its name in the report.
        predictions: Predictions for its test images; of folds, for those of all of them.
        result: The result of the run that represents it.
        is_pooled: Whether the predictions are those of several folds.
    """

    label: str
    predictions: Predictions
    result: Result
    is_pooled: bool


def _select_subject(winner: Winner) -> _Subject:
    """Return the model chosen on validation images, or else the best on test images; of folds, all of them."""
    result = winner.headline_result or winner.reference.representative
    candidate = winner.preferred or winner.reference
    if candidate.kind == FOLDS:
        return _Subject(f"{candidate.label} (pooled folds)", candidate.round_predictions[0], result, True)
    return _Subject(result.label, result.images.predictions, result, False)


def _find_reference(winner: Winner, options: ReportOptions) -> Candidate | None:
    """Return the candidate of a pool that the others are compared with; None if it lacks the one asked for."""
    if options.reference is None:
        return winner.reference
    asked = options.reference.rstrip("/")
    for get_names in (
        lambda each: {each.label},
        lambda each: {name for result in each.results for name in (str(result.run.folder), result.run.folder.name)},
        lambda each: {name for result in each.results for name in (result.run.label, result.run.model)},
        lambda each: {result.run.model.partition(".")[0] for result in each.results},
        lambda each: {each.stage},
    ):
        matching = [each for each in winner.pool.candidates if asked in get_names(each)]
        if len(matching) == 1:
            return matching[0]
    return None


def _compare_candidates(
    candidate: Candidate, reference: Candidate, pool: Pool, class_name: str | None, margin: float
) -> list[MarginRow]:
    """Compare a candidate with the reference in accuracy, and in the figures of the class if both have it."""
    estimates: dict[str, Callable[[float], Estimate]] = {"accuracy": _estimate_at(candidate, reference, pool, None)}
    tables = [each.results[0].test.predictions for each in (candidate, reference)]
    if class_name is not None and all(class_name in table.class_names for table in tables):
        rounds = candidate.round_predictions, reference.round_predictions
        if len(rounds[0]) == len(rounds[1]) == 1:
            one, two = rounds[0][0], align_predictions(rounds[0][0], rounds[1][0])
            for index in ("sensitivity", "specificity"):
                if (selected := _select_images(one, index, class_name)).any():
                    shares = [_is_correct(table, index, class_name)[selected] for table in (one, two)]
                    groups = np.asarray(one.group)[selected]
                    estimates[f"{index} for {class_name}"] = _estimate_share_at(shares[0], shares[1], groups)
        estimates[f"AUROC of {class_name}"] = _estimate_at(candidate, reference, pool, class_name)
    return [
        MarginRow(
            candidate.label,
            reference.label,
            index,
            compute_margin_test(estimate, margin=margin, confidence=CONFIDENCE),
            not index.startswith("AUROC"),
            f"{reference.label} {index}",
        )
        for index, estimate in estimates.items()
    ]


def _estimate_at(
    candidate: Candidate, reference: Candidate, pool: Pool, class_name: str | None
) -> Callable[[float], Estimate]:
    return lambda confidence: estimate_difference(
        candidate, reference, pool, class_name=class_name, confidence=confidence
    )


def _estimate_share_at(
    first: NDArray[np.bool_], second: NDArray[np.bool_], groups: NDArray[np.generic]
) -> Callable[[float], Estimate]:
    return lambda confidence: paired_share_difference(first, second, groups, confidence=confidence)


def _select_images(table: Predictions, index: str, class_name: str | None) -> NDArray[np.bool_]:
    """Return which images count for a figure."""
    if index in ("accuracy", "auroc"):
        return np.ones(len(table.true), dtype=np.bool_)
    positive = table.true == table.class_names.index(str(class_name))
    return np.asarray(positive if index == "sensitivity" else ~positive)


def _is_correct(table: Predictions, index: str, class_name: str | None) -> NDArray[np.bool_]:
    """Return whether each image is classified correctly, as that class or as another."""
    if index == "accuracy":
        return np.asarray(table.correct)
    label = table.class_names.index(str(class_name))
    return np.asarray((table.true == label) == (table.predicted == label))


def _compare_with_figure(subject: _Subject, figure: Figure, class_name: str | None, margin: float) -> MarginRow:
    """Compare a result with a given figure, whose own uncertainty counts if it comes with its numbers of images."""
    table = subject.predictions
    if figure.index != "accuracy" and class_name not in table.class_names:
        raise PylorusError(f"--against: {subject.label} has no class {class_name}. Add --class NAME.")
    selected, groups = _select_images(table, figure.index, class_name), table.clusters

    def estimate(confidence: float) -> Estimate:
        own_groups = None if groups is None else np.asarray(groups)[selected]
        if figure.index == "auroc" and subject.is_pooled:
            reason = "the probabilities of the models of different folds are not on one scale"
            return Estimate(math.nan, math.nan, math.nan, reason=reason)
        if figure.index == "auroc":
            column = table.class_names.index(str(class_name))
            return auroc(table.true == column, table.probabilities[:, column], own_groups, confidence=confidence)
        if not selected.any():
            return wilson(0, 0, reason=f"no test image counts for {figure.index}")
        correct = _is_correct(table, figure.index, class_name)[selected]
        own = clustered_wilson(correct, own_groups, confidence=confidence)
        if figure.counts is None:
            return own
        return difference_of_independent(own, wilson(*figure.counts, confidence=confidence))

    reference = figure.value if figure.counts is None else 0.0
    names = {"accuracy": "accuracy", "auroc": f"AUROC of {class_name}"}
    return MarginRow(
        subject.label,
        f"the given {figure.text}",
        names.get(figure.index, f"{figure.index} for {class_name}"),
        compute_margin_test(estimate, margin=margin, reference=reference, confidence=CONFIDENCE),
        figure.index != "auroc",
        f"{FIGURES} {subject.label}",
    )


def _compare_with_study(subject: _Subject, margin: float) -> list[MarginRow]:
    """Compare accuracy and sensitivities with the published study's, on different images."""
    rows, comparisons = [], compare_with_published([subject.result])
    if not comparisons:
        raise PylorusError(
            f"--against published: the classes of {subject.label} are not those of the published study "
            f"({', '.join(STUDY.short_names)})."
        )
    for compared in comparisons:
        for index, _, theirs in compared.indices:
            if not isinstance(theirs, Proportion):
                continue  # macro F1 is no proportion of images
            name, names = index.removeprefix("sensitivity of "), subject.predictions.class_names
            own_name = names[_find_class(subject.result, name)] if name != index else None
            kind = "accuracy" if own_name is None else "sensitivity"
            figure = Figure(kind, "", theirs.value, (theirs.successes, theirs.total))
            row = _compare_with_figure(subject, figure, own_name, margin)
            rows.append(replace(row, reference=f"the published {compared.theirs.model} {compared.theirs.stage}"))
    return rows


def _find_class(result: Result, study_name: str) -> int:
    """Return the position of a class of the study among those of a result, by its short or its full name."""
    names, full = result.images.predictions.class_names, dict(zip(STUDY.short_names, STUDY.class_names, strict=True))
    if study_name in names:
        return names.index(study_name)
    run = result.run
    by_full = {
        name.lower().replace("_", " "): short for name, short in zip(run.class_names, run.short_names, strict=True)
    }
    return names.index(by_full[full[study_name]])


def _correct_rows(rows: Sequence[MarginRow]) -> list[MarginRow]:
    """Correct the p-values of each family by Holm's method, separately for non-inferiority and for equivalence."""
    corrected = [dict[str, float]() for _ in rows]
    for family in dict.fromkeys(row.family for row in rows):
        positions = [position for position, row in enumerate(rows) if row.family == family]
        for name in ("noninferior_p", "equivalent_p"):
            values = np.array([getattr(rows[position].test, name) for position in positions])
            for position, p_value in zip(positions, holm(np.where(np.isnan(values), 1.0, values)), strict=True):
                corrected[position][name] = float(p_value)
    sizes = Counter(row.family for row in rows)
    return [
        replace(row, tests=sizes[row.family], noninferior_p=p["noninferior_p"], equivalent_p=p["equivalent_p"])
        if row.test.difference.has_interval
        else row
        for row, p in zip(rows, corrected, strict=True)
    ]


def _build_margin_table(evidence: Evidence, rows: Sequence[MarginRow]) -> Table:
    """Build the table of all comparisons with a margin."""
    basis = format_test_basis(evidence.results)
    if None in evidence.options.figures:
        basis = f"Ours: {basis} Published: {format_published_basis()}"
    return Table(
        key="margins",
        title="Non-inferiority and equivalence with a margin",
        basis=basis,
        columns=(
            *create_text_columns("model", "compared with", "index", "decision"),
            Column("difference"),
            Column("margin"),
            Column("p (Holm)", heading="not inferior"),
            Column("p (Holm)", heading="equivalent"),
        ),
        rows=tuple(
            Row(
                (
                    row.model,
                    row.reference,
                    row.index,
                    row.decision,
                    _create_difference_cell(row),
                    f"{(100 if row.in_points else 1) * row.test.margin:.4g}",
                    convert_to_p_value_cell(row.noninferior_p),
                    convert_to_p_value_cell(row.equivalent_p),
                )
            )
            for row in rows
        ),
        notes=(
            "Difference: model minus what it is compared with, in percentage points (AUROC: on its scale from 0 to 1); "
            "its 95 % confidence interval accounts for the images of a group. Not inferior: the lower end of the "
            "interval is above minus the margin. Equivalent: the whole interval is between minus and plus the margin "
            "(two one-sided tests). Inferior: the whole interval is below minus the margin. Not shown: none of these, "
            "which does not mean inferior.",
            f"p is one-sided, from the interval that ends at the margin; a decision needs p < {ONE_SIDED:g}. It is "
            "corrected by Holm's method, over the models for each index, and over the given figures. The intervals, "
            "and the decision inferior, are not corrected.",
            "A figure given as a proportion of images (135/150) has its own sampling error, which counts; a figure "
            "given as a single value counts as known.",
        ),
    )


def _create_difference_cell(row: MarginRow) -> Number:
    difference, scale = row.test.difference, 100 if row.in_points else 1
    limits = (scale * difference.low, scale * difference.high)
    return Number(scale * difference.value, 1 if row.in_points else 3, limits, reason=difference.reason)


def _format_margin(margin: float) -> str:
    return f"{100 * margin:g} percentage points ({margin:g} for AUROC)"
