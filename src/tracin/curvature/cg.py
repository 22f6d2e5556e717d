"""(C + λI)⁻¹ g by conjugate gradients, all right-hand sides in one pass over the data per step.

Source: Hestenes & Stiefel 1952, *Methods of conjugate gradients for solving linear systems*.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracin.curvature.dense import damping_error
from tracin.curvature.operators import Curvature, product
from tracin.errors import ConvergenceError, NotFiniteError
from tracin.shapes import Float

__all__ = ["ConjugateGradients"]


class ConjugateGradients:
    """Solves by conjugate gradients in float64 (products in the model's dtype).

    Args:
        curvature: C.
        damping: λ.
        kind: The curvature's name, for messages.
        tolerance: ‖(C + λI) x − g‖ / ‖g‖ at which to stop.
        iterations: At most so many products.
    """

    def __init__(
        self, curvature: Curvature, damping: float, kind: str, *, tolerance: float, iterations: int
    ) -> None:
        self.curvature, self.damping, self.kind = curvature, damping, kind
        self.tolerance, self.iterations = tolerance, iterations
        self.report: dict[str, Any] = {"tolerance": tolerance, "iterations": 0, "residual": 0.0}

    def solve(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """(C + λI)⁻¹ g for n vectors.

        Args:
            gradients: The vectors.

        Returns:
            The solutions, in float64.

        Raises:
            ConvergenceError: Some vector did not reach the tolerance.
            OptionError: A direction of no or negative curvature was met; the message bounds λ_min.
            NotFiniteError: A vector is NaN or infinite.
        """
        b = gradients.double()
        if not bool(torch.isfinite(b).all()):
            raise NotFiniteError("a gradient given to the solver is not finite.")
        # Units of their own: float32 models multiply vectors of size 1.
        sizes = torch.linalg.vector_norm(b, dim=1, keepdim=True)
        b = b / sizes.clamp_min(torch.finfo(b.dtype).tiny)
        x, r = torch.zeros_like(b), b.clone()
        d, rho = r.clone(), r.square().sum(1)
        active = (sizes[:, 0] > 0).nonzero()[:, 0]
        done = 0
        for done in range(1, self.iterations + 1):
            if not len(active):
                done -= 1
                break
            some = d[active]
            w = product(self.curvature, some) + self.damping * some
            bend = (some * w).sum(1)
            self._refuse_flat(bend, some)
            alpha = (rho[active] / bend)[:, None]
            x[active] += alpha * some
            r[active] -= alpha * w
            fresh = r[active].square().sum(1)
            d[active] = r[active] + (fresh / rho[active])[:, None] * some
            rho[active] = fresh
            active = active[fresh.sqrt() > self.tolerance]
        if len(active):
            raise ConvergenceError(
                f"solver='cg' left {len(active)} of {len(b)} systems above tolerance={self.tolerance:g} after "
                f"{self.iterations} iterations (worst {float(rho.max().sqrt()):.2e}). Raise damping= (now {self.damping:.3g}; "
                "it helps most), or iterations=, or tolerance=."
            )
        over = self._left_over(x, b)
        self.report["iterations"] = max(self.report["iterations"], done)
        self.report["residual"] = max(self.report["residual"], over)
        return x * sizes

    def quadratic(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """gᵀ (C + λI)⁻¹ g of each vector."""
        return (gradients.double() * self.solve(gradients)).sum(1)

    def _left_over(self, x: Tensor, b: Tensor) -> float:
        """The residual as it is, not as the recursion has it: rounding in the model's dtype parts the two."""
        left = b - product(self.curvature, x) - self.damping * x
        over = float(torch.linalg.vector_norm(left, dim=1).max())
        if over > 10 * self.tolerance:
            raise ConvergenceError(
                f"solver='cg' has a residual of {over:.2e} where it computed one below tolerance={self.tolerance:g}: rounding in "
                f"the model's products. Raise damping= (now {self.damping:.3g}) or tolerance=, or use a float64 model."
            )
        return over

    def _refuse_flat(self, bend: Tensor, directions: Tensor) -> None:
        worst = bend / directions.square().sum(1)
        if float(worst.min()) <= 0:
            raise damping_error(self.damping, float(worst.min()) - self.damping, self.kind)
