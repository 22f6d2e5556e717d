"""Weight gradients of convolutions, one per picture, by each route: where the library's bounds between them come from.

    python benchmarks/convolutions.py                     milliseconds by route, and the one that is taken
    python benchmarks/convolutions.py --sides 7 --kernels 3
    python benchmarks/convolutions.py --norms             the same for the norms of the gradients

Pictures lie with their channels apart (torch's ordinary order) or side by side (``channels_last``); the routes take turns.
Rows are as many as keep every tensor below 12 MiB, and 100 at the most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from narrow import medians
from torch import Tensor

from tracin.gradients import convolution
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.gram import gram_norm, norm_work
from tracin.gradients.pictures import Convolution
from tracin.scoring.memory import freed_memory_kept

CHANNELS = ((1, 16), (3, 16), (16, 16), (32, 32), (32, 64), (64, 64), (128, 128))
ELEMENTS = 3 << 20
GRADIENTS: dict[str, Callable[..., Tensor]] = {
    "grouped": convolution._by_grouped_convolution,
    "patches": convolution._by_patches,
    "kernel first": convolution.kernel_first_gradient,
}


def multiplied_out(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
    return Convolution(x[:, None], d[:, None], shape).norm_multiplied_out()


NORMS: dict[str, Callable[..., Tensor]] = {
    "multiplied out": multiplied_out,
    "patches": partial(gram_norm, by_pixels=False),
    "pixels": partial(gram_norm, by_pixels=True),
}


def shapes(options: argparse.Namespace) -> Iterator[tuple[ConvolutionShape, int, int]]:
    """Geometry, side of the picture, and rows."""
    for kernel in options.kernels:
        for side in options.sides:
            for inner, outer in CHANNELS:
                for stride in (1, 2):
                    pad = kernel // 2
                    shape = ConvolutionShape(
                        outer, inner, (kernel, kernel), (stride, stride), (1, 1), 1, (pad, pad)
                    )
                    out = (side + 2 * pad - kernel) // stride + 1
                    largest = max(inner * side**2, outer * out**2, inner * kernel**2 * max(outer, out**2))
                    yield shape, side, max(4, min(100, ELEMENTS // largest))


def taken_for_gradients(_: Tensor, d: Tensor, shape: ConvolutionShape) -> str:
    if convolution.kernel_first(d, shape):
        return "kernel first"
    return "patches" if convolution._patches_are_cheaper(d, shape) else "grouped"


def taken_for_norms(x: Tensor, d: Tensor, shape: ConvolutionShape) -> str:
    work = norm_work(x, d, shape)
    if not work.by_gram:
        return "multiplied out"
    return "pixels" if work.by_pixels else "patches"


def main() -> None:
    parser = argparse.ArgumentParser(description="Weight gradients of convolutions by each route.")
    parser.add_argument("--kernels", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--sides", nargs="+", type=int, default=[4, 8, 14, 28])
    parser.add_argument("--norms", action="store_true", help="norms, not the gradients themselves")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    routes, taken = (NORMS, taken_for_norms) if options.norms else (GRADIENTS, taken_for_gradients)
    torch.set_num_threads(options.threads)
    print(
        "| channels | kernel | side | stride | rows | order |", *(f"{name} |" for name in routes), "taken |"
    )
    print("|---|---:|---:|---:|---:|---|" + "---:|" * len(routes) + "---|")
    with freed_memory_kept():
        for shape, side, rows in shapes(options):
            (kernel, _), (stride, _), pad = shape.kernel, shape.stride, shape.padding[0]
            out = (side + 2 * pad - kernel) // stride + 1
            leaves = (
                torch.randn(rows, shape.in_channels, side, side),
                torch.randn(rows, shape.out_channels, out, out),
            )
            for order, memory in (("apart", torch.contiguous_format), ("inside", torch.channels_last)):
                x, d = (torch.empty_like(leaf, memory_format=memory).copy_(leaf) for leaf in leaves)
                found = medians(
                    {name: partial(route, x, d, shape) for name, route in routes.items()}, options.rounds
                )
                spent = " | ".join(f"{1e3 * seconds:.2f}" for seconds in found.values())
                print(
                    f"| {shape.in_channels} → {shape.out_channels} | {kernel} | {side} | {stride} | {rows} | {order} | {spent} | "
                    f"{taken(x, d, shape)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
