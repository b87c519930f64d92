"""Figure sections of a report: training, test images and networks."""

from pylorus.report.confusion_figure import plot_confusion_matrices
from pylorus.report.curve_figures import collect_curves, plot_class_metric_curves, plot_training_curves
from pylorus.report.decision_figures import plot_net_benefit, plot_risk_coverage
from pylorus.report.evidence import Evidence
from pylorus.report.labels import make_file_stems
from pylorus.report.network import build_network_table, read_network_blocks
from pylorus.report.reliability_figure import plot_reliability_diagrams
from pylorus.report.roc_figure import plot_roc_curves
from pylorus.report.saved_run import SavedRun
from pylorus.report.section import FileOnly, Item, Section, Sentences
from pylorus.report.structure_figure import plot_network_structure


def build_training_section(evidence: Evidence) -> Section:
    """Build the section of training curves: all models in one plot per stage, then the classes of each model."""
    curves = collect_curves(evidence.runs)
    labels = {run: label for label, runs in evidence.replicates.items() for run in runs}
    stages = dict.fromkeys(each.stage.name for each in curves)
    items: list[Item] = [
        plot_training_curves([each for each in curves if each.stage.name == stage], labels=labels) for stage in stages
    ]
    stems = make_file_stems(list(evidence.replicates))
    for stem, (label, runs) in zip(stems, evidence.replicates.items(), strict=True):
        for stage in stages:
            own = [each for each in curves if each.stage.name == stage and each.run in runs]
            if own:
                items.append(plot_class_metric_curves(own, own[0].run.short_names, label=label, stem=stem))
    without = [f"{run.label} {stage.name}" for run in evidence.runs for stage in run.stages if stage.curves is None]
    if without:
        items.append(Sentences((f"No training curves, because metrics.csv is missing: {'; '.join(without)}.",)))
    return Section("training", "Training", tuple(items))


def build_test_figure_section(evidence: Evidence) -> Section:
    """Build the section of figures on the test images."""
    results, candidates = evidence.results, evidence.candidates
    if not results:
        return Section("test-figures", "", ())
    items: list[Item] = [*plot_confusion_matrices(results), plot_roc_curves(candidates)]
    calibrated = [result for result in results if result.calibration is not None]
    items += plot_reliability_diagrams(calibrated) if calibrated else []
    items.append(plot_risk_coverage(candidates))
    deciding = [
        candidate
        for candidate in candidates
        if all(
            result.calibration is not None and evidence.class_name in result.images.predictions.class_names
            for result in candidate.results
        )
    ]
    items += [plot_net_benefit(deciding, str(evidence.class_name))] if deciding else []
    return Section("test-figures", "Figures on the test images", tuple(items))


def build_network_section(evidence: Evidence) -> Section:
    """Build the section of network structures, each shown once."""
    distinct: dict[str, SavedRun] = {}
    for run in evidence.runs:
        if run.network:
            distinct.setdefault(f"{run.model} {read_network_blocks(run)}", run)
    items: list[Item] = []
    for run in distinct.values():
        items += [plot_network_structure(run), FileOnly(build_network_table(run))]
    without = [run.label for run in evidence.runs if not run.network]
    if without:
        items.append(Sentences((f"No figure of the network, because network.json is missing: {', '.join(without)}.",)))
    return Section("networks", "Networks", tuple(items))
