"""Is the plan right? Planned memory and time beside what the run then took, each in a process of its own.

    python benchmarks/plan.py                      all workloads, as a table
    python benchmarks/plan.py --cases cnn wide     some of them
    python benchmarks/plan.py --scale 0.1          a tenth of the rows and queries: a quick look
    python benchmarks/plan.py --write-docs         also write docs/results/plan.md

The measured peak is the process's largest resident memory during the call, less what it held just before it (model, data,
imports). The aims: where the plan says 256 MiB or more, memory within 25 %, and seconds within 1.5 times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from measure import CLOCKS, machine
from models import GPT, ResNet, cnn, mlp
from torch import Tensor, nn
from workloads import token_loss

import tracin

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results" / "plan.md"
MIB = 1 << 20
LEAST, MEMORY_AIM, TIME_AIM = 256 * MIB, 0.25, 1.5
VOCABULARY, LENGTH = 1000, 64
ENTROPY = tracin.losses.cross_entropy


def _wide() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 2048), nn.Linear(2048, 10)
    )


def _small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))


GPT_SHAPE = partial(GPT, vocabulary=VOCABULARY, length=LENGTH, width=128, layers=4, heads=4)


@dataclass(frozen=True)
class Case:
    """A model, the sizes of its run, what is asked and how."""

    title: str
    model: Callable[[], nn.Module]
    rows: int
    queries: int
    verb: str = "influence"
    checkpoints: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    tokens: bool = False
    groups: int = 0

    def given(self, queries: int) -> dict[str, Any]:
        """What the verb and its plan are told of this many queries' groups."""
        return {"by": torch.arange(queries) % self.groups} if self.groups else {}


CASES = {
    "mlp": Case("MLP 784-256-64-10", mlp, 20_000, 2_000),
    "cnn": Case("CNN, two conv and two linear layers", cnn, 6_000, 2_000, checkpoints=3),
    "resnet": Case("ResNet with BatchNorm in eval", ResNet, 2_000, 600),
    "gpt": Case("GPT-2 shape, 64 tokens, tied", GPT_SHAPE, 400, 100, tokens=True),
    "large": Case("MLP 784-16-10, many scores", _small, 60_000, 2_000),
    "wide": Case("MLP 784-4096-2048-10", _wide, 2_000, 2_000),
    "normalize": Case("CNN, normalize=True", cnn, 4_000, 1_000, options={"normalize": True}),
    "projection": Case("CNN, projection=4096", cnn, 6_000, 6_000, options={"projection": 4096}),
    "tiled": Case("CNN, memory='512MiB'", cnn, 2_000, 2_000, options={"memory": "512MiB"}),
    "top_k": Case("CNN", cnn, 10_000, 1_000, "top_k"),
    "top_k_mlp": Case("MLP 784-256-64-10", mlp, 20_000, 10_000, "top_k"),
    "self_influence": Case("ResNet with BatchNorm in eval", ResNet, 4_000, 0, "self_influence"),
    "self_batch": Case("CNN, batch_size=1000", cnn, 6_000, 0, "self_influence", options={"batch_size": 1000}),
    "classes": Case("CNN, 10 classes", cnn, 6_000, 2_000, "aggregate", groups=10),
    "many_classes": Case(
        "ResNet with BatchNorm in eval, 100 classes", ResNet, 2_000, 1_000, "aggregate", groups=100
    ),
    "wide_classes": Case("MLP 784-4096-2048-10, 10 classes", _wide, 2_000, 4_000, "aggregate", groups=10),
}


@dataclass(frozen=True)
class Found:
    """One workload: planned and measured."""

    name: str
    planned_bytes: int
    planned_seconds: float
    bytes: int
    seconds: float
    plan_seconds: float
    passes: int
    machine: dict[str, Any]

    @property
    def memory(self) -> float:
        return self.planned_bytes / self.bytes

    @property
    def time(self) -> float:
        return self.planned_seconds / self.seconds


def rows_of(case: Case, n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if case.tokens:
        drawn = torch.randint(0, VOCABULARY, (n, LENGTH + 1), generator=generator)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
    return torch.randn(n, 1, 28, 28, generator=generator), torch.arange(n) % 10


def build(case: Case, scale: float, folder: Path) -> tuple[tracin.TracInCP, list[Any]]:
    """The method and the arguments of its verb: random rows, random weights in files, since neither changes the cost."""
    torch.manual_seed(0)
    paths = []
    for at in range(case.checkpoints):
        paths.append(folder / f"{at}.pt")
        torch.save(case.model().state_dict(), paths[-1])
    model = case.model()
    loss = token_loss if case.tokens else ENTROPY
    trajectory = tracin.Trajectory.from_files(paths, [0.1] * len(paths))
    method = tracin.TracInCP(
        tracin.Task(model, loss), trajectory, device="cpu", progress=False, **case.options
    )
    data: list[Any] = [rows_of(case, max(64, int(case.rows * scale)), 1)]
    if case.queries:
        data.append(rows_of(case, max(16, int(case.queries * scale)), 2))
    return method, data


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process by the kernel's own count."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(f"{key}:"))


class Peak:
    """The largest resident memory within the block, above the level at its start."""

    def __enter__(self) -> Self:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._exact = True
        except OSError:  # not allowed here: looked at every millisecond instead
            self._exact = False
        self.level, self._seen, self._done = resident(), 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if not self._exact:
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._seen = max(self._seen, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.bytes = (resident("VmHWM") if self._exact else self._seen) - self.level


def child(name: str, what: str, scale: float, clock: str) -> dict[str, Any]:
    """Plan, or run, in this process."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        method, data = build(case, scale, Path(folder))
        now = CLOCKS[clock]
        start = now()
        if what == "plan":
            planned = method.plan(*data, verb=case.verb, **case.given(len(data[-1][1])))
            record = {
                "bytes": planned.peak_bytes,
                "seconds": planned.seconds,
                "passes": planned.passes,
                "text": str(planned),
            }
            return record | {"took": now() - start}
        with Peak() as peak:
            result = getattr(method, case.verb)(*data, **case.given(len(data[-1][1])))
        seconds = now() - start
        assert result is not None
        return {"bytes": peak.bytes, "seconds": seconds}


def asked(name: str, what: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--child", name, what, "--scale", str(args.scale)]
    command += ["--threads", str(args.threads), "--clock", args.clock]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}, {what}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, args: argparse.Namespace) -> Found:
    plan, run = asked(name, "plan", args), asked(name, "run", args)
    if args.verbose:
        print(plan["text"])
    where = machine(args.threads, args.clock)
    return Found(
        name,
        plan["bytes"],
        plan["seconds"],
        run["bytes"],
        run["seconds"],
        plan["took"],
        plan["passes"],
        where,
    )


def cells(found: Found) -> list[str]:
    case = CASES[found.name]
    counted = found.planned_bytes >= LEAST
    ok = abs(found.memory - 1) <= MEMORY_AIM and 1 / TIME_AIM <= found.time <= TIME_AIM
    return [
        f"`{case.verb}` {case.title}",
        f"{case.rows:,} × {case.queries:,} × {case.checkpoints}"
        if case.queries
        else f"{case.rows:,} × {case.checkpoints}",
        f"{found.planned_bytes / MIB:,.0f}",
        f"{found.bytes / MIB:,.0f}",
        f"{found.memory:.2f}",
        f"{found.planned_seconds:.1f}",
        f"{found.seconds:.1f}",
        f"{found.time:.2f}",
        f"{found.plan_seconds:.1f}",
        ("yes" if ok else "no") if counted else "small",
    ]


HEAD = [
    "work",
    "rows × queries × checkpoints",
    "planned MiB",
    "measured MiB",
    "ratio",
    "planned s",
    "took s",
    "ratio",
]
HEAD += ["planning s", "within the aims"]


def markdown(results: list[Found]) -> str:
    where = results[0].machine
    lines = [
        "# The plan beside the run",
        "",
        (
            "`method.plan(...)` in one process, then the verb in another: its peak is the largest resident memory during the call"
            " less what the process held just before it. Ratios are planned / measured. Where the plan says 256 MiB or more,"
            " memory should be within 25 % and time within 1.5 times; below that, what the libraries themselves take counts."
        ),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|---|" + "--:|" * (len(HEAD) - 3) + "---|",
        *("| " + " | ".join(cells(found)) + " |" for found in results),
        "",
        (
            f"{where['threads']} threads ({where['clock']} clock), {where['processor']} {where['vectors']}, {where['system']}, "
            f"Python {where['python']}, torch {where['torch']}. Made by `python benchmarks/plan.py --write-docs`."
        ),
        "",
    ]
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Planned memory and time beside those of the run.")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows and queries (1)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--out", type=Path, help="a JSON file of the results")
    parser.add_argument("--verbose", action="store_true", help="print each plan")
    parser.add_argument("--write-docs", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "WHAT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(child(*args.child, args.scale, args.clock)))
        return
    results = []
    for name in args.cases:
        start = time.perf_counter()
        results.append(compare(name, args))
        print(" · ".join(cells(results[-1])), f"({time.perf_counter() - start:.0f} s)", flush=True)
    if args.out:
        args.out.write_text(
            json.dumps([asdict(found) for found in results], indent=1) + "\n", encoding="utf-8"
        )
    if args.write_docs:
        PAGE.write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
