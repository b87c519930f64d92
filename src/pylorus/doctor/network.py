"""State what the network is needed for: nothing, once Pylorus and its weights are on this machine."""

import os
from collections.abc import Iterator, Mapping

from pylorus.doctor.check import Check, State

NETWORK = "Network"

ASKED_FOR = "model.weights=hub for weights that are not on this machine yet, shards at a URL, logger.offline=false"
"""What uses the network, each only if the user asks for it."""


def check_network(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """State when the network is used; nothing is tested, so that the doctor itself makes no connection."""
    summary = (
        "not needed: training, report and all other commands work offline; this check made no connection either. "
        f"Used only if you ask for it: {ASKED_FOR}. To install on a machine without a network, see docs/offline.md"
    )
    yield Check(NETWORK, "network", State.GOOD, summary)
    if environment.get("WANDB_MODE") == "online":
        fix = "unset WANDB_MODE"
        yield Check(
            NETWORK,
            "WANDB_MODE",
            State.WARNING,
            "online: Weights & Biases may send metrics of your runs to its servers",
            fix,
        )
