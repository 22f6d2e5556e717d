"""What the iterative solvers share: right-hand sides of length 1, and what is reported of the solutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from tracin.errors import ConvergenceError, NotFiniteError
from tracin.shapes import Float

__all__ = ["IterativeSolver"]


class IterativeSolver(ABC):
    """(C + λI)⁻¹ by steps, for vectors scaled to length 1, so that float32 models multiply numbers of size 1.

    Args:
        name: The solver's name, for messages.
        damping: λ.
        tolerance: ‖(C + λI) x − g‖ / ‖g‖ at which to stop.
        iterations: At most so many steps.
    """

    def __init__(self, name: str, damping: float, tolerance: float, iterations: int) -> None:
        self.name, self.damping = name, damping
        self.tolerance, self.iterations = tolerance, iterations
        self.report: dict[str, Any] = {"tolerance": tolerance, "iterations": 0, "residual": 0.0}

    @abstractmethod
    def _solve_units(self, units: Tensor) -> tuple[Tensor, int, float]:
        """The solutions for vectors of length 1 (or 0), the steps taken, and the largest residual."""

    def solve(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """(C + λI)⁻¹ g for n vectors.

        Args:
            gradients: The vectors.

        Returns:
            The solutions, in float64.

        Raises:
            ConvergenceError: The steps diverged, or some vector did not reach the tolerance.
            OptionError: A direction of no or negative curvature was met; the message bounds λ_min.
            NotFiniteError: A vector or a solution is NaN or infinite.
        """
        g = gradients.double()
        finite = torch.isfinite(g).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise NotFiniteError(
                f"solver={self.name!r}: row {row} of the {len(g)} gradients to solve for has a NaN or an infinity. Look for one "
                "in that row's data or loss, or use a float64 model if its gradient overflows."
            )
        sizes = torch.linalg.vector_norm(g, dim=1, keepdim=True)
        x, steps, left = self._solve_units(g / sizes.clamp_min(torch.finfo(g.dtype).tiny))
        if not left <= float("inf"):
            raise ConvergenceError(
                f"solver={self.name!r} ended with a solution that is not a number. Raise damping= (now {self.damping:.3g})."
            )
        self.report["iterations"] = max(self.report["iterations"], steps)
        self.report["residual"] = max(self.report["residual"], left)
        return x * sizes

    def quadratic(self, gradients: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """gᵀ (C + λI)⁻¹ g of each vector."""
        return (gradients.double() * self.solve(gradients)).sum(1)
