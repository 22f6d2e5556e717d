"""Scores by passes over the data, checkpoint by checkpoint, with the queries' gradients held.

    score(z, z') = Σ_c w_c ⟨g_c(z), g_c(z')⟩            (cosines instead of products under ``normalize``)

The rates w_c are multiplied onto the held queries once per checkpoint; the train side never contains them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracin.data import Batch
from tracin.errors import OptionError
from tracin.gradients.blocks import Block, concatenate, held
from tracin.gradients.engine import BatchGradients
from tracin.progress import Progress, progress
from tracin.scoring.run import Run, products, refuse_products

__all__ = ["HeldQueries", "hold_queries", "influence", "score_batch", "self_influence"]


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


def _norms(found: BatchGradients) -> Tensor:
    return torch.stack([block.squared_norm() for block in found.blocks.values()]).sum(0).sqrt()


def _inverse(norms: Tensor) -> Tensor:
    """1/norm, and 0 for a zero gradient: its cosine with anything is 0."""
    return torch.where(norms > 0, 1.0 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)


def _weighted(run: Run, found: BatchGradients) -> tuple[dict[tuple[str, ...], Block], Tensor | None]:
    if run.settings.normalize:
        return dict(found.blocks), next(iter(run.rates.values())) * _inverse(_norms(found))
    return {names: block.scaled(run.rates_of(names)) for names, block in found.blocks.items()}, None


def hold_queries(run: Run, budget: int, bar: Progress) -> Iterator[HeldQueries]:
    """The queries' gradients at the loaded checkpoint, in tiles of whole batches that fit the budget.

    Args:
        run: The run.
        budget: Bytes for one tile's blocks.
        bar: Told of finished rows.

    Yields:
        Tiles in order; at least one batch each.
    """
    source = run.queries
    if source is None:
        raise RuntimeError("this run has no queries")
    n = len(run.train.rows)
    parts: list[tuple[Batch, dict[tuple[str, ...], Block], Tensor | None]] = []
    used = 0
    for batch, value in run.batches(source):
        found = run.gradients(source, batch, value)
        _refuse_infinite(run, found, batch)
        blocks, weights = _weighted(run, found)
        kept = {names: held(block, n) for names, block in blocks.items()}
        size = sum(block.nbytes for block in kept.values())
        if parts and used + size > budget:
            yield _tile(parts)
            parts, used = [], 0
        parts.append((batch, kept, weights))
        used += size
        bar.advance(batch.size)
    yield _tile(parts)


def _refuse_infinite(run: Run, found: BatchGradients, batch: Batch) -> None:
    squares = [block.squared_norm() for block in found.blocks.values()]
    if squares:
        refuse_products(torch.stack(squares).sum(0), found, batch, f"queries, {run.where}")


def _tile(parts: Sequence[tuple[Batch, dict[tuple[str, ...], Block], Tensor | None]]) -> HeldQueries:
    names = {key for _, blocks, _ in parts for key in blocks}
    joined = {}
    for key in names:
        having = next(blocks[key] for _, blocks, _ in parts if key in blocks)
        joined[key] = concatenate(
            [blocks[key] if key in blocks else _zeros_like(having, batch.size) for batch, blocks, _ in parts]
        )
    weights = [weight for _, _, weight in parts if weight is not None]
    start = parts[0][0].start
    return HeldQueries(start, sum(batch.size for batch, _, _ in parts), joined, torch.cat(weights) if weights else None)


def _zeros_like(block: Block, n: int) -> Block:
    from tracin.gradients.blocks import Dense

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
    like = torch.empty(0, dtype=run.dtype, device=run.loaded.device)
    values = products(found.blocks, tile.blocks, batch.size, tile.size, like)
    if tile.weights is not None:
        values = values * tile.weights * _inverse(_norms(found))[:, None]
    refuse_products(values, found, batch, f"train, {run.where}")
    return values


def influence(run: Run) -> Tensor:
    """All scores, [q, n].

    Args:
        run: A run with queries.

    Returns:
        The scores on the CPU.
    """
    if run.queries is None:
        raise RuntimeError("influence needs queries")
    n, m, c = len(run.train.rows), len(run.queries.rows), len(run.trajectory)
    values = torch.zeros(m, n, dtype=run.dtype)
    with progress("influence", c * (n + m), show=run.settings.progress) as bar:
        for index in range(c):
            run.load(index)
            for tile in hold_queries(run, run.settings.memory // 2, bar):
                if tile.start:
                    bar.grow(n)
                for batch, value in run.batches(run.train):
                    part = score_batch(run, batch, value, tile)
                    values[tile.start : tile.start + tile.size, batch.start : batch.start + batch.size] += part.mT.cpu()
                    bar.advance(batch.size)
    return values


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
        raise OptionError("self_influence with normalize=True is the same number for every row. Use normalize=False.")
    n, c = len(run.train.rows), len(run.trajectory)
    values = torch.zeros(n, dtype=run.dtype)
    with progress("self-influence", c * n, show=run.settings.progress) as bar:
        for index in range(c):
            run.load(index)
            for batch, value in run.batches(run.train):
                found = run.gradients(run.train, batch, value)
                part = torch.zeros(batch.size, dtype=run.dtype, device=run.loaded.device)
                for names, block in found.blocks.items():
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
