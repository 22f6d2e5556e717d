"""What it costs to make a curvature and its solver ready, from its first batch: counted as ``prepare`` goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tracin.curvature import dense, ekfac, lissa, spectrum
from tracin.curvature.checks import refuse_linear
from tracin.curvature.columns import Columns, missing
from tracin.curvature.operators import VECTORS, Curvature, CurvatureRows, GaussNewton, Hessian
from tracin.curvature.solvers import (
    CurvatureOptions,
    needs_scale,
    refuse_without_factors,
    refuse_zero_damping,
)
from tracin.data import Batch, to_device
from tracin.errors import ModelError
from tracin.gradients.sites import Wiring

__all__ = ["Cost", "cost"]


@dataclass(frozen=True)
class Cost:
    """Passes over the curvature rows, seconds and bytes of ``prepare``; and the seconds of one product with one vector."""

    passes: int
    seconds: float
    nbytes: int
    product: float = 0.0


@dataclass(frozen=True)
class _Trial:
    """The first batch alone, and how many of it there are in all rows."""

    rows: CurvatureRows
    batch: Batch
    value: Any
    share: float

    @classmethod
    def of(cls, rows: CurvatureRows) -> _Trial:
        batch, value = next(rows.batches())
        once = CurvatureRows(rows.source, rows.vectors, partial(_once, rows, batch, value))
        return cls(once, batch, value, len(rows) / batch.size)

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of a pass over all rows, from a second run on the first batch."""
        run()
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * self.share

    def products(self, curvature: Curvature) -> tuple[float, float]:
        """Seconds of a product with one vector, and with one of many at once."""
        like = self.rows.vectors.tensors[0]
        k = min(VECTORS, self.rows.vectors.size)
        vectors = torch.ones(k, self.rows.vectors.size, dtype=torch.float64, device=like.device)
        one, many = (self.seconds(partial(self._product, curvature, some)) for some in (vectors[:1], vectors))
        return one, many / k

    def _product(self, curvature: Curvature, vectors: torch.Tensor) -> torch.Tensor:
        value = to_device(self.value, self.rows.source.device, copy=True)
        return curvature.on_batch(self.batch, value, vectors)


def _once(rows: CurvatureRows, batch: Batch, value: Any) -> Iterator[tuple[Batch, Any]]:
    yield batch, to_device(value, rows.source.device, copy=True)


def cost(rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions) -> Cost:
    """Count what ``prepare`` does. λ_min and the scale of lissa stop early, so their products are the most that there can be.

    Args:
        rows: The rows whose mean loss is curved.
        wiring: The layers' rules.
        options: The user's choices.

    Returns:
        The cost.
    """
    refuse_zero_damping(options)
    if options.curvature == "gauss_newton":
        refuse_linear(rows.batches, rows.source, rows.vectors)
    trial = _Trial.of(rows)
    if options.solver == "ekfac":
        return _ekfac(trial, wiring, options)
    curvature: Curvature = (Hessian if options.curvature == "hessian" else GaussNewton)(trial.rows)
    if options.solver == "exact":
        return _exact(trial, curvature, wiring, options)
    p = rows.vectors.size
    one, many = trial.products(curvature)
    passes, seconds, nbytes = 0, 0.0, 0
    if options.damping is None:
        passes, seconds, nbytes = _trace(trial, many, wiring, options)
    single = 0
    if options.curvature == "hessian":
        single += spectrum.steps_of(p, options.memory)
        nbytes = max(nbytes, 8 * p * single)
    if options.solver == "lissa" and needs_scale(options):
        single += lissa.POWER
    return Cost(passes + single, seconds + single * one, nbytes, many)


def _ekfac(trial: _Trial, wiring: Wiring, options: CurvatureOptions) -> Cost:
    refuse_without_factors(trial.rows, wiring)
    columns = Columns(trial.rows, wiring, options.samples, options.seed)
    nbytes = ekfac.refuse_too_large(columns, options.memory)
    return Cost(2, 2 * trial.seconds(partial(ekfac.covariances, columns)), nbytes)


def _exact(trial: _Trial, curvature: Curvature, wiring: Wiring, options: CurvatureOptions) -> Cost:
    p = trial.rows.vectors.size
    dense.refuse_too_large(p, options.memory)
    if options.curvature == "gauss_newton" and not missing(trial.rows, wiring):
        columns = Columns(trial.rows, wiring)
        try:
            return Cost(1, trial.seconds(partial(dense.from_columns, columns)), dense.bytes_of(p))
        except ModelError:
            pass  # as prepare, which says so: column by column then
    _, many = trial.products(curvature)
    return Cost(-(-p // dense.COLUMNS), many * p, dense.bytes_of(p))


def _trace(
    trial: _Trial, product: float, wiring: Wiring, options: CurvatureOptions
) -> tuple[int, float, int]:
    """Passes, seconds and bytes of the trace."""
    if options.curvature == "gauss_newton" and not missing(trial.rows, wiring):
        columns = Columns(trial.rows, wiring)
        try:
            return 1, trial.seconds(columns.trace), 0
        except ModelError:
            pass  # as prepare, which says so: estimated then
    p = trial.rows.vectors.size
    at_once = spectrum.probes_at_once(p, options.memory)
    passes = -(-spectrum.PROBES // at_once)
    return passes, spectrum.PROBES * product, 4 * 8 * p * at_once
