"""How Lightning is told of a run's processes."""

from typing import Any

from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from pylorus.parallel.processes import Processes


def spread(processes: Processes) -> dict[str, Any]:
    """The arguments of a Trainer that say who trains: gradients are averaged over all processes after each step."""
    if not processes.several:
        return {"devices": 1}
    return {
        "devices": processes.beside,
        "num_nodes": processes.count // processes.beside,
        # Batch norm's statistics are the same in all processes already.
        "strategy": DDPStrategy(cluster_environment=TorchElasticEnvironment(), broadcast_buffers=False),
    }
