"""The gradient index on Fashion-MNIST: what a build and a question cost, and how near the answers are to exact scores.

    python benchmarks/index.py                    60,000 rows, the CNN, 3 checkpoints, 100 queries
    python benchmarks/index.py --rows 5000 --sizes 256 1024
    python benchmarks/index.py --write-docs       also docs/results/gradient-index.md

Build: seconds over those of one plain forward and backward pass over the same rows and checkpoints, the median of
interleaved rounds. Agreement: of 100 queries with ``influence`` by full gradients, over all rows. Memory of a question: a
fresh process opens the index and asks; its largest resident memory less that just before, mapped files included (Linux).
Wrong labels: one label in ten of 10,000 rows is made wrong, the CNN is trained on them, and suspicions are the scores of
2,000 of these rows with themselves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from plan import Peak
from torch import Tensor
from workloads import CASES, FASHION, build, fashion, opened, train

import tracin
from tracin.evaluation import DetectionCurve, plant_flips

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results" / "gradient-index.md"
QUERIES = 100
FLIPPED, LOOKED_AT = 10_000, 2_000


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost and agreement of the gradient index.")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 256, 4096])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of pass and build (3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "index.json")
    parser.add_argument("--write-docs", action="store_true")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
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


def method_of(workload: Any) -> tracin.TracInCP:
    task = tracin.Task(workload.model, workload.case.loss)
    return tracin.TracInCP(task, workload.trajectory, device="cpu", progress=False)


def asking_memory(folder: Path, options: argparse.Namespace) -> int:
    """Bytes that a question takes in a fresh process."""
    words = [sys.executable, __file__, "--ask", str(folder), "--threads", str(options.threads)]
    done = subprocess.run([*words, "--data", str(options.data)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def ask(options: argparse.Namespace) -> None:
    """Open the index, ask, and print the bytes."""
    workload = opened("cnn", CASES["cnn"], options.ask / "model", options.data)
    queries = fashion(options.data, "t10k", QUERIES)
    method = method_of(workload)
    with Peak() as peak:
        tracin.Index.open(options.ask / "index", method).top_k(queries, 10)
    print(peak.bytes)


def mislabelled(
    options: argparse.Namespace, folder: Path
) -> tuple[dict[str, float], dict[tuple[int, str], float]]:
    """AUROC of planted flips: by ``self_influence``, which reads full norms, and by the features of each index."""
    pictures, labels = fashion(options.data, "train", FLIPPED)
    flips = plant_flips(labels, fraction=0.1, classes=10, seed=0)
    case = CASES["cnn"]
    torch.manual_seed(0)
    model = case.model()
    rows = (pictures, flips.labels)
    trajectory = train(case, model, rows, folder / "flipped")
    task = tracin.Task(model.eval(), case.loss)
    method = tracin.TracInCP(task, trajectory, device="cpu", progress=False)
    whole = {"self_influence": DetectionCurve(method.self_influence(rows).values, flips.mask).auroc}
    looked = (pictures[:LOOKED_AT], flips.labels[:LOOKED_AT])
    mask = flips.mask[:LOOKED_AT]
    found = {}
    for size in options.sizes:
        for dtype in ("float16", "float32"):
            index = tracin.Index.build(method, looked, folder / "own", projection=size, dtype=dtype)
            own = index.influence(looked, estimate=False).values.diagonal()
            found[size, dtype] = DetectionCurve(own, mask).auroc
            shutil.rmtree(folder / "own")
    return whole, found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    workload = build("cnn", folder / "model", options.data)
    rows, queries = fashion(options.data, "train", options.rows), fashion(options.data, "t10k", QUERIES)
    method = method_of(workload)
    floor = replace(workload, train=rows, queries=(queries[0][:1], queries[1][:1]))
    ratios, spent = [], []
    for _ in range(options.rounds):
        base, _ = timed(lambda: peers.plain_pass(floor))
        seconds, _ = timed(lambda: tracin.Index.build(method, rows, folder / "index"))
        shutil.rmtree(folder / "index")
        ratios.append(seconds / base)
        spent.append(seconds)
        print(f"build {seconds:.1f} s, {ratios[-1]:.2f} × pass", flush=True)
    truth = method.influence(rows, queries).values
    own = method.self_influence(rows).values
    sizes = []
    for size in options.sizes:
        for dtype in ("float16", "float32"):
            index = tracin.Index.build(method, rows, folder / "index", projection=size, dtype=dtype)
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
                    "memory": asking_memory(folder, options),
                    "own": float((index.self_influence().values - own).abs().max() / own.abs().max()),
                }
            )
            print(sizes[-1], flush=True)
            shutil.rmtree(folder / "index")
    flips, suspicions = mislabelled(options, folder)
    for one in sizes:
        one["auroc"] = suspicions[one["size"], one["dtype"]]
    return {
        "rows": len(rows[0]),
        "ratios": ratios,
        "build_seconds": statistics.median(spent),
        "flips": flips,
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
        "| features | dtype | MiB | seconds of a question | its memory, MiB | Spearman | top 10 in common | reranked | AUROC |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += [
        f"| {one['size']:,} | {one['dtype']} | {one['bytes'] / 2**20:,.0f} | {one['query_seconds']:.2f} |"
        f" {one['memory'] / 2**20:,.0f} | {one['spearman']:.3f} | {100 * one['overlap']:.0f} % |"
        f" {100 * one['reranked']:.0f} % | {one['auroc']:.3f} |"
        for one in found["sizes"]
    ]
    lines += ["", *notes(found)]
    return "\n".join(lines) + "\n"


def notes(found: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    first = found["sizes"][0]
    rate, times = found["build_seconds"] / found["rows"], 1_000_000 / found["rows"]
    return [
        ("*Memory* counts the pages of the files that were read, which the system may take back. *AUROC* is that of planted "
        f"flips (one label in ten of {FLIPPED:,} rows), by the scores of {LOOKED_AT:,} rows with themselves in the features; "
        f"`Index.self_influence` needs no features, reads full norms, and has {found['flips']['self_influence']:.3f} on all rows "
        "whatever the size."),
        "",
        (f"**A million such rows**, computed from these rates and not run: a build of {1e6 * rate / 60:,.0f} minutes on this "
        f"machine, {first['bytes'] * times / 2**30:.1f} GiB with {first['size']:,} features in {first['dtype']}, and "
        f"{first['query_seconds'] * times:.0f} s for a question of {QUERIES} pictures. Both times divide by the number of "
        "workers."),
    ]  # fmt: skip


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.ask is not None:
        ask(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.write_docs:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
