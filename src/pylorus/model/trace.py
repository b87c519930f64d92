"""Trace a timm network into a graph of steps, detailed enough to separate frozen from trainable parts."""

import inspect
from collections.abc import Collection

from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn


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
