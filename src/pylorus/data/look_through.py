"""Audit the images of a run before training: write audit.json and log a one-line summary."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.data.audit.audit import audit, convert_audit_to_json
from pylorus.data.audit.duplicates import Copies
from pylorus.data.audit.image_set import ImageSet
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.catalog import Catalog
from pylorus.data.leaks import count_leaks
from pylorus.data.quarantine import count_unreadable
from pylorus.data.split import Split
from pylorus.files import write_json

log = logging.getLogger(__name__)

FILE = "audit.json"


def audit_run_images(catalog: Catalog, split: Split, copies: Copies, folder: Path) -> None:
    """Audit a run's images from the facts in the catalog, without opening files, and write audit.json.

    The file contains paths, as split.csv does; reports take only counts and sentences from it.
    """
    result = audit(list_catalog_files(catalog, split), catalog.facts, Thresholds(), copies=copies)
    accepted = {
        "accepted_leaks": count_leaks(split.leaks),
        "joined_groups": split.joined,
        "left_out": count_unreadable(catalog),
    }
    write_json(folder / FILE, convert_audit_to_json(result, names=True) | accepted)
    counts = [f"{count} {severity}{'s' if count > 1 else ''}" for severity, count in result.counts.items() if count]
    if counts:
        log.info("audit    %s; for details: pylorus audit %s", ", ".join(counts), catalog.root)
    else:
        log.info("audit    no findings")


def list_catalog_files(catalog: Catalog, split: Split) -> ImageSet:
    """Return all files of a catalog, including those that were left out, in the order of its facts."""
    columns = ["path", "class", "split", "group"]
    left_out = np.setdiff1d(np.arange(len(catalog.facts)), catalog.places)
    rows = split.table.assign(**{"class": np.array(catalog.classes, dtype=object)[split.table["label"]]})[columns]
    table = pd.concat([rows.set_axis(catalog.places), catalog.unreadable[columns].set_axis(left_out)]).sort_index()
    return ImageSet(catalog.root, table, grouped=catalog.grouped)
