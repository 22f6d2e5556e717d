"""A damped curvature that can be solved with: damping chosen or checked, one of four solvers made ready."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tracin.curvature import dense, ekfac, spectrum
from tracin.curvature.cg import ConjugateGradients
from tracin.curvature.columns import Columns, missing
from tracin.curvature.lissa import Lissa, Minibatches
from tracin.curvature.operators import Curvature, CurvatureRows, GaussNewton, Hessian, product
from tracin.errors import ModelError, OptionError
from tracin.gradients.sites import Wiring
from tracin.shapes import Float

__all__ = ["CURVATURES", "SOLVERS", "CurvatureOptions", "Prepared", "Solver", "prepare"]

logger = logging.getLogger("tracin")

CURVATURES = ("gauss_newton", "hessian")
SOLVERS = ("exact", "cg", "lissa", "ekfac")
# Default damping: this share of the mean eigenvalue (Grosse et al. 2023, §3.1).
SHARE = 0.1
# LiSSA takes about scale / damping steps: its default damping keeps them to thousands.
LISSA_SHARE = 1e-3


@dataclass(frozen=True)
class CurvatureOptions:
    """What the user chose; None: the solver's own default."""

    curvature: str = "gauss_newton"
    solver: str = "exact"
    damping: float | None = None
    tolerance: float | None = None
    iterations: int | None = None
    scale: float | None = None
    samples: int | None = None
    seed: int = 0
    memory: int = 2 << 30


@runtime_checkable
class Solver(Protocol):
    """(C + λI)⁻¹ for vectors [n, p]."""

    damping: float
    report: dict[str, Any]

    def solve(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """(C + λI)⁻¹ g."""
        ...

    def quadratic(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """gᵀ (C + λI)⁻¹ g."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A solver, how its damping came about, and what its solutions hold in memory (vectors per right-hand side)."""

    solver: Solver
    rule: str
    copies: int
    found: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What a result's provenance says of the solution."""
        return {
            "damping": self.solver.damping,
            "damping_rule": self.rule,
            **self.found,
            "solution": dict(self.solver.report),
        }


@dataclass(frozen=True)
class _Damping:
    value: float
    rule: str
    found: dict[str, float]


def prepare(rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions) -> Prepared:
    """Make the curvature and its solver.

    Args:
        rows: The rows whose mean loss is curved.
        wiring: The layers' rules.
        options: The user's choices.

    Returns:
        The solver.
    """
    if options.solver == "exact":
        return _exact(rows, wiring, options)
    if options.solver == "ekfac":
        return _ekfac(rows, wiring, options)
    curvature: Curvature = Hessian(rows) if options.curvature == "hessian" else GaussNewton(rows)
    times = partial(product, curvature)
    low = _smallest(times, rows, options) if options.curvature == "hessian" else None
    batches = Minibatches(curvature, options.seed) if options.solver == "lissa" else None
    most = batches.largest() if batches is not None and None in {options.damping, options.scale} else 0.0
    total = partial(_trace, curvature, rows, wiring, options)
    damping = _damping(total, rows, options, low, LISSA_SHARE * most if batches is not None else 0.0)
    if batches is not None:
        scale = options.scale
        solver: Solver = Lissa(
            batches,
            damping.value,
            scale=Lissa.scale_of(most, damping.value) if scale is None else scale,
            tolerance=0.05 if options.tolerance is None else options.tolerance,
            iterations=10_000 if options.iterations is None else options.iterations,
        )
        return Prepared(solver, damping.rule, 8, damping.found)
    narrow = any(p.dtype != torch.float64 for p in rows.vectors.tensors)
    solver = ConjugateGradients(
        curvature,
        damping.value,
        options.curvature,
        tolerance=(1e-4 if narrow else 1e-10) if options.tolerance is None else options.tolerance,
        iterations=1000 if options.iterations is None else options.iterations,
    )
    return Prepared(solver, damping.rule, 8, damping.found)


def _exact(rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions) -> Prepared:
    dense.refuse_too_large(rows.vectors.size, options.memory)
    matrix = (
        dense.from_products(Hessian(rows))
        if options.curvature == "hessian"
        else _gauss_newton_matrix(rows, wiring)
    )
    low = None
    if options.curvature == "hessian":
        low = _smallest(lambda v: v @ matrix, rows, options)
    damping = _damping(lambda: (float(matrix.trace()), "exact"), rows, options, low)
    return Prepared(
        dense.CholeskySolver(matrix, damping.value, options.curvature), damping.rule, 4, damping.found
    )


def _gauss_newton_matrix(rows: CurvatureRows, wiring: Wiring) -> Tensor:
    if not missing(rows, wiring):
        try:
            return dense.from_columns(Columns(rows, wiring))
        except ModelError as error:
            logger.info("the curvature is formed column by column: %s", error)
    return dense.from_products(GaussNewton(rows))


def _ekfac(rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions) -> Prepared:
    left_out = missing(rows, wiring)
    if left_out:
        name, reason = next(iter(left_out.items()))
        more = f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise ModelError(
            f"solver='ekfac' has factors for parameters of one Linear or Conv layer; {name} has none ({reason}){more}. Leave "
            "it out (Task(parameters=...)), or use solver='cg'."
        )
    bases = ekfac.fit(Columns(rows, wiring, options.samples, options.seed), options.memory)
    total = sum(float(basis.values.sum()) for basis in bases)
    damping = _damping(
        lambda: (total, "exact" if options.samples is None else "sampled"), rows, options, None
    )
    dtype = torch.float64 if rows.source.dtype == torch.float64 else torch.float32
    solver = ekfac.EkfacSolver(bases, rows.vectors, damping.value, dtype)
    solver.report |= {"samples": options.samples} | (
        {} if options.samples is None else {"seed": options.seed}
    )
    return Prepared(solver, damping.rule, 4, damping.found)


def _smallest(times: Callable[[Tensor], Tensor], rows: CurvatureRows, options: CurvatureOptions) -> float:
    """λ_min, as low as the leftover of Lanczos allows."""
    found = spectrum.smallest(times, rows.vectors.size, rows.vectors.tensors[0], seed=options.seed)
    return found.value


def _trace(
    curvature: Curvature, rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions
) -> tuple[float, str]:
    """The trace: exact from Gauss-Newton's root columns where the layers have rules, else estimated."""
    if options.curvature == "gauss_newton" and not missing(rows, wiring):
        try:
            return _columns_trace(Columns(rows, wiring)), "exact"
        except ModelError as error:
            logger.info("the trace of the curvature is estimated: %s", error)
    like = rows.vectors.tensors[0]
    return spectrum.trace(
        partial(product, curvature), rows.vectors.size, like, seed=options.seed
    ), "estimated"


def _columns_trace(columns: Columns) -> float:
    total = 0.0
    for column in columns:
        for site in columns.sites.values():
            parts: dict[tuple[str, ...], list[Any]] = {}
            for blocks in column.blocks(site):
                for names, block in blocks.items():
                    parts.setdefault(names, []).append(block)
            for found in parts.values():
                if len(found) == 1:
                    total += float(found[0].squared_norm().double().sum())
                else:
                    flat = torch.stack([block.materialise() for block in found]).sum(0)
                    total += float(flat.double().square().sum())
    return total / len(columns.rows)


def _damping(
    total: Callable[[], tuple[float, str]],
    rows: CurvatureRows,
    options: CurvatureOptions,
    low: float | None,
    least: float = 0.0,
) -> _Damping:
    """The user's damping, checked, or the default.

    Args:
        total: The trace of C, and how it was found.
        rows: The curvature rows.
        options: The user's choices.
        low: λ_min, for the Hessian.
        least: The smallest default.

    Returns:
        The damping.

    Raises:
        damping_error: Too small for λ_min: an ``OptionError``.
        OptionError: Zero where the solver needs a positive one, or there is no curvature to take a default from.
    """
    found = {} if low is None else {"lambda_min": low}
    if options.damping is not None:
        if low is not None and options.damping <= -low:
            raise dense.damping_error(options.damping, low, options.curvature)
        if options.solver in {"lissa", "ekfac"} and options.damping == 0:
            raise OptionError(f"damping is 0: solver={options.solver!r} needs a positive one.")
        return _Damping(options.damping, "given", found)
    amount, how = total()
    mean = amount / rows.vectors.size
    choices = {f"{SHARE} × mean eigenvalue ({how})": SHARE * mean}
    if low is not None:
        choices["−2 λ_min"] = -2.0 * low
    if least > 0:
        choices[f"{LISSA_SHARE} × largest eigenvalue of a batch"] = least
    rule, value = max(choices.items(), key=lambda item: item[1])
    if not value > torch.finfo(torch.float64).tiny:
        raise OptionError(
            "the curvature is zero everywhere, so no damping follows from it: the loss is linear in the model's output (does the "
            "model end in log_softmax? let it return logits), or nothing is left to learn. Give damping=, or use "
            "curvature='hessian'."
        )
    return _Damping(value, rule, {**found, "mean_eigenvalue": mean})
