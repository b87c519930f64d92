"""What learns, divided among several processes (FSDP): each holds its share of weights, gradients and moments.

A block's weights are gathered when it computes, and let go behind it. What is frozen lies whole in each process: it has
neither gradients nor moments. The numbers are those of a network that each process holds whole.
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
from pylorus.model.cut import Cut, modes_kept

LEAST = 0.01
"""Of all that learns, that a block must hold to be gathered by itself."""


class CutOfShards(Cut):
    """A cut whose network gathers the weights that no block of its own gathers, before what lies behind the cut."""

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """As of a whole network."""
        logits: Tensor = self.network.logits_of_features(features)  # type: ignore[operator]
        return logits


@contextmanager
def sharded(classifier: Classifier, accelerator: str, *, image_size: int) -> Iterator[tuple[int, int]]:
    """Inside, the classifier holds this process's share of what learns; gives how many weights that is, of how many.

    All processes come here together. Afterwards the classifier holds its network whole, as it was before: what was
    trained lies in the checkpoints.

    Args:
        classifier: Whose network's `requires_grad` says what learns.
        accelerator: cpu or cuda; each process holds its share there.
        image_size: Side of the network's input in pixels.
    """
    network, cut = classifier.network, classifier.cut
    where = next(network.parameters()).device
    pixels = classifier.pixels(torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8, device=where))
    reached = called(network, lambda: network(pixels) if cut is None else cut.logits(cut.features(pixels)))
    network.cpu()
    frozen = {parameter for parameter in network.parameters() if not parameter.requires_grad}
    names = [name for name, module in network.named_modules() if module in reached]
    shared = copy.deepcopy(network, {id(parameter): parameter for parameter in frozen})
    mesh = init_device_mesh(accelerator, (torch.distributed.get_world_size(),))
    shard(shared, {shared.get_submodule(name) for name in names}, frozen, mesh)
    classifier.network = shared
    if cut is not None:
        classifier.cut = _of_shards(cut, shared)
    learning = [parameter for parameter in shared.parameters() if isinstance(parameter, DTensor)]
    try:
        yield sum(p.to_local().numel() for p in learning), sum(p.numel() for p in learning)
    finally:
        classifier.network, classifier.cut = network.to(memory_format=classifier.memory_format), cut


def called(network: nn.Module, act: Callable[[], object]) -> set[nn.Module]:
    """The modules that are called while `act` computes in evaluation; a list of blocks is not, its blocks are."""
    found: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: found.add(module)) for module in network.modules()]
    try:
        with modes_kept(network), torch.no_grad():
            network.eval()
            act()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def shard(network: nn.Module, reached: set[nn.Module], frozen: set[nn.Parameter], mesh: DeviceMesh) -> list[nn.Module]:
    """Divides what learns in a network among the processes of a mesh; gives the blocks that gather by themselves.

    Args:
        network: Changed in place.
        reached: Modules that are called in a step; the others can't gather anything.
        frozen: Parameters that each process keeps whole.
        mesh: Of one dimension.
    """
    for parameter in network.parameters():
        if parameter not in frozen:
            parameter.data = parameter.data.contiguous()  # FSDP knows no other order in memory
    found = _blocks(network, reached, frozen)
    for module in (*found, network):
        module.register_forward_hook(_own_memory)
        fully_shard(module, mesh=mesh, ignored_params=frozen)
    return found


def _blocks(network: nn.Module, reached: set[nn.Module], frozen: set[nn.Parameter]) -> list[nn.Module]:
    """Parts of the network and of its sequences, inner ones first, that hold enough of what learns."""
    least = LEAST * sum(parameter.numel() for parameter in set(network.parameters()) - frozen)
    taken, found = set(frozen), list[nn.Module]()
    for name, module in reversed(list(network.named_modules())):
        above = network.get_submodule(name.rpartition(".")[0])
        in_row = above is network or isinstance(above, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        own = set(module.parameters()) - taken
        if name and in_row and module in reached and sum(parameter.numel() for parameter in own) >= least:
            found.append(module)
            taken |= own
    return found


def _own_memory(module: nn.Module, given: object, output: object) -> object:
    """What a block gives, in memory of its own: changed in place, a view would lose what FSDP hangs on it."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _of_shards(cut: Cut, network: nn.Module) -> Cut:
    """A cut of a network, of its sharded copy."""
    network.logits_of_features = replace(cut, network=network).logits  # type: ignore[assignment]
    register_fsdp_forward_method(network, "logits_of_features")
    return CutOfShards(network, cut.prefix, cut.training_suffix, cut.evaluation_suffix)
