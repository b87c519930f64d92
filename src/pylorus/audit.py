"""`pylorus audit`: check an image set, write audit.json and audit.html, and print the findings."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pylorus.data.audit.audit import Audit, audit, convert_audit_to_json
from pylorus.data.audit.field_findings import sample_fields
from pylorus.data.audit.image_set import list_folder_files, list_manifest_files
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import load_or_compute_facts
from pylorus.files import write_json, write_text
from pylorus.report.audit_page import render_audit_page

COLOURS = {"leak": "bold red", "error": "red", "warning": "yellow", "note": "default"}


def audit_folder(
    root: Path, output: Path, *, manifest: Path | None, group: str | None, names: bool, cache: Path
) -> int:
    """Audit an image set and write the result.

    Args:
        root: Folder of the image set.
        output: Folder for audit.json and audit.html.
        manifest: CSV or Parquet file that lists the images; None for class folders.
        group: Regular expression that finds the patient in a path; None for no groups.
        names: Whether to show file names and pictures.
        cache: Folder that caches facts about files by content; runs use the same cache.

    Returns:
        The exit code: 1 if there is a leak or an error, else 0.

    Raises:
        PylorusError: If the folder or manifest holds no image set.
    """
    images = (
        list_folder_files(root, group=group) if manifest is None else list_manifest_files(manifest, root, group=group)
    )
    facts = load_or_compute_facts(root, list(images.table["path"]), store=cache / "facts")
    result = audit(images, facts, Thresholds(), fields=sample_fields(images, facts))
    write_json(output / "audit.json", convert_audit_to_json(result, names=names))
    write_text(output / "audit.html", render_audit_page(result, names=names))
    _print_findings(result, output)
    return result.exit_code


def _print_findings(result: Audit, output: Path) -> None:
    console = Console()
    count = len(result.samples)
    console.print(
        f"{count:,} file{'' if count == 1 else 's'}, of which {result.readable:,} can be read as images",
        highlight=False,
    )
    if result.findings:
        table = Table(show_edge=False, pad_edge=False)
        for title in ("", "finding", "what to do"):
            table.add_column(title, overflow="fold")
        for finding in result.findings:
            table.add_row(
                f"[{COLOURS[finding.severity]}]{finding.severity}[/]", finding.sentence, finding.mend, end_section=True
            )
        console.print(table)
    else:
        console.print("no problems found")
    console.print(f"\n{output / 'audit.html'}\n{output / 'audit.json'}", highlight=False, soft_wrap=True)
