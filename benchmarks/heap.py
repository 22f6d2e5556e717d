"""What it saves that freed memory is kept for the next batch: pages made anew and seconds, with and without.

    python benchmarks/heap.py                       CNN, ResNet, GPT, LSTM
    python benchmarks/heap.py --models cnn --rounds 3

The setting belongs to a process, so each run is one of its own, with and without in turns: ``influence`` once, uncounted,
then once more. A page made anew is a minor fault of the kernel's count.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from measure import ours
from workloads import CASES, FASHION, made, opened

from tracin.scoring import guard

MODELS = ("cnn", "resnet", "gpt", "lstm")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Freed memory kept for the next batch, or not.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(name: str, folder: str, kept: str, data: Path) -> None:
    """One process: seconds and pages of the second run, as JSON."""
    if kept == "no":
        guard.freed_memory_kept = nullcontext
    workload = opened(name, CASES[name], Path(folder), data)
    method = ours(workload)
    method.influence(workload.train, workload.queries)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    method.influence(workload.train, workload.queries)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))


def measured(name: str, folder: str, options: argparse.Namespace) -> dict[str, list[tuple[float, int]]]:
    """(seconds, pages) of every process."""
    found: dict[str, list[tuple[float, int]]] = {"no": [], "yes": []}
    words = [sys.executable, __file__, "--threads", str(options.threads), "--data", str(options.data)]
    for _ in range(options.rounds):
        for kept, runs in found.items():
            done = subprocess.run(
                [*words, "--child", name, folder, kept], capture_output=True, text=True, check=True
            )
            seconds, pages = json.loads(done.stdout)
            runs.append((seconds, pages))
    return found


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.child:
        name, folder, kept = options.child
        child(name, folder, kept, options.data)
        return
    print("| model | seconds, given back | kept | ratio | range | pages made anew, given back | kept |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            made(name, CASES[name], Path(folder), options.data)
            found = measured(name, folder, options)
        ratios = [kept[0] / back[0] for back, kept in zip(found["no"], found["yes"], strict=True)]
        (back, back_pages), (kept, kept_pages) = (
            [statistics.median(column) for column in zip(*found[which], strict=True)]
            for which in ("no", "yes")
        )
        print(
            f"| {CASES[name].title} | {back:.2f} | {kept:.2f} | {statistics.median(ratios):.2f} | "
            f"{min(ratios):.2f}–{max(ratios):.2f} | {back_pages:,.0f} | {kept_pages:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
