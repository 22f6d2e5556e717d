"""Every kind of block against gradients multiplied out by einsum or autograd, every pair of kinds in ``dot``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradients.common import normal, seeded
from gradients.kinds import (
    KINDS,
    OUT,
    SIZE,
    WITH_BIAS,
    Made,
    close,
    convolution,
    dense,
    every_kind,
    filters,
    kinds_held,
    outer,
    outer_of_many_uses,
    outer_with_bias,
    rows,
    tiles,
)
from tracin.gradients import blocks
from tracin.gradients.blocks import Block, Dense, Outer, Rows
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.pictures import Convolution, Filters
from tracin.gradients.products import concatenate, dot, held, widened


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


def test_queries_are_held_in_the_cheaper_way() -> None:
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
