"""A draft of the STARD-AI and CLAIM checklists: facts of the runs are filled in, the rest is left to the author.

Item numbers are those of STARD 2015 (30 items) and CLAIM 2020 (42 items); STARD-AI (2025) builds on STARD 2015, and its
additions are marked `AI`. The wording is ours: authors submit the published checklists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pylorus.report import checklist_answers as answers
from pylorus.report.evidence import Evidence
from pylorus.report.table import Row, Table, create_text_columns

AUTHOR = "[author: "
"""Opening of a blank that the author fills in."""


@dataclass(frozen=True)
class ChecklistItem:
    """One item that a paper has to report.

    Attributes:
        topic: Subject of the item.
        stard: Item number in STARD 2015, `AI` if STARD-AI adds it, or empty.
        claim: Item number in CLAIM 2020, or empty.
        answer: Function that returns what the runs document, or None.
        blank: What the author has to add, or empty.
    """

    topic: str
    stard: str
    claim: str
    answer: Callable[[Evidence], str] | None
    blank: str


ITEMS = (
    ChecklistItem(
        "Title and abstract",
        "1, 2",
        "1, 2",
        None,
        "the AI method and a measure of diagnostic accuracy; structured abstract",
    ),
    ChecklistItem(
        "Background, intended use",
        "3",
        "3",
        answers.report_intended_use,
        "clinical background and intended role of the model",
    ),
    ChecklistItem("Objectives, study goal", "4", "4, 6", None, "objectives and hypotheses"),
    ChecklistItem("Design", "5", "5", None, "prospective or retrospective data collection"),
    ChecklistItem(
        "Setting, sources, dates", "8", "7", answers.report_images, "hospitals, endoscopes, dates of the examinations"
    ),
    ChecklistItem(
        "Eligibility, series",
        "6, 7, 9",
        "8, 10",
        None,
        "inclusion and exclusion criteria; consecutive, random or convenience series",
    ),
    ChecklistItem("Preprocessing", "", "9", answers.report_preprocessing, ""),
    ChecklistItem("Classes", "", "11", answers.report_classes, "definition of each class"),
    ChecklistItem(
        "De-identification", "", "12", answers.report_deidentification, "how the images themselves were de-identified"
    ),
    ChecklistItem(
        "Missing and indeterminate data", "15, 16", "13", answers.report_missing_data, "images excluded beforehand"
    ),
    ChecklistItem(
        "Reference standard", "10b, 11, 12b", "14, 15", None, "how the true class was established, such as histology"
    ),
    ChecklistItem(
        "Annotators, tools, agreement",
        "13b",
        "16, 17, 18",
        None,
        "who labelled the images, with which tools, and agreement between annotators",
    ),
    ChecklistItem("Blinding of the model", "13a", "", answers.report_blinding, ""),
    ChecklistItem("Sample size", "18", "19", answers.report_sample_size, "how the sample size was determined"),
    ChecklistItem("Partitions", "AI", "20", answers.report_partitions, ""),
    ChecklistItem("Level at which partitions are disjoint", "AI", "21", answers.report_split_overlaps, ""),
    ChecklistItem("Model", "10a", "22", answers.report_models, ""),
    ChecklistItem("Software", "AI", "23", answers.report_software, ""),
    ChecklistItem("Initial weights", "", "24", answers.report_initial_weights, ""),
    ChecklistItem("Training", "AI", "25", answers.report_training, ""),
    ChecklistItem("Selection of the final model", "", "26, 27", answers.report_model_selection, ""),
    ChecklistItem("Cut-offs", "12a", "", answers.report_thresholds, "rationale for this sensitivity"),
    ChecklistItem("Measures of accuracy", "14", "28", answers.report_measures, ""),
    ChecklistItem("Uncertainty and tests", "14", "29", answers.report_uncertainty, ""),
    ChecklistItem("Robustness", "17", "30", None, "robustness to other endoscopes, sites and image quality"),
    ChecklistItem("Explainability", "", "31", answers.report_explainability, "methods for explainability, if any"),
    ChecklistItem("External test", "AI", "32", answers.report_external_test, "results on images from another hospital"),
    ChecklistItem(
        "Flow of participants",
        "19",
        "33",
        answers.report_partitions,
        "flow diagram from eligible patients to these images",
    ),
    ChecklistItem(
        "Characteristics of patients",
        "20, 21, 22",
        "34",
        answers.report_characteristics,
        "age, sex, and stage, size and location of lesions, for each split",
    ),
    ChecklistItem("Cross tabulation", "23", "", answers.report_confusion_matrices, ""),
    ChecklistItem("Estimates of accuracy and their precision", "24", "35, 36", answers.report_accuracy, ""),
    ChecklistItem(
        "Failure analysis", "", "37", answers.report_failures, "what the misclassified images have in common"
    ),
    ChecklistItem(
        "Bias and fairness",
        "AI",
        "",
        answers.report_fairness,
        "results by sex, age, site and device, unless given above; consequences",
    ),
    ChecklistItem("Adverse events", "25", "", None, "adverse events, if any"),
    ChecklistItem("Limitations", "26", "38", answers.report_limitations, "further limitations"),
    ChecklistItem(
        "Implications for practice",
        "27",
        "39",
        None,
        "implications for practice, including the intended use and clinical role",
    ),
    ChecklistItem(
        "Registration, protocol",
        "28, 29",
        "40, 41",
        None,
        "registration number and registry; where the protocol is available",
    ),
    ChecklistItem("Code and data", "AI", "41", answers.report_availability, "where code and data are available"),
    ChecklistItem(
        "Funding and interests", "30", "42", None, "sources of funding, role of the funders, competing interests"
    ),
)


def build_checklist_table(evidence: Evidence) -> Table:
    """Build the draft, filled in as far as the runs document it."""
    return Table(
        key="checklist",
        title="Draft of the STARD-AI and CLAIM checklists",
        basis="",
        columns=create_text_columns("topic", "STARD", "CLAIM", "from the runs, and blanks for the author"),
        rows=_build_checklist_rows(evidence, ITEMS),
        notes=(
            "Item numbers: STARD 2015 and CLAIM 2020; AI: added or changed by STARD-AI (2025). This is a draft to "
            "write from, not a completed form: check each line against the published checklists.",
        ),
    )


def _build_checklist_rows(evidence: Evidence, items: Sequence[ChecklistItem]) -> tuple[Row, ...]:
    rows = []
    for item in items:
        answer = item.answer(evidence) if item.answer is not None else ""
        blank = f"{AUTHOR}{item.blank}]" if item.blank else ""
        rows.append(
            Row(
                (
                    item.topic,
                    item.stard,
                    item.claim,
                    f"{answer} {blank}".strip() or f"{AUTHOR}not documented by these runs]",
                )
            )
        )
    return tuple(rows)
