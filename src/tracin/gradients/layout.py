"""Where the rows stand in a tensor that a module reads or makes.

The row axis is found by running the same rows in two batch sizes and looking at what changed, never guessed
from a length: a time-first module given as many steps as rows has two axes of the same length. An axis whose
length is k times the number of rows holds k entries per row, ordered row by row (``view(n * t, i)``), or
entry by entry (``time-first.view(t * n, i)``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "candidates", "from_rows", "to_rows"]


@dataclass(frozen=True)
class Layout:
    """Axis of the rows, entries k per row along it, and whether a row's entries stand side by side."""

    axis: int
    per_row: int = 1
    row_major: bool = True

    def fits(self, shape: Sequence[int], n: int) -> bool:
        """Whether a tensor of this shape can hold n rows in this layout."""
        return self.axis < len(shape) and shape[self.axis] == n * self.per_row


def candidates(few: Sequence[int], more: Sequence[int], n_few: int, n_more: int) -> tuple[Layout, ...]:
    """Layouts that explain how a shape grew from ``n_few`` to ``n_more`` rows.

    Args:
        few: Shape with the smaller batch.
        more: Shape with the larger batch.
        n_few: Rows of the smaller batch.
        n_more: Rows of the larger batch.

    Returns:
        No layout where the shape did not grow in proportion, or on several axes; two where the order of several
        entries per row is open.

    Example:
        >>> candidates((5, 3, 8), (5, 4, 8), 3, 4)
        (Layout(axis=1, per_row=1, row_major=True),)
    """
    if len(few) != len(more):
        return ()
    changed = [axis for axis, (a, b) in enumerate(zip(few, more, strict=True)) if a != b]
    if len(changed) != 1:
        return ()
    axis = changed[0]
    if few[axis] % n_few or few[axis] // n_few * n_more != more[axis] or few[axis] == 0:
        return ()
    per_row = few[axis] // n_few
    if per_row == 1:
        return (Layout(axis),)
    return (Layout(axis, per_row, True), Layout(axis, per_row, False))


def to_rows(x: Tensor, layout: Layout, n: int) -> Tensor:
    """The tensor as [n, per_row, ...rest]: the row axis and a row's entries first."""
    x = x.movedim(layout.axis, 0)
    if layout.row_major:
        return x.reshape(n, layout.per_row, *x.shape[1:])
    return x.reshape(layout.per_row, n, *x.shape[1:]).transpose(0, 1)


def from_rows(x: Tensor, layout: Layout) -> Tensor:
    """One row's entries [per_row, ...rest] back on their axis: what the module sees of that row alone."""
    return x.movedim(0, layout.axis)


def owns(gradient: Tensor, layout: Layout, n: int, row: int) -> bool:
    """Whether a gradient of the loss of ``row`` alone is zero at every other row of this layout."""
    norms = to_rows(gradient, layout, n).flatten(1).abs().amax(1)
    others = torch.cat([norms[:row], norms[row + 1 :]])
    return not bool(others.any())
