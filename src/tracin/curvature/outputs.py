r"""Where the model ends and the loss begins: the model's output u, and the loss's Hessian in u.

The Gauss-Newton matrix of a row is :math:`J^\top H J`: J the Jacobian of the model's output in the parameters, H the
Hessian of the row's loss in that output. The split is made by a hook: the loss gets a copy of the output that is cut
off from the parameters. So it works for any loss that calls the model once and reaches the parameters through its
output alone; others are refused.

Source: Schraudolph 2002, *Fast curvature matrix-vector products*; Martens 2020, *New insights and perspectives on the
natural gradient method*, §8.

Axis letters: n rows · k vectors · C outputs of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracin.curvature.pulling import Puller, twice_in_loss
from tracin.data import Batch
from tracin.errors import ModelError, NotFiniteError
from tracin.gradients.engine import Source
from tracin.shapes import Float
from tracin.tasks import losses as ready_made
from tracin.tasks.losses import split_batch

__all__ = ["Outputs", "outputs_at", "outputs_of", "roots"]

_HESSIAN = "Use curvature='hessian', which needs no such split."


@dataclass(frozen=True)
class Outputs:
    """One batch: the outputs u with their graph to the parameters, and the slopes ∂Σℓ/∂u, which have one to u."""

    made: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    slopes: tuple[Tensor | None, ...]

    def bend(self, pull: Puller, vectors: Sequence[Tensor | None]) -> list[Tensor]:
        """H v: the loss's Hessian in the outputs times k vectors.

        Args:
            pull: Does the products.
            vectors: One [k, *shape of u] per output, None for zero.

        Returns:
            One [k, *shape of u] per output.

        Raises:
            ModelError: The loss has no second derivative.
        """
        k = next((len(v) for v in vectors if v is not None), 0)
        filled = [
            leaf.new_zeros(k, *leaf.shape) if v is None else v
            for leaf, v in zip(self.leaves, vectors, strict=True)
        ]
        with twice_in_loss():
            found = pull(self.slopes, self.leaves, filled)
        return [
            leaf.new_zeros(k, *leaf.shape) if h is None else h
            for leaf, h in zip(self.leaves, found, strict=True)
        ]


class _Cutter:
    """Hands the loss a copy of the model's output that is cut off from the parameters."""

    def __init__(self, at: Sequence[Tensor] | None = None) -> None:
        self.at, self.calls = at, 0
        self.made: list[Tensor] = []
        self.leaves: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:  # noqa: ARG002 (a forward hook)
        self.calls += 1
        if self.calls > 1:
            raise ModelError(
                "the loss calls the model more than once, so there is no single output for Gauss-Newton to split at. "
                + _HESSIAN
            )
        leaves, spec = pytree.tree_flatten(output)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise ModelError(
                f"the model returned a {type(output).__name__} without a tensor that depends on its parameters (or of a class "
                f"that hides its tensors), so Gauss-Newton cannot be split at it. {_HESSIAN}"
            )
        return pytree.tree_unflatten([self._cut(leaf) for leaf in leaves], spec)

    def _cut(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        given = value if self.at is None else self.at[len(self.made)]
        self.made.append(value)
        self.leaves.append(given.detach().clone().requires_grad_())
        # The loss may write into what it gets, a leaf must not be written to.
        return self.leaves[-1].view_as(self.leaves[-1])


@contextmanager
def _cutting(model: nn.Module, at: Sequence[Tensor] | None = None) -> Iterator[_Cutter]:
    cutter = _Cutter(at)
    handle = model.register_forward_hook(cutter)
    try:
        yield cutter
    finally:
        handle.remove()


def outputs_of(source: Source, batch: Batch, value: Any, parameters: Sequence[Tensor]) -> Outputs:
    """Run a batch with the loss cut off from the model.

    Args:
        source: The loss and its rows.
        batch: The batch's place.
        value: The batch.
        parameters: The traced parameters.

    Returns:
        The outputs.

    Raises:
        ModelError: The loss reaches parameters past the model's output, or calls the model more than once or not at all.
    """
    with _cutting(source.root.model) as cutter:
        losses = source.run(value, batch.rows)
    if not cutter.calls:
        raise ModelError(
            f"the loss never calls the model itself (only parts of it), so Gauss-Newton has no output to split at. {_HESSIAN}"
        )
    past = torch.autograd.grad(losses.sum(), list(parameters), retain_graph=True, allow_unused=True)
    if any(gradient is not None for gradient in past):
        raise ModelError(
            "the loss reaches parameters past the model's output (a penalty on weights, or a layer called by the loss), which "
            f"Gauss-Newton would leave out. {_HESSIAN}"
        )
    slopes = torch.autograd.grad(losses.sum(), cutter.leaves, create_graph=True, allow_unused=True)
    return Outputs(tuple(cutter.made), tuple(cutter.leaves), tuple(slopes))


def outputs_at(source: Source, batch: Batch, value: Any, at: Sequence[Tensor]) -> Outputs:
    """As ``outputs_of``, with the loss taken at other outputs than the model's.

    Args:
        source: The loss and its rows.
        batch: The batch's place.
        value: The batch.
        at: The outputs, as ``Outputs.leaves``.

    Returns:
        The outputs.
    """
    with _cutting(source.root.model, at) as cutter:
        losses = source.run(value, batch.rows)
    slopes = torch.autograd.grad(losses.sum(), cutter.leaves, create_graph=True, allow_unused=True)
    return Outputs(tuple(cutter.made), tuple(cutter.leaves), tuple(slopes))


def roots(outputs: Outputs, source: Source, value: Any, n: int) -> tuple[int, Float[Tensor, "n C k"]]:
    r"""A square root of the loss's Hessian in the output: H_n = R_n R_nᵀ for every row.

    For softmax cross-entropy :math:`R = (I - p 1^\top)\,\mathrm{diag}(\sqrt p)`; otherwise by eigenvalues of H_n, which
    is found column by column.

    Args:
        outputs: A batch's outputs.
        source: The loss.
        value: The batch.
        n: Its rows.

    Returns:
        Which of the outputs it belongs to, and the roots; columns that are zero for all rows are left out.

    Raises:
        ModelError: The loss reads several outputs, or is not convex in them.
        NotFiniteError: The Hessian has a NaN or an infinity.
    """
    read = [at for at, slope in enumerate(outputs.slopes) if slope is not None]
    if len(read) != 1 or outputs.leaves[read[0]].shape[:1] != (n,):
        raise ModelError(
            f"the loss reads {len(read)} tensors of the model's output (of shapes "
            f"{[list(outputs.leaves[at].shape) for at in read]}): solver='ekfac' needs one, with a row per example. Use "
            "solver='cg', or curvature='hessian'."
        )
    at = read[0]
    logits = outputs.leaves[at].detach()
    if source.loss is ready_made.cross_entropy and logits.dim() == 2:
        return at, _softmax_roots(logits, split_batch(value)[1])
    matrix = _row_hessians(outputs, at, n)
    if not bool(torch.isfinite(matrix).all()):
        raise NotFiniteError(
            f"the loss's second derivative in the model's output is not finite ({source.where})."
        )
    values, vectors = torch.linalg.eigh(matrix)
    most = float(values.abs().max()) if values.numel() else 0.0
    if float(values.min()) < -1e-5 * most:
        raise ModelError(
            f"the loss is not convex in the model's output (its Hessian has the eigenvalue {float(values.min()):.3g}), so "
            "Gauss-Newton has no square root. Use curvature='hessian' with enough damping."
        )
    found = (vectors * values.clamp_min(0.0).sqrt()[:, None, :]).flip(-1)
    used = values.flip(-1).amax(0) > most * torch.finfo(values.dtype).eps
    return at, found[:, :, used].to(logits.dtype)


def _softmax_roots(logits: Tensor, targets: Tensor) -> Float[Tensor, "n C C"]:
    weight = targets.sum(-1) if targets.is_floating_point() else (targets != -100)
    p = logits.softmax(-1)
    columns = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    return columns * weight.to(p.dtype).sqrt()[:, None, None]


def _row_hessians(outputs: Outputs, at: int, n: int) -> Float[Tensor, "n C C"]:
    """Each row's Hessian in its outputs: column c of all rows at once, since a row's loss reads its own output alone."""
    leaf = outputs.leaves[at]
    size = leaf[0].numel()
    unit = torch.eye(size, dtype=leaf.dtype, device=leaf.device)
    vectors = unit[:, None, :].expand(size, n, size).reshape(size, *leaf.shape)
    given = [vectors if number == at else None for number in range(len(outputs.leaves))]
    found = outputs.bend(Puller(), given)[at].detach().reshape(size, n, size)
    matrix = found.permute(1, 0, 2).double()
    return (matrix + matrix.mT) / 2
