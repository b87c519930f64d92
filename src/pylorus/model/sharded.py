"""Shard the trainable part among several processes (FSDP): each holds its shard of weights, gradients and moments.

A block's weights are gathered for its computation and freed afterwards. Frozen weights, which have neither gradients
nor moments, are complete in each process. The numbers are those of an unsharded network.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from pylorus.model.classifier import Classifier
from pylorus.model.cut import CutNetwork, restore_modes

LEAST = 0.01
"""Fraction of all trainable weights that a block must hold to be gathered on its own."""


class ShardedCutNetwork(CutNetwork):
    """A split network that gathers the weights that no block gathers on its own before it runs its suffix."""

    def run_suffix(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits as the unsharded network does."""
        logits: Tensor = self.network.logits_of_features(features)  # type: ignore[operator]
        return logits


@contextmanager
def use_sharded_network(classifier: Classifier, accelerator: str, *, image_size: int) -> Iterator[tuple[int, int]]:
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
    minimum = LEAST * sum(parameter.numel() for parameter in set(network.parameters()) - frozen)
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
