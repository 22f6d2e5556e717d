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
from tracin.options import whole_number
from tracin.progress import progress
from tracin.scoring.passes import HeldQueries, first_queries, same_queries, score_batch
from tracin.scoring.run import Run
from tracin.shapes import Bool, Int

__all__ = ["Lists", "Strongest", "Within", "check_k", "merge", "top_k"]


@dataclass(frozen=True)
class Lists:
    """Values and ids of the k largest so far, best first, [q, k]."""

    values: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Within:
    """Lists within a class: the class that each query's lists hold, and the class of each train row."""

    wanted: Int[Tensor, " q"]
    labels: Int[Tensor, " n"]

    def outside(self, queries: slice, rows: Tensor) -> Bool[Tensor, "q tile"]:
        """Which of these rows may not stand in the lists of these queries.

        Args:
            queries: Consecutive queries.
            rows: Ids of train rows [tile].

        Returns:
            True where the classes differ.
        """
        return self.wanted[queries, None] != self.labels[rows][None, :]


class Strongest:
    """The k largest and the k smallest scores of some queries, tile by tile of train rows.

    Args:
        k: List length.
        queries: Which queries they are.
        within: Lists within a class; None: all rows.
    """

    def __init__(self, k: int, queries: slice, within: Within | None) -> None:
        self._k, self._queries, self._within = k, queries, within
        self._high: Lists | None = None
        self._low: Lists | None = None

    def add(self, values: Tensor, ids: Tensor) -> None:
        """Enter a tile.

        Args:
            values: Scores [q, tile], on the CPU.
            ids: The tile's rows, increasing, and higher than those of the tiles before.
        """
        up, down = values, -values
        if self._within is not None:
            out = self._within.outside(self._queries, ids)
            up, down = up.masked_fill(out, -torch.inf), down.masked_fill(out, -torch.inf)
        self._high, self._low = merge(self._high, up, ids, self._k), merge(self._low, down, ids, self._k)

    def lists(self) -> tuple[Lists, Lists]:
        """Proponents and opponents, signs kept.

        Returns:
            The two lists.

        Raises:
            RuntimeError: No tile was entered.
        """
        if self._high is None or self._low is None:
            raise RuntimeError("no train rows were read")
        return self._high, Lists(-self._low.values, self._low.ids)


def check_k(k: int, n: int) -> None:
    """Refuse a k outside 1..n.

    Args:
        k: List length.
        n: Train rows.
    """
    whole_number(k, "k", 1, n, why=", the number of train rows")


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
    run: Run, k: int, within: Within | None = None, resident: Iterable[list[HeldQueries]] | None = None
) -> tuple[Lists, Lists]:
    """Proponents (largest) and opponents (smallest) of every query.

    Args:
        run: A run with queries.
        k: List length.
        within: Lists within a class; of all train rows unless given.
        resident: The queries tile by tile, each at every checkpoint; their gradients unless given.

    Returns:
        Proponents and opponents, signs kept.
    """
    n = len(run.train.rows)
    check_k(k, n)
    held = _resident(run, run.settings.memory // 2) if resident is None else resident
    done = [_scan(run, tile, k, within) for tile in held]
    high = Lists(torch.cat([lists.values for lists, _ in done]), torch.cat([lists.ids for lists, _ in done]))
    low = Lists(torch.cat([lists.values for _, lists in done]), torch.cat([lists.ids for _, lists in done]))
    return high, low


def _scan(run: Run, resident: list[HeldQueries], k: int, within: Within | None) -> tuple[Lists, Lists]:
    m, start = resident[0].size, resident[0].start
    n = len(run.train.rows)
    rows = max(*run.train.rows.sizes, min(n, run.settings.memory // 16 // (m * 8)))
    strongest = Strongest(k, slice(start, start + m), within)
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
            strongest.add(values, torch.arange(first, first + size))
    return strongest.lists()
