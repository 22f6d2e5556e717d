"""One backward pass that brings δ to every recorded output, and nothing else.

The parameters' own gradients are not computed unless they are asked for. δ is handed on as soon as it is complete, so
that what is made of it can be smaller: δ of a whole network is never held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tracin.gradients import shared
from tracin.gradients.capture import Tape
from tracin.gradients.graph import Graph

__all__ = ["Backward", "Output", "backward", "marked_nodes"]

# A recorded output: site, number of the call, number of the output.
Output = tuple[str, int, int]


def marked_nodes(tape: Tape) -> dict[Any, list[tuple[Output, GradientEdge]]]:
    """Recorded outputs by the node that made them."""
    out: dict[Any, list[tuple[Output, GradientEdge]]] = {}
    for site, calls in tape.calls.items():
        for at, call in enumerate(calls):
            for number, edge in enumerate(call.edges):
                out.setdefault(edge.node, []).append(((site, at, number), edge))
    return out


@dataclass(frozen=True)
class Backward:
    """∂(Σℓ)/∂ of every meeting of a shared parameter, and some parameters' own gradients."""

    places: dict[str, list[Tensor | None]]
    parameters: dict[str, Tensor]


def backward(
    losses: Tensor,
    graph: Graph,
    marked: Mapping[Any, list[tuple[Output, GradientEdge]]],
    places: Mapping[str, list[shared.Meeting]],
    receive: Callable[[Output, Tensor], None],
    parameters: Mapping[str, Tensor],
    keep: bool,
) -> Backward:
    """Run a backward pass in which ``receive`` gets δ of every recorded output.

    Only the last outputs on every way down are asked of autograd; the pass runs through the nodes of all others, where
    a hook reads δ.

    Args:
        losses: The losses [n] with their graph.
        graph: The graph, walked with the marked nodes.
        marked: Recorded outputs by node.
        places: Meetings of shared parameters, by parameter.
        receive: Gets each recorded output and its δ, as soon as it is complete.
        parameters: Parameters whose own gradient is asked for.
        keep: Keep the graph.

    Returns:
        δ at the meetings, and the parameters' gradients.
    """
    ends = [(output, edge) for node, found in marked.items() if node in graph.ends for output, edge in found]
    asked: list[Any] = [edge for _, edge in ends]
    asked += [place.edge for found in places.values() for place in found]
    asked += parameters.values()
    if not asked:
        return Backward({}, {})

    passed = [
        (node, found) for node, found in marked.items() if node in graph.nodes and node not in graph.ends
    ]
    handles = [node.register_prehook(partial(_read, found, receive)) for node, found in passed]
    ones = torch.ones_like(losses)
    keep = keep or bool(places and parameters)  # what made a shared tensor is differentiated once more
    try:
        got = iter(torch.autograd.grad(losses, asked, ones, retain_graph=keep, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()
    for output, _ in ends:
        delta = next(got)
        if delta is not None:
            receive(output, delta)
    by_place: dict[str, list[Tensor | None]] = {name: [next(got) for _ in at] for name, at in places.items()}
    return Backward(by_place, {name: _dense(next(got), parameter) for name, parameter in parameters.items()})


def _read(
    found: list[tuple[Output, GradientEdge]],
    receive: Callable[[Output, Tensor], None],
    gradients: Sequence[Tensor | None],
) -> None:
    for output, edge in found:
        delta = gradients[edge.output_nr]
        if delta is not None:
            receive(output, delta)


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
