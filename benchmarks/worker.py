"""One method on one workload, in this process: it waits for a word on standard input and answers with a line of JSON.

    python benchmarks/worker.py influence cnn --folder FOLDER     (started by measure.py, which made the checkpoints)

| word | what it does | answer |
|---|---|---|
| | makes ready: imports, rows, model; then waits | ``{"ready": true}`` |
| ``first`` | runs once | ``seconds``, and ``peak``: bytes above the level just before |
| ``error`` | compares that run with autograd in float64 | ``error`` |
| ``pass`` | one plain pass | ``beside`` |
| ``go`` | one plain pass, then the method | ``beside``, ``seconds`` |
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import libraries
import peers
import torch
from measure import CLOCKS, ERROR_ALONE, OURS, K, ours, timed
from plan import Peak
from torch import Tensor
from workloads import FASHION, Workload, batches, case_of, opened

import tracin


def spread_out(n: int, wanted: int) -> list[int]:
    """Positions evenly over n rows, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, wanted)).round().long().tolist()


def positions(workload: Workload) -> tuple[list[int], list[int]]:
    """The rows and queries on which errors are measured."""
    return spread_out(len(workload.train[0]), 8), spread_out(len(workload.queries[0]), 4)


def runner(method: str, workload: Workload) -> Callable[[], Any]:
    """What one run of the method is, everything imported."""
    if method == "pass":
        return lambda: peers.plain_pass(workload)
    if method in OURS:
        traced, train, queries = ours(workload), workload.train, workload.queries
        return {
            "influence": lambda: traced.influence(train, queries),
            "top_k": lambda: traced.top_k(train, queries, k=K),
            "self_influence": lambda: traced.self_influence(train),
        }[method]
    if method == "vmap":
        return lambda: peers.vmap_scores(workload)
    if method == ERROR_ALONE:
        return libraries.captum_exact(workload, *positions(workload))
    return libraries.LIBRARIES[method](workload)


def relative(found: Tensor, truth: Tensor) -> float:
    """max |Δ| / max |score|."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


def error_of(method: str, workload: Workload, result: Any) -> float:
    """Against float64 autograd, one row at a time, on a few rows and queries; of the pass, that of float32 autograd."""
    rows, asked = positions(workload)
    if method == "pass":
        own = peers.in_float32(workload, rows, asked)
        return max(map(relative, own, peers.reference(workload, rows, asked)))
    if method == "top_k":
        ids = result.proponents.ids[asked[0]].tolist()
        return relative(result.proponents.values[asked[0]], peers.reference(workload, ids, asked[:1])[0][0])
    truth, own = peers.reference(workload, rows, asked)
    if method == "self_influence":
        return relative(result.values[rows], own)
    values = result.values if isinstance(result, tracin.Scores) else result
    if method != ERROR_ALONE:
        values = values[torch.tensor(asked)[:, None], torch.tensor(rows)]
    return relative(values, truth)


class Worker:
    """Answers the words of the table above."""

    def __init__(self, method: str, workload: Workload, clock: Callable[[], float]) -> None:
        self.method, self.workload, self.clock = method, workload, clock
        self.run = runner(method, workload)
        self.result: Any = None
        self.warm = False

    def first(self) -> dict[str, Any]:
        with Peak() as peak:
            start = self.clock()
            self.result = self.run()
            seconds = self.clock() - start
        return {"seconds": seconds, "peak": max(0, peak.bytes)}

    def error(self) -> dict[str, Any]:
        found, self.result = error_of(self.method, self.workload, self.result), None
        return {"error": found}

    def beside(self) -> dict[str, Any]:
        if not self.warm:
            batch = batches(self.workload.train, self.workload.case.batch)[0]
            peers.plain_backward(
                peers.plain_forward(self.workload, batch), list(self.workload.model.parameters())
            )
            self.warm = True
        return {"beside": timed(lambda: peers.plain_pass(self.workload), self.clock)[0]}

    def go(self) -> dict[str, Any]:
        return self.beside() | {"seconds": timed(self.run, self.clock)[0]}

    def answer(self, word: str) -> dict[str, Any]:
        words = {"first": self.first, "error": self.error, "pass": self.beside, "go": self.go}
        return words[word]()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One method of the benchmark, told what to do on standard input."
    )
    parser.add_argument("method")
    parser.add_argument("workload")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=FASHION)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


def own_channel() -> TextIO:
    """Standard output for the answers alone: what libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def why(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:160] if said else 'no message'}"


def main() -> None:
    channel, options = own_channel(), parsed()
    torch.set_num_threads(options.threads)
    worker: Worker | None = None

    def tell(act: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer = act()
        except Exception as error:  # noqa: BLE001 - why a peer cannot run is told in the table
            answer = {"failed": why(error)}
        print(json.dumps(answer), file=channel, flush=True)
        return "failed" not in answer

    def ready() -> dict[str, Any]:
        nonlocal worker
        workload = opened(options.workload, case_of(options.workload), options.folder, options.data)
        worker = Worker(options.method, workload, CLOCKS[options.clock])
        return {"ready": True}

    if tell(ready) and worker is not None:
        for line in sys.stdin:
            if not tell(partial(worker.answer, line.strip())):
                break


if __name__ == "__main__":
    main()
