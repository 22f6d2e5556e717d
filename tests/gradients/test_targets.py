"""Sums by group, multiplied out or in factors, and products with them, against gradients multiplied out by einsum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradients.common import normal
from tracin.gradients import blocks, pictures
from tracin.gradients.blocks import Dense, Outer, Rows, Sum
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.pictures import Convolution, Filters
from tracin.gradients.sums import Members
from tracin.gradients.targets import Factors, GroupSums, dot_targets

CPU = torch.device("cpu")
LIKE = torch.empty(0, dtype=torch.float64)


def outer(n: int, t: int, i: int, o: int, seed: int, bias: float | None = 1.0) -> tuple[Outer, Tensor]:
    """A block, and the same gradients multiplied out."""
    a, d = normal(n, t, i, seed=seed), normal(n, t, o, seed=seed + 1)
    weight = torch.einsum("nto,nti->noi", d, a).reshape(n, -1)
    whole = weight if bias is None else torch.cat([weight, bias * d.sum(1)], 1)
    return Outer(a, d, bias), whole


def sums_of(gradients: Tensor, group: Tensor, g: int) -> Tensor:
    return torch.stack([gradients[group == at].sum(0) for at in range(g)])


def added(sizes: list[int], group: Tensor, shape: tuple[int, int, int], g: int) -> tuple[GroupSums, Tensor]:
    """Batches of these sizes added up, and their gradients multiplied out."""
    t, i, o = shape
    sums, out, start = GroupSums(g, int((group >= 0).sum()), 2, LIKE), [], 0
    for at, size in enumerate(sizes):
        block, whole = outer(size, t + at % 2, i, o, seed=10 * at)  # batches of other lengths are padded
        mine = group[start : start + size]
        if bool((mine >= 0).any()):
            assert torch.isfinite(sums.add(block, Members.of(mine, CPU)))
        out.append(whole)
        start += size
    return sums, torch.cat(out)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    g=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_either_way_the_products_are_those_of_the_sums(
    sizes: list[int], shape: tuple[int, int, int], g: int, seed: int
) -> None:
    group = torch.randint(-1, g, (sum(sizes),), generator=torch.Generator().manual_seed(seed))
    group[0] = 0
    sums, gradients = added(sizes, group, shape, g)
    target, truth = sums.target(), sums_of(gradients, group, g)
    train, whole = outer(3, *shape, seed=500)
    rates, weights = torch.tensor([0.5, 0.25]), 1.0 / torch.arange(1, g + 1)
    split = [shape[1] * shape[2], shape[2]]
    for asked, found in (
        (truth, target),
        (truth * rates.repeat_interleave(torch.tensor(split)), target.scaled(rates.tolist())),
        (truth * weights[:, None], target.weighted(weights)),
    ):
        torch.testing.assert_close(dot_targets(train, found), whole @ asked.mT, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dot_targets(Dense(whole), found), whole @ asked.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("members", "kind"), [(4, Factors), (400, Dense)])
def test_few_members_stay_in_factors(members: int, kind: type) -> None:
    sums, _ = added([4], torch.tensor([0, 1, 1, 0]), (1, 60, 50), 2)
    assert isinstance(sums.target(), Factors)
    many = GroupSums(2, members, 2, LIKE)
    many.add(outer(4, 1, 60, 50, seed=0)[0], Members.of(torch.tensor([0, 1, 1, 0]), CPU))
    assert isinstance(many.target(), kind)


def test_a_batch_of_another_kind_has_all_multiplied_out() -> None:
    group = torch.tensor([0, 1, 1, 0])
    sums, gradients = added([2, 2], group, (1, 60, 50), 2)
    assert isinstance(sums.target(), Factors)
    extra = normal(3, gradients.shape[1], seed=7)
    sums.add(Dense(extra, (3000, 50)), Members.of(torch.tensor([1, 1, 0]), CPU))
    truth = sums_of(torch.cat([gradients, extra]), torch.cat([group, torch.tensor([1, 1, 0])]), 2)
    target = sums.target()
    assert isinstance(target, Dense)
    torch.testing.assert_close(target.values, truth, rtol=1e-12, atol=1e-12)


def test_more_uses_on_the_train_side_and_a_shared_weight() -> None:
    block, whole = outer(4, 1, 60, 50, seed=0, bias=None)
    group = torch.tensor([0, 1, 1, 0])
    sums = GroupSums(2, 4, 1, LIKE)
    sums.add(block, Members.of(group, CPU))
    target, truth = sums.target(), sums_of(whole, group, 2)
    assert isinstance(target, Factors)
    often, multiplied = outer(3, 200, 60, 50, seed=5, bias=None)
    torch.testing.assert_close(dot_targets(often, target), multiplied @ truth.mT, rtol=1e-10, atol=1e-9)
    table = Rows(torch.tensor([[1, 4, 1]]), normal(1, 3, 60, seed=8), 50)
    both = Sum((outer(1, 1, 60, 50, seed=9, bias=None)[0], table))
    torch.testing.assert_close(
        dot_targets(both, target), both.materialise() @ truth.mT, rtol=1e-10, atol=1e-9
    )


@pytest.mark.parametrize("first", [True, False], ids=["kernel first", "channels first"])
@pytest.mark.parametrize("multiplied_out", [False, True])
@pytest.mark.parametrize("group", [[2, 0, -1, 2, 1], [2, 0, 1, 2, 0]], ids=["rows of none", "all"])
def test_sums_of_convolutions(
    first: bool, multiplied_out: bool, group: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that come in any order, over several tiles; products with more and with fewer rows than groups."""
    monkeypatch.setattr(pictures, "kernel_first", lambda *_: first)
    x, d = normal(5, 1, 2, 7, seed=1), normal(5, 1, 3, 5, seed=2)
    block = Convolution(x, d, ConvolutionShape(3, 2, (3,), (1,), (1,), 1, (0,)))
    whole = torch.einsum("nop,ncpk->nock", d[:, 0], x[:, 0].unfold(2, 3, 1)).reshape(5, -1)
    sums = GroupSums(3, 4, 1, LIKE)
    out = block.multiplied_out()
    assert isinstance(out, Filters if first else Dense)
    with monkeypatch.context() as small:
        small.setattr(blocks, "TILE", 2 * block.size)
        sums.add(out if multiplied_out else block, Members.of(torch.tensor(group), CPU))
    target, truth = sums.target(), sums_of(whole, torch.tensor(group), 3)
    assert isinstance(target, Dense)
    torch.testing.assert_close(target.values, truth, rtol=1e-12, atol=1e-12)
    for train in (block, out, block.rows(0, 2), out.rows(0, 2)):
        products = whole[: len(train)] @ truth.mT
        torch.testing.assert_close(dot_targets(train, target), products, rtol=1e-10, atol=1e-10)


def test_views_do_not_keep_what_they_look_at_alive() -> None:
    sequence = normal(4, 100, 60, seed=0)
    sums = GroupSums(1, 4, 1, LIKE)
    sums.add(Outer(sequence[:, :1], normal(4, 1, 50, seed=1)), Members.of(torch.zeros(4).long(), CPU))
    target = sums.target()
    assert isinstance(target, Factors)
    assert isinstance(target.members, Outer)
    assert target.members.a.untyped_storage().nbytes() == 4 * 60 * 8


@pytest.mark.parametrize(("a", "d", "finite"), [(1e25, 1e25, False), (1e38, 1e-20, True)])
def test_an_overflow_is_that_of_a_gradient(a: float, d: float, finite: bool) -> None:
    block = Outer(torch.full((2, 1, 60), a), torch.full((2, 1, 50), d))
    seen = GroupSums(1, 2, 1, torch.empty(0)).add(block, Members.of(torch.zeros(2).long(), CPU))
    assert bool(torch.isfinite(seen)) == finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told(bad: float) -> None:
    block, _ = outer(2, 1, 60, 50, seed=0)
    block.d[1, 0, 3] = bad
    assert not torch.isfinite(GroupSums(1, 2, 2, LIKE).add(block, Members.of(torch.zeros(2).long(), CPU)))
