"""The task's loss as a function of the head's output alone, in float64.

The body of the model does not run again: the loss gets a stand-in that answers every call with the logits it was given, in
the place where the model returns them. Two things make this exact, and both are checked on the user's own batches: the loss
reads the model only through what the model returns, and what it reads there is the head's output. Whatever float tensors
the loss brings along (class weights, soft targets) are widened to float64 on the way.

Axis letters: n rows · C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tracin.curvature.pulling import twice_in_loss
from tracin.data import Batch, to_device, user_code
from tracin.errors import LossError, ModelError, UserCodeError
from tracin.gradients.agreement import tolerance
from tracin.scoring.head import called, one_call
from tracin.shapes import Float
from tracin.tasks import Task, losses
from tracin.tasks.losses import split_batch
from tracin.tasks.task import row_losses

__all__ = ["HeadLoss", "Place", "check_loss", "find_place", "kept_for_loss"]

Loss = Callable[[nn.Module, Any], Any]
_NARROW = {torch.float32, torch.float16, torch.bfloat16}
# A float64 model may have a loss that rounds some constant to float32.
_CLOSE = 1e-6
_NARROWING = {Tensor.float, Tensor.half, Tensor.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where the head's output stands in what the model returns."""

    leaf: int
    spec: Any

    def filled(self, logits: Tensor) -> Any:
        """What the model would return; everything but the logits is None."""
        leaves: list[Any] = [None] * self.spec.num_leaves
        leaves[self.leaf] = logits
        return pytree.tree_unflatten(leaves, self.spec)


class _StandIn(nn.Module):
    """Answers like the model, whatever it is asked."""

    def __init__(self, place: Place, logits: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "_answer", place.filled(logits))

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        return self._answer

    def __getattr__(self, name: str) -> Any:
        raise LossError(
            f"the loss reads model.{name}: RepresenterPoints needs a loss that depends on the model only through what it "
            "returns. Take such terms (a penalty on weights, say) out of the loss."
        )


class _Wide(TorchFunctionMode):
    """Float tensors are widened to float64 before every function, and none is narrowed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NARROWING:
            func = Tensor.double
        args, kwargs = pytree.tree_map(_widened, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.dtype in _NARROW:
        return leaf.to(torch.float64)
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _NARROW else leaf


@runtime_checkable
class LossBatches(Protocol):
    """Makes a pass over the rows and the values that the loss takes."""

    @property
    def whole(self) -> bool:
        """Whether all batches are in memory at once; else each pass reads them anew."""
        ...

    def __call__(self) -> Iterator[tuple[Sequence[int], Any]]:
        """One pass: the rows of each batch, and its value."""
        ...


@dataclass(frozen=True, eq=False)
class HeadLoss:
    r"""Losses :math:`\ell_i(u_i)` of all rows at given logits, and their derivatives.

    Args:
        loss: The user's function.
        place: Where the logits stand in what the model returns.
        batches: The rows.
        where: For messages.
    """

    loss: Loss
    place: Place
    batches: LossBatches
    where: str

    def of_batch(self, logits: Float[Tensor, "b C"], rows: Sequence[int], value: Any) -> Float[Tensor, " b"]:
        """The losses of a batch.

        Args:
            logits: Float64; the losses are differentiable in them.
            rows: The batch's rows.
            value: The batch.

        Returns:
            One loss per row, in float64.

        Raises:
            LossError: The loss reads something else of the model.
        """
        try:
            with _Wide():
                found = row_losses(self.loss, _StandIn(self.place, logits), value, rows, self.where)
        except UserCodeError as error:
            raise LossError(
                "RepresenterPoints evaluates the loss on the head's output alone, everything else that the model returns being "
                f"None, and this failed: {error}"
            ) from error
        return found.to(torch.float64)

    def __call__(self, logits: Float[Tensor, "n C"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n C"]]:
        """Losses and their gradients in the logits.

        Args:
            logits: Float64.

        Returns:
            Losses [n] and gradients [n, C].
        """
        values, slopes = [], []
        for rows, value in self.batches():
            at = logits[rows[0] : rows[0] + len(rows)].detach().requires_grad_()
            found = self.of_batch(at, rows, value)
            slopes.append(torch.autograd.grad(found.sum(), at)[0])
            values.append(found.detach())
        return torch.cat(values), torch.cat(slopes)

    def curvature(self, logits: Float[Tensor, "n C"]) -> Callable[[Tensor], Tensor]:
        r"""The products :math:`v_i \mapsto \nabla^2 \ell_i(u_i)\, v_i` at these logits.

        The graphs of the slopes are kept for all products where the batches are; else each product builds them anew, one
        batch at a time.

        Args:
            logits: Float64.

        Returns:
            A function of [n, C] to [n, C].
        """
        if not self.batches.whole:
            return _ProductsAnew(self, logits.detach())
        return _Products([self.slopes(logits, rows, value) for rows, value in self.batches()])

    def slopes(
        self, logits: Float[Tensor, "n C"], rows: Sequence[int], value: Any
    ) -> tuple[Float[Tensor, "b C"], Float[Tensor, "b C"]]:
        """The gradients of a batch's losses in its logits, with their graph.

        Args:
            logits: Of all rows.
            rows: The batch's rows.
            value: The batch.

        Returns:
            The batch's logits, which the gradients depend on, and the gradients.
        """
        at = logits[rows[0] : rows[0] + len(rows)].detach().requires_grad_()
        found = self.of_batch(at, rows, value)
        return at, torch.autograd.grad(found.sum(), at, create_graph=True)[0]


@dataclass(frozen=True, eq=False)
class _Products:
    """Products from graphs that are kept."""

    parts: list[tuple[Tensor, Tensor]]

    def __call__(self, vectors: Tensor) -> Tensor:
        some = vectors.split([len(at) for at, _ in self.parts])
        pairs = zip(self.parts, some, strict=True)
        return torch.cat([_product(at, slope, along, keep=True) for (at, slope), along in pairs])


@dataclass(frozen=True, eq=False)
class _ProductsAnew:
    """Products with one batch and its graph in memory at a time."""

    loss: HeadLoss
    logits: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        batches = self.loss.batches()
        return torch.cat([self._of_batch(rows, value, vectors) for rows, value in batches])

    def _of_batch(self, rows: Sequence[int], value: Any, vectors: Tensor) -> Tensor:
        at, slope = self.loss.slopes(self.logits, rows, value)
        return _product(at, slope, vectors[rows[0] : rows[0] + len(rows)], keep=False)


def _product(at: Tensor, slope: Tensor, vectors: Tensor, *, keep: bool) -> Tensor:
    if not slope.requires_grad:
        return torch.zeros_like(at)
    with twice_in_loss():
        found = torch.autograd.grad(slope, at, vectors, retain_graph=keep, allow_unused=True)[0]
    return torch.zeros_like(at) if found is None else found


def kept_for_loss(loss: Loss, value: Any) -> Any:
    """What the loss needs of a batch: the ready-made one needs no inputs."""
    return (None, split_batch(value)[1]) if loss is losses.cross_entropy else value


def find_place(task: Task, head: nn.Linear, name: str, batch: Batch, value: Any, where: str) -> Place:
    """Where the head's output stands in what the model returns to the loss.

    Args:
        task: Model and loss.
        head: The layer.
        name: Its name.
        batch: The rows.
        value: The batch.
        where: For messages.

    Returns:
        The place.

    Raises:
        ModelError: The model returns the head's output nowhere, or the loss calls it more than once.
    """
    with (
        called(task.model) as outer,
        called(head) as inner,
        user_code("the loss", batch.rows, where),
        torch.no_grad(),
    ):
        task.loss(task.model, value)
    output = one_call(inner, name, batch.size).output
    leaves, spec = pytree.tree_flatten(outer[0].output if len(outer) == 1 else None)
    places = [at for at, leaf in enumerate(leaves) if leaf is output]
    if len(places) != 1:
        returned = type(outer[0].output).__name__ if len(outer) == 1 else f"{len(outer)} answers"
        raise ModelError(
            f"the loss does not get the output of {name!r} as it is: the model returned a {returned}. Let the model return the "
            "head's output, alone or as an entry of a tuple or dict."
        )
    return Place(places[0], spec)


def check_loss(
    task: Task, head: nn.Linear, wide: HeadLoss, batch: Batch, values: tuple[Any, Any], logits: Tensor
) -> None:
    """Compare the loss as a function of logits with the loss of the model itself, at the logits given.

    Args:
        task: Model and loss; the model holds the checkpoint.
        head: The layer.
        wide: The loss as a function of logits.
        batch: The rows.
        values: The batch for the model, and what is kept of it.
        logits: The head's output, or what to put in its place, in the model's dtype.

    Raises:
        LossError: They differ in value or in gradient, or the loss mixes rows.
    """
    given = logits.detach().clone().requires_grad_()
    handle = head.register_forward_hook(_Answer(given))
    try:
        mine = row_losses(
            task.loss, task.model, to_device(values[0], given.device, copy=True), batch.rows, wide.where
        )
        slope = _slope(mine.sum(), given)
    finally:
        handle.remove()
    at = given.detach().double().requires_grad_()
    theirs = wide.of_batch(at, batch.rows, values[1])
    wide_slope = _slope(theirs.sum(), at, retain_graph=True)
    for what, one, other in (("values", mine, theirs), ("gradients", slope, wide_slope)):
        error = float((one.double() - other).detach().norm() / other.detach().norm().clamp_min(1e-6))
        if not error <= max(tolerance(given.dtype), _CLOSE):
            raise LossError(
                f"the loss is not a function of the head's output alone: its {what} differ by {error:.1e} when only the logits "
                "are given. Let it read the model only through what the model returns, and draw nothing at random."
            )
    for row in {0, batch.size - 1}:
        alone = _slope(theirs[row], at, retain_graph=True)
        alone[row] = 0
        if bool(alone.any()):
            raise LossError(
                f"the loss of row {batch.rows[row]} depends on the logits of other rows, so it is no loss per row. Compute each "
                "row's loss from that row alone."
            )


def _slope(loss: Tensor, at: Tensor, *, retain_graph: bool = False) -> Tensor:
    found = torch.autograd.grad(loss, at, retain_graph=retain_graph, allow_unused=True)[0]
    return torch.zeros_like(at) if found is None else found


@dataclass(frozen=True, eq=False)
class _Answer:
    """A hook that puts a tensor in the place of a layer's output."""

    output: Tensor

    def __call__(self, *_: Any) -> Tensor:
        return self.output
