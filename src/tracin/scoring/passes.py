"""Scores by passes over the data, checkpoint by checkpoint, with the queries' gradients held.

    score(z, z') = Σ_c w_c ⟨g_c(z), g_c(z')⟩            (cosines instead of products under ``normalize``)

The rates w_c are multiplied onto the held queries once per checkpoint; the train side never contains them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tracin.data import Batch
from tracin.errors import OptionError
from tracin.gradients.blocks import Block, Dense
from tracin.gradients.engine import BatchGradients
from tracin.gradients.products import concatenate, held, widened
from tracin.progress import Progress, progress
from tracin.scoring.arrivals import Arrivals
from tracin.scoring.fits import query_budget, refuse_too_large
from tracin.scoring.order import first_order, tile_spans, tile_visits
from tracin.scoring.run import Run, products, refuse_products

__all__ = [
    "HeldQueries",
    "add_scores",
    "compared",
    "first_queries",
    "hold_queries",
    "influence",
    "resident_queries",
    "same_queries",
    "score_batch",
    "self_influence",
]


@dataclass(frozen=True)
class HeldQueries:
    """Gradients of consecutive queries at one checkpoint, weighted, in the representation that the route asks for."""

    start: int
    size: int
    blocks: dict[tuple[str, ...], Block]
    weights: Tensor | None

    def nbytes(self) -> int:
        """Memory that the blocks hold."""
        return sum(block.nbytes for block in self.blocks.values())


def _norms(blocks: Mapping[tuple[str, ...], Block]) -> Tensor:
    return _squares(blocks).sqrt()


def _inverse(norms: Tensor) -> Tensor:
    """1/norm, and 0 for a zero gradient: its cosine with anything is 0."""
    return torch.where(norms > 0, 1.0 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)


def compared(run: Run, found: BatchGradients) -> Mapping[tuple[str, ...], Block]:
    """What products are taken of at the loaded checkpoint: the gradients, or their features under a projection.

    Args:
        run: The run.
        found: A batch's gradients.

    Returns:
        Blocks without any rate.
    """
    return found.blocks if run.projector is None else run.projector.blocks(found.blocks, run.index)


def _weighted(run: Run, found: BatchGradients) -> tuple[dict[tuple[str, ...], Block], Tensor]:
    """A batch's query gradients as they are held, times the rates unless ``normalize``, and their squared norms [m]."""
    blocks: Mapping[tuple[str, ...], Block] = compared(run, found)
    if run.settings.normalize:
        blocks = {names: widened(block) for names, block in blocks.items()}
    else:
        blocks = {names: block.scaled(run.rates_of(names)) for names, block in blocks.items()}
    kept = {names: held(block, len(run.train.rows)) for names, block in blocks.items()}
    return kept, _squares(kept) if kept else torch.zeros_like(found.losses)


def hold_queries(run: Run, budget: int, bar: Progress) -> Iterator[HeldQueries]:
    """The queries' gradients at the loaded checkpoint, in tiles of whole batches that fit the budget.

    Args:
        run: The run.
        budget: Bytes for one tile's blocks.
        bar: Told of finished rows.

    Yields:
        Tiles in order; at least one batch each.
    """
    parts: list[_Part] = []
    used = 0
    with _queries(run) as looks:
        for batch, value in run.batches(run.asked):
            part = _hold(run, batch, value, looks)
            if parts and used + part.nbytes > budget:
                looks.settle()
                yield _tile(parts)
                used = 0
            parts.append(part)
            used += part.nbytes
            bar.advance(batch.size)
    yield _tile(parts)


def first_queries(run: Run, start: int, budget: int) -> HeldQueries:
    """The tile of queries that begins at row ``start``, at the loaded checkpoint, as large as the budget allows."""
    parts: list[_Part] = []
    with _queries(run) as looks:
        for batch, value in run.batches(run.asked, start=start):
            part = _hold(run, batch, value, looks)
            if parts and sum(held_part.nbytes for held_part in parts) + part.nbytes > budget:
                break
            parts.append(part)
    return _tile(parts)


def same_queries(run: Run, rows: range) -> HeldQueries:
    """The queries of these rows, which are whole batches, at the loaded checkpoint."""
    batches = run.batches(run.asked, start=rows.start, stop=rows.stop)
    with _queries(run) as looks:
        parts = [_hold(run, batch, value, looks) for batch, value in batches]
    return _tile(parts)


def resident_queries(run: Run, budget: int, bar: Progress) -> Iterator[list[HeldQueries]]:
    """Hold the queries tile by tile, each at every checkpoint.

    Args:
        run: A run with queries.
        budget: Bytes for one tile at all checkpoints; the first one says how many queries fit.
        bar: Told of finished rows.

    Yields:
        A tile's gradients, checkpoint by checkpoint.
    """
    start, m = 0, len(run.asked.rows)
    while start < m:
        run.go(0)
        tiles = [first_queries(run, start, budget // len(run.trajectory))]
        rows = range(start, start + tiles[0].size)
        for index in range(1, len(run.trajectory)):
            run.go(index)
            tiles.append(same_queries(run, rows))
        bar.advance(len(rows) * len(tiles))
        yield tiles
        tiles.clear()
        start = rows.stop


@dataclass(frozen=True)
class _Part:
    """One batch of held queries."""

    batch: Batch
    blocks: dict[tuple[str, ...], Block]
    weights: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks.values())


def _queries(run: Run) -> Arrivals:
    """Where the squared norms of the queries' gradients arrive, to be looked at and forgotten."""
    return Arrivals(run.asked, f"queries, {run.where}", _forget, partial(_refuse_query, run))


def _forget(batch: Batch, squares: Tensor) -> None:
    pass


def _refuse_query(run: Run, batch: Batch, value: Any) -> Tensor:
    found = run.gradients(run.asked, batch, value)
    _, squares = _weighted(run, found)
    refuse_products(squares, found, batch, f"queries, {run.where}")
    return squares


def _squares(blocks: Mapping[tuple[str, ...], Block]) -> Tensor:
    return torch.stack([block.squared_norm() for block in blocks.values()]).sum(0)


def _hold(run: Run, batch: Batch, value: Any, looks: Arrivals) -> _Part:
    found = run.gradients(run.asked, batch, value)
    kept, squares = _weighted(run, found)
    looks.send(batch, squares, found)
    weights = None
    if run.settings.normalize:
        weights = next(iter(run.rates.values())) * _inverse(squares.sqrt())
    return _Part(batch, kept, weights)


def _tile(parts: list[_Part]) -> HeldQueries:
    """The parts as one, taken out of the list block by block, so that memory never holds all of them twice."""
    joined = {}
    for key in {key for part in parts for key in part.blocks}:
        having = next(part.blocks[key] for part in parts if key in part.blocks)
        joined[key] = concatenate(
            [
                part.blocks[key] if key in part.blocks else _zeros_like(having, part.batch.size)
                for part in parts
            ]
        )
        for part in parts:
            part.blocks.pop(key, None)
    weights = [part.weights for part in parts if part.weights is not None]
    start, size = parts[0].batch.start, sum(part.batch.size for part in parts)
    parts.clear()
    return HeldQueries(start, size, joined, torch.cat(weights) if weights else None)


def _zeros_like(block: Block, n: int) -> Block:
    some = block.rows(0, 1).materialise()
    return Dense(some.new_zeros(n, some.shape[1]))


def score_batch(run: Run, batch: Batch, value: Any, tile: HeldQueries) -> Tensor:
    """A train batch's products with a tile of queries at the loaded checkpoint, [n, m].

    Args:
        run: The run.
        batch: The batch's place.
        value: The batch.
        tile: The queries.

    Returns:
        The products, weighted, on the device.
    """
    values, found = _products(run, batch, value, tile)
    refuse_products(values, found, batch, f"train, {run.where}")
    return values


def _products(run: Run, batch: Batch, value: Any, tile: HeldQueries) -> tuple[Tensor, BatchGradients]:
    """The products of ``score_batch``, not looked at yet, and what they were made from."""
    found = run.gradients(run.train, batch, value)
    blocks, dtype = compared(run, found), run.dtype
    if tile.weights is not None:
        blocks, dtype = {names: widened(block) for names, block in blocks.items()}, torch.float64
    like = torch.empty(0, dtype=dtype, device=run.loaded.device)
    values = products(blocks, tile.blocks, batch.size, tile.size, like)
    if tile.weights is not None:
        values = (values * _inverse(_norms(blocks))[:, None] * tile.weights).to(run.dtype)
    return values, found


def influence(run: Run) -> Tensor:
    """All scores, [q, n].

    Args:
        run: A run with queries.

    Returns:
        The scores on the CPU.
    """
    n, m, c = len(run.train.rows), len(run.asked.rows), len(run.trajectory)
    with progress("influence", c * (n + m), show=run.settings.progress) as bar:
        order = first_order(run)
        refuse_too_large(run, "influence")
        values = torch.zeros(m, n, dtype=run.dtype)
        budget = query_budget(run, "influence")
        if order.name == "tiles":
            _by_tiles(run, budget, values, bar)
            return values
        for index in range(c):
            run.go(index)
            for tile in hold_queries(run, budget, bar):
                if tile.start:
                    bar.grow(n)
                add_scores(
                    run, run.batches(run.train), tile, values[tile.start : tile.start + tile.size], 0, bar
                )
                del tile  # before the next is made
    return values


def _by_tiles(run: Run, budget: int, values: Tensor, bar: Progress) -> None:
    """Tiles of train rows at all checkpoints, for each tile of queries that are held at all of them."""
    n = len(run.train.rows)
    for tiles in resident_queries(run, budget, bar):
        start, stop = tiles[0].start, tiles[0].start + tiles[0].size
        if start:
            bar.grow(n * len(tiles))
        for rows in tile_spans(run, n):
            for index, batches in tile_visits(run, rows):
                add_scores(run, batches, tiles[index], values[start:stop], 0, bar)


def add_scores(
    run: Run,
    batches: Iterator[tuple[Batch, Any]],
    tile: HeldQueries,
    values: Tensor,
    first: int,
    bar: Progress,
) -> None:
    """Add train batches' products with a tile of queries at the loaded checkpoint.

    Args:
        run: The run.
        batches: Train batches, and their values on the device.
        tile: The queries.
        values: What is added to, [m, rows] on the CPU.
        first: The train row of its first column.
        bar: Told of finished rows.
    """
    again = partial(score_batch, run, tile=tile)
    with Arrivals(run.train, f"train, {run.where}", partial(_add, values, first), again) as parts:
        for batch, value in batches:
            parts.send(batch, *_products(run, batch, value, tile))
            bar.advance(batch.size)


def self_influence(run: Run) -> Tensor:
    """score(z, z) of every train row, [n].

    Args:
        run: A run, with or without queries.

    Returns:
        The scores on the CPU.

    Raises:
        OptionError: Under ``normalize`` every score would be the sum of the rates.
    """
    if run.settings.normalize:
        raise OptionError(
            "self_influence with normalize=True is the same number for every row. Use normalize=False."
        )
    n, c = len(run.train.rows), len(run.trajectory)
    with progress("self-influence", c * n, show=run.settings.progress) as bar:
        order = first_order(run)
        refuse_too_large(run, "self_influence")
        values = torch.zeros(n, dtype=run.dtype)
        if order.name == "tiles":
            for rows in tile_spans(run, n):
                for _, batches in tile_visits(run, rows):
                    _add_own(run, batches, values, bar)
            return values
        for index in range(c):
            run.go(index)
            _add_own(run, run.batches(run.train), values, bar)
    return values


def _add_own(run: Run, batches: Iterator[tuple[Batch, Any]], values: Tensor, bar: Progress) -> None:
    """Add train batches' products with themselves at the loaded checkpoint to values [n]."""
    again = partial(_own_looked_at, run)
    with Arrivals(run.train, f"train, {run.where}", partial(_add, values, 0), again) as parts:
        for batch, value in batches:
            parts.send(batch, *_own_products(run, batch, value))
            bar.advance(batch.size)


def _add(values: Tensor, first: int, batch: Batch, part: Tensor) -> None:
    """Add a batch's numbers, [n] or [n, m], to values [..., n] that begin at row ``first``."""
    at = batch.start - first
    values[..., at : at + batch.size] += part.mT.contiguous() if part.dim() > 1 else part


def _own_products(run: Run, batch: Batch, value: Any) -> tuple[Tensor, BatchGradients]:
    """Σ_p w_p ‖g_p‖² of a batch's rows, [n], and what it was made from."""
    found = run.gradients(run.train, batch, value)
    part = torch.zeros(batch.size, dtype=run.dtype, device=run.loaded.device)
    for names, block in compared(run, found).items():
        part += _weighted_norm(block, run.rates_of(names))
    return part, found


def _own_looked_at(run: Run, batch: Batch, value: Any) -> Tensor:
    part, found = _own_products(run, batch, value)
    refuse_products(part, found, batch, f"train, {run.where}")
    return part


def _weighted_norm(block: Block, rates: tuple[float, ...]) -> Tensor:
    """Σ_p w_p ‖g_p‖² for a block whose parameters may have different rates."""
    if len(set(rates)) == 1:
        return rates[0] * block.squared_norm()
    return block.scaled([rate**0.5 for rate in rates]).squared_norm()
