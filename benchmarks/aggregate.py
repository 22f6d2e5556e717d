"""Influence on each class of a validation set, beside the plain pass over the same rows.

    python benchmarks/aggregate.py                                  MLP, CNN, ResNet: 2,000 rows × 1,000 validation rows
    python benchmarks/aggregate.py --models cnn --threads 1 --clock cpu
    python benchmarks/aggregate.py --write-docs                     also docs/results/aggregate.md

A round runs the plain pass (forward and backward with the parameters' gradients over train and validation rows, at every
checkpoint), ``aggregate(by=classes)`` and ``influence`` on all validation rows, in turn in one process; ratios are to the pass of
the same round. The error is the largest difference from the class means of ``influence``, over the largest score.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import torch
from aims import AIM_CLASSES
from measure import CLOCKS, machine, ours, timed
from stages import STAGES, stages
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from workloads import CASES, FASHION, Workload, batches, fashion, made

import tracin

# The stages that have a column, and the words above it.
SHOWN = {
    "forward": "forward",
    "backward to the outputs": "backward to the outputs",
    "blocks by rules": "gradients of rows",
    "sums by group": "sums by class",
    "products with the sums": "products with the sums",
}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "aggregate.md"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Influence on classes, beside the plain pass.")
    parser.add_argument(
        "--models", nargs="+", choices=("mlp", "cnn", "resnet"), default=["mlp", "cnn", "resnet"]
    )
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--data", type=Path, default=FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--write-docs", action="store_true")
    return parser.parse_args()


def class_means(scores: tracin.Scores, labels: Tensor) -> Tensor:
    """The mean score of each class's validation rows, classes ascending [g, n]."""
    return torch.stack([scores.values[labels == label].double().mean(0) for label in labels.unique()])


def least(workload: Workload, groups: int) -> float:
    """What the products with the groups' gradients add to the pass's multiply-adds, as a ratio to them.

    Every train row has to be multiplied with each of the g summed gradients, p multiply-adds each; or, in a linear layer, which
    the models here use once a row, with the factors of each of the m members, in + out each.
    """
    batch = batches(workload.train, workload.case.batch)[0]
    with FlopCounterMode(display=False) as counted:
        peers.plain_backward(peers.plain_forward(workload, batch), list(workload.model.parameters()))
    members, train = len(workload.queries[0]), len(workload.train[0])
    of_pass = counted.get_total_flops() / len(batch[0]) * (train + members)
    products = 0
    for module in workload.model.modules():
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        factors = members * sum(module.weight.shape) if isinstance(module, nn.Linear) else math.inf
        products += min(groups * size, factors)
    return 1 + 2 * train * products / of_pass


def measured(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of one model."""
    method, labels, clock = ours(workload), workload.queries[1], CLOCKS[options.clock]
    runs = {
        "pass": lambda: peers.plain_pass(workload),
        "aggregate": lambda: method.aggregate(workload.train, workload.queries, by=labels),
        "influence": lambda: method.influence(workload.train, workload.queries),
    }
    found = {name: run() for name, run in runs.items()}
    truth = class_means(found["influence"], labels)
    error = float((found["aggregate"].values.double() - truth).abs().max() / truth.abs().max())
    rounds, spent = [], []
    for _ in range(options.rounds):
        one = {}
        for name, run in runs.items():
            with stages(STAGES if name == "aggregate" else {}, clock) as clocked:
                one[name] = timed(run, clock)[0]
            if name == "aggregate":
                spent.append(clocked.seconds)
        rounds.append(one)
    ratios = {name: [one[name] / one["pass"] for one in rounds] for name in runs}
    return {
        "title": workload.case.title,
        "seconds": {name: statistics.median(one[name] for one in rounds) for name in runs},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "range": {name: (min(values), max(values)) for name, values in ratios.items()},
        "stages": {
            stage: statistics.median(
                seconds[stage] / one["pass"] for seconds, one in zip(spent, rounds, strict=True)
            )
            for stage in SHOWN
        },
        "least": least(workload, len(truth)),
        "error": error,
    }


def told(results: list[dict[str, Any]]) -> str:
    """How far the aim is, and what it would leave for the sums and their products."""
    said = []
    for found in results:
        ratio, own = found["ratio"]["aggregate"], found["stages"]
        if ratio <= AIM_CLASSES:
            said.append(f"{found['title']}: met.")
            continue
        before = sum(own[stage] for stage in ("forward", "backward to the outputs", "blocks by rules"))
        after = own["sums by group"] + own["products with the sums"]
        said.append(
            f"{found['title']}: missed by {ratio - AIM_CLASSES:.2f}; forward, backward and the rows' gradients leave "
            f"{max(0.0, AIM_CLASSES - before):.2f} of it for the sums and their products, which take {after:.2f}."
        )
    return " ".join([f"The aim is {AIM_CLASSES} of a pass.", *said])


def markdown(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    where = machine(options.threads, options.clock)
    lines = [
        "# Influence on classes",
        "",
        (
            f"2,000 train rows, {options.validation:,} validation rows in 10 classes, 3 checkpoints. One plain pass: forward and "
            "backward with the parameters' gradients over all of these rows at every checkpoint. Ratios are medians over "
            f"{options.rounds} rounds in one process, each to the pass of its round. The error: from the class means of all "
            "single scores, over the largest. *By arithmetic*: the pass's multiply-adds and those of each train row with each of "
            "the 10 summed gradients (in linear layers with their members' factors, where that is less), over the pass's; "
            "where the pass is little more than one product per parameter and row, ten more cannot be had for a small part of "
            "it. A row's own gradient of a convolution counts there like the pass's ordinary one; what it costs more is in "
            "[the profile](speed-profile.md)."
        ),
        "",
        "| model | pass, s | `aggregate`, × pass | range | by arithmetic | `influence` on every row, × pass | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for found in results:
        low, high = found["range"]["aggregate"]
        lines.append(
            f"| {found['title']} | {found['seconds']['pass']:.3f} | {found['ratio']['aggregate']:.2f} | {low:.2f}–{high:.2f} | "
            f"{found['least']:.2f} | {found['ratio']['influence']:.2f} | {found['error']:.1e} |"
        )
    lines += [
        "",
        (
            "Where `aggregate` spends it, × pass (medians; a convolution's gradients of rows are made under that name where "
            "they take less memory than its input and δ, else under the sums and the products):"
        ),
        "",
        "| model | " + " | ".join(SHOWN.values()) + " | everything else |",
        "|---|" + "---:|" * (len(SHOWN) + 1),
    ]
    for found in results:
        parts = [found["stages"][stage] for stage in SHOWN]
        rest = max(0.0, found["ratio"]["aggregate"] - sum(parts))
        lines.append(f"| {found['title']} | " + " | ".join(f"{part:.2f}" for part in (*parts, rest)) + " |")
    lines += ["", told(results)]
    lines += [
        "",
        (
            f"{where['threads']} threads ({where['clock']} clock), {where['processor']} {where['vectors']}, {where['system']}, "
            f"Python {where['python']}, torch {where['torch']}. Made by `python benchmarks/aggregate.py --write-docs`."
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    results = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            workload = made(name, CASES[name], Path(folder), options.data)
            rows = fashion(options.data, "t10k", options.validation)
            results.append(measured(replace(workload, queries=rows), options))
        print(results[-1], flush=True)
    if options.write_docs:
        PAGE.write_text(markdown(results, options), encoding="utf-8")


if __name__ == "__main__":
    main()
