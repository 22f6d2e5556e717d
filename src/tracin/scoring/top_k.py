"""The k strongest proponents and opponents of every query without the matrix of all scores.

Train rows are the outer loop, in tiles; for each tile the scores of all checkpoints are summed, then merged into the
lists. So the lists are exact over the sum, and memory holds the queries' gradients at all checkpoints, one tile of
scores and the lists: nothing grows with the number of train rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.data import Batch, to_device
from tracin.errors import OptionError
from tracin.progress import progress
from tracin.scoring.passes import HeldQueries, first_queries, same_queries, score_batch
from tracin.scoring.run import Run

__all__ = ["Lists", "check_k", "merge", "top_k"]


@dataclass(frozen=True)
class Lists:
    """Values and ids of the k largest so far, best first, [q, k]."""

    values: Tensor
    ids: Tensor


def check_k(k: int, n: int) -> None:
    """Refuse a k outside 1..n.

    Args:
        k: List length.
        n: Train rows.

    Raises:
        OptionError: With the range.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise OptionError(f"k is {k!r}: give a whole number from 1 to the number of train rows, {n}.")


def merge(lists: Lists | None, values: Tensor, ids: Tensor, k: int) -> Lists:
    """Merge a tile into the k largest; among equal values the lower id stays.

    Args:
        lists: The lists so far, of lower ids than the tile's; None at the start.
        values: The tile's values [q, tile].
        ids: The tile's ids [tile], increasing.
        k: List length.

    Returns:
        The k largest of both, by descending value and, among equals, ascending id.

    Example:
        >>> merge(None, torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0, 1, 2]), 2).ids
        tensor([[1, 2]])
    """
    best, at = _largest(values, min(k, values.shape[1]))
    found = ids[at]
    if lists is not None:
        best, found = torch.cat([lists.values, best], 1), torch.cat([lists.ids, found], 1)
    order = torch.sort(best, dim=1, descending=True, stable=True).indices[:, :k]
    return Lists(best.gather(1, order), found.gather(1, order))


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their positions; equal values by position."""
    best, at = torch.topk(values, k, dim=1)
    ties = (values >= best[:, -1:]).sum(1) > k
    if bool(ties.any()):
        order = torch.sort(values[ties], dim=1, descending=True, stable=True).indices[:, :k]
        at[ties], best[ties] = order, values[ties].gather(1, order)
    at, order = at.sort(1)
    best = best.gather(1, order)
    order = torch.sort(best, dim=1, descending=True, stable=True).indices
    return best.gather(1, order), at.gather(1, order)


def _train_tiles(run: Run, rows: int) -> Iterator[list[Batch]]:
    """Consecutive batches of about ``rows`` rows, kept on the CPU so that every checkpoint can read them."""
    tile: list[Batch] = []
    for batch in run.train.rows.batches():
        tile.append(batch)
        if sum(b.size for b in tile) >= rows:
            yield tile
            tile = []
    if tile:
        yield tile


def _resident(run: Run, budget: int) -> Iterator[list[HeldQueries]]:
    """Hold the queries tile by tile, each at every checkpoint.

    Args:
        run: A run with queries.
        budget: Bytes for one tile at all checkpoints; the first one says how many queries fit.

    Yields:
        A tile's gradients, checkpoint by checkpoint.
    """
    start, m = 0, len(run.asked.rows)
    while start < m:
        run.load(0)
        tile = first_queries(run, start, budget // len(run.trajectory))
        rows = range(start, start + tile.size)
        tiles = [tile]
        for index in range(1, len(run.trajectory)):
            run.load(index)
            tiles.append(same_queries(run, rows))
        yield tiles
        start = rows.stop


def top_k(
    run: Run, k: int, allowed: Tensor | None = None, resident: Iterable[list[HeldQueries]] | None = None
) -> tuple[Lists, Lists]:
    """Proponents (largest) and opponents (smallest) of every query.

    Args:
        run: A run with queries.
        k: List length.
        allowed: Which train rows may stand in a query's lists, bool [q, n]; all unless given.
        resident: The queries tile by tile, each at every checkpoint; their gradients unless given.

    Returns:
        Proponents and opponents, signs kept.

    Raises:
        OptionError: k is out of range.
    """
    n = len(run.train.rows)
    check_k(k, n)
    held = _resident(run, run.settings.memory // 2) if resident is None else resident
    done = [_scan(run, tile, k, allowed) for tile in held]
    high = Lists(torch.cat([lists.values for lists, _ in done]), torch.cat([lists.ids for lists, _ in done]))
    low = Lists(torch.cat([lists.values for _, lists in done]), torch.cat([lists.ids for _, lists in done]))
    return high, low


def _scan(run: Run, resident: list[HeldQueries], k: int, allowed: Tensor | None) -> tuple[Lists, Lists]:
    m, start = resident[0].size, resident[0].start
    n = len(run.train.rows)
    rows = max(*run.train.rows.sizes, min(n, run.settings.memory // 16 // (m * 8)))
    high: Lists | None = None
    low: Lists | None = None
    with progress("top-k", n * len(resident), show=run.settings.progress) as bar:
        for tile in _train_tiles(run, rows):
            first, size = tile[0].start, sum(batch.size for batch in tile)
            values = torch.zeros(m, size, dtype=run.dtype)
            for index, queries in enumerate(resident):
                run.load(index)
                for batch in tile:
                    run.check_unchanged(run.train, batch)
                    part = score_batch(
                        run, batch, to_device(batch.value, run.loaded.device, copy=True), queries
                    )
                    values[:, batch.start - first : batch.start - first + batch.size] += part.mT.cpu()
                    bar.advance(batch.size)
            ids = torch.arange(first, first + size)
            if allowed is None:
                high, low = merge(high, values, ids, k), merge(low, -values, ids, k)
            else:
                out = ~allowed[start : start + m, first : first + size]
                high = merge(high, values.masked_fill(out, -torch.inf), ids, k)
                low = merge(low, (-values).masked_fill(out, -torch.inf), ids, k)
    if high is None or low is None:
        raise RuntimeError("no train rows were read")
    return high, Lists(-low.values, low.ids)
