"""One checkpoint: the parameters at one moment of training, and the learning rates there."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from torch import Tensor

from tracin.checkpoints.names import COMPILED, bare
from tracin.checkpoints.reading import Snapshot, find_state, log, read_state, snapshot, tidy
from tracin.errors import CheckpointError, OptionError, RateError

__all__ = ["WEIGHTINGS", "Checkpoint", "step_number"]

WEIGHTINGS = ("learning_rate", "integrated", "uniform")
FIELDS = {"learning_rate": "learning_rate", "integrated": "learning_rate_sum"}


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    r"""The parameters :math:`\theta_c` and the weight :math:`w_c` of one moment of training.

    Args:
        state: A file (safetensors, or what ``torch.save`` wrote) or a mapping such as ``model.state_dict()``.
            A file is read by ``load``. A mapping is copied at once and never written to, so training may go on.
        learning_rate: The rate of the last step taken before: a number, or ``{parameter: number}``.
        step: The optimizer step after which it was saved.
        learning_rate_sum: The sum of the rates of the steps since the checkpoint before; as ``learning_rate``.
        optimizer: The optimizer's class. TracIn assumes ``"SGD"``.
        key: Where the state is inside a ``torch.save`` file, when it is not found by itself.

    Raises:
        CheckpointError: The mapping holds no state, or the step is not a whole number.
        RateError: A rate is not a number. Whether it is missing, negative or not finite is told by the
            weighting that reads it.

    Example:
        >>> import torch
        >>> checkpoint = Checkpoint({"weight": torch.ones(2, 3)}, learning_rate=0.1, step=12)
        >>> checkpoint
        Checkpoint(step=12, learning_rate=0.1)
        >>> checkpoint.load()["weight"].shape
        torch.Size([2, 3])
        >>> checkpoint.rates("learning_rate", ["weight"])
        {'weight': 0.1}
    """

    state: Mapping[str, Any] | str | Path
    learning_rate: SupportsFloat | Mapping[str, SupportsFloat] | None = None
    step: int | None = None
    learning_rate_sum: SupportsFloat | Mapping[str, SupportsFloat] | None = None
    optimizer: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.step is not None:
            object.__setattr__(self, "step", step_number(self.step))
        for name in ("learning_rate", "learning_rate_sum"):
            object.__setattr__(self, name, _as_rate(getattr(self, name), f"{self.name}: {name}"))
        if isinstance(self.state, Mapping):
            if not isinstance(self.state, Snapshot):
                found = find_state(self.state, self.key, self.name)
                object.__setattr__(self, "state", snapshot(found, self.name))
        elif not isinstance(self.state, str | Path):
            raise CheckpointError(
                f"Checkpoint: state is a {type(self.state).__name__}; give a path or model.state_dict()."
            )

    @property
    def path(self) -> Path | None:
        """The file, or None where the state is in memory."""
        return None if isinstance(self.state, Mapping) else Path(self.state)

    @property
    def name(self) -> str:
        """What messages call it: the file's name, else by its step."""
        if isinstance(self.state, str | Path):
            return Path(self.state).name
        return "checkpoint" if self.step is None else f"checkpoint at step {self.step}"

    def __repr__(self) -> str:
        parts = [] if self.path is None else [repr(self.name)]
        parts += [f"step={self.step}"] if self.step is not None else []
        for field in ("learning_rate", "learning_rate_sum"):
            rate = getattr(self, field)
            if rate is not None:
                parts.append(
                    f"{field}={f'{{{len(rate)} parameters}}' if isinstance(rate, Mapping) else f'{rate:g}'}"
                )
        parts += [f"optimizer={self.optimizer!r}"] if self.optimizer else []
        return f"Checkpoint({', '.join(parts)})"

    def load(self) -> dict[str, Tensor]:
        """Read the state, under the plain model's names.

        The prefixes ``module.`` and ``_orig_mod.`` of wrappers are removed, tied parameters stand under each of
        their names; what was tidied is logged as information by the logger ``tracin``, and told by ``notes``.

        Returns:
            New tensors on the CPU, the caller's to keep.
        """
        state, notes = self._read()
        for note in notes:
            log.info("%s: %s", self.name, note)
        return state

    @property
    def notes(self) -> tuple[str, ...]:
        """What ``load`` tidies, one sentence each; reads the file."""
        return self._read()[1]

    def _read(self) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        if isinstance(self.state, Mapping):
            return tidy(snapshot(self.state, self.name), self.name)
        return read_state(Path(self.state), self.key)

    def rates(self, weighting: str, names: Sequence[str]) -> dict[str, float]:
        r"""The weight :math:`w_c` of each parameter.

        Args:
            weighting: ``"learning_rate"``: the rate of the last step taken; ``"integrated"``: the sum of the rates
                since the checkpoint before; ``"uniform"``: 1, no rate needed.
            names: The parameters.

        Returns:
            name → weight, in the order of ``names``.

        Raises:
            OptionError: An unknown weighting.
            RateError: A rate that the weighting reads is missing, negative or not finite. 0.0 is allowed.

        Example:
            >>> import torch
            >>> Checkpoint({"weight": torch.ones(1)}, learning_rate={"weight": 0.1}).rates("uniform", ["weight"])
            {'weight': 1.0}
        """
        if weighting not in WEIGHTINGS:
            raise OptionError(
                f"weighting={weighting!r} is unknown: give one of {', '.join(map(repr, WEIGHTINGS))}."
            )
        if weighting == "uniform":
            return dict.fromkeys(names, 1.0)
        field = FIELDS[weighting]
        rate = getattr(self, field)
        if rate is None:
            raise RateError(
                f"{self.name} has no {field}, which weighting={weighting!r} reads. Give Checkpoint(…, {field}=…), "
                "leave it out (trajectory[1:] where it was recorded before the first step), or use weighting='uniform'."
            )
        found = _rate_of_each(rate, names)
        return {name: self._checked(found[name], name, weighting) for name in names}

    def _checked(self, rate: float | None, name: str, weighting: str) -> float:
        field = FIELDS[weighting]
        if rate is None:
            raise RateError(
                f"{self.name} has no {field} for parameter {name!r}, which weighting={weighting!r} reads: "
                f"the optimizer did not train it, or it has another name. Give one in {field}={{…}}, "
                "leave the parameter out with Task(parameters=…), or use weighting='uniform'."
            )
        if not math.isfinite(rate) or rate < 0:
            what = "negative" if rate < 0 else "not finite"
            raise RateError(
                f"{self.name} has the {field} {rate} for parameter {name!r}, which is {what}: "
                f"give the rate that training used in Checkpoint(…, {field}=…)."
            )
        return rate


def step_number(step: Any) -> int:
    """A training step as an int, whatever kind of integer it came as."""
    try:
        if not isinstance(step, bool):
            return operator.index(step)
    except TypeError:
        pass
    raise CheckpointError(f"step is {step!r}, not a whole number: give the number of optimizer steps taken.")


def _rate_of_each(rate: float | Mapping[str, float], names: Sequence[str]) -> dict[str, float | None]:
    """By exact name; where none is known by it, the names of a wrapped and of a plain model are the same."""
    if not isinstance(rate, Mapping):
        return dict.fromkeys(names, rate)
    known = {name.replace(COMPILED, ""): value for name, value in rate.items()}
    found = {name: known.get(name.replace(COMPILED, "")) for name in names}
    if all(value is None for value in found.values()):
        known = {bare(name): value for name, value in rate.items()}
        found = {name: known.get(bare(name)) for name in names}
    return found


def _as_rate(value: Any, what: str) -> float | dict[str, float] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): _as_number(rate, f"{what}[{name!r}]") for name, rate in value.items()}
    return _as_number(value, what)


def _as_number(value: Any, what: str) -> float:
    if not isinstance(value, bool | str):
        with suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    raise RateError(
        f"{what} is a {type(value).__name__}, not a number: give a float, or {{parameter: float}}."
    )
