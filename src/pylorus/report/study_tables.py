"""The published study as printed, the same tables from our runs, and the comparison of both.

The comparison is unpaired, since the images differ, and has confidence intervals. The study is "Construction of
gastroscopic image recognition model based on transfer learning and its application in gastric cancer diagnosis",
Academic Journal of Second Military Medical University 2019;40(5):483-491.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import join_names
from pylorus.evaluation.comparison import difference_of_independent
from pylorus.evaluation.confusion import CLASS_METRICS, compute_class_metric
from pylorus.evaluation.index_intervals import indices_of_confusion, proportions_of_confusion
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.wording import format_unpaired_sentence
from pylorus.report.captions import format_test_basis, is_validated_on_test
from pylorus.report.results import CONFIDENCE, IMAGES, PATIENTS, Level, Result
from pylorus.report.table import Column, Number, Row, Table, convert_to_percent_cell, create_text_columns
from pylorus.runs.reading import get_metric_labels

PRINTED_METRICS = {name: CLASS_METRICS[name].label for name in ("precision", "sensitivity", "f1")}
"""Metrics of the study's printed tables, with their labels."""

WINNER = ("ResNet50", "finetune")
"""The study's best model, used as the reference for models that the study did not include."""


@dataclass(frozen=True)
class PublishedModel:
    """Printed results of one model after one stage.

    Attributes:
        model: Name of the model, as printed.
        stage: "pretrain" (only the new classification head was trained) or "finetune".
        counts: Table 4: rows are true classes, columns predicted ones, both in the order of the study's classes.
        precision: Tables 1-3, in whole percent: one value per class, then their average. Misprints are included.
        sensitivity: Likewise.
        f1: Likewise.
    """

    model: str
    stage: str
    counts: tuple[tuple[int, ...], ...]
    precision: tuple[int, ...]
    sensitivity: tuple[int, ...]
    f1: tuple[int, ...]

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Table 4 as counts of shape (classes, classes).

        Example:
            >>> int(STUDY.get_result("ResNet50", "finetune").confusion.trace())
            409
        """
        return np.array(self.counts, dtype=np.int64)


@dataclass(frozen=True)
class PublishedStudy:
    """A study and its printed results.

    Attributes:
        title: Title of the paper.
        source: Journal, year, volume and pages.
        doi: Digital object identifier.
        class_names: Class names, in the order of its tables.
        short_names: Their abbreviations.
        patients: Number of patients per class.
        training_images: Number of training images per class; one per patient.
        test_images: Number of test images per class; the study also validated every epoch on them.
        results: Three models in two stages.
    """

    title: str
    source: str
    doi: str
    class_names: tuple[str, ...]
    short_names: tuple[str, ...]
    patients: tuple[int, ...]
    training_images: tuple[int, ...]
    test_images: tuple[int, ...]
    results: tuple[PublishedModel, ...]

    def get_result(self, model: str, stage: str) -> PublishedModel:
        """Return the printed results of one model after one stage.

        Raises:
            KeyError: If the study has no such model or stage.

        Example:
            >>> STUDY.get_result("VGG19", "finetune").precision
            (92, 85, 90, 89)
        """
        for result in self.results:
            if (result.model, result.stage) == (model, stage):
                return result
        known = ", ".join(f"{result.model} {result.stage}" for result in self.results)
        raise KeyError(f"the study has no results for {model} {stage}; it has {known}")


STUDY = PublishedStudy(
    title=(
        "Construction of gastroscopic image recognition model based on transfer learning "
        "and its application in gastric cancer diagnosis"
    ),
    source="Academic Journal of Second Military Medical University 2019;40(5):483-491",
    doi="10.16781/j.0258-879x.2019.05.0483",
    class_names=("gastric cancer", "gastric ulcer", "chronic gastritis"),
    short_names=("GC", "GU", "CG"),
    patients=(2001, 2119, 2168),
    training_images=(1851, 1969, 2018),
    test_images=(150, 150, 150),
    results=(
        PublishedModel(
            model="VGG19",
            stage="pretrain",
            counts=((131, 16, 3), (13, 124, 13), (1, 13, 136)),
            precision=(90, 81, 89, 87),
            sensitivity=(87, 83, 91, 87),
            f1=(89, 82, 90, 87),
        ),
        PublishedModel(
            model="VGG19",
            stage="finetune",
            counts=((133, 15, 2), (11, 125, 14), (0, 7, 143)),
            precision=(92, 85, 90, 89),
            sensitivity=(89, 83, 95, 89),
            f1=(90, 84, 93, 89),
        ),
        PublishedModel(
            model="ResNet50",
            stage="pretrain",
            counts=((137, 13, 0), (10, 128, 12), (2, 15, 133)),
            precision=(92, 82, 92, 89),
            sensitivity=(91, 85, 89, 88),
            # The mean of the unrounded F1 is 88.49 %; 89 is the mean of the three rounded ones.
            f1=(92, 84, 90, 89),
        ),
        PublishedModel(
            model="ResNet50",
            stage="finetune",
            counts=((143, 7, 0), (11, 120, 19), (0, 4, 146)),
            precision=(93, 92, 88, 91),
            sensitivity=(95, 80, 97, 91),
            f1=(94, 85, 93, 91),
        ),
        PublishedModel(
            model="Inception-V3",
            stage="pretrain",
            counts=((112, 31, 7), (13, 121, 16), (2, 30, 118)),
            # Printed as 64 for GU, but its own confusion matrix gives 121 / 182 = 66.5 %.
            precision=(88, 64, 84, 79),
            sensitivity=(75, 81, 79, 78),
            f1=(81, 73, 81, 78),
        ),
        PublishedModel(
            model="Inception-V3",
            stage="finetune",
            counts=((132, 17, 1), (11, 130, 9), (2, 9, 139)),
            precision=(91, 83, 93, 89),
            sensitivity=(88, 87, 93, 89),
            f1=(89, 85, 93, 89),
        ),
    ),
)
"""The study that this project makes reproducible. Its images were never published; these numbers were."""


MAX_STAGES_ABREAST = 2
"""Stages whose metrics are side by side in a table."""


def build_study_metric_table(results: Sequence[Result]) -> Table:
    """Build table 1, 2 or 3: the metrics of each class and their average, in %, for all stages of one run.

    One or two stages are side by side, as in the study; more are below each other, since they would be too wide.

    Args:
        results: At least one, all of one run and of the same classes.
    """
    run = results[0].run
    metrics = get_metric_labels(run)
    by_stage = [_compute_study_metrics(result, metrics) for result in results]
    names = results[0].images.predictions.class_names
    if len(results) > MAX_STAGES_ABREAST:
        columns = (*create_text_columns("stage", "class"), *(Column(title) for title in metrics.values()))
        rows = tuple(
            Row((result.stage.name, *row.cells), strong=row.strong)
            for result, values in zip(results, by_stage, strict=True)
            for row in _build_study_rows(names, [values])
        )
    else:
        columns = _build_study_columns([result.stage.name for result in results], metrics.values())
        rows = _build_study_rows(names, by_stage)
    return Table(
        key=f"study-{run.stem}",
        title=f"{run.label}: {join_names(list(metrics.values()))} of each class, in %",
        basis=format_test_basis(results),
        columns=columns,
        rows=rows,
        notes=("Average: unweighted mean over the classes. The extended tables give confidence intervals.",),
    )


def build_accuracy_table(results: Sequence[Result]) -> Table:
    """Build the table of accuracy on validation and test images.

    Args:
        results: At least one.
    """
    on_test = [is_validated_on_test(result.run) for result in results]
    return Table(
        key="accuracy",
        title="Accuracy on validation and test images",
        basis=format_test_basis(results),
        columns=(
            *create_text_columns("model", "stage"),
            Column("validation" if not all(on_test) else "validation (test images)", unit="%"),
            Column("test", unit="%"),
            Column("correct", heading="test images"),
            Column("of", heading="test images"),
        ),
        rows=tuple(
            Row(
                (
                    result.run.label,
                    result.stage.name,
                    Number(float("nan"), 1, (float("nan"), float("nan")))
                    if result.validation_accuracy is None
                    else convert_to_percent_cell(result.validation_accuracy),
                    convert_to_percent_cell(result.images.shares.accuracy),
                    result.images.shares.accuracy.successes,
                    result.images.shares.accuracy.total,
                )
            )
            for result in results
        ),
    )


def build_confusion_table(results: Sequence[Result], *, level: str = IMAGES, number: int = 1) -> Table:
    """Build table 4: all confusion matrices; rows are true classes, columns predicted ones.

    Args:
        results: At least one, all of the same classes in the same order.
        level: `image-level` or `patient-level`; results without that level are omitted.
        number: Number of the table if the report has several; each set of classes needs its own.
    """
    levels = [
        (result, level_result) for result in results if (level_result := _get_level_or_none(result, level)) is not None
    ]
    names = levels[0][1].predictions.class_names
    suffix, unit = ("-patients", "patients") if level == PATIENTS else ("", "test images")
    return Table(
        key=f"confusion-matrices{suffix}" + (f"-{number}" if number > 1 else ""),
        title=f"Confusion matrices: number of {unit} by true class (rows) and predicted class (columns)",
        basis=format_test_basis([result for result, _ in levels], level=level),
        columns=(
            *create_text_columns("model", "stage", "true"),
            *(Column(name, heading="predicted") for name in names),
        ),
        rows=tuple(
            Row((result.run.label, result.stage.name, name, *(int(count) for count in counts)))
            for result, level_result in levels
            for name, counts in zip(names, level_result.confusion, strict=True)
        ),
    )


def build_published_metric_table(model: str) -> Table:
    """Build table 1, 2 or 3 as the study printed it."""
    results = [result for result in STUDY.results if result.model == model]
    return Table(
        key=f"published-{model.lower()}",
        title=f"As published: {model}: precision, sensitivity and F1 of each class, in %",
        basis=format_published_basis(),
        columns=_build_study_columns([result.stage for result in results], PRINTED_METRICS.values()),
        rows=_build_study_rows(STUDY.short_names, [_get_printed_metrics(result) for result in results], digits=0),
    )


def build_published_confusion_table() -> Table:
    """Build table 4 as the study printed it."""
    return Table(
        key="published-confusion-matrices",
        title="As published: confusion matrices, test images by true class (rows) and predicted class (columns)",
        basis=format_published_basis(),
        columns=(
            *create_text_columns("model", "stage", "true"),
            *(Column(name, heading="predicted") for name in STUDY.short_names),
        ),
        rows=tuple(
            Row((result.model, result.stage, name, *counts))
            for result in STUDY.results
            for name, counts in zip(STUDY.short_names, result.counts, strict=True)
        ),
    )


def format_published_basis() -> str:
    """Describe the data behind the study's numbers."""
    return (
        f"Image-level; {sum(STUDY.test_images)} test images, one per patient; OPTIMISTIC: every epoch was validated on "
        f"them. {STUDY.source}, DOI {STUDY.doi}."
    )


def _get_level_or_none(result: Result, level: str) -> Level | None:
    return result.images if level == IMAGES else result.patients


def _compute_study_metrics(result: Result, metrics: Iterable[str]) -> list[list[float]]:
    """Compute the metrics, each as one value per class followed by their average, in %; the user's own were saved."""
    names = result.images.predictions.class_names
    columns = []
    for metric in metrics:
        if metric in CLASS_METRICS:
            values = compute_class_metric(CLASS_METRICS[metric], result.images.confusion)
        else:
            saved = result.stage.own_metrics.get(metric, {})
            values = np.array([saved.get(name) for name in names], dtype=np.float64)  # None becomes NaN
        columns.append([*(100 * values), 100 * float(np.mean(values))])
    return columns


def _get_printed_metrics(result: PublishedModel) -> list[list[float]]:
    return [[float(value) for value in getattr(result, name)] for name in PRINTED_METRICS]


def _build_study_columns(stages: Sequence[str], labels: Iterable[str]) -> tuple[Column, ...]:
    titles = list(labels)
    return (*create_text_columns("class"), *(Column(title, heading=stage) for stage in stages for title in titles))


def _build_study_rows(
    names: Sequence[str], stages: Sequence[Sequence[Sequence[float]]], *, digits: int = 1
) -> tuple[Row, ...]:
    """Build one row per class, then the average; `stages` holds, per stage and metric, one value per row."""
    return tuple(
        Row(
            (name, *(Number(float(index[position]), digits) for stage in stages for index in stage)),
            strong=position == len(names),
        )
        for position, name in enumerate([*names, "average"])
    )


@dataclass(frozen=True, eq=False)
class PublishedComparison:
    """Comparison of one of our results with a published one.

    Attributes:
        ours: Our result.
        theirs: The published result of the same model and stage, or of the study's best model.
        indices: Name of each metric with our estimate and the published one, both with intervals.
    """

    ours: Result
    theirs: PublishedModel
    indices: tuple[tuple[str, Estimate, Estimate], ...]

    @property
    def sentence(self) -> str:
        """The conclusion about the difference in accuracy."""
        name, ours, theirs = self.indices[0]
        return format_unpaired_sentence(
            self.ours.label,
            f"the published {self.theirs.model} {self.theirs.stage}",
            difference_of_independent(ours, theirs),
            index=name,
            images=(self.ours.test.images, int(self.theirs.confusion.sum())),
            confidence=CONFIDENCE,
            in_points=True,
        )


def compare_with_published(results: Sequence[Result]) -> tuple[PublishedComparison, ...]:
    """Compare every result that has the study's three classes; results with other classes are skipped."""
    comparisons = []
    for result in results:
        class_indices = _match_study_classes(result)
        if class_indices is not None:
            theirs = _match_published_model(result)
            comparisons.append(
                PublishedComparison(result, theirs, _collect_metric_pairs(result, theirs, class_indices))
            )
    return tuple(comparisons)


def build_published_comparison_table(comparisons: Sequence[PublishedComparison]) -> Table:
    """Build the table of accuracy, macro F1 and per-class sensitivity, ours and published.

    Args:
        comparisons: At least one.
    """
    rows = []
    for each in comparisons:
        for name, ours, theirs in each.indices:
            rows.append(
                Row(
                    (
                        each.ours.label,
                        f"{each.theirs.model} {each.theirs.stage}",
                        name,
                        convert_to_percent_cell(ours),
                        convert_to_percent_cell(theirs),
                        convert_to_percent_cell(difference_of_independent(ours, theirs)),
                    )
                )
            )
    return Table(
        key="published-comparison",
        title="Our results and the published results, on different images",
        basis=f"Ours: {format_test_basis([each.ours for each in comparisons])} Published: {format_published_basis()}",
        columns=(
            *create_text_columns("ours", "published", "index"),
            Column("ours", unit="%"),
            Column("published", unit="%"),
            Column("difference", unit="points"),
        ),
        rows=tuple(rows),
        notes=(
            "Difference: ours minus published. The images differ, and so may the patients, the endoscopes and the "
            "cancers; a difference therefore cannot be attributed to the models alone. Confidence intervals of the "
            "difference: Newcombe's method (MOVER).",
        ),
    )


def _collect_metric_pairs(
    result: Result, theirs: PublishedModel, class_indices: Sequence[int]
) -> tuple[tuple[str, Estimate, Estimate], ...]:
    proportions = proportions_of_confusion(theirs.confusion, confidence=CONFIDENCE)
    f1 = indices_of_confusion(theirs.confusion, confidence=CONFIDENCE).macro_f1
    return (
        ("accuracy", result.images.shares.accuracy, proportions.accuracy),
        ("macro F1", result.images.indices.macro_f1, f1),
        *(
            (f"sensitivity of {name}", result.images.shares.sensitivity[own_index], proportions.sensitivity[index])
            for index, (name, own_index) in enumerate(zip(STUDY.short_names, class_indices, strict=True))
        ),
    )


def _match_study_classes(result: Result) -> list[int] | None:
    """Return the indices of the study's classes among a result's classes; None if the classes differ."""
    names = result.images.predictions.class_names
    full_names = dict(zip(result.run.short_names, result.run.class_names, strict=True))
    if len(names) != len(STUDY.short_names):
        return None
    for study_names, own_names in (
        (STUDY.short_names, list(names)),
        (STUDY.class_names, [_normalize_name(full_names[name]) for name in names]),
    ):
        wanted = [name if study_names is STUDY.short_names else _normalize_name(name) for name in study_names]
        if set(wanted) == set(own_names):
            return [own_names.index(name) for name in wanted]
    return None


def _match_published_model(result: Result) -> PublishedModel:
    architecture = _normalize_name(result.run.model.partition(".")[0])
    for published in STUDY.results:
        if _normalize_name(published.model) == architecture and published.stage == result.stage.name:
            return published
    return STUDY.get_result(*WINNER)


def _normalize_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
