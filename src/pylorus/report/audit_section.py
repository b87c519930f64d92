"""The data audit in short: what a run found of its own images, by count; names stay in the run's folder."""

from pylorus.report.evidence import Evidence
from pylorus.report.marks import accepted_leaks
from pylorus.report.run_facts import count_of, files_left_out
from pylorus.report.saved_run import SavedRun
from pylorus.report.section import Item, Section, Sentences
from pylorus.report.table import Column, Row, Table, text_columns

KINDS = {
    "patient": ("patient", "patients"),
    "file": ("file", "files"),
    "pixels": ("pair of the same pixels", "pairs of the same pixels"),
    "near": ("near copy", "near copies"),
}
"""What may lie in two parts of a split, as audit.json calls it: one of it, and several."""


def audit_section(evidence: Evidence) -> Section:
    """Each audited split once: accepted leaks, files left out, findings."""
    audited: dict[str, SavedRun] = {}
    for run in evidence.runs:
        if run.audit:
            audited.setdefault(run.split.sha256 if run.split is not None else run.label, run)
    items: list[Item] = []
    for number, run in enumerate(audited.values(), start=1):
        items.append(Sentences(audit_sentences(run)))
        if run.audit.get("left_out"):
            items.append(left_out_table(run, number=number))
        if run.audit.get("findings"):
            items.append(finding_table(run, number=number))
    return Section("audit", "Data audit", tuple(items))


def audit_sentences(run: SavedRun) -> tuple[str, ...]:
    """What was looked at, what leaks and was accepted, what was left out."""
    left_out = files_left_out(run)
    looked = f"{'every file' if not left_out else 'every file that could be read'} was looked at before training"
    said = [f"{run.label}: {looked}; audit.json in the run's folder names the files of each finding."]
    leaks = accepted_leaks(run)
    if leaks:
        what = ", ".join(f"{count} {KINDS[kind][count > 1]}" for kind, count in leaks.items() if kind in KINDS)
        said.append(f"LEAKS ACCEPTED (data.accept_leaks=true): in two parts of the split lie {what}.")
    else:
        said.append("No copy and no near copy of an image was found in two parts of the split.")
    if left_out:
        verb = "was" if left_out == 1 else "were"
        said.append(f"{count_of(left_out, 'file')} could not be read and {verb} left out (data.on_error=quarantine).")
    if not run.audit.get("findings"):
        said.append("The audit found nothing else.")
    return tuple(said)


def left_out_table(run: SavedRun, *, number: int) -> Table:
    """How many files of each class and part were left out."""
    return Table(
        key="left-out" if number == 1 else f"left-out-{number}",
        title=f"{run.label}: files left out since they can't be read",
        basis="By the part that came with the images, before any was cut.",
        columns=(*text_columns("class", "part"), Column("files")),
        rows=tuple(Row((row["class"], row["split"], int(row["files"]))) for row in run.audit["left_out"]),
    )


def finding_table(run: SavedRun, *, number: int) -> Table:
    """What the audit found, the gravest first."""
    return Table(
        key="audit" if number == 1 else f"audit-{number}",
        title=f"{run.label}: what the audit found",
        basis="A case is a file, or files that belong together; a finding about the whole set has none.",
        columns=(*text_columns("severity", "finding", "what"), Column("cases")),
        rows=tuple(
            Row((each["severity"], each["code"], each["sentence"], len(each["items"])))
            for each in run.audit["findings"]
        ),
    )
