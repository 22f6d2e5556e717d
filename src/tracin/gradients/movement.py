"""Does a model move rows? Then a batch can put them in another order than the probe's did, and is checked by itself.

An operation such as ``gather``, ``flip`` or ``cat`` along another axis than the rows' leaves each row in its place, and
so does a matrix product that does not sum over rows. An index that names every row in order (``x[torch.arange(n), last]``)
does too, but its values are looked at in each batch. Anything else may move rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tracin.gradients.graph import Graph

__all__ = ["Mover", "in_place", "movers_of"]


# Matrix products: the axis, counted from the right, that each differentiable input is summed over.
CONTRACTED = {
    "MmBackward0": (-1, -2),
    "BmmBackward0": (-1, -2),
    "AddmmBackward0": (None, -1, -2),
    "BaddbmmBackward0": (None, -1, -2),
    "MvBackward0": (-1, -1),
}


@dataclass(frozen=True)
class Mover:
    """An operation that can move rows: the row axes of the tensor that it works along, None where it moves them."""

    operation: str
    row_axes: frozenset[int] | None


def movers_of(few: Graph, more: Graph) -> tuple[Mover, ...]:
    """The operations of a graph that can move rows.

    Args:
        few: Graph of a batch.
        more: Graph of a batch with one row more, in which the row axes are longer.

    Returns:
        One entry per operation, in the order of the walk.
    """
    twins = more.movers if len(more.movers) == len(few.movers) else [None] * len(few.movers)
    return tuple(_mover(node, twin) for node, twin in zip(few.movers, twins, strict=True))


def _mover(node: Any, twin: Any) -> Mover:
    operation = type(node).__name__
    if type(node) is not type(twin):
        return Mover(operation, None)
    if operation in CONTRACTED:
        pairs = zip(_input_shapes(node), _input_shapes(twin), strict=True)
        grown = [_grown(few, more) for few, more in pairs]
        axes = zip(grown, CONTRACTED[operation], strict=True)
        return Mover(operation, None if any(axis in found for found, axis in axes if axis) else frozenset())
    return Mover(operation, frozenset(_grown(_shape(node), _shape(twin), from_left=True)))


def _grown(few: tuple[int, ...] | None, more: tuple[int, ...] | None, *, from_left: bool = False) -> set[int]:
    """Axes whose length differs, counted from the right unless asked otherwise."""
    if few is None or more is None:
        return set()
    offset = 0 if from_left else len(few)
    return {axis - offset for axis, (a, b) in enumerate(zip(few, more, strict=False)) if a != b}


def in_place(movers: tuple[Mover, ...], graph: Graph) -> bool:
    """Whether every row of a batch stays in its place, as far as its graph shows.

    Args:
        movers: What the probe showed.
        graph: The batch's graph.

    Returns:
        False also where the graph has other such operations than the probe's.
    """
    if [mover.operation for mover in movers] != [type(node).__name__ for node in graph.movers]:
        return False
    return all(_stays(mover, node) for mover, node in zip(movers, graph.movers, strict=True))


def _stays(mover: Mover, node: Any) -> bool:
    if mover.row_axes is None or not mover.row_axes:
        return mover.row_axes is not None
    shape = _shape(node)
    indices = getattr(node, "_saved_indices", None)
    if isinstance(indices, tuple | list):
        return all(
            _every_row(index, shape[axis]) for axis, index in enumerate(indices) if axis in mover.row_axes
        )
    axes = getattr(node, "_saved_dim", getattr(node, "_saved_dims", None))
    if axes is None:
        return False
    listed = axes if isinstance(axes, tuple | list) else (axes,)
    moved = mover.row_axes & {_axis(axis, len(shape)) for axis in listed}
    return not moved or _whole_slice(node, shape, moved)


def _whole_slice(node: Any, shape: tuple[int, ...], axes: frozenset[int]) -> bool:
    if not hasattr(node, "_saved_step"):
        return False
    (axis,) = axes
    return node._saved_start == 0 and node._saved_end >= shape[axis] and node._saved_step == 1


def _shape(node: Any) -> tuple[int, ...]:
    """Shape of the tensor along whose axes the operation works: its result where it joins tensors, else its input."""
    if type(node).__name__.startswith(("Cat", "Stack")):
        return tuple(node._input_metadata[0].shape)
    return next(shape for shape in _input_shapes(node) if shape is not None)


def _input_shapes(node: Any) -> list[tuple[int, ...] | None]:
    """Shapes of the inputs that have a gradient; None for the others."""
    return [
        None if producer is None else tuple(producer._input_metadata[number].shape)
        for producer, number in node.next_functions
    ]


def _axis(axis: int, dims: int) -> int:
    """An axis as autograd saved it: negative ones may be wrapped to 64 bits."""
    axis = axis - (1 << 64) if axis >= 1 << 63 else axis
    return axis + dims if axis < 0 else axis


def _every_row(index: Any, rows: int) -> bool:
    if index is None:
        return True
    flat = index.reshape(-1)
    return flat.dtype == torch.int64 and len(flat) == rows and bool((flat.cpu() == torch.arange(rows)).all())
