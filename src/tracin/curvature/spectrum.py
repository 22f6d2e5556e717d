"""Extreme eigenvalues and the trace of a symmetric matrix of which products are known.

Sources: Golub & Van Loan 2013, *Matrix Computations*, §8.2 (power iteration), §10.1 (Lanczos); Hutchinson 1990 (trace).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.errors import ConvergenceError, OptionError
from tracin.shapes import Float

__all__ = ["Eigenvalue", "largest", "probes_at_once", "smallest", "steps_of", "trace"]

# A leftover has to be small so many times in a row.
STEADY = 5
# Products of Lanczos at most, and vectors that have to fit the memory at least.
ITERATIONS, FEWEST = 200, 20
# Random vectors of Hutchinson's estimate.
PROBES = 64

# v [k, p] → C v [k, p]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue, the norm ‖C v − λ v‖ of what is left over (an eigenvalue is that near), products used, the largest size."""

    value: float
    residual: float
    products: int
    high: float = 0.0

    @property
    def least(self) -> float:
        """The eigenvalue's lower bound."""
        return self.value - self.residual


def _start(p: int, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1, p, generator=generator, dtype=torch.float64).to(like.device)
    return v / torch.linalg.vector_norm(v)


def largest(
    product: Product,
    p: int,
    like: Tensor,
    *,
    iterations: int = 50,
    tolerance: float = 1e-2,
    seed: int = 0,
    start: Float[Tensor, "1 p"] | None = None,
) -> tuple[Eigenvalue, Float[Tensor, "1 p"]]:
    """The eigenvalue of largest size, by power iteration.

    Args:
        product: Multiplies rows by the matrix.
        p: Its size.
        like: A tensor on the device.
        iterations: At most so many products.
        tolerance: Stop when the leftover is that share of the eigenvalue.
        seed: Of the start.
        start: Another start.

    Returns:
        The eigenvalue, and its vector [1, p].
    """
    v = _start(p, like, seed) if start is None else start
    value = residual = 0.0
    done = 0
    for done in range(1, iterations + 1):
        w = product(v)
        value = float((w * v).sum())
        residual = float(torch.linalg.vector_norm(w - value * v))
        norm = torch.linalg.vector_norm(w)
        if not bool(norm > 0):
            return Eigenvalue(0.0, 0.0, done), v
        v = w / norm
        if residual <= tolerance * abs(value):
            break
    return Eigenvalue(value, residual, done), v


def steps_of(p: int, memory: int) -> int:
    """Products that ``smallest`` may take: one vector is held for each, in half of the memory.

    Args:
        p: Size of the matrix.
        memory: The bound in bytes.

    Returns:
        The most products.

    Raises:
        OptionError: Fewer than ``FEWEST`` vectors fit.
    """
    fits = memory // 2 // (8 * p)
    if fits < min(FEWEST, p):
        raise OptionError(
            f"λ_min of the Hessian is found with a vector of {p:,} float64 numbers held per product, at least {min(FEWEST, p)}: "
            f"{8 * p * min(FEWEST, p) / 2**30:,.2f} GiB, more than half of memory={memory / 2**30:,.2f} GiB. Raise memory=, "
            "trace fewer parameters (Task(parameters='head.*')), or use curvature='gauss_newton', which needs no λ_min."
        )
    return min(ITERATIONS, p, fits)


def smallest(
    product: Product,
    p: int,
    like: Tensor,
    *,
    iterations: int = ITERATIONS,
    tolerance: float = 3e-3,
    floor: float = 0.0,
    seed: int = 0,
) -> Eigenvalue:
    """The smallest (most negative) eigenvalue, by Lanczos with full orthogonalisation.

    A Ritz value θ lies above the eigenvalue that it approaches, by at most the leftover ‖C v − θ v‖. One that stands near
    another eigenvalue can rest there for some steps, so the leftover has to be small ``STEADY`` times in a row: a share of |θ|
    itself, however large the other end of the spectrum is.

    Args:
        product: Multiplies rows by the matrix.
        p: Its size.
        like: A tensor on the device, in the dtype of the products, whose rounding counts as left over.
        iterations: At most so many products; one vector is held for each.
        tolerance: Stop when the leftover is that share of |θ| or of ``floor``, whichever is larger.
        floor: The size of an eigenvalue that matters, such as the damping that it is held against.
        seed: Of the start.

    Returns:
        The eigenvalue; ``least`` is its lower bound.

    Raises:
        ConvergenceError: The leftover is still too large after the last product.
    """
    steps = min(iterations, p)
    basis = torch.empty(steps, p, dtype=torch.float64, device=like.device)
    basis[0] = _start(p, like, seed)[0]
    diagonal: list[float] = []
    beside: list[float] = []
    steady, value, left = 0, 0.0, float("inf")
    for step in range(1, steps + 1):
        w = product(basis[step - 1 : step])
        diagonal.append(float((w * basis[step - 1]).sum()))
        held = basis[:step]
        for _ in range(2):
            w = w - (w @ held.mT) @ held
        norm = float(torch.linalg.vector_norm(w))
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        scale = float(values.abs().max())
        value, left = float(values[0]), norm * abs(float(vectors[-1, 0]))
        if step == p or norm <= 1e-12 * max(scale, 1e-300):
            left, steady = 0.0, STEADY  # nothing of the space is left
        else:
            steady = steady + 1 if left <= tolerance * max(abs(value), floor) else 0
        if steady == STEADY:
            return Eigenvalue(value, left + torch.finfo(like.dtype).eps * scale, step, scale)
        if step < steps:
            beside.append(norm)
            basis[step] = w[0] / norm
    raise ConvergenceError(
        f"the smallest eigenvalue of the Hessian is not known after {steps} products: {value:.3g} with {left:.2g} left over, "
        f"where {tolerance * max(abs(value), floor):.2g} is asked for. Raise damping=, raise memory= (a vector is held per "
        f"product, up to {min(ITERATIONS, p)}), use a float64 model, or use curvature='gauss_newton', which needs no λ_min."
    )


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if not beside:
        return T
    off = torch.tensor(beside, dtype=torch.float64)
    return T + torch.diag(off, 1) + torch.diag(off, -1)


def probes_at_once(p: int, memory: int, probes: int = PROBES) -> int:
    """Random vectors of ``trace`` per pass: each takes about four vectors of p float64 numbers, in a quarter of the memory.

    Args:
        p: Size of the matrix.
        memory: The bound in bytes.
        probes: All random vectors.

    Returns:
        Vectors per pass, at least 1.
    """
    return max(1, min(probes, memory // 4 // (4 * 8 * p)))


def trace(
    product: Product,
    p: int,
    like: Tensor,
    *,
    probes: int = PROBES,
    at_once: int = PROBES,
    seed: int = 0,
) -> float:
    """Hutchinson's estimate of the trace: the mean of vᵀ C v over random signs.

    Args:
        product: Multiplies rows by the matrix.
        p: Its size.
        like: A tensor on the device.
        probes: Random vectors.
        at_once: Of them in one product.
        seed: Of the signs.

    Returns:
        The estimate.
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for start in range(0, probes, at_once):
        k = min(at_once, probes - start)
        signs = torch.randint(0, 2, (k, p), generator=generator, dtype=torch.int8)
        v = signs.to(like.device, torch.float64).mul_(2).sub_(1)
        total += float((v * product(v)).sum())
    return total / probes
