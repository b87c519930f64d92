"""Data audit section of a report: the findings on the images of a run as counts, without file names."""

from pylorus.report.evidence import Evidence
from pylorus.report.marks import count_accepted_leaks
from pylorus.report.run_facts import count_excluded_files, format_count
from pylorus.report.saved_run import SavedRun
from pylorus.report.section import Item, Section, Sentences
from pylorus.report.table import Column, Row, Table, create_text_columns

KINDS = {
    "patient": ("patient", "patients"),
    "file": ("file", "files"),
    "pixels": ("pair of images with identical pixels", "pairs of images with identical pixels"),
    "near": ("near copy", "near copies"),
}
"""Kinds of leaks between splits in audit.json, with singular and plural."""


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
