"""Where a step with a ledger spends its time, and what the products alone cost: ``online.py --profile``.

The stages are functions of the library, timed in place and without what they call of one another; the timers' own cost
is in them. The first step is not counted: its queries are checked against autograd. The floor holds the arithmetic that no
ledger can do without on the CNN: a weight gradient for each row in both convolutions, for train rows and queries, as batched
matrix products of patches that lie ready, and the products of rows with queries. The query pass of the yardstick computes the
convolutions' ordinary weight gradients, which the ledger's leaves out; they are subtracted.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from workloads import mean_loss

import tracin
from tracin.gradients import engine
from tracin.methods.online import ledger, queries, records, step, sums, tape
from tracin.scoring import guard

__all__ = ["profile", "stage_table"]

Clock = Callable[[], float]

STAGES: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("weight gradients by row, both sides", tape.StepTape, ("_read",)),
    ("train: hooks and order of the rows", tape.StepTape, ("open", "_called", "_check_order")),
    ("weight gradients by row, both sides", sums.Convolution, ("materialise",)),
    ("train: sums against p.grad", step, ("captured", "common_factor")),
    ("train: sums against p.grad", step.OpenStep, ("_read",)),
    ("queries: forward", engine.Source, ("run",)),
    ("queries: backward, without weights", engine, ("backward",)),
    ("weight gradients by row, both sides", engine._Collector, ("receive",)),
    ("queries: graph and engine", queries, ("checked_gradients",)),
    ("weight gradients by row, both sides", queries, ("held",)),
    ("queries: guarding the model", queries.Queries, ("gradients", "state")),
    ("queries: guarding the model", guard, ("_seeds", "_restore_seeds", "_work_on_copies")),
    ("products of rows and queries", step, ("row_products",)),
    ("books", step.OpenStep, ("results",)),
    ("books", records.Book, ("add",)),
    ("books", ledger, ("refuse_other_parameters", "row_ids")),
)


class Stopwatch:
    """Exclusive seconds by stage: what a stage calls of another counts there."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds = clock, dict[str, float]()
        self._inner: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self.clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self.clock() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The stages of the library, timed inside the block alone."""
        kept = [(owner, name, getattr(owner, name)) for _, owner, names in STAGES for name in names]
        for stage, owner, names in STAGES:
            for name in names:
                setattr(owner, name, self.timed(stage, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)


def _train(watch: Stopwatch, training: Any, model: Any, optimizer: Any, ids: Tensor) -> None:
    with watch.stage("train: forward"):
        optimizer.zero_grad()
        loss = mean_loss(model, training.rows[0][ids], training.rows[1][ids])
    with watch.stage("train: backward"):
        loss.backward()
    with watch.stage("train: optimizer"):
        optimizer.step()


def _yardstick(training: Any, clock: Clock) -> dict[str, float]:
    (model, optimizer), watch = training.fresh(), Stopwatch(clock)
    parameters = list(model.parameters())
    for at, ids in enumerate(training.steps):
        if at == 1:
            watch.seconds.clear()
        _train(watch, training, model, optimizer, ids)
        with watch.stage("queries: forward"):
            loss = mean_loss(model, *training.queries)
        with watch.stage("queries: backward"):
            torch.autograd.grad(loss, parameters)
    return watch.seconds


def _ledger(training: Any, clock: Clock) -> dict[str, float]:
    (model, optimizer), watch = training.fresh(), Stopwatch(clock)
    task = tracin.Task(model, training.loss)
    with (
        watch.installed(),
        tracin.OnlineTracIn(task, optimizer, training.queries, len(training.rows[1])) as online,
    ):
        for at, ids in enumerate(training.steps):
            if at == 1:
                watch.seconds.clear()
            with watch.stage("books"), online.step(ids):
                _train(watch, training, model, optimizer, ids)
    return watch.seconds


def _seconds(run: Callable[[], object], clock: Clock, times: int = 20) -> float:
    for _ in range(3):
        run()
    found = []
    for _ in range(5):
        start = clock()
        for _ in range(times):
            run()
        found.append((clock() - start) / times)
    return statistics.median(found)


def _floor(rows: int, asked: int, clock: Clock) -> dict[str, float]:
    """Seconds of the arithmetic alone, by kind."""
    layers = ((1, 16, 28), (16, 32, 14))  # channels in and out, and side, of the two convolutions
    out = dict.fromkeys(("weight gradients by row", "products", "ordinary, left out"), 0.0)
    for inner, outer, side in layers:
        for n in (rows, asked):
            a, d = torch.randn(n, inner * 9, side * side), torch.randn(n, side * side, outer)
            out["weight gradients by row"] += _seconds(functools.partial(torch.bmm, a, d), clock)
        x, d = torch.randn(asked, inner, side, side), torch.randn(asked, outer, side, side)
        weight = torch.randn(outer, inner, 3, 3)
        ordinary = functools.partial(
            torch.ops.aten.convolution_backward,
            *(d, x, weight, [outer], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True]),
        )
        out["ordinary, left out"] += _seconds(ordinary, clock)
    for width in (16 * 9, 32 * 16 * 9, 1568, 64, 64, 10):  # both convolutions; a and δ of both linear layers
        left, right = torch.randn(rows, width), torch.randn(asked, width)
        out["products"] += _seconds(functools.partial(torch.mm, left, right.mT), clock)
    return out


def profile(training: Any, clock: Clock, rounds: int, floor: bool) -> dict[str, Any]:
    """Milliseconds of a step by stage, with a ledger and of the yardstick, medians over interleaved rounds.

    Args:
        training: The steps.
        clock: Seconds.
        rounds: Counted rounds after a warm-up.
        floor: Whether the model is the CNN, whose floor is known.

    Returns:
        ``stages`` and ``yardstick`` by name, and the ``floor`` by kind, where it is known.
    """
    found: dict[str, list[dict[str, float]]] = {"yardstick": [], "stages": []}
    for at in range(rounds + 1):
        for name, run in (("yardstick", _yardstick), ("stages", _ledger)):
            gc.collect()
            seconds = run(training, clock)
            if at:
                steps = len(training.steps) - 1
                found[name].append({key: 1e3 * value / steps for key, value in seconds.items()})
    medians = {
        name: {key: statistics.median(line[key] for line in lines) for key in lines[0]}
        for name, lines in found.items()
    }
    least = _floor(len(training.steps[0]), len(training.queries[1]), clock) if floor else {}
    return {**medians, "floor": {name: 1e3 * value for name, value in least.items()}}


def stage_table(run: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table."""
    stages, yardstick, floor = run["stages"], run["yardstick"], run["floor"]
    total, base = sum(stages.values()), sum(yardstick.values())
    lines = ["| stage | ledger, ms | share | yardstick, ms |", "|---|---:|---:|---:|"]
    for name in sorted({*stages, *yardstick}, key=lambda key: (key.split(":")[0] != "train", key)):
        mine = f"{stages[name]:.2f} | {stages[name] / total:.1%}" if name in stages else "| "
        theirs = f"{yardstick[name]:.2f}" if name in yardstick else ""
        lines.append(f"| {name} | {mine} | {theirs} |")
    lines.append(f"| together | {total:.2f} | | {base:.2f} |")
    return [*lines, "", " ".join(_limits(stages, yardstick, floor))]


def _limits(stages: dict[str, float], yardstick: dict[str, float], floor: dict[str, float]) -> Iterator[str]:
    """What the ratio would be if there were nothing but the arithmetic."""
    base = sum(yardstick.values())
    own = ("weight gradients by row, both sides", "products of rows and queries")
    more = sum(stages[name] for name in own)
    spared = yardstick["queries: backward"] - stages["queries: backward, without weights"]
    yield (
        f"The rows' gradients and their products as they run here, {more:.2f} ms, less the {spared:.2f} ms that the queries' "
        f"backward pass is spared, would alone make a ratio of {(base + more - spared) / base:.2f}."
    )
    if floor:
        least = base + floor["weight gradients by row"] + floor["products"] - floor["ordinary, left out"]
        yield (
            f"As batched matrix products of patches that lie ready, {floor['weight gradients by row']:.2f} ms of weight "
            f"gradients by row and {floor['products']:.2f} ms of products, less {floor['ordinary, left out']:.2f} ms of "
            f"ordinary weight gradients that the queries' pass leaves out, would make {least / base:.2f}."
        )
