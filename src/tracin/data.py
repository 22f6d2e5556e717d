"""Rows in a fixed order: tensors, a map-style dataset or a data loader, read batch by batch.

Scores are indexed by row position, and every checkpoint reads the rows again. So the rows must come in
the same order and with the same content on every pass: what cannot promise that is refused here.

A batch is whatever the user's loss takes. From a tuple or dict of tensors it is the same structure of
slices (copies, so that an in-place transform in the model cannot reach the user's data); from a dataset
it is what ``collate`` makes of the rows; from a loader it is what the loader yields.

Datasets, and loaders without workers, are read ahead in a background thread (``prefetch``), and never by two threads at
a time. A loader with workers, or of a class of its own, reads its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset, default_collate

from tracin.batch import Batch, describe_rows, in_pinned_memory, to_device, user_code, value_bytes
from tracin.errors import DataError, OptionError
from tracin.prefetch import Reader, reading

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
    "value_bytes",
]


# Rows per batch: a number, or what suits the model once it is known.
BatchSize = int | Literal["auto"]

# Rows per batch under "auto" where nothing is known of the model.
AUTO_ROWS = 256


@runtime_checkable
class RowSource(Protocol):
    """A data source with a known number of rows and a fixed order."""

    name: str
    sizes: Sequence[int]
    collates: bool  # whether the user's own function makes the batches, which may reorder their rows
    decodes: bool  # whether the user's code makes the rows each time they are read
    rereads: bool  # set it: some rows are read twice in the first pass, so that data that changes shows
    pinned: bool  # whether batches lie in page-locked memory, from which a GPU copies while others compute

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """One pass in order over the batches that begin at row ``start`` or later, and before ``stop``."""
        ...

    def take(self, rows: Sequence[int]) -> Any:
        """A batch made of these rows, which may repeat."""
        ...

    def resize(self, first: int, rest: int) -> None:
        """Batch the rows by these sizes where they were opened with ``"auto"``; else nothing changes."""
        ...

    def spans(self, start: int = 0, stop: int | None = None) -> list[range]:
        """The rows of the batches that begin from ``start`` on and before ``stop``."""
        ...

    def close(self) -> None:
        """End what still reads ahead."""
        ...


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
    pinned = rereads = False

    def resize(self, first: int, rest: int) -> None:
        if self.automatic:
            n = sum(self.sizes)
            self.sizes = [min(first, n), *_even_sizes(n - min(first, n), rest)]

    def spans(self, start: int = 0, stop: int | None = None) -> list[range]:
        """The rows of the batches that begin from ``start`` on and before ``stop``."""
        ends = [*accumulate(self.sizes)]
        every = [range(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [rows for rows in every if rows.start >= start and (stop is None or rows.start < stop)]


class _TensorRows(_Resizable):
    """A pytree of tensors that share their first dimension."""

    collates = decodes = False

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

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        for rows in self.spans(start, stop):
            leaves = [self._copied(leaf[rows.start : rows.stop]) for leaf in self._leaves]
            yield Batch(rows, pytree.tree_unflatten(leaves, self._spec))

    def _copied(self, part: Tensor) -> Tensor:
        plain = part.device.type == "cpu" and part.layout is torch.strided and not part.is_pinned()
        return in_pinned_memory(part) if self.pinned and plain else part.clone()

    def take(self, rows: Sequence[int]) -> Any:
        index = torch.as_tensor(list(rows), dtype=torch.int64)
        leaves = [leaf.index_select(0, index.to(leaf.device)) for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)

    def close(self) -> None:
        """Nothing reads ahead."""


class _Rereading:
    """Which rows are read a second time: each once, the first of every batch while they are few, later one in fifty."""

    FEW, EVERY = 64, 50

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._last = 0

    def due(self, row: int) -> bool:
        if row in self._asked or (len(self._asked) >= self.FEW and row - self._last < self.EVERY):
            return False
        self._asked.add(row)
        self._last = row
        return True


class _DatasetRows(_Resizable):
    """A map-style dataset, batched here."""

    automatic, decodes = False, True

    def __init__(self, dataset: Any, sizes: Sequence[int], collate: Callable[[list], Any], name: str) -> None:
        self.name, self.sizes, self._dataset, self._collate = name, sizes, dataset, collate
        self.collates = collate is not default_collate
        self._n = sum(sizes)
        self._reader: Reader[range, Batch] = Reader(self._batch, f"tracin reads {name}")
        self._rereading = _Rereading()

    def __len__(self) -> int:
        return self._n

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        with closing(self._reader.each(self.spans(start, stop))) as batches:
            yield from batches

    def close(self) -> None:
        self._reader.close()

    def take(self, rows: Sequence[int]) -> Any:
        rows = list(rows)
        many: Any = getattr(self._dataset, "__getitems__", None)
        items: list[Any]
        with reading():
            if many is not None:
                with user_code(f"the {self.name} dataset", rows):
                    items = [*many(rows)]
            else:
                items = [self._item(row) for row in rows]
            with user_code(f"the collate function of {self.name}", rows):
                return self._collate(items)

    def _batch(self, rows: range) -> Batch:
        value = self._read(rows)
        due = self.rereads and not self.collates and self._rereading.due(rows.start)
        again = self.take(rows[:1]) if due else None
        return Batch(rows, pytree.tree_map(in_pinned_memory, value) if self.pinned else value, again)

    def _read(self, rows: Sequence[int]) -> Any:
        return self.take(rows)

    def _item(self, row: int) -> Any:
        with user_code(f"the {self.name} dataset", [row]):
            return self._dataset[row]


class _LoaderRows(_DatasetRows):
    """A data loader in order, with its own batches."""

    def __init__(self, loader: DataLoader, sizes: Sequence[int], name: str) -> None:
        super().__init__(loader.dataset, sizes, loader.collate_fn, name)
        self._loader = loader
        # What such a loader does with the rows is known, so that it can be done ahead of time.
        self._plain = type(loader) is DataLoader and loader.num_workers == 0 and not loader.pin_memory

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        if self._plain:
            yield from super().batches(start, stop)
            return
        generator = self._loader.generator
        state = None if generator is None else generator.get_state()
        try:
            iterator = iter(self._loader)
            for rows in self.spans(0, stop):
                with user_code(f"the {self.name} loader", rows), reading():
                    value = self._next(iterator, rows)
                if rows.start >= start:
                    yield Batch(rows, value)
        finally:
            if generator is not None and state is not None:
                generator.set_state(state)

    def _next(self, iterator: Iterator[Any], rows: range) -> Any:
        try:
            return next(iterator)
        except StopIteration:
            raise DataError(
                f"the {self.name} loader ended at row {rows.start} of {len(self)}: its length and its batches disagree. "
                "Pass the dataset itself."
            ) from None

    def _read(self, rows: Sequence[int]) -> Any:
        many: Any = getattr(self._dataset, "__getitems__", None)
        with user_code(f"the {self.name} loader", rows), reading():
            items = [self._dataset[row] for row in rows] if many is None else many([*rows])
            return self._collate(items)


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


def rows_of(data: Any, ids: Sequence[int]) -> Any:
    """Some rows of the user's data, as data.

    Args:
        data: As a method takes it.
        ids: Positions.

    Returns:
        The rows; of a loader a loader, so that they are collated as before.
    """
    if isinstance(data, DataLoader):
        rows = Subset(data.dataset, list(ids))
        return DataLoader(rows, batch_size=data.batch_size or AUTO_ROWS, collate_fn=data.collate_fn)
    if isinstance(data, tuple | Mapping | Tensor):
        index = torch.as_tensor(list(ids), dtype=torch.int64)
        return pytree.tree_map(lambda leaf: torch.as_tensor(leaf)[index], data)
    return Subset(data, list(ids))
