"""A draft of what STARD-AI and CLAIM ask for: what the runs can tell is filled in, the rest is marked for the author.

Numbers are those of STARD 2015 (30 items) and CLAIM 2020 (42 items); STARD-AI (2025) builds on the first, and what it
adds is marked `AI`. The words are ours: the published checklists are what an author submits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pylorus.report import checklist_answers as answers
from pylorus.report.evidence import Evidence
from pylorus.report.table import Row, Table, text_columns

AUTHOR = "[author: "
"""How a blank begins."""


@dataclass(frozen=True)
class Item:
    """One thing that a paper has to say.

    Attributes:
        topic: What.
        stard: Number in STARD 2015, `AI` where STARD-AI adds it, or nothing.
        claim: Number in CLAIM 2020, or nothing.
        answer: What the runs tell, or nothing.
        blank: What is left to the author, or nothing.
    """

    topic: str
    stard: str
    claim: str
    answer: Callable[[Evidence], str] | None
    blank: str


ITEMS = (
    Item("Title and abstract", "1, 2", "1, 2", None, "the AI method and a measure of accuracy; structured abstract"),
    Item("Background, intended use", "3", "3", answers.intended_use, "clinical background and role of the model"),
    Item("Objectives, study goal", "4", "4, 6", None, "objectives and hypotheses"),
    Item("Design", "5", "5", None, "prospective or retrospective"),
    Item("Setting, sources, dates", "8", "7", answers.images, "hospitals, endoscopes, dates"),
    Item("Eligibility, series", "6, 7, 9", "8, 10", None, "inclusion, exclusion, consecutive or not"),
    Item("Preprocessing", "", "9", answers.preprocessing, ""),
    Item("Classes", "", "11", answers.classes, "definition of each class"),
    Item("De-identification", "", "12", answers.identification, "how the images themselves were de-identified"),
    Item("Missing and indeterminate data", "15, 16", "13", answers.missing, "images left out before"),
    Item("Reference standard", "10b, 11, 12b", "14, 15", None, "how the true class was established, e.g. histology"),
    Item("Annotators, tools, agreement", "13b", "16, 17, 18", None, "who labelled, with what, how well they agree"),
    Item("Blinding of the model", "13a", "", answers.blinding, ""),
    Item("Sample size", "18", "19", answers.sample_size, "how the size was planned"),
    Item("Partitions", "AI", "20", answers.partitions, ""),
    Item("Level at which partitions are disjoint", "AI", "21", answers.disjoint, ""),
    Item("Model", "10a", "22", answers.models, ""),
    Item("Software", "AI", "23", answers.software, ""),
    Item("Initial weights", "", "24", answers.weights, ""),
    Item("Training", "AI", "25", answers.training, ""),
    Item("Choice of the final model", "", "26, 27", answers.selection, ""),
    Item("Cut-offs", "12a", "", answers.cut_offs, "why this sensitivity"),
    Item("Measures of accuracy", "14", "28", answers.measures, ""),
    Item("Uncertainty and tests", "14", "29", answers.uncertainty, ""),
    Item("Robustness", "17", "30", None, "other endoscopes, sites, image quality"),
    Item("Explainability", "", "31", answers.explainability, "if any"),
    Item("External test", "AI", "32", answers.external, "result on another hospital's images"),
    Item("Flow of participants", "19", "33", answers.partitions, "from eligible patients to these images; a diagram"),
    Item(
        "Characteristics of patients",
        "20, 21, 22",
        "34",
        answers.characteristics,
        "age, sex, stage, size and site of lesions, by part",
    ),
    Item("Cross tabulation", "23", "", answers.cross_table, ""),
    Item("Accuracy with precision", "24", "35, 36", answers.accuracy, ""),
    Item("Failure analysis", "", "37", answers.failures, "what the mistaken images have in common"),
    Item(
        "Bias and fairness",
        "AI",
        "",
        answers.fairness,
        "results by sex, age, site, device, as far as not above; what follows",
    ),
    Item("Adverse events", "25", "", None, "if any"),
    Item("Limitations", "26", "38", answers.limitations, "further limits"),
    Item("Implications for practice", "27", "39", None, "what follows, and what does not"),
    Item("Registration, protocol", "28, 29", "40, 41", None, "number and place"),
    Item("Code and data", "AI", "41", answers.availability, "where they can be had"),
    Item("Funding and interests", "30", "42", None, "sources and role"),
)


def checklist_table(evidence: Evidence) -> Table:
    """The draft, as far as these runs can tell."""
    return Table(
        key="checklist",
        title="Draft along STARD-AI and CLAIM",
        basis="",
        columns=text_columns("topic", "STARD", "CLAIM", "from the runs, and blanks for the author"),
        rows=_rows(evidence, ITEMS),
        notes=(
            "Numbers: STARD 2015 and CLAIM 2020; AI: added or changed by STARD-AI (2025). A draft to write from, not a "
            "filled-in form: check each line against the published checklists.",
        ),
    )


def _rows(evidence: Evidence, items: Sequence[Item]) -> tuple[Row, ...]:
    rows = []
    for item in items:
        answer = item.answer(evidence) if item.answer is not None else ""
        blank = f"{AUTHOR}{item.blank}]" if item.blank else ""
        rows.append(Row((item.topic, item.stard, item.claim, f"{answer} {blank}".strip() or f"{AUTHOR}not known]")))
    return tuple(rows)
