"""Does a model move rows? Then a batch can put them in another order than the probe's did, and is checked by itself.

An operation such as ``gather`` or ``flip`` along another axis than the rows' leaves each row in its place. An index
that names every row in order (``x[torch.arange(n), last]``) does too, but its values are looked at in each batch.
Anything else may move rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracin.gradients.graph import Graph

__all__ = ["Mover", "in_place", "movers_of"]


@dataclass(frozen=True)
class Mover:
    """An operation that can move rows: the row axes of its input, None where they were not seen."""

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
    shape, other = _input_shape(node), None if twin is None else _input_shape(twin)
    if type(node) is not type(twin) or shape is None or other is None or len(shape) != len(other):
        return Mover(type(node).__name__, None)
    row_axes = frozenset(axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b)
    return Mover(type(node).__name__, row_axes)


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
    shape = _input_shape(node)
    if mover.row_axes is None or shape is None:
        return False
    indices = getattr(node, "_saved_indices", None)
    if isinstance(indices, tuple | list):
        return all(
            _every_row(index, shape[axis]) for axis, index in enumerate(indices) if axis in mover.row_axes
        )
    axes = getattr(node, "_saved_dim", getattr(node, "_saved_dims", None))
    if axes is None:
        return False
    listed = axes if isinstance(axes, tuple | list) else (axes,)
    return not mover.row_axes & {_axis(axis, len(shape)) for axis in listed}


def _input_shape(node: Any) -> tuple[int, ...] | None:
    for name in ("_saved_self_sym_sizes", "_saved_self"):
        found = getattr(node, name, None)
        if isinstance(found, Tensor):
            return tuple(found.shape)
        if found is not None:
            return tuple(found)
    kept_shape = type(node).__name__.startswith(("Flip", "Roll", "Sort"))
    return tuple(node._input_metadata[0].shape) if kept_shape else None


def _axis(axis: int, dims: int) -> int:
    """An axis as autograd saved it: negative ones may be wrapped to 64 bits."""
    axis = axis - (1 << 64) if axis >= 1 << 63 else axis
    return axis + dims if axis < 0 else axis


def _every_row(index: Any, rows: int) -> bool:
    if index is None:
        return True
    flat = index.reshape(-1)
    return flat.dtype == torch.int64 and len(flat) == rows and bool((flat.cpu() == torch.arange(rows)).all())
