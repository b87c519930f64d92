"""The stress test of a model: what degraded images cost, and whether what surrounds the tissue tells it the class.

`pylorus stress` measures and writes the page; a run's own report shows the sentences if they are of its own bundle.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.lines import Line2D

from pylorus.core.formatting import format_count, format_number, format_p_value, format_percent, join_names
from pylorus.core.io import write_json
from pylorus.data.degradation import DEGRADATIONS, GRADES, REGIONS, degrade_image
from pylorus.data.synthetic import generate_frame
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.stress import LEVEL, MIN_CHANGE, GradeResult, RegionResult, StressResult
from pylorus.report.figure_style import (
    Drawing,
    add_legend_above,
    create_figure,
    get_line_style,
    report_style,
)
from pylorus.report.headline import KeyFigure
from pylorus.report.mistakes import Item, Section, Sentences
from pylorus.report.page import PAGE, write_page
from pylorus.report.record_sections import STRESS_RECORD, SUMS
from pylorus.report.summary import Summary
from pylorus.report.table import (
    Cell,
    Column,
    Number,
    Table,
    convert_to_p_value_cell,
    convert_to_percent_cell,
    create_rows,
    create_text_columns,
)

# --- sentences ---


def _format_points(change: Estimate) -> str:
    value, low, high = (format_number(100 * end, 1, signed=True) for end in (change.value, change.low, change.high))
    return f"{value} points, {low} to {high}"


def find_first_loss(grades: Sequence[GradeResult], margin: float) -> GradeResult | None:
    """Return the first grade from which on all grades are shown to cost more accuracy than the margin; None if none."""
    first = None
    for result in reversed(grades):
        if not result.accuracy_change.high < -margin:
            break
        first = result
    return first


def format_loss_sentence(grades: Sequence[GradeResult], first: GradeResult, margin: float) -> str:
    """State from which grade on a kind of degradation costs accuracy, and whether abstention catches it."""
    kind = DEGRADATIONS[first.name]
    begin = f"from grade {first.grade} on" if first.grade < len(grades) else f"at grade {first.grade}"
    return (
        f"{kind.title}: {begin} ({kind.describe_grade(first.grade)}) accuracy is shown to fall by more "
        f"than {format_percent(margin, digits=None)} points ({_format_points(first.accuracy_change)}). "
        f"{_format_caught(first)}"
    )


def _format_caught(result: GradeResult) -> str:
    if not result.newly_wrong:
        return ""
    fraction = result.caught / result.newly_wrong
    word = "catches" if fraction >= 0.9 else "catches most of" if fraction > 0.5 else "does not catch"
    return (
        f"Abstention {word} this: the model abstains on {result.caught} of the "
        f"{format_count(result.newly_wrong, 'image')} that it classified correctly before and no longer does."
    )


def build_degradation_sentences(result: StressResult) -> list[str]:
    """State for each kind of degradation what it costs: the losses that are shown, then the others together."""
    losses, safe, doubtful = [], [], []
    for name, kind in DEGRADATIONS.items():
        grades = result.get_grades(name)
        first = find_first_loss(grades, result.margin)
        if first is not None:
            losses.append(format_loss_sentence(grades, first, result.margin))
        elif min(each.accuracy_change.low for each in grades) > -result.margin:
            safe.append(kind.label)
        else:
            doubtful.append(kind.label)
    points = f"{format_percent(result.margin, digits=None)} points"
    if safe:
        losses.append(f"At all grades the loss of accuracy is shown to be less than {points}: {join_names(safe)}.")
    if doubtful:
        losses.append(
            f"Not shown to cost more than {points} of accuracy at all higher grades, but not ruled out by these "
            f"images: {join_names(doubtful)}."
        )
    return losses


def _name_region(region: str) -> str:
    return {"border": "the frame's border", "overlays": "text and plates"}.get(region, f"the corner at the {region}")


def format_region_sentence(result: RegionResult, names: Sequence[str]) -> str:
    """State what a region tells the network, with the figures on which that rests.

    Args:
        result: A region that alone is better than chance.
        names: Short names of the classes.
    """
    assert result.test is not None
    assert result.accuracy_change is not None
    name, test = _name_region(result.region), result.test
    reverse = "" if test.area > 0.5 else "; below 0.5, as without tissue it answers the opposite"
    figures = f"AUROC {format_number(test.area, 3)} for {names[test.label]}, {format_p_value(result.corrected_p)}"
    figures += reverse
    shift = f"the probabilities by {format_number(100 * result.shift, 1)} points on average"
    if not result.is_shortcut:
        return f"The network tells the class by {name} alone ({figures}), but hiding it changes {shift}: hardly used."
    return (
        f"The network tells the class by {name} alone ({figures}). Hiding it changes {shift}, the most probable class "
        f"of {format_percent(result.changed)} % of the images, and accuracy by "
        f"{_format_points(result.accuracy_change)}."
    )


def build_region_sentences(result: StressResult) -> list[str]:
    """State for each region without tissue what it tells the network: findings first, the others together."""
    better = [each for each in result.regions if each.test is not None and each.corrected_p <= LEVEL]
    better.sort(key=lambda each: not each.is_shortcut)
    sentences = [format_region_sentence(each, list(result.counts)) for each in better]
    chance = [each for each in result.regions if each.test is not None and each not in better]
    if chance:
        limit = max(each.test.limit for each in chance if each.test is not None)
        sentences.append(
            f"Not shown to be better than chance: {join_names([_name_region(each.region) for each in chance])}. "
            f"An AUROC above {format_number(limit, 2)} or below {format_number(1 - limit, 2)} would have been found."
        )
    by_problem: dict[str, list[str]] = {}
    for each in result.regions:
        if each.test is None:
            by_problem.setdefault(each.problem, []).append(_name_region(each.region))
    sentences += [f"Not tested, since {problem}: {join_names(names)}." for problem, names in by_problem.items()]
    return sentences


def build_findings(result: StressResult) -> list[str]:
    """Return the sentences at the head of the page: shortcuts first, then what degradation costs."""
    shortcuts = [each for each in result.regions if each.is_shortcut]
    tested = [each for each in result.regions if each.test is not None]
    sentences = []
    if shortcuts:
        sentences.append(
            "POSSIBLE SHORTCUT: the network tells the classes apart by what is not tissue. Its results may not hold "
            "where images do not carry the same marks."
        )
        sentences += [format_region_sentence(each, list(result.counts)) for each in shortcuts]
    elif tested:
        parts = [_name_region(each.region) for each in tested if each.region in ("border", "overlays")]
        sentences.append(
            f"No shortcut was found outside the tissue ({join_names(parts)}): alone, it is not shown to be better than "
            "chance, or hiding it changes next to nothing."
        )
    else:
        sentences.append("No region without tissue could be tested for shortcuts; the section below says why.")
    points = format_percent(result.margin, digits=None)
    losses = [(kind, find_first_loss(result.get_grades(kind), result.margin)) for kind in DEGRADATIONS]
    known = [(DEGRADATIONS[kind].label, first) for kind, first in losses if first is not None]
    if not known:
        kinds = [result.get_grades(kind) for kind in DEGRADATIONS]
        open_kinds = sum(min(each.accuracy_change.low for each in grades) < -result.margin for grades in kinds)
        sentences.append(
            f"No kind of degradation is shown to cost more than {points} points of accuracy; these "
            f"{format_count(result.images, 'image')} do not rule it out for {open_kinds} of {len(kinds)} kinds."
        )
    else:
        parts = [f"{label} from grade {first.grade}" for label, first in known]
        newly_wrong, caught = sum(each.newly_wrong for _, each in known), sum(each.caught for _, each in known)
        sentences.append(
            f"Accuracy is shown to fall by more than {points} points under {join_names(parts)}. At these grades the "
            f"model abstains on {caught:,} of the {newly_wrong:,} images that it classified correctly before and no "
            "longer does."
        )
    silent = [
        f"{kind.label} from grade {first.grade}"
        for kind in DEGRADATIONS.values()
        if (first := find_first_silence(result.get_grades(kind.name))) is not None
    ]
    if silent:
        sentences.append(f"It answers less than half of the images under {join_names(silent)}.")
    return sentences


def find_first_silence(grades: Sequence[GradeResult]) -> GradeResult | None:
    """Return the first grade from which on the model answers less than half of the images; None if it never does."""
    first = None
    for result in reversed(grades):
        if result.answered.value >= 0.5:
            break
        first = result
    return first


# --- tables and figures ---


def build_degradation_table(result: StressResult) -> Table:
    """Build the table of all kinds and grades, with paired changes."""
    rows: list[list[Cell]] = []
    for each in (result.baseline, *result.grades):
        kind = DEGRADATIONS.get(each.name)
        rows.append(
            [
                "as they are" if kind is None else f"{kind.title} ({kind.quantity})",
                "–" if kind is None else f"{each.grade}: {kind.format_amount(each.grade)}",
                convert_to_percent_cell(each.accuracy),
                "" if kind is None else convert_to_percent_cell(each.accuracy_change),
                convert_to_percent_cell(each.sensitivity),
                "" if kind is None else convert_to_percent_cell(each.sensitivity_change),
                convert_to_percent_cell(each.specificity),
                "" if kind is None else convert_to_percent_cell(each.specificity_change),
                convert_to_percent_cell(each.answered),
                convert_to_percent_cell(each.unlike),
                "" if kind is None else f"{each.caught} of {each.newly_wrong}",
            ]
        )
    of_class = f"of {result.deciding} at its stored threshold"
    return Table(
        key="degradation",
        title="Degraded images, beside the same images as they are",
        basis=result.basis,
        columns=(
            *create_text_columns("degradation", "grade"),
            Column("accuracy", unit="%"),
            Column("change", unit="points"),
            Column("sensitivity", of_class, "%"),
            Column("change", of_class, "points"),
            Column("specificity", of_class, "%"),
            Column("change", of_class, "points"),
            Column("answered", unit="%"),
            Column("unlike", unit="%"),
            Column("newly wrong, abstained", text=True),
        ),
        rows=create_rows(rows),
        notes=(
            "Changes are paired, image by image, with patients kept together; they are not corrected for the number of "
            "grades.",
            "Answered: the model does not abstain. Unlike: it calls the image unlike its training images.",
            "Newly wrong: classified correctly as they are, and not any more; on so many of these it abstains.",
        ),
    )


def build_region_table(result: StressResult) -> Table:
    """Build the table of the regions without tissue."""
    rows: list[list[Cell]] = []
    for each in result.regions:
        meaning = f"{each.region}: {REGIONS[each.region]}"
        if each.test is None or each.accuracy_change is None:
            rows.append([meaning, each.images, *6 * [""], f"not tested: {each.problem}"])
            continue
        verdict = "possible shortcut" if each.is_shortcut else "hardly used" if each.corrected_p <= LEVEL else "–"
        rows.append(
            [
                meaning,
                each.images,
                Number(each.test.area, 3),
                list(result.counts)[each.test.label],
                Number(each.test.limit, 3),
                convert_to_p_value_cell(each.corrected_p),
                Number(100 * each.changed, 1),
                convert_to_percent_cell(each.accuracy_change),
                verdict,
            ]
        )
    return Table(
        key="regions",
        title="What is not tissue: the network on each region alone, and on images without it",
        basis=result.basis,
        columns=(
            Column("region", text=True),
            Column("images with it"),
            Column("AUROC", "region alone"),
            Column("for", "region alone", text=True),
            Column("chance, at most", "region alone"),
            Column("p", "region alone"),
            Column("other class", "region hidden", "%"),
            Column("change of accuracy", "region hidden", "points"),
            Column("verdict", text=True),
        ),
        rows=create_rows(rows),
        notes=(
            "Alone: the field in the mean colour of all fields, the rest in the colour around it. For corners, text "
            "and plates the network's answer to the same frame without them is subtracted, so that the shape of the "
            "field does not count; for the border it does. AUROC: that of the class that is furthest from 0.5 (each "
            "patient and class counts once). It is below 0.5 if the network answers the opposite where there is no "
            "tissue. Chance lies between the second number and its mirror image in 999 of 1,000 random assignments of "
            "the classes to patients: a weaker use of the region can't be found with these images.",
            "p: permutation test with whole patients, corrected for the number of regions (Holm). A region "
            f"is a possible shortcut if p ≤ {LEVEL:g} and hiding it changes the probabilities by "
            f"{format_percent(MIN_CHANGE, digits=None)} point or more on average.",
            "Hidden: in the colour around the field, text in the colour of its surroundings.",
        ),
    )


COLUMNS = 3


def plot_degradation(result: StressResult) -> Drawing:
    """Plot accuracy, sensitivity of the class of interest and answered images against the grade, kind by kind."""
    lines: tuple[tuple[str, str], ...] = (
        ("accuracy", "accuracy"),
        ("sensitivity", f"sensitivity of {result.deciding}"),
        ("answered", "answered"),
    )
    if result.threshold is None:
        lines = (lines[0], lines[2])
    labels = [label for _, label in lines]
    with report_style():
        rows = -(-len(DEGRADATIONS) // COLUMNS)
        figure = create_figure(1.75 * rows, legend=labels)
        panels = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False)
        for panel, kind in zip(panels.flat, DEGRADATIONS.values(), strict=False):
            grades = [result.baseline, *result.get_grades(kind.name)]
            x = np.array([each.grade for each in grades]) * 1.0
            for number, (attribute, _) in enumerate(lines):
                estimates = [getattr(each, attribute) for each in grades]
                value, low, high = (
                    100 * np.array([getattr(each, end) for each in estimates]) for end in ("value", "low", "high")
                )
                style = get_line_style(number)
                panel.plot(x, value, **style)
                panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            panel.set_title(kind.title)
            panel.set_xticks(x, ["as is", *(kind.format_amount(grade) for grade in range(1, GRADES + 1))], fontsize=7)
            panel.set_xlabel(kind.quantity, fontsize=6.5)
            panel.set_ylim(-2, 102)
        for row in panels:
            row[0].set_ylabel("%")
        for panel in panels.flat[len(DEGRADATIONS) :]:
            panel.set_visible(False)
        add_legend_above(figure, [Line2D([], [], **get_line_style(n)) for n in range(len(lines))], labels)
    worst = min(result.grades, key=lambda each: each.accuracy.value)
    return Drawing(
        "degradation",
        "Accuracy, sensitivity and answered images by grade of degradation",
        f"{result.basis} Bands: 95 % confidence intervals.",
        f"Curves for {len(DEGRADATIONS)} kinds of degradation. The lowest accuracy is "
        f"{format_percent(worst.accuracy.value)} %, under {DEGRADATIONS[worst.name].label} at grade {worst.grade}.",
        figure,
    )


EXAMPLE_SIDE = 120


def plot_examples() -> Drawing:
    """Draw all grades of all kinds on a synthetic frame, which is of no patient."""
    frame = generate_frame("gastric_ulcer", seed=7, size=400).image
    with report_style():
        columns = 2
        rows = -(-len(DEGRADATIONS) // columns)
        figure = create_figure(0.85 * rows)
        panels = figure.subplots(rows, columns, squeeze=False)
        for panel, kind in zip(panels.flat, DEGRADATIONS.values(), strict=False):
            images = [frame, *(degrade_image(frame, kind.name, grade) for grade in range(1, GRADES + 1))]
            strip = [cv2.resize(image, 2 * (EXAMPLE_SIDE,), interpolation=cv2.INTER_AREA) for image in images]
            panel.imshow(np.concatenate(strip, axis=1))
            panel.set_title(kind.title, fontsize=8)
            panel.set_axis_off()
    return Drawing(
        "grades",
        "The grades on a synthetic frame: as it is, then grades 1 to 5",
        "A generated frame, not of a patient.",
        f"Strips of six frames for {len(DEGRADATIONS)} kinds of degradation, each worse from left to right.",
        figure,
    )


# --- page and record ---

METHODS = (
    "Each image is decoded once, degraded at its own resolution, and prepared as the bundle prepares it. A grade is "
    "determined by the image's content, the kind and the seed, so a repetition gives the same numbers. Lengths are in "
    "thousandths of the field's diameter: 10 ‰ are 10 pixels on a field of 1,000 pixels. Light is changed in linear "
    "light (gamma 2.2) and inside the field only.",
    "The model answers with its stored temperature, thresholds and limits of abstention. Proportions have Wilson "
    "intervals at the effective number of images; changes have paired intervals with whole patients (MOVER).",
    "The field of view is widened by 2 % of its diameter before its surroundings are cut out, and all images get the "
    "same fill colour, so that no tissue can tell the class. Images in which no field is found, or whose field fills "
    "the frame, have no border and are left out of its tests.",
    "The test says what this network does with these images. It can't find a mark that these images do not carry, one "
    "over the tissue that is not detected as text or as a plate, or a shortcut in the tissue itself, such as "
    "the colour of one hospital's lamp. A field of another shape in one class counts as a shortcut of the border: it "
    "often tells the device.",
)


def build_stress_sections(result: StressResult) -> tuple[Section, ...]:
    """Build the sections of the page."""
    shortcuts: list[Item] = [Sentences(tuple(build_region_sentences(result)), is_list=True)]
    if any(each.test is not None for each in result.regions):
        shortcuts.append(build_region_table(result))
    if result.prepared:
        shortcuts.insert(0, Sentences((result.prepared,)))
    sentences = tuple(build_degradation_sentences(result))
    return (
        Section("shortcuts", "Shortcuts: what is not tissue", tuple(shortcuts), is_appendix=False),
        Section(
            "degradation",
            "Degraded images",
            (plot_degradation(result), Sentences(sentences, is_list=True)),
            is_appendix=False,
        ),
        Section("all-grades", "All grades in numbers", (build_degradation_table(result),)),
        Section("examples", "What the grades look like", (plot_examples(),)),
        Section("methods", "Methods and limits", (Sentences(METHODS),)),
    )


def write_stress_page(result: StressResult, output: Path) -> Path:
    """Write the page, its tables, figures and record, and return the path of the page."""
    counts = ", ".join(f"{name} {count:,}" for name, count in result.counts.items())
    patients = "each image counts as a patient" if result.patients is None else f"{result.patients:,} patients"
    threshold = "no stored threshold" if result.threshold is None else f"stored threshold {result.threshold:.3g}"
    summary = Summary(
        title=f"Stress test of {result.architecture}",
        subtitle=f"Tested {time.strftime('%Y-%m-%d')}. {result.basis}",
        marks=(),
        headline=None,
        findings=tuple(build_findings(result)),
        warnings=result.unused,
        facts=(
            KeyFigure("Images", f"{result.images:,}", f"{counts}; {patients}"),
            KeyFigure(
                "Accuracy as they are", f"{format_percent(result.baseline.accuracy.value)} %", "without abstention"
            ),
            KeyFigure("Class of interest", result.deciding, threshold),
        ),
    )
    (output / PAGE).unlink(missing_ok=True)  # if this is interrupted, no page of an earlier test remains
    # First the record: the folder is then known as one of a stress test, and accepted again.
    write_json(
        output / STRESS_RECORD,
        {
            SUMS: result.identity,
            "images": result.images,
            "patients": result.patients,
            "source": result.source,
            "seed": result.seed,
            "margin": result.margin,
            "shortcuts": [each.region for each in result.regions if each.is_shortcut],
            "findings": build_findings(result),
        },
    )
    return write_page(output, summary, build_stress_sections(result))
