"""What no exact method can save: the pass without weight gradients, the gradients per row, and the products.

Measured with plain torch on the workload's own tensors, apart from the library. Per layer the cheapest of the known exact
ways counts: the weight gradient of each row and one matrix product with the queries', or the two factors' products. Norm
layers and embeddings are not counted, so the true floor is a little higher.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peers
import torch
from measure import timed
from torch import Tensor, nn
from workloads import Rows, Workload, batches

__all__ = ["Layer", "floor"]

MOST_PAIRS = 1 << 24


@dataclass(frozen=True)
class Layer:
    """Seconds over the whole run: ordinary weight gradients, those per row, and the products with the queries."""

    name: str
    what: str
    ordinary: float
    per_row: float
    products: float
    way: str


@dataclass(frozen=True)
class Site:
    """One layer's input and the gradient at its output, for a batch."""

    name: str
    module: nn.Module
    x: Tensor
    d: Tensor


Costs = tuple[float, float, float, str]
Timer = Callable[[Callable[[], Any]], float]


def seconds_of(run: Callable[[], Any], now: Callable[[], float], repeats: int = 5) -> float:
    """Median of some runs after one that is not counted."""
    run()
    found = []
    for _ in range(repeats):
        start = now()
        run()
        found.append(now() - start)
    return statistics.median(found)


def sites_of(workload: Workload, batch: Rows) -> list[Site]:
    """The linear layers and convolutions, with what flows through them."""
    inputs: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name] = (module, args[0].detach(), output)

    handles = [
        module.register_forward_hook(partial(keep, name))
        for name, module in workload.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        loss = peers.plain_forward(workload, batch)
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(loss, [output for _, _, output in inputs.values()])
    return [
        Site(name, module, x, d.contiguous())
        for (name, (module, x, _)), d in zip(inputs.items(), gradients, strict=True)
    ]


def pass_without_weights(workload: Workload) -> Callable[[], None]:
    """The plain pass with every parameter frozen: forward, and backward to the first layer's output."""
    first = next(m for m in workload.model.modules() if list(m.parameters(recurse=False)))
    outputs: list[Tensor] = []

    def start(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    def run() -> None:
        workload.model.requires_grad_(False)
        handle = first.register_forward_hook(start)
        try:
            for checkpoint in workload.trajectory:
                peers.plain_load(workload.model, checkpoint.path)
                for rows in (workload.queries, workload.train):
                    for batch in batches(rows, workload.case.batch):
                        loss = peers.plain_forward(workload, batch)
                        torch.autograd.grad(loss, outputs)
                        outputs.clear()
        finally:
            handle.remove()
            workload.model.requires_grad_(True)

    return run


def grouped(x: Tensor, d: Tensor, module: nn.Conv2d) -> Tensor:
    """Weight gradients per row by one convolution-backward with a group per row."""
    n = len(x)
    weight = module.weight.detach().repeat(n, 1, 1, 1)
    return torch.ops.aten.convolution_backward(
        d.reshape(1, -1, *d.shape[2:]), x.reshape(1, -1, *x.shape[2:]), weight, None,
        module.stride, module.padding, module.dilation, False, [0, 0], n, [False, True, False],
    )[1]  # fmt: skip


def unfolded(x: Tensor, d: Tensor, module: nn.Conv2d) -> Tensor:
    """Weight gradients per row by one batched matrix product with the patches."""
    patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return d.flatten(2) @ patches.mT


def of_convolution(site: Site, rows: int, queries: int, time: Timer) -> Costs:
    module, x, d = site.module, site.x, site.d
    ordinary = time(
        lambda: torch.ops.aten.convolution_backward(
            d, x, module.weight, None, module.stride, module.padding, module.dilation, False, [0, 0], 1,
            [False, True, False],
        )
    )  # fmt: skip
    ways = {
        "grouped convolution": time(lambda: grouped(x, d, module)),
        "patches": time(lambda: unfolded(x, d, module)),
    }
    way = min(ways, key=ways.__getitem__)
    return ordinary, ways[way], gemm(rows, queries, module.weight.numel(), time), way


def gemm(rows: int, queries: int, size: int, time: Timer) -> float:
    """One product of gradients multiplied out, [queries, size] with [rows, size]."""
    one, other = torch.randn(queries, size), torch.randn(rows, size)
    return time(lambda: one @ other.mT)


def factored(site: Site, queries: int, time: Timer) -> float:
    """Σ over the token pairs of (a·a')(δ·δ')."""
    x, d = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (site.x, site.d))
    tokens = len(x) // len(site.x)
    a, b = torch.randn(queries * tokens, x.shape[-1]), torch.randn(queries * tokens, d.shape[-1])

    def run() -> Tensor:
        pairs = (a @ x.mT).mul_(b @ d.mT)
        return pairs.view(queries, tokens, -1, tokens).sum((1, 3)) if tokens > 1 else pairs

    return time(run)


def of_linear(site: Site, rows: int, queries: int, time: Timer) -> Costs:
    module, x, d = site.module, site.x, site.d
    flat = [leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, d)]
    ordinary = time(lambda: flat[1].mT @ flat[0])
    tokens = len(flat[0]) // len(x)
    pairs = rows * tokens * queries * tokens
    apart = factored(site, queries, time) if pairs <= MOST_PAIRS else float("inf")
    if tokens == 1:
        return ordinary, 0.0, apart, "factors"
    x3, d3 = x.reshape(len(x), -1, x.shape[-1]), d.reshape(len(d), -1, d.shape[-1])
    out, product = time(lambda: d3.mT @ x3), gemm(rows, queries, module.weight.numel(), time)
    if apart < out + product:
        return ordinary, 0.0, apart, "factors"
    return ordinary, out, product, "batched product"


def floor(workload: Workload, rounds: int, now: Callable[[], float]) -> dict[str, Any]:
    """Seconds of what any exact method does, over the whole run.

    Args:
        workload: Model, rows and checkpoints.
        rounds: Pairs of passes, with weight gradients and without; medians are told.
        now: One of ``measure.CLOCKS``.

    Returns:
        ``pass``, ``without`` (the pass without weight gradients), and ``layers``.
    """
    without = pass_without_weights(workload)
    without()
    pairs = [
        (timed(lambda: peers.plain_pass(workload), now)[0], timed(without, now)[0]) for _ in range(rounds)
    ]
    whole = statistics.median(one for one, _ in pairs)
    share = statistics.median(bare / one for one, bare in pairs)
    batch = batches(workload.train, workload.case.batch)[0]
    n, m, checkpoints = len(workload.train[0]), len(workload.queries[0]), len(workload.trajectory)
    size = len(batch[0])
    layers = []
    for site in sites_of(workload, batch):
        costs_of = of_convolution if isinstance(site.module, nn.Conv2d) else of_linear
        ordinary, per_row, products, way = costs_of(site, size, m, partial(seconds_of, now=now))
        every, train = (n + m) / size * checkpoints, n / size * checkpoints
        what = type(site.module).__name__ + " " + "×".join(map(str, site.module.weight.shape))
        layers.append(Layer(site.name, what, ordinary * every, per_row * every, products * train, way))
    return {"pass": whole, "without": share * whole, "layers": layers}
