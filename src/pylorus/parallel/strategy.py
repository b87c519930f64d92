"""Lightning strategies for a distributed run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from pylorus.config import TrainerConfig
from pylorus.parallel.processes import Processes


def build_strategy_arguments(processes: Processes, trainer: TrainerConfig) -> dict[str, Any]:
    """Return the Trainer arguments for the run's processes; gradients are averaged over all of them after each step."""
    if not processes.is_distributed:
        return {"devices": 1}
    arguments: dict[str, Any] = {"devices": processes.beside, "num_nodes": processes.count // processes.beside}
    if trainer.strategy == "fsdp":
        # Weights gathered in inference mode can't be trained.
        return {
            **arguments,
            "strategy": ShardedStrategy(cluster_environment=TorchElasticEnvironment()),
            "inference_mode": False,
        }
    # Batch-norm statistics are already equal in all processes.
    ddp = DDPStrategy(
        cluster_environment=TorchElasticEnvironment(), broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return {**arguments, "strategy": ddp}


class ShardedStrategy(DDPStrategy):
    """Train a network that `pylorus.model.sharded` has sharded.

    Checkpoints are those of a single process, with unsharded weights and moments: any number of devices can resume.
    """

    def configure_ddp(self) -> None:
        """Do nothing: blocks gather their weights and scatter their gradients themselves."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return unsharded weights in the first process; the others help gather them."""
        assert self.lightning_module is not None
        return {name: self._gather_tensors(value) for name, value in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return unsharded moments in the first process."""
        return {name: self._gather_tensors(value) for name, value in super().optimizer_state(optimizer).items()}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Memory-map the file: each process reads its shard only."""
        loaded: dict[str, Any] = torch.load(
            Path(checkpoint_path), map_location="cpu", mmap=True, weights_only=weights_only is not False
        )
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's shard of the weights."""
        assert self.lightning_module is not None
        own_state = self.lightning_module.state_dict()
        shards = {name: _extract_shard(value, own_state.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(shards, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shard of the moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            indices = [index for group in saved["param_groups"] for index in group["params"]]
            weight_of_index = dict(zip(indices, parameters, strict=True))
            state = {
                index: {name: _extract_shard(value, weight_of_index[index]) for name, value in moments.items()}
                for index, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _gather_tensors(self, tree: Any) -> Any:
        """Gather a state's tensors on the CPU in the first process, which writes them; empty in the others."""
        if isinstance(tree, DTensor):
            gathered = tree.full_tensor()
            return gathered.cpu() if self.is_global_zero else torch.empty(0)
        if isinstance(tree, dict):
            return {name: self._gather_tensors(value) for name, value in tree.items()}
        return tree


def _extract_shard(value: Any, like: Tensor | None) -> Any:
    """Return this process's shard of a tensor if `like` is sharded, else a copy; nothing stays memory-mapped."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value.clone()
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()
