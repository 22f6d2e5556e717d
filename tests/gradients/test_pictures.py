"""How convolutions' gradients are held: both orders of entries, in tiles, against autograd and every other kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradients.common import normal
from gradients.kinds import (
    CHANNELS,
    KERNEL,
    KINDS,
    OUT,
    SIZE,
    close,
    convolution,
    dense,
    filters,
    kinds_held,
    tiles,
)
from tracin.gradients import blocks, pictures
from tracin.gradients import convolution as convolutions
from tracin.gradients.blocks import Dense, Sum
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.pictures import Convolution, Filters
from tracin.gradients.products import concatenate, dot, held
from tracin.gradients.rules import convolution_block


def comes_first(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    """Whether gradients of convolutions come with the kernel first, whatever their shape."""
    for module in (pictures, convolutions):
        monkeypatch.setattr(module, "kernel_first", lambda *_: yes)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("train", ["convolution", "filters", "dense"])
def test_queries_with_the_kernel_first(train: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against maps that come in the same order, and against larger ones, which do not."""
    (queries, theirs), (block, mine) = filters(3, 2), KINDS[train](5, 1)
    comes_first(monkeypatch, small)
    if isinstance(block, Convolution):
        assert isinstance(block.multiplied_out(), Filters if small else Dense)
    close(dot(block, queries), mine @ theirs.mT, f"{train} · filters")


@pytest.mark.parametrize(
    ("route", "first"),
    [("kernel_first_gradient", True), ("weight_gradient", False)],
    ids=["kernel first", "channels first"],
)
def test_patches_are_made_in_tiles(route: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of many pixels are larger than the weight; float64 goes by them in either order."""
    (block, truth), seen = convolution(5, 1), []
    assert isinstance(block, Convolution)
    patches = block.d.shape[3] * KERNEL * CHANNELS
    comes_first(monkeypatch, first)
    monkeypatch.setattr(blocks, "TILE", 2 * patches + 1)
    taken = getattr(pictures, route)

    def noted(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
        seen.append(len(x))
        return taken(x, d, shape)

    monkeypatch.setattr(pictures, route, noted)
    close(block.materialise(), truth, "in tiles")
    assert seen == [2] * 5, "ten pictures, two at a time"


def test_a_grouped_convolution_makes_no_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, d = (normal(5, 1, 4, 20, 20, seed=seed, dtype=torch.float32) for seed in (1, 2))
    block = Convolution(x, d, ConvolutionShape(4, 4, (3, 3), (1, 1), (1, 1), 1, (1, 1)))
    seen: list[int] = []
    taken = pictures.weight_gradient

    def noted(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
        seen.append(len(x))
        return taken(x, d, shape)

    monkeypatch.setattr(blocks, "TILE", len(x))
    monkeypatch.setattr(pictures, "weight_gradient", noted)
    block.materialise()
    assert seen == [5]


@pytest.mark.parametrize(
    "queries", ["dense", "rows", "convolution", "filters", "sum of convolution and dense"]
)
def test_a_convolution_in_groups(queries: str) -> None:
    """[2, 3, 3] in two groups has 18 entries too; its patches would be of another width."""
    x, d = normal(4, 1, 6, 5, seed=1), normal(4, 1, 2, 3, seed=2)
    block = Convolution(x, d, ConvolutionShape(2, 6, (3,), (1,), (1,), 2, (0,)))
    weight = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    truth = torch.stack(
        [torch.autograd.grad((F.conv1d(x[at], weight, groups=2) * d[at]).sum(), weight)[0] for at in range(4)]
    ).reshape(4, -1)
    close(block.materialise(), truth, "materialise")
    other, expected = KINDS[queries](3, 5)
    close(dot(block, other), truth @ expected.mT, f"groups · {queries}")
    close(dot(other, block), expected @ truth.mT, f"{queries} · groups")
    assert isinstance(held(block, 1), Dense), "patches of groups are not the factors of the weight"


@pytest.mark.parametrize(
    ("channels", "out", "side", "stride", "dilation"), [(12, 10, 2, 1, 1), (12, 10, 5, 2, 2), (2, 3, 6, 1, 1)]
)
@pytest.mark.parametrize("small", [True, False])
@tiles
def test_the_norm_of_a_convolution_by_each_route(
    channels: int,
    out: int,
    side: int,
    stride: int,
    dilation: int,
    small: bool,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few pixels of many channels (by the Gram matrices), many pixels of few (multiplied out), in both orders."""
    monkeypatch.setattr(blocks, "TILE", tile)
    comes_first(monkeypatch, small)
    layer = nn.Conv2d(channels, out, 3, stride, padding=dilation, dilation=dilation, bias=False).double()
    x = normal(4, channels, side, side, seed=1)
    output = layer(x)
    d = normal(*output.shape, seed=2)
    block = convolution_block(layer, x[:, None], d[:, None])
    truth = torch.stack(
        [torch.autograd.grad(layer(x[row : row + 1]), layer.weight, d[row : row + 1])[0] for row in range(4)]
    )
    close(block.squared_norm(), truth.flatten(1).square().sum(1), "squared_norm")
    assert isinstance(block.multiplied_out(), Filters if small else Dense)
    close(block.total(), truth.sum(0).flatten(), "total")


@pytest.mark.parametrize(("channels", "kernel"), [(1, 6), (6, 1)], ids=["one channel", "pointwise"])
def test_a_sum_leaves_filters_as_they_were(channels: int, kernel: int) -> None:
    """Where both orders of entries are the same, what is multiplied out may be the filters' own memory."""
    values, more = normal(3, SIZE, seed=1), normal(3, SIZE, seed=2)
    block = Filters(values, ConvolutionShape(OUT, channels, (kernel,), (1,), (1,), 1, (0,)))
    total = Sum((Dense(more), block))
    for _ in range(2):
        close(total.materialise(), values + more, "the sum")
    close(block.values, normal(3, SIZE, seed=1), "the filters after their use")


def test_filters_beside_dense() -> None:
    (first, a), (other, b) = filters(3, 1), dense(2, 2)
    assert isinstance(concatenate([first, filters(1, 3)[0]]), Filters)
    for parts, truth in (((first, other), (a, b)), ((other, first), (b, a))):
        close(concatenate(parts).materialise(), torch.cat(truth), "filters beside dense")


def test_queries_are_held_in_the_order_that_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    comes_first(monkeypatch, True)
    assert kinds_held(convolution, (1, 10, 100_000)) == {Filters}
