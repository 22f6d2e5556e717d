r"""One example at a time: obviously correct, slow, the judge of every other route.

    g(z_i) = ∇_θ ℓ_i        by ``torch.autograd.grad`` of one entry of the loss vector

``in_graph`` takes the gradient in the graph of a whole batch, so that float32 kinks (a ReLU at zero) fall as they do
in the batch. ``alone`` runs the row by itself, and is the route of parameters that no other route reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tracin.gradients.agreement import accumulation_dtype

__all__ = ["alone", "in_graph", "in_graph_with_deltas", "summed", "summed_alone"]


def _grad(scalar: Tensor, parameters: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    return _with_deltas(scalar, parameters, [], keep)[0]


def _with_deltas(
    scalar: Tensor, parameters: Mapping[str, Tensor], edges: Sequence[GradientEdge], keep: bool
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    values = list(parameters.values())
    asked: list[Any] = [*values, *edges]
    found = torch.autograd.grad(scalar, asked, retain_graph=keep, allow_unused=True)
    out = {}
    for name, parameter, gradient in zip(parameters, values, found[: len(values)], strict=True):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        out[name] = (gradient.to_dense() if gradient.layout != torch.strided else gradient).detach()
    return out, list(found[len(values) :])


def in_graph(losses: Tensor, parameters: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The gradient of one row's loss within the batch's graph, which is kept.

    Args:
        losses: The losses [n] of a batch, with their graph.
        parameters: Parameters by name.
        row: Position in the batch.

    Returns:
        Each parameter's gradient; zeros where the row does not use it.
    """
    return _grad(losses[row], parameters, keep=True)


def in_graph_with_deltas(
    losses: Tensor, parameters: Mapping[str, Tensor], row: int, edges: Sequence[GradientEdge]
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """``in_graph``, and δ at some places of the graph from the same backward pass.

    Args:
        losses: The losses [n] of a batch, with their graph.
        parameters: Parameters by name.
        row: Position in the batch.
        edges: The places.

    Returns:
        Each parameter's gradient, and ∂ℓ_row at each place; None where the row does not reach it.
    """
    return _with_deltas(losses[row], parameters, edges, keep=True)


def summed(
    losses: Tensor, parameters: Mapping[str, Tensor], weights: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradient of the (weighted) sum of a batch's losses; the graph is kept.

    Args:
        losses: The losses [n] of a batch, with their graph.
        parameters: Parameters by name.
        weights: One weight per row; 1 unless given.

    Returns:
        Each parameter's gradient; zeros where it is unused.
    """
    return _grad(losses.sum() if weights is None else losses @ weights, parameters, keep=True)


def alone(
    losses_of: Callable[[Any, Sequence[int]], Tensor],
    take: Callable[[Sequence[int]], Any],
    rows: Sequence[int],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The gradients of several rows, each run by itself.

    Args:
        losses_of: ``losses_of(batch, rows) -> Tensor [n]``.
        take: Makes a batch of the rows asked for.
        rows: Positions in the data.
        parameters: Parameters by name.

    Returns:
        Each parameter's gradients [len(rows), p], multiplied out.
    """
    out = {name: parameter.new_empty(len(rows), parameter.numel()) for name, parameter in parameters.items()}
    for at, row in enumerate(rows):
        losses = losses_of(take([row]), [row])
        for name, gradient in _grad(losses[0], parameters, keep=False).items():
            out[name][at] = gradient.reshape(-1)
    return out


def summed_alone(
    losses_of: Callable[[Any, Sequence[int]], Tensor],
    take: Callable[[Sequence[int]], Any],
    rows: Sequence[int],
    parameters: Mapping[str, Tensor],
    weights: Tensor,
) -> dict[str, Tensor]:
    """The weighted sum of the gradients of several rows, each run by itself; no more than the sum is held.

    Args:
        losses_of: ``losses_of(batch, rows) -> Tensor [n]``.
        take: Makes a batch of the rows asked for.
        rows: Positions in the data.
        parameters: Parameters by name.
        weights: One weight per row.

    Returns:
        Each parameter's sum, in float32 or better.
    """
    out = {
        name: torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype)).detach()
        for name, parameter in parameters.items()
    }
    for weight, row in zip(weights.tolist(), rows, strict=True):
        losses = losses_of(take([row]), [row])
        for name, gradient in _grad(losses[0], parameters, keep=False).items():
            out[name] += weight * gradient.to(out[name].dtype)
    return out
