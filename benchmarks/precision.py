"""What autocast to bfloat16 does to the scores: agreement with those of the float32 run, and what it costs.

python benchmarks/precision.py                  the CNN on the CPU
python benchmarks/precision.py --device cuda    on a GPU, where it also saves time
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import FASHION, NAMES, Workload, build

import tracin


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis, [..., n]."""
    return values.argsort(-1).argsort(-1).double()


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's ρ of each line of a [q, n] and b [q, n]."""
    x, y = (ranks(values) - (values.shape[-1] - 1) / 2 for values in (a, b))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def method(workload: Workload, precision: str, device: str) -> tracin.TracInCP:
    task = tracin.Task(workload.model, workload.case.loss)
    return tracin.TracInCP(task, workload.trajectory, precision=precision, device=device, progress=False)


def compare(workload: Workload, device: str, rounds: int) -> dict[str, Any]:
    """Errors of the bfloat16 scores against the float32 scores, and the seconds of both."""
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    found: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for _ in range(rounds + 1):
        for precision, taken in seconds.items():
            ours = method(workload, precision, device)
            start = time.perf_counter()
            found[precision] = ours.influence(workload.train, workload.queries).values
            taken.append(time.perf_counter() - start)
    for precision in seconds:
        own[precision] = method(workload, precision, device).self_influence(workload.train).values
    exact, rough = found["float32"], found["bfloat16"]
    rho = spearman(exact, rough)
    k = 10
    same = [
        len(set(a.tolist()) & set(b.tolist())) / k
        for a, b in zip(exact.topk(k).indices, rough.topk(k).indices, strict=True)
    ]
    return {
        "spearman, median over queries": float(rho.median()),
        "spearman, worst query": float(rho.min()),
        "max |error| / max |score|": float((rough - exact).abs().max() / exact.abs().max()),
        "‖error‖ / ‖scores‖": float((rough - exact).norm() / exact.norm()),
        "of the 10 strongest proponents, the same": statistics.mean(same),
        "self-influence: spearman": float(spearman(own["float32"][None], own["bfloat16"][None])),
        "seconds, float32": statistics.median(seconds["float32"][1:]),
        "seconds, bfloat16": statistics.median(seconds["bfloat16"][1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="bfloat16 against float32.")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["cnn"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            workload = build(name, Path(folder), FASHION)
            print(f"{name} on {where}", flush=True)
            for what, number in compare(workload, options.device, options.rounds).items():
                print(f"  {what:44} {number:.4g}", flush=True)


if __name__ == "__main__":
    main()
