"""The record: worst mistakes, data and split, configuration and environment, the checklist, the methods."""

from collections.abc import Mapping, Sequence
from typing import Any

from pylorus.evaluation.subgroups import PERMUTATIONS
from pylorus.report.checklist import checklist_table
from pylorus.report.comparison_tables import describe_comparisons
from pylorus.report.evidence import Evidence
from pylorus.report.maps import saved_maps
from pylorus.report.mistakes import mistake_table, worst_mistakes
from pylorus.report.redaction import redacted_yaml
from pylorus.report.result import Result
from pylorus.report.run_facts import is_validated_on_test
from pylorus.report.run_tables import command_lines, run_table, split_sentences, split_table
from pylorus.report.saved_run import SavedRun
from pylorus.report.section import Item, Listing, Pictures, Section, Sentences
from pylorus.report.subgroup_tables import columns_of
from pylorus.report.table import Row, Table, text_columns
from pylorus.report.thumbnails import thumbnails_of
from pylorus.runs.shipped import read_shipped

METHODS = (
    "Everything here is rebuilt from the predictions, curves and records that the runs saved.",
    "An index that divides zero by zero is undefined: it stands as a dash, is never taken as 0 or 1, and makes every "
    "average over classes undefined. Below its table stands why.",
    "Precision, sensitivity, specificity, NPV and accuracy have Wilson intervals. Where groups hold several images the "
    "interval is that of the effective number of images: the variance is the larger of that between whole groups and "
    "that of the intraclass correlation (analysis of variance), with Student's t of Satterthwaite's degrees of "
    "freedom. Where no image is wrong the images of a group count as copies of one another.",
    "F1 has the Wilson interval of the overlap of true and called images, carried over; averages of classes combine "
    "the intervals of the classes (MOVER, Zou and Donner 2008, with the asymmetry that a mean keeps); kappa and MCC "
    "have the Wilson interval of the share of errors, scaled to their variance.",
    "AUROC is DeLong's, in groups Obuchowski's (1997), with a score interval whose variance is combined with that of "
    "the binormal model and whose degrees of freedom are those of the rarer kind (Welch). Average precision, Brier "
    "score and the area under the risk-coverage curve have Wilson intervals at their linearised variance.",
)
"""How indices and intervals are computed, in every report."""

OF_PATIENTS = (
    "At patient level a patient is the mean of what was said of its images. Groups whose images carry several true "
    "classes have no one truth and are left out there, and counted."
)
OF_SUBGROUPS = (
    "Subgroups of a column are compared by a permutation test: subgroups are permuted among patients, and within a "
    "patient whose images lie in several; the statistic is a chi-square that allows for the images of a patient "
    "({permutations:,} permutations, seed {seed}). Holm's method corrects over the columns. Calibration in the large "
    "has an interval of residuals with whole groups drawn."
)
OF_LOOKS = (
    "A look at a test set is one stage of one run that predicted it, and each epoch that was validated on it. Test "
    "sets are told by the content of their images. Looks are counted from the runs that lie on the disk, so the number "
    "is a lower bound."
)

CALIBRATED = (
    "Probabilities are those that the bundle gives, calibrated by the temperature: by them go AUROC, average "
    "precision, comparisons, thresholds and worst mistakes. The files predictions-val.parquet and "
    "predictions-test.parquet hold logits and their softmax, before the temperature."
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
            burnt_in = () if result.run.setting("data.kind") == "synthetic" else (BURNT_IN,)
            items.append(Sentences((*burnt_in, maps.said)))
    if any(isinstance(item, Table) for item in items) and not evidence.options.thumbnails:
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
    """How the numbers were made that this report holds."""
    options = evidence.options
    results = evidence.results
    texts = list(METHODS)
    texts += [OF_PATIENTS] if any(result.patients is not None for result in results) else []
    texts += [OF_SUBGROUPS] if any(column.subgroups for result in results for column in columns_of(result)) else []
    values = {"resamples": options.resamples, "seed": options.seed, "permutations": PERMUTATIONS}
    sentences = [text.format(**values) for text in texts]
    sentences += _fitting_sentences([result for result in results if result.calibration is not None])
    sentences += [CALIBRATED] if any(result.calibration is not None for result in results) else []
    if results and all(read_shipped(result.run.bundle) is not None for result in results):
        sentences.append(FULL_PRECISION)
    sentences += describe_comparisons(evidence.comparisons)
    sentences += [OF_LOOKS] if evidence.looks else []
    return Section("methods", "How these numbers were made", (Sentences(tuple(sentences), listed=True),))


def _fitting_sentences(results: Sequence[Result]) -> list[str]:
    """On what temperature and thresholds were fitted, of results that have them."""
    several = any(result.operating for result in results)
    subject, verb = ("The temperature and the threshold", "are") if several else ("The temperature", "is")
    labels: dict[bool, list[str]] = {}
    for run in dict.fromkeys(result.run for result in results):
        labels.setdefault(is_validated_on_test(run), []).append(run.label)
    endings = {
        False: "fitted on validation images alone and applied untouched to the test images.",
        True: "fitted on the test images themselves, on which every epoch was validated (data.validation=test): what "
        "is reached there is optimistic.",
    }
    whose = {key: f" of {', '.join(names)}" if len(labels) > 1 else "" for key, names in labels.items()}
    return [f"{subject}{whose[key]} {verb} {ending}" for key, ending in endings.items() if key in whose]


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
