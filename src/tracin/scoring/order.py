"""In which order checkpoints and rows are visited, so that the user's code makes the rows as few times as memory allows.

Scores are sums over checkpoints, and the order of the loops does not change them:

    tensors       for each checkpoint, all rows; rows in memory are only sliced
    kept          the same; rows that the dataset made are kept for the checkpoints after
    tiles         for each tile of rows, all checkpoints, whose parameters stay in memory beside the queries' gradients
    checkpoints   for each checkpoint, all rows, made anew by the dataset and compared with the pass before

The choice goes by sizes alone. Of the memory allowed, rows that are kept or in a tile take a quarter or an eighth, the
checkpoints' parameters an eighth, held gradients of queries a half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tracin.data import Batch, to_device
from tracin.scoring import kept
from tracin.scoring.run import Run

__all__ = ["Order", "first_order", "order_for", "order_of", "tile_spans", "tile_visits"]

# Shares of the memory allowed, as divisors; those of kept rows and parameters stand in ``kept``.
TILE, QUERIES = 8, 2


@dataclass(frozen=True)
class Order:
    """How the rows are visited.

    Attributes:
        name: ``"tensors"``, ``"kept"``, ``"tiles"`` or ``"checkpoints"``.
        decoded_passes: How often the user's code makes every train row.
        query_tiles: Into how many tiles the queries are cut, at each checkpoint or at all of them together.
    """

    name: Literal["tensors", "kept", "tiles", "checkpoints"]
    decoded_passes: int
    query_tiles: int


def order_of(*, decoded: int, state: int, held: int, checkpoints: int, memory: int) -> Order:
    """The order that makes the rows the fewest times within the memory.

    Args:
        decoded: Bytes of all train rows as the user's code makes them; 0 for tensors in memory.
        state: Bytes of one checkpoint's parameters and buffers.
        held: Bytes of the queries' gradients at one checkpoint; 0 where there are no queries.
        checkpoints: Their number.
        memory: Bytes allowed.

    Returns:
        The order. The count of query tiles is exact where tiles hold many batches.

    Example:
        >>> order_of(decoded=10 << 30, state=1 << 20, held=1 << 20, checkpoints=3, memory=2 << 30)
        Order(name='tiles', decoded_passes=1, query_tiles=1)
    """
    share = max(1, memory // QUERIES)
    tiles = max(1, -(-held // share))
    if not decoded:
        return Order("tensors", 0, tiles)
    if (checkpoints > 1 or tiles > 1) and decoded <= memory // kept.ALL_ROWS:
        return Order("kept", 1, tiles)
    if checkpoints > 1 and checkpoints * state <= memory // kept.PARAMETERS:
        together = max(1, -(-checkpoints * held // share))
        return Order("tiles", together, together)
    return Order("checkpoints", checkpoints * tiles, tiles)


def order_for(run: Run, held: int = 0) -> Order:
    """The order of a run whose first checkpoint is loaded.

    Args:
        run: The run.
        held: Bytes of the queries' gradients at one checkpoint.

    Returns:
        The order.
    """
    rows, each = run.train.rows, run.row_bytes
    unknown = run.settings.memory + 1  # rows whose size cannot be told are not kept
    decoded = unknown if each is None else max(1, each * len(rows))
    return order_of(
        decoded=decoded if rows.decodes else 0,
        state=run.loaded.nbytes(),
        held=held,
        checkpoints=len(run.trajectory),
        memory=run.settings.memory,
    )


def first_order(run: Run) -> Order:
    """Load the first checkpoint and choose; the run then keeps rows or parameters as the order asks.

    Args:
        run: A run before its first checkpoint.

    Returns:
        The order.
    """
    if run.train.rows.decodes:
        run.stay_resident()
    run.go(0)
    order = order_for(run)
    if order.name != "tiles":
        run.resident = False
        run.loaded.forget()
    if order.name != "kept":
        run.forget_rows(run.train)
    return order


def tile_spans(run: Run, most: int) -> list[range]:
    """The train rows in tiles of whole batches.

    Args:
        run: A run whose first checkpoint is loaded.
        most: Rows in a tile, if a batch has no more; decoded rows of a tile also stay within their share of the memory,
            and are a batch where their size cannot be told.

    Returns:
        The tiles.
    """
    rows = run.train.rows
    if rows.decodes:
        most = (
            min(most, run.settings.memory // TILE // max(1, run.row_bytes))
            if run.row_bytes is not None
            else 1
        )
    out: list[range] = []
    for batch in rows.spans():
        if out and batch.stop - out[-1].start <= most:
            out[-1] = range(out[-1].start, batch.stop)
        else:
            out.append(batch)
    return out


def tile_visits(run: Run, tile: range) -> Iterator[tuple[int, Iterator[tuple[Batch, Any]]]]:
    """All checkpoints on one tile of train rows, which the user's code makes once.

    Args:
        run: The run.
        tile: Rows, in whole batches.

    Yields:
        The index of a checkpoint, which is loaded, and the tile's batches with their values on the device.
    """
    made: list[Batch] = []
    for index in range(len(run.trajectory)):
        run.go(index)
        yield index, _values(run, tile, made, first=index == 0)


def _values(run: Run, tile: range, made: list[Batch], *, first: bool) -> Iterator[tuple[Batch, Any]]:
    decodes = run.train.rows.decodes
    for batch in run.read(run.train, start=tile.start, stop=tile.stop) if first or not decodes else made:
        if first and decodes:
            made.append(batch)
        yield batch, to_device(batch.value, run.loaded.device, copy=decodes)
