"""What is traced: a model, the loss of each example, and which parameters count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tracin.data import user_code
from tracin.errors import LossError, ModelError, NotFiniteError, OptionError

__all__ = ["Selection", "Task", "row_losses"]

Loss = Callable[[nn.Module, Any], Any]
Outputs = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Selection:
    """The model's parameters by what happens to them; tied ones once, under their first name."""

    traced: dict[str, nn.Parameter]
    frozen: dict[str, nn.Parameter]
    excluded: dict[str, nn.Parameter]
    aliases: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Task:
    r"""A model and the loss of each of its examples, :math:`\ell(\theta, z)`.

    Args:
        model: Any module. Scoring runs it in eval mode and gives it back bit-identical.
        loss: ``loss(model, batch) -> Tensor [n]``: one number per row, differentiable, each depending on its row alone.
        query_loss: The loss whose change is explained, where it is not the training loss.
        parameters: A glob or globs over ``model.named_parameters()``: which parameters count. ``"*"`` is all.
        outputs: ``outputs(model, batch) -> (logits [n, C], labels [n])``. The ready-made losses bring it.

    Raises:
        OptionError: An argument of another type.

    Example:
        >>> import tracin
        >>> task = Task(nn.Linear(2, 3), tracin.losses.cross_entropy, parameters="weight")
        >>> sorted(task.select().excluded)
        ['bias']
    """

    model: nn.Module
    loss: Loss
    query_loss: Loss | None = None
    parameters: str | Sequence[str] = "*"
    outputs: Outputs | None = field(default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise OptionError(f"Task: model is a {type(self.model).__name__}, not a torch.nn.Module.")
        for name, value in (("loss", self.loss), ("query_loss", self.query_loss), ("outputs", self.outputs)):
            if (value is not None and not callable(value)) or (name == "loss" and value is None):
                raise OptionError(
                    f"Task: {name} is a {type(value).__name__}, not a function of (model, batch)."
                )
        if isinstance(self.loss, nn.Module):
            raise OptionError(
                f"Task: loss is the module {type(self.loss).__name__}. Give a function loss(model, batch) -> Tensor [n], "
                "such as lambda model, batch: criterion(model(batch[0]), batch[1]) with reduction='none'."
            )
        globs = self.globs if isinstance(self.parameters, str | Sequence) else (None,)
        if not globs or not all(isinstance(glob, str) for glob in globs):
            raise OptionError(
                f"Task: parameters is {self.parameters!r}. Give a glob or a list of globs, such as 'head.*'."
            )
        if self.outputs is None:
            object.__setattr__(self, "outputs", getattr(self.loss, "outputs", None))

    @property
    def globs(self) -> tuple[str, ...]:
        """The parameter globs as a tuple."""
        return (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)

    def select(self) -> Selection:
        """Sort the parameters into traced, frozen (``requires_grad=False``) and excluded by the globs.

        Returns:
            The selection.

        Raises:
            OptionError: A glob matches no parameter.
            ModelError: No parameter is left to trace.
        """
        parameters = dict(self.model.named_parameters())
        first = {id(parameter): name for name, parameter in parameters.items()}
        names: dict[str, list[str]] = {name: [] for name in parameters}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[first[id(parameter)]].append(name)
        if not parameters:
            raise ModelError(
                f"the model {type(self.model).__name__} has no parameters: there is nothing to trace."
            )
        everything = [name for group in names.values() for name in group]
        for glob in self.globs:
            if not any(fnmatchcase(name, glob) for name in everything):
                raise OptionError(
                    f"Task: the parameter glob {glob!r} matches nothing. The parameters are "
                    f"{', '.join(everything[:8])}{', …' if len(everything) > 8 else ''}."
                )
        chosen = {
            name
            for name in names
            if any(fnmatchcase(alias, glob) for alias in names[name] for glob in self.globs)
        }
        traced = {name: p for name, p in parameters.items() if name in chosen and p.requires_grad}
        if not traced:
            raise ModelError(
                "every selected parameter is frozen (requires_grad=False), so there is nothing to trace. Call "
                "requires_grad_(True) on those that training changes."
            )
        return Selection(
            traced=traced,
            frozen={name: p for name, p in parameters.items() if not p.requires_grad},
            excluded={name: p for name, p in parameters.items() if p.requires_grad and name not in chosen},
            aliases={name: tuple(group) for name, group in names.items()},
        )


def row_losses(
    loss: Loss,
    model: nn.Module,
    value: Any,
    rows: Sequence[int],
    where: str,
    mend: str = "leave the checkpoint out",
    *,
    look: bool = True,
) -> Tensor:
    """Run the user's loss and hold it to its contract: a differentiable vector [n], finite.

    Args:
        loss: The user's function.
        model: Its model.
        value: The batch.
        rows: Positions of the batch's rows, for messages.
        where: Checkpoint and data source, for messages.
        mend: What can be done about a loss that is not finite, for messages.
        look: Look for losses that are not finite, for which an accelerator must be waited for.

    Returns:
        The losses [n], with their graph.

    Raises:
        LossError: Not a floating-point vector of the right length, or cut off from the parameters.
        NotFiniteError: A loss is NaN or infinite.
    """
    with user_code("the loss", rows, where), torch.enable_grad():
        losses = loss(model, value)
    n = len(rows)
    if not isinstance(losses, Tensor):
        raise LossError(
            f"the loss returned a {type(losses).__name__}: it must return a Tensor [n], one number per row."
        )
    if losses.dim() == 0:
        raise LossError(
            "the loss returned one number for the whole batch. Return one per row: reduction='none' "
            "(and a sum or mean over each row's own positions)."
        )
    if losses.dim() > 1:
        raise LossError(
            f"the loss returned the shape {list(losses.shape)}: it must be [n] = [{n}]. Sum or average over each row's own "
            "positions, for example losses.flatten(1).sum(1)."
        )
    if len(losses) != n:
        raise LossError(
            f"the loss returned {len(losses)} numbers for a batch of {n} rows ({where}). Return exactly one per row; for "
            "tokens or pixels, reshape to [n, ...] and sum over the rest."
        )
    if not losses.is_floating_point():
        raise LossError(f"the loss returned {losses.dtype}: it must be floating point to have a gradient.")
    if not losses.requires_grad:
        raise LossError(
            "the loss is cut off from the model's parameters (no gradient reaches it). Look for .detach(), "
            ".item(), torch.no_grad() or torch.inference_mode() in the loss or the model."
        )
    if look and not math.isfinite(float(losses.detach().sum())):
        finite = torch.isfinite(losses.detach())
        if bool(finite.all()):
            return losses
        at = int((~finite).nonzero()[0])
        row, value_text = rows[at], float(losses.detach()[at])
        raise NotFiniteError(
            f"the loss of row {row} is {value_text} ({where}). Look at this row's input, or {mend}."
        )
    return losses
