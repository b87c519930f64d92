"""Report files that were left out because they can't be read: none is dropped silently."""

import logging
from collections import Counter
from pathlib import Path

from pylorus.data.catalog import Catalog
from pylorus.data.unreadable import format_path
from pylorus.errors import format_name_list
from pylorus.files import write_atomically

log = logging.getLogger(__name__)

FILE = "quarantine.csv"
COLUMNS = ["path", "class", "group", "split", "reason"]
FIRST = 5
"""Number of files named on the terminal."""


def write_quarantine(catalog: Catalog, folder: Path) -> None:
    """Write quarantine.csv if files were left out; its column split is the one that folders or a manifest define."""
    if catalog.unreadable.empty:
        return
    with write_atomically(folder / FILE) as temporary:
        # Escape line breaks and control characters, which not every spreadsheet program can read.
        table = catalog.unreadable.assign(path=[format_path(Path(path)) for path in catalog.unreadable["path"]])
        table[COLUMNS].to_csv(temporary, index=False, lineterminator="\n")


def log_unreadable(catalog: Catalog) -> None:
    """Log a warning about files that were left out, and name the first of them."""
    if catalog.unreadable.empty:
        return
    names = [
        f"{format_path(Path(path))}: {reason}"
        for path, reason in zip(catalog.unreadable["path"], catalog.unreadable["reason"], strict=True)
    ]
    log.warning(
        "left out  %d of %d files can't be read and %s not used (data.on_error=quarantine); %s lists all:\n%s",
        len(names),
        len(catalog.facts),
        "is" if len(names) == 1 else "are",
        FILE,
        format_name_list(names, most=FIRST),
    )


def count_unreadable(catalog: Catalog) -> list[dict[str, object]]:
    """Count the files that were left out, by class and given split; the result contains no file names."""
    counts = Counter(zip(catalog.unreadable["class"], catalog.unreadable["split"], strict=True))
    return [
        {"class": str(name), "split": str(part) or "not given", "files": count}
        for (name, part), count in sorted(counts.items())
    ]
