"""Are the rows the same whenever they are read? One number per row tells.

Three moments are looked at: a batch read a second time at once (``refuse_unsteady``), single rows taken again
(``SteadyTake``), and whole passes (``Passes``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracin.data import Batch, RowSource, describe_rows, to_device, value_bytes
from tracin.errors import DataError

__all__ = ["Passes", "SteadyTake", "refuse_unsteady", "row_checksums", "same_checksums"]


def row_checksums(batch: Batch, *, double: bool = False) -> Tensor | None:
    """One number per row that changes when the row's content or the order within it changes.

    A weighted sum with fixed weights, so that a mirrored picture differs from the picture.

    Args:
        batch: The batch as the source made it.
        double: Add up in float64, so that the same row gives the same number in batches of any size.

    Returns:
        Float64 [size], or None where no tensor of the batch has a row per example.
    """
    total = None
    for leaf in pytree.tree_leaves(batch.value):
        if (
            not isinstance(leaf, Tensor)
            or leaf.dim() == 0
            or leaf.shape[0] != batch.size
            or leaf.is_complex()
        ):
            continue
        flat = leaf.detach().reshape(batch.size, -1)
        if double or flat.dtype not in (torch.float32, torch.float64):
            flat = flat.to(torch.float64)
        part = (flat @ _weights(flat.shape[1], flat.dtype, flat.device)).to(device="cpu", dtype=torch.float64)
        total = part if total is None else math.pi * total + part
    return total


def same_checksums(mine: Tensor, theirs: Tensor) -> Tensor:
    """Whether rows are the same by their float64 checksums, bool [n]."""
    return torch.isclose(mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


@lru_cache(maxsize=16)
def _weights(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    steps = torch.arange(1, length + 1, dtype=torch.float64)
    return (torch.remainder(steps * 0.6180339887498949, 1.0) + 0.5).to(device=device, dtype=dtype)


class Passes:
    """What the first pass over some sources gave, batch by batch; a later pass must give the same."""

    def __init__(self) -> None:
        # One tensor per source: small ones that stay among large ones that go would pin the heap in pieces.
        self._sums: dict[str, Tensor] = {}
        self._seen: set[tuple[str, int]] = set()

    def check(self, rows: RowSource, batch: Batch) -> None:
        """Compare a batch with that of the pass before. Where the user's function collates, a new one is read twice.

        A batch that came with its first row read once more is compared with that, too.

        Args:
            rows: The source.
            batch: One of its batches, as it was read.

        Raises:
            DataError: A row is another than before, or the collate function reorders rows.
        """
        if batch.again is not None:
            _refuse_changed(rows, batch)
        found = row_checksums(batch)
        if found is None:
            return
        key = (rows.name, batch.start)
        sums = self._sums.setdefault(rows.name, torch.empty(len(rows), dtype=torch.float64))
        seen = sums[batch.start : batch.start + batch.size]
        if key not in self._seen:
            self._seen.add(key)
            seen.copy_(found)
            if rows.collates:
                refuse_unsteady(rows, batch)
            return
        changed = (found != seen) & ~(found.isnan() & seen.isnan())
        if bool(changed.any()):
            raise DataError(
                f"{rows.name}: row {batch.rows[int(changed.nonzero()[0])]} changed between two passes over the data. Turn off "
                "augmentation, shuffling and other randomness in the dataset for tracing."
            )


def refuse_unsteady(rows: RowSource, batch: Batch) -> None:
    """Read the rows of a batch again, in reverse: data that changes, or a collate that reorders, is refused.

    Args:
        rows: The source.
        batch: One of its batches, as it was read.

    Raises:
        DataError: A row came back different, or in another place.
    """
    there = row_checksums(batch, double=True)
    again = list(batch.rows)[::-1]
    back = row_checksums(Batch(again, rows.take(again)), double=True)
    if there is None or back is None:
        return
    same = same_checksums(there, back.flip(0))
    if bool(same.all()):
        return
    if bool(same_checksums(there.sort().values, back.sort().values).all()):
        raise DataError(
            f"{rows.name}: the collate function does not keep the rows of a batch in their order ({describe_rows(batch.rows)}). "
            "Sort inside the model instead, or not at all."
        )
    raise DataError(_different(rows, batch.rows[int((~same).nonzero()[0])]))


def _refuse_changed(rows: RowSource, batch: Batch) -> None:
    """Refuse a batch whose first row was another when it was read again; rows of other shapes cannot be compared."""
    first = pytree.tree_map(partial(_first, size=batch.size), batch.value)
    shapes = [getattr(leaf, "shape", None) for leaf in pytree.tree_leaves(first)]
    if shapes != [getattr(leaf, "shape", None) for leaf in pytree.tree_leaves(batch.again)]:
        return
    one = [batch.start]
    there, back = (row_checksums(Batch(one, value), double=True) for value in (first, batch.again))
    if there is not None and back is not None and not bool(same_checksums(there, back).all()):
        raise DataError(_different(rows, batch.start))


def _first(leaf: Any, size: int) -> Any:
    per_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
    return leaf[:1] if per_row else leaf


class SteadyTake:
    """Takes rows of a source to a device, and refuses one that comes back different when it is taken again.

    Args:
        rows: The source.
        device: Where batches go.
    """

    def __init__(self, rows: RowSource, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._seen: dict[int, Tensor] = {}
        self.row_bytes: int | None = 0  # the most that a row took; None: cannot be told

    def __call__(self, rows: Sequence[int]) -> Any:
        """A batch of these rows on the device."""
        value = self._rows.take(rows)
        size = value_bytes(value)
        if self.row_bytes is None or size is None:
            self.row_bytes = None
        else:
            self.row_bytes = max(self.row_bytes, -(-size // len(rows)))
        found = row_checksums(Batch(rows, value), double=True)
        for row, mine in zip(rows, found if found is not None else (), strict=found is not None):
            if not bool(same_checksums(mine, self._seen.setdefault(row, mine))):
                raise DataError(_different(self._rows, row))
        return to_device(value, self._device)


def _different(rows: RowSource, row: int) -> str:
    return (
        f"{rows.name}: row {row} came back different when it was read again. Turn off augmentation and other randomness in "
        "the dataset for tracing, and sorting in the collate function."
    )
