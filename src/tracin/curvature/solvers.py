"""A damped curvature that can be solved with: damping chosen or checked, one of four solvers made ready."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tracin.curvature import dense, ekfac, spectrum
from tracin.curvature.cg import ConjugateGradients
from tracin.curvature.checks import refuse_linear
from tracin.curvature.columns import Columns, missing
from tracin.curvature.lissa import Lissa, Minibatches
from tracin.curvature.operators import Curvature, CurvatureRows, GaussNewton, Hessian, product
from tracin.errors import ModelError, OptionError
from tracin.gradients.sites import Wiring
from tracin.shapes import Float

__all__ = [
    "COPIES",
    "CURVATURES",
    "SOLVERS",
    "CurvatureOptions",
    "Prepared",
    "Solver",
    "needs_scale",
    "prepare",
    "refuse_without_factors",
    "refuse_zero_damping",
]

logger = logging.getLogger("tracin")

CURVATURES = ("gauss_newton", "hessian")
SOLVERS = ("exact", "cg", "lissa", "ekfac")
# Vectors of float64 that a solver holds per right-hand side.
COPIES = {"exact": 4, "cg": 8, "lissa": 8, "ekfac": 4}
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
    seed: int | None = None  # where something was drawn

    def record(self) -> dict[str, Any]:
        """What a result's provenance says of the solution."""
        return {
            "seed": self.seed,
            "damping": self.solver.damping,
            "damping_rule": self.rule,
            **self.found,
            "solution": dict(self.solver.report),
        }


@dataclass(frozen=True)
class _Trace:
    value: float
    how: str

    @property
    def estimated(self) -> bool:
        return self.how != "exact"


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

    Raises:
        OptionError: A damping that is too small, or a curvature that does not fit the memory.
        ModelError: The model has no such curvature, or the solver no factors for it.
        ConvergenceError: The Hessian's λ_min is not known well enough to judge the damping.
        NotFiniteError: The curvature is NaN or infinite.
    """
    refuse_zero_damping(options)
    if options.curvature == "gauss_newton":
        refuse_linear(rows.batches, rows.source, rows.vectors)
    if options.solver == "exact":
        return _exact(rows, wiring, options)
    if options.solver == "ekfac":
        return _ekfac(rows, wiring, options)
    curvature: Curvature = Hessian(rows) if options.curvature == "hessian" else GaussNewton(rows)
    batches = Minibatches(curvature, options.seed) if options.solver == "lissa" else None
    most = batches.largest() if batches is not None and needs_scale(options) else 0.0
    amount = _trace(curvature, rows, wiring, options) if options.damping is None else None
    low = _smallest(curvature, rows, options, amount) if options.curvature == "hessian" else None
    damping = _damping(amount, rows, options, low, LISSA_SHARE * most if batches is not None else 0.0)
    if batches is not None:
        scale = options.scale
        solver: Solver = Lissa(
            batches,
            damping.value,
            scale=Lissa.scale_of(most, damping.value) if scale is None else scale,
            tolerance=0.05 if options.tolerance is None else options.tolerance,
            iterations=10_000 if options.iterations is None else options.iterations,
            low=0.0 if low is None else low.least,
            kind=options.curvature,
        )
        return Prepared(solver, damping.rule, COPIES[options.solver], damping.found, options.seed)
    narrow = any(p.dtype != torch.float64 for p in rows.vectors.tensors)
    solver = ConjugateGradients(
        curvature,
        damping.value,
        options.curvature,
        tolerance=(1e-4 if narrow else 1e-10) if options.tolerance is None else options.tolerance,
        iterations=1000 if options.iterations is None else options.iterations,
        low=0.0 if low is None else low.least,
        given=options.damping is not None,
    )
    drawn = low is not None or (amount is not None and amount.estimated)
    return Prepared(
        solver, damping.rule, COPIES[options.solver], damping.found, options.seed if drawn else None
    )


def needs_scale(options: CurvatureOptions) -> bool:
    """Whether lissa's largest eigenvalue of a batch is read: by its scale, or by the default damping."""
    return options.damping is None or options.scale is None


def refuse_zero_damping(options: CurvatureOptions) -> None:
    """Refuse a damping of zero where λ_min is not known, so that the curvature may be singular.

    Args:
        options: The user's choices.

    Raises:
        OptionError: It is zero.
    """
    if options.solver != "exact" and options.curvature == "gauss_newton" and options.damping == 0:
        raise OptionError(
            f"damping is 0: solver={options.solver!r} needs a positive one, since it does not know whether Gauss-Newton is "
            "singular. Only solver='exact' takes 0, where the matrix is positive definite."
        )


def _exact(rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions) -> Prepared:
    dense.refuse_too_large(rows.vectors.size, options.memory)
    matrix = (
        dense.from_products(Hessian(rows))
        if options.curvature == "hessian"
        else _gauss_newton_matrix(rows, wiring)
    )
    narrow = any(p.dtype != torch.float64 for p in rows.vectors.tensors)
    accuracy = torch.finfo(torch.float32 if narrow else torch.float64).eps
    low = None
    if options.curvature == "hessian":
        least, high = dense.ends_of(matrix, accuracy)
        low = spectrum.Eigenvalue(least, 0.0, 0, high)
    damping = _damping(_Trace(float(matrix.trace()), "exact"), rows, options, low)
    return Prepared(
        dense.CholeskySolver(matrix, damping.value, options.curvature, accuracy),
        damping.rule,
        COPIES["exact"],
        damping.found,
    )


def _gauss_newton_matrix(rows: CurvatureRows, wiring: Wiring) -> Tensor:
    if not missing(rows, wiring):
        try:
            return dense.from_columns(Columns(rows, wiring))
        except ModelError as error:
            logger.info("the curvature is formed column by column: %s", error)
    return dense.from_products(GaussNewton(rows))


def refuse_without_factors(rows: CurvatureRows, wiring: Wiring) -> None:
    """Refuse parameters that EKFAC cannot hold.

    Args:
        rows: The curvature rows.
        wiring: The layers' rules.

    Raises:
        ModelError: A parameter is in no layer with a rule, or in several.
    """
    left_out = missing(rows, wiring)
    if left_out:
        name, reason = next(iter(left_out.items()))
        more = f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise ModelError(
            f"solver='ekfac' has factors for parameters of one Linear or Conv layer; {name} has none ({reason}){more}. Leave "
            "it out (Task(parameters=...)), or use solver='cg'."
        )


def _ekfac(rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions) -> Prepared:
    refuse_without_factors(rows, wiring)
    bases = ekfac.fit(Columns(rows, wiring, options.samples, options.seed), options.memory)
    total = float(sum(float(basis.values.sum()) for basis in bases))
    damping = _damping(_Trace(total, "exact" if options.samples is None else "sampled"), rows, options, None)
    dtype = torch.float64 if rows.source.dtype == torch.float64 else torch.float32
    high = max((float(basis.values.max()) for basis in bases), default=0.0)
    if options.damping is not None and damping.value <= dense.rounding_of(high, rows.vectors.size):
        raise dense.damping_error(damping.value, 0.0, high, options.curvature)
    solver = ekfac.EkfacSolver(bases, rows.vectors, damping.value, dtype)
    solver.report["samples"] = options.samples
    return Prepared(
        solver,
        damping.rule,
        COPIES["ekfac"],
        damping.found,
        None if options.samples is None else options.seed,
    )


def _smallest(
    curvature: Curvature, rows: CurvatureRows, options: CurvatureOptions, amount: _Trace | None
) -> spectrum.Eigenvalue:
    """A lower bound of λ_min, as near as the damping asks for."""
    p, like = rows.vectors.size, rows.vectors.tensors[0]
    default = 0.0 if amount is None else SHARE * max(amount.value, 0.0) / p
    return spectrum.smallest(
        partial(product, curvature),
        p,
        like,
        iterations=spectrum.steps_of(p, options.memory),
        floor=default if options.damping is None else options.damping,
        seed=options.seed,
    )


def _trace(curvature: Curvature, rows: CurvatureRows, wiring: Wiring, options: CurvatureOptions) -> _Trace:
    """The trace: exact from Gauss-Newton's root columns where the layers have rules, else estimated."""
    if options.curvature == "gauss_newton" and not missing(rows, wiring):
        try:
            return _Trace(Columns(rows, wiring).trace(), "exact")
        except ModelError as error:
            logger.info("the trace of the curvature is estimated: %s", error)
    p = rows.vectors.size
    at_once = spectrum.probes_at_once(p, options.memory)
    value = spectrum.trace(
        partial(product, curvature), p, rows.vectors.tensors[0], at_once=at_once, seed=options.seed
    )
    return _Trace(value, "estimated")


def _damping(
    amount: _Trace | None,
    rows: CurvatureRows,
    options: CurvatureOptions,
    low: spectrum.Eigenvalue | None,
    least: float = 0.0,
) -> _Damping:
    """The user's damping, checked, or the default.

    Args:
        amount: The trace of C, where the default is asked for.
        rows: The curvature rows.
        options: The user's choices.
        low: λ_min or a lower bound of it, for the Hessian.
        least: The smallest default.

    Returns:
        The damping.

    Raises:
        damping_error: Too small for λ_min: an ``OptionError``.
        OptionError: There is no curvature to take a default from.
    """
    found = {} if low is None else {"lambda_min": low.least}
    if options.damping is not None:
        if low is not None and options.damping + low.least <= dense.rounding_of(low.high, rows.vectors.size):
            raise dense.damping_error(options.damping, low.least, low.high, options.curvature)
        return _Damping(options.damping, "given", found)
    assert amount is not None
    mean = amount.value / rows.vectors.size
    choices = {f"{SHARE} × mean eigenvalue ({amount.how})": SHARE * mean}
    if low is not None:
        choices["−2 λ_min"] = -2.0 * low.least
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
