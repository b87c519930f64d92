"""Drafts of the reporting checklists QUAIDE, STARD-AI, CLAIM 2024 and TRIPOD+AI, filled in as far as the runs allow.

Each item has a topic in our own words, its numbers in the guidelines, the answer that the runs document, and what the
author has to add. Authors submit the published checklists, whose wording is not repeated here. Numbers are meant to be
those of STARD-AI (2025; 40 items), CLAIM (2024 update; 44 items) and TRIPOD+AI (2024; 27 items), of which only the last
were compared with a listing of the items; each table says so. Of QUAIDE (2025; 18 statements) only the four domains are
given: which statement an answer belongs to is for the author to look up.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from pylorus.report import checklist_answers as answers
from pylorus.report.evidence import Evidence
from pylorus.report.table import Row, Table, create_text_columns

AUTHOR = "[author: "
"""Opening of a blank that the author fills in."""

DATA, OUTCOMES, SETUP, PRESENTATION = (
    "data acquisition and annotation",
    "outcome reporting",
    "experimental setup and algorithm architecture",
    "result presentation and interpretation",
)
QUAIDE_DOMAINS = {DATA: 6, OUTCOMES: 3, SETUP: 4, PRESENTATION: 5}
"""Domains of QUAIDE with their numbers of statements."""


@dataclass(frozen=True)
class ChecklistItem:
    """One item that a paper has to report.

    Attributes:
        topic: Subject of the item, in our own words.
        stard: Item numbers in STARD-AI, separated by commas, or empty.
        claim: Item numbers in CLAIM 2024, or empty.
        tripod: Item numbers in TRIPOD+AI, or empty.
        quaide: Domain of QUAIDE, or empty.
        answer: Function that returns what the runs document, or None.
        blank: What the author has to add, or empty.
    """

    topic: str
    stard: str
    claim: str
    tripod: str
    quaide: str
    answer: Callable[[Evidence], str] | None
    blank: str


ITEMS = tuple(
    ChecklistItem(*fields)
    for fields in (
        ("Title", "1", "1", "1", "", None, "a title that names the AI method, the target population and the diagnosis"),
        ("Abstract", "2", "2", "2", "", None, "a structured abstract"),
        (
            "Background, intended use",
            "3",
            "3",
            "3a, 3b",
            "",
            answers.report_intended_use,
            "clinical background, users, and the place of the model in the clinical workflow",
        ),
        ("Known inequalities in care", "", "", "3c", "", None, "health inequalities between groups of patients"),
        ("Objectives and hypotheses", "4", "4", "4", "", None, "objectives and hypotheses"),
        ("Design", "5", "5", "", SETUP, None, "prospective or retrospective data collection"),
        ("Aim of the study", "", "6", "", "", None, "such as feasibility, development, external validation"),
        ("Ethics approval", "6", "", "17", "", None, "ethics committee, approval number, and consent or its waiver"),
        (
            "Sources of the data",
            "11",
            "7",
            "5a",
            DATA,
            answers.report_images,
            "hospitals; routine collection, collection for this study, or a public data set",
        ),
        ("Setting and dates", "9", "", "5b, 6a", DATA, None, "number and kind of centers; dates of the examinations"),
        ("Eligibility", "7, 8", "8", "6b", DATA, None, "inclusion and exclusion criteria, for patients and for images"),
        ("Treatments", "", "", "6c", "", None, "treatments before the examination, such as eradication or resection"),
        ("Series of patients", "10", "", "", DATA, None, "consecutive, random or convenience series"),
        ("Selection of images", "", "10", "", DATA, None, "how images of an examination were selected"),
        ("Preprocessing", "14", "9", "7", DATA, answers.report_preprocessing, ""),
        (
            "Image acquisition",
            "13, 14",
            "13",
            "9a, 9b, 9c",
            DATA,
            None,
            "endoscopes and processors (maker, model), light mode, format and size of the stored images",
        ),
        (
            "De-identification",
            "",
            "11",
            "",
            DATA,
            answers.report_deidentification,
            "how the images themselves were de-identified",
        ),
        (
            "Missing and indeterminate data",
            "19, 20",
            "12",
            "11",
            DATA,
            answers.report_missing_data,
            "images excluded beforehand",
        ),
        ("Classes", "16c", "", "8a", OUTCOMES, answers.report_classes, "definition of each class"),
        ("Reference standard", "16a", "14", "8a", OUTCOMES, None, "how the true class was established (histology?)"),
        ("Choice of the reference standard", "16b", "15", "", OUTCOMES, None, "why this reference standard was chosen"),
        ("Annotators", "12", "16", "8b", DATA, None, "who labeled the images, with what experience and tools"),
        ("Labels of the test images", "", "17", "", DATA, None, "how the test images were labeled, if otherwise"),
        ("Agreement between annotators", "", "18", "", DATA, None, "agreement between and within annotators"),
        (
            "Blinding of the annotators",
            "17b",
            "",
            "8c",
            DATA,
            None,
            "what the annotators knew, in particular of the answers of the model",
        ),
        ("Blinding of the model", "17a", "", "9b", SETUP, answers.report_blinding, ""),
        ("Partitions", "15b", "19", "12a", SETUP, answers.report_partitions, ""),
        ("Level at which partitions are disjoint", "15b", "20", "12a", SETUP, answers.report_split_overlaps, ""),
        ("Sample size", "22", "21", "10", SETUP, answers.report_sample_size, "how the sample size was determined"),
        ("Model", "15a", "22", "12c, 22", SETUP, answers.report_models, ""),
        ("Software", "13", "23", "12c", SETUP, answers.report_software, ""),
        ("Initial weights", "15b", "24", "12c", SETUP, answers.report_initial_weights, ""),
        ("Training", "15b", "25", "12b, 12c", SETUP, answers.report_training, ""),
        ("Selection of the final model", "15b", "26, 27", "12c", SETUP, answers.report_model_selection, ""),
        ("Cut-offs", "15c", "", "15", OUTCOMES, answers.report_thresholds, "rationale for this sensitivity"),
        ("Users of the model", "15d", "", "27b", "", None, "who is to use the model, with what experience"),
        ("Measures of accuracy", "18", "28", "12e", OUTCOMES, answers.report_measures, ""),
        ("Uncertainty and tests", "18", "29", "12e", OUTCOMES, answers.report_uncertainty, ""),
        (
            "Robustness",
            "21",
            "30",
            "12d, 23b",
            PRESENTATION,
            None,
            "robustness to other endoscopes, sites and image quality",
        ),
        (
            "Explainability",
            "",
            "31",
            "",
            PRESENTATION,
            answers.report_explainability,
            "methods for explainability, if any",
        ),
        ("Internal test", "", "32", "12g", SETUP, answers.report_test_images, ""),
        (
            "External test",
            "15b, 29",
            "33",
            "16, 20c",
            SETUP,
            answers.report_external_test,
            "results on images from another hospital, and how these images differ",
        ),
        ("Updating of the model", "", "", "12f, 24", "", None, "recalibration or retraining after the test, if any"),
        ("Class imbalance", "", "", "13", SETUP, answers.report_class_balance, ""),
        (
            "Bias and fairness",
            "23",
            "",
            "14, 23a",
            PRESENTATION,
            answers.report_fairness,
            "results by sex, age, site and device, unless given above; consequences",
        ),
        (
            "Flow of participants",
            "24",
            "35",
            "20a, 21",
            PRESENTATION,
            answers.report_partitions,
            "the steps from eligible patients to these images",
        ),
        (
            "Characteristics of patients",
            "25, 26a, 26b",
            "36",
            "20b",
            PRESENTATION,
            answers.report_characteristics,
            "age, sex, and stage, size and location of lesions, for each split",
        ),
        ("Time between test and reference", "27", "", "", "", None, "time between endoscopy and histology, treatments"),
        (
            "Representativeness of the test images",
            "28",
            "",
            "5a",
            PRESENTATION,
            None,
            "whether classes are as frequent among the test images as where the model is to be used",
        ),
        ("Cross tabulation", "30", "", "21", PRESENTATION, answers.report_confusion_matrices, ""),
        ("Estimates of accuracy and their precision", "31", "37, 38", "23a", PRESENTATION, answers.report_accuracy, ""),
        (
            "Failure analysis",
            "23",
            "39",
            "",
            PRESENTATION,
            answers.report_failures,
            "what the misclassified images have in common",
        ),
        ("Adverse events", "32", "", "", "", None, "adverse events, if any"),
        ("Interpretation", "", "", "25", PRESENTATION, None, "interpretation, also with respect to fairness"),
        ("Limitations", "33", "40", "26", PRESENTATION, answers.report_limitations, "further limitations"),
        (
            "Implications for practice",
            "34",
            "41",
            "27c",
            PRESENTATION,
            None,
            "implications for practice, including the intended use and clinical role, and next steps",
        ),
        (
            "Input of poor quality",
            "",
            "",
            "27a",
            PRESENTATION,
            None,
            "how images of poor quality are to be handled where the model is used",
        ),
        ("Ethical considerations of use", "35", "", "", "", None, "ethical considerations and fairness of the use"),
        ("Registration", "36", "34", "18d", "", None, "registration number and registry, or that there is none"),
        ("Protocol", "37", "42", "18c", "", None, "where the protocol is available, or that there is none"),
        (
            "Code and data",
            "40a",
            "43",
            "18e, 18f",
            "",
            answers.report_availability,
            "where code, trained model and data are available",
        ),
        ("Stored outputs", "40b", "", "", "", answers.report_availability, "who can audit the stored outputs"),
        ("Funding", "38", "44", "18a", "", None, "sources of funding, role of the funders"),
        ("Interests", "39", "", "18b", "", None, "competing and commercial interests"),
        (
            "Patients and the public",
            "",
            "",
            "19",
            "",
            None,
            "involvement of patients and the public, or that there was none",
        ),
    )
)
"""All items, in the order of a paper."""


@dataclass(frozen=True)
class Guideline:
    """A reporting guideline.

    Attributes:
        key: Attribute of a `ChecklistItem` that has its numbers; also the ending of the key of its table.
        name: Name with version.
        note: What its numbers are.
    """

    key: str
    name: str
    note: str


UNCONFIRMED = "These numbers were not confirmed with the published form: compare each of them."

GUIDELINES = (
    Guideline(
        "quaide",
        "QUAIDE (2025)",
        "QUAIDE has 18 statements: "
        + ", ".join(f"{domain} ({count})" for domain, count in QUAIDE_DOMAINS.items())
        + ". By its abstract, statements 1 to 14 are on methods, 15 and 16 on results, 17 and 18 on the "
        "discussion. Which statement a row answers is not known to this program: look up its number.",
    ),
    Guideline("stard", "STARD-AI (2025)", f"Item numbers of STARD-AI (2025). {UNCONFIRMED}"),
    Guideline("claim", "CLAIM (2024 update)", f"Item numbers of the 2024 update of CLAIM. {UNCONFIRMED}"),
    Guideline(
        "tripod",
        "TRIPOD+AI (2024)",
        "Item numbers of TRIPOD+AI (2024), compared with a listing of the items by others, not with the published "
        "form.",
    ),
)

DRAFT_NOTE = (
    "This is a draft to write from, not a completed form: check each line against the published checklists. Topics are "
    "in our own words."
)


def build_checklist_table(evidence: Evidence) -> Table:
    """Build the draft of all guidelines in one table, in the order of a paper."""
    return Table(
        key="checklist",
        title="Draft of the QUAIDE, STARD-AI, CLAIM and TRIPOD+AI checklists",
        basis="",
        columns=create_text_columns(
            "topic", "STARD-AI", "CLAIM", "TRIPOD+AI", "QUAIDE", "from the runs, and blanks for the author"
        ),
        rows=tuple(
            Row((item.topic, item.stard, item.claim, item.tripod, item.quaide, fill_item(item, evidence)))
            for item in ITEMS
        ),
        notes=(
            "Item numbers: STARD-AI (2025), CLAIM (2024 update), TRIPOD+AI (2024); QUAIDE (2025): domain of the "
            "statement, whose number is for the author to look up. Only the numbers of TRIPOD+AI were compared with a "
            f"listing of the items. {DRAFT_NOTE}",
        ),
    )


def build_guideline_table(guideline: Guideline, evidence: Evidence) -> Table:
    """Build the draft of one guideline, in the order of its own numbers, one row per number."""
    rows: list[tuple[str, str, str]] = [
        (number.strip(), item.topic, fill_item(item, evidence))
        for item in ITEMS
        for number in getattr(item, guideline.key).split(",")
        if number.strip()
    ]
    domains = list(QUAIDE_DOMAINS)
    if guideline.key == "quaide":
        rows.sort(key=lambda row: domains.index(row[0]))
        rows = [(f"{row[0]}, statement {AUTHOR}number]", *row[1:]) for row in rows]
    else:
        rows.sort(key=lambda row: _compute_number_key(row[0]))
    return Table(
        key=f"checklist-{guideline.key}",
        title=f"Draft of the checklist {guideline.name}",
        basis="",
        columns=create_text_columns(
            "domain" if guideline.key == "quaide" else "item", "topic", "from the runs, and blanks for the author"
        ),
        rows=tuple(Row(row) for row in rows),
        notes=(f"{guideline.note} {DRAFT_NOTE}",),
    )


def fill_item(item: ChecklistItem, evidence: Evidence) -> str:
    """Return what the runs document about an item, followed by the blank for the author."""
    answer = item.answer(evidence) if item.answer is not None else ""
    blank = f"{AUTHOR}{item.blank}]" if item.blank else ""
    return f"{answer} {blank}".strip() or f"{AUTHOR}not documented by these runs]"


def _compute_number_key(number: str) -> tuple[int, str]:
    """Return a key that sorts 3a before 3b and 9 before 10."""
    match = re.fullmatch(r"(\d+)([a-z]?)", number)
    assert match is not None
    return int(match[1]), match[2]
