"""Sections that document a report: worst mistakes, data, audit, configuration, checklist and methods."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pylorus.core.formatting import format_count
from pylorus.core.io import read_json
from pylorus.core.privacy import format_redacted_yaml
from pylorus.evaluation.populations import PERMUTATIONS
from pylorus.report.captions import count_accepted_leaks, count_excluded_files, is_validated_on_test
from pylorus.report.checklists import build_checklist_table
from pylorus.report.evidence import Evidence
from pylorus.report.mistakes import (
    Item,
    Listing,
    Section,
    Sentences,
    build_augmentation_pictures,
    build_mistake_pictures,
    build_mistake_table,
    build_prediction_pictures,
    find_worst_mistakes,
    read_saved_maps,
)
from pylorus.report.participants import build_characteristic_table
from pylorus.report.result_tables import explain_comparisons
from pylorus.report.results import Result
from pylorus.report.run_tables import (
    build_run_table,
    build_setting_table,
    build_split_table,
    format_command_lines,
    format_split_sentences,
)
from pylorus.report.subgroup_columns import get_subgroup_columns
from pylorus.report.table import Column, Row, Table, create_text_columns
from pylorus.runs.folder import read_shipped
from pylorus.runs.reading import SavedRun

STRESS_FOLDER, STRESS_RECORD = "stress", "stress.json"
"""The folder of a stress test in a run or a validation, and its record."""
SUMS = "SHA256SUMS"
"""A bundle's list of file hashes, and the key of a record that holds the SHA-256 of that list."""

METHODS = (
    "This report was computed from the predictions, training curves and records that the runs saved.",
    "An index that divides zero by zero is undefined: it is shown as a dash, is never taken as 0 or 1, and makes every "
    "average over classes undefined. The reason is given below its table.",
    "Precision, sensitivity, specificity, NPV and accuracy have Wilson intervals. If groups have several images, the "
    "interval is based on the effective number of images: the variance is the larger of the between-group variance and "
    "that given by the intraclass correlation (analysis of variance), with Student's t at Satterthwaite's degrees of "
    "freedom. If no image is misclassified, the images of a group count as copies of one another.",
    "F1 has the transformed Wilson interval of the overlap of true and predicted images; averages over classes combine "
    "the intervals of the classes (MOVER, Zou and Donner 2008, preserving the asymmetry of a mean); kappa and MCC have "
    "the Wilson interval of the error rate, scaled to their variance.",
    "AUROC follows DeLong or, with several images per group, Obuchowski (1997); its score interval combines the "
    "variance with that of the binormal model and uses the degrees of freedom of the rarer outcome (Welch). Average "
    "precision, Brier score and the area under the risk-coverage curve have Wilson intervals with linearised variance.",
)
"""How indices and intervals are computed; part of every report."""

PATIENT_METHODS = (
    "At patient level, the probabilities of a patient are the mean of those of the patient's images. Groups whose "
    "images have several true classes have no single reference diagnosis; they are excluded at patient level, and "
    "counted."
)
SUBGROUP_METHODS = (
    "Subgroups of a column are compared by a permutation test: subgroups are permuted among patients, and within "
    "patients whose images belong to several subgroups; the statistic is a chi-square that allows for the clustering "
    "of images within patients ({permutations:,} permutations, seed {seed}). Holm's method corrects for the number of "
    "columns. The interval of calibration-in-the-large uses the variance of the residuals clustered by group."
)
EVALUATION_METHODS = (
    "A test set counts as evaluated once for each stage of a run that predicted it, and once for each epoch that was "
    "validated on it. Test sets are identified by the content of their images. Evaluations are counted from the runs "
    "on disk, so their number is a lower bound."
)

CALIBRATION_NOTE = (
    "AUROC, average precision, comparisons, thresholds and worst mistakes are based on the probabilities of the "
    "bundle, calibrated by temperature scaling. The files predictions-val.parquet and predictions-test.parquet "
    "contain the logits and their softmax before temperature scaling."
)
PRECISION_NOTE = (
    "Validation and test images were predicted in 32-bit precision by the code that runs the bundle, whatever the "
    "precision of training: `pylorus predict RUN/model --evaluate` gives the same results."
)
BURNED_IN_TEXT = (
    "Thumbnails show any text that was burnt into the frames, which may include names: check them before you pass this "
    "page on."
)

KINDS = {
    "patient": ("patient", "patients"),
    "file": ("file", "files"),
    "pixels": ("pair of images with identical pixels", "pairs of images with identical pixels"),
    "near": ("near copy", "near copies"),
}
"""Kinds of leaks between splits in audit.json, with singular and plural."""


def build_mistake_section(evidence: Evidence) -> Section:
    """Build the section of the most confident mistakes of the selected model on each test set.

    The network is the one that its run ships.
    """
    items: list[Item] = []
    for number, winner in enumerate(evidence.winners, start=1):
        result, peers = winner.headline_result or winner.best[0], winner.comparable_results.candidates
        mistakes = find_worst_mistakes(result, peers)
        if not mistakes:
            items.append(Sentences((f"{result.label} classifies all {result.test.images} test images correctly.",)))
            continue
        items.append(
            build_mistake_table(result, mistakes, peers=len(peers), names=evidence.options.names, number=number)
        )
        if evidence.options.thumbnails:
            maps = read_saved_maps(result.run, stage=result.stage.name)
            items.append(build_mistake_pictures(result.run, mistakes, maps.overlays))
            burnt_in = () if result.run.get_setting("data.kind") == "synthetic" else (BURNED_IN_TEXT,)
            items.append(Sentences((*burnt_in, maps.message)))
    if any(isinstance(item, Table) for item in items) and not evidence.options.thumbnails:
        items.append(
            Sentences(("With --thumbnails, the report includes these images, which are then passed on with it.",))
        )
    return Section("mistakes", "Worst mistakes", tuple(items))


def build_picture_section(evidence: Evidence) -> Section:
    """Build the section of images that a report may show: a sample of predictions, and augmented training images."""
    items: list[Item] = []
    for winner in evidence.winners if evidence.options.thumbnails else ():
        result = winner.headline_result or winner.best[0]
        items.append(Sentences((f"A random sample of the test images, with the answer of {result.label}.",)))
        items.append(build_prediction_pictures(result))
        augmented = build_augmentation_pictures(result.run, stage=result.stage.name)
        if augmented is not None:
            text = f"A training image of each class as {result.label} gets it: unchanged, then augmented variants."
            items += [Sentences((text,)), augmented]
    return Section("pictures", "Predictions and augmented images", tuple(items))


def build_data_section(evidence: Evidence) -> Section:
    """Build the section of the runs, with each split shown once."""
    items: list[Item] = [
        build_run_table(evidence.runs),
        Listing("Command lines", format_command_lines(evidence.runs, names=evidence.options.names)),
    ]
    splits: dict[str, SavedRun] = {}
    for run in evidence.runs:
        if run.split is not None:
            splits.setdefault(run.split.sha256, run)
    for digest, run in splits.items():
        items += [
            build_split_table(run),
            Sentences((f"SHA-256 of split.csv: {digest}.", *format_split_sentences(run))),
        ]
        characteristics = build_characteristic_table(run)
        items += [characteristics] if characteristics is not None else []
    settings = build_setting_table(evidence.runs)
    items += [settings] if settings is not None else []
    return Section("data", "Runs, data and split", tuple(items))


def build_configuration_section(evidence: Evidence) -> Section:
    """Build the section of each run's configuration, with each environment shown once."""
    items: list[Item] = []
    environments: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for run in evidence.runs:
        if run.environment:
            environments.setdefault(str(run.environment), (run.environment, []))[1].append(run.label)
    for number, (environment, labels) in enumerate(environments.values(), start=1):
        items.append(_build_environment_table(environment, labels, number=number))
    items += [
        Listing(f"{run.label}: config.yaml", format_redacted_yaml(run.config, names=evidence.options.names))
        for run in evidence.runs
        if run.config
    ]
    return Section("configuration", "Configuration and environment", tuple(items))


def build_checklist_section(evidence: Evidence) -> Section:
    """Build the section with the draft of the reporting checklists."""
    return Section("checklist", "Draft of the reporting checklists", (build_checklist_table(evidence),))


def build_method_section(evidence: Evidence) -> Section:
    """Build the section that describes how the results were computed."""
    options = evidence.options
    results = evidence.results
    texts = list(METHODS)
    texts += [PATIENT_METHODS] if any(result.patients is not None for result in results) else []
    texts += (
        [SUBGROUP_METHODS]
        if any(column.subgroups for result in results for column in get_subgroup_columns(result))
        else []
    )
    values = {"resamples": options.resamples, "seed": options.seed, "permutations": PERMUTATIONS}
    sentences = [text.format(**values) for text in texts]
    sentences += _format_fitting_sentences([result for result in results if result.calibration is not None])
    sentences += [CALIBRATION_NOTE] if any(result.calibration is not None for result in results) else []
    if results and all(read_shipped(result.run.bundle) is not None for result in results):
        sentences.append(PRECISION_NOTE)
    sentences += explain_comparisons(evidence.comparisons)
    sentences += [EVALUATION_METHODS] if evidence.evaluation_counts else []
    return Section("methods", "Statistical methods", (Sentences(tuple(sentences), is_list=True),))


def _format_fitting_sentences(results: Sequence[Result]) -> list[str]:
    """State on which images temperature and thresholds were fitted."""
    has_thresholds = any(result.operating for result in results)
    subject, verb = ("The temperature and the threshold", "were") if has_thresholds else ("The temperature", "was")
    labels: dict[bool, list[str]] = {}
    for run in dict.fromkeys(result.run for result in results):
        labels.setdefault(is_validated_on_test(run), []).append(run.label)
    endings = {
        False: "fitted on the validation images only and applied unchanged to the test images.",
        True: "fitted on the test images themselves, on which every epoch was validated (data.validation=test): their "
        "performance there is optimistic.",
    }
    owners = {key: f" of {', '.join(names)}" if len(labels) > 1 else "" for key, names in labels.items()}
    return [f"{subject}{owners[key]} {verb} {ending}" for key, ending in endings.items() if key in owners]


def _build_environment_table(environment: Mapping[str, Any], labels: list[str], *, number: int) -> Table:
    packages = environment.get("packages", {})
    rows = [(str(name), _format_value(value)) for name, value in environment.items() if name != "packages"]
    rows += [(str(name), str(version)) for name, version in packages.items()]
    return Table(
        key="environment" + (f"-{number}" if number > 1 else ""),
        title=f"Machine and versions ({', '.join(labels)})",
        basis="",
        columns=create_text_columns("what", "found"),
        rows=tuple(Row(row) for row in rows),
    )


def _format_value(value: Any) -> str:
    return "none" if value is None else str(value)


def build_audit_section(evidence: Evidence) -> Section:
    """Build the audit section, with each split shown once: accepted leaks, excluded files and findings."""
    audited: dict[str, SavedRun] = {}
    for run in evidence.runs:
        if run.audit:
            audited.setdefault(run.split.sha256 if run.split is not None else run.label, run)
    items: list[Item] = []
    for number, run in enumerate(audited.values(), start=1):
        items.append(Sentences(format_audit_sentences(run)))
        if run.audit.get("left_out"):
            items.append(build_excluded_files_table(run, number=number))
        if run.audit.get("findings"):
            items.append(build_finding_table(run, number=number))
    return Section("audit", "Data audit", tuple(items))


def format_audit_sentences(run: SavedRun) -> tuple[str, ...]:
    """State what was checked, which leaks were accepted and which files were excluded."""
    excluded = count_excluded_files(run)
    files = "every readable file" if excluded else "every file"
    sentences = [
        f"{run.label}: {files} was checked before training; audit.json in the folder of the run names the files of "
        "each finding."
    ]
    leaks = count_accepted_leaks(run)
    if leaks:
        counts = ", ".join(f"{count} {KINDS[kind][count > 1]}" for kind, count in leaks.items() if kind in KINDS)
        sentences.append(
            f"LEAKS ACCEPTED (data.accept_leaks=true): in more than one split (train, val, test): {counts}."
        )
    else:
        sentences.append("No copies or near copies of an image were found in more than one split (train, val, test).")
    if excluded:
        verb = "was" if excluded == 1 else "were"
        sentences.append(
            f"{format_count(excluded, 'file')} could not be read and {verb} excluded (data.on_error=quarantine)."
        )
    for name, count in run.audit.get("excluded", {}).items():
        sentences.append(
            f'The {format_count(count, "image")} of class "{name}" were left out on purpose (data.exclude).'
        )
    if not run.audit.get("findings"):
        sentences.append("The audit found nothing else.")
    return tuple(sentences)


def build_excluded_files_table(run: SavedRun, *, number: int) -> Table:
    """Build the table of excluded files by class and split."""
    return Table(
        key="left-out" if number == 1 else f"left-out-{number}",
        title=f"{run.label}: files excluded because they could not be read",
        basis="By the split that came with the images, before any random split.",
        columns=(*create_text_columns("class", "part"), Column("files")),
        rows=tuple(Row((row["class"], row["split"], int(row["files"]))) for row in run.audit["left_out"]),
    )


def build_finding_table(run: SavedRun, *, number: int) -> Table:
    """Build the table of findings, the most severe first."""
    return Table(
        key="audit" if number == 1 else f"audit-{number}",
        title=f"{run.label}: findings of the data audit",
        basis="A case is one file or several files that belong together; findings on the whole data set have none.",
        columns=(*create_text_columns("severity", "finding", "what"), Column("cases")),
        rows=tuple(
            Row((each["severity"], each["code"], each["sentence"], len(each["items"])))
            for each in run.audit["findings"]
        ),
    )


def read_stress_record(folder: Path, identity: str) -> Mapping[str, Any] | None:
    """Read what `pylorus stress` found; None if there is nothing, or it is of another bundle.

    Args:
        folder: Folder of the stress test.
        identity: SHA-256 of the bundle's list of file hashes.
    """
    record: Any = read_json(folder / STRESS_RECORD)
    return record if isinstance(record, dict) and record.get(SUMS) == identity else None


def find_stress_records(runs: Sequence[SavedRun]) -> dict[str, Mapping[str, Any]]:
    """Return what `pylorus stress` found with the runs' own bundles, by the run and folder."""
    records = {}
    for run in runs:
        sums = run.folder / "model" / SUMS
        if sums.is_file():
            identity = hashlib.sha256(sums.read_bytes()).hexdigest()
            record = read_stress_record(run.folder / STRESS_FOLDER, identity)
            if record is not None:
                records[f"{run.label}, {STRESS_FOLDER}/ in the run"] = record
    return records


def present_stress_records(records: Mapping[str, Mapping[str, Any]]) -> Section:
    """Build the section of what stress tests found, in the short report if that is a shortcut.

    Args:
        records: Their records, by where their figures and tables are.
    """
    sentences: list[str] = []
    for place, record in records.items():
        sentences.append(f"{format_count(int(record['images']), 'image')}, {record['source']} ({place}).")
        sentences += map(str, record["findings"])
    items = (Sentences(tuple(sentences)),) if sentences else ()
    has_shortcut = any(record.get("shortcuts") for record in records.values())
    return Section("stress", "Degraded images and shortcuts", items, is_appendix=not has_shortcut)


def build_stress_section(evidence: Evidence) -> Section:
    """Build the section of what `pylorus stress` found with the bundles of the runs."""
    return present_stress_records(find_stress_records(evidence.runs))
