"""What no exact method can save, as a program: written by hand for one model with torch alone, apart from the library.

At each checkpoint it runs the forward pass, the backward pass to the outputs of layers with every parameter frozen, makes
each row's gradients in the cheapest of the known exact ways (or leaves them as two factors), and multiplies with the
queries'. Ways are timed on the workload's own tensors, one batch of each layer. Embeddings are left out, nothing is checked,
and rows are taken as they lie, so the true floor is a little higher.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import peers
import torch
from torch import Tensor, nn
from workloads import Rows, Workload, batches

__all__ = ["Layer", "Least", "least"]

MOST_PAIRS = 1 << 24
# The program takes batches as large as the plain pass's, or so many times that, whichever is faster.
SIZES = (1, 4)


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


Way = Callable[[Tensor, Tensor, Any], Tensor]
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


def grouped(x: Tensor, d: Tensor, module: nn.Conv2d) -> Tensor:
    """Weight gradients per row by one convolution-backward with a group per row."""
    n = len(x)
    weight = module.weight.detach().repeat(n, 1, 1, 1)
    return torch.ops.aten.convolution_backward(
        d.reshape(1, -1, *d.shape[2:]), x.reshape(1, -1, *x.shape[2:]), weight, None,
        module.stride, module.padding, module.dilation, False, [0, 0], n, [False, True, False],
    )[1].view(n, -1)  # fmt: skip


def unfolded(x: Tensor, d: Tensor, module: nn.Conv2d) -> Tensor:
    """Weight gradients per row by one batched matrix product with the patches."""
    patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return (d.flatten(2) @ patches.mT).flatten(1)


def turned(x: Tensor, d: Tensor, module: nn.Conv2d) -> Tensor:
    """The same with the channels of a pixel side by side: entries (output channel, kernel, input channel)."""
    (down, right), (high, wide) = module.padding, module.kernel_size
    inside = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, right, right, down, down)).contiguous()
    (n, height, width, c), (below, beside) = inside.shape, module.stride
    row, pixel = module.dilation
    size = (n, *d.shape[2:], high, wide, c)
    steps = (below * width * c, beside * c, row * width * c, pixel * c, 1)
    patches = inside.as_strided(size, (height * width * c, *steps)).reshape(n, -1, high * wide * c)
    return (d.permute(0, 2, 3, 1).reshape(n, -1, d.shape[1]).mT @ patches).flatten(1)


def batched(x: Tensor, d: Tensor, _: nn.Linear) -> Tensor:
    """Weight gradients per row of a linear layer that is used several times in a row."""
    n = len(x)
    return (d.reshape(n, -1, d.shape[-1]).mT @ x.reshape(n, -1, x.shape[-1])).flatten(1)


def norms_by_pixels(x: Tensor, d: Tensor, module: nn.Conv2d) -> Tensor:
    """Squared norms per row: Σ over pixels t and s of ⟨δ_t, δ_s⟩ Σ_k ⟨x_(t+k), x_(s+k)⟩."""
    (down, right), (n, _, high, wide) = module.padding, d.shape
    x = nn.functional.pad(x, (right, right, down, down))
    pairs = (x.flatten(2).mT @ x.flatten(2)).view(n, *x.shape[2:], *x.shape[2:])
    pairs = sum(pairs[:, at, :, at] for at in read(module, 0, high))
    pairs = sum(pairs[:, :, at, :, at] for at in read(module, 1, wide))
    return (pairs.flatten(1) * (d.flatten(2).mT @ d.flatten(2)).flatten(1)).sum(1)


def read(module: nn.Conv2d, axis: int, size: int) -> list[slice]:
    """What each entry of the kernel reads along an axis."""
    step, apart = module.stride[axis], module.dilation[axis]
    return [
        slice(k * apart, k * apart + step * (size - 1) + 1, step) for k in range(module.kernel_size[axis])
    ]


# By name; a layer without one is left in its factors.
WAYS: dict[str, Way] = {
    "grouped convolution": grouped,
    "patches": unfolded,
    "patches, channels inside": turned,
    "batched product": batched,
}
# Ways of a norm that make no gradients.
NORM_WAYS: dict[str, Way] = {"products of pixels": norms_by_pixels}


NORMS = (nn.BatchNorm2d, nn.LayerNorm)
LAYERS = (nn.Linear, nn.Conv2d, *NORMS)


def normalised(site: Site) -> list[Tensor]:
    """Σ δ x̂ and Σ δ of each row, for a norm layer."""
    module, x, d = site.module, site.x, site.d
    n = len(x)
    if isinstance(module, nn.LayerNorm):
        at = nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
        return [(at * d).reshape(n, -1, x.shape[-1]).sum(1), d.reshape(n, -1, x.shape[-1]).sum(1)]
    # Every channel of every row as a channel: the kernel's sums over rows are then sums over one.
    shape = (1, n * x.shape[1], *x.shape[2:])
    mean, variance = module.running_mean.repeat(n), module.running_var.repeat(n)
    _, *sums = torch.ops.aten.native_batch_norm_backward(
        d.reshape(shape),
        x.reshape(shape),
        None,
        mean,
        variance,
        None,
        None,
        False,
        module.eps,
        [False, True, True],
    )
    return [part.view(n, -1) for part in sums]


def small(sites: list[Site], ways: dict[str, str]) -> Tensor:
    """Gradients of norm layers, and of biases whose weights are not left in factors, side by side [n, p]."""
    out = [sites[0].x.new_zeros(len(sites[0].x), 0)]
    for site in sites:
        if isinstance(site.module, NORMS):
            out += normalised(site)
        elif site.module.bias is not None and ways[site.name] != "factors":
            picture = isinstance(site.module, nn.Conv2d)
            flat = site.d.flatten(2) if picture else site.d.reshape(len(site.d), -1, site.d.shape[-1])
            out.append(flat.sum(2 if picture else 1))
    return torch.cat(out, 1)


class Passes:
    """Forward and backward passes with every parameter frozen, to the outputs of layers."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._found: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Freeze the parameters and hook the layers; on leaving, all is as it was."""
        model = self.workload.model
        first = next(m for m in model.modules() if list(m.parameters(recurse=False)))
        handles = [first.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())]
        for name, module in model.named_modules():
            if isinstance(module, LAYERS):
                handles.append(module.register_forward_hook(partial(self._keep, name)))
        model.requires_grad_(False)
        try:
            yield
        finally:
            model.requires_grad_(True)
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._found[name] = (module, args[0].detach(), output)

    def sites(self, batch: Rows) -> list[Site]:
        """What flows through each layer."""
        loss = peers.plain_forward(self.workload, batch)
        gradients = torch.autograd.grad(loss, [output for _, _, output in self._found.values()])
        found = zip(self._found.items(), gradients, strict=True)
        out = [Site(name, module, x, d) for (name, (module, x, _)), d in found]
        self._found.clear()
        return out


def without_weights(workload: Workload, passes: Passes) -> None:
    """The plain pass without weight gradients."""
    with passes.open():
        for checkpoint in workload.trajectory:
            peers.plain_load(workload.model, checkpoint.path)
            for rows in (workload.queries, workload.train):
                for batch in batches(rows, workload.case.batch):
                    passes.sites(batch)


def program(workload: Workload, passes: Passes, ways: dict[str, str], size: int, verb: str) -> Tensor:
    """The hand-written program: scores [q, n] of these layers' parameters, or each row's squared norms [n]."""
    total: Any = 0
    with passes.open():
        for checkpoint, rate in zip(workload.trajectory, peers.rates(workload), strict=True):
            peers.plain_load(workload.model, checkpoint.path)
            if verb == "self_influence":
                parts = [norms(passes.sites(batch), ways) for batch in batches(workload.train, size)]
            else:
                queries = held(
                    [passes.sites(batch) for batch in batches(workload.queries, workload.case.batch)], ways
                )
                parts = [
                    products(passes.sites(batch), queries, ways) for batch in batches(workload.train, size)
                ]
            total = total + rate * torch.cat(parts, -1)
    return total


@dataclass(frozen=True)
class Held:
    """The queries: gradients [q, p] but laid out along p, or factors [q·t, i] and [q·t, o], by layer; and the small ones."""

    layers: dict[str, tuple[Tensor, ...]]
    small: Tensor


def heavy(sites: list[Site]) -> list[Site]:
    """Linear layers and convolutions, whose gradients have a way each."""
    return [site for site in sites if not isinstance(site.module, NORMS)]


def held(parts: list[list[Site]], ways: dict[str, str]) -> Held:
    """The queries' gradients from their batches."""
    out: dict[str, tuple[Tensor, ...]] = {}
    for same in zip(*map(heavy, parts), strict=True):
        if way := WAYS.get(ways[same[0].name]):
            out[same[0].name] = (torch.cat([way(site.x, site.d, site.module).mT for site in same], 1).mT,)
        else:
            flat = [[leaf.reshape(-1, leaf.shape[-1]) for leaf in (site.x, site.d)] for site in same]
            out[same[0].name] = tuple(torch.cat(leaves) for leaves in zip(*flat, strict=True))
    return Held(out, torch.cat([small(sites, ways) for sites in parts]))


def products(sites: list[Site], queries: Held, ways: dict[str, str]) -> Tensor:
    """Σ over layers of the products with the queries, [q, n]."""
    total = queries.small @ small(sites, ways).mT
    for site in heavy(sites):
        query = queries.layers[site.name]
        if way := WAYS.get(ways[site.name]):
            total += query[0] @ way(site.x, site.d, site.module).mT
        else:
            total += factored(site, *query)
    return total


def factored(site: Site, a: Tensor, b: Tensor) -> Tensor:
    """Σ over the token pairs of (a·a' + 1)(δ·δ'), the 1 where there is a bias, [q, n]."""
    x, d = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (site.x, site.d))
    tokens = len(x) // len(site.x)
    pairs = a @ x.mT
    if site.module.bias is not None:
        pairs += 1
    pairs *= b @ d.mT
    return pairs.view(len(a) // tokens, tokens, -1, tokens).sum((1, 3)) if tokens > 1 else pairs


def norms(sites: list[Site], ways: dict[str, str]) -> Tensor:
    """Σ over layers of each row's squared norm, [n]."""
    total = torch.linalg.vector_norm(small(sites, ways), dim=1).square()
    for site in heavy(sites):
        if way := NORM_WAYS.get(ways[site.name]):
            total += way(site.x, site.d, site.module)
        elif way := WAYS.get(ways[site.name]):
            total += torch.linalg.vector_norm(way(site.x, site.d, site.module), dim=1).square()
        else:
            x, d = (leaf.reshape(len(leaf), -1, leaf.shape[-1]) for leaf in (site.x, site.d))
            pairs = x @ x.mT + (site.module.bias is not None)
            total += pairs.mul_(d @ d.mT).sum((1, 2))
    return total


def gemm(rows: int, queries: int, size: int, time: Timer) -> float:
    """One product of gradients multiplied out, [queries, size] with [rows, size]."""
    one, other = torch.randn(size, queries).mT, torch.randn(rows, size)
    return time(lambda: one @ other.mT)


def costs(site: Site, queries: int, norms: bool, time: Timer) -> tuple[float, float, float, str]:
    """Seconds of a batch: the ordinary weight gradient, the cheapest for each row (or its norm), its products; and how."""
    module, x, d = site.module, site.x, site.d
    if isinstance(module, nn.Conv2d):
        ordinary = time(
            lambda: torch.ops.aten.convolution_backward(
                d, x, module.weight, None, module.stride, module.padding, module.dilation, False, [0, 0], 1,
                [False, True, False],
            )
        )  # fmt: skip
        few = norms and len(x) * x[0, 0].numel() ** 2 <= MOST_PAIRS
        ways = WAYS | NORM_WAYS if few else WAYS
        spent = {name: time(partial(ways[name], x, d, module)) for name in ways if name != "batched product"}
        way = min(spent, key=spent.__getitem__)
        return ordinary, spent[way], gemm(len(x), queries, module.weight.numel(), time), way
    flat = [leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, d)]
    ordinary, tokens = time(lambda: flat[1].mT @ flat[0]), len(flat[0]) // len(x)
    apart = float("inf")
    if len(flat[0]) * queries * tokens <= MOST_PAIRS:
        sides = [torch.randn(queries * tokens, leaf.shape[-1]) for leaf in flat]
        apart = time(partial(factored, site, *sides))
    if tokens == 1:
        return ordinary, 0.0, apart, "factors"
    out, product = time(partial(batched, x, d, module)), gemm(len(x), queries, module.weight.numel(), time)
    return (
        (ordinary, 0.0, apart, "factors")
        if apart < out + product
        else (ordinary, out, product, "batched product")
    )


@dataclass(frozen=True)
class Least:
    """The program ready to run, beside the pass without weight gradients, and what its layers cost one after another."""

    run: Callable[[], Tensor]
    without: Callable[[], None]
    layers: list[Layer]
    size: int


def least(workload: Workload, verb: str, now: Callable[[], float]) -> Least:
    """Choose the cheapest ways for a workload.

    Args:
        workload: Model, rows and checkpoints.
        verb: ``"self_influence"`` for norms; products with the queries otherwise.
        now: One of ``measure.CLOCKS``.

    Returns:
        The program, what it is made of, and the rows of its batches.
    """
    passes, batch = Passes(workload), batches(workload.train, workload.case.batch)[0]
    with passes.open():
        found = passes.sites(batch)
    n, m, checkpoints = len(workload.train[0]), len(workload.queries[0]), len(workload.trajectory)
    size, layers = len(batch[0]), []
    asked = 0 if verb == "self_influence" else m
    for site in heavy(found):
        ordinary, per_row, products, way = costs(site, m, not asked, partial(seconds_of, now=now))
        every, train = (n + asked) / size * checkpoints, n / size * checkpoints
        what = type(site.module).__name__ + " " + "×".join(map(str, site.module.weight.shape))
        multiplied = products * train if asked else 0.0
        layers.append(Layer(site.name, what, ordinary * every, per_row * every, multiplied, way))
    ways = {layer.name: layer.way for layer in layers}
    programs = {size * by: partial(program, workload, passes, ways, size * by, verb) for by in SIZES}
    spent = {rows: seconds_of(run, now, 1) for rows, run in programs.items()}
    best = min(spent, key=spent.__getitem__)
    return Least(programs[best], partial(without_weights, workload, passes), layers, best)
