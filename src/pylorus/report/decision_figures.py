"""What a model is good for: risk against coverage where it may abstain, and net benefit where it decides."""

from collections.abc import Sequence

import numpy as np

from pylorus.evaluation.decisions import NetBenefit, RiskCoverage, net_benefit, risk_coverage
from pylorus.report.basis import tested_on
from pylorus.report.candidate import Candidate
from pylorus.report.drawing import (
    FAINT,
    INK,
    REPLICATES,
    Drawing,
    legend_above,
    line_style,
    new_figure,
    replicate_style,
    style,
)
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.run_facts import validation_images

BANDS = "Bands: 95 % intervals at each threshold by itself, which keep the images of a group together."

SQUARE = 4.6
"""Inches across a figure of one panel."""


def risk_figure(candidates: Sequence[Candidate]) -> Drawing:
    """Mistakes among the images that are answered, the surest first, a colour a candidate.

    Args:
        candidates: At least one.
    """
    labels = [each.label for each in candidates]
    with style():
        figure = new_figure(3.2, width=SQUARE, legend=labels)
        axes = figure.subplots()
        handles, halves = [], []
        for number, candidate in enumerate(candidates):
            curves = [_risk(result) for result in candidate.results]
            if len(curves) == 1:
                coverage, risk = curves[0].coverage, curves[0].risk
            else:
                for curve in curves:
                    axes.plot(100 * curve.coverage, 100 * curve.risk, **replicate_style(number))
                coverage = np.linspace(max(curve.coverage[0] for curve in curves), 1, 100)
                risk = np.mean([np.interp(coverage, curve.coverage, curve.risk) for curve in curves], axis=0)
            every = max(1, len(coverage) // 8)
            handles += axes.plot(100 * coverage, 100 * risk, markevery=every, **line_style(number))
            halves.append(f"{candidate.label}: {_mistakes(coverage, risk, 0.5)} of the surest half are mistaken")
        axes.set_xlabel("coverage: images answered, %")
        axes.set_ylabel("mistakes among them, %")
        axes.set_xlim(0, 102)
        axes.set_ylim(bottom=-1)
        legend_above(figure, handles, labels)
    return Drawing(
        key="risk-coverage",
        title="Risk and coverage on test images: mistakes left if the least certain images go to the doctor",
        basis=tested_on([result for each in candidates for result in each.results]),
        alt=f"Share of mistakes against share of images answered. {'; '.join(halves)}.",
        figure=figure,
        notes=(
            "At 100 % every image is answered, and the mistakes are 100 % less the accuracy.",
            *replicate_notes(candidates),
        ),
    )


def net_benefit_figure(candidates: Sequence[Candidate], class_name: str) -> Drawing:
    """Net benefit of acting on one class's calibrated probability, a colour a candidate.

    Args:
        candidates: At least one; each result has a calibration and the class among its own.
        class_name: Short name of the class.
    """
    results = [result for each in candidates for result in each.results]
    with style():
        labels = [*(each.label for each in candidates), "act on every image", "act on none"]
        figure = new_figure(3.2, width=SQUARE, legend=labels)
        axes = figure.subplots()
        handles, every_curve = [], []
        for number, candidate in enumerate(candidates):
            curves = [_net_benefit(result, class_name) for result in candidate.results]
            every_curve += curves
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(100 * curve.threshold, curve.model, **replicate_style(number))
            mean = np.mean([curve.model for curve in curves], axis=0)
            every = slice(number * 3, None, 16)
            look = line_style(number)
            handles += axes.plot(100 * curves[0].threshold, mean, markevery=every, **look)
            if len(curves) == 1:
                steps, ends = 100 * curves[0].threshold, (curves[0].low, curves[0].high)
                axes.fill_between(steps, *ends, color=look["color"], alpha=0.12, linewidth=0)
        banded = any(len(candidate.results) == 1 for candidate in candidates)
        prevalence = float(np.mean([curve.prevalence for curve in every_curve]))
        treat_all = np.mean([curve.treat_all for curve in every_curve], axis=0)
        top = max(0.02, prevalence)
        handles += axes.plot(100 * every_curve[0].threshold, treat_all, color=FAINT, linestyle=":")
        handles.append(axes.axhline(0, color=INK, linewidth=0.8))
        axes.set_ylim(-0.25 * top, 1.12 * top)
        axes.set_xlabel("threshold probability at which one acts, %")
        axes.set_ylabel("net benefit, true positives an image")
        legend_above(figure, handles, labels)
    return Drawing(
        key="net-benefit",
        title=f"Net benefit of acting on the probability of {class_name}, on test images",
        basis=tested_on(results),
        alt=f"Net benefit against the threshold probability, with acting on all and on none. Share of {class_name} "
        f"among the test images: {100 * prevalence:.0f} %.",
        figure=figure,
        notes=(
            f"The curve rests on the test set's share of {class_name}, {100 * prevalence:.0f} %; a clinic's may "
            "be another.",
            f"Probabilities are calibrated on {validation_images([each.run for each in results])}.",
            *(
                ("Bands: 95 % intervals at each threshold by itself, which keep the images of a group together.",)
                * banded
            ),
            *replicate_notes(candidates),
        ),
    )


def replicate_notes(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """What thin lines are, where there are any."""
    return (REPLICATES,) if any(len(each.results) > 1 for each in candidates) else ()


def _risk(result: Result) -> RiskCoverage:
    said = result.test.predictions
    return risk_coverage(said.correct, said.probabilities.max(axis=1))


def _net_benefit(result: Result, class_name: str) -> NetBenefit:
    assert result.calibration is not None
    said = result.calibration.test
    column = said.class_names.index(class_name)
    chance = np.clip(said.probabilities[:, column], 0, 1)
    return net_benefit(said.true == column, chance, result.test.clusters, confidence=CONFIDENCE)


def _mistakes(coverage: np.ndarray, risk: np.ndarray, share: float) -> str:
    """The risk at the least coverage that reaches a share."""
    return f"{100 * risk[int(np.argmax(coverage >= share))]:.1f} %"
