"""A batch of rows: what it holds, where it lies, and whose code failed on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracin.errors import TracinError, UserCodeError

__all__ = ["Batch", "describe_rows", "in_pinned_memory", "to_device", "user_code", "value_bytes"]


@dataclass(frozen=True)
class Batch:
    """Some rows of a data source, by position, and the batch of them that the user's loss takes."""

    rows: Sequence[int]
    value: Any
    again: Any = None  # the first row alone, read once more, where the source was asked to

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.rows[0]

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)


@contextmanager
def user_code(what: str, rows: Sequence[int], where: str = "") -> Iterator[None]:
    """Turn an exception of the user's code into a ``UserCodeError`` that names rows and checkpoint.

    Args:
        what: Whose code runs, such as ``"the loss"``.
        rows: Positions of the rows in work.
        where: The checkpoint and data source, for the message.

    Raises:
        TracinError: Ours, unchanged.
        UserCodeError: From any other exception.
    """
    try:
        yield
    except TracinError:
        raise
    except Exception as error:
        place = f" at {where}" if where else ""
        raise UserCodeError(
            f"{what} raised {type(error).__name__} on {describe_rows(rows)}{place}: {error}"
        ) from error


def describe_rows(rows: Sequence[int]) -> str:
    """``"row 3"``, ``"rows 0-99"`` or a short list."""
    rows = list(dict.fromkeys(rows))
    if len(rows) == 1:
        return f"row {rows[0]}"
    if rows and rows == list(range(rows[0], rows[0] + len(rows))):
        return f"rows {rows[0]}-{rows[-1]}"
    shown = ", ".join(str(row) for row in rows[:5])
    return f"rows {shown}{', …' if len(rows) > 5 else ''}"


def to_device(value: Any, device: torch.device, *, copy: bool = False) -> Any:
    """The batch with its tensors on ``device``; anything else that has ``.to`` is asked to move itself.

    Args:
        value: A batch.
        device: Where its tensors go.
        copy: Copy tensors that are there already, because the batch is used again and a model may write into it.

    Returns:
        The batch.
    """
    return pytree.tree_map(partial(_moved, device=device, copy=copy), value)


def _moved(leaf: Any, device: torch.device, copy: bool) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to(device, non_blocking=True, copy=copy)
    if copy and not isinstance(leaf, _FIXED):
        leaf = deepcopy(leaf)
    mover = getattr(leaf, "to", None)
    return mover(device) if callable(mover) else leaf


def in_pinned_memory(leaf: Any) -> Any:
    """A page-locked copy of a tensor that lies in ordinary memory; anything else as it is."""
    plain = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided
    return leaf.pin_memory() if plain else leaf


def value_bytes(value: Any) -> int | None:
    """Memory that a batch's tensors take; None where it holds other things than tensors, numbers and words."""
    leaves = pytree.tree_leaves(value)
    if not all(isinstance(leaf, (Tensor, *_FIXED)) for leaf in leaves):
        return None
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


# What a model cannot write into.
_FIXED = (int, float, complex, str, bytes, type(None))
