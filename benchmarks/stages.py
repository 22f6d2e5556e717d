"""Where our own time goes: stages of a run, each with the time it spends itself, beside the plain pass.

Functions of the library are wrapped for the time of one run. A stage that calls another is not charged for it.
"""

from __future__ import annotations

import functools
import importlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peers
from measure import CLOCKS, ours, timed
from workloads import Workload

__all__ = ["STAGES", "profile", "stages"]

# Stage → where its function is looked up when it is called: module, then attributes.
STAGES = {
    "open the run": ("tracin.scoring.run:guarded",),
    "load a checkpoint": ("tracin.scoring.guard:LoadedModel.load",),
    "find the routes": ("tracin.scoring.run:wire",),
    "check against autograd": ("tracin.scoring.run:checked_gradients",),
    "compare with the pass before": ("tracin.scoring.run:Run.check_unchanged",),
    "forward": ("tracin.gradients.engine:Source.run",),
    "read the graph": ("tracin.gradients.engine:walk", "tracin.gradients.engine:irregular_names"),
    "backward to the outputs": ("tracin.gradients.engine:backward",),
    "other gradient work": ("tracin.gradients.check:batch_gradients",),
    "blocks by rules": ("tracin.gradients.engine:rule_blocks",),
    "blocks of shared parameters": ("tracin.gradients.engine:_shared_blocks",),
    "blocks by vmap": ("tracin.gradients.engine:local_estimates",),
    "blocks row by row": ("tracin.gradients.engine:_by_row_blocks",),
    "look for NaN": ("tracin.gradients.engine:_refuse_not_finite", "tracin.scoring.passes:refuse_products"),
    "norms": ("tracin.scoring.passes:_norms", "tracin.scoring.passes:_weighted_norm"),
    "hold the queries": ("tracin.scoring.passes:_hold", "tracin.scoring.passes:_tile"),
    "products": ("tracin.scoring.run:dot",),
    "merge the lists": ("tracin.scoring.top_k:merge",),
    "sums by group": ("tracin.gradients.targets:GroupSums.add",),
    "products with the sums": ("tracin.scoring.aggregate:dot_targets",),
}
PLAIN = {
    "load": ("peers:plain_load",),
    "forward": ("peers:plain_forward",),
    "backward": ("peers:plain_backward",),
}


@dataclass
class Clock:
    """Time and calls by stage; a stack of the stages that are open."""

    now: Callable[[], float]
    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    open: list[float] = field(default_factory=list)

    def wrapped(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            self.open.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = self.now() - start
                self.seconds[stage] += whole - self.open.pop()
                self.calls[stage] += 1
                if self.open:
                    self.open[-1] += whole

        return run


def _place(path: str) -> tuple[Any, str]:
    """The object that holds a function, and the function's name there."""
    module, _, attributes = path.partition(":")
    *parents, name = attributes.split(".")
    holder = functools.reduce(getattr, parents, importlib.import_module(module))
    if not hasattr(holder, name):
        raise SystemExit(
            f"benchmarks/stages.py names {path}, which the library no longer has: update STAGES."
        )
    return holder, name


@contextmanager
def stages(places: Mapping[str, Sequence[str]], now: Callable[[], float]) -> Iterator[Clock]:
    """Clock these stages inside the block."""
    clock, before = Clock(now), []
    try:
        for stage, paths in places.items():
            for path in paths:
                holder, name = _place(path)
                before.append((holder, name, getattr(holder, name)))
                setattr(holder, name, clock.wrapped(stage, getattr(holder, name)))
        yield clock
    finally:
        for holder, name, function in reversed(before):
            setattr(holder, name, function)


Listed = list[tuple[str, int, float]]


def profile(
    workload: Workload, verb: str, rounds: int, clock: str, beside: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """The stages of one verb and of the plain pass, medians over rounds.

    Args:
        workload: Model, rows and checkpoints.
        verb: ``"influence"``, ``"top_k"`` or ``"self_influence"``.
        rounds: Rounds, each beside a plain pass.
        clock: ``"wall"`` or ``"cpu"``.
        beside: What else runs once in every round.

    Returns:
        ``pass`` and ``total`` in seconds; ``ratio``, and ``beside`` by name: to the pass of its round, the median and, of the
        others, also the least, the largest and how our time compares; ``plain`` and ``stages``: (name, calls, seconds), the
        longest first.
    """
    method, now = ours(workload), CLOCKS[clock]
    sides = (workload.train,) if verb == "self_influence" else (workload.train, workload.queries)

    def run() -> Any:
        return getattr(method, verb)(*sides)

    peers.plain_pass(workload)
    run()
    passes, totals, plain, clocks = [], [], [], []
    others: dict[str, list[float]] = {name: [] for name in beside}
    for _ in range(rounds):
        with stages(PLAIN, now) as found:
            passes.append(timed(lambda: peers.plain_pass(workload), now)[0])
        plain.append(found)
        with stages(STAGES, now) as found:
            totals.append(timed(run, now)[0])
        clocks.append(found)
        for name, other in beside.items():
            others[name].append(timed(other, now)[0])
    floor, total = statistics.median(passes), statistics.median(totals)
    return {
        "pass": floor,
        "total": total,
        "ratio": statistics.median(one / base for one, base in zip(totals, passes, strict=True)),
        "beside": {name: _compared(seconds, passes, totals) for name, seconds in others.items()},
        "plain": _listed(plain, PLAIN, floor),
        "stages": _listed(clocks, STAGES, total),
    }


def _compared(seconds: list[float], passes: list[float], totals: list[float]) -> dict[str, float]:
    """Ratios to the pass of the same round, and of our time to these seconds."""
    ratios = [one / base for one, base in zip(seconds, passes, strict=True)]
    ours_over = statistics.median(total / one for one, total in zip(seconds, totals, strict=True))
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "ours": ours_over,
    }


def _listed(clocks: Sequence[Clock], places: Mapping[str, Any], total: float) -> Listed:
    """One entry per stage, the longest first."""
    seconds = {stage: statistics.median(clock.seconds[stage] for clock in clocks) for stage in places}
    calls = clocks[-1].calls
    seconds["everything else"] = max(0.0, total - sum(seconds.values()))
    return [
        (stage, calls[stage], spent)
        for stage, spent in sorted(seconds.items(), key=lambda item: -item[1])
        if calls[stage] or stage == "everything else"
    ]
