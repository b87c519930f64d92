"""Tables of paired comparisons on the same test images: differences, confidence intervals and p-values."""

from collections.abc import Sequence

from pylorus.evaluation.estimate import Estimate
from pylorus.report.basis import format_test_basis
from pylorus.report.candidate import FOLDS, SET, SPLITS
from pylorus.report.comparison import ACCURACY, AUROC, MACRO_F1, UNDEFINED, Comparison
from pylorus.report.table import (
    Cell,
    Column,
    Row,
    Table,
    convert_to_number_cell,
    convert_to_p_value_cell,
    convert_to_percent_cell,
    create_text_columns,
)

PAIR_METHODS = (
    "Accuracy: exact McNemar test that keeps the images of a group together. Macro F1: permutation test that exchanges "
    "the predictions of the two models for whole groups. AUROC: DeLong or, with several images per group, Obuchowski, "
    "with Student's t. Confidence intervals are combined from those of the two models (MOVER), so an interval and its "
    "p may disagree close to the significance level."
)
SEED_METHODS = (
    "Several seeds: means over the seeds. p (patients): exact sign-flip test by group on the mean over seeds; p "
    "(training) and its interval account for patients and for seeds (Obuchowski and Rockette 1995, Hillis 2014)."
)
FOLD_METHODS = (
    "Folds: p (patients) is from McNemar's test on the pooled out-of-fold predictions, which keeps the images of a "
    "group together; p (training) and its interval refer to the mean over folds and account for overlapping training "
    "sets (Nadeau and Bengio 2003). AUROC: mean over folds, since scores of different models are not on the same scale."
)
SPLIT_METHODS = (
    "Repeated splits: p (patients) is from an exact sign-flip test by group over all splits; p (training) and its "
    "interval account for overlapping training sets (Nadeau and Bengio 2003)."
)
DECIDES = "The larger of p (patients) and p (training) is corrected and decides."


def build_comparison_table(comparisons: Sequence[Comparison], *, class_name: str | None) -> Table:
    """Build the table of pairs that a research question asks about, first minus second, with p corrected per question.

    Args:
        comparisons: At least one.
        class_name: Short name of the class whose AUROC was compared, if any.
    """
    return _build_pair_table(
        comparisons,
        class_name,
        key="comparisons",
        title="Differences on the same test images, first minus second",
        notes=(
            "Winner: one configuration against each of the others. Stages: one stage against another of the same "
            "configuration. p in columns headed Holm is corrected by Holm's method within its question, over the "
            "number of tests given in its row; each index is a family of its own. Confidence intervals are not "
            "corrected.",
            "A difference is considered shown if the corrected p is below 0.05.",
        ),
        corrected=True,
    )


def build_unadjusted_table(comparisons: Sequence[Comparison], *, class_name: str | None) -> Table:
    """Build the table of all other pairs, without correction.

    Args:
        comparisons: At least one.
        class_name: Short name of the class whose AUROC was compared, if any.
    """
    return _build_pair_table(
        comparisons,
        class_name,
        key="comparisons-other",
        title="Appendix: all other pairs, UNADJUSTED for multiple testing",
        notes=(
            "UNADJUSTED: among so many pairs, some p-values are below 0.05 by chance alone. No statement in this "
            "report relies on them; they are intended for planning further studies.",
        ),
        corrected=False,
    )


def explain_comparisons(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Describe how the pairs of a report were compared and corrected; empty if there are none."""
    if not comparisons:
        return ()
    corrected = (
        "Pairs on the same test images: each question is a separate family for Holm's method, as is each index within "
        "it; pairs that no question asks about are unadjusted."
        if any(each.family > 1 for each in comparisons)
        else "Pairs on the same test images: each question is a single test, so no correction is needed; pairs "
        "that no question asks about are unadjusted."
    )
    return (corrected, *explain_comparison_methods(comparisons))


def explain_comparison_methods(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Describe the methods of comparison for the kinds of pairs present."""
    methods = (
        (PAIR_METHODS, any(_is_single_pair(each) for each in comparisons)),
        (SEED_METHODS, any(each.pool.kind == SET and not _is_single_pair(each) for each in comparisons)),
        (FOLD_METHODS, any(each.pool.kind == FOLDS for each in comparisons)),
        (SPLIT_METHODS, any(each.pool.kind == SPLITS for each in comparisons)),
        (DECIDES, any(each.accuracy.training is not None for each in comparisons)),
    )
    return tuple(text for text, is_used in methods if is_used)


def _build_pair_table(
    comparisons: Sequence[Comparison],
    class_name: str | None,
    *,
    key: str,
    title: str,
    notes: Sequence[str],
    corrected: bool,
) -> Table:
    candidates = dict.fromkeys(each for pair in comparisons for each in (pair.first, pair.second))
    has_single_runs = any(each.images is not None for each in comparisons)
    has_training = any(each.accuracy.training is not None for each in comparisons)
    p_title = "p, Holm" if corrected else "p, unadjusted"
    return Table(
        key=key,
        title=title,
        basis=format_test_basis([result for each in candidates for result in each.results_used]),
        columns=(
            *(create_text_columns("question") if corrected else ()),
            *create_text_columns("first", "second"),
            *((Column("tests", over="corrected for"),) if corrected else ()),
            *(
                (Column("first alone", over="images right"), Column("second alone", over="images right"))
                * has_single_runs
            ),
            Column("points", over="accuracy, patients"),
            Column("p", over="accuracy, patients"),
            *(
                (
                    Column("points", over="accuracy, allowing for training"),
                    Column("p", over="accuracy, allowing for training"),
                )
                * has_training
            ),
            *((Column(p_title, over="accuracy"),) * (corrected or has_training)),
            Column("points", over="macro F1"),
            Column(p_title, over="macro F1"),
            Column("difference", over=f"AUROC {class_name or ''}".strip()),
            Column(p_title, over=f"AUROC {class_name or ''}".strip()),
        ),
        rows=tuple(
            Row(tuple(_build_pair_cells(each, corrected=corrected, single=has_single_runs, trained=has_training)))
            for each in comparisons
        ),
        notes=(*notes, *explain_comparison_methods(comparisons)),
    )


def _is_single_pair(comparison: Comparison) -> bool:
    return comparison.pool.kind == SET and comparison.images is not None


def _build_pair_cells(each: Comparison, *, corrected: bool, single: bool, trained: bool) -> list[Cell]:
    patients, training = each.accuracy.patients or UNDEFINED, each.accuracy.training or UNDEFINED
    auroc: Estimate = UNDEFINED if each.auroc is None else each.auroc.widest
    same_configuration = each.first.configuration == each.second.configuration
    cells: list[Cell] = ["stages" if same_configuration else "winner"] if corrected else []
    cells += [each.first.label, each.second.label]
    cells += [each.family] if corrected else []
    if single:
        cells += ["", ""] if each.images is None else [each.images.only_first, each.images.only_second]
    cells += [convert_to_percent_cell(patients), convert_to_p_value_cell(patients.p_value)]
    cells += [convert_to_percent_cell(training), convert_to_p_value_cell(training.p_value)] if trained else []
    cells += [convert_to_p_value_cell(each.corrected[ACCURACY])] if corrected or trained else []
    cells += [convert_to_percent_cell(each.macro_f1.widest), convert_to_p_value_cell(each.corrected[MACRO_F1])]
    return [*cells, convert_to_number_cell(auroc), convert_to_p_value_cell(each.corrected[AUROC])]
