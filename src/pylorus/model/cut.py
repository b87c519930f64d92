"""Cuts a network in two where a stage's learning begins: what comes before is a pure function of the image.

The network's own code is traced (torch.fx) only where frozen and learning parts lie side by side; a part that is
frozen as a whole, or learns as a whole, stays one call. A step is pure where it depends on the image and on frozen
weights alone. The prefix is all pure steps, the suffix the others, and the tensors that pass from one to the other
are the features. Both run the very operations of the network, in its order, on its own weights.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pylorus.model.freeze import Depth, set_modes
from pylorus.model.trace import traced


class UncuttableError(Exception):
    """A network that can't be cut at this depth; the message says why."""


@dataclass(frozen=True)
class Cut:
    """A network in two parts, which share its weights and follow it to any device.

    Attributes:
        network: The whole.
        prefix: The steps from normalised images (batch, 3, size, size) to features.
        training_suffix: Those from features to logits (batch, classes) in training.
        evaluation_suffix: The same in evaluation.
    """

    network: nn.Module
    prefix: fx.Graph
    training_suffix: fx.Graph
    evaluation_suffix: fx.Graph
    _compiled: dict[str, Any] = field(default_factory=dict, repr=False)

    def features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What passes the cut for normalised images (batch, 3, size, size): tensors of `batch` rows each."""
        return _run(self.network, self.prefix, [pixels])

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (batch, classes) of features, in the network's present mode."""
        mode = "training" if self.network.training else "evaluation"
        if mode in self._compiled:
            logits: Tensor = self._compiled[mode](*features)[0]
            return logits
        graph = self.training_suffix if mode == "training" else self.evaluation_suffix
        return _run(self.network, graph, features)[0]

    def compile(self) -> None:
        """Has torch translate what comes behind the cut, for training and for evaluation, at its first call."""
        for mode, graph in (("training", self.training_suffix), ("evaluation", self.evaluation_suffix)):
            self._compiled[mode] = torch.compile(fx.GraphModule(self.network, graph))

    def digest(self) -> str:
        """A SHA-256 of all that features depend on beside the image: the prefix's steps, their layers and weights."""
        found = hashlib.sha256(str(self.prefix).encode())
        for node in self.prefix.nodes:
            if node.op == "call_module":
                module = self.network.get_submodule(str(node.target))
                found.update(repr(module).encode())
                tensors = module.state_dict(prefix=f"{node.target}.")
            elif node.op == "get_attr":
                tensors = {str(node.target): _attribute(self.network, str(node.target))}
            else:
                continue
            for name, tensor in tensors.items():
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()


def cut(network: nn.Module, depth: Depth, pixels: Tensor) -> Cut:
    """The network, cut where what learns at this depth begins, and compared with the whole in evaluation.

    Args:
        network: Any timm model; its modes are as before afterwards.
        depth: What learns, from `pylorus.model.freeze.depth`.
        pixels: Some normalised images (batch, 3, size, size) to try it on, at least two.

    Raises:
        UncuttableError: If nothing is frozen before the first layer that learns, the network's code can't be traced,
            or the two parts do not give the logits of the whole.
    """
    if not depth.frozen:
        raise UncuttableError("all of it learns")
    with modes_kept(network), torch.no_grad():
        try:
            found = _cut(network, depth, pixels)
            features = found.features(pixels)
            same = torch.allclose(found.logits(features), network(pixels), rtol=1e-3, equal_nan=True)
        except UncuttableError:
            raise
        except Exception as error:  # a network's code can break a trace in any way
            raise UncuttableError(f"its code can't be traced: {str(error).strip().splitlines()[0][:120]}") from error
    if not same:
        raise UncuttableError("cut in two it gives other logits than whole")
    return found


def _cut(network: nn.Module, depth: Depth, pixels: Tensor) -> Cut:
    """Leaves the network in evaluation mode."""
    set_modes(network, depth.still)
    training = traced(network, depth.still)
    network.eval()
    evaluation = traced(network, depth.still)
    pure, constants = _pure(network, evaluation, depth, pixels, kept_out=_changing(training, evaluation))
    crossing = _crossing(evaluation, pure, constants)
    if not any(node.op == "call_module" and node.name in pure for node in evaluation.nodes):
        raise UncuttableError("what learns begins at its first layer")
    if _crossing(training, pure, constants) != crossing:
        raise UncuttableError("its code takes another way in training than in evaluation")
    return Cut(
        network=network,
        prefix=_prefix(evaluation, pure, crossing),
        training_suffix=_suffix(training, pure, crossing, constants),
        evaluation_suffix=_suffix(evaluation, pure, crossing, constants),
    )


def _changing(training: fx.Graph, evaluation: fx.Graph) -> set[str]:
    """Steps that are not the same in training as in evaluation, such as a dropout that is no module."""
    said = [
        {node.name: (node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes}
        for graph in (training, evaluation)
    ]
    return {name for name, step in said[1].items() if said[0].get(name) != step}


def _pure(
    network: nn.Module, graph: fx.Graph, depth: Depth, pixels: Tensor, *, kept_out: Collection[str]
) -> tuple[set[str], dict[str, Any]]:
    """The steps that depend on the image and on frozen weights alone, and those of them that are plain constants.

    What crosses the cut must be a tensor of one row an image, or plain values that are the same for every batch, such
    as the side of a feature map. A batch's size, or a frozen weight, is left to the suffix, which finds it anew.
    """
    still, learning = set(depth.still), set(depth.learning)
    out = set(kept_out)
    while True:
        pure: list[fx.Node] = []
        for node in graph.nodes:
            learns = node.op == "get_attr" and node.target in learning
            moves = node.op == "call_module" and node.target not in still
            if not (node.op == "output" or learns or moves or node.name in out):
                pure += [node] if set(node.all_input_nodes) <= set(pure) else []
        values, others = _values(network, pure, pixels), _values(network, pure, pixels[:1])
        names = {node.name for node in pure}
        crossing = [node for node in pure if any(user.name not in names for user in node.users)]
        constants = {
            node.name: values[node] for node in crossing if _plain(values[node]) and values[node] == others[node]
        }
        odd = {
            node.name
            for node in crossing
            if node.name not in constants and not _owned_by_images(node, values[node], len(pixels))
        }
        if not odd:
            return names, constants
        out |= odd


def _values(network: nn.Module, pure: Sequence[fx.Node], pixels: Tensor) -> dict[fx.Node, Any]:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in pure:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies.values()))
    return dict(zip(pure, _run(network, graph, [pixels]), strict=True))


def _plain(value: Any) -> bool:
    inner = value if isinstance(value, tuple | list) else ()
    return all(map(_plain, inner)) if inner else isinstance(value, int | float | str | bool | None)


def _owned_by_images(node: fx.Node, value: Any, images: int) -> bool:
    """Whether a step gives a tensor of one row an image, made from the image."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == images and _sees_image(node)


def _sees_image(node: fx.Node) -> bool:
    return node.op == "placeholder" or any(_sees_image(source) for source in node.all_input_nodes)


def _crossing(graph: fx.Graph, pure: Collection[str], constants: Collection[str]) -> list[str]:
    """The pure steps whose tensors a step behind the cut takes."""
    return [
        node.name
        for node in graph.nodes
        if node.name in pure and node.name not in constants and any(user.name not in pure for user in node.users)
    ]


def _prefix(graph: fx.Graph, pure: Collection[str], crossing: Sequence[str]) -> fx.Graph:
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node.name in pure:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(tuple(copy for node, copy in copies.items() if node.name in crossing))
    return made


def _suffix(graph: fx.Graph, pure: Collection[str], crossing: Sequence[str], constants: Mapping[str, Any]) -> fx.Graph:
    made, copies = fx.Graph(), dict[fx.Node, Any]()
    for node in graph.nodes:
        if node.name in crossing:
            copies[node] = made.placeholder(node.name)
        elif node.name in constants:
            copies[node] = constants[node.name]
    for node in graph.nodes:
        if node.op == "output":
            made.output((copies[node.all_input_nodes[0]],))
        elif node.name not in pure:
            copies[node] = made.node_copy(node, copies.__getitem__)
    return made


def _run(network: nn.Module, graph: fx.Graph, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = fx.Interpreter(network, graph=graph).run(*given)
    return results


def _attribute(network: nn.Module, path: str) -> Tensor:
    place, _, name = path.rpartition(".")
    tensor: Tensor = getattr(network.get_submodule(place), name)
    return tensor


@contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Afterwards each module is in training or in evaluation as before."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
