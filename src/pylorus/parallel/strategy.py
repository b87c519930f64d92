"""How Lightning is told of a run's processes."""

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


def spread(processes: Processes, trainer: TrainerConfig) -> dict[str, Any]:
    """The arguments of a Trainer that say who trains: gradients are averaged over all processes after each step."""
    if not processes.several:
        return {"devices": 1}
    said: dict[str, Any] = {"devices": processes.beside, "num_nodes": processes.count // processes.beside}
    if trainer.strategy == "fsdp":
        # Weights that were gathered in inference mode can't be trained with.
        return {
            **said,
            "strategy": ShardedStrategy(cluster_environment=TorchElasticEnvironment()),
            "inference_mode": False,
        }
    # Batch norm's statistics are the same in all processes already.
    ddp = DDPStrategy(
        cluster_environment=TorchElasticEnvironment(), broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return {**said, "strategy": ddp}


class ShardedStrategy(DDPStrategy):
    """Trains a network that `pylorus.model.sharded` divided.

    A checkpoint is that of one process: it holds whole weights and moments, so any number of devices goes on with it.
    """

    def configure_ddp(self) -> None:
        """Wraps nothing: blocks gather their weights, and share out their gradients, by themselves."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights in the first process; the others help to gather them."""
        assert self.lightning_module is not None
        return {name: self._whole(value) for name, value in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole moments in the first process."""
        return {name: self._whole(value) for name, value in super().optimizer_state(optimizer).items()}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Maps the file: each process reads its share of it."""
        loaded: dict[str, Any] = torch.load(
            Path(checkpoint_path), map_location="cpu", mmap=True, weights_only=weights_only is not False
        )
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this process's share of whole weights."""
        assert self.lightning_module is not None
        here = self.lightning_module.state_dict()
        taken = {name: _share(value, here.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(taken, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this process's share of whole moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            of_number = dict(zip(numbers, weights, strict=True))
            state = {
                number: {name: _share(value, of_number[number]) for name, value in of_weight.items()}
                for number, of_weight in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _whole(self, tree: Any) -> Any:
        """A state with each tensor whole, on the CPU; empty but in the first process, which writes it."""
        if isinstance(tree, DTensor):
            gathered = tree.full_tensor()
            return gathered.cpu() if self.is_global_zero else torch.empty(0)
        if isinstance(tree, dict):
            return {name: self._whole(inner) for name, inner in tree.items()}
        return tree


def _share(value: Any, like: Tensor | None) -> Any:
    """This process's part of a whole tensor, where `like` is divided; all else as it is. Nothing of it stays mapped."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value.clone()
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()
