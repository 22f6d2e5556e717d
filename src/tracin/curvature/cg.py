"""(C + λI)⁻¹ g by conjugate gradients, all right-hand sides in one pass over the data per step.

Source: Hestenes & Stiefel 1952, *Methods of conjugate gradients for solving linear systems*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tracin.curvature.dense import damping_error, rounding_of
from tracin.curvature.iterative import IterativeSolver
from tracin.curvature.operators import Curvature, product
from tracin.errors import ConvergenceError

__all__ = ["ConjugateGradients"]


class ConjugateGradients(IterativeSolver):
    """Solves by conjugate gradients in float64 (products in the model's dtype).

    Args:
        curvature: C.
        damping: λ.
        kind: The curvature's name, for messages.
        tolerance: ‖(C + λI) x − g‖ / ‖g‖ at which to stop.
        iterations: At most so many products.
        low: A lower bound of C's smallest eigenvalue; Gauss-Newton's is 0.
        given: Whether λ is the user's, which has to exceed rounding; a default is a share of C's eigenvalues.
    """

    def __init__(
        self,
        curvature: Curvature,
        damping: float,
        kind: str,
        *,
        tolerance: float,
        iterations: int,
        low: float = 0.0,
        given: bool = True,
    ) -> None:
        super().__init__("cg", damping, tolerance, iterations)
        self.curvature, self.kind, self.low = curvature, kind, low
        self.given = given

    def _solve_units(self, units: Tensor) -> tuple[Tensor, int, float]:
        x, r = torch.zeros_like(units), units.clone()
        d, rho = r.clone(), r.square().sum(1)
        active = (rho > 0).nonzero()[:, 0]
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
                f"solver='cg' left {len(active)} of {len(units)} systems above tolerance={self.tolerance:g} after "
                f"{self.iterations} iterations (worst {float(rho.max().sqrt()):.2e}). Raise damping= (now {self.damping:.3g}; "
                "it helps most), or iterations=, or tolerance=."
            )
        return x, done, self._left_over(x, units)

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
        """λ_max is at least the bend in any direction."""
        bends = bend / directions.square().sum(1) - self.damping
        low, high = float(bends.min()), float(bends.max())
        noise = rounding_of(high, directions.shape[1]) if self.given else 0.0
        if min(low, self.low) + self.damping <= noise:
            raise damping_error(self.damping, min(low, self.low), high, self.kind)
