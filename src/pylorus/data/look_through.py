"""What a run finds of its own images before it trains: written to audit.json, told in one line."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.data.audit.audit import as_json, audit
from pylorus.data.audit.duplicates import Copies
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.catalog import Catalog
from pylorus.data.leaks import counted
from pylorus.data.quarantine import counts_of
from pylorus.data.split import Split
from pylorus.files import write_json

log = logging.getLogger(__name__)

FILE = "audit.json"


def look_through(catalog: Catalog, split: Split, copies: Copies, folder: Path) -> None:
    """Audits a run's images from what the catalog knows of them, opening none; writes audit.json.

    It holds paths, as split.csv beside it does: reports take only counts and sentences from it.
    """
    found = audit(every_file(catalog, split), catalog.facts, Thresholds(), copies=copies)
    accepted = {
        "accepted_leaks": counted(split.leaks),
        "joined_groups": split.joined,
        "left_out": counts_of(catalog),
    }
    write_json(folder / FILE, as_json(found, names=True) | accepted)
    said = [f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in found.counts.items() if count]
    if said:
        log.info("audit    %s; pylorus audit %s shows them", ", ".join(said), catalog.root)
    else:
        log.info("audit    nothing found")


def every_file(catalog: Catalog, split: Split) -> ImageSet:
    """The files of a catalog, those that were left out too, in the order of its facts."""
    columns = ["path", "class", "split", "group"]
    left_out = np.setdiff1d(np.arange(len(catalog.facts)), catalog.places)
    rows = split.table.assign(**{"class": np.array(catalog.classes, dtype=object)[split.table["label"]]})[columns]
    table = pd.concat([rows.set_axis(catalog.places), catalog.unreadable[columns].set_axis(left_out)]).sort_index()
    return ImageSet(catalog.root, table, grouped=catalog.grouped)
