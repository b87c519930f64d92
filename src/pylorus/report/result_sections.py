"""The tables of a report: in the study's form, all indices, comparisons, calibration and thresholds."""

from collections.abc import Sequence
from dataclasses import replace

from pylorus.evaluation.sentence import paired_sentence
from pylorus.report.comparison import AUROC, MACRO_F1, Comparison, IndexComparison
from pylorus.report.comparison_tables import comparison_table, other_table
from pylorus.report.confusion_figure import published_confusion_figure
from pylorus.report.decision_tables import calibration_table, threshold_table
from pylorus.report.evidence import Evidence
from pylorus.report.extended_tables import class_table, overall_table
from pylorus.report.fold_tables import each_fold_table, pool_folds, pooled_table, training_table
from pylorus.report.level import IMAGES, PATIENTS
from pylorus.report.options import LEVEL
from pylorus.report.published import STUDY
from pylorus.report.published_comparison import compare_with_published, published_comparison_table
from pylorus.report.replicate_tables import has_replicates, replicate_table
from pylorus.report.result import Result
from pylorus.report.run_facts import validation_images
from pylorus.report.run_tables import result_table
from pylorus.report.section import FileOnly, Item, Section, Sentences
from pylorus.report.study_tables import confusion_table, index_table, published_confusion_table, published_index_table

MOST_PAIRS = 24
"""Pairs beyond this number do not all stand on the page."""


def study_section(evidence: Evidence) -> Section:
    """Pooled replicates and folds, where there are any; the study's tables 1-4; then accuracy."""
    items = [
        *_pooled_tables(evidence),
        *(index_table(found) for run in evidence.runs if (found := evidence.of_run(run))),
    ]
    for number, group in enumerate(_by_classes(evidence.results), start=1):
        items.append(confusion_table(group, number=number))
    items += [result_table(evidence.results)] if evidence.results else []
    return Section("results", "Results in the form of the study", tuple(items))


def _pooled_tables(evidence: Evidence) -> list[Item]:
    """What the runs of a configuration say together, which stands before each run by itself."""
    candidates = [candidate for each in evidence.configurations for candidate in each.candidates]
    replicated = [candidate for candidate in candidates if has_replicates(candidate)]
    items: list[Item] = [replicate_table(replicated)] if replicated else []
    folds = pool_folds(evidence.configurations)
    for number, names in enumerate(dict.fromkeys(each.class_names for each in folds), start=1):
        chosen = [each for each in folds if each.class_names == names]
        tables = [pooled_table(chosen, level=level, number=number) for level in (IMAGES, PATIENTS)]
        items += [table for table in tables if table is not None]
        items += [training_table(chosen, number=number), each_fold_table(chosen, number=number)]
    return items


def published_section(evidence: Evidence) -> Section:
    """The published results, on request, and what ours differ in."""
    if not evidence.options.published:
        return Section("published", "", ())
    models = dict.fromkeys(result.model for result in STUDY.results)
    items: list[Item] = [
        Sentences((f"{STUDY.title}. {STUDY.source}, DOI {STUDY.doi}.",)),
        *(published_index_table(model) for model in models),
        published_confusion_table(),
        published_confusion_figure(),
        Sentences(("Its curves over epochs were published as drawings, not as numbers, and are left out here.",)),
    ]
    compared = compare_with_published(evidence.results)
    if compared:
        items += [published_comparison_table(compared), Sentences(tuple(each.sentence for each in compared), True)]
    elif evidence.results:
        items.append(
            Sentences(
                ("These runs have other classes than the study, so no difference between them would mean anything.",)
            )
        )
    return Section("published", "Beside the published study", tuple(items))


def index_section(evidence: Evidence) -> Section:
    """All indices with their intervals, image-level and patient-level."""
    results = evidence.results
    patients = [result for result in results if result.patients is not None]
    items: list[Item] = [overall_table(results)] if results else []
    items += [overall_table(patients, level=PATIENTS)] if patients else []
    for run in evidence.runs:
        for level in (IMAGES, PATIENTS):
            found = [result for result in evidence.of_run(run) if level == IMAGES or result.patients is not None]
            items += [class_table(found, level=level)] if found else []
    for number, group in enumerate(_by_classes(patients), start=1):
        items.append(confusion_table(group, level=PATIENTS, number=number))
    return Section("indices", "All indices with 95 % intervals", tuple(items))


def comparison_section(evidence: Evidence) -> Section:
    """What is and what is not shown between configurations and between stages; then all other pairs, unadjusted."""
    questions, others = evidence.comparisons, evidence.other_comparisons
    if not questions:
        return Section("comparisons", "", ())
    pairs = questions if len(questions) <= MOST_PAIRS else _pairs_with_winner(evidence)
    indices = [("macro F1", MACRO_F1)]
    indices += [(f"AUROC of {evidence.class_name}", AUROC)] if any(each.auroc for each in questions) else []
    items: list[Item] = [
        Sentences((_describe_families(questions, others=bool(others)),)),
        Sentences(tuple(each.sentence for each in pairs), listed=True),
        Sentences(tuple(_differing(pairs, title, key) for title, key in indices)),
    ]
    if pairs is not questions:
        items.append(
            Sentences((f"Of {len(questions)} pairs those of the winner stand here; tables/comparisons.csv has all.",))
        )
    whole = comparison_table(questions, class_name=evidence.class_name)
    items.append(whole if pairs is questions else FileOnly(whole))
    if others:
        appendix = other_table(others, class_name=evidence.class_name)
        items.append(appendix if len(others) <= MOST_PAIRS else FileOnly(appendix))
    return Section("comparisons", "What is shown, and what is not", tuple(items))


def _pairs_with_winner(evidence: Evidence) -> tuple[Comparison, ...]:
    """The pairs with a winner, where all would fill pages."""
    return tuple(dict.fromkeys(each for winner in evidence.winners for each in winner.comparisons))


def _describe_families(comparisons: Sequence[Comparison], *, others: bool) -> str:
    """Which questions are asked, and over how many tests each is corrected."""
    families = dict.fromkeys((each.question, each.family) for each in comparisons)
    several = [f"{question} ({_count_tests(size)})" for question, size in families]
    sentence = (
        f"Questions asked, each a family of its own for Holm's correction: {'; '.join(several)}."
        if len(several) > 1
        else f"Question asked, the family for Holm's correction: {several[0]}."
    )
    return sentence + (" All other pairs stand in the appendix below, unadjusted." if others else "")


def _count_tests(size: int) -> str:
    return "1 test, nothing to correct" if size == 1 else f"{size} tests"


def _differing(comparisons: Sequence[Comparison], index: str, key: str) -> str:
    """Which pairs are shown to differ in macro F1 or in AUROC, by the corrected p."""
    sentences, rest = [], 0
    for each in comparisons:
        compared: IndexComparison | None = each.macro_f1 if key == MACRO_F1 else each.auroc
        if compared is None:  # a class that these two do not know
            continue
        if not each.corrected[key] < LEVEL:
            rest += 1
            continue
        corrected = replace(compared.widest, p_value=each.corrected[key])
        names = (each.first.label, each.second.label)
        sentences.append(paired_sentence(*names, corrected, index=index, images=each.pool.images, level=LEVEL))
    if not sentences:
        return f"{'This pair is not' if rest == 1 else 'None of these pairs is'} shown to differ in {index}."
    return " ".join(sentences) + (f" No other of these pairs is shown to differ in {index}." if rest else "")


def decision_section(evidence: Evidence) -> Section:
    """Calibration and the threshold."""
    calibrated = [result for result in evidence.results if result.calibration is not None]
    items: list[Item] = [calibration_table(calibrated, class_name=evidence.class_name)] if calibrated else []
    for level in (IMAGES, PATIENTS):
        decided = [result for result in evidence.results if any(point.level == level for point in result.operating)]
        items += [threshold_table(decided, level=level)] if decided else []
    items += [Sentences((sentence,)) for sentence in _without_threshold(calibrated, evidence.class_name)]
    if len(calibrated) < len(evidence.results):
        missing = ", ".join(result.label for result in evidence.results if result.calibration is None)
        items.append(Sentences((f"Without validation predictions nothing is calibrated: {missing}.",)))
    return Section("decisions", "Calibration and threshold", tuple(items))


def _without_threshold(results: Sequence[Result], class_name: str | None) -> list[str]:
    """Why there is no threshold for some results."""
    without = [result for result in results if not result.operating]
    strangers = [result for result in without if class_name not in result.images.predictions.class_names]
    unseen = [result for result in without if result not in strangers]
    sentences = []
    if unseen:
        images = validation_images([result.run for result in unseen])
        labels = ", ".join(result.label for result in unseen)
        sentences.append(f"None of {images} is of class {class_name}: no threshold can be fixed for {labels}.")
    if strangers:
        labels = ", ".join(result.label for result in strangers)
        sentences.append(f"There is no threshold of {labels}, whose classes do not include {class_name}.")
    return sentences


def _by_classes(results: Sequence[Result]) -> list[list[Result]]:
    """Results of the same classes in the same order, which share a table."""
    found: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        found.setdefault(result.images.predictions.class_names, []).append(result)
    return list(found.values())
