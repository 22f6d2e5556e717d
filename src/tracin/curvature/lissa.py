r"""(C + λI)⁻¹ g by LiSSA: a Neumann series in which every step reads a few rows.

.. math::
    h_{j+1} = h_j + \tfrac1\sigma \left(g - (C_{B_j} + \lambda I)\, h_j\right)

B_j is a random batch, C_B the curvature of the mean loss over it. With σ at least the largest eigenvalue of every C_B + λI,
each step contracts (Gauss-Newton), at the pace 1 − λ/σ in the flattest direction: it takes about σ/λ steps times the
logarithm of the accuracy. Noise of the batches is averaged out over the steps, later ones weighing more.

Sources: Agarwal, Bullins, Hazan 2017, *Second-order stochastic optimization for machine learning in linear time*;
Koh & Liang 2017, *Understanding black-box predictions via influence functions*, §3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tracin.curvature.dense import damping_error, rounding_of
from tracin.curvature.iterative import IterativeSolver
from tracin.curvature.operators import Curvature, product
from tracin.curvature.spectrum import largest
from tracin.data import Batch
from tracin.errors import ConvergenceError
from tracin.shapes import Float

__all__ = ["Lissa", "Minibatches"]

# Rows of a step: fewer make steps cheap but the largest eigenvalue of a batch, and so the number of steps, larger.
ROWS = 64
# σ above the largest eigenvalue that power iteration found, which is approached from below.
MARGIN = 1.1
# Products of the power iteration on a batch, at most.
POWER = 30


class Minibatches:
    """The curvature rows in random batches, fixed once, and the largest eigenvalue over them.

    Args:
        curvature: C.
        seed: Of the batches.
        rows: Rows of a batch.
    """

    def __init__(self, curvature: Curvature, seed: int, rows: int = ROWS) -> None:
        self.curvature, self.seed = curvature, seed
        n = len(curvature.rows)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, n // rows)
        self.parts: Sequence[list[int]] = [order[at::count] for at in range(count)]

    def on(self, part: list[int], vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """C_B v of one batch."""
        value: Any = self.curvature.rows.source.take(part)
        return self.curvature.on_batch(Batch(part, value), value, vectors) / len(part)

    def largest(self) -> float:
        """The largest eigenvalue over the batches, by power iteration; each starts at the vector of the one before."""
        like = self.curvature.rows.vectors.tensors[0]
        start, most = None, 0.0
        for part in self.parts:
            found, start = largest(
                lambda v, part=part: self.on(part, v),
                self.curvature.rows.vectors.size,
                like,
                iterations=POWER,
                tolerance=0.05,
                seed=self.seed,
                start=start,
            )
            most = max(most, abs(found.value) + found.residual)
        return most


class Lissa(IterativeSolver):
    """Solves by LiSSA.

    Args:
        batches: The curvature, in batches.
        damping: λ.
        scale: σ, at least the largest eigenvalue over the batches plus λ.
        tolerance: ‖(C + λI) x − g‖ / ‖g‖ at which to stop, measured on all rows.
        iterations: At most so many steps.
        low: A lower bound of C's smallest eigenvalue; Gauss-Newton's is 0.
        kind: The curvature's name, for messages.

    Raises:
        OptionError: C + λI is not positive definite beyond rounding.
    """

    def __init__(
        self,
        batches: Minibatches,
        damping: float,
        *,
        scale: float,
        tolerance: float,
        iterations: int,
        low: float = 0.0,
        kind: str = "gauss_newton",
    ) -> None:
        super().__init__("lissa", damping, tolerance, iterations)
        self.batches, self.scale = batches, scale
        # The smallest eigenvalue of C + λI: no solution of a unit vector is longer than its inverse.
        self.least = damping + low
        if self.least <= rounding_of(scale, batches.curvature.rows.vectors.size):
            raise damping_error(damping, low, scale, kind)
        self.report |= {"scale": scale, "seed": batches.seed}

    @staticmethod
    def scale_of(most: float, damping: float) -> float:
        """σ from the largest eigenvalue over the batches, which was approached from below."""
        return MARGIN * (most + damping)

    def _solve_units(self, units: Tensor) -> tuple[Tensor, int, float]:
        last, mean = torch.zeros_like(units), torch.zeros_like(units)
        generator = torch.Generator().manual_seed(self.batches.seed)
        order: list[int] = []
        check, worst = min(64, self.iterations), float("inf")
        for step in range(1, self.iterations + 1):
            if not order:
                order = torch.randperm(len(self.batches.parts), generator=generator).tolist()
            part = self.batches.parts[order.pop()]
            last += (units - self.batches.on(part, last) - self.damping * last) / self.scale
            mean += (last - mean) * (2.0 / (step + 1))
            if step < check:
                continue
            check = min(2 * step, self.iterations)
            self._refuse_divergence(last, step)
            best, worst = self._better(units, last, mean)
            if worst <= self.tolerance:
                return best, step, worst
        raise ConvergenceError(
            f"solver='lissa' stands at a relative residual of {worst:.2g} after {self.iterations} steps, above "
            f"tolerance={self.tolerance:g}. It needs about {self.scale / self.least:,.0f} steps (scale over the smallest "
            "eigenvalue of C + damping·I) times the logarithm of the accuracy: raise damping= or iterations= (or tolerance=), or "
            "use solver='cg' or 'ekfac'."
        )

    def _better(self, g: Tensor, last: Tensor, mean: Tensor) -> tuple[Tensor, float]:
        """The last step or the mean, whichever leaves less over on all rows, and how much."""
        both = torch.cat([last, mean])
        left = torch.cat([g, g]) - product(self.batches.curvature, both) - self.damping * both
        over = torch.linalg.vector_norm(left, dim=1).view(2, -1).amax(1)
        at = int(over.argmin())
        return (last, mean)[at], float(over[at])

    def _refuse_divergence(self, last: Tensor, step: int) -> None:
        length = float(torch.linalg.vector_norm(last, dim=1).max())
        if not length <= 10.0 / self.least:
            raise ConvergenceError(
                f"solver='lissa' diverged at step {step} (a length of {length:.2g}, where {1 / self.least:.2g} is the most): "
                f"scale={self.scale:.3g} is below the largest eigenvalue of some batch, or the damping does not outweigh the "
                "negative curvature of batches. Raise scale= (or leave it out, to have it found), or raise damping=."
            )
