r"""Parameters that all rows share until an elementwise operation: positions, class tokens, scales, temperatures.

A tensor y without a row axis is made from the parameter alone (the parameter itself, a slice, an embedding of
``arange(t)``), then added to, multiplied with or expanded over tensors that have one: z = x ∘ y. Autograd sums the
gradient over the rows right there; taken at z it still has them:

    ∂ℓ_n/∂y = reduce( ∂ℓ_n/∂z ∘ ∂z/∂y )      summed over the axes that y was broadcast along, the rows excepted
    ∂ℓ_n/∂θ = (∂y/∂θ)ᵀ ∂ℓ_n/∂y               one batched vector-Jacobian product of what made y

The places are found once in the graphs of two batch sizes, and found again in each batch by walking the same way; a
batch whose graph differs sends the parameter row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tracin.gradients.graph import Graph, Made
from tracin.gradients.layout import Layout, candidates, to_rows

__all__ = ["Meeting", "SharedSite", "discover", "gradients", "meetings"]


@dataclass(frozen=True)
class Step:
    """One reader met on the way: its operation, where the shared tensor stands in it, and whether rows join there."""

    operation: str
    position: int
    layout: Layout | None


@dataclass(frozen=True)
class SharedSite:
    """A parameter of this kind: the readers in the order in which the walk meets them."""

    parameter: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Meeting:
    """A place where the rows join: the shared tensor, the edge of the result, and the factor ∂z/∂y."""

    shared: Made
    shape: torch.Size
    edge: GradientEdge
    layout: Layout
    factor: Callable[[Tensor], Tensor]


def _added(node: Any, position: int) -> Callable[[Tensor], Tensor]:
    alpha = node._saved_alpha if position == 1 else 1
    return lambda g: g if alpha == 1 else g * alpha


def _subtracted(node: Any, position: int) -> Callable[[Tensor], Tensor]:
    alpha = node._saved_alpha
    return lambda g: g if position == 0 else g * -alpha


def _multiplied(node: Any, position: int) -> Callable[[Tensor], Tensor]:
    other = node._saved_other if position == 0 else node._saved_self
    return lambda g: g * other.detach()


def _divided(node: Any, position: int) -> Callable[[Tensor], Tensor]:
    other = node._saved_other
    if position == 0:
        return lambda g: g / other.detach()
    own = node._saved_self
    return lambda g: -g * own.detach() / other.detach().square()


def _chosen(node: Any, position: int) -> Callable[[Tensor], Tensor]:
    condition = node._saved_condition
    return lambda g: g.masked_fill(~condition if position == 0 else condition, 0)


def _expanded(node: Any, position: int) -> Callable[[Tensor], Tensor]:
    return lambda g: g


# Operations whose gradient at the result gives the gradient at a broadcast input by a factor.
FACTORS: dict[str, Callable[[Any, int], Callable[[Tensor], Tensor]]] = {
    "AddBackward0": _added,
    "SubBackward0": _subtracted,
    "MulBackward0": _multiplied,
    "DivBackward0": _divided,
    "WhereBackward0": _chosen,
    "ExpandBackward0": _expanded,
}


def _shape(made: Made) -> torch.Size:
    return torch.Size(made[0]._input_metadata[made[1]].shape)


def discover(name: str, few: Graph, more: Graph, n_few: int, n_more: int) -> SharedSite | None:
    """Follow a parameter through the graphs of two batch sizes to where the rows join.

    Args:
        name: The parameter.
        few: Graph of the smaller batch.
        more: Graph of the larger batch.
        n_few: Its rows.
        n_more: Rows of the larger.

    Returns:
        The site, or None where the rows join in an operation that is not in ``FACTORS``.
    """
    steps: list[Step] = []
    waiting: list[tuple[Made, Made]] = [((few.leaves[name], 0), (more.leaves[name], 0))]
    seen = set(waiting)
    while waiting:
        here, there = waiting.pop(0)
        readers, twins = few.readers.get(here, []), more.readers.get(there, [])
        if len(readers) != len(twins):
            return None
        for (node, position), (twin, _) in zip(readers, twins, strict=True):
            if node.name() != twin.name() or len(node._input_metadata) != 1:
                return None
            layout = None
            if _shape((node, 0)) != _shape((twin, 0)):
                found = candidates(_shape((node, 0)), _shape((twin, 0)), n_few, n_more)
                if (
                    not found
                    or node.name() not in FACTORS
                    or not _broadcast(_shape(here), _shape((node, 0)), found[0])
                ):
                    return None
                layout = found[0]
            elif ((node, 0), (twin, 0)) not in seen:
                seen.add(((node, 0), (twin, 0)))
                waiting.append(((node, 0), (twin, 0)))
            steps.append(Step(node.name(), position, layout))
    return SharedSite(name, tuple(steps)) if any(step.layout for step in steps) else None


def _broadcast(shared: torch.Size, result: torch.Size, layout: Layout) -> bool:
    """Whether the shared tensor is broadcast along the result's row axis."""
    if layout.per_row != 1:
        return False
    axis = layout.axis - (len(result) - len(shared))
    return axis < 0 or shared[axis] == 1


def meetings(site: SharedSite, graph: Graph, n: int) -> list[Meeting] | None:
    """Find a site's places in a batch's graph. Called before the backward pass, while the graph holds its tensors.

    Args:
        site: What was discovered.
        graph: The batch's graph.
        n: Its rows.

    Returns:
        The places, or None where the graph differs from what was discovered.
    """
    leaf = graph.leaves.get(site.parameter)
    if leaf is None:
        return None
    expected = iter(site.steps)
    found: list[Meeting] = []
    waiting: list[Made] = [(leaf, 0)]
    seen = set(waiting)
    while waiting:
        here = waiting.pop(0)
        for node, position in graph.readers.get(here, []):
            step = next(expected, None)
            if step is None or (node.name(), position) != (step.operation, step.position):
                return None
            if step.layout is not None:
                if not step.layout.fits(_shape((node, 0)), n):
                    return None
                factor = FACTORS[step.operation](node, position)
                found.append(Meeting(here, _shape(here), GradientEdge(node, 0), step.layout, factor))
            elif (node, 0) not in seen:
                seen.add((node, 0))
                waiting.append((node, 0))
    return None if next(expected, None) is not None else found


def gradients(
    leaf: Any, parameter: Tensor, places: list[Meeting], deltas: list[Tensor | None], n: int
) -> Tensor:
    """Per-example gradients of a shared parameter.

    Args:
        leaf: The parameter's leaf in the graph.
        parameter: The parameter.
        places: Where the rows join.
        deltas: ∂(Σℓ)/∂z at each place; None where nothing depends on it.
        n: Rows.

    Returns:
        The gradients [n, *shape].
    """
    by_shared: dict[Made, Tensor] = {}
    for place, delta in zip(places, deltas, strict=True):
        if delta is None:
            continue
        part = _reduced(place.factor(delta), place.layout, place.shape, n)
        by_shared[place.shared] = by_shared[place.shared] + part if place.shared in by_shared else part
    total = by_shared.pop((leaf, 0), None)
    if by_shared:
        (pulled,) = torch.autograd.grad(
            [GradientEdge(*made) for made in by_shared],
            [parameter],
            grad_outputs=list(by_shared.values()),
            is_grads_batched=True,
            allow_unused=True,
            retain_graph=True,
        )
        if pulled is not None:
            total = pulled if total is None else total + pulled
    return parameter.new_zeros(n, *parameter.shape) if total is None else total


def _reduced(values: Tensor, layout: Layout, shape: torch.Size, n: int) -> Tensor:
    """Sum [..rows..] over everything the shared tensor was broadcast along but the rows: [n, *shape]."""
    rows = to_rows(values, layout, n).squeeze(1)
    padded = [1] * (values.dim() - len(shape)) + list(shape)
    del padded[layout.axis]
    summed = [
        axis + 1
        for axis, (size, own) in enumerate(zip(rows.shape[1:], padded, strict=True))
        if own == 1 and size != 1
    ]
    if summed:
        rows = rows.sum(summed, keepdim=True)
    return rows.reshape(n, *shape)
