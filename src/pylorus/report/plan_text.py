"""The plan of a test set: what each aim needs, its formulas and assumptions, as text for the terminal and as files."""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pylorus.core.formatting import format_count, format_percent, join_names
from pylorus.core.io import write_json, write_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pylorus.evaluation.pilot import PatientDesign, PilotMeasures

LINE = 80
"""Characters of a line on the terminal."""
WIDTH, POWER = 0.1, 0.8
"""Width of intervals and power of comparisons, unless the options say otherwise."""
NAMES = {"sensitivity": "sensitivity", "specificity": "specificity", "auroc": "AUROC"}
"""Figures of a class, with their names in texts."""
LEAST_DEVIATION = 0.1
"""Standard deviation of the log-odds below which a calibration slope means nothing."""
FEW_PATIENTS, FEW_ERRORS = 30, 10
"""Below these, an interval comes out wider than its formula says."""

FORMULAS = {
    "interval": "n = 4 z² p (1 - p) / width² (Buderer, Acad Emerg Med 1996;3:895)",
    "auroc": "2 z SE = width, with SE of Hanley and McNeil as in Newcombe, Stat Med 2006;25:559; the criterion of "
    "Riley et al., Stat Med 2021;40:4230, and of pmvalsampsize",
    "figure test": "n = (z_α √(r (1 - r)) + z_β √(p (1 - p)))² / (p - r)² for the figure r (Fleiss, Levin and Paik, "
    "Statistical Methods for Rates and Proportions, 2003, chapter 2)",
    "figure margin": "n = (z_α √(e (1 - e)) + z_β √(p (1 - p)))² / (p - e)² for the edge e, the figure less the margin "
    "(the score test; Fleiss, Levin and Paik, Statistical Methods for Rates and Proportions, 2003, chapter 2)",
    "area test": "t_α SE(r) + z_β SE(A) = |A - r| for the figure r, with the binormal SE (Obuchowski and McClish, Stat "
    "Med 1997;16:1529; Bamber, J Math Psychol 1975;12:387) and Student's t, as in the report's interval",
    "area margin": "t_α SE(r - margin) + z_β SE(A) = A - r + margin for the figure r, with the binormal SE (Obuchowski "
    "and McClish, Stat Med 1997;16:1529; Bamber, J Math Psychol 1975;12:387) and Student's t, as in the report's "
    "interval",
    "areas": "t_α SE + z_β SE = the distance, with SE² = SE₁² + SE₂² - 2 r SE₁ SE₂ for two AUROCs with correlation r "
    "(Hanley and McNeil, Radiology 1983;148:839), the binormal SE (Bamber, J Math Psychol 1975;12:387) and Student's "
    "t; with a margin, the width of the report's interval takes the place of t_α SE",
    "observed": "n = (1 - φ) / (φ SE²) at the prevalence φ, where exp(z SE) - exp(-z SE) = width (Riley et al., BMJ "
    "2024;384:e074821, criterion 1)",
    "slope": "n = a / (SE² (a c - b²)), where a, b and c are the means of p (1 - p), times 1, the log-odds and their "
    "square (Riley et al., BMJ 2024;384:e074821, criterion 2)",
    "models test": "n = (z_α √ψ + z_β √(ψ - δ²))² / δ² for McNemar's test: the models disagree on ψ of the images and "
    "differ by δ (Connor, Biometrics 1987;43:207)",
    "models margin": "n = (z_α + z_β)² (ψ - δ²) / (δ + margin)²: the models disagree on ψ of the images and differ "
    "by δ (Liu et al., Stat Med 2002;21:231)",
}
"""Formulas for independent images with their sources."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a test set is to show, and what is expected of it; None: taken from the pilot run, or not planned.

    Attributes:
        pilot: Folder of a finished run whose test predictions are measured.
        compare: Folder of another run on the same test images, to be compared with the pilot.
        class_name: Class of interest; None: that of the pilot.
        prevalence: Fraction of its images among all, in (0, 1).
        sensitivity: Expected sensitivity, in (0, 1).
        specificity: Expected specificity, in (0, 1).
        auroc: Expected area under the ROC curve, in (0.5, 1).
        disagreement: Fractions of images that only the new and only the other of two models classify correctly.
        areas: Expected AUROCs of the new, in (0.5, 1), and of the other of two models, in [0.5, 1); empty: those of the
            pilot and of `compare`.
        correlation: Correlation of these two AUROCs on the same images, in [0, 1).
        calibration: Width of the intervals of observed/expected and of the calibration slope, in (0, 1).
        against: A figure that sensitivity, specificity or AUROC is compared with, in (0, 1).
        margin: The comparison shows that a model is worse by less than this, in (0, 1); None: it shows a difference.
        width: Width of the other intervals, in (0, 1); None: `WIDTH`.
        confidence: Coverage of the intervals, in (0, 1); tests have the level of 1 minus it.
        power: Probability that a comparison is significant, in (0, 1); None: `POWER`.
        icc: Intraclass correlation of correctness within patients, in [0, 1].
        images_per_patient: Mean number of images of a patient, at least 1.
    """

    pilot: Path | None = None
    compare: Path | None = None
    class_name: str | None = None
    prevalence: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    auroc: float | None = None
    disagreement: tuple[float, float] | None = None
    areas: tuple[float, ...] | None = None
    correlation: float | None = None
    calibration: float | None = None
    against: float | None = None
    margin: float | None = None
    width: float | None = None
    confidence: float = 0.95
    power: float | None = None
    icc: float | None = None
    images_per_patient: float | None = None


@dataclass(frozen=True)
class Aim:
    """An aim before its images are counted.

    Attributes:
        words: The aim in words, its name before the first comma.
        formula: The formula for independent images, with its source.
        compute: Function of the design effect that gives the number of images.
        kind: Images that it is measured on: those of the `class`, of `others`, or `all`.
        design: How these images come in patients.
        errors: Fraction of these images that are of the rarer outcome: wrong, or of the class for AUROC.
        is_test: Whether it is a comparison, not an interval.
    """

    words: str
    formula: str
    compute: Callable[..., int]
    kind: str
    design: "PatientDesign"
    errors: float = math.inf
    is_test: bool = False


@dataclass(frozen=True)
class Pilot:
    """A pilot run: the class of interest, what its predictions say, and its stage in words."""

    class_name: str
    measures: "PilotMeasures | None" = None
    stage: str = ""
    grouped: bool = False


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
        icc_low: Lower end of the confidence interval of the ICC; None if it was typed.
        icc_high: Upper end.
        images_at_high: Images in all if the ICC is at the upper end.
        patients_at_high: Patients in all then.
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
    icc_low: float | None = None
    icc_high: float | None = None
    images_at_high: int | None = None
    patients_at_high: int | None = None


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
    rounded = round(value, 3)
    # A typed figure is never rounded to 0 or 1, which it is not.
    return f"{100 * value:.6g} %" if rounded in (0.0, 1.0) else f"{format_percent(rounded, digits=None)} %"


def format_area(value: float) -> str:
    """Format an AUROC with three digits, or more if it would look like 0.5 or 1.

    Example:
        >>> format_area(0.8512), format_area(0.9999)
        ('0.851', '0.9999')
    """
    return f"{value:.6g}" if f"{value:.3g}" in ("0.5", "1") else f"{value:.3g}"


def format_points(value: float) -> str:
    """Format a difference of proportions in percentage points.

    Example:
        >>> format_points(0.1), format_points(0.01)
        ('10 points', '1 point')
    """
    points = f"{round(100 * value, 1) or 100 * value:.6g}"
    return f"{points} point{'' if points == '1' else 's'}"


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
    aim_width = LINE - sum(widths) - 2 * len(widths)
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
        lines += textwrap.wrap(f"Formula: {formula}.", LINE, initial_indent="  ", subsequent_indent="  ")
    if uncertain := [size for size in plan.sizes if size.icc_high is not None]:
        lines += ["", "If images of a patient resemble each other more than in the pilot"]
        lines += [line for size in uncertain for line in _wrap(_explain_upper_limit(size))]
        upper = [(size.images_at_high or size.images, size.patients_at_high or size.patients) for size in plan.sizes]
        safe = f"{format_count(max(images for images, _ in upper), 'image')} of "
        safe += format_count(max(patients for _, patients in upper), "patient")
        lines += ["", *_wrap(f"To be safe against this, recruit {safe}.", "")]
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


def _explain_upper_limit(size: PlannedSize) -> str:
    return (
        f"{size.aim.split(',')[0]}: the pilot's ICC is {size.icc:.2f}, with an interval from {size.icc_low:.2f} to "
        f"{size.icc_high:.2f}. At {size.icc_high:.2f}, {format_count(size.images_at_high or 0, 'image')} of "
        f"{format_count(size.patients_at_high or 0, 'patient')} are needed in all."
    )


def _wrap(text: str, bullet: str = "- ") -> list[str]:
    return textwrap.wrap(text, LINE, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_on_hyphens=False)


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


def get_disagreement(options: PlanOptions, pilot: Pilot) -> tuple[float, float] | None:
    """Return the fractions of images that only one of two models classifies correctly, if accuracy is compared."""
    if options.areas is not None or pilot.measures is None:
        return options.disagreement
    return options.disagreement or pilot.measures.disagreement


def get_areas(options: PlanOptions, pilot: Pilot) -> tuple[float, float, float]:
    """Return the AUROCs of two models and their correlation: as the options say, else as in the pilot."""
    one, two, correlation = (math.nan,) * 3
    if pilot.measures is not None and pilot.measures.areas is not None:
        one, two, correlation = pilot.measures.areas
    if options.areas:
        one, two = options.areas
    return one, two, correlation if options.correlation is None else options.correlation


def is_constant(log_odds: "NDArray[np.float64]") -> bool:
    """Whether the probabilities of a pilot vary too little for a calibration slope."""
    return float(log_odds.std()) < LEAST_DEVIATION


def find_warnings(
    options: PlanOptions, aims: Sequence[Aim], sizes: Sequence[PlannedSize], pilot: Pilot
) -> Iterator[str]:
    """Say what makes a plan unreliable, in full sentences."""
    measures = None if options.icc is not None else pilot.measures
    if pilot.grouped and measures is not None and measures.patients < FEW_PATIENTS:
        yield (
            f"The pilot has only {format_count(measures.patients, 'test patient')}: its figures and correlations are "
            "uncertain. Plan again with a larger --icc to see how much depends on it."
        )
    elif measures is not None and measures.disagreement is None:
        images = {"sensitivity": measures.prevalence, "specificity": 1 - measures.prevalence}
        rarer = {name: min(measures.values[name], 1 - measures.values[name]) * measures.images for name in images}
        if few := [name for name, fraction in images.items() if rarer[name] * fraction < FEW_ERRORS]:
            yield (
                f"The pilot's {join_names(few)} and the ICC rest on fewer than {FEW_ERRORS} errors and are uncertain. "
                "Plan again with a lower figure and a larger --icc to see how much depends on them."
            )
    pairs = [(aim, size, aim.words.split(",")[0]) for aim, size in zip(aims, sizes, strict=True)]
    for is_test, outcome in (
        (False, "The interval of the report may be a quarter wider: choose a smaller --width."),
        (True, "The power may be lower than stated: recruit more."),
    ):
        alike = [(aim, size, name) for aim, size, name in pairs if aim.is_test == is_test]
        if names := [name for aim, size, name in alike if aim.errors * size.independent_images < FEW_ERRORS]:
            yield (
                f"{join_names(names)}: so few images that fewer than {FEW_ERRORS} independent ones are of the rarer "
                f"outcome (wrong, for a high figure; of the class, for AUROC and calibration). {outcome}"
            )
        if names := [name for _, size, name in alike if size.counted_patients < FEW_PATIENTS]:
            outcome = "power is then lower" if is_test else "interval of the report is then wider"
            yield (
                f"{join_names(names)}: fewer than {FEW_PATIENTS} patients would count. The {outcome} than planned: "
                "recruit at least that many."
            )
    if options.calibration is not None and pilot.measures is not None and is_constant(pilot.measures.log_odds):
        yield (
            "calibration slope: the pilot gives nearly all images the same probability, from which no number of images "
            "follows. Use a better pilot, or leave it out and add --auroc."
        )
    if names := [name for aim, _, name in pairs if aim.design.correlation == 1 and aim.design.images_per_patient > 1]:
        yield (
            f"{join_names(names)}: an ICC of 1 makes the images of a patient copies of one another. If the pilot is "
            "merely too small or too good to show the ICC, add --icc, such as 0.5."
        )


def list_assumptions(options: PlanOptions, pilot: Pilot, prevalence: float | None) -> tuple[str, ...]:
    """List what a plan assumes, in full sentences."""
    sentences, measures = [], pilot.measures
    if measures is not None:
        patients = f" of {format_count(measures.patients, 'patient')}" if pilot.grouped else ""
        sentences.append(
            f"What was not typed is as in the pilot (stage {pilot.stage}, {format_count(measures.images, 'test image')}"
            f"{patients})."
        )
    if prevalence is not None:
        sentences.append(f"{format_fraction(prevalence)} of the images are of {pilot.class_name}.")
    if options.images_per_patient == 1 or (
        options.icc is None and (measures is None or measures.patients == measures.images)
    ):
        sentences.append("One image per patient. For several, add --icc and --images-per-patient.")
    elif options.icc == 0:
        sentences.append("Images of a patient count as if they were of different patients (ICC 0).")
    else:
        sentences.append(
            "Images of a patient resemble each other: the formula's number is multiplied by the design effect, "
            "1 + ((1 + cv²) m - 1) ICC for m images per patient, which vary by cv (Eldridge et al., Int J Epidemiol "
            "2006;35:1292)."
        )
    if measures is None and prevalence is not None:
        sentences.append("All images of a patient are of one class, and patients of all classes have as many images.")
    disagreement = get_disagreement(options, pilot)
    if disagreement:
        first, second = map(format_fraction, disagreement)
        sentences.append(
            f"{'The new model is' if measures is None else 'The pilot is'} the only one that is correct on {first} of "
            f"the images, the other model on {second}."
        )
    if options.areas is not None:
        one, two, correlation = get_areas(options, pilot)
        sentences.append(
            f"AUROC is {format_area(one)} for {'the new model' if measures is None else 'the pilot'} and "
            f"{format_area(two)} for the other. The correlation of the two on the same images is {correlation:.2f}; "
            "a lower one needs more images."
        )
    if options.calibration is not None:
        source = "as in the pilot" if measures is not None else "normal in both classes, with the AUROC given"
        sentences.append(f"The model is well calibrated, and the log-odds of its probabilities are {source}.")
    if options.margin is not None:
        sentences.append(
            f"The test of non-inferiority is one-sided at the level of {(1 - options.confidence) / 2:.3g}. Choose the "
            "margin on clinical grounds, before the data are seen."
        )
    sentences.append("No image is lost. Add what you expect to lose to poor quality, withdrawal or missing histology.")
    return tuple(sentences)
