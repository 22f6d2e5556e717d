"""The gradient index on Fashion-MNIST: what a build and a question cost, and how near the answers are to exact scores.

    python benchmarks/index.py                    60,000 rows, the CNN, 3 checkpoints, 100 queries
    python benchmarks/index.py --rows 5000 --sizes 256 1024
    python benchmarks/index.py --write-docs       also docs/results/gradient-index.md

Build: seconds over those of one plain forward and backward pass over the same rows and checkpoints, the median of
interleaved rounds. Agreement: of 100 queries with ``influence`` by full gradients, over all rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor
from workloads import FASHION, build, fashion

import tracin

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results" / "gradient-index.md"
QUERIES = 100


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost and agreement of the gradient index.")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of pass and build (3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "index.json")
    parser.add_argument("--write-docs", action="store_true")
    return parser.parse_args()


def spearman(found: Tensor, truth: Tensor) -> float:
    """Mean over queries of the rank correlation; scores of different rows are never equal here."""
    mine, theirs = (values.argsort(1).argsort(1).double() for values in (found, truth))
    mine, theirs = mine - mine.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    return float(((mine * theirs).sum(1) / (mine.norm(dim=1) * theirs.norm(dim=1))).mean())


def overlap(found: Tensor, truth: Tensor, k: int = 10) -> float:
    """Of the k strongest proponents, the share that is the same, mean over queries."""
    pairs = zip(found.topk(k, 1).indices.tolist(), truth.topk(k, 1).indices.tolist(), strict=True)
    return statistics.mean(len(set(mine) & set(theirs)) / k for mine, theirs in pairs)


def asking_seconds(index: tracin.Index, queries: Any) -> float:
    return timed(partial(index.top_k, queries, 10, estimate=False))[0]


def timed(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    workload = build("cnn", folder / "model", options.data)
    train, queries = fashion(options.data, "train", options.rows), fashion(options.data, "t10k", QUERIES)
    method = tracin.TracInCP(
        tracin.Task(workload.model, workload.case.loss), workload.trajectory, device="cpu", progress=False
    )
    floor = replace(workload, train=train, queries=(queries[0][:1], queries[1][:1]))
    ratios = []
    for _ in range(options.rounds):
        base, _ = timed(lambda: peers.plain_pass(floor))
        seconds, _ = timed(lambda: tracin.Index.build(method, train, folder / "index"))
        shutil.rmtree(folder / "index")
        ratios.append(seconds / base)
        print(f"build {seconds:.1f} s, {ratios[-1]:.2f} × pass", flush=True)
    truth = method.influence(train, queries).values
    own = method.self_influence(train).values
    sizes = []
    for size in options.sizes:
        for dtype in ("float16", "float32"):
            index = tracin.Index.build(method, train, folder / "index", projection=size, dtype=dtype)
            asked = statistics.median(asking_seconds(index, queries) for _ in range(3))
            found = index.influence(queries, estimate=False).values
            sizes.append(
                {
                    "size": size,
                    "dtype": dtype,
                    "bytes": index.info().nbytes,
                    "query_seconds": asked,
                    "spearman": spearman(found, truth),
                    "overlap": overlap(found, truth),
                    "reranked": overlap_of(index.top_k(queries, 10, rerank=100, estimate=False), truth),
                    "own": float((index.self_influence().values - own).abs().max() / own.abs().max()),
                }
            )
            print(sizes[-1], flush=True)
            shutil.rmtree(folder / "index")
    return {
        "rows": len(train[0]),
        "ratios": ratios,
        "threads": options.threads,
        "torch": torch.__version__,
        "sizes": sizes,
    }


def overlap_of(top: tracin.TopK, truth: Tensor) -> float:
    k = top.proponents.ids.shape[1]
    pairs = zip(top.proponents.ids.tolist(), truth.topk(k, 1).indices.tolist(), strict=True)
    return statistics.mean(len(set(mine) & set(theirs)) / k for mine, theirs in pairs)


def page(found: dict[str, Any]) -> str:
    ratios = found["ratios"]
    rounds = f"{len(ratios)} round{'s' if len(ratios) > 1 else ''}"
    lines = [
        "# The gradient index, measured",
        "",
        (f"Fashion-MNIST, {found['rows']:,} rows, the benchmark's CNN (105,866 parameters), 3 checkpoints, {QUERIES} queries; "
        f"{found['threads']} threads, torch {found['torch']}. Made by `python benchmarks/index.py --write-docs`."),
        "",
        (f"A build with 1,024 features takes {statistics.median(ratios):.2f} times as long as one plain forward and backward pass"
        f" over the same rows and checkpoints ({min(ratios):.2f} to {max(ratios):.2f}, {rounds})."),
        "",
        ("Agreement is with `influence` by full gradients. *Reranked*: 100 candidates on each side scored with full gradients. "
        "Self-influence comes from full norms: its largest error in any index was "
        f"{max(one['own'] for one in found['sizes']):.0e} of the largest score."),
        "",
        "| features | dtype | MiB | seconds for a question | Spearman | top 10 in common | reranked |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {one['size']:,} | {one['dtype']} | {one['bytes'] / 2**20:,.0f} | {one['query_seconds']:.2f} | {one['spearman']:.3f} |"
        f" {100 * one['overlap']:.0f} % | {100 * one['reranked']:.0f} % |"
        for one in found["sizes"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.write_docs:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
