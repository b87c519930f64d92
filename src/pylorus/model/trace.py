"""A timm network's code as a graph of steps, as detailed as a cut between frozen and learning parts needs it."""

import inspect
from collections.abc import Collection

from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn


def traced(network: nn.Module, still: Collection[str]) -> fx.Graph:
    """The steps of a network in its present mode, from one argument, the image, to the logits.

    A part that stays still as a whole, or not at all, is one step.

    Args:
        network: A timm model.
        still: Names of the modules that stay in evaluation mode while the others learn.

    Raises:
        Exception: Of any kind, where the network's code can't be traced.
    """
    others = list(inspect.signature(network.forward).parameters.values())[1:]
    given = {other.name: other.default for other in others if other.default is not inspect.Parameter.empty}
    graph = _Tracer(still).trace(network, concrete_args=given)
    # Other arguments than the image were given: what is left of them in the graph is a check that they were.
    spare: set[fx.Node] = set([node for node in graph.nodes if node.op == "placeholder"][1:])
    for node in graph.nodes:
        if spare.intersection(node.all_input_nodes):
            spare.add(node)
    for node in reversed(list(graph.nodes)):
        if node in spare:
            graph.erase_node(node)
    return graph


class _Tracer(fx.Tracer):
    """Looks only into modules that hold both what stays still and what does not."""

    def __init__(self, still: Collection[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))  # type: ignore[no-untyped-call]
        self._still = set(still)
        self._closed = tuple(get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = f"{module_qualified_name}."
        mixed = module_qualified_name not in self._still and any(name.startswith(inside) for name in self._still)
        return not mixed or isinstance(m, self._closed)
