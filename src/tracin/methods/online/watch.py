"""What a ledger watches besides its own steps: its optimizer, its parameters, and changes between steps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tracin.errors import IncompleteLedgerWarning, LoopError
from tracin.tasks import Task

__all__ = ["listen", "refuse_other_parameters", "tell_change"]


@runtime_checkable
class Listener(Protocol):
    """A ledger."""

    def _before_step(self, _: Any, args: Any, kwargs: Any) -> None: ...

    def _after_step(self, *_: Any) -> None: ...


def listen(ledger: Listener, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Call the ledger around every step. The optimizer does not keep it alive, and forgets it when it is gone.

    Args:
        ledger: The ledger.
        optimizer: Its optimizer.

    Returns:
        The handles of the hooks.
    """
    me = weakref.ref(ledger)
    handles = [
        optimizer.register_step_pre_hook(partial(_before_step, me)),
        optimizer.register_step_post_hook(partial(_after_step, me)),
    ]
    weakref.finalize(ledger, _remove, tuple(handles)).atexit = False
    return handles


def _before_step(ledger: Any, optimizer: Any, args: Any, kwargs: Any) -> None:
    online = ledger()
    if online is not None:
        online._before_step(optimizer, args, kwargs)


def _after_step(ledger: Any, *_: Any) -> None:
    online = ledger()
    if online is not None:
        online._after_step()


def _remove(handles: tuple[Any, ...]) -> None:
    for handle in handles:
        handle.remove()


def tell_change(
    model: nn.Module, losses: Tensor, state: tuple[Any, ...], losses_now: Tensor, state_now: tuple[Any, ...]
) -> bool:
    """Warn if the queries' losses changed between the end of a step and the beginning of the next.

    Args:
        model: The model.
        losses: [q], after the step before.
        state: The model's state then.
        losses_now: [q], now.
        state_now: The model's state now.

    Returns:
        Whether they did.

    Warns:
        IncompleteLedgerWarning: They did.
    """
    if torch.allclose(losses, losses_now, rtol=1e-6, atol=1e-9):
        return False
    warnings.warn(
        f"{_changed(model, state, state_now)} changed between two steps, outside of online.step(ids) or in a block that took "
        "no step: scores('ideal') do not sum to the whole fall of a query's loss. Put all parameters into one "
        "optimizer's groups; what else changes the model is credited to no row.",
        IncompleteLedgerWarning,
        stacklevel=5,
    )
    return True


def _changed(model: nn.Module, before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    """The name of a parameter or buffer whose norm differs between two states, else of one that was written to."""
    named = [*model.named_parameters(), *model.named_buffers()]
    normed = [name for name, tensor in named if tensor.is_floating_point() and tensor.numel()]
    if len(before[2]) == len(after[2]) == len(normed):
        for name, old, new in zip(normed, before[2], after[2], strict=True):
            if old != new:
                return name
    old, new = (*before[0], *before[1]), (*after[0], *after[1])
    if len(old) == len(new) == len(named):
        for (name, _), mine, theirs in zip(named, old, new, strict=True):
            if mine != theirs:
                return name
    return "the model"


def refuse_other_parameters(
    task: Task, traced: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Refuse a step that moves other parameters than those that the ledger traces.

    Args:
        task: The task, whose globs choose the parameters.
        traced: Parameters by name, as they were when the ledger was made.
        optimizer: The optimizer that is about to step.

    Raises:
        LoopError: A parameter was frozen, unfrozen or replaced since.
    """
    mend = "Save the ledger before such a change, and make a new one after it; the sum of their scores is the score."
    frozen = [name for name, parameter in traced.items() if not parameter.requires_grad]
    if frozen:
        raise LoopError(f"{frozen[0]} was frozen after the ledger was made, and is traced. {mend}")
    known = {id(parameter) for parameter in traced.values()}
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if moved <= known:
        return
    for name, parameter in task.select().traced.items():
        if id(parameter) in moved - known and _has_gradient(parameter):
            raise LoopError(
                f"{name} has a gradient, and the ledger does not trace it: it was unfrozen or replaced after the ledger was "
                f"made. {mend}"
            )


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient if gradient.layout == torch.strided else gradient.to_dense()).any())
