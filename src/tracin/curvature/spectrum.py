"""Extreme eigenvalues and the trace of a symmetric matrix of which products are known.

Sources: Golub & Van Loan 2013, *Matrix Computations*, §8.2 (power iteration), §10.1 (Lanczos); Hutchinson 1990 (trace).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.shapes import Float

__all__ = ["Eigenvalue", "largest", "smallest", "trace"]

STEADY = 5

# v [k, p] → C v [k, p]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue, the norm ‖C v − λ v‖ of what is left over (an eigenvalue is that near), and products used."""

    value: float
    residual: float
    products: int


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


def smallest(
    product: Product, p: int, like: Tensor, *, iterations: int = 200, tolerance: float = 1e-4, seed: int = 0
) -> Eigenvalue:
    """The smallest (most negative) eigenvalue, by Lanczos with full orthogonalisation.

    A Ritz value lies above the eigenvalue that it approaches, by at most the leftover. One that stands near another
    eigenvalue can rest there for some steps, so the leftover has to be small ``STEADY`` times in a row.

    Args:
        product: Multiplies rows by the matrix.
        p: Its size.
        like: A tensor on the device.
        iterations: At most so many products.
        tolerance: Stop when the leftover is that share of the largest Ritz value's size.
        seed: Of the start.

    Returns:
        The eigenvalue.
    """
    basis = [_start(p, like, seed)]
    diagonal: list[float] = []
    beside: list[float] = []
    found = Eigenvalue(0.0, float("inf"), 0)
    steady = 0
    for step in range(1, min(iterations, p) + 1):
        w = product(basis[-1])
        diagonal.append(float((w * basis[-1]).sum()))
        held = torch.cat(basis)
        for _ in range(2):
            w = w - (w @ held.mT) @ held
        norm = float(torch.linalg.vector_norm(w))
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(T)
        scale = float(values.abs().max())
        found = Eigenvalue(float(values[0]), norm * abs(float(vectors[-1, 0])), step)
        steady = steady + 1 if found.residual <= tolerance * scale else 0
        if norm <= 1e-12 * max(scale, 1e-300) or steady == STEADY:
            return found
        beside.append(norm)
        basis.append(w / norm)
    return found


def trace(product: Product, p: int, like: Tensor, *, probes: int = 64, seed: int = 0) -> float:
    """Hutchinson's estimate of the trace: the mean of vᵀ C v over random signs.

    Args:
        product: Multiplies rows by the matrix.
        p: Its size.
        like: A tensor on the device.
        probes: Random vectors.
        seed: Of the signs.

    Returns:
        The estimate.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (probes, p), generator=generator).to(like.device, torch.float64) * 2 - 1
    return float((signs * product(signs)).sum() / probes)
