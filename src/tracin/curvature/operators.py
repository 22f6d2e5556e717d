r"""Curvature of the mean loss over the curvature data, as products with vectors.

.. math::
    C = \frac1N \sum_n \nabla^2_\theta \ell(\theta, z_n)
    \quad\text{(Hessian)} \qquad
    C = \frac1N \sum_n J_n^\top H_n J_n
    \quad\text{(Gauss-Newton)}

J_n is the Jacobian of the model's output, H_n the Hessian of the loss in that output. Vectors are rows, [k, p]; a
product reads the data once, whatever k.

Source: Pearlmutter 1994, *Fast exact multiplication by the Hessian*; Schraudolph 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tracin.curvature.outputs import outputs_of
from tracin.curvature.pulling import Puller, twice
from tracin.curvature.vectors import Vectors
from tracin.data import Batch
from tracin.errors import NotFiniteError
from tracin.gradients.engine import Source
from tracin.shapes import Float

__all__ = ["Curvature", "CurvatureRows", "GaussNewton", "Hessian", "product"]

# Vectors per backward pass under vmap: more gains little and holds that many activations.
VECTORS = 32


@dataclass(frozen=True)
class CurvatureRows:
    """The rows that curvature is the mean over: their loss, and ``batches()``, one pass over them on the device."""

    source: Source
    vectors: Vectors
    batches: Callable[[], Iterator[tuple[Batch, Any]]]

    def __len__(self) -> int:
        return len(self.source.rows)


@runtime_checkable
class Curvature(Protocol):
    """A symmetric matrix [p, p] of which products are known."""

    rows: CurvatureRows

    def on_batch(self, batch: Batch, value: Any, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """The sum (not the mean) over a batch's rows of their curvature times the vectors."""
        ...


def product(curvature: Curvature, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
    """C v for k vectors, in one pass over the data.

    Args:
        curvature: The matrix.
        vectors: Rows [k, p].

    Returns:
        The products [k, p], in the vectors' dtype.

    Raises:
        NotFiniteError: A product is NaN or infinite.
    """
    total = torch.zeros_like(vectors)
    for batch, value in curvature.rows.batches():
        total += curvature.on_batch(batch, value, vectors)
    if not bool(torch.isfinite(total.sum())):
        raise NotFiniteError(
            f"a product with the curvature is not finite ({curvature.rows.source.where}). Look for infinite second derivatives "
            "(a square root at zero, a division), or use a float64 model."
        )
    return total / len(curvature.rows)


class Hessian:
    """The Hessian of the mean loss, by differentiating the gradient.

    Args:
        rows: The rows it is the mean over.
    """

    def __init__(self, rows: CurvatureRows) -> None:
        self.rows = rows
        self._pull = Puller()

    def on_batch(self, batch: Batch, value: Any, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """Σ_n ∇²ℓ_n v."""
        layout = self.rows.vectors
        out = torch.zeros_like(vectors)
        with twice():
            losses = self.rows.source.run(value, batch.rows)
            slopes = torch.autograd.grad(losses.sum(), layout.tensors, create_graph=True, allow_unused=True)
            for some, into in zip(vectors.split(VECTORS), out.split(VECTORS), strict=True):
                layout.add_to(into, self._pull(slopes, layout.tensors, layout.shaped(some)))
        return out


class GaussNewton:
    """The Gauss-Newton matrix of the mean loss, split at the model's output.

    J v is found by differentiating Jᵀ w by w, so that no forward-mode derivatives are needed.

    Args:
        rows: The rows it is the mean over.
    """

    def __init__(self, rows: CurvatureRows) -> None:
        self.rows = rows
        self._pull = Puller()

    def on_batch(self, batch: Batch, value: Any, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """Σ_n J_nᵀ H_n J_n v."""
        layout = self.rows.vectors
        parameters = layout.tensors
        out = torch.zeros_like(vectors)
        with twice():
            found = outputs_of(self.rows.source, batch, value, parameters)
            weights = [torch.zeros_like(made, requires_grad=True) for made in found.made]
            pulled = torch.autograd.grad(
                found.made, parameters, weights, create_graph=True, allow_unused=True
            )
            for some, into in zip(vectors.split(VECTORS), out.split(VECTORS), strict=True):
                moved = self._pull(pulled, weights, layout.shaped(some))  # J v
                bent = found.bend(self._pull, moved)  # H J v
                layout.add_to(into, self._pull(found.made, parameters, bent))
        return out
