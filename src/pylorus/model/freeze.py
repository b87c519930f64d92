"""What learns in a stage and what stays as it is: weights, batch norm's statistics and dropout alike.

A depth is a word: `head` (timm's classifier, the layer that gives the logits), `all`, or a block's name: that block
and all that the network registers behind it. What is frozen is a pure function of the image: nothing in it draws
random numbers or moves. Dropout right before the classifier belongs to the head.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pytorch_lightning as pl
from torch import nn

from pylorus.errors import PylorusError, did_you_mean
from pylorus.model.head import classifier_names


@dataclass(frozen=True)
class Depth:
    """What learns in a network, by name.

    Attributes:
        learning: Names of the parameters that learn, in the network's order.
        frozen: Names of the parameters that don't.
        still: Names of the modules that stay in evaluation mode: those in which nothing learns.
    """

    learning: tuple[str, ...]
    frozen: tuple[str, ...]
    still: tuple[str, ...]


def depth(network: nn.Module, learn: str) -> Depth:
    """Which parameters and modules of a timm model learn at the depth that `learn` names.

    Raises:
        PylorusError: If the network has no block of that name.
    """
    parameters = [name for name, _ in network.named_parameters()]
    if learn == "all":
        return Depth(learning=tuple(parameters), frozen=(), still=())
    if learn == "head":
        chosen = tuple(f"{name}." for name in classifier_names(network))
        learning = [name for name in parameters if name.startswith(chosen)]
    else:
        first = next((place for place, name in enumerate(parameters) if name.startswith(f"{learn}.")), None)
        if first is None:
            raise PylorusError(_no_such_block(network, learn))
        learning = parameters[first:]
    frozen = [name for name in parameters if name not in set(learning)]
    return Depth(learning=tuple(learning), frozen=tuple(frozen), still=_still(network, learning, frozen))


def blocks(network: nn.Module) -> list[str]:
    """The names that `learn` takes for this network: parts with weights, and the parts of those that are sequences."""
    named: list[str] = []
    for name, module in network.named_children():
        if not any(True for _ in module.parameters()):
            continue
        named.append(name)
        if isinstance(module, nn.Sequential | nn.ModuleList):
            named += [f"{name}.{part}" for part, inner in module.named_children() if list(inner.parameters())]
    return named


def apply(network: nn.Module, learn: str) -> Depth:
    """Sets `requires_grad` of every parameter to what the depth says."""
    found = depth(network, learn)
    learning = set(found.learning)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in learning)
    return found


def set_modes(network: nn.Module, still: Iterable[str]) -> None:
    """Puts every module in training mode but those named in `still`."""
    network.train()
    for name in still:
        network.get_submodule(name).training = False


class Freeze(pl.Callback):
    """Keeps a stage at its depth. What it does follows from the depth alone, so a resumed run misses nothing."""

    def __init__(self, learn: str) -> None:
        self.learn = learn
        self._still: tuple[str, ...] = ()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before the optimiser is made, and before the model is wrapped for several GPUs."""
        self._still = apply(_network(pl_module), self.learn).still

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that goes on in its middle does not begin."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sets every module's mode: Lightning leaves each as the stage before left it."""
        set_modes(_network(pl_module), self._still)


def _still(network: nn.Module, learning: list[str], frozen: list[str]) -> tuple[str, ...]:
    """Modules in which nothing learns, up to the first that does; those without weights by their place."""
    names = [name for name, _ in network.named_modules()]
    places = {name: place for place, name in enumerate(names)}
    owners = [places[name.rpartition(".")[0]] for name in learning]
    last_frozen = max((places[name.rpartition(".")[0]] for name in frozen), default=-1)
    first_learning = min(owners)
    beside_head = {name.rpartition(".")[0] for name in classifier_names(network)} | {""}
    still = []
    for name, module in network.named_modules():
        inside = f"{name}." if name else ""
        if any(parameter.startswith(inside) for parameter in learning) or places[name] > first_learning:
            continue
        heads_dropout = (
            isinstance(module, nn.Dropout) and places[name] > last_frozen and name.rpartition(".")[0] in beside_head
        )
        if not heads_dropout:
            still.append(name)
    return tuple(still)


def _network(module: pl.LightningModule) -> nn.Module:
    network = module.network
    assert isinstance(network, nn.Module)
    return network


def _no_such_block(network: nn.Module, learn: str) -> str:
    known = ["head", "all", *blocks(network)]
    modules = [
        *known,
        *(name for name, module in network.named_modules() if name and list(module.parameters())),
    ]
    return (
        f'learn: {type(network).__name__} has no block "{learn}".{did_you_mean(learn, modules)}\n'
        f"Known here: {', '.join(known)}; blocks within these by their dotted names."
    )
