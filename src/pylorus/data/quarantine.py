"""Files that were left out because they give no image: listed in the run's folder, told, and never silently dropped."""

import logging
from collections import Counter
from pathlib import Path

from pylorus.data.catalog import Catalog
from pylorus.data.unreadable import shown
from pylorus.errors import listing
from pylorus.files import whole

log = logging.getLogger(__name__)

FILE = "quarantine.csv"
COLUMNS = ["path", "class", "group", "split", "reason"]
FIRST = 5
"""Files that the terminal names."""


def write_quarantine(catalog: Catalog, folder: Path) -> None:
    """Writes quarantine.csv where files were left out; `split` says what folders or a manifest gave."""
    if catalog.unreadable.empty:
        return
    with whole(folder / FILE) as temporary:
        # Names on one line, in letters that every table program takes.
        named = catalog.unreadable.assign(path=[shown(Path(path)) for path in catalog.unreadable["path"]])
        named[COLUMNS].to_csv(temporary, index=False, lineterminator="\n")


def tell_unreadable(catalog: Catalog) -> None:
    """Warns of files that were left out, the first by name."""
    if catalog.unreadable.empty:
        return
    names = [
        f"{shown(Path(path))}: {reason}"
        for path, reason in zip(catalog.unreadable["path"], catalog.unreadable["reason"], strict=True)
    ]
    log.warning(
        "left out  %d of %d files can't be read and are not used (data.on_error=quarantine); %s lists them all:\n%s",
        len(names),
        len(catalog.facts),
        FILE,
        listing(names, most=FIRST),
    )


def counts_of(catalog: Catalog) -> list[dict[str, object]]:
    """How many files of each class and given split were left out; no names."""
    counts = Counter(zip(catalog.unreadable["class"], catalog.unreadable["split"], strict=True))
    return [
        {"class": str(name), "split": str(part) or "not given", "files": count}
        for (name, part), count in sorted(counts.items())
    ]
