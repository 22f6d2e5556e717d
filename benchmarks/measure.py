"""Interleaved rounds of every method in one process, as ratios to the plain pass of the same round.

Two numbers from different minutes of a shared machine cannot be divided; two from the same round can. So each round runs
every method once, its ratio is taken within the round, and the median over rounds is told with its range.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import peers
import torch
from torch import Tensor
from workloads import Workload

import tracin

__all__ = ["CLOCKS", "Measured", "Result", "measure"]

K = 10
PEERS = frozenset({"vmap", "captum"})
# On a machine whose cores are shared, CPU seconds with one thread are steadier than the clock on the wall.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One method: seconds of each round, ratios to the pass, and the error of its scores."""

    label: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    error: float | None = None
    note: str = ""

    @property
    def second(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Result:
    """One model's measurements and what they were made on."""

    name: str
    title: str
    parameters: int
    rows: int
    queries: int
    checkpoints: int
    batch: int
    machine: dict[str, Any]
    methods: list[Measured]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Result:
        return cls(**{**found, "methods": [Measured(**method) for method in found["methods"]]})


def machine(threads: int, clock: str) -> dict[str, Any]:
    """What a reader needs to judge the times: never names or paths."""
    return {
        "threads": threads,
        "clock": clock,
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tracin": tracin.__version__,
    }


def ours(workload: Workload) -> tracin.TracInCP:
    task = tracin.Task(workload.model, workload.case.loss)
    return tracin.TracInCP(task, workload.trajectory, device="cpu", progress=False)


def runners(workload: Workload, wanted: frozenset[str]) -> dict[str, Callable[[], Any]]:
    """Label → one run of it."""
    method = ours(workload)
    train, queries = workload.train, workload.queries
    everything: dict[str, Callable[[], Any]] = {
        "pass": lambda: peers.plain_pass(workload),
        "influence": lambda: method.influence(train, queries),
        "top_k": lambda: method.top_k(train, queries, k=K),
        "self_influence": lambda: method.self_influence(train),
        "vmap": lambda: peers.vmap_scores(workload),
        "captum": lambda: peers.captum_fast(workload),
    }
    return {label: run for label, run in everything.items() if label == "pass" or label in wanted}


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    gc.collect()
    start = clock()
    out = run()
    return clock() - start, out


def spread_out(n: int, wanted: int) -> list[int]:
    """Positions evenly over n rows, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, wanted)).round().long().tolist()


def relative(found: Tensor, truth: Tensor) -> float:
    """max |Δ| / max |score|."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


def errors(workload: Workload, results: dict[str, Any]) -> dict[str, float]:
    """Each method's error against float64 autograd, one row at a time, on a few rows and queries."""
    rows, asked = spread_out(len(workload.train[0]), 8), spread_out(len(workload.queries[0]), 4)
    truth, own = peers.reference(workload, rows, asked)
    grid = torch.tensor(asked)[:, None], torch.tensor(rows)
    out = {}
    for label, result in results.items():
        if label == "self_influence":
            out[label] = relative(result.values[rows], own)
        elif label == "top_k":
            ids = result.proponents.ids[asked[0]].tolist()
            listed, _ = peers.reference(workload, ids, asked[:1])
            out[label] = relative(result.proponents.values[asked[0]], listed[0])
        elif label != "pass":
            values = result.values if isinstance(result, tracin.Scores) else result
            out[label] = relative(values[grid], truth)
    if "captum" in results:
        out["captum_exact"] = relative(peers.captum_exact(workload, rows, asked), truth)
    return out


def warm_up(
    runs: dict[str, Callable[[], Any]], patience: float, clock: Callable[[], float]
) -> tuple[dict[str, Measured], dict[str, Any], dict[str, float]]:
    """One run of each: its result, and the seconds of those too slow to be run again.

    Args:
        runs: Label → one run; ``"pass"`` comes first.
        patience: A peer that takes longer than this many seconds is measured by this run alone.
        clock: One of ``CLOCKS``.

    Returns:
        Measurements by label, results by label, and the seconds of the slow ones.
    """
    found: dict[str, Measured] = {}
    results: dict[str, Any] = {}
    slow: dict[str, float] = {}
    for label, run in runs.items():
        found[label] = Measured(label)
        try:
            seconds, results[label] = timed(run, clock)
        except Exception as error:
            if label in PEERS:  # a peer that cannot run this model is a finding, told in the table
                found[label].note = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                continue
            raise
        if seconds > patience and label in PEERS:
            slow[label] = seconds
    return found, results, slow


def measure(
    workload: Workload, *, rounds: int, patience: float, threads: int, wanted: frozenset[str], clock: str
) -> Result:
    """Run everything ``rounds`` times, interleaved, after a warm-up.

    Args:
        workload: Model, rows and checkpoints.
        rounds: Rounds that are counted.
        patience: Seconds above which a peer is run once.
        threads: Threads of torch, already set.
        wanted: Labels to run beside the plain pass.
        clock: ``"wall"`` or ``"cpu"``.

    Returns:
        The measurements.
    """
    runs = runners(workload, wanted)
    found, results, slow = warm_up(runs, patience, CLOCKS[clock])
    share = len(workload.train[0]) / (len(workload.train[0]) + len(workload.queries[0]))
    for _ in range(rounds):
        base = 0.0
        for label in results:
            if label in slow:
                continue
            seconds, _ = timed(runs[label], CLOCKS[clock])
            base = seconds if label == "pass" else base
            found[label].seconds.append(seconds)
            # Self-influence reads no queries: its floor is the same share of the pass.
            found[label].ratios.append(seconds / (base * share if label == "self_influence" else base))
    for label, seconds in slow.items():
        found[label].seconds, found[label].ratios = [seconds], [seconds / found["pass"].second]
        found[label].note = "run once"
    for label, error in errors(workload, results).items():
        found.setdefault(label, Measured(label, note="a few rows, for its error alone")).error = error
    case = workload.case
    return Result(
        name=workload.name,
        title=case.title,
        parameters=workload.parameters,
        rows=len(workload.train[0]),
        queries=len(workload.queries[0]),
        checkpoints=len(workload.trajectory),
        batch=case.batch,
        machine=machine(threads, clock),
        methods=list(found.values()),
    )
