"""Split a network at the end of its frozen prefix, which is a pure function of the image.

The network's code is traced (torch.fx) only where frozen and trainable modules are mixed; a module that is entirely
frozen or entirely trainable stays a single call. A step is pure if it depends on the image and frozen weights alone.
The prefix consists of all pure steps, the suffix of all others, and the tensors passed from one to the other are the
features. Both execute the network's own operations, in its order, on its own weights.
"""

import hashlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from pylorus.model.backbone import restore_modes
from pylorus.model.finetuning import Depth, set_modes


def trace_network(network: nn.Module, still: Collection[str]) -> fx.Graph:
    """Trace a network in its current mode, from its only input, the image, to the logits.

    A module that is frozen as a whole, or trainable as a whole, becomes one step.

    Args:
        network: A timm model.
        still: Names of the modules that stay in evaluation mode while the others are trained.

    Raises:
        Exception: Of any type, if the network's code can't be traced.
    """
    other_parameters = list(inspect.signature(network.forward).parameters.values())[1:]
    defaults = {
        parameter.name: parameter.default
        for parameter in other_parameters
        if parameter.default is not inspect.Parameter.empty
    }
    graph = _Tracer(still).trace(network, concrete_args=defaults)
    # Arguments other than the image were fixed: what remains of them in the graph only asserts their values. Remove it.
    unused: set[fx.Node] = set([node for node in graph.nodes if node.op == "placeholder"][1:])
    for node in graph.nodes:
        if unused.intersection(node.all_input_nodes):
            unused.add(node)
    for node in reversed(list(graph.nodes)):
        if node in unused:
            graph.erase_node(node)
    return graph


class _Tracer(fx.Tracer):
    """Trace into those modules only that contain both frozen and trainable submodules."""

    def __init__(self, still: Collection[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))  # type: ignore[no-untyped-call]
        self._still = set(still)
        self._opaque = tuple(get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        prefix = f"{module_qualified_name}."
        is_mixed = module_qualified_name not in self._still and any(name.startswith(prefix) for name in self._still)
        return not is_mixed or isinstance(m, self._opaque)


class CannotCutError(Exception):
    """Raised if a network can't be split at this depth; the message says why."""


@dataclass(frozen=True)
class CutNetwork:
    """A network in two parts, which share its weights and follow it to any device.

    Attributes:
        network: The complete network.
        prefix: Steps from normalized images (batch, 3, size, size) to features.
        training_suffix: Steps from features to logits (batch, classes) in training mode.
        evaluation_suffix: The same in evaluation mode.
    """

    network: nn.Module
    prefix: fx.Graph
    training_suffix: fx.Graph
    evaluation_suffix: fx.Graph

    def run_prefix(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of normalized images (batch, 3, size, size): tensors of `batch` rows each."""
        return _run_graph(self.network, self.prefix, [pixels])

    def run_suffix(self, features: Sequence[Tensor]) -> Tensor:
        """Compute logits (batch, classes) from features, in the network's current mode."""
        graph = self.training_suffix if self.network.training else self.evaluation_suffix
        return _run_graph(self.network, graph, features)[0]

    def build_training_module(self) -> nn.Module:
        """Build a module, with the network's own weights, from features to logits in training mode."""
        graph = fx.Graph()
        (logits,) = graph.graph_copy(self.training_suffix, {})  # type: ignore[misc]
        graph.output(logits)
        return fx.GraphModule(self.network, graph)

    @cached_property
    def digest(self) -> str:
        """What `compute_digest` returns, computed once: the prefix is frozen."""
        return self.compute_digest()

    def compute_digest(self) -> str:
        """Return a SHA-256 of all that features depend on besides the image: prefix steps, layers and weights."""
        digest = hashlib.sha256(str(self.prefix).encode())
        for node in self.prefix.nodes:
            if node.op == "call_module":
                module = self.network.get_submodule(str(node.target))
                digest.update(repr(module).encode())
                tensors = module.state_dict(prefix=f"{node.target}.")
            elif node.op == "get_attr":
                tensors = {str(node.target): _get_attribute(self.network, str(node.target))}
            else:
                continue
            for name, tensor in tensors.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def cut_network(network: nn.Module, depth: Depth, pixels: Tensor) -> CutNetwork:
    """Split the network before the first trainable layer, and verify the logits in evaluation mode.

    Args:
        network: Any timm model; its modes are restored afterwards.
        depth: What is trained, from `pylorus.model.finetuning.resolve_depth`.
        pixels: Normalized images (batch, 3, size, size) to verify it on, at least two.

    Raises:
        UncuttableError: If nothing is frozen before the first trainable layer, the network's code can't be traced, or
            the two parts do not give the logits of the complete network.
    """
    if not depth.frozen:
        raise CannotCutError("the whole network is trained")
    with restore_modes(network), torch.no_grad():
        try:
            result = _cut_traced(network, depth, pixels)
            features = result.run_prefix(pixels)
            is_equivalent = torch.allclose(result.run_suffix(features), network(pixels), rtol=1e-3, equal_nan=True)
        except CannotCutError:
            raise
        except Exception as error:  # a network's code can fail to trace in any way
            raise CannotCutError(f"its code can't be traced: {str(error).strip().splitlines()[0][:120]}") from error
    if not is_equivalent:
        raise CannotCutError("its two parts give different logits than the complete network")
    return result


def _cut_traced(network: nn.Module, depth: Depth, pixels: Tensor) -> CutNetwork:
    """Split the network without verifying the result; leaves it in evaluation mode."""
    set_modes(network, depth.eval_modules)
    training_graph = trace_network(network, depth.eval_modules)
    network.eval()
    evaluation_graph = trace_network(network, depth.eval_modules)
    pure, constants = _find_pure_steps(
        network,
        evaluation_graph,
        depth,
        pixels,
        excluded_steps=_find_mode_dependent_steps(training_graph, evaluation_graph),
    )
    crossing = _find_crossing_steps(evaluation_graph, pure, constants)
    if not any(node.op == "call_module" and node.name in pure for node in evaluation_graph.nodes):
        raise CannotCutError("it is trained from its first layer on")
    if _find_crossing_steps(training_graph, pure, constants) != crossing:
        raise CannotCutError("its code takes a different path in training than in evaluation")
    return CutNetwork(
        network=network,
        prefix=_build_prefix(evaluation_graph, pure, crossing),
        training_suffix=_build_suffix(training_graph, pure, crossing, constants),
        evaluation_suffix=_build_suffix(evaluation_graph, pure, crossing, constants),
    )


def _find_mode_dependent_steps(training: fx.Graph, evaluation: fx.Graph) -> set[str]:
    """Find steps that differ between training and evaluation, such as a functional dropout."""
    steps_by_mode = [
        {node.name: (node.op, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes}
        for graph in (training, evaluation)
    ]
    return {name for name, signature in steps_by_mode[1].items() if steps_by_mode[0].get(name) != signature}


def _find_pure_steps(
    network: nn.Module, graph: fx.Graph, depth: Depth, pixels: Tensor, *, excluded_steps: Collection[str]
) -> tuple[set[str], dict[str, Any]]:
    """Find the steps that depend only on the image and frozen weights, and those among them that are constants.

    Values passed from prefix to suffix must be tensors with one row per image, or plain values that are equal for every
    batch, such as the side of a feature map. Batch sizes and frozen weights are left to the suffix.
    """
    still, learning = set(depth.eval_modules), set(depth.trainable)
    excluded = set(excluded_steps)
    while True:
        pure: list[fx.Node] = []
        for node in graph.nodes:
            is_trained = node.op == "get_attr" and node.target in learning
            is_in_training_mode = node.op == "call_module" and node.target not in still
            if not (node.op == "output" or is_trained or is_in_training_mode or node.name in excluded):
                pure += [node] if set(node.all_input_nodes) <= set(pure) else []
        values, values_of_first = _compute_values(network, pure, pixels), _compute_values(network, pure, pixels[:1])
        names = {node.name for node in pure}
        crossing = [node for node in pure if any(user.name not in names for user in node.users)]
        constants = {
            node.name: values[node]
            for node in crossing
            if _is_plain_value(values[node]) and values[node] == values_of_first[node]
        }
        not_separable = {
            node.name
            for node in crossing
            if node.name not in constants and not _is_per_image(node, values[node], len(pixels))
        }
        if not not_separable:
            return names, constants
        excluded |= not_separable


def _compute_values(network: nn.Module, pure: Sequence[fx.Node], pixels: Tensor) -> dict[fx.Node, Any]:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in pure:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies.values()))
    return dict(zip(pure, _run_graph(network, graph, [pixels]), strict=True))


def _is_plain_value(value: Any) -> bool:
    inner = value if isinstance(value, tuple | list) else ()
    return all(map(_is_plain_value, inner)) if inner else isinstance(value, int | float | str | bool | None)


def _is_per_image(node: fx.Node, value: Any, images: int) -> bool:
    """Return whether a step produces a tensor with one row per image, computed from the image."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == images and _has_image_input(node)


def _has_image_input(node: fx.Node) -> bool:
    return node.op == "placeholder" or any(_has_image_input(source) for source in node.all_input_nodes)


def _find_crossing_steps(graph: fx.Graph, pure: Collection[str], constants: Collection[str]) -> list[str]:
    """List the pure steps whose tensors are used by a step in the suffix."""
    return [
        node.name
        for node in graph.nodes
        if node.name in pure and node.name not in constants and any(user.name not in pure for user in node.users)
    ]


def _build_prefix(graph: fx.Graph, pure: Collection[str], crossing: Sequence[str]) -> fx.Graph:
    prefix, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node.name in pure:
            copies[node] = prefix.node_copy(node, copies.__getitem__)
    prefix.output(tuple(copy for node, copy in copies.items() if node.name in crossing))
    return prefix


def _build_suffix(
    graph: fx.Graph, pure: Collection[str], crossing: Sequence[str], constants: Mapping[str, Any]
) -> fx.Graph:
    suffix, copies = fx.Graph(), dict[fx.Node, Any]()
    for node in graph.nodes:
        if node.name in crossing:
            copies[node] = suffix.placeholder(node.name)
        elif node.name in constants:
            copies[node] = constants[node.name]
    for node in graph.nodes:
        if node.op == "output":
            suffix.output((copies[node.all_input_nodes[0]],))
        elif node.name not in pure:
            copies[node] = suffix.node_copy(node, copies.__getitem__)
    return suffix


def _run_graph(network: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = fx.Interpreter(network, graph=graph).run(*inputs)
    return results


def _get_attribute(network: nn.Module, path: str) -> Tensor:
    module_path, _, name = path.rpartition(".")
    tensor: Tensor = getattr(network.get_submodule(module_path), name)
    return tensor
