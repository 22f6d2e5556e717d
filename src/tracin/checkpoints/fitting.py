"""Does a checkpoint fit a model? Every name, shape, type and value is looked at before it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tracin.checkpoints.checkpoint import Checkpoint
from tracin.checkpoints.names import plain_names
from tracin.checkpoints.reading import EXTRA_STATE, storage_place
from tracin.errors import CheckpointError

__all__ = ["fit"]


def fit(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """The checkpoint's tensors under the names, and in the dtypes, of ``model.state_dict()``.

    A tied parameter may stand in the checkpoint under one of its names. A dtype that the model's holds without
    loss is converted. The model is only looked at.

    Args:
        checkpoint: The checkpoint, which is read here.
        model: The model, possibly wrapped.

    Returns:
        A tensor on the CPU for each key of the model's state; tied names share one.

    Raises:
        CheckpointError: The first key that is missing, unexpected, or of another shape or dtype; tied names with
            different values; a parameter with a NaN or an infinity. The message names checkpoint and parameter.

    Example:
        >>> fit(Checkpoint({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}), nn.Linear(2, 1))["bias"]
        tensor([0.])
        >>> fit(Checkpoint({"weight": torch.ones(1, 3), "bias": torch.zeros(1)}), nn.Linear(2, 1))
        Traceback (most recent call last):
        tracin.errors.CheckpointError: checkpoint does not fit the model: 'weight' is [1, 3] in the checkpoint and
        [1, 2] in the model. Build the model as it was when it was trained.
    """
    state = checkpoint.load()
    expected = {name: value for name, value in model.state_dict().items() if not name.endswith(EXTRA_STATE)}
    plain, _ = plain_names(expected)
    twins: dict[tuple[object, ...], list[str]] = {}
    for name, value in expected.items():
        twins.setdefault(storage_place(value), []).append(name)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    result: dict[str, Tensor] = {}
    for name, value in expected.items():
        ties = twins[storage_place(value)]
        present = [plain[twin] for twin in ties if plain[twin] in state]
        if not present:
            raise CheckpointError(
                _misfit(checkpoint, f"{name!r} is missing from the checkpoint{_other(state, plain)}")
            )
        own = state.get(plain[name], state[present[0]])
        fitted = _converted(checkpoint, name, own, value, finite=name in parameters)
        if own is not state[present[0]]:
            _check_tied(checkpoint, name, fitted, state[present[0]])
        result[name] = result.get(ties[0], fitted)
    for name in state:
        if name not in plain.values():
            raise CheckpointError(_misfit(checkpoint, f"{name!r} is in the checkpoint and not in the model"))
    return result


def _misfit(checkpoint: Checkpoint, what: str) -> str:
    return f"{checkpoint.name} does not fit the model: {what}. Build the model as it was when it was trained."


def _other(state: dict[str, Tensor], plain: dict[str, str]) -> str:
    others = [name for name in state if name not in plain.values()]
    return f", which has {others[0]!r} that the model lacks" if others else ""


def _converted(checkpoint: Checkpoint, name: str, own: Tensor, value: Tensor, *, finite: bool) -> Tensor:
    if own.shape != value.shape:
        shapes = f"{list(own.shape)} in the checkpoint and {list(value.shape)} in the model"
        raise CheckpointError(_misfit(checkpoint, f"{name!r} is {shapes}"))
    if not _lossless(own.dtype, value.dtype):
        raise CheckpointError(
            f"{checkpoint.name}: {name!r} is {own.dtype}, which the model's {value.dtype} cannot hold without loss. "
            f"Convert the model, model.to({own.dtype}), or save the checkpoint in {value.dtype}."
        )
    fitted = own.to(value.dtype)
    # One NaN or infinity shows in the sum, which is cheaper than a look at each; so may an overflow, which the look clears.
    if finite and not (bool(torch.isfinite(fitted.sum())) or bool(torch.isfinite(fitted).all())):
        raise CheckpointError(
            f"{checkpoint.name}: parameter {name!r} has a NaN or an infinity: training had diverged by then. "
            "Leave this checkpoint out."
        )
    return fitted


def _lossless(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of a dtype is one of the other, and of its kind; torch promotes no float8, and no uint16."""
    if (source.is_floating_point, source.is_complex) != (target.is_floating_point, target.is_complex):
        return False
    if source == target:
        return True
    if source.is_complex or torch.bool in (source, target):
        return torch.promote_types(source, target) == target
    if torch.float4_e2m1fn_x2 in (source, target):  # two values in one entry
        return False
    if source.is_floating_point:
        own, other = torch.finfo(source), torch.finfo(target)
        smallest = other.tiny * other.eps <= own.tiny * own.eps
        return other.max >= own.max and smallest and other.eps <= own.eps
    held, holds = torch.iinfo(source), torch.iinfo(target)
    return holds.min <= held.min and holds.max >= held.max


def _check_tied(checkpoint: Checkpoint, name: str, fitted: Tensor, first: Tensor) -> None:
    if not torch.equal(fitted, first.to(fitted.dtype)):
        raise CheckpointError(
            f"{checkpoint.name}: {name!r} has other values than the parameter that the model ties it to. "
            "Untie them in the model, or save the checkpoint from the tied model."
        )
