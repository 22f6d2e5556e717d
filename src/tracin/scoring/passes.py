"""Scores by passes over the data, checkpoint by checkpoint, with the queries' gradients held.

    score(z, z') = Σ_c w_c ⟨g_c(z), g_c(z')⟩            (cosines instead of products under ``normalize``)

The rates w_c are multiplied onto the held queries once per checkpoint; the train side never contains them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracin.data import Batch
from tracin.errors import OptionError
from tracin.gradients.blocks import Block, Dense
from tracin.gradients.engine import BatchGradients
from tracin.gradients.products import concatenate, held, widened
from tracin.progress import Progress, progress
from tracin.scoring.run import Run, products, refuse_products

__all__ = [
    "HeldQueries",
    "compared",
    "first_queries",
    "hold_queries",
    "influence",
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
    return torch.stack([block.squared_norm() for block in blocks.values()]).sum(0).sqrt()


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


def _weighted(
    run: Run, blocks: Mapping[tuple[str, ...], Block]
) -> tuple[dict[tuple[str, ...], Block], Tensor | None]:
    if run.settings.normalize:
        wide = {names: widened(block) for names, block in blocks.items()}
        return wide, next(iter(run.rates.values())) * _inverse(_norms(wide))
    return {names: block.scaled(run.rates_of(names)) for names, block in blocks.items()}, None


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
    for batch, value in run.batches(run.asked):
        part = _hold(run, batch, value)
        if parts and used + part.nbytes > budget:
            yield _tile(parts)
            parts, used = [], 0
        parts.append(part)
        used += part.nbytes
        bar.advance(batch.size)
    yield _tile(parts)


def first_queries(run: Run, start: int, budget: int) -> HeldQueries:
    """The tile of queries that begins at row ``start``, at the loaded checkpoint, as large as the budget allows."""
    parts: list[_Part] = []
    for batch, value in run.batches(run.asked, start=start):
        part = _hold(run, batch, value)
        if parts and sum(held_part.nbytes for held_part in parts) + part.nbytes > budget:
            break
        parts.append(part)
    return _tile(parts)


def same_queries(run: Run, rows: range) -> HeldQueries:
    """The queries of these rows, which are whole batches, at the loaded checkpoint."""
    batches = run.batches(run.asked, start=rows.start, stop=rows.stop)
    return _tile([_hold(run, batch, value) for batch, value in batches])


@dataclass(frozen=True)
class _Part:
    """One batch of held queries."""

    batch: Batch
    blocks: dict[tuple[str, ...], Block]
    weights: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks.values())


def _hold(run: Run, batch: Batch, value: Any) -> _Part:
    found = run.gradients(run.asked, batch, value)
    plain = compared(run, found)
    _refuse_infinite(run, plain, found, batch)
    blocks, weights = _weighted(run, plain)
    kept = {names: held(block, len(run.train.rows)) for names, block in blocks.items()}
    return _Part(batch, kept, weights)


def _refuse_infinite(
    run: Run, blocks: Mapping[tuple[str, ...], Block], found: BatchGradients, batch: Batch
) -> None:
    squares = [block.squared_norm() for block in blocks.values()]
    if squares:
        refuse_products(torch.stack(squares).sum(0), found, batch, f"queries, {run.where}")


def _tile(parts: Sequence[_Part]) -> HeldQueries:
    joined = {}
    for key in {key for part in parts for key in part.blocks}:
        having = next(part.blocks[key] for part in parts if key in part.blocks)
        joined[key] = concatenate(
            [
                part.blocks[key] if key in part.blocks else _zeros_like(having, part.batch.size)
                for part in parts
            ]
        )
    weights = [part.weights for part in parts if part.weights is not None]
    size = sum(part.batch.size for part in parts)
    return HeldQueries(parts[0].batch.start, size, joined, torch.cat(weights) if weights else None)


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
    found = run.gradients(run.train, batch, value)
    blocks, dtype = compared(run, found), run.dtype
    if tile.weights is not None:
        blocks, dtype = {names: widened(block) for names, block in blocks.items()}, torch.float64
    like = torch.empty(0, dtype=dtype, device=run.loaded.device)
    values = products(blocks, tile.blocks, batch.size, tile.size, like)
    if tile.weights is not None:
        values = (values * _inverse(_norms(blocks))[:, None] * tile.weights).to(run.dtype)
    refuse_products(values, found, batch, f"train, {run.where}")
    return values


def influence(run: Run) -> Tensor:
    """All scores, [q, n].

    Args:
        run: A run with queries.

    Returns:
        The scores on the CPU.
    """
    n, m, c = len(run.train.rows), len(run.asked.rows), len(run.trajectory)
    values = torch.zeros(n, m, dtype=run.dtype)  # rows of a batch side by side while they are written
    with progress("influence", c * (n + m), show=run.settings.progress) as bar:
        for index in range(c):
            run.load(index)
            for tile in hold_queries(run, run.settings.memory // 2, bar):
                if tile.start:
                    bar.grow(n)
                for batch, value in run.batches(run.train):
                    part = score_batch(run, batch, value, tile)
                    here = values[batch.start : batch.start + batch.size]
                    here[:, tile.start : tile.start + tile.size] += part.cpu()
                    bar.advance(batch.size)
    return values.mT.contiguous()


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
    values = torch.zeros(n, dtype=run.dtype)
    with progress("self-influence", c * n, show=run.settings.progress) as bar:
        for index in range(c):
            run.load(index)
            for batch, value in run.batches(run.train):
                found = run.gradients(run.train, batch, value)
                part = torch.zeros(batch.size, dtype=run.dtype, device=run.loaded.device)
                for names, block in compared(run, found).items():
                    part += _weighted_norm(block, run.rates_of(names))
                refuse_products(part, found, batch, f"train, {run.where}")
                values[batch.start : batch.start + batch.size] += part.cpu()
                bar.advance(batch.size)
    return values


def _weighted_norm(block: Block, rates: tuple[float, ...]) -> Tensor:
    """Σ_p w_p ‖g_p‖² for a block whose parameters may have different rates."""
    if len(set(rates)) == 1:
        return rates[0] * block.squared_norm()
    return block.scaled([rate**0.5 for rate in rates]).squared_norm()
