"""How close projected scores come to exact ones, and at what price: docs/results/projection.md.

    python benchmarks/projection.py                        the table of each model
    python benchmarks/projection.py --write-docs           also write the page
    python benchmarks/projection.py --models cnn --sizes 512 --seeds 1

Fashion-MNIST, as in ``run.py``. Agreement is with the exact scores of the same rows, in the mean over queries and over the
seeds of the projection; times are processor time on 600 rows, as the ratio to exact runs in turn with them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from workloads import FASHION, Workload, build

import tracin

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "projection.md"
KINDS = ("kronecker", "rank_one")
TIMED = 600  # train rows of the timed runs
HEADINGS = (
    "kind", "size", "spearman", "top 10", "error", "self: spearman", "top 10 %", "× exact", "× exact, self",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line: agreement of scores and of self-influence with the exact ones, and the time."""

    kind: str
    size: str
    cells: tuple[float, ...]

    def words(self) -> tuple[str, ...]:
        return self.kind, self.size, *(f"{cell:.2f}" for cell in self.cells)


def ranks(values: Tensor) -> Tensor:
    order = values.argsort(dim=-1)
    places = torch.arange(values.shape[-1]).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places).double()


def spearman(found: Tensor, exact: Tensor) -> float:
    """Rank correlation of every row of scores, in the mean; scores have no ties."""
    a, b = (ranks(x) - (x.shape[-1] - 1) / 2 for x in (found, exact))
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())


def overlap(found: Tensor, exact: Tensor, k: int) -> float:
    """The share of the k largest of every row that both have."""
    ours, theirs = (x.topk(k, dim=-1).indices for x in (found, exact))
    same = (ours[..., :, None] == theirs[..., None, :]).any(-1)
    return float(same.double().mean())


def error(found: Tensor, exact: Tensor) -> float:
    """The root mean square of the difference, in units of the exact scores' own."""
    return float((found - exact).norm() / exact.norm())


def ratio(work: Callable[[], object], base: Callable[[], object], rounds: int) -> float:
    """Processor time of ``work`` as a ratio to ``base``, which runs in turn with it; the smallest of each."""
    spent: dict[Callable[[], object], float] = {}
    for _ in range(rounds):
        for run in (base, work):
            start = time.process_time()
            run()
            spent[run] = min(spent.get(run, float("inf")), time.process_time() - start)
    return spent[work] / spent[base]


def method(workload: Workload, task: tracin.Task | None = None, **options: object) -> tracin.TracInCP:
    task = task or tracin.Task(workload.model, workload.case.loss)
    return tracin.TracInCP(task, workload.trajectory, batch_size=100, progress=False, **options)


@dataclass(frozen=True)
class Exact:
    """The exact run: its method, scores and self-influence."""

    method: tracin.TracInCP
    scores: Tensor
    own: Tensor


def compare(workload: Workload, made: list[tracin.TracInCP], exact: Exact, rounds: int) -> tuple[float, ...]:
    """Agreement in the mean over the methods, and the time of the first on fewer rows."""
    cells = []
    for chosen in made:
        scores = chosen.influence(workload.train, workload.queries).values
        own = chosen.self_influence(workload.train).values
        cells.append(
            (
                spearman(scores, exact.scores),
                overlap(scores, exact.scores, 10),
                error(scores, exact.scores),
                spearman(own, exact.own),
                overlap(own, exact.own, len(own) // 10),
            )
        )
    some = (workload.train[0][:TIMED], workload.train[1][:TIMED])
    ours, theirs = made[0], exact.method
    return (
        *torch.tensor(cells).mean(0).tolist(),
        ratio(
            lambda: ours.influence(some, workload.queries),
            lambda: theirs.influence(some, workload.queries),
            rounds,
        ),
        ratio(lambda: ours.self_influence(some), lambda: theirs.self_influence(some), rounds),
    )


def table(workload: Workload, sizes: list[int], seeds: int, rounds: int) -> list[Row]:
    whole = method(workload)
    exact = Exact(
        whole,
        whole.influence(workload.train, workload.queries).values,
        whole.self_influence(workload.train).values,
    )
    last = [name.rpartition(".")[0] for name, _ in workload.model.named_parameters()][-1]
    subset = tracin.Task(workload.model, workload.case.loss, parameters=f"{last}.*")
    kept = sum(p.numel() for p in subset.select().traced.values())
    out = [
        Row("last layer, exact", f"{kept:,}", compare(workload, [method(workload, subset)], exact, rounds))
    ]
    for kind in KINDS:
        for size in sizes:
            made = [
                method(workload, projection=tracin.Projection(size, seed=seed, kind=kind))
                for seed in range(seeds)
            ]
            out.append(Row(kind, f"{size:,}", compare(workload, made, exact, rounds)))
            print(" ".join(out[-1].words()), flush=True)
    return out


def lines(rows: list[Row]) -> str:
    head = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    return "\n".join([*head, *("| " + " | ".join(row.words()) + " |" for row in rows)])


INTRODUCTION = """# Projections and the last layer, measured

`python benchmarks/projection.py --write-docs` wrote this page. Scores of projected gradients, and of the last layer alone,
beside the exact scores of the same rows: Fashion-MNIST, 2,000 train rows, 100 queries, 3 checkpoints.

- **size**: numbers per row and checkpoint (four bytes each where they are kept), all parameters together; for the last layer
  its parameters.
- **spearman**, **top 10**: rank correlation with the exact scores over the train rows, and the share of the ten strongest
  proponents that both name, in the mean over queries and seeds. **error**: root mean square difference over the exact
  scores' own root mean square.
- **self**: the same for self-influence; **top 10 %** is the share of its upper tenth, the rows one would inspect first.
- **× exact**: processor time on 600 train rows as a ratio to exact runs in turn with it, for scores and for
  self-influence; the checks of the first batch are the same in both, so longer runs differ a little more.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement of projected scores with exact ones.")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "resnet"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=FASHION)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = [INTRODUCTION]
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            workload = build(name, Path(folder), options.data)
            rows = table(workload, options.sizes, options.seeds, options.rounds)
        facts = f"{workload.parameters:,} parameters, the mean of {options.seeds} seeds."
        parts.append(f"## {workload.case.title}\n\n{facts}\n\n{lines(rows)}\n")
        print(parts[-1], flush=True)
    parts.append(
        f"{options.threads} thread{'s' if options.threads > 1 else ''} of {os.cpu_count()} CPUs, "
        f"torch {torch.__version__}, tracin {tracin.__version__}.\n"
    )
    if options.write_docs:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
