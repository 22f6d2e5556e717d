"""Training on given labels: plain SGD under a schedule, with checkpoints evenly over the steps."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from tracin.checkpoints import CheckpointRecorder, Trajectory
from tracin.errors import NotFiniteError, OptionError, TracinError, UserCodeError
from tracin.evaluation.mislabelled.data import Own, Rows, StudyData
from tracin.evaluation.mislabelled.design import Design
from tracin.evaluation.mislabelled.models import build
from tracin.scoring.evaluation import evaluate
from tracin.tasks import Task, losses

__all__ = ["Trainer", "batches", "save_steps", "scheduler_of"]

_PROBE_STEPS = 3


class Trainer:
    """Trains the study's model on the study's inputs with labels of any kind. Same arguments, same checkpoints.

    Args:
        design: Model, epochs, rate, batch, checkpoints.
        data: The rows.
        device: ``auto``, or where to train.
    """

    def __init__(self, design: Design, data: StudyData, device: str = "auto") -> None:
        self.design, self.data = design, data
        self.device = device_of(device)

    def task(self, seed: int = 0) -> Task:
        """A task whose model fits the checkpoints."""
        if self.data.own is not None:
            return self.data.own.task
        return Task(self.model(seed).to(self.device), losses.cross_entropy)

    def model(self, seed: int) -> nn.Sequential:
        """A model of the built-in data before training."""
        return build(self.design.trained, self.data.train[0].shape[1:], self.data.classes, seed)

    def train(self, rows: Rows, folder: Path, *, schedule: str, seed: int) -> Trajectory:
        """Train anew.

        Args:
            rows: Inputs and labels.
            folder: Where the checkpoints go.
            schedule: Of the rate.
            seed: Of the weights and of the order of the rows.

        Returns:
            The checkpoints.

        Raises:
            OptionError: The ``fit`` of a study file returned something else.
        """
        if self.data.own is None:
            return self._sgd(rows, folder, schedule, seed)
        trajectory = self._own_fit(self.data.own, rows, folder, seed)
        if not isinstance(trajectory, Trajectory):
            raise OptionError(
                f"{self.data.name}: fit returned a {type(trajectory).__name__}. Return a tracin.Trajectory, such as "
                "recorder.trajectory()."
            )
        return trajectory

    def _own_fit(self, own: Own, rows: Rows, folder: Path, seed: int) -> Any:
        try:
            return own.fit(rows, folder, seed)
        except TracinError:
            raise
        except Exception as error:
            told = " ".join(str(error).split())
            raise UserCodeError(
                f"{self.data.name}: fit raised {type(error).__name__}{': ' if told else ''}{told}"
            ) from error

    def last(self, rows: Rows, seed: int, *, schedule: str) -> Trajectory:
        """Train anew, and keep the last checkpoint in memory only."""
        with tempfile.TemporaryDirectory(prefix="tracin-study-") as folder:
            trajectory = self.train(rows, Path(folder), schedule=schedule, seed=seed)
            return Trajectory([replace(saved, state=saved.load()) for saved in trajectory[-1:]])

    def accuracy(self, trajectory: Trajectory) -> float:
        """The share of test rows that the last checkpoint predicts right."""
        test, where = self.data.test, str(self.device)
        predicted = evaluate(self.task(), trajectory[-1:], test, name="test", device=where).predicted()
        return float((predicted == test[1].cpu()).double().mean())

    def seconds_per_pass(self) -> float | None:
        """How long one pass of training takes, from a few steps of a model that is thrown away."""
        if self.data.own is not None:
            return None
        model = self.model(0).to(self.device)
        inputs, labels = (part[: self.design.batch].to(self.device) for part in self.data.train)
        times = []
        for _ in range(_PROBE_STEPS):
            start = time.perf_counter()
            F.cross_entropy(model(inputs), labels).backward()
            times.append(time.perf_counter() - start)
        return min(times) * len(self.data.train[1]) / len(labels)

    def _sgd(self, rows: Rows, folder: Path, schedule: str, seed: int) -> Trajectory:
        inputs, labels = (part.to(self.device) for part in rows)
        design, n, epochs = self.design, len(rows[1]), self.design.epochs or 1
        total = epochs * len(batches(torch.arange(n), design.batch))
        model = self.model(seed).to(self.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=design.rate)
        scheduler = scheduler_of(optimizer, schedule, total)
        order = torch.Generator().manual_seed(seed)
        due, step = set(save_steps(total, design.checkpoints)), 0
        with CheckpointRecorder(folder, model, optimizer) as recorder, _repeatable():
            for _ in range(epochs):
                for batch in batches(torch.randperm(n, generator=order), design.batch):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(inputs[batch]), labels[batch])
                    loss.backward()
                    optimizer.step()
                    scheduler.step()
                    step += 1
                    if step in due:
                        _refuse_divergence(loss, step)
                        recorder.save(step=step)
        return recorder.trajectory()


def device_of(device: str) -> torch.device:
    """The device that a name stands for; ``auto`` is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device={device} is not there: {error}") from error
    return found


def scheduler_of(optimizer: torch.optim.Optimizer, schedule: str, steps: int) -> lr_scheduler.LRScheduler:
    """The schedule of so many steps; it is moved after each step.

    Args:
        optimizer: Its rate is the highest one.
        schedule: ``constant``, ``step``, ``cosine`` or ``onecycle``.
        steps: All steps of the training.

    Returns:
        The scheduler.

    Raises:
        OptionError: An unknown schedule.
    """
    if schedule == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    if schedule == "step":
        return lr_scheduler.MultiStepLR(optimizer, [max(steps // 2, 1), max(3 * steps // 4, 2)], gamma=0.1)
    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if schedule == "onecycle":
        rate = optimizer.param_groups[0]["lr"]
        # One more than the steps taken, since the scheduler is moved once more after the last.
        return lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, cycle_momentum=False)
    raise OptionError(f"schedule is {schedule!r}: give constant, step, cosine or onecycle.")


def save_steps(total: int, checkpoints: int) -> list[int]:
    """The steps after which to save, evenly, the last one among them.

    Args:
        total: All steps.
        checkpoints: How many to save; fewer where there are fewer steps.

    Returns:
        Steps, counted from 1.

    Example:
        >>> save_steps(100, 4), save_steps(2, 8)
        ([25, 50, 75, 100], [1, 2])
    """
    return sorted({-(-total * number // checkpoints) for number in range(1, checkpoints + 1)})


def batches(order: Tensor, size: int) -> list[Tensor]:
    """The rows of each step; a single row left over joins the batch before, as batch normalisation needs two."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _refuse_divergence(loss: Tensor, step: int) -> None:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NotFiniteError(f"the training loss is {value} at step {step}: take a lower rate.")


@contextmanager
def _repeatable() -> Iterator[None]:
    """On a GPU the algorithms of convolutions that give the same sums every time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
