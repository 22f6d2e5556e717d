"""The methods of the study by name: each gives every training row a suspicion, higher is more suspect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.errors import OptionError
from tracin.evaluation import baselines
from tracin.evaluation.mislabelled.data import Rows
from tracin.evaluation.mislabelled.measure import Measured, measured
from tracin.evaluation.neighbours import neighbour_suspicion
from tracin.evaluation.out_of_fold import self_confidence
from tracin.methods import InfluenceFunctions, RepresenterPoints, TracInCP
from tracin.scoring.evaluation import Evaluation, evaluate
from tracin.scoring.head import find_head
from tracin.tasks import Task

__all__ = ["FAMILIES", "METHODS", "PASSES", "Context", "Cost", "Method", "named"]

Family = Literal["tracin", "rival", "forward", "other"]
FOLDS = 5
FAMILIES: tuple[Family, ...] = ("tracin", "rival", "forward", "other")


@dataclass(frozen=True, eq=False)
class Context:
    """What a method may look at: the flipped labels and the checkpoints, never the truth.

    Args:
        task: Model and loss.
        trajectory: The checkpoints, the same for every method.
        train: Inputs and labels, some of them flipped.
        classes: The number of classes.
        seed: For methods that draw.
        fit: Trains the study's model anew on some rows, for methods that need other models.
        device: Where to run.
        memory: Bound on held gradients.
        shared: What several methods read, by the name of the pass that made it, and what it took.
    """

    task: Task
    trajectory: Trajectory
    train: Rows
    classes: int
    seed: int
    fit: Callable[[Rows, int], Trajectory]
    device: str = "auto"
    memory: str = "2GiB"
    shared: dict[str, tuple[Any, Measured]] = field(default_factory=dict)

    def read(self, name: str) -> Any:
        """What a shared pass made; run now if no method asked for it before.

        Args:
            name: One of ``PASSES``.

        Returns:
            Its result.
        """
        if name not in self.shared:
            with measured() as taken:
                made = PASSES[name](self)
            self.shared[name] = made, taken
        return self.shared[name][0]

    @property
    def last(self) -> Trajectory:
        """The last checkpoint alone."""
        return self.trajectory[-1:]


Score = Callable[[Context], Tensor]


@dataclass(frozen=True)
class Cost:
    """About how many passes of training (forward and backward over all rows) a method takes; for the time left.

    Args:
        fixed: Passes.
        checkpoint: Passes for each checkpoint.
        epoch: Passes for each epoch of the training.
    """

    fixed: float = 0.0
    checkpoint: float = 0.0
    epoch: float = 0.0

    def passes(self, checkpoints: int, epochs: int) -> float:
        """Passes, all told."""
        return self.fixed + self.checkpoint * checkpoints + self.epoch * epochs


@dataclass(frozen=True)
class Method:
    """A method of the study.

    Args:
        name: As a design has it.
        told: What it does, in a line.
        family: For the figure.
        score: Suspicion of every training row [n].
        cost: About how long it takes; a shared pass counts where it is run first.
        reads: The shared pass that it reads, if any.
        last_alone: Whether it reads the last checkpoint's part of that pass alone.
    """

    name: str
    told: str
    family: Family
    score: Score
    cost: Cost
    reads: str | None = None
    last_alone: bool = False


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of methods.

    Args:
        names: Some names; none means all.

    Returns:
        The names, each once.

    Raises:
        OptionError: An unknown one.
    """
    for name in names:
        if name not in METHODS:
            near = get_close_matches(name, METHODS, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise OptionError(
                f"methods={name!r}: there is no such method.{meant} Known are {', '.join(METHODS)}."
            )
    return tuple(dict.fromkeys(names)) or tuple(METHODS)


def _own_influence(context: Context, task: Task, trajectory: Trajectory, weighting: str) -> Tensor:
    method = TracInCP(
        task, trajectory, weighting=weighting, device=context.device, memory=context.memory, progress=False
    )
    return method.self_influence(context.train).values


def _own_by_checkpoint(context: Context) -> Tensor:
    """‖g_c(z)‖² of every row at each checkpoint [c, n], of which each weighting makes its sum."""
    each = [context.trajectory[at : at + 1] for at in range(len(context.trajectory))]
    return torch.stack([_own_influence(context, context.task, one, "uniform") for one in each])


def _tracin(weighting: str) -> Score:
    def score(context: Context) -> Tensor:
        names = list(context.task.select().traced)
        rates = [set(checkpoint.rates(weighting, names).values()) for checkpoint in context.trajectory]
        if any(len(found) > 1 for found in rates):  # rates of their own for some parameters
            return _own_influence(context, context.task, context.trajectory, weighting)
        own = context.read(OWN_INFLUENCE)
        return torch.tensor([found.pop() for found in rates], dtype=own.dtype) @ own

    return score


def _tracin_last(context: Context) -> Tensor:
    # One checkpoint: its rate scales all scores alike.
    return context.read(OWN_INFLUENCE)[-1]


def _tracin_last_layer(context: Context) -> Tensor:
    task = context.task
    head, _ = find_head(task.model, None, "tracin-last-layer")
    layer = Task(task.model, task.loss, task.query_loss, f"{head}.*" if head else "*", task.outputs)
    return _own_influence(context, layer, context.trajectory, "learning_rate")


def _influence(context: Context) -> Tensor:
    method = InfluenceFunctions(
        context.task,
        context.last[0],
        solver="ekfac",
        # One random-sign root per row in place of a backward pass per class: on digits the order of the rows has a rank
        # correlation above 0.99 with that of the exact expectation.
        samples=1,
        seed=context.seed,
        device=context.device,
        memory=context.memory,
        progress=False,
    )
    return method.self_influence(context.train).values


def _representer(context: Context) -> Tensor:
    method = RepresenterPoints(
        context.task, context.last[0], device=context.device, memory=context.memory, progress=False
    )
    return method.self_influence(context.train).values


def _evaluated(context: Context, trajectory: Trajectory) -> Evaluation:
    return evaluate(context.task, trajectory, context.train, name="train", device=context.device)


def _along(context: Context) -> Evaluation:
    return _evaluated(context, context.trajectory)


def _judged(judge: Callable[[Evaluation], Tensor]) -> Score:
    def score(context: Context) -> Tensor:
        return judge(context.read(FORWARD))

    return score


OWN_INFLUENCE, FORWARD = "self-influence by checkpoint", "forward passes"
PASSES: dict[str, Callable[[Context], Any]] = {OWN_INFLUENCE: _own_by_checkpoint, FORWARD: _along}
"""What several methods read."""


def _gradient_norm(context: Context) -> Tensor:
    return baselines.gradient_norm(
        context.task,
        context.last[0],
        context.train,
        device=context.device,
        memory=context.memory,
        progress=False,
    )


def _confidence(context: Context) -> Tensor:
    inputs, labels = context.train

    def fit(rows: Tensor) -> Tensor:
        last = context.fit((inputs[rows], labels[rows]), context.seed)
        logits = _evaluated(context, last).logits
        assert logits is not None
        return logits[-1].double().softmax(1)

    return self_confidence(labels, fit=fit, folds=FOLDS, seed=context.seed)


def _knn(context: Context) -> Tensor:
    neighbours = min(10, len(context.train[1]) - 1)
    return neighbour_suspicion(
        context.task, context.last[0], context.train, k=neighbours, device=context.device
    )


_ALL = [
    Method(
        "tracin",
        "self-influence, last rates",
        "tracin",
        _tracin("learning_rate"),
        Cost(checkpoint=1.0),
        OWN_INFLUENCE,
    ),
    Method(
        "tracin-integrated",
        "self-influence, summed rates",
        "tracin",
        _tracin("integrated"),
        Cost(),
        OWN_INFLUENCE,
    ),
    Method("tracin-uniform", "self-influence, no rates", "tracin", _tracin("uniform"), Cost(), OWN_INFLUENCE),
    Method(
        "tracin-last", "self-influence, last checkpoint", "tracin", _tracin_last, Cost(), OWN_INFLUENCE, True
    ),
    Method(
        "tracin-last-layer",
        "self-influence, last layer",
        "tracin",
        _tracin_last_layer,
        Cost(checkpoint=0.5),
    ),
    Method("influence", "influence functions, EKFAC", "rival", _influence, Cost(fixed=20.0)),
    Method("representer", "representer points, own label", "rival", _representer, Cost(fixed=1.5)),
    Method("gradient-norm", "norm of the last gradient", "rival", _gradient_norm, Cost(fixed=1.0)),
    Method("loss", "mean loss", "forward", _judged(baselines.mean_loss), Cost(checkpoint=0.9), FORWARD),
    Method("loss-last", "last loss", "forward", _judged(baselines.last_loss), Cost(), FORWARD, True),
    Method("margin", "last margin", "forward", _judged(baselines.margin), Cost(), FORWARD, True),
    Method("aum", "mean margin", "forward", _judged(baselines.area_under_margin), Cost(), FORWARD),
    Method("forgetting", "times forgotten", "forward", _judged(baselines.forgetting), Cost(), FORWARD),
    Method("confidence", "of models that did not see the row", "other", _confidence, Cost(epoch=FOLDS - 1.0)),
    Method("knn", "nearest neighbours that disagree", "other", _knn, Cost(fixed=2.0)),
]
METHODS: dict[str, Method] = {method.name: method for method in _ALL}
