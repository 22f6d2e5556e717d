"""When two gradients agree: ‖Δ‖ / ‖reference‖, with a floor where the reference is rounding noise.

A gradient that cancels to almost nothing (the key bias of attention, a sum over a converged batch) has no relative
accuracy in any arithmetic. The denominator is therefore at least a small share of ``scale``, the magnitude of what was
added up, and of ``total``, the norm over all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "accumulation_dtype", "coarsest", "relative_error", "rounding", "tolerance"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of gradients of ``dtype`` are added up: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The least precise of some floating-point dtypes, which bounds how well two computations can agree."""
    return max(
        (dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps
    )


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error at which a route counts as exact."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])


def rounding(dtype: torch.dtype, size: float) -> float:
    """How far apart two sums in ``dtype`` of what has this size may be: ten epsilons of it."""
    return 10 * torch.finfo(dtype).eps * size


def relative_error(
    estimate: Tensor, reference: Tensor, dtype: torch.dtype, scale: float, total: float
) -> float:
    """‖estimate − reference‖ / max(‖reference‖, noise floor).

    Args:
        estimate: A route's gradient.
        reference: Autograd's.
        dtype: Dtype of the model's arithmetic.
        scale: Magnitude of what was added up to make the reference (its norm, if it is one row's).
        total: Norm over all parameters.

    Returns:
        The error; infinity where one side is not finite and the other is.
    """
    wide = accumulation_dtype(dtype)
    estimate, reference = estimate.reshape(-1).to(wide), reference.reshape(-1).to(wide)
    difference = float(torch.linalg.vector_norm(estimate - reference))
    if math.isnan(difference):
        return float("inf")
    noise = rounding(dtype, max(scale, total)) / tolerance(dtype)
    denominator = max(float(torch.linalg.vector_norm(reference)), noise)
    return difference / denominator if denominator > 0 else (0.0 if difference == 0 else float("inf"))
