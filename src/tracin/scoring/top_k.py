"""The k strongest proponents and opponents of every query without the matrix of all scores.

Train rows are the outer loop, in tiles; for each tile the scores of all checkpoints are summed, then merged into the
lists. So the lists are exact over the sum, and memory holds the queries' gradients at all checkpoints, one tile of
scores and the lists: nothing grows with the number of train rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.options import whole_number
from tracin.progress import Progress, progress
from tracin.scoring.fits import query_budget, refuse_too_large
from tracin.scoring.order import tile_spans, tile_visits
from tracin.scoring.passes import HeldQueries, add_scores, resident_queries
from tracin.scoring.run import Run
from tracin.shapes import Bool, Int

# Of the memory allowed, the share of a tile's scores; merging it into the lists takes as much again.
SCORES = 32

__all__ = ["Lists", "Strongest", "Within", "check_k", "merge", "most_rows", "top_k"]


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
    c, asked = len(run.trajectory), len(run.asked.rows)
    run.stay_resident()
    run.go(0)
    refuse_too_large(run, "top_k", k)
    high, low = _Stack(), _Stack()
    with progress("top-k", c * (n + (asked if resident is None else 0)), show=run.settings.progress) as bar:
        tiles = resident_queries(run, query_budget(run, "top_k", k), bar) if resident is None else resident
        for tile in tiles:
            if tile[0].start:
                bar.grow(c * n)
            if tile[0].size == asked:
                run.forget_rows(run.train)  # one pass over the rows is all
            for stack, lists in zip((high, low), _scan(run, tile, k, within, bar), strict=True):
                stack.append(lists)
            del tile  # before the next is made
    return high.joined(), low.joined()


class _Stack(list[Lists]):
    """The lists of consecutive queries."""

    def joined(self) -> Lists:
        return Lists(torch.cat([lists.values for lists in self]), torch.cat([lists.ids for lists in self]))


def most_rows(run: Run, m: int) -> int:
    """Train rows of a tile of scores.

    Args:
        run: The run.
        m: Queries of the tile.

    Returns:
        How many fit into their share of the memory; a tile has a batch at the least.
    """
    return run.settings.memory // SCORES // (m * run.dtype.itemsize)


def _scan(
    run: Run, resident: list[HeldQueries], k: int, within: Within | None, bar: Progress
) -> tuple[Lists, Lists]:
    """One pass over the train rows, each tile of them at all checkpoints."""
    m, start = resident[0].size, resident[0].start
    strongest = Strongest(k, slice(start, start + m), within)
    for tile in tile_spans(run, most_rows(run, m)):
        values = torch.zeros(m, len(tile), dtype=run.dtype)
        for index, batches in tile_visits(run, tile):
            add_scores(run, batches, resident[index], values, tile.start, bar)
        strongest.add(values, torch.arange(tile.start, tile.stop))
    return strongest.lists()
