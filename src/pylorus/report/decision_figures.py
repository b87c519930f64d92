"""What a model is good for: risk against coverage where it may abstain, and net benefit where it decides."""

from collections.abc import Sequence

import numpy as np

from pylorus.evaluation.abstention import risk_coverage
from pylorus.evaluation.net_benefit import NetBenefit, net_benefit
from pylorus.report.basis import tested_on
from pylorus.report.drawing import FAINT, INK, Drawing, legend_above, line_style, new_figure, style
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.run_facts import validation_images

SQUARE = 4.6
"""Inches across a figure of one panel."""


def risk_figure(results: Sequence[Result]) -> Drawing:
    """Mistakes among the images that are answered, the surest first.

    Args:
        results: At least one.
    """
    with style():
        labels = [result.label for result in results]
        figure = new_figure(3.2, width=SQUARE, legend=labels)
        axes = figure.subplots()
        handles, told = [], []
        for number, result in enumerate(results):
            said = result.test.predictions
            curve = risk_coverage(said.correct, said.probabilities.max(axis=1))
            look = line_style(number)
            every = max(1, len(curve.coverage) // 8)
            handles += axes.plot(100 * curve.coverage, 100 * curve.risk, markevery=every, **look)
            told.append(f"{result.label}: {_mistakes(curve.coverage, curve.risk, 0.5)} of the surest half are mistaken")
        axes.set_xlabel("coverage: images answered, %")
        axes.set_ylabel("mistakes among them, %")
        axes.set_xlim(0, 102)
        axes.set_ylim(bottom=-1)
        legend_above(figure, handles, labels)
    return Drawing(
        key="risk-coverage",
        title="Risk and coverage on test images: mistakes left if the least certain images go to the doctor",
        basis=tested_on(results),
        alt=f"Share of mistakes against share of images answered. {'; '.join(told)}.",
        figure=figure,
        notes=("At 100 % every image is answered, and the mistakes are 100 % less the accuracy.",),
    )


def net_benefit_figure(results: Sequence[Result], class_name: str) -> Drawing:
    """Net benefit of acting on one class's calibrated probability.

    Args:
        results: At least one, each with a calibration and the class among its own.
        class_name: Short name of the class.
    """
    with style():
        labels = [*(result.label for result in results), "act on every image", "act on none"]
        figure = new_figure(3.2, width=SQUARE, legend=labels)
        axes = figure.subplots()
        handles = []
        for number, result in enumerate(results):
            curve = _net_benefit(result, class_name)
            every = slice(number * 3, None, 16)
            look = line_style(number)
            handles += axes.plot(100 * curve.threshold, curve.model, markevery=every, **look)
            axes.fill_between(
                100 * curve.threshold, curve.low, curve.high, color=look["color"], alpha=0.12, linewidth=0
            )
        top = max(0.02, curve.prevalence)
        handles += axes.plot(100 * curve.threshold, curve.treat_all, color=FAINT, linestyle=":")
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
        f"among the test images: {100 * curve.prevalence:.0f} %.",
        figure=figure,
        notes=(
            f"The curve rests on the test set's share of {class_name}, {100 * curve.prevalence:.0f} %; a clinic's may "
            "be another.",
            f"Probabilities are calibrated on {validation_images([each.run for each in results])}.",
            "Bands: 95 % intervals at each threshold by itself, which keep the images of a group together.",
        ),
    )


def _net_benefit(result: Result, class_name: str) -> NetBenefit:
    assert result.calibration is not None
    said = result.calibration.test
    column = said.class_names.index(class_name)
    chance = np.clip(said.probabilities[:, column], 0, 1)
    return net_benefit(said.true == column, chance, result.test.clusters, confidence=CONFIDENCE)


def _mistakes(coverage: np.ndarray, risk: np.ndarray, share: float) -> str:
    """The risk at the least coverage that reaches a share."""
    return f"{100 * risk[int(np.argmax(coverage >= share))]:.1f} %"
