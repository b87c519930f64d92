"""The plan of a test set: what each aim needs, its formulas and assumptions, as text for the terminal and as files."""

import csv
import io
import math
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from pylorus.core.formatting import format_count, format_percent
from pylorus.core.io import write_json, write_text

WIDTH = 80
"""Characters of a line on the terminal."""

FORMULAS = {
    "interval": "n = 4 z² p (1 - p) / width² (Buderer, Acad Emerg Med 1996;3:895)",
    "auroc": "2 z SE = width, with SE of Hanley and McNeil as in Newcombe, Stat Med 2006;25:559; the criterion of "
    "Riley et al., Stat Med 2021;40:4230, and of pmvalsampsize",
    "figure test": "n = (z_α √(r (1 - r)) + z_β √(p (1 - p)))² / (p - r)² for the figure r (Fleiss, Levin and Paik, "
    "Statistical Methods for Rates and Proportions, 2003, chapter 2)",
    "figure margin": "n = (z_α + z_β)² p (1 - p) / (p - r + margin)² for the figure r (Chow, Shao and Wang, Sample "
    "Size Calculations in Clinical Research, 2008, 4.1)",
    "models test": "n = (z_α √ψ + z_β √(ψ - δ²))² / δ² for McNemar's test: the models disagree on ψ of the images and "
    "differ by δ (Connor, Biometrics 1987;43:207)",
    "models margin": "n = (z_α + z_β)² (ψ - δ²) / (δ + margin)²: the models disagree on ψ of the images and differ "
    "by δ (Liu et al., Stat Med 2002;21:231)",
}
"""Formulas for independent images with their sources."""


@dataclass(frozen=True, kw_only=True)
class PlannedSize:
    """What one aim needs.

    Attributes:
        aim: The aim in words.
        formula: The formula for independent images, with its source.
        independent_images: Number of images it gives: enough if each is of another patient.
        images_per_patient: Mean number of images of a patient, of the kind that is counted.
        variation: Standard deviation of that number over its mean.
        icc: Intraclass correlation of what is averaged.
        design_effect: Factor by which the number of images grows.
        counted: Images that it is measured on: those of the `class`, of `others`, or `all`.
        counted_images: Number of these, with the design effect.
        counted_patients: Patients with these images.
        class_images: Images of the class at the prevalence; None if that is not known.
        other_images: Images of other classes; None likewise.
        images: Images in all, at the prevalence.
        patients: Patients in all.
    """

    aim: str
    formula: str
    independent_images: int
    images_per_patient: float
    variation: float
    icc: float
    design_effect: float
    counted: str
    counted_images: int
    counted_patients: int
    class_images: int | None
    other_images: int | None
    images: int
    patients: int


@dataclass(frozen=True)
class Plan:
    """The sizes that all aims need, and what they assume.

    Attributes:
        class_name: The class of interest in words.
        prevalence: Fraction of its images; None if no aim depends on it.
        sizes: What each aim needs.
        assumptions: In full sentences.
        warnings: What makes the plan unreliable, in full sentences.
    """

    class_name: str
    prevalence: float | None
    sizes: tuple[PlannedSize, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Images in all that reach every aim."""
        return max(size.images for size in self.sizes)

    @property
    def patients(self) -> int:
        """Patients that reach every aim."""
        return max(size.patients for size in self.sizes)

    def count_by_class(self, kind: str) -> tuple[int, int]:
        """Return the images of the `class` or of `others` that reach every aim, and their patients."""
        images, patients = 0, 0
        for size in self.sizes:
            if size.counted in (kind, "all"):
                needed = (size.class_images if kind == "class" else size.other_images) or 0
                images, patients = max(images, needed), max(patients, round_up(needed / size.images_per_patient))
        return images, patients


def round_up(number: float) -> int:
    """Round up to a whole number, but not because of a rounding error."""
    return math.ceil(number - 1e-9)


def format_fraction(value: float) -> str:
    """Format a proportion in percent, with at most one decimal.

    Example:
        >>> format_fraction(1 / 3), format_fraction(0.9)
        ('33.3 %', '90 %')
    """
    return f"{format_percent(round(value, 3), digits=None)} %"


def format_points(value: float) -> str:
    """Format a difference of proportions in percentage points.

    Example:
        >>> format_points(0.1), format_points(0.01)
        ('10 points', '1 point')
    """
    return f"{round(100 * value, 1):g} point{'' if round(100 * value, 1) == 1 else 's'}"


def format_plan(plan: Plan) -> str:
    """Format a plan for the terminal, in lines of at most 80 characters."""
    short = plan.class_name if len(plan.class_name) <= 10 else "the class"
    titles = [f"of {short}", "of others", "images", "patients"]
    rows = [
        [
            size.aim,
            *(
                f"{cell:,}"
                for cell in (size.class_images, size.other_images, size.images, size.patients)
                if cell is not None
            ),
        ]
        for size in plan.sizes
    ]
    titles = titles if plan.prevalence is not None else titles[2:]
    widths = [max(map(len, column)) for column in zip(titles, *(row[1:] for row in rows), strict=True)]
    aim_width = WIDTH - sum(widths) - 2 * len(widths)
    lines = ["Images and patients that a test set needs", ""]
    for aim, *cells in (["to show", *titles], *rows):
        first, *further = textwrap.wrap(aim, aim_width, subsequent_indent="  ")
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines += [f"{first:<{aim_width}}{numbers}", *further]
    total = f"{format_count(plan.images, 'image')} of {format_count(plan.patients, 'patient')}"
    if plan.prevalence is None:
        lines += ["", f"In all: {total}."]
    else:
        needed = {name: plan.count_by_class(kind) for kind, name in (("class", plan.class_name), ("others", "others"))}
        parts = [
            f"{format_count(images, 'image')} of {name} ({format_count(patients, 'patient')})"
            for name, (images, patients) in needed.items()
            if images
        ]
        lines += ["", *_wrap(f"If patients are recruited as they come: {total}.", "")]
        lines += _wrap(f"If they are recruited by class: {' and '.join(parts)}.", "") if parts else []
    lines += ["", "How"]
    for formula in dict.fromkeys(size.formula for size in plan.sizes):
        for size in plan.sizes:
            if size.formula == formula:
                lines += _wrap(_explain_size(size))
        lines += textwrap.wrap(f"Formula: {formula}.", WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += ["", "Assumptions", *(line for sentence in plan.assumptions for line in _wrap(sentence))]
    if plan.warnings:
        lines += ["", "Caution", *(line for sentence in plan.warnings for line in _wrap(sentence))]
    return "\n".join(lines)


def _explain_size(size: PlannedSize) -> str:
    kind = {"class": " of the class", "others": " of other classes", "all": ""}[size.counted]
    text = f"{size.aim.split(',')[0]}: {format_count(size.independent_images, 'independent image')}{kind}"
    if size.images_per_patient > 1:
        variation = f", varying by cv {size.variation:.2f}" if size.variation > 0.005 else ""
        text += (
            f" × design effect {size.design_effect:.2f} = {format_count(size.counted_images, 'image')} of "
            f"{format_count(size.counted_patients, 'patient')} (ICC {size.icc:.2f}, {size.images_per_patient:.3g} "
            f"images per patient{variation})"
        )
    return f"{text}."


def _wrap(text: str, bullet: str = "- ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_on_hyphens=False
    )


def write_plan(plan: Plan, folder: Path) -> None:
    """Write a plan to plan.csv, one row per aim, and to plan.json, with its assumptions."""
    rows = [asdict(size) for size in plan.sizes]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "plan.csv", text.getvalue())
    write_json(folder / "plan.json", asdict(plan) | {"images": plan.images, "patients": plan.patients})
