r"""What an optimizer makes of this step's gradient g: the own term of the update.

| ``update`` | own term of a parameter | optimizer |
|---|---|---|
| ``"gradient"`` | η g | any; exact for plain SGD |
| ``"momentum"`` | η g (1 − τ)/(1 − μ), the eventual effect under a constant rate | SGD, Nesterov's too |
| ``"adam"`` | η g (1 − β₁)/(1 − β₁^t) / (√v̂ + ε), v̂ after the step held constant | Adam, AdamW |

η, μ, τ (dampening), β and ε are those of the parameter's group when the step is taken. SGD does not dampen the gradient
with which a parameter's momentum begins: τ = 0 there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracin.errors import AdaptiveOptimizerWarning, LoopError, OptionError

__all__ = ["UPDATES", "GroupStep", "Update", "group_steps", "is_plain", "own_factors", "require_optimizer"]

Update = Literal["gradient", "momentum", "adam"]
UPDATES = ("gradient", "momentum", "adam")


@dataclass(frozen=True)
class GroupStep:
    """The settings of a parameter's group at one step, the parameter, and whether its momentum begins with this step."""

    parameter: nn.Parameter
    settings: Mapping[str, Any]
    first: bool = False

    @property
    def rate(self) -> float:
        """The learning rate η."""
        return float(self.settings["lr"])


def require_optimizer(
    optimizer: Any, update: Any, traced: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer, if ``update`` describes it and it moves a traced parameter.

    Args:
        optimizer: What the user gave.
        update: The form of the own term.
        traced: Parameters by name.

    Returns:
        The optimizer.

    Raises:
        OptionError: It is no optimizer, ``update`` is unknown or of another optimizer, or it has none of the parameters.

    Warns:
        AdaptiveOptimizerWarning: ``update="gradient"`` with an optimizer that is not SGD.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(f"OnlineTracIn: optimizer is a {type(optimizer).__name__}, not a torch optimizer.")
    kind = type(optimizer).__name__
    if update not in UPDATES:
        raise OptionError(f"OnlineTracIn: update is {update!r}. Choose one of {', '.join(UPDATES)}.")
    if update == "momentum" and not isinstance(optimizer, torch.optim.SGD):
        raise OptionError(f"OnlineTracIn: update='momentum' describes SGD, and the optimizer is {kind}.")
    if update == "adam" and not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise OptionError(
            f"OnlineTracIn: update='adam' describes Adam and AdamW, and the optimizer is {kind}."
        )
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in own for p in traced.values()):
        raise OptionError(
            "OnlineTracIn: the optimizer has none of the traced parameters. Make the optimizer from this model's "
            "parameters, after the model was moved to its device."
        )
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise OptionError("OnlineTracIn: maximize=True climbs the loss. Minimise its negative instead.")
        if "lr" not in group:
            raise OptionError(f"OnlineTracIn: {kind} has no learning rate 'lr' in its groups.")
        if update == "momentum" and not 0 <= group["momentum"] < 1:
            raise OptionError(
                f"OnlineTracIn: momentum {group['momentum']} has no eventual effect: 0 ≤ momentum < 1 is needed."
            )
    if update == "gradient" and not isinstance(optimizer, torch.optim.SGD):
        warnings.warn(
            f"the optimizer is {kind}: update='gradient' follows the learning rate times the gradient, which is not the step "
            "that it takes. Use update='adam' for Adam and AdamW; the rest of each step is in .report().carried.",
            AdaptiveOptimizerWarning,
            stacklevel=3,
        )
    return optimizer


def group_steps(optimizer: torch.optim.Optimizer, traced: Mapping[str, nn.Parameter]) -> dict[str, GroupStep]:
    """The settings, as they are now, of each traced parameter that the optimizer moves.

    Args:
        optimizer: The optimizer, before its step.
        traced: Parameters by name.

    Returns:
        A copy of the settings by parameter.
    """
    names = {id(parameter): name for name, parameter in traced.items()}
    out = {}
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        settings["lr"] = float(settings["lr"])
        for parameter in group["params"]:
            if id(parameter) in names:
                first = optimizer.state.get(parameter, {}).get("momentum_buffer") is None
                out[names[id(parameter)]] = GroupStep(parameter, settings, first)
    return out


def is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is −η g and nothing else, so that nothing is carried over."""
    return type(optimizer) is torch.optim.SGD and not any(
        group["momentum"] or group["weight_decay"] for group in optimizer.param_groups
    )


def own_factors(
    optimizer: torch.optim.Optimizer, update: str, steps: Mapping[str, GroupStep]
) -> dict[str, float | Tensor]:
    """What this step's gradient is multiplied with in the own term, by parameter; read after the step.

    Args:
        optimizer: The optimizer, after its step.
        update: The form of the own term.
        steps: The settings from before the step.

    Returns:
        A number, or under ``"adam"`` a tensor of the parameter's shape.
    """
    if update == "adam":
        return {name: _adam(optimizer, name, step) for name, step in steps.items()}
    if update == "momentum":
        return {name: step.rate * _eventual(step) for name, step in steps.items()}
    return {name: step.rate for name, step in steps.items()}


def _eventual(step: GroupStep) -> float:
    """(1 − τ)/(1 − μ); torch's SGD dampens only where there is momentum, and not the gradient that it begins with."""
    momentum = float(step.settings["momentum"])
    dampening = 0.0 if step.first or not momentum else float(step.settings["dampening"])
    return (1.0 - dampening) / (1.0 - momentum)


def _adam(optimizer: torch.optim.Optimizer, name: str, step: GroupStep) -> float | Tensor:
    state = optimizer.state.get(step.parameter, {})
    if step.parameter.grad is None and not state:
        return 0.0
    if "exp_avg_sq" not in state or "step" not in state:
        raise LoopError(
            f"{name}: the optimizer keeps no exp_avg_sq for it, so its step is not Adam's. Use update='gradient'."
        )
    t = float(state["step"])
    settings = step.settings
    first, second = (float(beta) for beta in settings["betas"])
    square = state["max_exp_avg_sq"] if settings.get("amsgrad") else state["exp_avg_sq"]
    denominator = (square / (1.0 - second**t)).sqrt() + settings["eps"]
    return step.rate * (1.0 - first) / (1.0 - first**t) / denominator.detach()
