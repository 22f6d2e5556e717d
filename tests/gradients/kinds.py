"""Every kind of block, with the same gradients multiplied out without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradients.common import normal, seeded
from tracin.gradients import blocks
from tracin.gradients.blocks import Block, Dense, Outer, Rows, Sum
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.pictures import Convolution, Filters
from tracin.gradients.products import dot, held

Made = tuple[Block, Tensor]  # a block, and the same gradients multiplied out without it

# All kinds hold one parameter of 18 entries: a weight [3, 6], a table of 3 rows of 6, a convolution [3, 2, 3].
OUT, IN, KERNEL, CHANNELS = 3, 6, 3, 2
SIZE = OUT * IN


def outer(n: int, seed: int, t: int = 1) -> Made:
    a, d = normal(n, t, IN, seed=seed), normal(n, t, OUT, seed=seed + 1)
    return Outer(a, d), torch.einsum("nto,nti->noi", d, a).reshape(n, -1)


def outer_of_many_uses(n: int, seed: int) -> Made:
    return outer(n, seed, t=5)


def rows(n: int, seed: int, t: int = 4) -> Made:
    index = torch.randint(0, OUT, (n, t), generator=seeded(seed))  # t > OUT: every example repeats a row
    d = normal(n, t, IN, seed=seed + 1)
    table = torch.einsum("ntv,nti->nvi", F.one_hot(index, OUT).double(), d)
    return Rows(index, d, OUT), table.reshape(n, -1)


def rows_touched_once(n: int, seed: int) -> Made:
    return rows(n, seed, t=1)


def convolution(n: int, seed: int, k: int = 2) -> Made:
    x, d = normal(n, k, CHANNELS, 7, seed=seed), normal(n, k, OUT, 5, seed=seed + 1)
    shape = ConvolutionShape(OUT, CHANNELS, (KERNEL,), (1,), (1,), 1, (0,))
    weight = torch.zeros(OUT, CHANNELS, KERNEL, dtype=torch.float64, requires_grad=True)
    truth = [torch.autograd.grad((F.conv1d(x[at], weight) * d[at]).sum(), weight)[0] for at in range(n)]
    return Convolution(x, d, shape), torch.stack(truth).reshape(n, -1)


def filters(n: int, seed: int) -> Made:
    """Entries (output channel, kernel, input channel), where the weight has the input channel before the kernel."""
    block, truth = convolution(n, seed)
    assert isinstance(block, Convolution)
    values = torch.einsum("noxc->nocx", truth.view(n, OUT, KERNEL, CHANNELS)).reshape(n, -1)
    return Filters(truth, block.shape), values


def dense(n: int, seed: int) -> Made:
    values = normal(n, SIZE, seed=seed)
    return Dense(values), values.clone()


def added(*makers: Callable[[int, int], Made]) -> Callable[[int, int], Made]:
    def make(n: int, seed: int) -> Made:
        made = [maker(n, seed + 10 * at) for at, maker in enumerate(makers)]
        return Sum(tuple(block for block, _ in made)), torch.stack([truth for _, truth in made]).sum(0)

    return make


KINDS: dict[str, Callable[[int, int], Made]] = {
    "outer": outer,
    "outer of many uses": outer_of_many_uses,
    "rows": rows,
    "rows touched once": rows_touched_once,
    "convolution": convolution,
    "dense": dense,
    "filters": filters,
    "sum of outer and rows": added(outer, rows),
    "sum of convolution and dense": added(convolution, dense),
    "sum of filters and convolution": added(filters, convolution),
}


def outer_with_bias(n: int, seed: int, t: int = 3, bias: float = 1.0) -> Made:
    block, weight = outer(n, seed, t)
    assert isinstance(block, Outer)
    return Outer(block.a, block.d, bias), torch.cat([weight, bias * block.d.sum(1)], 1)


def dense_with_bias(n: int, seed: int) -> Made:
    values = normal(n, SIZE + OUT, seed=seed)
    return Dense(values, (SIZE, OUT)), values.clone()


WITH_BIAS: dict[str, Callable[[int, int], Made]] = {
    "outer": outer_with_bias,
    "outer used once": lambda n, seed: outer_with_bias(n, seed, t=1),
    "outer with half a bias": lambda n, seed: outer_with_bias(n, seed, bias=0.5),
    "dense": dense_with_bias,
    "sum": added(outer_with_bias, dense_with_bias),
}

every_kind = pytest.mark.parametrize("make", [*KINDS.values(), *WITH_BIAS.values()], ids=[*KINDS, *WITH_BIAS])
tiles = pytest.mark.parametrize("tile", [blocks.TILE, 40, 1], ids=["one tile", "some tiles", "row by row"])


def close(found: Tensor, truth: Tensor, what: str) -> None:
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    worst, largest = float((found - truth).abs().max()), float(truth.abs().max())
    assert worst <= 1e-12 * max(largest, 1.0), (
        f"{what}: off by {worst:.2e} where the largest is {largest:.2e}"
    )


def kinds_held(make: Callable[[int, int], Made], train_rows: Sequence[int]) -> set[type]:
    found = set()
    for n in train_rows:
        block, truth = make(3, 1)
        kept = held(block, n)
        close(kept.materialise(), truth, f"held for {n} train rows")
        assert isinstance(kept, Dense | Filters | Outer | Rows), (
            f"{type(kept).__name__} is not a kind to hold queries in"
        )
        train, mine = make(4, 30)
        close(dot(train, kept), mine @ truth.mT, f"products with what is held for {n} train rows")
        found.add(type(kept))
    return found
