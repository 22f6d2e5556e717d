"""Scores with a curvature between the gradients: the queries are solved with once, the train side stays as it is.

score(z, z') = ⟨g(z), (C + λI)⁻¹ g(z')⟩
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tracin.curvature.ekfac import EkfacSolver
from tracin.curvature.solvers import Prepared
from tracin.curvature.vectors import Vectors
from tracin.data import Batch
from tracin.errors import NotFiniteError
from tracin.gradients.engine import BatchGradients, name_not_finite
from tracin.progress import progress
from tracin.scoring.passes import HeldQueries, score_batch
from tracin.scoring.run import Run, refuse_products

__all__ = ["influence", "rows_at_once", "self_influence", "solved_queries", "tiles_of"]


def rows_at_once(run: Run, copies: int, vectors: Vectors) -> int:
    """Right-hand sides whose solution fits a quarter of the memory.

    Args:
        run: The run.
        copies: Vectors of float64 that the solver holds per right-hand side.
        vectors: Where parameters stand in a flat vector.

    Returns:
        Their number, at least 1.
    """
    per_row = vectors.size * (8 * copies + run.dtype.itemsize)
    return max(1, run.settings.memory // 4 // per_row)


def tiles_of(sizes: Iterable[int], rows: int) -> int:
    """How many tiles ``solved_queries`` makes of batches of these sizes.

    Args:
        sizes: Rows of the batches in order.
        rows: Right-hand sides at once.

    Returns:
        Tiles.
    """
    tiles, held = 1, 0
    for size in sizes:
        for start in range(0, size, rows):
            piece = min(rows, size - start)
            if held and held + piece > rows:
                tiles, held = tiles + 1, 0
            held += piece
    return tiles


def _pieces(
    run: Run, vectors: Vectors, found: BatchGradients, batch: Batch, rows: int, name: str
) -> Iterator[tuple[int, Tensor]]:
    """A batch's gradients as flat vectors, some rows at a time: where they start in the batch, and [rows, p]."""
    for start in range(0, batch.size, rows):
        flat = vectors.joined(found.blocks, start, min(start + rows, batch.size), run.dtype)
        if not bool(torch.isfinite(flat).all()):
            name_not_finite(found.blocks, batch, f"{name}, {run.where}")
        yield start, flat


def solved_queries(run: Run, prepared: Prepared, vectors: Vectors) -> Iterator[HeldQueries]:
    """(C + λI)⁻¹ g of the queries, in tiles that fit the memory.

    Args:
        run: A run with queries, at its checkpoint.
        prepared: The solver.
        vectors: Where parameters stand in a flat vector.

    Yields:
        Tiles in order.
    """
    rows = rows_at_once(run, prepared.copies, vectors)
    held: list[Tensor] = []
    start = 0
    for batch, value in run.batches(run.asked):
        found = run.gradients(run.asked, batch, value)
        for _, flat in _pieces(run, vectors, found, batch, rows, "queries"):
            if held and sum(len(part) for part in held) + len(flat) > rows:
                tile = _solved(run, prepared, vectors, torch.cat(held), start)
                start, held = start + tile.size, []
                yield tile
            held.append(flat)
    yield _solved(run, prepared, vectors, torch.cat(held), start)


def _solved(run: Run, prepared: Prepared, vectors: Vectors, flat: Tensor, start: int) -> HeldQueries:
    solution = prepared.solver.solve(flat)
    if not bool(torch.isfinite(solution).all()):
        row = start + int((~torch.isfinite(solution)).any(1).nonzero()[0])
        raise NotFiniteError(
            f"the solution for query row {row} is not finite ({run.where}). Raise damping= (now {prepared.solver.damping:.3g})."
        )
    return HeldQueries(start, len(flat), vectors.blocks(solution, run.keys.fused, run.dtype), None)


def influence(run: Run, prepared: Prepared, vectors: Vectors) -> Tensor:
    """All scores, [q, n].

    Args:
        run: A run with queries, at its checkpoint.
        prepared: The solver.
        vectors: Where parameters stand in a flat vector.

    Returns:
        The scores on the CPU.
    """
    n, m = len(run.train.rows), len(run.asked.rows)
    values = torch.zeros(n, m, dtype=run.dtype)
    with progress("influence", n + m, show=run.settings.progress) as bar:
        for tile in solved_queries(run, prepared, vectors):
            bar.advance(tile.size)
            if tile.start:
                bar.grow(n)
            for batch, value in run.batches(run.train):
                part = score_batch(run, batch, value, tile)
                here = values[batch.start : batch.start + batch.size]
                here[:, tile.start : tile.start + tile.size] = part.cpu()
                bar.advance(batch.size)
    return values.mT.contiguous()


def self_influence(run: Run, prepared: Prepared, vectors: Vectors) -> Tensor:
    """g(z)ᵀ (C + λI)⁻¹ g(z) of every train row, [n].

    Args:
        run: A run at its checkpoint.
        prepared: The solver.
        vectors: Where parameters stand in a flat vector.

    Returns:
        The scores on the CPU.
    """
    values = torch.zeros(len(run.train.rows), dtype=run.dtype)
    rows = rows_at_once(run, prepared.copies, vectors)
    with progress("self-influence", len(values), show=run.settings.progress) as bar:
        for batch, value in run.batches(run.train):
            found = run.gradients(run.train, batch, value)
            part = _quadratic(run, prepared, vectors, found, batch, rows).to(run.dtype)
            refuse_products(part, found, batch, f"train, {run.where}")
            values[batch.start : batch.start + batch.size] = part.cpu()
            bar.advance(batch.size)
    return values


def _quadratic(
    run: Run, prepared: Prepared, vectors: Vectors, found: BatchGradients, batch: Batch, rows: int
) -> Tensor:
    """gᵀ (C + λI)⁻¹ g of a batch; EKFAC rotates factors where it can, so that nothing is multiplied out twice."""
    if isinstance(prepared.solver, EkfacSolver):
        return prepared.solver.quadratic_of(found.blocks, batch.size)
    pieces = _pieces(run, vectors, found, batch, rows, "train")
    return torch.cat([prepared.solver.quadratic(flat) for _, flat in pieces])
