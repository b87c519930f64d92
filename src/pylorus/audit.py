"""`pylorus audit`: looks at an image set, writes audit.json and audit.html, and says on the terminal what it found."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pylorus.data.audit.audit import Audit, as_json, audit
from pylorus.data.audit.field_findings import look_for_fields
from pylorus.data.audit.image_set import find_files, listed_files
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.facts import facts_of
from pylorus.files import write_json, write_text
from pylorus.report.audit_page import audit_page

COLOURS = {"leak": "bold red", "error": "red", "warning": "yellow", "note": "default"}


def audit_folder(
    root: Path, output: Path, *, manifest: Path | None, group: str | None, names: bool, cache: Path
) -> int:
    """Audits an image set.

    Args:
        root: Its folder.
        output: Folder for audit.json and audit.html.
        manifest: Table of the files; None: class folders.
        group: Regular expression that finds the patient in a path.
        names: Whether files are named and shown.
        cache: Folder in which what is known of files is kept by content, as runs do.

    Returns:
        1 where there is a leak or an error, else 0.

    Raises:
        PylorusError: If there is no image set.
    """
    images = find_files(root, group=group) if manifest is None else listed_files(manifest, root, group=group)
    facts = facts_of(root, list(images.table["path"]), store=cache / "facts")
    found = audit(images, facts, Thresholds(), fields=look_for_fields(images, facts))
    write_json(output / "audit.json", as_json(found, names=names))
    write_text(output / "audit.html", audit_page(found, names=names))
    _tell(found, output)
    return found.exit_code


def _tell(found: Audit, output: Path) -> None:
    console = Console()
    console.print(f"{len(found.samples):,} files, {found.readable:,} of them images", highlight=False)
    if found.findings:
        table = Table(show_edge=False, pad_edge=False)
        for title in ("", "found", "what to do"):
            table.add_column(title, overflow="fold")
        for finding in found.findings:
            table.add_row(
                f"[{COLOURS[finding.severity]}]{finding.severity}[/]", finding.sentence, finding.mend, end_section=True
            )
        console.print(table)
    else:
        console.print("nothing found")
    console.print(f"\n{output / 'audit.html'}\n{output / 'audit.json'}", highlight=False, soft_wrap=True)
