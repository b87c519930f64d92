"""The record: worst mistakes, data and split, configuration and environment, the checklist, the methods."""

from collections.abc import Mapping
from typing import Any

from pylorus.report.checklist import checklist_table
from pylorus.report.comparison_tables import describe_comparisons
from pylorus.report.evidence import Evidence
from pylorus.report.maps import saved_maps
from pylorus.report.mistakes import mistake_table, worst_mistakes
from pylorus.report.redaction import redacted_yaml
from pylorus.report.run_tables import command_lines, run_table, split_sentences, split_table
from pylorus.report.saved_run import SavedRun
from pylorus.report.section import Item, Listing, Pictures, Section, Sentences
from pylorus.report.table import Row, Table, text_columns
from pylorus.report.thumbnails import thumbnails_of
from pylorus.runs.shipped import read_shipped

METHODS = (
    "Everything here is rebuilt from the predictions, curves and records that the runs saved.",
    "An index that divides zero by zero is undefined: it stands as a dash, is never taken as 0 or 1, and makes every "
    "average over classes undefined.",
    "Precision, sensitivity, specificity, NPV and accuracy have Wilson intervals. Where groups hold several images the "
    "interval is drawn for the effective number of images, with Student's t of groups - 1 degrees of freedom (Korn and "
    "Graubard 1998).",
    "AUROC is DeLong's, in groups Obuchowski's (1997), with an interval on the logit scale. F1, macro averages, kappa, "
    "MCC and average precision have intervals of a bootstrap that draws whole groups ({resamples:,} resamples, seed "
    "{seed}).",
    "At patient level a patient is the mean of what was said of its images. Groups whose images carry several true "
    "classes have no one truth and are left out there, and counted.",
    "The temperature and the threshold are fitted on validation images alone and applied untouched to the test images.",
    "A look at a test set is one stage of one run that predicted it, and each epoch that was validated on it. Test "
    "sets are told by the content of their images. Looks are counted from the runs that lie on the disk, so the number "
    "is a lower bound.",
)

CALIBRATED = (
    "Probabilities are those that the bundle gives, calibrated by the temperature: by them go AUROC, average "
    "precision, comparisons, thresholds and worst mistakes."
)
FULL_PRECISION = (
    "Validation and test images were answered in 32 bits by the code that the bundle runs, whatever the precision of "
    "the training: `pylorus predict RUN/model --evaluate` gives the same figures."
)
BURNT_IN = "Thumbnails show what the console burnt into the frames, names included: look before you pass this page on."


def mistake_section(evidence: Evidence) -> Section:
    """The surest mistakes of our own choice on each test set; its run ships that very network."""
    items: list[Item] = []
    for number, winner in enumerate(evidence.winners, start=1):
        result, peers = winner.chosen or winner.best[0], winner.tests.candidates
        mistakes = worst_mistakes(result, peers)
        if not mistakes:
            items.append(Sentences((f"{result.label} recognises all {result.test.images} test images.",)))
            continue
        items.append(mistake_table(result, mistakes, peers=len(peers), names=evidence.options.names, number=number))
        if evidence.options.thumbnails:
            maps = saved_maps(result.run, stage=result.stage.name)
            pictures = thumbnails_of(result.run, [mistake.sample for mistake in mistakes], maps.overlays)
            items.append(Pictures(tuple((mistake, pictures[mistake.sample]) for mistake in mistakes)))
            items.append(Sentences((BURNT_IN, maps.said)))
    if items and not evidence.options.thumbnails:
        items.append(Sentences(("With --thumbnails the report shows these images, which then leave with it.",)))
    return Section("mistakes", "Worst mistakes", tuple(items))


def data_section(evidence: Evidence) -> Section:
    """The runs, and each split once."""
    items: list[Item] = [
        run_table(evidence.runs),
        Listing("Command lines", command_lines(evidence.runs, names=evidence.options.names)),
    ]
    splits: dict[str, SavedRun] = {}
    for run in evidence.runs:
        if run.split is not None:
            splits.setdefault(run.split.sha256, run)
    for digest, run in splits.items():
        items += [
            split_table(run),
            Sentences((f"SHA-256 of split.csv: {digest}.", *split_sentences(run))),
        ]
    return Section("data", "Runs, data and split", tuple(items))


def configuration_section(evidence: Evidence) -> Section:
    """Each run's configuration, and each environment once."""
    items: list[Item] = []
    environments: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for run in evidence.runs:
        if run.environment:
            environments.setdefault(str(run.environment), (run.environment, []))[1].append(run.label)
    for number, (environment, labels) in enumerate(environments.values(), start=1):
        items.append(_environment_table(environment, labels, number=number))
    items += [
        Listing(f"{run.label}: config.yaml", redacted_yaml(run.config, names=evidence.options.names))
        for run in evidence.runs
        if run.config
    ]
    return Section("configuration", "Configuration and environment", tuple(items))


def checklist_section(evidence: Evidence) -> Section:
    """What a paper has to say."""
    return Section("checklist", "Draft of the reporting checklists", (checklist_table(evidence),))


def method_section(evidence: Evidence) -> Section:
    """How the numbers were made."""
    options = evidence.options
    texts = [text.format(resamples=options.resamples, seed=options.seed) for text in METHODS]
    if any(result.calibration is not None for result in evidence.results):
        texts.append(CALIBRATED)
    if evidence.results and all(read_shipped(result.run.bundle) is not None for result in evidence.results):
        texts.append(FULL_PRECISION)
    texts += describe_comparisons(evidence.comparisons)
    return Section("methods", "How these numbers were made", (Sentences(tuple(texts), listed=True),))


def _environment_table(environment: Mapping[str, Any], labels: list[str], *, number: int) -> Table:
    packages = environment.get("packages", {})
    rows = [(str(name), _said(value)) for name, value in environment.items() if name != "packages"]
    rows += [(str(name), str(version)) for name, version in packages.items()]
    return Table(
        key="environment" + (f"-{number}" if number > 1 else ""),
        title=f"Machine and versions ({', '.join(labels)})",
        basis="",
        columns=text_columns("what", "found"),
        rows=tuple(Row(row) for row in rows),
    )


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
