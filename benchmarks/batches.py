"""What the number of rows in a batch does to ``influence``: ratios to one plain pass, as in ``run.py``.

python benchmarks/batches.py                   all models, several sizes and "auto"
python benchmarks/batches.py --models mlp      one of them
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import peers
import torch
from measure import CLOCKS, timed
from workloads import FASHION, FIRST, NAMES, Workload, build

import tracin


def method(workload: Workload, batch_size: int | str) -> tracin.TracInCP:
    task = tracin.Task(workload.model, workload.case.loss)
    return tracin.TracInCP(task, workload.trajectory, batch_size=batch_size, device="cpu", progress=False)


def ratios(workload: Workload, sizes: list[int | str], rounds: int, clock: str) -> dict[int | str, float]:
    """Median ratio of each size, after one round that is not counted."""
    found: dict[int | str, list[float]] = {size: [] for size in sizes}
    for at in range(rounds + 1):
        base, _ = timed(lambda: peers.plain_pass(workload), CLOCKS[clock])
        for size in sizes:
            ours = method(workload, size)
            seconds, _ = timed(
                lambda ours=ours: ours.influence(workload.train, workload.queries), CLOCKS[clock]
            )
            if at:
                found[size].append(seconds / base)
    return {size: statistics.median(values) for size, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows per batch against time.")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(FIRST))
    parser.add_argument("--factors", nargs="+", type=float, default=[0.25, 0.5, 1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            workload = build(name, Path(folder), FASHION)
            sizes = [max(1, round(workload.case.batch * factor)) for factor in options.factors]
            found = ratios(workload, [*sizes, "auto"], options.rounds, options.clock)
            print(name, *(f"{size}: {ratio:.2f}" for size, ratio in found.items()), sep="  ", flush=True)


if __name__ == "__main__":
    main()
