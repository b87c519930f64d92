"""`pylorus plan`: how many patients and images a test set needs, from expected figures or from those of a pilot run.

The command line imports this module, which therefore imports what computes only when it is needed.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_command, format_count, format_percent, join_names
from pylorus.report.plan_text import (
    FORMULAS,
    Plan,
    PlannedSize,
    format_fraction,
    format_plan,
    format_points,
    round_up,
    write_plan,
)

if TYPE_CHECKING:
    from pylorus.evaluation.predictions import Predictions
    from pylorus.evaluation.pilot import PatientDesign, PilotMeasures
    from pylorus.runs.reading import SavedRun

NAMES = {"sensitivity": "sensitivity", "specificity": "specificity", "auroc": "AUROC"}
"""Figures of a class, with their names in texts."""
FEW_PATIENTS, FEW_ERRORS = 30, 10
"""Below these, an interval comes out wider than its formula says."""


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
        against: A figure that sensitivity or specificity is compared with, in (0, 1).
        margin: The comparison shows that a model is worse by less than this, in (0, 1); None: it shows a difference.
        width: Width of the intervals, in (0, 1).
        confidence: Coverage of the intervals, in (0, 1); tests have the level of 1 minus it.
        power: Probability that a comparison is significant, in (0, 1).
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
    against: float | None = None
    margin: float | None = None
    width: float = 0.1
    confidence: float = 0.95
    power: float = 0.8
    icc: float | None = None
    images_per_patient: float | None = None


@dataclass(frozen=True)
class _Aim:
    """An aim before its images are counted: those of the `class`, of `others`, or `all`."""

    words: str
    formula: str
    compute: Callable[..., int]
    kind: str
    design: "PatientDesign"
    errors: float = math.inf


@dataclass(frozen=True)
class _Pilot:
    """A pilot run: the class of interest, what its predictions say, and its stage in words."""

    class_name: str
    measures: "PilotMeasures | None" = None
    stage: str = ""
    grouped: bool = False


def add_plan_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan` to the command line."""
    command = commands.add_parser(
        "plan",
        help="compute how many patients and images a test set needs",
        description="Compute how many patients and images a test set needs: for intervals of a given width, or to show "
        "a difference or non-inferiority with a given power. A pilot run says how much the images of a patient "
        "resemble each other; without one, --icc and --images-per-patient do. Proportions are numbers from 0 to 1.",
    )
    command.add_argument("pilot", nargs="?", type=Path, metavar="PILOT", help="folder of a finished run")
    command.add_argument(
        "--class", dest="class_name", metavar="NAME", help="class of interest (default: the pilot's deploy.class_name)"
    )
    for option, text in (
        ("--sensitivity", "expected sensitivity (default: the pilot's)"),
        ("--specificity", "expected specificity (default: the pilot's)"),
        ("--auroc", "expected area under the ROC curve (default: the pilot's)"),
        ("--prevalence", "fraction of images that are of the class (default: the pilot's)"),
    ):
        command.add_argument(option, type=float, metavar="P", help=text)
    command.add_argument("--width", type=float, default=0.1, metavar="W", help="width of the intervals (default: 0.1)")
    command.add_argument(
        "--against", type=float, metavar="P", help="figure that --sensitivity or --specificity is to be compared with"
    )
    command.add_argument(
        "--disagreement",
        type=float,
        nargs=2,
        metavar=("NEW", "OTHER"),
        help="compare two models: fractions of images that only the new, and only the other one classifies correctly",
    )
    command.add_argument(
        "--compare", type=Path, metavar="RUN", help="compare the pilot with this run on the same test images"
    )
    command.add_argument(
        "--margin", type=float, metavar="M", help="show that the (new) model is worse by less than M (non-inferiority)"
    )
    command.add_argument("--power", type=float, default=0.8, help="power of a comparison (default: 0.8)")
    command.add_argument(
        "--confidence", type=float, default=0.95, help="coverage of the intervals; 1 - level of tests (default: 0.95)"
    )
    command.add_argument(
        "--icc", type=float, help="intraclass correlation of correctness within a patient (default: the pilot's)"
    )
    command.add_argument(
        "--images-per-patient", type=float, metavar="N", help="mean number of images (default: the pilot's, or 1)"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="also write plan.csv and plan.json to this folder")
    command.set_defaults(act=_run_plan)


def _run_plan(arguments: argparse.Namespace) -> None:
    values = {name: value for name, value in vars(arguments).items() if name not in ("act", "output")}
    if values["disagreement"] is not None:
        values["disagreement"] = tuple(values["disagreement"])
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise PylorusError(f"--output: {arguments.output} is a file, expected a folder.")
    plan = compute_plan(PlanOptions(**values))
    print(format_plan(plan))
    if arguments.output is not None:
        write_plan(plan, arguments.output)
        print(f"\nplan: {arguments.output / 'plan.csv'}, {arguments.output / 'plan.json'}")


def compute_plan(options: PlanOptions) -> Plan:
    """Compute how many images and patients each aim needs.

    Raises:
        PylorusError: If nothing is planned, a number is out of its range, or the pilot run can't be used.
    """
    _check_options(options)
    pilot = _Pilot(options.class_name or "the class") if options.pilot is None else _measure_pilot(options)
    prevalence = options.prevalence
    if prevalence is None and pilot.measures is not None:
        prevalence = pilot.measures.prevalence
    values, warnings = _choose_values(options, pilot)
    aims = list(_build_aims(options, pilot, values, prevalence))
    if not aims:
        raise PylorusError(
            "nothing to plan: expected an expected figure or the folder of a pilot run, as in:\n"
            "  pylorus plan --sensitivity 0.9 --prevalence 0.2\n"
            "  pylorus plan --disagreement 0.08 0.04\n"
            "  pylorus plan outputs/2026-01-31/12-00-00-k3f9"
        )
    per_patient = _choose_design(options, pilot.measures, "accuracy").images_per_patient
    sizes = tuple(_compute_size(aim, prevalence, per_patient) for aim in aims)
    warnings += _find_warnings(options, aims, sizes, pilot)
    return Plan(pilot.class_name, prevalence, sizes, _list_assumptions(options, pilot, prevalence), tuple(warnings))


def _check_options(options: PlanOptions) -> None:
    for name in ("sensitivity", "specificity", "prevalence", "against", "margin", "width", "confidence", "power"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1:
            meant = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
            meant = f" Did you mean {-value:g}?" if name == "margin" and -1 < value < 0 else meant
            raise PylorusError(f"--{name}: found {value:g}, expected a number between 0 and 1, such as 0.1.{meant}")
    if options.auroc is not None and not 0.5 < options.auroc < 1:
        raise PylorusError(f"--auroc: found {options.auroc:g}, expected a number between 0.5 and 1, such as 0.9.")
    if options.icc is not None and not 0 <= options.icc <= 1:
        raise PylorusError(f"--icc: found {options.icc:g}, expected a number from 0 to 1, such as 0.3.")
    if options.images_per_patient is not None and not 1 <= options.images_per_patient < math.inf:
        raise PylorusError(
            f"--images-per-patient: found {options.images_per_patient:g}, expected at least 1, such as 3."
        )
    if options.pilot is None:
        if options.compare is not None:
            raise PylorusError("--compare: needs a pilot run to compare with: pylorus plan PILOT --compare RUN")
        if options.icc is None and (options.images_per_patient or 1) > 1:
            raise PylorusError(
                f"--images-per-patient: found {options.images_per_patient:g} without --icc, so how much the images of "
                "a patient resemble each other is unknown. Add --icc, such as 0.3, or the folder of a pilot run."
            )
        if options.icc and options.images_per_patient is None:
            raise PylorusError("--icc: has no effect without --images-per-patient. Add it, such as 3.")
        class_aims = (options.sensitivity, options.specificity, options.auroc)
        if options.prevalence is None and any(value is not None for value in class_aims):
            raise PylorusError(
                "--prevalence: not given, so the number of images in all is unknown. Add the fraction of images that "
                "are of the class, such as --prevalence 0.2."
            )
    if options.compare is not None and options.disagreement is not None:
        raise PylorusError("--disagreement: is measured with --compare. Leave one of the two out.")
    if options.against is not None and (options.sensitivity is None) == (options.specificity is None):
        raise PylorusError(
            "--against: expected one figure to compare with it, --sensitivity P or --specificity P, and not both."
        )
    if options.margin is not None and options.against is None and not (options.disagreement or options.compare):
        raise PylorusError(
            "--margin: nothing to compare. Add --against P (a figure), --disagreement NEW OTHER or --compare RUN."
        )


def _measure_pilot(options: PlanOptions) -> _Pilot:
    """Measure figures and their correlation within patients on the test predictions of a run."""
    from pylorus.evaluation.pilot import measure_pilot
    from pylorus.report.results import resolve_class_name

    assert options.pilot is not None
    run, stage, predictions = _read_pilot(options.pilot)
    class_name = resolve_class_name([run], options.class_name)
    assert class_name is not None  # it has predictions
    if not run.has_groups and (options.icc is None or options.images_per_patient is None):
        raise PylorusError(
            f"{options.pilot}: its images are not assigned to patients, so it does not show how much the images of a "
            "patient resemble each other. Use a run with data.group='patient_\\d+' or a manifest with a column "
            "`group`, or add --icc and --images-per-patient, such as --icc 0.3 --images-per-patient 3."
        )
    other = None if options.compare is None else _read_pilot(options.compare)[2]
    try:
        measures = measure_pilot(predictions, class_name, other)
    except ValueError as error:
        place = options.pilot if other is None else f"{options.pilot} and {options.compare}"
        raise PylorusError(f"{place}: {error}.") from error
    if measures.patients == measures.images and options.icc is None and (options.images_per_patient or 1) > 1:
        raise PylorusError(
            f"{options.pilot}: each patient has one test image, so it does not show how much several images of a "
            "patient resemble each other. Add --icc, such as 0.3, or leave out --images-per-patient."
        )
    return _Pilot(class_name, measures, stage, run.has_groups)


def _read_pilot(folder: Path) -> "tuple[SavedRun, str, Predictions]":
    """Read a finished run, the name of its shipped stage, and the test predictions of that stage."""
    from pylorus.core.errors import TRAIN_COMMAND
    from pylorus.runs.folder import STATUS
    from pylorus.runs.reading import read_run

    if not (folder / STATUS).is_file():
        raise PylorusError(f"{folder}: found no {STATUS}, expected the folder of a finished run.")
    run = read_run(folder)
    if run.state != "finished":
        raise PylorusError(
            f"{folder}: the run is {run.state}, expected a finished one. Finish it with:\n"
            f"  {TRAIN_COMMAND} {format_command([f'resume={folder}'])}"
        )
    if run.bundle_stage is None:
        raise PylorusError(f"{folder}: the run has no test predictions, expected those of at least one stage.")
    stage = next(stage for stage in run.complete_stages if stage.name == run.bundle_stage.name)
    assert stage.test is not None
    return run, stage.name, stage.test.predictions


def _choose_design(options: PlanOptions, measures: "PilotMeasures | None", name: str) -> "PatientDesign":
    """Return how images come in patients for an aim: as the options say, else as in the pilot, else one by one."""
    from pylorus.evaluation.pilot import PatientDesign

    measured = PatientDesign()
    if measures is not None:
        designs = measures.designs
        kind = "accuracy" if name == "difference" and measures.disagreement is None else name
        if kind not in designs and (options.icc is None or options.images_per_patient is None):
            raise PylorusError(
                f"{options.pilot}: only one patient has test images that count for {NAMES.get(name, name)}, so it does "
                "not show how much patients differ. Use a larger pilot, or add --icc and --images-per-patient, such as "
                "--icc 0.3 --images-per-patient 3."
            )
        measured = designs.get(kind, measured)
    return PatientDesign(
        measured.images_per_patient if options.images_per_patient is None else options.images_per_patient,
        measured.variation if options.images_per_patient is None else 0.0,
        measured.correlation if options.icc is None else options.icc,
    )


def _choose_values(options: PlanOptions, pilot: _Pilot) -> tuple[dict[str, float], list[str]]:
    """Return the expected figures to plan for, and why some of the pilot's can't be used."""
    typed = {name: getattr(options, name) for name in NAMES if getattr(options, name) is not None}
    if typed or options.disagreement or options.compare or pilot.measures is None:
        return typed, []
    values = {name: pilot.measures.values[name] for name in NAMES}
    useless = [name for name in NAMES if not (0.5 if name == "auroc" else 0) < values[name] < 1]
    reasons = [
        f"{NAMES[name]}: the pilot's is {values.pop(name):.3g}, from which no number of images follows. Add the one "
        f"that you expect, such as --{name} 0.95."
        for name in useless
    ]
    if not values:
        raise PylorusError("\n".join(reasons))
    return values, reasons


def _build_aims(
    options: PlanOptions, pilot: _Pilot, values: Mapping[str, float], prevalence: float | None
) -> Iterator[_Aim]:
    from pylorus.evaluation import sample_size

    interval = f"{format_percent(options.confidence, digits=None)} % interval"
    power = f"power {format_percent(options.power, digits=None)} %"
    tested: dict[str, Any] = {"power": options.power, "level": 1 - options.confidence, "margin": options.margin}
    measured: dict[str, Any] = {"width": options.width, "confidence": options.confidence}
    margin = "" if options.margin is None else f" by {format_points(options.margin)} or more"
    formula = "test" if options.margin is None else "margin"
    for name, value in values.items():
        design = _choose_design(options, pilot.measures, name)
        if name == "auroc":
            assert prevalence is not None
            compute = partial(sample_size.plan_auroc, value, prevalence=prevalence, **measured)
            words = f"AUROC {value:.3g}, {interval} {options.width:g} wide"
            yield _Aim(words, FORMULAS["auroc"], compute, "all", design)
            continue
        kind = "class" if name == "sensitivity" else "others"
        if options.against is None:
            compute = partial(sample_size.plan_proportion, value, **measured)
            words = f"{name} {format_fraction(value)}, {interval} {format_points(options.width)} wide"
            yield _Aim(words, FORMULAS["interval"], compute, kind, design, min(value, 1 - value))
        else:
            compute = partial(sample_size.plan_proportion_test, value, reference=options.against, **tested)
            relation = "not below" if margin else "other than"
            words = f"{name} {format_fraction(value)}, {relation} {format_fraction(options.against)}{margin}, {power}"
            yield _Aim(words, FORMULAS[f"figure {formula}"], compute, kind, design, min(value, 1 - value))
    difference = options.disagreement or (pilot.measures and pilot.measures.disagreement)
    if difference:
        compute = partial(sample_size.plan_paired_difference, *difference, **tested)
        words = f"accuracy of two models, {format_points(abs(difference[0] - difference[1]))} apart, {power}"
        if margin:
            model = "the new one" if options.compare is None else "the pilot"
            words = f"accuracy of two models, {model} not worse{margin}, {power}"
        design = _choose_design(options, pilot.measures, "difference")
        yield _Aim(words, FORMULAS[f"models {formula}"], compute, "all", design)


def _compute_size(aim: _Aim, prevalence: float | None, per_patient: float) -> PlannedSize:
    try:
        independent, counted = aim.compute(effect=1.0), aim.compute(effect=aim.design.effect)
    except ValueError as error:
        raise PylorusError(f"{aim.words}: {error}.") from error
    class_images = other_images = None
    images = counted
    if prevalence is not None:
        fraction = {"class": prevalence, "others": 1 - prevalence, "all": 1.0}[aim.kind]
        images = round_up(counted / fraction)
        class_images = counted if aim.kind == "class" else round_up(images * prevalence)
        class_images = images - counted if aim.kind == "others" else class_images
        other_images = images - class_images
    own_patients = round_up(counted / aim.design.images_per_patient)
    return PlannedSize(
        aim=aim.words,
        formula=aim.formula,
        independent_images=independent,
        images_per_patient=aim.design.images_per_patient,
        variation=aim.design.variation,
        icc=aim.design.correlation,
        design_effect=aim.design.effect,
        counted=aim.kind,
        counted_images=counted,
        counted_patients=own_patients,
        class_images=class_images,
        other_images=other_images,
        images=images,
        patients=max(own_patients, round_up(images / per_patient)),
    )


def _find_warnings(
    options: PlanOptions, aims: Sequence[_Aim], sizes: Sequence[PlannedSize], pilot: _Pilot
) -> Iterator[str]:
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
    if names := [name for aim, size, name in pairs if aim.errors * size.independent_images < FEW_ERRORS]:
        yield (
            f"{join_names(names)}: so few images that fewer than {FEW_ERRORS} independent ones are of the rarer "
            "outcome (wrong, for a high figure). The interval of the report may be a quarter wider: choose a smaller "
            "--width."
        )
    if names := [name for _, size, name in pairs if size.counted_patients < FEW_PATIENTS]:
        yield (
            f"{join_names(names)}: fewer than {FEW_PATIENTS} patients would count. The interval of the report is then "
            "wider than planned: recruit at least that many."
        )
    if names := [name for aim, _, name in pairs if aim.design.correlation == 1 and aim.design.images_per_patient > 1]:
        yield (
            f"{join_names(names)}: an ICC of 1 makes the images of a patient copies of one another. If the pilot is "
            "merely too small or too good to show the ICC, add --icc, such as 0.5."
        )


def _list_assumptions(options: PlanOptions, pilot: _Pilot, prevalence: float | None) -> tuple[str, ...]:
    sentences, measures = [], pilot.measures
    if measures is not None:
        patients = f" of {format_count(measures.patients, 'patient')}" if pilot.grouped else ""
        sentences.append(
            f"What was not typed is as in the pilot (stage {pilot.stage}, {format_count(measures.images, 'test image')}"
            f"{patients})."
        )
    if prevalence is not None:
        sentences.append(f"{format_fraction(prevalence)} of the images are of {pilot.class_name}.")
    if options.icc is None and (measures is None or measures.patients == measures.images):
        sentences.append("One image per patient. For several, add --icc and --images-per-patient.")
    else:
        sentences.append(
            "Images of a patient resemble each other: the formula's number is multiplied by the design effect, "
            "1 + ((1 + cv²) m - 1) ICC for m images per patient, which vary by cv (Eldridge et al., Int J Epidemiol "
            "2006;35:1292)."
        )
    if measures is None and prevalence is not None:
        sentences.append("All images of a patient are of one class, and patients of all classes have as many images.")
    disagreement = options.disagreement or (measures and measures.disagreement)
    if disagreement:
        first, second = map(format_fraction, disagreement)
        sentences.append(
            f"{'The new model is' if measures is None else 'The pilot is'} the only one that is correct on {first} of "
            f"the images, the other model on {second}."
        )
    if options.margin is not None:
        sentences.append(
            f"The test of non-inferiority is one-sided at the level of {(1 - options.confidence) / 2:.3g}. Choose the "
            "margin on clinical grounds, before the data are seen."
        )
    sentences.append("No image is lost. Add what you expect to lose to poor quality, withdrawal or missing histology.")
    return tuple(sentences)
