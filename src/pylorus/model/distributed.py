"""Shard the trainable part among several processes (FSDP): each holds its shard of weights, gradients and moments.

A block's weights are gathered for its computation and freed afterwards. Frozen weights, which have neither gradients
nor moments, are complete in each process. The numbers are those of an unsharded network.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from pylorus.core.distributed import Processes
from pylorus.model.backbone import restore_modes
from pylorus.model.classifier import StageClassifier
from pylorus.model.frozen_prefix import CutNetwork

MIN_BLOCK_FRACTION = 0.01
"""Fraction of all trainable weights that a block must hold to be gathered on its own."""


class ShardedCutNetwork(CutNetwork):
    """A split network that gathers the weights that no block gathers on its own before it runs its suffix."""

    def run_suffix(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits as the unsharded network does."""
        logits: Tensor = self.network.logits_of_features(features)  # type: ignore[operator]
        return logits


@contextmanager
def use_sharded_network(classifier: StageClassifier, accelerator: str, *, image_size: int) -> Iterator[tuple[int, int]]:
    """Shard the classifier's trainable weights; yield how many of them this process holds, and of how many.

    All processes must call this together. On exit the classifier holds its unsharded network as it was before: trained
    weights are in the checkpoints.

    Args:
        classifier: Its network's `requires_grad` flags say what is trained.
        accelerator: cpu or cuda, the device of each process's shard.
        image_size: Side of the network's input in pixels.
    """
    network, cut = classifier.network, classifier.cut
    device = next(network.parameters()).device
    pixels = classifier.normalize_images(torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8, device=device))
    called_modules = find_called_modules(
        network, lambda: network(pixels) if cut is None else cut.run_suffix(cut.run_prefix(pixels))
    )
    network.cpu()
    frozen = {parameter for parameter in network.parameters() if not parameter.requires_grad}
    called_names = [name for name, module in network.named_modules() if module in called_modules]
    sharded_network = copy.deepcopy(network, {id(parameter): parameter for parameter in frozen})
    mesh = init_device_mesh(accelerator, (torch.distributed.get_world_size(),))
    apply_sharding(sharded_network, {sharded_network.get_submodule(name) for name in called_names}, frozen, mesh)
    classifier.network = sharded_network
    if cut is not None:
        classifier.cut = _build_sharded_cut(cut, sharded_network)
    sharded_parameters = [parameter for parameter in sharded_network.parameters() if isinstance(parameter, DTensor)]
    try:
        yield sum(p.to_local().numel() for p in sharded_parameters), sum(p.numel() for p in sharded_parameters)
    finally:
        classifier.network, classifier.cut = network.to(memory_format=classifier.memory_format), cut


def find_called_modules(network: nn.Module, run_network: Callable[[], object]) -> set[nn.Module]:
    """Return the modules called while `run_network` runs in evaluation mode: not a list of blocks, but its blocks."""
    called_modules: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called_modules.add(module)) for module in network.modules()
    ]
    try:
        with restore_modes(network), torch.no_grad():
            network.eval()
            run_network()
    finally:
        for hook in hooks:
            hook.remove()
    return called_modules


def apply_sharding(
    network: nn.Module, called_modules: set[nn.Module], frozen: set[nn.Parameter], mesh: DeviceMesh
) -> list[nn.Module]:
    """Shard the trainable weights of a network over a mesh; return the blocks that are gathered on their own.

    Args:
        network: Changed in place.
        called_modules: Modules that are called in a step; the others can't gather anything.
        frozen: Parameters that each process keeps unsharded.
        mesh: Of one dimension.
    """
    for parameter in network.parameters():
        if parameter not in frozen:
            parameter.data = parameter.data.contiguous()  # FSDP supports no other memory layout
    blocks = _find_sharded_blocks(network, called_modules, frozen)
    for module in (*blocks, network):
        module.register_forward_hook(_copy_view)
        fully_shard(module, mesh=mesh, ignored_params=frozen)
    return blocks


def _find_sharded_blocks(
    network: nn.Module, called_modules: set[nn.Module], frozen: set[nn.Parameter]
) -> list[nn.Module]:
    """List children of the network and of its sequences, inner ones first, that hold enough trainable weights."""
    minimum = MIN_BLOCK_FRACTION * sum(parameter.numel() for parameter in set(network.parameters()) - frozen)
    assigned, blocks = set(frozen), list[nn.Module]()
    for name, module in reversed(list(network.named_modules())):
        parent = network.get_submodule(name.rpartition(".")[0])
        is_block = parent is network or isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        own_parameters = set(module.parameters()) - assigned
        if (
            name
            and is_block
            and module in called_modules
            and sum(parameter.numel() for parameter in own_parameters) >= minimum
        ):
            blocks.append(module)
            assigned |= own_parameters
    return blocks


def _copy_view(module: nn.Module, inputs: object, output: object) -> object:
    """Copy a block's output if it is a view: changed in place, a view would lose the hooks that FSDP attaches to it."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _build_sharded_cut(cut: CutNetwork, network: nn.Module) -> CutNetwork:
    """Build the split network of a sharded copy."""
    network.logits_of_features = replace(cut, network=network).run_suffix  # type: ignore[assignment]
    register_fsdp_forward_method(network, "logits_of_features")
    return ShardedCutNetwork(network, cut.prefix, cut.training_suffix, cut.evaluation_suffix)


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes; its gradient is the sum of their gradients. torch's own such function is deprecated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Sum tensors of equal shape."""
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradients that the processes' losses have with respect to the sum."""
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes on a CPU: torch's SyncBatchNorm refuses its tensors."""

    def forward(self, image: Tensor) -> Tensor:
        """Normalize over all processes in training mode, by the running statistics in evaluation mode."""
        output = normalize_batch(self, image) if self.training else super().forward(image)
        # timm's batch-norm layers include their dropout and activation.
        for name in ("drop", "act"):
            layer = getattr(self, name, None)
            output = output if layer is None else layer(output)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept images of any dimension."""


class CudaSyncBatchNorm(SyncBatchNormAct):
    """torch's SyncBatchNorm with what timm's batch-norm layers include."""

    process_group = None


@contextmanager
def use_sync_batch_norm(network: nn.Module, processes: Processes, *, accelerator: str) -> Iterator[None]:
    """Inside, batch-norm layers in training mode normalize over the images of all processes.

    Layers change their class but stay the same objects, unlike with `convert_sync_batchnorm`: afterwards the network
    is as it was.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and processes.is_distributed]
    original_classes = [type(norm) for norm in norms]
    for norm in norms:
        norm.__class__ = CudaSyncBatchNorm if accelerator == "cuda" else CpuSyncBatchNorm
    try:
        yield
    finally:
        for norm, original_class in zip(norms, original_classes, strict=True):
            norm.__class__ = original_class


def normalize_batch(norm: _BatchNorm, image: Tensor) -> Tensor:
    """Return what `norm` gives in training for this process's images (batch, channels, …); update its statistics.

    Mean and variance are those of all processes' images (Ioffe and Szegedy 2015), summed in 32 bits.
    """
    image_fp32 = image.float()
    dimensions = [0, *range(2, image.ndim)]
    shape = [1, -1] + [1] * (image.ndim - 2)
    count = image_fp32.new_tensor([image_fp32.numel() / image_fp32.shape[1]])
    sums = _sum_over_processes(torch.cat([image_fp32.sum(dimensions), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centered = image_fp32 - mean.view(shape)
    variance = _sum_over_processes(centered.square().sum(dimensions)) / total
    _update_running_statistics(norm, mean.detach(), variance.detach(), total)
    output = centered * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        output = output * norm.weight.view(shape)
        output = output if norm.bias is None else output + norm.bias.view(shape)
    return output.to(image.dtype)


def _sum_over_processes(tensor: Tensor) -> Tensor:
    return cast(Tensor, _AllReduceSum.apply(tensor))


def _update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    with torch.no_grad():
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)


def build_strategy_arguments(processes: Processes, strategy: str) -> dict[str, Any]:
    """Return the Trainer arguments for the run's processes; gradients are averaged over all of them after each step."""
    if not processes.is_distributed:
        return {"devices": 1}
    arguments: dict[str, Any] = {
        "devices": processes.local_count,
        "num_nodes": processes.count // processes.local_count,
    }
    if strategy == "fsdp":
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
    """Train a network that `pylorus.model.distributed` has sharded.

    Checkpoints are those of a single process, with unsharded weights and moments: any number of devices can resume.
    ModelParallelStrategy can't load those: it numbers moments by the network's weights, not by the optimizer's.
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
