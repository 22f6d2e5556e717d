"""Products of long gradients whose result is narrow: whole, and with the long sum in pieces that threads share.

    python benchmarks/narrow.py                    seconds whole, and the ratio in pieces
    python benchmarks/narrow.py --pieces 4 8 16

The two take turns; the ratio is of medians. On one thread nothing is cut.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from measure import CLOCKS, timed
from torch import Tensor

from tracin.gradients import products

# Parameters, and rows × queries.
LENGTHS = (4_608, 36_864, 65_664, 262_144)
RESULTS = ((1, 16), (4, 16), (16, 16), (36, 16), (150, 10), (150, 32), (150, 64), (150, 100), (150, 1000))


def medians(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Seconds of each, in turns, after one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(rounds + 1):
        for name, run in runs.items():
            seconds, _ = timed(run, CLOCKS["wall"])
            if at:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def in_pieces(left: Tensor, right: Tensor, pieces: int) -> Tensor:
    """The library's product, made to cut whatever the result's shape."""
    products.PIECES, products.NARROW, products.LEAST_RESULT, products.LEAST_PIECE = pieces, 1 << 30, 0, 1
    return products._product(left, right)


def main() -> None:
    parser = argparse.ArgumentParser(description="Narrow products, whole and in pieces.")
    parser.add_argument("--pieces", nargs="+", type=int, default=[products.PIECES])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(
        "| parameters | rows × queries | threads | whole, ms | "
        + " | ".join(f"{k} pieces" for k in options.pieces),
        "|",
    )
    print("|---:|---:|---:|---:|" + "---:|" * len(options.pieces))
    for size in LENGTHS:
        for n, m in RESULTS:
            left, right = torch.randn(n, size), torch.randn(size, m)
            for threads in options.threads:
                torch.set_num_threads(threads)
                runs: dict[str, Callable[[], Tensor]] = {"whole": lambda left=left, right=right: left @ right}
                for pieces in options.pieces:
                    runs[str(pieces)] = lambda a=left, b=right, k=pieces: in_pieces(a, b, k)
                found = medians(runs, options.rounds)
                ratios = " | ".join(f"{found[str(k)] / found['whole']:.2f}" for k in options.pieces)
                print(
                    f"| {size:,} | {n} × {m:,} | {threads} | {1e3 * found['whole']:.3f} | {ratios} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
