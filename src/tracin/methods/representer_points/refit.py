r"""The last layer fitted anew to stationarity, by Newton's method with conjugate gradients.

.. math::
    \min_\Theta \; \frac1n \sum_i \ell_i(\Theta f_i) + \lambda \lVert \Theta \rVert^2

Everything is in float64. Axis letters: n rows · d features · C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.errors import ConvergenceError
from tracin.shapes import Float

__all__ = ["HeadFit", "fit_head"]

LossOfLogits = Callable[[Tensor], tuple[Tensor, Tensor]]
CurvatureAt = Callable[[Tensor], Callable[[Tensor], Tensor]]
_PROBES = 4


@dataclass(frozen=True, eq=False)
class HeadFit:
    r"""The fitted head.

    Args:
        weight: :math:`\Theta` [C, d].
        slopes: The gradients of the losses in the logits, there [n, C].
        gradient_norm: The norm of the objective's gradient that was reached.
        residual: That norm / (2λ‖Θ‖): the relative error of the head's decomposition into its train rows.
        steps: Newton steps taken.
    """

    weight: Float[Tensor, "C d"]
    slopes: Float[Tensor, "n C"]
    gradient_norm: float
    residual: float
    steps: int


@dataclass(frozen=True, eq=False)
class _Objective:
    """The objective and its gradient at a point."""

    weight: Tensor
    logits: Tensor
    value: float
    slopes: Tensor
    gradient: Tensor

    @property
    def norm(self) -> float:
        return float(self.gradient.norm())


def fit_head(
    features: Float[Tensor, "n d"],
    start: Float[Tensor, "C d"],
    loss: LossOfLogits,
    curvature: CurvatureAt,
    *,
    l2: float,
    tolerance: float = 1e-10,
    max_steps: int = 100,
) -> HeadFit:
    r"""Minimise the objective from ``start``.

    Stationary means :math:`\lVert \nabla \rVert \le \text{tolerance} \cdot 2 \lambda \lVert \Theta \rVert`: then the head equals
    the sum over its train rows up to that share. Where the loss is convex in the logits, the minimum is the only one.

    Args:
        features: Float64.
        start: Float64.
        loss: Logits [n, C] to losses [n] and their gradients [n, C].
        curvature: Logits to products with the second derivatives.
        l2: λ.
        tolerance: See above.
        max_steps: Newton steps at most.

    Returns:
        The fit.

    Raises:
        ConvergenceError: It is not stationary after ``max_steps``, or no step leads downhill.
    """
    generator = torch.Generator().manual_seed(0)
    here, steps = _objective(features, start, loss, l2), 0
    while here.norm > _enough(here, features, l2, tolerance) and steps < max_steps:
        products = curvature(here.logits)
        signs = torch.randint(0, 2, (_PROBES, *here.logits.shape), generator=generator).to(features) * 2 - 1
        each = torch.stack([(sign * products(sign)).mean(1) for sign in signs]).mean(0).clamp_min(0)
        inverse = _inverse_of(features, each, l2)
        direction = _newton_direction(features, here.gradient, products, inverse, l2)
        there = _line_search(here, direction, features, loss, l2)
        if there is None:
            break
        here, steps = there, steps + 1
    scale = 2 * l2 * float(here.weight.norm())
    residual = here.norm / scale if scale > 0 else 0.0
    if here.norm <= _enough(here, features, l2, tolerance):
        return HeadFit(here.weight, here.slopes, here.norm, residual, steps)
    raise ConvergenceError(
        f"the refitted head is not stationary: its gradient is {here.norm:.1e}, {residual:.1e} of the penalty's, after {steps} "
        f"Newton steps, and {tolerance:.0e} was asked for. Raise l2 or tolerance; a loss with kinks has no such point."
    )


def _enough(here: _Objective, features: Tensor, l2: float, tolerance: float) -> float:
    """The gradient norm at which to stop; what float64 cannot tell from zero counts as zero."""
    n = len(features)
    rounding = (
        8 * torch.finfo(torch.float64).eps * float(here.slopes.abs().mT.mv(features.norm(dim=1)).norm()) / n
    )
    return max(tolerance * 2 * l2 * float(here.weight.norm()), rounding if here.weight.norm() == 0 else 0.0)


def _objective(features: Tensor, weight: Tensor, loss: LossOfLogits, l2: float) -> _Objective:
    logits = features @ weight.mT
    losses, slopes = loss(logits)
    value = float(losses.mean() + l2 * weight.square().sum())
    gradient = slopes.mT @ features / len(features) + 2 * l2 * weight
    return _Objective(weight, logits, value, slopes, gradient)


def _inverse_of(features: Tensor, curvatures: Tensor, l2: float) -> Tensor:
    """The Cholesky factor of Fᵀ diag(h) F / n + 2λ, the curvature if classes did not interact."""
    matrix = features.mT @ (curvatures[:, None] * features) / len(features)
    matrix.diagonal().add_(2 * l2)
    return torch.linalg.cholesky(matrix)


def _newton_direction(
    features: Tensor, gradient: Tensor, products: Callable[[Tensor], Tensor], inverse: Tensor, l2: float
) -> Tensor:
    """−H⁻¹g by conjugate gradients, exact enough for fast convergence; what was found so far where H is not positive."""
    n = len(features)
    direction = torch.zeros_like(gradient)
    residual = -gradient
    step = _solved(inverse, residual)
    along, size = step, float((residual * step).sum())
    target = min(0.1, float(gradient.norm()) ** 0.5) * float(gradient.norm())
    for _ in range(min(gradient.numel(), 500)):
        curved = products(features @ along.mT).mT @ features / n + 2 * l2 * along
        bend = float((along * curved).sum())
        if bend <= 0:
            return direction if bool(direction.any()) else step
        direction = direction + size / bend * along
        residual = residual - size / bend * curved
        if float(residual.norm()) <= max(target, 1e-300):
            break
        step = _solved(inverse, residual)
        before, size = size, float((residual * step).sum())
        along = step + size / before * along
    return direction


def _solved(factor: Tensor, rows: Tensor) -> Tensor:
    return torch.cholesky_solve(rows.mT, factor).mT


def _line_search(
    here: _Objective, direction: Tensor, features: Tensor, loss: LossOfLogits, l2: float
) -> _Objective | None:
    """The first of the steps 1, ½, ¼, … that goes down far enough, or that flattens what rounding hides; else None."""
    slope = float((here.gradient * direction).sum())
    noise = 1e-13 * abs(here.value)
    for halvings in range(40):
        length = 0.5**halvings
        there = _objective(features, here.weight + length * direction, loss, l2)
        if there.value <= here.value + 1e-4 * length * slope:
            return there
        if there.value <= here.value + noise and there.norm < 0.9 * here.norm:
            return there
    return None
