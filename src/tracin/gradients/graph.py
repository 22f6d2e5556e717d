"""The autograd graph of a batch's losses: who reads which tensor, and how often each parameter is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

__all__ = ["MOVERS", "Graph", "added_bytes", "walk"]

# Operations whose result can hold another row's values at a row's place.
MOVERS = frozenset(
    f"{name}Backward{version}"
    for name in (
        *("Addmm", "Baddbmm", "Bmm", "Mm", "Mv"),
        *("Cat", "Embedding", "Select", "Slice", "Split", "SplitWithSizes", "Stack", "Unbind"),
        *(
            "Flip",
            "Gather",
            "Index",
            "IndexAdd",
            "IndexCopy",
            "IndexPut",
            "IndexSelect",
            "Put",
            "Roll",
            "Sort",
        ),
        *(
            "MaskedScatter",
            "MaskedSelect",
            "Scatter",
            "ScatterAdd",
            "ScatterReduce",
            "SegmentReduce",
            "Take",
            "Topk",
        ),
    )
    for version in (0, 1)
)

# A tensor in the graph: the node that made it, and which of the node's outputs it is.
Made = tuple[Any, int]


@dataclass(frozen=True)
class Graph:
    """Readers of every tensor in the graph, as (node, position among the node's inputs), and the parameters' leaves.

    ``ends`` are the marked nodes below which there is no other: a backward pass to them runs through all others.
    ``movers`` are the nodes that can hand one row's values to another (``MOVERS``), in the order of the walk.
    """

    readers: dict[Made, list[tuple[Any, int]]]
    leaves: dict[str, Any]
    nodes: set[Any]
    ends: set[Any]
    movers: list[Any]

    def uses(self, name: str) -> int:
        """How often the graph reads a parameter; 0 for one that it does not reach."""
        leaf = self.leaves.get(name)
        return 0 if leaf is None else len(self.readers[leaf, 0])


def walk(losses: Tensor, parameters: Mapping[str, Tensor], marked: Collection[Any] = ()) -> Graph:
    """Walk the graph from the losses to the leaves, in an order that depends on the graph's structure alone.

    Args:
        losses: The losses with their graph.
        parameters: Leaf tensors by name.
        marked: Nodes whose gradient will be asked for.

    Returns:
        The graph.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    readers: dict[Made, list[tuple[Any, int]]] = {}
    leaves: dict[str, Any] = {}
    if losses.grad_fn is None:
        return Graph(readers, leaves, set(), set(), [])
    seen: dict[Any, bool] = {}  # node → whether a marked node lies strictly below it
    children: dict[Any, list[Any]] = {}
    movers: list[Any] = []
    stack: list[tuple[Any, bool]] = [(losses.grad_fn, False)]
    while stack:
        reader, done = stack.pop()
        if done:
            seen[reader] = any(child in marked or seen[child] for child in children.pop(reader))
            continue
        if reader in seen:
            continue
        seen[reader] = False
        if type(reader) is _Leaf:
            name = names.get(id(getattr(reader, "variable", None)))
            if name is not None:
                leaves[name] = reader
            continue
        if type(reader).__name__ in MOVERS:
            movers.append(reader)
        stack.append((reader, True))
        below = children[reader] = []
        for position, (node, output) in enumerate(reader.next_functions):
            if node is not None:
                readers.setdefault((node, output), []).append((reader, position))
                below.append(node)
                if node not in seen:
                    stack.append((node, False))
    return Graph(
        readers, leaves, set(seen), {node for node in marked if node in seen and not seen[node]}, movers
    )


def added_bytes(few: Graph, more: Graph) -> tuple[int, int]:
    """What one more row adds to the tensors that the operations of a graph made; views count as tensors.

    Args:
        few: The graph of some rows.
        more: That of one more row.

    Returns:
        Bytes added to all tensors together, and the most that is added to one of them (to all, where the two graphs have not
        the same tensors).
    """
    sizes, others = _made_bytes(few), _made_bytes(more)
    whole = max(1, sum(others) - sum(sizes))
    if len(sizes) != len(others):
        return whole, whole
    return whole, max([1, *(other - size for size, other in zip(sizes, others, strict=True))])


def _made_bytes(graph: Graph) -> list[int]:
    """Bytes of every tensor in the order of the walk, parameters left out."""
    nodes = dict.fromkeys(reader for readers in graph.readers.values() for reader, _ in readers)
    return [math.prod(made.shape) * made.dtype.itemsize for node in nodes for made in node._input_metadata]


# The class of the nodes that hold parameters.
_Leaf = type(get_gradient_edge(torch.zeros(1, requires_grad=True)).node)
