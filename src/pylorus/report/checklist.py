"""A draft of the STARD-AI and CLAIM checklists: facts of the runs are filled in, the rest is left to the author.

Item numbers are those of STARD 2015 (30 items) and CLAIM 2020 (42 items); STARD-AI (2025) builds on STARD 2015, and its
additions are marked `AI`. The wording is ours: authors submit the published checklists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pylorus.report import checklist_answers as answers
from pylorus.report.evidence import Evidence
from pylorus.report.table import Row, Table, text_columns

AUTHOR = "[author: "
"""Opening of a blank that the author fills in."""


@dataclass(frozen=True)
class Item:
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
    Item(
        "Title and abstract",
        "1, 2",
        "1, 2",
        None,
        "the AI method and a measure of diagnostic accuracy; structured abstract",
    ),
    Item(
        "Background, intended use", "3", "3", answers.intended_use, "clinical background and intended role of the model"
    ),
    Item("Objectives, study goal", "4", "4, 6", None, "objectives and hypotheses"),
    Item("Design", "5", "5", None, "prospective or retrospective data collection"),
    Item("Setting, sources, dates", "8", "7", answers.images, "hospitals, endoscopes, dates of the examinations"),
    Item(
        "Eligibility, series",
        "6, 7, 9",
        "8, 10",
        None,
        "inclusion and exclusion criteria; consecutive, random or convenience series",
    ),
    Item("Preprocessing", "", "9", answers.preprocessing, ""),
    Item("Classes", "", "11", answers.classes, "definition of each class"),
    Item("De-identification", "", "12", answers.identification, "how the images themselves were de-identified"),
    Item("Missing and indeterminate data", "15, 16", "13", answers.missing, "images excluded beforehand"),
    Item("Reference standard", "10b, 11, 12b", "14, 15", None, "how the true class was established, such as histology"),
    Item(
        "Annotators, tools, agreement",
        "13b",
        "16, 17, 18",
        None,
        "who labelled the images, with which tools, and agreement between annotators",
    ),
    Item("Blinding of the model", "13a", "", answers.blinding, ""),
    Item("Sample size", "18", "19", answers.sample_size, "how the sample size was determined"),
    Item("Partitions", "AI", "20", answers.partitions, ""),
    Item("Level at which partitions are disjoint", "AI", "21", answers.disjoint, ""),
    Item("Model", "10a", "22", answers.models, ""),
    Item("Software", "AI", "23", answers.software, ""),
    Item("Initial weights", "", "24", answers.weights, ""),
    Item("Training", "AI", "25", answers.training, ""),
    Item("Selection of the final model", "", "26, 27", answers.selection, ""),
    Item("Cut-offs", "12a", "", answers.cut_offs, "rationale for this sensitivity"),
    Item("Measures of accuracy", "14", "28", answers.measures, ""),
    Item("Uncertainty and tests", "14", "29", answers.uncertainty, ""),
    Item("Robustness", "17", "30", None, "robustness to other endoscopes, sites and image quality"),
    Item("Explainability", "", "31", answers.explainability, "methods for explainability, if any"),
    Item("External test", "AI", "32", answers.external, "results on images from another hospital"),
    Item("Flow of participants", "19", "33", answers.partitions, "flow diagram from eligible patients to these images"),
    Item(
        "Characteristics of patients",
        "20, 21, 22",
        "34",
        answers.characteristics,
        "age, sex, and stage, size and location of lesions, for each split",
    ),
    Item("Cross tabulation", "23", "", answers.cross_table, ""),
    Item("Estimates of accuracy and their precision", "24", "35, 36", answers.accuracy, ""),
    Item("Failure analysis", "", "37", answers.failures, "what the misclassified images have in common"),
    Item(
        "Bias and fairness",
        "AI",
        "",
        answers.fairness,
        "results by sex, age, site and device, unless given above; consequences",
    ),
    Item("Adverse events", "25", "", None, "adverse events, if any"),
    Item("Limitations", "26", "38", answers.limitations, "further limitations"),
    Item(
        "Implications for practice",
        "27",
        "39",
        None,
        "implications for practice, including the intended use and clinical role",
    ),
    Item(
        "Registration, protocol",
        "28, 29",
        "40, 41",
        None,
        "registration number and registry; where the protocol is available",
    ),
    Item("Code and data", "AI", "41", answers.availability, "where code and data are available"),
    Item("Funding and interests", "30", "42", None, "sources of funding, role of the funders, competing interests"),
)


def checklist_table(evidence: Evidence) -> Table:
    """Build the draft, filled in as far as the runs document it."""
    return Table(
        key="checklist",
        title="Draft of the STARD-AI and CLAIM checklists",
        basis="",
        columns=text_columns("topic", "STARD", "CLAIM", "from the runs, and blanks for the author"),
        rows=_rows(evidence, ITEMS),
        notes=(
            "Item numbers: STARD 2015 and CLAIM 2020; AI: added or changed by STARD-AI (2025). This is a draft to "
            "write from, not a completed form: check each line against the published checklists.",
        ),
    )


def _rows(evidence: Evidence, items: Sequence[Item]) -> tuple[Row, ...]:
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
