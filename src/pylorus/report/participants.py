"""Flow diagram of patients and images through a run, and the characteristics of the patients of each part.

Both are read from what the run saved: split.csv, audit.json and the further columns of the manifest in catalog.parquet.
What happened before the files were handed over, such as eligibility, no run knows: the figure leaves a box for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray

from pylorus.core.formatting import format_count
from pylorus.core.io import PARQUET_OPTIONS
from pylorus.core.privacy import MANIFEST_PREFIX, find_identifying_reason
from pylorus.report.captions import count_excluded_files, format_caveats, is_validated_on_test
from pylorus.report.figure_style import FAINT, INK, PAPER, Drawing, create_figure, report_style, wrap_text
from pylorus.report.results import IMAGES, PATIENTS
from pylorus.report.subgroup_columns import NOT_STATED, SubgroupColumn, build_subgroup_columns, parse_numbers
from pylorus.report.table import Cell, Column, Number, Row, Table, create_rows, create_text_columns
from pylorus.runs.reading import PARTS, SavedRun

PART_NAMES = {"train": "Training", "val": "Validation", "test": "Test"}

MIN_PATIENTS = 5
"""A median and quartiles of fewer patients than this are not shown: they could identify one of them."""
MIN_DISTINCT_NUMBERS = 6
"""A column with fewer distinct numbers than this is a code, of which each value is counted."""
MAX_CLASS_LINES = 10
"""Maximum number of classes named in a box of the flow diagram."""


@dataclass(frozen=True)
class Flow:
    """Numbers of images and patients at each step of a run.

    Attributes:
        files: Image files that were found; None if the run has no audit.
        left_out: Reasons for leaving images out with the number of images, none of which is 0.
        images: Images in the split.
        patients: Their patients (groups); None if patients are not known.
        parts: For each part with images: its name, images, patients, and one (class, images, patients) per class.
    """

    files: int | None
    left_out: tuple[tuple[str, int], ...]
    images: int
    patients: int | None
    parts: tuple[tuple[str, int, int | None, tuple[tuple[str, int, int | None], ...]], ...]


def compute_flow(run: SavedRun) -> Flow:
    """Count images and patients at each step.

    Args:
        run: A run with a split.
    """
    assert run.split is not None
    table, grouped = run.split.table, run.has_groups
    unreadable = count_excluded_files(run)
    reasons = [("could not be read", unreadable)]
    reasons += [
        (f'of class "{name}", left out on purpose (data.exclude)', int(count))
        for name, count in run.audit.get("excluded", {}).items()
    ]
    excluded = sum(int(count) for count in run.audit.get("excluded", {}).values())
    readable = run.audit.get("readable")
    if readable is not None:
        reasons.append(("not assigned to a part", int(readable) - len(table)))
    files = None if readable is None else int(readable) + unreadable + excluded

    def count_patients(rows: pd.DataFrame) -> int | None:
        return int(rows["group"].nunique()) if grouped else None

    parts = []
    for part in PARTS:
        rows = run.split.get_split_rows(part)
        if len(rows):
            classes = tuple(
                (short, len(own), count_patients(own))
                for name, short in zip(run.class_names, run.short_names, strict=True)
                for own in [rows[rows["class"] == name]]
            )
            parts.append((part, len(rows), count_patients(rows), classes))
    return Flow(files, tuple(each for each in reasons if each[1] > 0), len(table), count_patients(table), tuple(parts))


def plot_flow(run: SavedRun) -> Drawing:
    """Plot the flow diagram of a run: files found, images left out with reasons, and each part by class.

    Args:
        run: A run with a split.
    """
    flow = compute_flow(run)
    on_test = is_validated_on_test(run)
    lines = [_format_part_lines(part, flow, on_test=on_test) for part in flow.parts]
    side = "\n".join(["Left out:", *(f"{count:,} {reason}" for reason, count in flow.left_out)])
    if not flow.left_out:
        side = "Left out: none" if flow.files is not None else "Left out: not recorded"
    found = "Image files: not recorded" if flow.files is None else f"Image files: {flow.files:,}"
    included = f"Included: {_format_numbers(flow.images, flow.patients)}"
    part_height = 0.17 * max(len(each) for each in lines) + 0.2
    side_text = wrap_text(side, 2.5, 8)
    middle = max(0.55, 0.16 * (side_text.count("\n") + 1) + 0.2)
    height = 0.75 + 0.3 + 0.4 + middle + 0.3 + 0.4 + 0.45 + part_height
    with report_style():
        figure = create_figure(height + 0.1)
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(0, 7.1)
        axes.set_ylim(0, height)
        top = height - 0.65
        author = "FOR THE AUTHOR: patients and examinations that were eligible, and those excluded before, with reasons"
        _draw_box(axes, 0.9, top, 3.4, 0.6, wrap_text(author, 3.1, 8), dashed=True)
        _draw_arrow(axes, (2.6, top), (2.6, top - 0.3))
        found_bottom = top - 0.3 - 0.4
        _draw_box(axes, 0.9, found_bottom, 3.4, 0.4, found)
        included_bottom = found_bottom - middle - 0.3 - 0.4
        _draw_arrow(axes, (2.6, found_bottom), (2.6, included_bottom + 0.4))
        side_bottom = found_bottom - 0.15 - middle
        _draw_arrow(axes, (2.6, side_bottom + middle / 2), (4.4, side_bottom + middle / 2))
        _draw_box(axes, 4.4, side_bottom, 2.65, middle, side_text)
        _draw_box(axes, 0.9, included_bottom, 3.4, 0.4, included)
        width = (7.0 - 0.15 * (len(lines) - 1)) / len(lines)
        for position, each in enumerate(lines):
            left = 0.05 + position * (width + 0.15)
            middle_of_part = left + width / 2
            _draw_arrow(axes, (2.6, included_bottom), (middle_of_part, included_bottom - 0.45))
            _draw_box(axes, left, included_bottom - 0.45 - part_height, width, part_height, "\n".join(each))
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in flow.left_out) or "none"
    return Drawing(
        key=f"flow-{run.stem}",
        title="Flow of patients and images" if flow.patients is not None else "Flow of images",
        basis=_format_flow_basis(run),
        alt=f"{found}. Left out: {reasons}. {included}. {' '.join('; '.join(each) + '.' for each in lines)}",
        figure=figure,
        notes=_list_flow_notes(run, flow),
    )


def build_flow_table(run: SavedRun) -> Table:
    """Build the table of the numbers in the flow diagram.

    Args:
        run: A run with a split.
    """
    flow = compute_flow(run)
    rows: list[tuple[Cell, ...]] = [] if flow.files is None else [("image files", flow.files, "")]
    rows += [(f"left out: {reason}", count, "") for reason, count in flow.left_out]
    rows.append(("included", flow.images, "" if flow.patients is None else flow.patients))
    for part, images, patients, classes in flow.parts:
        rows.append((PART_NAMES[part].lower(), images, "" if patients is None else patients))
        rows += [
            (f"{PART_NAMES[part].lower()}: {short}", count, "" if own is None else own) for short, count, own in classes
        ]
    return Table(
        key=f"flow-{run.stem}",
        title="Images and patients at each step",
        basis=_format_flow_basis(run),
        columns=(*create_text_columns("step"), Column("images"), Column("patients")),
        rows=create_rows(rows),
        notes=_list_flow_notes(run, flow),
    )


def _format_flow_basis(run: SavedRun) -> str:
    assert run.split is not None
    return f"All images of split {run.split.short_hash}. {format_caveats([run])}".strip()


def _list_flow_notes(run: SavedRun, flow: Flow) -> tuple[str, ...]:
    notes = []
    if flow.patients is None:
        notes.append("The patients of the images are not known.")
    else:
        notes.append("Patients are the groups by which the images were divided.")
        assert run.split is not None
        several = int((run.split.table.groupby("group")["class"].nunique() > 1).sum())
        if several:
            verb = "has images of several classes and is" if several == 1 else "have images of several classes and are"
            notes.append(f"{format_count(several, 'patient')} {verb} counted in each of them.")
    return tuple(notes)


def _format_numbers(images: int, patients: int | None) -> str:
    text = format_count(images, "image")
    return text if patients is None else f"{text} of {format_count(patients, 'patient')}"


def _format_part_lines(
    part: tuple[str, int, int | None, tuple[tuple[str, int, int | None], ...]], flow: Flow, *, on_test: bool
) -> list[str]:
    name, images, patients, classes = part
    title = PART_NAMES[name] + (" (also used for validation)" if on_test and name == "test" else "")
    width = 6.6 / max(1, len(flow.parts))
    lines = [title, _format_numbers(images, patients)]
    shown = classes if len(classes) <= MAX_CLASS_LINES else classes[: MAX_CLASS_LINES - 1]
    lines += [
        f"{short}: {count:,}" + (f" ({format_count(own, 'patient')})" if own is not None else "")
        for short, count, own in shown
    ]
    if len(shown) < len(classes):
        lines.append(f"and {len(classes) - len(shown)} further classes")
    return [line for text in lines for line in wrap_text(text, width, 8).split("\n")]


def _draw_box(
    axes: Axes, left: float, bottom: float, width: float, height: float, text: str, *, dashed: bool = False
) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor=PAPER,
            edgecolor=FAINT if dashed else INK,
            linestyle="--" if dashed else "-",
            linewidth=0.8,
        )
    )
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=8, linespacing=1.25)


def _draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 0.8})


def read_characteristics(run: SavedRun) -> dict[str, NDArray[np.str_]]:
    """Read the further columns of the run's manifest, one value per row of its split; empty if there are none."""
    path = run.folder / "catalog.parquet"
    if run.split is None or not path.is_file():
        return {}
    names = [name for name in pq.read_schema(path).names if name.startswith(MANIFEST_PREFIX)]
    if not names:
        return {}
    table = pd.read_parquet(path, columns=["sample_id", *names], **PARQUET_OPTIONS).drop_duplicates("sample_id")
    rows = table.set_index("sample_id").reindex(run.split.table["sample_id"])
    return {name.removeprefix(MANIFEST_PREFIX): rows[name].fillna("").to_numpy(dtype=np.str_) for name in names}


def build_characteristic_table(run: SavedRun) -> Table | None:
    """Build the table of the characteristics of the patients of each part, from the columns of the manifest.

    Numbers such as age have median, quartiles and missing values, other columns a count of each value. Columns and
    values that could identify a patient are not shown.

    Args:
        run: The run.

    Returns:
        The table; None if the run has no column with values that may be shown.
    """
    columns = read_characteristics(run)
    if run.split is None or not columns:
        return None
    table, grouped = run.split.table, run.has_groups
    groups = table["group"].to_numpy(dtype=np.str_) if grouped else np.arange(len(table))
    parts = [part for part in PARTS if (table["split"] == part).any()]
    masks = [(table["split"] == part).to_numpy() for part in parts]
    unit, level = ("patients", PATIENTS) if grouped else ("images", IMAGES)
    totals = [_count_distinct(groups[mask]) for mask in masks]
    rows: list[Row] = []
    notes: list[str] = []
    for column in build_subgroup_columns(columns, groups):
        values = columns[column.name]
        if not column.subgroups:
            notes.append(f"Not shown: {column.name}, because {column.reason.replace('test image', 'image')}.")
            continue
        numbers = parse_numbers(values)
        is_number = numbers is not None and len(set(values.tolist()) - {""}) >= MIN_DISTINCT_NUMBERS
        if numbers is not None and is_number and find_identifying_reason(values, groups) is None:
            rows += _build_number_rows(column.name, numbers, groups, masks)
        else:
            rows += _build_count_rows(column, groups, masks, totals)
    if not rows:
        return None
    return Table(
        key=f"characteristics-{run.stem}",
        title=f"Characteristics of the {unit} of each part, from the columns of the manifest",
        basis=f"{level.capitalize()}; split {run.split.short_hash}. {format_caveats([run])}".strip(),
        columns=(
            *create_text_columns("characteristic", "value"),
            *(
                Column(title, heading=PART_NAMES[part].lower(), unit=sign)
                for part in parts
                for title, sign in (("number", ""), ("share", "%"))
            ),
        ),
        rows=(Row((unit, "all", *(cell for total in totals for cell in (total, ""))), strong=True), *rows),
        notes=(
            f"Number: {unit}, or the median or quartile itself. Share: of all {unit} of the part."
            + (
                " A patient with several values is counted for each; of several numbers, the median." if grouped else ""
            ),
            f"A median or quartile of fewer than {MIN_PATIENTS} {unit} is not shown.",
            *notes,
        ),
    )


def _count_distinct(groups: NDArray[np.generic]) -> int:
    return len(np.unique(groups))


def _build_count_rows(
    column: SubgroupColumn, groups: NDArray[np.generic], masks: Sequence[NDArray[np.bool_]], totals: Sequence[int]
) -> list[Row]:
    rows = []
    for subgroup in column.subgroups:
        cells: list[Cell] = []
        for mask, total in zip(masks, totals, strict=True):
            count = _count_distinct(groups[mask & subgroup.images])
            cells += [count, Number(100 * count / total)]
        rows.append(Row((column.name, "missing" if subgroup.name == NOT_STATED else subgroup.name, *cells)))
    return rows


def _build_number_rows(
    name: str, numbers: NDArray[np.float64], groups: NDArray[np.generic], masks: Sequence[NDArray[np.bool_]]
) -> list[Row]:
    """Build the rows of median, quartiles and missing values of a column of numbers."""
    by_part = [pd.Series(numbers[mask]).groupby(groups[mask]).median() for mask in masks]
    labels = {"median": 0.5, "lower quartile": 0.25, "upper quartile": 0.75}
    known = np.concatenate([each.dropna().to_numpy() for each in by_part])
    digits = 1 if (known % 1 == 0).all() or np.abs(known).max(initial=0) >= 10 else 3
    rows = []
    for label, quantile in labels.items():
        cells: list[Cell] = []
        for each in by_part:
            stated = each.dropna()
            is_shown = len(stated) >= MIN_PATIENTS
            value = float(stated.quantile(quantile)) if is_shown else float("nan")
            cells += [Number(value, digits, reason=f"fewer than {MIN_PATIENTS} have a value"), ""]
        rows.append(Row((name, label, *cells)))
    missing: list[Cell] = []
    for each in by_part:
        count = int(each.isna().sum())
        missing += [count, Number(100 * count / len(each))]
    rows.append(Row((name, "missing", *missing)))
    return rows
