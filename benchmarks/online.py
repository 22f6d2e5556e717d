"""``OnlineTracIn`` beside plain training: what it costs, and how well first order predicts the ideal.

    python benchmarks/online.py --overhead                      ratios, interleaved, median over rounds
    python benchmarks/online.py --overhead --model resnet       mlp, cnn (the default), resnet, gpt, mlp:width=1024, …
    python benchmarks/online.py --overhead --clock cpu          CPU seconds of one thread, for a busy machine
    python benchmarks/online.py --profile                       where a step's time goes, and the least it can take
    python benchmarks/online.py --correlation                   Pearson by learning rate, on digits
    python benchmarks/online.py --overhead --correlation --write-docs    also docs/results/online.md and its figure

Overhead: the same steps with a ledger, and without a ledger but with a forward and backward pass
over the queries after each step, which is what knowing their losses and gradients takes at least.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from online_stages import profile, stage_table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from workloads import FASHION, Case, case_of, mean_loss, rows_of

import tracin
from tracin.plots.theme import LIGHT

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs" / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="OnlineTracIn beside plain training.")
    parser.add_argument("--overhead", action="store_true", help="measure seconds")
    parser.add_argument("--profile", action="store_true", help="milliseconds of a step by stage")
    parser.add_argument("--correlation", action="store_true", help="first order against ideal")
    parser.add_argument("--model", default="cnn", help="a case of workloads.py (cnn)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu, with one thread")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after the warm-up (5)")
    parser.add_argument("--steps", type=int, default=100, help="steps in a round (100)")
    parser.add_argument("--batch", type=int, default=64, help="rows per step (64)")
    parser.add_argument("--queries", type=int, default=64, help="queries (64)")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's idx files (Debian's place)")
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/online.md")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "online.json", help="the numbers")
    return parser.parse_args()


# ---------------------------------------------------------------- overhead


class Training:
    """Some steps of SGD on a model, in one of three forms."""

    def __init__(
        self, case: Case, rows: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], steps: int, batch: int
    ) -> None:
        torch.manual_seed(0)
        self.start, self.loss, self.rows, self.queries = case.model(), case.loss, rows, queries
        order = torch.Generator().manual_seed(1)
        self.steps = [torch.randint(0, len(rows[1]), (batch,), generator=order) for _ in range(steps)]

    def fresh(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(self.start)
        return model, torch.optim.SGD(model.parameters(), lr=0.05)

    def plain(self, with_queries: bool) -> nn.Module:
        model, optimizer = self.fresh()
        parameters = list(model.parameters())
        for ids in self.steps:
            self.step(model, optimizer, ids)
            if with_queries:
                model.eval()
                torch.autograd.grad(mean_loss(model, *self.queries), parameters)
                model.train()
        return model

    def ledger(self, setup: dict[str, float], clock: Any) -> nn.Module:
        model, optimizer = self.fresh()
        task = tracin.Task(model, self.loss)
        start = clock()
        online = tracin.OnlineTracIn(task, optimizer, self.queries, len(self.rows[1]))
        setup["seconds"] = clock() - start
        for ids in self.steps:
            with online.step(ids):
                self.step(model, optimizer, ids)
        online.close()
        return model

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        optimizer.zero_grad()
        mean_loss(model, self.rows[0][ids], self.rows[1][ids]).backward()
        optimizer.step()


def training_of(options: argparse.Namespace) -> Training:
    case = replace(case_of(options.model), rows=2000, queries=options.queries)
    rows, queries = rows_of(case, options.data or FASHION)
    return Training(case, rows, queries, options.steps, options.batch)


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds; each ratio is taken within its round. The ledger's construction is timed apart."""
    clock = CLOCKS[options.clock]
    training = training_of(options)
    setup: dict[str, float] = {}
    found: dict[str, list[float]] = {"plain": [], "with queries": [], "ledger": []}
    states = {}
    for at in range(options.rounds + 1):
        runs = {
            "plain": lambda: training.plain(False),
            "with queries": lambda: training.plain(True),
            "ledger": lambda: training.ledger(setup, clock),
        }
        for name, run in runs.items():
            gc.collect()
            start = clock()
            states[name] = run()
            seconds = clock() - start - (setup["seconds"] if name == "ledger" else 0.0)
            if at:
                found[name].append(seconds / options.steps)
    pairs = zip(states["plain"].state_dict().values(), states["ledger"].state_dict().values(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise SystemExit("training with the ledger is not bit-identical")
    ratios = [a / b for a, b in zip(found["ledger"], found["with queries"], strict=True)]
    return {
        "model": options.model,
        "batch": options.batch,
        "queries": options.queries,
        "steps": options.steps,
        "clock": options.clock,
        "threads": options.threads,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in found.items()},
        "setup_milliseconds": 1e3 * setup["seconds"],
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


# ---------------------------------------------------------------- correlation


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.reshape(-1), b.reshape(-1)]))[0, 1])


def digits_rows() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,000 rows of scikit-learn's digits to train on and 50 others as queries, in float32."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, asked = order[:1000], order[1000:1050]
    return (x[train], y[train]), (x[asked], y[asked])


def agreement(rate: float, batch: int, steps: int) -> dict[str, float]:
    """Train a 64-32-10 net with constant SGD, and compare what first order and the ideal say."""
    rows, queries = digits_rows()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    order = torch.Generator().manual_seed(1)
    with tracin.OnlineTracIn(task, optimizer, queries, len(rows[1])) as online:
        while online.steps < steps:
            for ids in torch.randperm(len(rows[1]), generator=order).split(batch):
                if online.steps == steps:
                    break
                with online.step(ids):
                    optimizer.zero_grad()
                    F.cross_entropy(model(rows[0][ids]), rows[1][ids]).backward()
                    optimizer.step()
    report = online.report()
    with torch.no_grad():
        accuracy = (model(queries[0]).argmax(1) == queries[1]).double().mean()
    return {
        "rate": rate,
        "batch": batch,
        "steps": steps,
        "per_step": pearson(report.own, report.change),
        "scores": pearson(online.scores("first_order").values, online.scores("ideal").values),
        "accuracy": float(accuracy),
    }


def figure(table: list[dict[str, float]], path: Path) -> None:
    """Pearson by learning rate, one line per batch size."""
    drawn = Figure(figsize=(6.0, 3.4), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    for at, batch in enumerate(sorted({line["batch"] for line in table})):
        points = [(line["rate"], line["per_step"]) for line in table if line["batch"] == batch]
        label = f"{batch:.0f} row{'s' if batch > 1 else ''} per step"
        axes.plot(*zip(*points, strict=True), marker="o", color=LIGHT.series[at], label=label)
    axes.axhline(0.978, color=LIGHT.muted, linestyle=(0, (3, 2)), linewidth=1)
    axes.annotate(
        "paper, MNIST: .978",
        (RATES[0], 0.978),
        (0, -11),
        textcoords="offset points",
        color=LIGHT.muted,
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.05)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("Pearson, first order and ideal")
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=160)


# ---------------------------------------------------------------- page


CORRELATION = """# OnlineTracIn, measured

`python benchmarks/online.py --correlation --overhead --write-docs` writes this page.

## First order and ideal

A 64-32-10 network on 1,000 rows of scikit-learn's digits and 50 queries, plain SGD at a constant rate, float32. *Per step*
compares, for every step and query, the first-order fall of the loss with the measured one; with one row per step these are
the two forms of TracIn themselves. *Scores* compares the two ledgers at the end, `[50, 1000]`; with several rows per step
they share the first-order part by construction. The paper reports .978 on MNIST.

![Pearson correlation by learning rate](online-correlation.png)

| learning rate | rows per step | steps | Pearson per step | Pearson of scores | accuracy on the queries |
|---:|---:|---:|---:|---:|---:|"""

OVERHEAD = """
## Overhead

Steps of SGD on Fashion-MNIST, with the MLP 784-256-64-10 (`mlp`), the same with 1,024 and 256 (`mlp:width=1024`), a CNN of two
convolutions and two linear layers (`cnn`) and a ResNet of nine convolutions with BatchNorm (`resnet`), and on random tokens with
a GPT-2 shape of four blocks of width 128, 64 tokens, a head tied to the embedding (`gpt`); `--model` chooses. The yardstick is
the same training that also runs a forward and a backward pass over the queries, in eval mode, after each step. Interleaved
rounds; the ratio is taken within a round, and the median told with its range. The final weights of both are compared bit by bit.
Making the ledger is not counted; its first pass over the queries, which is checked against autograd, is.

The goal is 1.25. Two things stand against it. Three to four ms a step are none of the arithmetic: hooks, the guard around the
user's model, which copies its parameters, the comparison of the rows' sum with the optimizer's gradient; they weigh where a step
takes as little itself. And every
convolution, norm layer and linear layer over tokens needs each row's own gradient, for train rows and queries, where training
needs their sum alone: below each profile stands the ratio that this alone would make, at the goal on the CNN and above it on
the ResNet and the GPT shape. A linear layer over plain rows is spared it, as its products stay factored.

| model | steps | rows per step | queries | clock | threads | plain, ms | with queries, ms | ledger, ms | ratio | range |
|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---|"""


def page(found: dict[str, Any]) -> str:
    """docs/results/online.md."""
    lines = [CORRELATION]
    lines += [
        f"| {line['rate']:g} | {line['batch']:.0f} | {line['steps']:.0f} | {line['per_step']:.3f} | {line['scores']:.3f} | "
        f"{line['accuracy']:.2f} |"
        for line in found.get("correlation", [])
    ]
    lines.append(OVERHEAD)
    for run in found.get("overhead", []):
        ms = run["milliseconds"]
        lines.append(
            f"| {run['model']} | {run['steps']} | {run['batch']} | {run['queries']} | {run['clock']} | {run['threads']} | "
            f"{ms['plain']:.1f} | "
            f"{ms['with queries']:.1f} | {ms['ledger']:.1f} | {run['ratio']:.2f} | {run['range'][0]:.2f}–{run['range'][1]:.2f} |"
        )
    for run in found.get("profile", []):
        lines += [
            "",
            (
                f"### Where a step's time goes: {run['model']}, {run['batch']} rows, {run['queries']} queries, {run['clock']}, "
                f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
            ),
            "",
            (
                f"`python benchmarks/online.py --profile --model {run['model']} --write-docs`, with the sizes and clock above. A "
                "stage is timed without the others that it calls; the first step, whose queries are checked, is left out."
            ),
            "",
            *stage_table(run),
        ]
    return "\n".join([*lines, ""])


def entered(runs: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs with a new one in place of that of the same kind."""
    same = ("model", "batch", "queries", "clock", "threads")
    kept = [run for run in runs if any(run[key] != new[key] for key in same)]
    return sorted([*kept, new], key=lambda run: [run[key] for key in same])


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if options.overhead:
        new = overhead(options)
        print(json.dumps(new))
        found["overhead"] = entered(found.get("overhead", []), new)
    if options.profile:
        new = profile(training_of(options), CLOCKS[options.clock], options.rounds, options.model == "cnn")
        print("\n".join(stage_table(new)))
        new |= {key: getattr(options, key) for key in ("model", "batch", "queries", "clock", "threads")}
        found["profile"] = entered(found.get("profile", []), new)
    if options.correlation:
        table = []
        for batch, steps in ((1, 2000), (32, 400)):
            for rate in RATES:
                table.append(agreement(rate, batch, steps))
                print(json.dumps(table[-1]), flush=True)
        found["correlation"] = table
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    if options.write_docs:
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS / "online.md").write_text(page(found))
        if found.get("correlation"):
            figure(found["correlation"], DOCS / "online-correlation.png")


if __name__ == "__main__":
    main()
