"""Access to the stores as the configuration allows, and what happens if records do not fit."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pylorus.cache.store import Compute, DoesNotFitError, Records, RecordStore
from pylorus.config import CacheConfig
from pylorus.parallel.processes import ALONE, Processes

log = logging.getLogger(__name__)

GIB = 2**30


def load_or_compute_records(
    settings: CacheConfig,
    names: Sequence[str],
    compute: Compute,
    *,
    kind: str,
    key: Mapping[str, object],
    record_bytes: int,
    processes: Processes = ALONE,
) -> Records | None:
    """Load the records of `names`, computing and storing those that are missing.

    Args:
        settings: Where records are stored, and how much space they may take.
        names: One per record.
        compute: Computes missing records; see `pylorus.cache.store`.
        kind: "features" or "images": the subfolder for stores of this kind.
        key: Everything that the content of a record depends on besides its name.
        record_bytes: Size of one record in bytes.
        processes: The processes that request the same records at the same time; each computes its share of the
            missing ones.

    Returns:
        The records, or None if they fit neither on disk nor in memory, which is logged.
    """
    store = RecordStore(
        Path(settings.folder),
        kind=kind,
        key=key,
        record_bytes=record_bytes,
        budget_bytes=int(settings.budget_gib * GIB),
    )
    try:
        memory = int(settings.memory_gib * GIB) // processes.beside
        return store.load_or_compute(names, compute, memory_bytes=memory, processes=processes)
    except DoesNotFitError as error:
        log.warning("%s\nThe run continues without a cache: they are recomputed every time they are needed.", error)
        return None
