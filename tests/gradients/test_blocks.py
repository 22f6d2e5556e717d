"""Every kind of block against gradients multiplied out by einsum or autograd, every pair of kinds in ``dot``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradients.common import normal, seeded
from tracin.gradients import blocks, pictures
from tracin.gradients import convolution as convolutions
from tracin.gradients.blocks import Block, Dense, Outer, Rows, Sum
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.pictures import Convolution, Filters
from tracin.gradients.products import concatenate, dot, held, widened
from tracin.gradients.rules import convolution_block

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


def comes_first(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    """Whether gradients of convolutions come with the kernel first, whatever their shape."""
    for module in (pictures, convolutions):
        monkeypatch.setattr(module, "kernel_first", lambda *_: yes)


def close(found: Tensor, truth: Tensor, what: str) -> None:
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    worst, largest = float((found - truth).abs().max()), float(truth.abs().max())
    assert worst <= 1e-12 * max(largest, 1.0), (
        f"{what}: off by {worst:.2e} where the largest is {largest:.2e}"
    )


@tiles
@every_kind
def test_every_kind_alone(
    make: Callable[[int, int], Made], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "TILE", tile)
    block, truth = make(5, 1)
    assert isinstance(block, Block)
    assert (len(block), block.size) == truth.shape
    assert block.nbytes > 0
    close(block.materialise(), truth, "materialise")
    close(torch.cat(block.pieces(), 1), truth, "pieces")
    assert all(piece.is_contiguous() for piece in block.pieces())
    close(block.total(), truth.sum(0), "total")
    close(block.squared_norm(), truth.square().sum(1), "squared_norm")
    weights = torch.tensor([0.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    close(block.weighted(weights).materialise(), truth * weights[:, None], "weighted")
    close(block.weighted(weights).total(), weights @ truth, "the total of weighted")
    for start, stop in ((0, 5), (1, 3), (4, 5)):
        close(block.rows(start, stop).materialise(), truth[start:stop], f"rows {start}:{stop}")
        assert len(block.rows(start, stop)) == stop - start
    close(make(5, 1)[0].materialise(), block.materialise(), "the block after its use")


@tiles
@pytest.mark.parametrize("queries", KINDS)
@pytest.mark.parametrize("train", KINDS)
def test_every_pair_of_kinds(train: str, queries: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", tile)
    (a, mine), (b, other) = KINDS[train](5, 1), KINDS[queries](3, 2)
    close(dot(a, b), mine @ other.mT, f"{train} · {queries}")


@tiles
@pytest.mark.parametrize("queries", WITH_BIAS)
@pytest.mark.parametrize("train", WITH_BIAS)
def test_every_pair_with_a_bias(train: str, queries: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TILE", tile)
    (a, mine), (b, other) = WITH_BIAS[train](5, 1), WITH_BIAS[queries](3, 2)
    close(dot(a, b), mine @ other.mT, f"{train} · {queries}")


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


@pytest.mark.parametrize("rates", [(0.3, 0.07), (0.3, 0.3), (0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize("make", WITH_BIAS.values(), ids=list(WITH_BIAS))
def test_rates_of_weight_and_bias(make: Callable[[int, int], Made], rates: tuple[float, float]) -> None:
    (queries, theirs), (train, mine) = make(3, 1), outer_with_bias(4, 7)
    per_entry = torch.tensor([rates[0]] * SIZE + [rates[1]] * OUT, dtype=torch.float64)
    scaled = queries.scaled(rates)
    close(scaled.materialise(), theirs * per_entry, "scaled")
    close(scaled.squared_norm(), (theirs * per_entry).square().sum(1), "the norm of scaled")
    close(dot(train, scaled), (mine * per_entry) @ theirs.mT, "products with scaled queries")
    close(queries.materialise(), theirs, "the queries after being scaled")


@pytest.mark.parametrize("make", KINDS.values(), ids=list(KINDS))
def test_one_rate(make: Callable[[int, int], Made]) -> None:
    block, truth = make(3, 1)
    close(block.scaled((0.3,)).materialise(), 0.3 * truth, "scaled")


@pytest.mark.parametrize(("t", "i", "o"), [(1, 4, 3), (2, 40, 30), (20, 2, 3)])
@pytest.mark.parametrize("bias", [None, 1.0, 0.25])
@tiles
def test_the_norm_by_each_route(
    t: int, i: int, o: int, bias: float | None, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """t = 1, few uses of a wide layer (by the Gram matrices), many uses of a narrow one (multiplied out)."""
    monkeypatch.setattr(blocks, "TILE", tile)
    block = Outer(normal(4, t, i, seed=1), normal(4, t, o, seed=2), bias)
    close(block.squared_norm(), block.materialise().square().sum(1), f"t={t}, i={i}, o={o}")


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


def test_the_norm_of_uses_that_cancel_is_not_negative() -> None:
    a, d = normal(3, 1, 30, seed=1), normal(3, 1, 30, seed=2)
    for block in (
        Outer(torch.cat([a, a], 1), torch.cat([d, -d], 1)),
        Rows(torch.zeros(3, 2, dtype=torch.int64), torch.cat([d, -d], 1), 4),
    ):
        assert (block.squared_norm() >= 0).all(), (
            f"{type(block).__name__}: a negative squared norm has no root"
        )


@settings(max_examples=40)
@given(
    n=st.integers(1, 5), m=st.integers(1, 5), t=st.integers(1, 6), s=st.integers(1, 6), i=st.integers(1, 5),
    o=st.integers(1, 5), biases=st.tuples(st.sampled_from([0.5, 1.0]), st.sampled_from([0.5, 1.0])) | st.none(),
    tile=st.sampled_from([1, 7, 50, 1 << 24]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_outer_of_any_shape(
    n: int, m: int, t: int, s: int, i: int, o: int, biases: tuple[float, float] | None, tile: int, seed: int
) -> None:
    both: list[Outer] = []
    truths = []
    for at, (size, uses) in enumerate(((n, t), (m, s))):
        a, d = normal(size, uses, i, seed=seed + at), normal(size, uses, o, seed=seed + 10 + at)
        bias = None if biases is None else biases[at]
        weight = torch.einsum("nto,nti->noi", d, a).reshape(size, -1)
        both.append(Outer(a, d, bias))
        truths.append(weight if bias is None else torch.cat([weight, bias * d.sum(1)], 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", tile)
        expected = truths[0] @ truths[1].mT
        close(dot(both[0], both[1]), expected, "factored")
        close(dot(both[0], Dense(truths[1])), expected, "multiplied out")
        close(both[0].squared_norm(), truths[0].square().sum(1), "squared_norm")
        close(both[0].total(), truths[0].sum(0), "total")


@settings(max_examples=40)
@given(
    n=st.integers(1, 5), m=st.integers(1, 5), t=st.integers(1, 6), s=st.integers(1, 6), v=st.integers(1, 6),
    o=st.integers(1, 4), tile=st.sampled_from([1, 7, 50, 1 << 24]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_rows_of_any_shape(n: int, m: int, t: int, s: int, v: int, o: int, tile: int, seed: int) -> None:
    both, truths = [], []
    for at, (size, uses) in enumerate(((n, t), (m, s))):
        index = torch.randint(0, v, (size, uses), generator=seeded(seed + at))
        d = normal(size, uses, o, seed=seed + 10 + at)
        both.append(Rows(index, d, v))
        truths.append(torch.einsum("ntv,nti->nvi", F.one_hot(index, v).double(), d).reshape(size, -1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", tile)
        expected = truths[0] @ truths[1].mT
        close(dot(both[0], both[1]), expected, "token by token")
        close(dot(both[0], Dense(truths[1])), expected, "gathered")
        close(dot(Dense(truths[0]), both[1]), expected, "multiplied out")
        close(both[0].squared_norm(), truths[0].square().sum(1), "squared_norm")
        close(both[0].total(), truths[0].sum(0), "total")


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


def test_queries_are_held_in_the_cheaper_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def wide(n: int, seed: int) -> Made:
        a, d = normal(n, 1, 40, seed=seed), normal(n, 1, 40, seed=seed + 1)
        return Outer(a, d), torch.einsum("nto,nti->noi", d, a).reshape(n, -1)

    def picture(n: int, seed: int) -> Made:
        x, d = normal(n, 1, 20, 3, seed=seed), normal(n, 1, 20, 1, seed=seed + 1)
        block = Convolution(x, d, ConvolutionShape(20, 20, (3,), (1,), (1,), 1, (0,)))
        return block, torch.einsum("no,ncx->nocx", d[:, 0, :, 0], x[:, 0]).reshape(n, -1)

    def long_table(n: int, seed: int) -> Made:
        index, d = torch.randint(0, 50, (n, 2), generator=seeded(seed)), normal(n, 2, 3, seed=seed)
        return Rows(index, d, 50), torch.einsum("ntv,nti->nvi", F.one_hot(index, 50).double(), d).reshape(
            n, -1
        )

    runs = (1, 10, 100_000)
    assert kinds_held(wide, runs) == {Outer}, "one use of a wide layer: two small products"
    assert kinds_held(outer_of_many_uses, runs) == {Dense}, "five uses of 3 × 6 entries: multiplied out"
    assert kinds_held(picture, runs) == {Outer}, "one pixel of many channels: two small products"
    assert kinds_held(convolution, runs) == {Dense}, "many pixels of few channels: multiplied out"
    comes_first(monkeypatch, True)
    assert kinds_held(convolution, runs) == {Filters}, "and with the kernel first where that is cheaper"
    assert kinds_held(filters, runs) == {Filters}, "as they lie"
    assert kinds_held(long_table, runs) == {Rows}, "two words of fifty"
    assert kinds_held(rows, runs) == {Dense}, "four words of three"
    assert kinds_held(dense, runs) == {Dense}
    assert kinds_held(KINDS["sum of outer and rows"], runs) == {Dense}


def test_train_examples_of_another_length_count() -> None:
    block = outer(50, 1)[0]
    assert isinstance(held(block, 1000), Outer)
    assert isinstance(held(block, 1000, train_uses=100), Dense), (
        "100 uses a row: factored costs 100 times more"
    )


@pytest.mark.parametrize("make", [*WITH_BIAS.values(), filters], ids=[*WITH_BIAS, "filters"])
def test_batches_side_by_side(make: Callable[[int, int], Made]) -> None:
    made = [make(n, seed) for n, seed in ((3, 1), (1, 2), (2, 3))]
    joined = concatenate([block for block, _ in made])
    close(joined.materialise(), torch.cat([truth for _, truth in made]), "concatenate")


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


@pytest.mark.parametrize("make", [filters, dense], ids=["filters", "dense"])
def test_in_float64(make: Callable[[int, int], Made]) -> None:
    block, truth = make(3, 1)
    assert isinstance(block, Dense | Filters)
    narrow = widened(replace(block, values=block.values.float()))
    assert isinstance(narrow, type(block))
    assert narrow.values.dtype == torch.float64
    close(narrow.materialise(), truth.float().double(), "widened")


def test_batches_of_different_lengths_are_padded_with_nothing() -> None:
    made = [outer_with_bias(n, seed, t) for n, seed, t in ((3, 1, 2), (2, 2, 5), (1, 3, 1))]
    joined = concatenate([block for block, _ in made])
    assert isinstance(joined, Outer), "factors stay factors"
    assert joined.uses == 5
    truth = torch.cat([truth for _, truth in made])
    close(joined.materialise(), truth, "padded factors")
    close(joined.squared_norm(), truth.square().sum(1), "the norm: a padded use adds no bias")
    train, mine = outer_with_bias(4, 9)
    close(dot(train, joined), mine @ truth.mT, "products: a padded use adds no bias")
    tables = [rows(n, seed, t) for n, seed, t in ((3, 1, 2), (2, 2, 5))]
    words = concatenate([block for block, _ in tables])
    assert isinstance(words, Rows)
    close(words.materialise(), torch.cat([truth for _, truth in tables]), "padded words")
    train_words, mine = rows(4, 9)
    close(dot(train_words, words), mine @ torch.cat([t for _, t in tables]).mT, "a padded use is no word 0")


@pytest.mark.parametrize("second", ["dense", "outer with half a bias", "sum"])
def test_batches_of_different_kinds(second: str) -> None:
    (first, a), (other, b) = outer_with_bias(3, 1), WITH_BIAS[second](2, 2)
    for parts, truth in (((first, other), (a, b)), ((other, first), (b, a))):
        close(concatenate(parts).materialise(), torch.cat(truth), f"outer beside {second}")


@pytest.mark.parametrize(
    ("n", "m", "p", "cut"),
    [
        (33, 16, 32_768, True),
        (16, 33, 33_003, True),
        (65, 65, 32_768, False),
        (31, 16, 32_768, False),
        (33, 16, 32_767, False),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_long_sums_are_cut_into_pieces_for_threads(
    n: int, m: int, p: int, cut: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[torch.Size] = []
    whole = torch.bmm

    def counted(left: Tensor, right: Tensor) -> Tensor:
        pieces.append(left.shape)
        return whole(left, right)

    train, queries = normal(n, p, seed=1), normal(p, m, seed=2).mT
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(torch, "bmm", counted)
        found = dot(Dense(train), Dense(queries))
    finally:
        torch.set_num_threads(before)
    assert bool(pieces) == (cut and threads > 1)
    close(found, torch.einsum("np,mp->nm", train, queries), "products")
