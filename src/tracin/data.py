"""Rows in a fixed order: tensors, a map-style dataset or a data loader, read batch by batch.

Scores are indexed by row position, and every checkpoint reads the rows again. So the rows must come in
the same order and with the same content on every pass: what cannot promise that is refused here.

A batch is whatever the user's loss takes. From a tuple or dict of tensors it is the same structure of
slices (copies, so that an in-place transform in the model cannot reach the user's data); from a dataset
it is what ``collate`` makes of the rows; from a loader it is what the loader yields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, default_collate

from tracin.errors import DataError, OptionError, TracinError, UserCodeError

__all__ = [
    "AUTO_ROWS",
    "Batch",
    "BatchSize",
    "RowSource",
    "describe_rows",
    "open_rows",
    "require_batch_size",
    "rows_per_batch",
    "to_device",
    "user_code",
]


# Rows per batch: a number, or what suits the model once it is known.
BatchSize = int | Literal["auto"]

# Rows per batch under "auto" where nothing is known of the model.
AUTO_ROWS = 256


@dataclass(frozen=True)
class Batch:
    """Some rows of a data source, by position, and the batch of them that the user's loss takes."""

    rows: Sequence[int]
    value: Any

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.rows[0]

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)


@runtime_checkable
class RowSource(Protocol):
    """A data source with a known number of rows and a fixed order."""

    name: str
    sizes: Sequence[int]
    collates: bool  # whether the user's own function makes the batches, which may reorder their rows

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def batches(self) -> Iterator[Batch]:
        """One pass over all rows in order."""
        ...

    def take(self, rows: Sequence[int]) -> Any:
        """A batch made of these rows, which may repeat."""
        ...

    def resize(self, first: int, rest: int) -> None:
        """Batch the rows by these sizes where they were opened with ``"auto"``; else nothing changes."""
        ...


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


def require_batch_size(batch_size: Any) -> BatchSize:
    """The batch size, if it is one.

    Args:
        batch_size: What the user gave.

    Returns:
        It.

    Raises:
        OptionError: It is neither a positive whole number nor ``"auto"``.
    """
    if batch_size == "auto" or (
        isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size >= 1
    ):
        return batch_size
    raise OptionError(f"batch_size is {batch_size!r}: give a whole number of rows, at least 1, or 'auto'.")


def rows_per_batch(batch_size: BatchSize) -> int:
    """The number, or what ``"auto"`` stands for while nothing is known of the model."""
    return AUTO_ROWS if batch_size == "auto" else batch_size


def _even_sizes(n: int, batch_size: BatchSize) -> list[int]:
    size = rows_per_batch(batch_size)
    return [min(size, n - start) for start in range(0, n, size)]


class _Resizable:
    """Rows that are batched here: in other batches where the user left the size to us."""

    sizes: Sequence[int]
    automatic: bool

    def resize(self, first: int, rest: int) -> None:
        if self.automatic:
            n = sum(self.sizes)
            self.sizes = [min(first, n), *_even_sizes(n - min(first, n), rest)]


def _starts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, size
        start += size


class _TensorRows(_Resizable):
    """A pytree of tensors that share their first dimension."""

    collates = False

    def __init__(self, value: Any, batch_size: BatchSize, name: str) -> None:
        self.name, self.automatic = name, batch_size == "auto"
        paths, self._spec = pytree.tree_flatten_with_path(value)
        self._leaves: list[Tensor] = []
        lengths: dict[str, int] = {}
        for path, leaf in paths:
            key = pytree.keystr(path) or "the tensor"
            if not isinstance(leaf, Tensor):
                try:
                    leaf = torch.as_tensor(leaf)
                except (TypeError, ValueError, RuntimeError) as error:
                    raise DataError(
                        f"{name}{key} is a {type(leaf).__name__}, not a tensor. A tuple or dict given as data holds "
                        "tensors of one row per example; wrap other rows in a map-style Dataset."
                    ) from error
            if leaf.dim() == 0:
                raise DataError(f"{name}{key} has no row dimension: give it the shape [n, ...].")
            lengths[key] = leaf.shape[0]
            self._leaves.append(leaf.detach())
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
            raise DataError(
                f"{name}: tensors of unequal length ({told} rows). Every tensor needs one row per example."
            )
        self._n = next(iter(lengths.values()), 0)
        self.sizes: Sequence[int] = _even_sizes(self._n, batch_size)

    def __len__(self) -> int:
        return self._n

    def batches(self) -> Iterator[Batch]:
        for start, size in _starts(self.sizes):
            leaves = [leaf[start : start + size].clone() for leaf in self._leaves]
            yield Batch(range(start, start + size), pytree.tree_unflatten(leaves, self._spec))

    def take(self, rows: Sequence[int]) -> Any:
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        leaves = [leaf.index_select(0, index.to(leaf.device)) for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)


class _DatasetRows(_Resizable):
    """A map-style dataset, batched here."""

    automatic = False

    def __init__(self, dataset: Any, sizes: Sequence[int], collate: Callable[[list], Any], name: str) -> None:
        self.name, self.sizes, self._dataset, self._collate = name, sizes, dataset, collate
        self.collates = collate is not default_collate
        self._n = sum(sizes)

    def __len__(self) -> int:
        return self._n

    def batches(self) -> Iterator[Batch]:
        for start, size in _starts(self.sizes):
            yield Batch(range(start, start + size), self.take(range(start, start + size)))

    def take(self, rows: Sequence[int]) -> Any:
        rows = list(rows)
        many: Any = getattr(self._dataset, "__getitems__", None)
        items: list[Any]
        if many is not None:
            with user_code(f"the {self.name} dataset", rows):
                items = [*many(rows)]
        else:
            items = [self._item(row) for row in rows]
        with user_code(f"the collate function of {self.name}", rows):
            return self._collate(items)

    def _item(self, row: int) -> Any:
        with user_code(f"the {self.name} dataset", [row]):
            return self._dataset[row]


class _LoaderRows(_DatasetRows):
    """A data loader in order, with its own batches and workers."""

    def __init__(self, loader: DataLoader, sizes: Sequence[int], name: str) -> None:
        super().__init__(loader.dataset, sizes, loader.collate_fn, name)
        self._loader = loader

    def batches(self) -> Iterator[Batch]:
        generator = self._loader.generator
        state = None if generator is None else generator.get_state()
        try:
            iterator = iter(self._loader)
            for start, size in _starts(self.sizes):
                with user_code(f"the {self.name} loader", range(start, start + size)):
                    try:
                        value = next(iterator)
                    except StopIteration:
                        raise DataError(
                            f"the {self.name} loader ended at row {start} of {len(self)}: its length and its batches "
                            "disagree. Pass the dataset itself."
                        ) from None
                yield Batch(range(start, start + size), value)
        finally:
            if generator is not None and state is not None:
                generator.set_state(state)


def _loader_sizes(loader: DataLoader, name: str) -> list[int]:
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            f"{name}: an IterableDataset has no row positions. Use a map-style Dataset (with __getitem__)."
        )
    if loader.batch_sampler is None:
        raise DataError(
            f"{name}: a loader with batch_size=None has no batches of its own. Pass the dataset itself."
        )
    if getattr(loader, "drop_last", False):
        raise DataError(f"{name}: drop_last=True leaves rows out. Make the loader with drop_last=False.")
    n = len(loader.dataset)  # type: ignore[arg-type]
    if type(loader.sampler) is SequentialSampler and loader.batch_size is not None:
        return _even_sizes(n, loader.batch_size)
    sampler = type(loader.sampler if loader.batch_size is not None else loader.batch_sampler).__name__
    with torch.random.fork_rng(devices=[]):  # listing must not draw from the user's random state
        order = [list(rows) for rows in loader.batch_sampler] if "Random" not in sampler else []
    if [row for rows in order for row in rows] != list(range(n)):
        raise DataError(
            f"{name}: the loader's {sampler} does not read the rows in order, so scores could not be matched to rows. "
            "Use shuffle=False (or pass the dataset itself)."
        )
    return [len(rows) for rows in order]


def open_rows(
    data: Any, *, name: str, batch_size: BatchSize, collate: Callable[[list], Any] | None = None
) -> RowSource:
    """Read ``data`` as rows in order.

    Args:
        data: A tuple or dict of tensors (one row per example), a map-style dataset, or a ``DataLoader``
            in order (its own batches are used).
        name: ``"train"`` or ``"queries"``, for messages.
        batch_size: Rows per batch, where the source does not batch itself; ``"auto"``: 256 until ``resize``.
        collate: Makes a batch of a list of a dataset's rows (torch's default unless given).

    Returns:
        The rows.

    Raises:
        DataError: Empty, unequal lengths, a shuffled or random loader, ``drop_last``, an iterable dataset.
        OptionError: ``batch_size`` is neither a positive whole number nor ``"auto"``, or ``collate`` is no function.

    Example:
        >>> rows = open_rows((torch.zeros(5, 2), torch.arange(5)), name="train", batch_size=2)
        >>> [batch.value[1].tolist() for batch in rows.batches()]
        [[0, 1], [2, 3], [4]]
    """
    require_batch_size(batch_size)
    rows: RowSource
    if collate is not None and not callable(collate):
        raise OptionError(f"collate is a {type(collate).__name__}, not a function of a list of rows.")
    if isinstance(data, DataLoader):
        rows = _LoaderRows(data, _loader_sizes(data, name), name)
    elif isinstance(data, IterableDataset):
        raise DataError(
            f"{name}: an IterableDataset has no row positions. Use a map-style Dataset (with __getitem__)."
        )
    elif isinstance(data, tuple | Mapping | Tensor):
        rows = _TensorRows(data, batch_size, name)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes):
        rows = _DatasetRows(data, _even_sizes(len(data), batch_size), collate or default_collate, name)
        rows.automatic = batch_size == "auto"
    else:
        raise DataError(
            f"{name} is a {type(data).__name__}: give a tuple or dict of tensors, a map-style Dataset, or a DataLoader."
        )
    if len(rows) == 0:
        raise DataError(f"{name} is empty: at least one row is needed.")
    return rows


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
    mover = getattr(leaf, "to", None)
    return mover(device) if callable(mover) else leaf
