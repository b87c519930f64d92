"""`pylorus plan`: how many patients and images a test set needs, from expected figures or from those of a pilot run.

The command line imports this module, which therefore imports what computes only when it is needed.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylorus.core.errors import PylorusError, check_fraction
from pylorus.core.formatting import format_command
from pylorus.core.io import check_writable_folder
from pylorus.report.plan_text import (
    FORMULAS,
    NAMES,
    POWER,
    WIDTH,
    Aim,
    Pilot,
    Plan,
    PlannedSize,
    PlanOptions,
    find_warnings,
    format_area,
    format_fraction,
    format_plan,
    format_points,
    get_areas,
    get_disagreement,
    is_constant,
    list_assumptions,
    round_up,
    write_plan,
)

if TYPE_CHECKING:
    from pylorus.evaluation.pilot import PatientDesign, PilotMeasures
    from pylorus.evaluation.predictions import Predictions
    from pylorus.runs.reading import SavedRun

FRACTIONS = {
    "sensitivity": 0.9,
    "specificity": 0.9,
    "prevalence": 0.2,
    "against": 0.8,
    "margin": 0.05,
    "width": 0.1,
    "calibration": 0.2,
    "confidence": 0.95,
    "power": 0.8,
}
"""Options that are numbers between 0 and 1, each with an example."""


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
    command.add_argument("--width", type=float, metavar="W", help=f"width of the intervals (default: {WIDTH:g})")
    command.add_argument(
        "--calibration",
        type=float,
        nargs="?",
        const=0.2,
        metavar="W",
        help="also plan observed/expected and the calibration slope, with intervals of this width (default: 0.2); "
        "without a pilot it needs --auroc",
    )
    command.add_argument(
        "--against",
        type=float,
        metavar="P",
        help="figure that --sensitivity, --specificity or --auroc is to be compared with",
    )
    command.add_argument(
        "--disagreement",
        type=float,
        nargs=2,
        metavar=("NEW", "OTHER"),
        help="compare two models: fractions of images that only the new, and only the other one classifies correctly",
    )
    command.add_argument(
        "--aurocs",
        dest="areas",
        type=float,
        nargs="*",
        metavar="P",
        help="compare two models by AUROC: those of the new and of the other one (default: the pilot's and that of "
        "--compare)",
    )
    command.add_argument(
        "--correlation",
        type=float,
        metavar="R",
        help="correlation of these two AUROCs on the same images, such as 0.5; 0 is safe",
    )
    command.add_argument(
        "--compare", type=Path, metavar="RUN", help="compare the pilot with this run on the same test images"
    )
    command.add_argument(
        "--margin", type=float, metavar="M", help="show that the (new) model is worse by less than M (non-inferiority)"
    )
    command.add_argument(
        "--power",
        type=float,
        metavar="P",
        help=f"power of a comparison: how probably it succeeds if all is as expected (default: {POWER:g})",
    )
    command.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        metavar="P",
        help="coverage of the intervals; 1 - level of tests (default: 0.95)",
    )
    command.add_argument(
        "--icc",
        type=float,
        metavar="R",
        help="how alike the images of a patient are (intraclass correlation): 0, as different as those of other "
        "patients, to 1, copies of one another (default: the pilot's)",
    )
    command.add_argument(
        "--images-per-patient", type=float, metavar="N", help="mean number of images (default: the pilot's, or 1)"
    )
    command.add_argument("--output", type=Path, metavar="DIR", help="also write plan.csv and plan.json to this folder")
    command.set_defaults(act=_run_plan)


def _run_plan(arguments: argparse.Namespace) -> None:
    values = {name: value for name, value in vars(arguments).items() if name not in ("act", "output")}
    values |= {name: tuple(values[name]) for name in ("disagreement", "areas") if values[name] is not None}
    if arguments.output is not None:
        check_writable_folder(arguments.output, hint="Choose another --output.")
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
    options = replace(options, width=options.width or WIDTH, power=options.power or POWER)
    pilot = Pilot(options.class_name or "the class") if options.pilot is None else _measure_pilot(options)
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
    warnings += find_warnings(options, aims, sizes, pilot)
    return Plan(pilot.class_name, prevalence, sizes, list_assumptions(options, pilot, prevalence), tuple(warnings))


def _check_options(options: PlanOptions) -> None:
    for name, example in FRACTIONS.items():
        check_fraction(getattr(options, name), f"--{name}", example=example)
    areas = [("aurocs", area, position == 1) for position, area in enumerate(options.areas or ())]
    for name, area, is_reference in (("auroc", options.auroc, False), *areas):
        if area is not None and not (0.5 < area < 1 or (is_reference and area == 0.5)):
            meant = f" Did you mean {area / 100:g}?" if 50 < area < 100 else ""
            raise PylorusError(f"--{name}: found {area:g}, expected a number between 0.5 and 1, such as 0.9.{meant}")
    if options.correlation is not None and not 0 <= options.correlation < 1:
        raise PylorusError(
            f"--correlation: found {options.correlation:g}, expected a number from 0 to below 1, such as 0.5."
        )
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
        class_aims = (options.sensitivity, options.specificity, options.auroc, options.areas, options.calibration)
        if options.prevalence is None and any(value is not None for value in class_aims):
            raise PylorusError(
                "--prevalence: not given, so the number of images in all is unknown. Add the fraction of images that "
                "are of the class, such as --prevalence 0.2."
            )
    if options.calibration is not None and options.pilot is None and options.auroc is None:
        raise PylorusError(
            "--calibration: how much the probabilities differ between images is unknown. Add the AUROC that you "
            "expect, such as --auroc 0.9, or the folder of a pilot run."
        )
    _check_comparison(options)


def _check_comparison(options: PlanOptions) -> None:
    """Check that what compares fits together, and that no option is without effect."""
    if options.compare is not None and options.disagreement is not None:
        raise PylorusError("--disagreement: is measured with --compare. Leave one of the two out.")
    if options.disagreement is not None and not (min(options.disagreement) >= 0 and 0 < sum(options.disagreement) <= 1):
        first, second = options.disagreement
        meant = f" Did you mean {first / 100:g} {second / 100:g}?" if first >= 0 and second >= 0 and second > 1 else ""
        raise PylorusError(
            f"--disagreement: found {first:g} {second:g}, expected two fractions with a sum in (0, 1], such as "
            f"0.08 0.04.{meant}"
        )
    if options.areas is not None:
        if len(options.areas) not in (0, 2):
            raise PylorusError(
                f"--aurocs: found {len(options.areas)} number, expected two, such as --aurocs 0.92 0.88."
            )
        if not options.areas and options.compare is None:
            raise PylorusError("--aurocs: expected two numbers, such as --aurocs 0.92 0.88, or PILOT --compare RUN.")
        if options.correlation is None and options.compare is None:
            raise PylorusError(
                "--aurocs: how much the two agree on the same images is unknown. Add --correlation: 0.5 is usual for "
                "two networks, 0 needs the most images; or measure it with PILOT --compare RUN."
            )
    figures = [name for name in NAMES if getattr(options, name) is not None]
    if options.against is not None and len(figures) != 1:
        raise PylorusError(
            "--against: expected one figure to compare with it, --sensitivity P, --specificity P or --auroc P, and "
            "only one of them."
        )
    has_models = options.disagreement or options.compare or options.areas
    has_interval = (figures and options.against is None) or not (figures or has_models)
    for name, value, has_effect, missing in (
        ("margin", options.margin, options.against is not None or has_models, "compare"),
        ("power", options.power, options.against is not None or has_models, "compare"),
        ("width", options.width, has_interval, "measure with an interval"),
        ("correlation", options.correlation, options.areas is not None, "compare by AUROC"),
    ):
        if value is not None and not has_effect:
            add = {
                "compare": "Add --against P (a figure), --disagreement NEW OTHER, --aurocs NEW OTHER or --compare RUN.",
                "compare by AUROC": "Add --aurocs NEW OTHER.",
            }.get(missing, "Leave it out, or add what you expect, such as --sensitivity 0.9.")
            raise PylorusError(f"--{name}: nothing to {missing}. {add}")


def _measure_pilot(options: PlanOptions) -> Pilot:
    """Measure figures and their correlation within patients on the test predictions of a run."""
    from pylorus.evaluation.pilot import measure_pilot
    from pylorus.report.captions import resolve_class_name

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
        measures = measure_pilot(predictions, class_name, other, confidence=options.confidence)
    except ValueError as error:
        place = options.pilot if other is None else f"{options.pilot} and {options.compare}"
        raise PylorusError(f"{place}: {error}.") from error
    if measures.patients == measures.images and options.icc is None and (options.images_per_patient or 1) > 1:
        raise PylorusError(
            f"{options.pilot}: each patient has one test image, so it does not show how much several images of a "
            "patient resemble each other. Add --icc, such as 0.3, or leave out --images-per-patient."
        )
    return Pilot(class_name, measures, stage, run.has_groups)


def _read_pilot(folder: Path) -> "tuple[SavedRun, str, Predictions]":
    """Read a finished run, the name of its shipped stage, and the test predictions of that stage."""
    from pylorus.core.errors import TRAIN_COMMAND
    from pylorus.evaluation.calibration import fit_temperature, probabilities_of_logits
    from pylorus.runs.folder import STATUS
    from pylorus.runs.reading import read_run

    if not (folder / STATUS).is_file():
        runs = [] if not folder.is_dir() else sorted(path.parent for path in folder.glob(f"*/{STATUS}"))
        runs += [folder.parent] if (folder.parent / STATUS).is_file() else []
        meant = f" Did you mean {runs[0]}?" if runs else ""
        raise PylorusError(f"{folder}: found no {STATUS}, expected the folder of a finished run.{meant}")
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
    predictions = stage.test.predictions
    if stage.validation is not None:  # with the temperature of the bundle, as in a report
        fitted = fit_temperature(stage.validation.logits, stage.validation.predictions.true)
        probabilities = probabilities_of_logits(stage.test.logits, temperature=fitted.temperature)
        predictions = replace(predictions, probabilities=probabilities)
    return run, stage.name, predictions


def _choose_design(options: PlanOptions, measures: "PilotMeasures | None", name: str) -> "PatientDesign":
    """Return how images come in patients for an aim: as the options say, else as in the pilot, else one by one."""
    from pylorus.evaluation.pilot import PatientDesign

    measured = PatientDesign()
    if measures is not None:
        designs = measures.designs
        kind = (
            {"difference": "accuracy", "auroc difference": "auroc"}.get(name, name) if options.compare is None else name
        )
        if kind not in designs and (options.icc is None or options.images_per_patient is None):
            raise PylorusError(
                f"{options.pilot}: only one patient has test images that count for {NAMES.get(name, name)}, so it does "
                "not show how much patients differ. Use a larger pilot, or add --icc and --images-per-patient, such as "
                "--icc 0.3 --images-per-patient 3."
            )
        measured = designs.get(kind, measured)
    if options.images_per_patient is not None:
        measured = replace(measured, images_per_patient=options.images_per_patient, variation=0.0)
    if options.icc is not None:
        measured = PatientDesign(measured.images_per_patient, measured.variation, options.icc)
    return measured


def _choose_values(options: PlanOptions, pilot: Pilot) -> tuple[dict[str, float], list[str]]:
    """Return the expected figures to plan for, and why some of the pilot's can't be used."""
    typed = {name: getattr(options, name) for name in NAMES if getattr(options, name) is not None}
    if typed or options.disagreement or options.compare or options.areas or pilot.measures is None:
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
    options: PlanOptions, pilot: Pilot, values: Mapping[str, float], prevalence: float | None
) -> Iterator[Aim]:
    for name, value in values.items():
        yield _build_figure_aim(options, pilot, name, value, prevalence)
    yield from _build_calibration_aims(options, pilot, prevalence)
    yield from _build_model_aims(options, pilot, prevalence)


def _build_figure_aim(options: PlanOptions, pilot: Pilot, name: str, value: float, prevalence: float | None) -> Aim:
    """Build the aim of a sensitivity, specificity or AUROC: an interval, or a comparison with a figure."""
    from pylorus.evaluation import sample_size

    design, is_area = _choose_design(options, pilot.measures, name), name == "auroc"
    kind = {"sensitivity": "class", "specificity": "others"}.get(name, "all")
    shared: dict[str, Any] = {"prevalence": prevalence} if is_area else {}
    errors = min(prevalence or 0.0, 1 - (prevalence or 0.0)) if is_area else min(value, 1 - value)
    figure = f"{NAMES[name]} {format_area(value) if is_area else format_fraction(value)}"
    if options.against is None:
        plan = sample_size.plan_auroc if is_area else sample_size.plan_proportion
        compute = partial(plan, value, width=options.width or WIDTH, confidence=options.confidence, **shared)
        width = f"{options.width:g}" if is_area else format_points(options.width or WIDTH)
        words = f"{figure}, {_format_confidence(options)} interval {width} wide"
        return Aim(words, FORMULAS["auroc" if is_area else "interval"], compute, kind, design, errors)
    test = sample_size.plan_auroc_test if is_area else sample_size.plan_proportion_test
    compute = partial(test, value, reference=options.against, **_collect_test_settings(options), **shared)
    relation = "other than" if options.margin is None else "not below"
    against = format_area(options.against) if is_area else format_fraction(options.against)
    words = f"{figure}, {relation} {against}{_format_margin(options, is_area=is_area)}, {_format_power(options)}"
    formula = f"{'area' if is_area else 'figure'} {'test' if options.margin is None else 'margin'}"
    return Aim(words, FORMULAS[formula], compute, kind, design, errors, is_test=True)


def _build_calibration_aims(options: PlanOptions, pilot: Pilot, prevalence: float | None) -> Iterator[Aim]:
    """Build the aims of observed/expected and of the calibration slope (Riley et al. 2024)."""
    import numpy as np

    from pylorus.evaluation import sample_size
    from pylorus.evaluation.pilot import compute_binormal_log_odds

    if options.calibration is None:
        return
    assert prevalence is not None
    shared: dict[str, Any] = {"width": options.calibration, "confidence": options.confidence}
    if pilot.measures is None:
        assert options.auroc is not None
        log_odds, weights = compute_binormal_log_odds(options.auroc, prevalence=prevalence)
    else:
        log_odds, own = pilot.measures.log_odds, pilot.measures.prevalence
        weights = np.where(pilot.measures.is_class, prevalence / own, (1 - prevalence) / (1 - own))
    design, errors = _choose_design(options, pilot.measures, "calibration"), min(prevalence, 1 - prevalence)
    words = f"{_format_confidence(options)} interval {options.calibration:g} wide"
    observed = partial(sample_size.plan_observed_expected, prevalence, **shared)
    yield Aim(f"observed/expected 1, {words}", FORMULAS["observed"], observed, "all", design, errors)
    if is_constant(log_odds):
        return
    slope = partial(sample_size.plan_calibration_slope, log_odds, weights=weights, **shared)
    yield Aim(f"calibration slope 1, {words}", FORMULAS["slope"], slope, "all", design, errors)


def _build_model_aims(options: PlanOptions, pilot: Pilot, prevalence: float | None) -> Iterator[Aim]:
    """Build the aims that compare two models on the same images: by accuracy, or by AUROC."""
    from pylorus.evaluation import sample_size

    model = "the new one" if options.compare is None else "the pilot"
    settings, power = _collect_test_settings(options), _format_power(options)
    if difference := get_disagreement(options, pilot):
        compute = partial(sample_size.plan_paired_difference, *difference, **settings)
        lead = difference[0] - difference[1]
        words = (
            f"accuracy of two models, {model} {format_points(abs(lead))} {'better' if lead > 0 else 'worse'}, {power}"
        )
        if options.margin is not None:
            words = f"accuracy of two models, {model} not worse{_format_margin(options)}, {power}"
        formula = FORMULAS[f"models {'test' if options.margin is None else 'margin'}"]
        design = _choose_design(options, pilot.measures, "difference")
        yield Aim(words, formula, compute, "all", design, sum(difference), is_test=True)
    if options.areas is not None:
        assert prevalence is not None
        one, two, correlation = get_areas(options, pilot)
        compute = partial(
            sample_size.plan_paired_auroc, one, two, correlation=correlation, prevalence=prevalence, **settings
        )
        words = f"AUROCs of two models, {format_area(one)} and {format_area(two)}, {power}"
        if options.margin is not None:
            words = f"AUROCs of two models, {model} not worse{_format_margin(options, is_area=True)}, {power}"
        design = _choose_design(options, pilot.measures, "auroc difference")
        yield Aim(words, FORMULAS["areas"], compute, "all", design, min(prevalence, 1 - prevalence), is_test=True)


def _collect_test_settings(options: PlanOptions) -> dict[str, Any]:
    return {"power": options.power, "level": 1 - options.confidence, "margin": options.margin}


def _format_confidence(options: PlanOptions) -> str:
    return format_fraction(options.confidence)


def _format_power(options: PlanOptions) -> str:
    return f"power {format_fraction(options.power or POWER)}"


def _format_margin(options: PlanOptions, *, is_area: bool = False) -> str:
    if options.margin is None:
        return ""
    return f" by {f'{options.margin:g}' if is_area else format_points(options.margin)} or more"


def _compute_size(aim: Aim, prevalence: float | None, per_patient: float) -> PlannedSize:
    try:
        independent, counted = aim.compute(effect=1.0), aim.compute(effect=aim.design.effect)
        at_high = None if aim.design.upper is None else aim.compute(effect=aim.design.upper.effect)
    except ValueError as error:
        raise PylorusError(f"{aim.words}: {error}.") from error
    fraction = {"class": prevalence, "others": None if prevalence is None else 1 - prevalence}.get(aim.kind) or 1.0

    def count_all(images: int) -> tuple[int, int, int]:
        """Count the images in all, the patients with images that count, and the patients in all."""
        in_all, own = round_up(images / fraction), round_up(images / aim.design.images_per_patient)
        return in_all, own, max(own, round_up(in_all / per_patient))

    images, own_patients, patients = count_all(counted)
    class_images = other_images = None
    if prevalence is not None:
        class_images = counted if aim.kind == "class" else round_up(images * prevalence)
        class_images = images - counted if aim.kind == "others" else class_images
        other_images = images - class_images
    images_at_high, _, patients_at_high = (None,) * 3 if at_high is None else count_all(at_high)
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
        patients=patients,
        icc_low=None if at_high is None else aim.design.low,
        icc_high=None if at_high is None else aim.design.high,
        images_at_high=images_at_high,
        patients_at_high=patients_at_high,
    )
