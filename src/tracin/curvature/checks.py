r"""Whether second derivatives are whole, tried once on a batch.

A backward pass that cannot itself be differentiated (an ``autograd.Function`` marked ``@once_differentiable``, a ``.detach()``
or NumPy inside its ``backward``) is not always an error: autograd can find no path through it and count it as zero. Three
comparisons see that, each with something that needs first derivatives only:

- :math:`\langle w, J v \rangle = \langle J^\top w, v \rangle` for random w, v: :math:`J^\top w` is one ordinary backward pass;
- the loss's Hessian in the model's output against a central difference of its slopes;
- the Hessian in the parameters against a central difference of the gradient, on a float64 copy of the model where it runs.

A kink (ReLU) between the two points of a difference spoils it, so that one of several step lengths has to agree,
row by row or parameter by parameter.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracin.curvature.outputs import Outputs, outputs_at, outputs_of
from tracin.curvature.pulling import Puller, twice
from tracin.curvature.vectors import Vectors
from tracin.data import Batch, to_device
from tracin.errors import ModelError, TracinError
from tracin.gradients.agreement import coarsest, tolerance
from tracin.gradients.engine import Source
from tracin.tasks import losses as ready_made

__all__ = ["check_hessian", "check_jacobian", "check_loss", "refuse_linear"]

READY_MADE = (
    ready_made.cross_entropy,
    ready_made.mean_squared_error,
    ready_made.binary_cross_entropy,
)
# Steps of a central difference, in units of the size of what is moved: long ones for accuracy, short ones for kinks.
STEPS = {torch.float64: (1e-4, 1e-6, 1e-8), torch.float32: (5e-2, 5e-3, 5e-4)}
COARSE_STEPS = (0.5, 0.1)
# Largest relative difference from a central difference that counts as equal.
EQUAL = {torch.float64: 1e-5, torch.float32: 2e-2}
COARSE = 0.3
# Outputs at which a loss is tried.
ATTEMPTS = 3

_MEND = (
    "The backward pass of some operation cannot be differentiated itself: look for a torch.autograd.Function marked "
    "@once_differentiable, or for .detach(), .data or NumPy in its backward, and write it with differentiable operations"
)

# Slopes at parameters or outputs that are moved by so many steps: one tensor per tensor moved.
SlopesAt = Callable[[float], list[Tensor]]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _norm(values: Sequence[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(v.double()) for v in values]).norm())


def _dtype(source: Source, layout: Vectors) -> torch.dtype:
    return source.dtype if source.found else coarsest(p.dtype for p in layout.tensors)


def _dot(left: Sequence[Tensor | None], right: Sequence[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(left, right, strict=True) if a is not None]
    return float(sum(float((a * b).sum()) for a, b in pairs))


def check_jacobian(
    made: Sequence[Tensor],
    weights: Sequence[Tensor],
    pulled: Sequence[Tensor | None],
    source: Source,
    layout: Vectors,
) -> None:
    """Compare ⟨w, J v⟩ with ⟨Jᵀ w, v⟩; v is scaled so that every parameter counts alike.

    Args:
        made: The model's outputs, with their graph.
        weights: w as variables.
        pulled: Jᵀ w with its graph to w.
        source: The loss and its rows.
        layout: The parameters.

    Raises:
        ModelError: They differ.
    """
    generator = torch.Generator().manual_seed(0)
    sent = [_normal(u, generator) for u in made]
    found = torch.autograd.grad(
        list(made), layout.tensors, sent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    back = [g.detach() for g in found]
    dtype, total = _dtype(source, layout), _norm(back)
    if not 0 < total < float("inf"):
        return
    # A parameter whose Jᵀ w is rounding noise has no accuracy to ask for.
    least = 10 * torch.finfo(dtype).eps / tolerance(dtype) * total
    scales = [total / max(float(torch.linalg.vector_norm(g)), least) for g in back]
    v = [_normal(g, generator) * scale for g, scale in zip(back, scales, strict=True)]
    moved = Puller()(pulled, weights, [value[None] for value in v])
    there = _dot([None if m is None else m[0].detach() for m in moved], sent)
    size = _norm([g.double() * scale for g, scale in zip(back, scales, strict=True)])
    error = abs(there - _dot(back, v)) / size
    if error > min(10 * tolerance(dtype), COARSE):
        raise ModelError(
            f"products with Gauss-Newton would leave out a part of the model ({source.where}): ⟨w, J v⟩ and ⟨Jᵀ w, v⟩ are "
            f"{error:.1e} of their size apart. {_MEND}; or use solver='ekfac', of first derivatives only ('exact' too, if "
            "every layer has a rule)."
        )


def _disagree(
    products: Sequence[Tensor], slopes_by: SlopesAt, steps: Sequence[float], equal: float
) -> set[int]:
    """Which products with a Hessian are not the central difference of the slopes for any step."""
    left = set(range(len(products)))
    for step in steps:
        ahead, behind = slopes_by(step), slopes_by(-step)
        measured = [(a.double() - b.double()) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
        eps = torch.finfo(coarsest(a.dtype for a in ahead)).eps
        total, noise = _norm(measured), 10 * eps / max(steps) * _norm(ahead)
        for at in tuple(left):
            own = float(torch.linalg.vector_norm(measured[at]))
            off = float(torch.linalg.vector_norm(measured[at] - products[at].double()))
            if off <= equal * max(own, equal**0.5 * total) + noise:
                left.remove(at)
        if not left:
            break
    return left


def _by_row(values: Sequence[Tensor], n: int) -> list[Tensor]:
    """One tensor per row where all have rows, so that a kink spoils the difference of its own row only."""
    if not all(value.shape[:1] == (n,) for value in values):
        return list(values)
    return list(torch.cat([value.reshape(n, -1) for value in values], 1))


def _size(values: Sequence[Tensor]) -> float:
    """Root mean square; 1 where all is zero."""
    return _norm(values) / max(sum(v.numel() for v in values), 1) ** 0.5 or 1.0


def _tried(dtype: torch.dtype) -> tuple[Sequence[float], float]:
    return STEPS.get(dtype, COARSE_STEPS), EQUAL.get(dtype, COARSE)


def check_loss(found: Outputs, source: Source, batch: Batch, value: Any) -> None:
    """Compare the loss's Hessian in the model's output with a central difference; the ready-made losses are known.

    Args:
        found: The batch's outputs.
        source: The loss and its rows.
        batch: The batch's place.
        value: The batch, which is copied.

    Raises:
        ModelError: They differ.
    """
    if source.loss in READY_MADE:
        return
    generator = torch.Generator().manual_seed(1)
    made = [leaf.detach() for leaf in found.leaves]
    size = _size(made)
    left: set[int] | None = None
    for attempt in range(ATTEMPTS):
        # A row beside a kink is tried again at other outputs.
        if attempt:
            beside = [u + 0.1 * size * _normal(u, generator) for u in made]
            found = outputs_at(source, batch, to_device(value, source.device, copy=True), beside)
        wrong = _wrong_rows(found, source, batch, value, [size * _normal(u, generator) for u in made])
        left = wrong if left is None else left & wrong
        if not left:
            return
    raise ModelError(
        f"the second derivative of the loss in the model's output is not that of its slope ({source.where}), so Gauss-Newton "
        f"would be wrong. {_MEND}, or use one of tracin.losses."
    )


def refuse_linear(
    batches: Callable[[], Iterator[tuple[Batch, Any]]], source: Source, layout: Vectors
) -> None:
    """Refuse a loss that is linear in the model's output at every row: its Gauss-Newton matrix is zero.

    Batches are read until one has a row with curvature, most often the first. The ready-made losses have it.

    Args:
        batches: Makes a pass over the rows.
        source: The loss and its rows.
        layout: The parameters.

    Raises:
        ModelError: Rows have slopes, and none has curvature; or the loss has no second derivative.
    """
    if source.loss in READY_MADE:
        return
    generator, sloped = torch.Generator().manual_seed(3), False
    for batch, value in batches():
        spare = to_device(value, source.device, copy=True)
        found = outputs_of(source, batch, value, layout.tensors)
        bent = found.bend(Puller(), [_normal(u, generator)[None] for u in found.leaves])
        if any(bool((h != 0).any()) for h in bent):
            return
        check_loss(found, source, batch, spare)  # a derivative that autograd cannot see is zero too
        sloped |= any(s is not None and bool((s != 0).any()) for s in found.slopes)
    if sloped:
        raise ModelError(
            f"the loss is linear in the model's output at every row ({source.where}), so Gauss-Newton is zero and scores would "
            "be gradient products divided by the damping. If the model ends in log_softmax, let it return logits (and the loss "
            "take them); otherwise use curvature='hessian', or a loss that is not piecewise linear."
        )


def _wrong_rows(found: Outputs, source: Source, batch: Batch, value: Any, v: Sequence[Tensor]) -> set[int]:
    """Rows whose product with the loss's Hessian is not the change of their slope."""
    leaves = [leaf.detach() for leaf in found.leaves]
    products = [h[0].detach() for h in found.bend(Puller(), [value[None] for value in v])]
    if not all(bool(torch.isfinite(p).all()) for p in products):
        return set()  # the products themselves refuse it, and say so
    slopes_by = partial(_slopes_moved, source, batch, value, leaves, v)
    return _disagree(
        _by_row(products, batch.size), slopes_by, *_tried(coarsest(leaf.dtype for leaf in leaves))
    )


def _slopes_moved(
    source: Source, batch: Batch, value: Any, leaves: Sequence[Tensor], v: Sequence[Tensor], step: float
) -> list[Tensor]:
    spare = to_device(value, source.device, copy=True)
    found = outputs_at(source, batch, spare, [u + step * d for u, d in zip(leaves, v, strict=True)])
    slopes = zip(leaves, found.slopes, strict=True)
    return _by_row([torch.zeros_like(u) if s is None else s.detach() for u, s in slopes], batch.size)


Times = Callable[[Source, Vectors, Puller, Batch, Any], Callable[[Sequence[Tensor]], list[Tensor | None]]]


def check_hessian(times: Times, source: Source, layout: Vectors, batch: Batch, value: Any) -> None:
    """Compare a product with the Hessian with a central difference of the gradient.

    Args:
        times: Makes the products of a batch.
        source: The loss and its rows.
        layout: The parameters.
        batch: The batch's place.
        value: The batch, which is copied.

    Raises:
        ModelError: They differ.
    """
    same = None
    with contextlib.suppress(TracinError, RuntimeError, TypeError, ValueError, copy.Error):
        # Not every model runs in float64: one that does not is tried in its own dtype.
        wide = _double(source, layout, batch, value)
        same = None if wide is None else _hessian_agrees(times, batch, *wide)
    if same is None:
        same = _hessian_agrees(times, batch, source, layout, value)
    if not same:
        raise ModelError(
            f"products with the Hessian are not the change of the gradient ({source.where}): they would leave out a part of "
            f"the model or the loss. {_MEND}; or use curvature='gauss_newton' with solver='ekfac' (or 'exact', where every layer "
            "has a rule), which takes first derivatives of the model only."
        )


def _hessian_agrees(times: Times, batch: Batch, source: Source, layout: Vectors, value: Any) -> bool:
    generator = torch.Generator().manual_seed(2)
    size = _size([p.detach() for p in layout.tensors])
    v = [_normal(p, generator) * size for p in layout.tensors]
    gradient = partial(_gradient_moved, source, layout, batch, value, v)
    now = gradient(0.0)
    with twice():
        spare = to_device(value, source.device, copy=True)
        made = times(source, layout, Puller(), batch, spare)([d[None] for d in v])
    products = [torch.zeros_like(g) if h is None else h[0].detach() for g, h in zip(now, made, strict=True)]
    if not all(bool(torch.isfinite(p).all()) for p in products):
        return True  # the products themselves refuse it, and say so
    return not _disagree(products, gradient, *_tried(_dtype(source, layout)))


def _gradient_moved(
    source: Source, layout: Vectors, batch: Batch, value: Any, v: Sequence[Tensor], step: float
) -> list[Tensor]:
    with _moved(layout.tensors, v, step):
        losses = source.run(to_device(value, source.device, copy=True), batch.rows)
        return list(
            torch.autograd.grad(losses.sum(), layout.tensors, allow_unused=True, materialize_grads=True)
        )


@contextmanager
def _moved(parameters: Sequence[Tensor], v: Sequence[Tensor], step: float) -> Iterator[None]:
    """The parameters a step along v, and exactly where they were afterwards."""
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, d in zip(parameters, v, strict=True):
                p.add_(d, alpha=step)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


def _double(source: Source, layout: Vectors, batch: Batch, value: Any) -> tuple[Source, Vectors, Any] | None:
    """A float64 copy of the model, its traced parameters and the batch; None where the loss does not read the copy alone."""
    if _dtype(source, layout) != coarsest(p.dtype for p in layout.tensors):
        return None  # mixed precision inside the model, which a copy would keep
    root = copy.deepcopy(source.root).double()
    named = dict(root.model.named_parameters(remove_duplicate=False))
    own = Vectors({name: named[name] for name in layout.parameters if name in named})
    if own.size != layout.size:
        return None
    moved = replace(source, root=root, found=None, irregular={})
    wide = pytree.tree_map(_widened, value)
    losses = moved.run(to_device(wide, source.device, copy=True), batch.rows)
    reached = torch.autograd.grad(losses.sum(), own.tensors, allow_unused=True)
    return (moved, own, wide) if any(g is not None for g in reached) else None


def _widened(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
