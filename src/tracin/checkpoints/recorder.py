"""Checkpoints and learning rates, recorded from anyone's training loop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tracin.checkpoints.checkpoint import step_number
from tracin.checkpoints.names import COMPILED
from tracin.checkpoints.reading import EXTRA_STATE, HEADER, log, require_tensor, storage_place
from tracin.checkpoints.record import Record, file_name, layout_fingerprint, read_record
from tracin.checkpoints.trajectory import Trajectory
from tracin.errors import CheckpointError, OptionError
from tracin.files import probe_folder, write_tensors

__all__ = ["CheckpointRecorder"]

FILES = "step-[0-9]*[0-9].safetensors"
Rates = list[float | None]  # one per parameter group


class CheckpointRecorder:
    r"""Saves checkpoints from a training loop, with the learning rates that the steps really used.

    It listens to ``optimizer.step`` and reads each group's rate *before* the step: after ``scheduler.step()`` the
    optimizer already shows the next one. A call of ``optimizer.step`` counts where some parameter has a gradient
    and no gradient scaler cancelled it, so that gradient accumulation changes nothing. For each group it keeps the
    rate of the last step, and the sum of the rates since the save before, :math:`\sum_{t=s+1}^{s'} \eta_t`.

    ``save`` writes ``step-00000012.safetensors`` and then ``step-00000012.json``, each whole or not at all. Saving
    one step twice replaces it. In a folder that already holds checkpoints a new recorder continues.

    Args:
        folder: Where to save; made if it is missing.
        model: The model that trains, possibly wrapped by torch.compile or a data-parallel module: the names saved
            are those of the plain model.
        optimizer: Any ``torch.optim.Optimizer`` with some of the model's parameters. TracIn assumes SGD.

    Raises:
        CheckpointError: The folder cannot be written to.
        OptionError: The model or the optimizer is something else, or the two share no parameter.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> with tempfile.TemporaryDirectory() as folder, CheckpointRecorder(folder, model, optimizer) as recorder:
        ...     for step in range(1, 5):
        ...         model(torch.ones(3, 2)).sum().backward()
        ...         optimizer.step()
        ...         scheduler.step()
        ...         if step % 2 == 0:
        ...             path = recorder.save(step=step)
        ...     trajectory = recorder.trajectory()
        >>> path.name
        'step-00000004.safetensors'
        >>> [(checkpoint.learning_rate, checkpoint.learning_rate_sum) for checkpoint in trajectory]
        [(0.25, 0.75), (0.0625, 0.1875)]
    """

    def __init__(self, folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for name, value, kind in (
            ("model", model, nn.Module),
            ("optimizer", optimizer, torch.optim.Optimizer),
        ):
            if not isinstance(value, kind):
                raise OptionError(
                    f"CheckpointRecorder: {name} is a {type(value).__name__}, not a {kind.__name__}."
                )
        self.folder = Path(folder)
        self._model = _unwrapped(model)
        self._optimizer = optimizer
        self._groups()
        _probe(self.folder)
        self._found = max((int(path.stem[5:]) for path in self.folder.glob(FILES)), default=-1)
        self._steps = 0
        self._reading: Rates = []
        self._last: Rates = []
        self._pending: Rates = []
        self._saved: Record | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        closure = len(args) > 1 or bool(kwargs)  # it makes the gradients inside the step
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        moves = closure or any(p.grad is not None for p in parameters)
        cancelled = getattr(optimizer, "found_inf", None)  # set by a gradient scaler for fused optimizers
        if not moves or (cancelled is not None and float(cancelled) > 0):
            self._reading = []
        else:
            self._reading = [_rate(group) for group in optimizer.param_groups]

    def _after_step(self, *_: Any) -> None:
        if self._reading:
            self._pending = _add(self._pending, self._reading)
            self._last = self._reading
            self._steps += 1
            self._reading = []  # a subclass whose step calls its parent's ends twice: once counts

    def save(self, step: int) -> Path:
        """Save the model's state and the rates.

        Args:
            step: The training step; it names the files and orders the trajectory.

        Returns:
            The tensors' file.

        Raises:
            CheckpointError: The recorder is closed, the step is not a whole number from 0 on, or the folder cannot
                be written to.
        """
        if not self._handles:
            raise CheckpointError(
                "CheckpointRecorder.save: it is closed and saw no more steps. Make a new one."
            )
        step = step_number(step)
        if step < 0:
            raise CheckpointError(f"CheckpointRecorder.save: step is {step}: count from 0 on.")
        tensors, aliases = self._state()
        parameters, untrained = self._groups()
        last, sums = self._rates(step)
        record = Record(
            file=file_name(step),
            step=step,
            optimizer=_class_name(self._optimizer),
            learning_rate=last,
            learning_rate_sum=sums,
            parameters=parameters,
            untrained=untrained,
            aliases=aliases,
        )
        path = self.folder / record.file
        header = {HEADER: json.dumps({"digest": record.digest, "aliases": aliases})}
        write_tensors(path, tensors, header, error=CheckpointError)
        record = replace(record, fingerprint=layout_fingerprint(path)[0])
        record.write(path)
        self._warn_of_later(step)
        self._saved = record
        self._pending = [0.0] * len(self._pending)
        return path

    def _rates(self, step: int) -> tuple[Rates, Rates]:
        groups = len(self._optimizer.param_groups)
        if self._steps == 0:
            return self._before_any_step(step, groups)
        unseen: Rates = [None] * (groups - len(self._last))  # groups added after the last step
        last, sums = [*self._last, *unseen], [*self._pending, *unseen]
        if self._saved is not None and self._saved.step == step:
            sums = _add([0.0 if rate is None else rate for rate in self._saved.learning_rate_sum], sums)
        return last, sums

    def _before_any_step(self, step: int, groups: int) -> tuple[Rates, Rates]:
        """Unknown, unless the folder holds this very step from an earlier recorder."""
        path = self.folder / file_name(step)
        found = read_record(path) if path.exists() else None
        if found is not None and len(found.learning_rate) == groups:
            return list(found.learning_rate), list(found.learning_rate_sum)
        return [None] * groups, [None] * groups

    def _warn_of_later(self, step: int) -> None:
        if self._found > step:
            log.warning(
                "%s holds step %d of an earlier run, later than step %d that is saved now: the trajectory will have "
                "both. Record a new run into a new folder.",
                self.folder,
                self._found,
                step,
            )
            self._found = -1

    def _state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save, tied ones once, and their other names."""
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        names: dict[tuple[Any, ...], str] = {}
        for name, value in self._model.state_dict().items():
            if name.endswith(EXTRA_STATE):
                log.info("%s: left out %r, which is no tensor", self.folder, name)
                continue
            require_tensor(name, value, "CheckpointRecorder.save")
            plain = name.replace(COMPILED, "")
            first = names.setdefault(storage_place(value), plain)
            if first == plain:
                tensors[plain] = value
            else:
                aliases[plain] = first
        return tensors, aliases

    def _groups(self) -> tuple[dict[str, int], list[str]]:
        """Parameter → group, and the parameters in no group, by identity; a tied parameter under each name."""
        group_of = {
            id(p): at for at, group in enumerate(self._optimizer.param_groups) for p in group["params"]
        }
        named = self._model.named_parameters(remove_duplicate=False)
        keys = {name.replace(COMPILED, ""): id(parameter) for name, parameter in named}
        parameters = {name: group_of[key] for name, key in keys.items() if key in group_of}
        if not parameters:
            raise OptionError(
                "CheckpointRecorder: the optimizer has none of the model's parameters. Make the optimizer from this "
                "model's parameters, after the model was moved to its device."
            )
        return parameters, [name for name in keys if name not in parameters]

    def trajectory(self) -> Trajectory:
        """The checkpoints in the folder, those of earlier recorders too.

        Returns:
            ``Trajectory.from_folder(folder)``.
        """
        return Trajectory.from_folder(self.folder)

    def close(self) -> None:
        """Stop listening to the optimizer. What was saved stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> CheckpointRecorder:  # noqa: PYI034  beartype knows no Self here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rate(group: Mapping[str, Any]) -> float | None:
    return float(group["lr"]) if "lr" in group else None


def _add(totals: Rates, rates: Rates) -> Rates:
    """Group by group; a group that is new starts at 0, and unknown stays unknown."""
    totals = [*totals, *[0.0] * (len(rates) - len(totals))]
    return [None if t is None or rate is None else t + rate for t, rate in zip(totals, rates, strict=True)]


def _unwrapped(model: Any) -> nn.Module:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    return model


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    """``SGD`` for torch's own, else with the module, so that another class of that name is not taken for it."""
    kind = type(optimizer)
    own = getattr(torch.optim, kind.__name__, None) is kind
    return kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"


def _probe(folder: Path) -> None:
    """Find out now, not after an epoch, that a folder cannot be written to."""
    try:
        probe_folder(folder)
    except OSError as cause:
        raise CheckpointError(
            f"cannot write into the folder {folder}: {cause}. Choose a folder that you may write to."
        ) from cause
