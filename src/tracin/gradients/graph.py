"""The autograd graph of a batch's losses: who reads which tensor, and how often each parameter is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Graph", "walk"]

# A tensor in the graph: the node that made it, and which of the node's outputs it is.
Made = tuple[Any, int]


@dataclass(frozen=True)
class Graph:
    """Readers of every tensor in the graph, as (node, position among the node's inputs), and the parameters' leaves."""

    readers: dict[Made, list[tuple[Any, int]]]
    leaves: dict[str, Any]

    def uses(self, name: str) -> int:
        """How often the graph reads a parameter; 0 for one that it does not reach."""
        leaf = self.leaves.get(name)
        return 0 if leaf is None else len(self.readers[leaf, 0])


def walk(losses: Tensor, parameters: Mapping[str, Tensor]) -> Graph:
    """Walk the graph from the losses to the leaves, in an order that depends on the graph's structure alone.

    Args:
        losses: The losses with their graph.
        parameters: Leaf tensors by name.

    Returns:
        The graph.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    readers: dict[Made, list[tuple[Any, int]]] = {}
    leaves: dict[str, Any] = {}
    if losses.grad_fn is None:
        return Graph(readers, leaves)
    seen = {losses.grad_fn}
    stack: list[Any] = [losses.grad_fn]
    while stack:
        reader = stack.pop()
        for position, (node, output) in enumerate(reader.next_functions):
            if node is None:
                continue
            readers.setdefault((node, output), []).append((reader, position))
            if node in seen:
                continue
            seen.add(node)
            stack.append(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in names:
                leaves[names[id(variable)]] = node
    return Graph(readers, leaves)
