"""Pairs of candidates on the same test images: differences, intervals and p-values in one table."""

from collections.abc import Sequence

from pylorus.evaluation.estimate import Estimate
from pylorus.report.basis import tested_on
from pylorus.report.candidate import FOLDS, SET, SPLITS
from pylorus.report.comparison import ACCURACY, AUROC, MACRO_F1, UNDEFINED, Comparison
from pylorus.report.table import Cell, Column, Row, Table, as_number, in_percent, p_value, text_columns

PAIR_METHODS = (
    "McNemar: exact, the images of a group kept together. Macro F1: the same exchange of the two models' answers on "
    "whole groups. AUROC: DeLong, in groups Obuchowski, with Student's t. Intervals are combined from those of the two "
    "(MOVER), so that interval and p may disagree close to the level."
)
SEED_METHODS = (
    "Several seeds: means over the seeds. p of patients: exact sign-flip test by group on the mean over seeds; p of "
    "training and the interval allow for patients and for seeds (Obuchowski and Rockette 1995, Hillis 2014)."
)
FOLD_METHODS = (
    "Folds: p of patients is McNemar's on the pooled out-of-fold decisions, the images of a group kept together; p of "
    "training and its interval are of the mean over folds and allow for training sets that overlap (Nadeau and Bengio "
    "2003). AUROC: mean over folds, since scores of different models are not on one scale."
)
SPLIT_METHODS = (
    "Repeated splits: p of patients is an exact sign-flip test by group over all splits; p of training and its "
    "interval allow for training sets that overlap (Nadeau and Bengio 2003)."
)
DECIDES = "Of the p of patients and the p of training the larger one is corrected and decides."


def comparison_table(comparisons: Sequence[Comparison], *, class_name: str | None) -> Table:
    """The pairs that a question asks about, first minus second, each p corrected within its question.

    Args:
        comparisons: At least one.
        class_name: The class whose AUROC was compared; None if none was.
    """
    return _table(
        comparisons,
        class_name,
        key="comparisons",
        title="Differences on the same test images, first minus second",
        notes=(
            "Winner: one configuration against each other one. Stages: within a configuration, one against another. "
            "Each p in a column named Holm is corrected by Holm's method within its question, over as many tests as "
            "its row says; an index is a family of its own. Intervals are of each pair by itself.",
            "A difference is shown where the corrected p is below 0.05.",
        ),
        corrected=True,
    )


def other_table(comparisons: Sequence[Comparison], *, class_name: str | None) -> Table:
    """All other pairs, unadjusted.

    Args:
        comparisons: At least one.
        class_name: The class whose AUROC was compared; None if none was.
    """
    return _table(
        comparisons,
        class_name,
        key="comparisons-other",
        title="Appendix: all other pairs, UNADJUSTED for their number",
        notes=(
            "UNADJUSTED: of so many pairs some fall below 0.05 by chance. No sentence of this report rests on them; "
            "they are for planning further studies.",
        ),
        corrected=False,
    )


def describe_comparisons(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """How pairs of a report were compared and corrected; nothing where none were."""
    if not comparisons:
        return ()
    corrected = (
        "Pairs on the same test images: each question is a family of its own for Holm's method, each index by itself; "
        "pairs that no question asks about are unadjusted."
        if any(each.family > 1 for each in comparisons)
        else "Pairs on the same test images: each question is a single test, so there is nothing to correct; pairs "
        "that no question asks about are unadjusted."
    )
    return (corrected, *describe_methods(comparisons))


def describe_methods(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """How pairs were compared, for the kinds of pairs that there are."""
    methods = (
        (PAIR_METHODS, any(_is_pair(each) for each in comparisons)),
        (SEED_METHODS, any(each.pool.kind == SET and not _is_pair(each) for each in comparisons)),
        (FOLD_METHODS, any(each.pool.kind == FOLDS for each in comparisons)),
        (SPLIT_METHODS, any(each.pool.kind == SPLITS for each in comparisons)),
        (DECIDES, any(each.accuracy.training is not None for each in comparisons)),
    )
    return tuple(text for text, is_used in methods if is_used)


def _table(
    comparisons: Sequence[Comparison],
    class_name: str | None,
    *,
    key: str,
    title: str,
    notes: Sequence[str],
    corrected: bool,
) -> Table:
    candidates = dict.fromkeys(each for pair in comparisons for each in (pair.first, pair.second))
    single = any(each.images is not None for each in comparisons)
    trained = any(each.accuracy.training is not None for each in comparisons)
    adjusted = "p, Holm" if corrected else "p, unadjusted"
    return Table(
        key=key,
        title=title,
        basis=tested_on([result for each in candidates for result in each.results_used]),
        columns=(
            *(text_columns("question") if corrected else ()),
            *text_columns("first", "second"),
            *((Column("tests", over="corrected for"),) if corrected else ()),
            *((Column("first alone", over="images right"), Column("second alone", over="images right")) * single),
            Column("points", over="accuracy, patients"),
            Column("p", over="accuracy, patients"),
            *(
                (
                    Column("points", over="accuracy, allowing for training"),
                    Column("p", over="accuracy, allowing for training"),
                )
                * trained
            ),
            *((Column(adjusted, over="accuracy"),) * (corrected or trained)),
            Column("points", over="macro F1"),
            Column(adjusted, over="macro F1"),
            Column("difference", over=f"AUROC {class_name or ''}".strip()),
            Column(adjusted, over=f"AUROC {class_name or ''}".strip()),
        ),
        rows=tuple(
            Row(tuple(_cells(each, corrected=corrected, single=single, trained=trained))) for each in comparisons
        ),
        notes=(*notes, *describe_methods(comparisons)),
    )


def _is_pair(comparison: Comparison) -> bool:
    return comparison.pool.kind == SET and comparison.images is not None


def _cells(each: Comparison, *, corrected: bool, single: bool, trained: bool) -> list[Cell]:
    patients, training = each.accuracy.patients or UNDEFINED, each.accuracy.training or UNDEFINED
    auroc: Estimate = UNDEFINED if each.auroc is None else each.auroc.widest
    same = each.first.configuration == each.second.configuration
    cells: list[Cell] = ["stages" if same else "winner"] if corrected else []
    cells += [each.first.label, each.second.label]
    cells += [each.family] if corrected else []
    if single:
        cells += ["", ""] if each.images is None else [each.images.only_first, each.images.only_second]
    cells += [in_percent(patients), p_value(patients.p_value)]
    cells += [in_percent(training), p_value(training.p_value)] if trained else []
    cells += [p_value(each.corrected[ACCURACY])] if corrected or trained else []
    cells += [in_percent(each.macro_f1.widest), p_value(each.corrected[MACRO_F1])]
    return [*cells, as_number(auroc), p_value(each.corrected[AUROC])]
