"""The one way to the stores: what the configuration allows, and what happens where records do not fit."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pylorus.cache.store import Compute, DoesNotFitError, Records, RecordStore
from pylorus.config import CacheConfig
from pylorus.parallel.processes import ALONE, Processes

log = logging.getLogger(__name__)

GIB = 2**30


def kept_records(
    settings: CacheConfig,
    names: Sequence[str],
    compute: Compute,
    *,
    kind: str,
    key: Mapping[str, object],
    record_bytes: int,
    processes: Processes = ALONE,
) -> Records | None:
    """The records of `names`, found or computed and kept; None where they have no room, which is logged.

    Args:
        settings: Where and how much may be kept.
        names: One a record.
        compute: Computes missing records; see `pylorus.cache.store`.
        kind: "features" or "images": the folder of such stores.
        key: All that a record's content depends on besides its name.
        record_bytes: Bytes of one record.
        processes: Who asks for the same records at the same time: each computes its share of what is missing.
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
        return store.records(names, compute, memory_bytes=memory, processes=processes)
    except DoesNotFitError as error:
        log.warning("%s\nThe run goes on without: they are computed anew each time.", error)
        return None
