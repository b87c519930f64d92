"""What the network is needed for: nothing, once Pylorus and its weights are here."""

import os
from collections.abc import Iterator, Mapping

from pylorus.doctor.check import Check, State

AREA = "Network"

ASKED_FOR = "model.weights=hub for weights that are not here yet, shards at a URL, logger.offline=false"
"""What goes over the network, each only where the user says so."""


def check_network(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """States it; nothing is tried, so that the doctor makes no connection itself."""
    found = (
        "not needed: training, report and all other commands work without it, and nothing was connected to for this. "
        f"Used only where you ask for it: {ASKED_FOR}. docs/offline.md says how to come to a machine without one"
    )
    yield Check(AREA, "network", State.GOOD, found)
    if environment.get("WANDB_MODE") == "online":
        mend = "unset WANDB_MODE"
        yield Check(AREA, "WANDB_MODE", State.WARNING, "online: Weights & Biases may send what it is given", mend)
