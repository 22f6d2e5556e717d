"""The k strongest rows, merged tile by tile: equal to sorting everything, whatever the tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tracin
from tracin.errors import OptionError
from tracin.scoring import top_k as module
from tracin.scoring.top_k import Lists, check_k, merge

N, M, C = 23, 5, 3


def sorted_fully(values: Tensor, k: int) -> Lists:
    """By descending value and, among equals, ascending id: one stable sort of everything."""
    order = torch.sort(values, dim=1, descending=True, stable=True).indices[:, :k]
    return Lists(values.gather(1, order), order)


@given(data=st.data(), q=st.integers(1, 3), n=st.integers(1, 20), few=st.integers(1, 6))
def test_tiles_merge_to_a_full_sort(data: st.DataObject, q: int, n: int, few: int) -> None:
    """Few different values: most of the order is decided by ties."""
    numbers = data.draw(st.lists(st.integers(0, few), min_size=q * n, max_size=q * n))
    values = torch.tensor(numbers, dtype=torch.float64).view(q, n)
    values[values == 0] = -torch.inf
    k = data.draw(st.integers(1, n))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=4))) if n > 1 else []
    lists = None
    for start, stop in zip([0, *cuts], [*cuts, n], strict=True):
        lists = merge(lists, values[:, start:stop], torch.arange(start, stop), k)
    truth = sorted_fully(values, k)
    assert lists is not None
    assert torch.equal(lists.values, truth.values), f"tiles {cuts}: values {lists.values}, not {truth.values}"
    assert torch.equal(lists.ids, truth.ids), f"tiles {cuts}: ids {lists.ids}, not {truth.ids}"


def test_equal_values_go_to_the_lower_id_across_tiles() -> None:
    first = merge(None, torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([0, 1, 2]), 3)
    second = merge(first, torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([3, 4, 5]), 3)
    assert second.ids.tolist() == [[5, 1, 2]]


@pytest.mark.parametrize("k", [0, -1, 6, True])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(OptionError, match="from 1 to 5, the number of train rows"):
        check_k(k, 5)


def test_k_in_range() -> None:
    for k in (1, 5):
        check_k(k, 5)


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(
        0, 3, (n,), generator=generator
    )


def method(**options: Any) -> tracin.TracInCP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(C + 1)]
    trajectory = tracin.Trajectory(
        [
            tracin.Checkpoint(m.state_dict(), learning_rate=r)
            for m, r in zip(models, (0.3, 0.07, 0.2), strict=False)
        ]
    )
    task = tracin.Task(models[-1], tracin.losses.cross_entropy)
    return tracin.TracInCP(
        task, trajectory, **{"batch_size": 4, "device": "cpu", "progress": False, **options}
    )


def check_lists(found: tracin.TopK, values: Tensor, k: int, allowed: Tensor | None = None) -> None:
    allowed = torch.ones_like(values, dtype=torch.bool) if allowed is None else allowed
    for sign, ranking in ((1, found.proponents), (-1, found.opponents)):
        truth = sorted_fully((sign * values).masked_fill(~allowed, -torch.inf), k)
        torch.testing.assert_close(ranking.values, sign * truth.values, rtol=1e-12, atol=1e-12)
        assert torch.equal(ranking.ids, truth.ids), f"sign {sign}: {ranking.ids} for {truth.ids}"
        torch.testing.assert_close(ranking.values, values.gather(1, ranking.ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, N])
@pytest.mark.parametrize("memory", ["2GiB", "5kB"])
def test_lists_are_exact_over_the_sum_of_checkpoints(k: int, memory: str) -> None:
    """Row lists are merged once per tile, after the last checkpoint: a list per checkpoint would lose rows."""
    train, queries = rows(N, 1), rows(M, 2)
    values = method().influence(train, queries).values
    check_lists(method(memory=memory).top_k(train, queries, k), values, k)


def test_equal_rows_keep_the_lower_id() -> None:
    x, y = rows(6, 1)
    train = (x.repeat(4, 1), y.repeat(4))
    found = method().top_k(train, rows(M, 2), k=8)
    for ranking in (found.proponents, found.opponents):
        assert torch.equal(ranking.ids[:, :4], ranking.ids[:, :1] + torch.tensor([0, 6, 12, 18]))


@pytest.mark.parametrize("within", ["label", 0, 2])
@pytest.mark.parametrize("memory", ["2GiB", "5kB"])
def test_within_a_class(within: Any, memory: str) -> None:
    train, queries = rows(N, 1), rows(M, 2)
    values = method().influence(train, queries).values
    wanted = queries[1] if within == "label" else torch.full((M,), within)
    allowed = wanted[:, None] == train[1][None]
    k = int(allowed.sum(1).min())
    found = method(memory=memory).top_k(train, queries, k, within=within)
    check_lists(found, values, k, allowed)
    assert found.provenance["within"] == within


def test_a_class_with_fewer_rows_than_k() -> None:
    train = rows(N, 1)
    count = int((train[1] == 2).sum())
    with pytest.raises(OptionError, match=f"k is {count + 1}, but only {count} train rows have class 2"):
        method().top_k(train, rows(M, 2), count + 1, within=2)


def test_within_something_else() -> None:
    with pytest.raises(OptionError, match="within is True"):
        method().top_k(rows(N, 1), rows(M, 2), 2, within=True)


def test_within_needs_labels() -> None:
    model = nn.Linear(4, 3).double()
    task = tracin.Task(model, lambda m, batch: m(batch[0]).square().sum(1))
    trajectory = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    plain = tracin.TracInCP(task, trajectory, device="cpu", progress=False)
    with pytest.raises(OptionError, match="outputs"):
        plain.top_k(rows(N, 1), rows(M, 2), 2, within="label")


@pytest.mark.parametrize("memory", ["2GiB", "5kB"])
def test_tiles_of_train_rows_follow_the_memory(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held of the scores is one tile, never the q × n matrix."""
    seen: list[tuple[int, ...]] = []
    sound = module.merge

    def noted(lists: Lists | None, values: Tensor, ids: Tensor, k: int) -> Lists:
        seen.append(tuple(values.shape))
        return sound(lists, values, ids, k)

    monkeypatch.setattr(module, "merge", noted)
    method(memory=memory).top_k(rows(N, 1), rows(M, 2), k=3)
    if memory == "2GiB":
        assert set(seen) == {(M, N)}
    else:
        assert max(width for _, width in seen) <= 8, f"tiles of a batch or two were expected: {seen}"
        assert sum(height * width for height, width in seen) == 2 * M * N, (
            "each score is merged into both lists once"
        )
