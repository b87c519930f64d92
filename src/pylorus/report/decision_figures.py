"""Plot risk-coverage curves, if the model may refer images, and decision curves of net benefit, if it decides."""

from collections.abc import Sequence

import numpy as np

from pylorus.evaluation.decisions import NetBenefit, RiskCoverage, net_benefit, risk_coverage
from pylorus.report.basis import format_test_basis
from pylorus.report.candidate import Candidate
from pylorus.report.drawing import (
    FAINT,
    INK,
    REPLICATES,
    Drawing,
    add_legend_above,
    create_figure,
    get_line_style,
    get_replicate_style,
    report_style,
)
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.run_facts import format_validation_images

BANDS = "Bands: pointwise 95 % confidence intervals that account for clustering of images within groups."

SQUARE = 4.6
"""Width of a single-panel figure in inches."""


def plot_risk_coverage(candidates: Sequence[Candidate]) -> Drawing:
    """Plot the error rate among the images that are not referred, most confident first, one colour per candidate.

    Args:
        candidates: At least one.
    """
    labels = [each.label for each in candidates]
    with report_style():
        figure = create_figure(3.2, width=SQUARE, legend=labels)
        axes = figure.subplots()
        handles, half_texts = [], []
        for number, candidate in enumerate(candidates):
            curves = [_compute_risk_coverage(result) for result in candidate.results]
            if len(curves) == 1:
                coverage, risk = curves[0].coverage, curves[0].risk
            else:
                for curve in curves:
                    axes.plot(100 * curve.coverage, 100 * curve.risk, **get_replicate_style(number))
                coverage = np.linspace(max(curve.coverage[0] for curve in curves), 1, 100)
                risk = np.mean([np.interp(coverage, curve.coverage, curve.risk) for curve in curves], axis=0)
            marker_step = max(1, len(coverage) // 8)
            handles += axes.plot(100 * coverage, 100 * risk, markevery=marker_step, **get_line_style(number))
            half_texts.append(
                f"{candidate.label}: {_format_risk_at(coverage, risk, 0.5)} errors in the most confident half"
            )
        axes.set_xlabel("coverage (images not referred), %")
        axes.set_ylabel("error rate among these images, %")
        axes.set_xlim(0, 102)
        axes.set_ylim(bottom=-1)
        add_legend_above(figure, handles, labels)
    return Drawing(
        key="risk-coverage",
        title="Risk-coverage curves on test images: remaining errors if the least confident predictions are referred",
        basis=format_test_basis([result for each in candidates for result in each.results]),
        alt=f"Error rate against proportion of images not referred. {'; '.join(half_texts)}.",
        figure=figure,
        notes=(
            "At 100 % coverage no image is referred, and the error rate is 100 % minus the accuracy.",
            *format_replicate_notes(candidates),
        ),
    )


def plot_net_benefit(candidates: Sequence[Candidate], class_name: str) -> Drawing:
    """Plot the decision curve of one class's calibrated probability, one colour per candidate.

    Args:
        candidates: At least one; each result has a calibration and knows the class.
        class_name: Short name of the class.
    """
    results = [result for each in candidates for result in each.results]
    with report_style():
        labels = [*(each.label for each in candidates), "act on all images", "act on no image"]
        figure = create_figure(3.2, width=SQUARE, legend=labels)
        axes = figure.subplots()
        handles, all_curves = [], []
        for number, candidate in enumerate(candidates):
            curves = [_compute_net_benefit(result, class_name) for result in candidate.results]
            all_curves += curves
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(100 * curve.threshold, curve.model, **get_replicate_style(number))
            mean = np.mean([curve.model for curve in curves], axis=0)
            marker_slice = slice(number * 3, None, 16)
            line_options = get_line_style(number)
            handles += axes.plot(100 * curves[0].threshold, mean, markevery=marker_slice, **line_options)
            if len(curves) == 1:
                steps, ends = 100 * curves[0].threshold, (curves[0].low, curves[0].high)
                axes.fill_between(steps, *ends, color=line_options["color"], alpha=0.12, linewidth=0)
        has_bands = any(len(candidate.results) == 1 for candidate in candidates)
        prevalence = float(np.mean([curve.prevalence for curve in all_curves]))
        treat_all = np.mean([curve.treat_all for curve in all_curves], axis=0)
        top = max(0.02, prevalence)
        handles += axes.plot(100 * all_curves[0].threshold, treat_all, color=FAINT, linestyle=":")
        handles.append(axes.axhline(0, color=INK, linewidth=0.8))
        axes.set_ylim(-0.25 * top, 1.12 * top)
        axes.set_xlabel("threshold probability, %")
        axes.set_ylabel("net benefit, true positives per image")
        add_legend_above(figure, handles, labels)
    return Drawing(
        key="net-benefit",
        title=f"Decision curves on test images: net benefit of acting on the probability of {class_name}",
        basis=format_test_basis(results),
        alt="Net benefit against threshold probability, with acting on all images and on none for reference. "
        f"Proportion of {class_name} among the test images: {100 * prevalence:.0f} %.",
        figure=figure,
        notes=(
            f"Net benefit depends on the proportion of {class_name}, here {100 * prevalence:.0f} %; it may differ in "
            "clinical practice.",
            f"Probabilities were calibrated on {format_validation_images([each.run for each in results])}.",
            *(
                ("Bands: pointwise 95 % confidence intervals that account for clustering of images within groups.",)
                * has_bands
            ),
            *format_replicate_notes(candidates),
        ),
    )


def format_replicate_notes(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Explain thin lines, if there are any."""
    return (REPLICATES,) if any(len(each.results) > 1 for each in candidates) else ()


def _compute_risk_coverage(result: Result) -> RiskCoverage:
    predictions = result.test.predictions
    return risk_coverage(predictions.correct, predictions.probabilities.max(axis=1))


def _compute_net_benefit(result: Result, class_name: str) -> NetBenefit:
    assert result.calibration is not None
    predictions = result.calibration.test
    column = predictions.class_names.index(class_name)
    probability = np.clip(predictions.probabilities[:, column], 0, 1)
    return net_benefit(predictions.true == column, probability, result.test.clusters, confidence=CONFIDENCE)


def _format_risk_at(coverage: np.ndarray, risk: np.ndarray, proportion: float) -> str:
    """Format the risk at the lowest coverage that reaches a proportion."""
    return f"{100 * risk[int(np.argmax(coverage >= proportion))]:.1f} %"
