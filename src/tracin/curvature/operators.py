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

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tracin.curvature.checks import check_hessian, check_jacobian, check_loss
from tracin.curvature.outputs import Outputs, outputs_of
from tracin.curvature.pulling import Puller, twice
from tracin.curvature.vectors import Vectors
from tracin.data import Batch, to_device
from tracin.errors import NotFiniteError
from tracin.gradients.engine import Source
from tracin.shapes import Float

__all__ = ["Curvature", "CurvatureRows", "GaussNewton", "Hessian", "product"]

# Vectors per backward pass under vmap: more gains little and holds that many activations.
VECTORS = 32

# One tensor [k, *shape] per parameter → the same, None for zero.
Times = Callable[[Sequence[Tensor]], list[Tensor | None]]


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


class _Operator(ABC):
    """Products of a batch, some vectors at a time; the first batch is checked against first derivatives."""

    def __init__(self, rows: CurvatureRows) -> None:
        self.rows = rows
        self._pull = Puller()
        self._checked = False

    @abstractmethod
    def _times(self, batch: Batch, value: Any) -> Times:
        """The products of one batch."""

    @abstractmethod
    def _check(self, batch: Batch, value: Any) -> None:
        """Refuse a model whose second derivatives autograd cannot see whole."""

    def on_batch(self, batch: Batch, value: Any, vectors: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        """The sum over a batch's rows of their curvature times the vectors."""
        layout, out = self.rows.vectors, torch.zeros_like(vectors)
        if not self._checked:
            self._check(batch, to_device(value, self.rows.source.device, copy=True))
            self._checked = True
        with twice():
            times = self._times(batch, value)
            for some, into in zip(vectors.split(VECTORS), out.split(VECTORS), strict=True):
                layout.add_to(into, times(layout.shaped(some)))
        return out


def _hessian_times(source: Source, layout: Vectors, pull: Puller, batch: Batch, value: Any) -> Times:
    losses = source.run(value, batch.rows)
    slopes = torch.autograd.grad(losses.sum(), layout.tensors, create_graph=True, allow_unused=True)
    return partial(pull, slopes, layout.tensors)


class Hessian(_Operator):
    """The Hessian of the mean loss, by differentiating the gradient.

    Args:
        rows: The rows it is the mean over.
    """

    def _times(self, batch: Batch, value: Any) -> Times:
        return _hessian_times(self.rows.source, self.rows.vectors, self._pull, batch, value)

    def _check(self, batch: Batch, value: Any) -> None:
        check_hessian(_hessian_times, self.rows.source, self.rows.vectors, batch, value)


class GaussNewton(_Operator):
    """The Gauss-Newton matrix of the mean loss, split at the model's output.

    J v is found by differentiating Jᵀ w by w, so that no forward-mode derivatives are needed.

    Args:
        rows: The rows it is the mean over.
    """

    def _split(self, batch: Batch, value: Any) -> tuple[Outputs, list[Tensor], tuple[Tensor | None, ...]]:
        """The outputs, w, and Jᵀ w."""
        found = outputs_of(self.rows.source, batch, value, self.rows.vectors.tensors)
        w = [torch.zeros_like(made, requires_grad=True) for made in found.made]
        pulled = torch.autograd.grad(
            found.made, self.rows.vectors.tensors, w, create_graph=True, allow_unused=True
        )
        return found, w, pulled

    def _times(self, batch: Batch, value: Any) -> Times:
        return partial(self._sandwich, *self._split(batch, value))

    def _sandwich(
        self, found: Outputs, w: list[Tensor], pulled: tuple[Tensor | None, ...], vectors: Sequence[Tensor]
    ) -> list[Tensor | None]:
        moved = self._pull(pulled, w, vectors)  # J v
        bent = found.bend(self._pull, moved)  # H J v
        return self._pull(found.made, self.rows.vectors.tensors, bent)

    def _check(self, batch: Batch, value: Any) -> None:
        source, layout = self.rows.source, self.rows.vectors
        spare = to_device(value, source.device, copy=True)
        with twice():
            found, w, pulled = self._split(batch, spare)
            check_jacobian(found.made, w, pulled, source, layout)
            check_loss(found, source, batch, value)
