"""Memory of ``top_k``: it must not grow with the training rows.

    python benchmarks/top_k_memory.py                         20,000 and 60,000 rows of Fashion-MNIST × 1,000 queries
    python benchmarks/top_k_memory.py --rows 2000 6000 --queries 100
    python benchmarks/top_k_memory.py --write-docs            also docs/results/top-k-memory.md

Each size runs in a process of its own. Its peak is the largest resident memory during the call (the kernel's VmHWM, reset
just before), less what the process held then: imports, data, model and checkpoints. Linux alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from workloads import FASHION, build, fashion

import tracin

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results" / "top-k-memory.md"
MIB = 1 << 20


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory of top_k.")
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 60_000])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--memory", default="448MiB", help="what the method is allowed (448MiB)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def inside(options: argparse.Namespace) -> None:
    """One size, in this process."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        workload = build("cnn", Path(folder), options.data)
        train = fashion(options.data, "train", options.inside)
        queries = fashion(options.data, "t10k", options.queries)
        task = tracin.Task(workload.model, workload.case.loss)
        method = tracin.TracInCP(
            task, workload.trajectory, device="cpu", memory=options.memory, progress=False
        )
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        level, start = resident("VmRSS"), time.perf_counter()
        found = method.top_k(train, queries, k=10)
        seconds, peak = time.perf_counter() - start, resident("VmHWM") - level
    print(
        json.dumps(
            {"rows": len(train[0]), "seconds": seconds, "peak": peak, "k": found.proponents.ids.shape[1]}
        )
    )


def apart(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    """One size, in a process of its own."""
    words = [sys.executable, str(HERE / "top_k_memory.py"), "--inside", str(rows)]
    for name in ("queries", "memory", "threads", "data"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def page(options: argparse.Namespace, found: list[dict[str, Any]]) -> str:
    lines = [
        "# Memory of top_k",
        "",
        (f"The benchmark's CNN, {options.queries:,} queries, 3 checkpoints, k = 10, `memory='{options.memory}'`. The peak is"
        " above the loaded data, the model and the imports."),
        "",
        "| train rows | peak MiB | seconds |",
        "|---:|---:|---:|",
        *(f"| {one['rows']:,} | {one['peak'] / MIB:,.0f} | {one['seconds']:,.0f} |" for one in found),
        "",
        f"{options.threads} threads, torch {torch.__version__}. Made by `python benchmarks/top_k_memory.py --write-docs`.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parsed()
    if options.inside:
        inside(options)
        return
    found = []
    for rows in options.rows:
        found.append(apart(options, rows))
        print(
            f"{rows:,} rows: peak {found[-1]['peak'] / MIB:,.0f} MiB, {found[-1]['seconds']:.1f} s",
            flush=True,
        )
    if options.write_docs:
        PAGE.write_text(page(options, found), encoding="utf-8")


if __name__ == "__main__":
    main()
