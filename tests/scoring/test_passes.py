"""Passes over the data: the same numbers whatever the tiles, as many passes as told, and data held to its word."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import oracle
import tracin
from scoring.common import RATES, M, N, method, net, rows, run, task, trajectory
from tracin.errors import DataError, NotFiniteError, OptionError
from tracin.gradients.blocks import Dense, Outer
from tracin.progress import Progress
from tracin.scoring import order, passes
from tracin.scoring.passes import hold_queries, influence, self_influence


def gradients() -> list[Any]:
    """Per-row gradients of train and query rows at both checkpoints, by brute force."""
    states = [checkpoint.load() for checkpoint in trajectory()]
    loss = tracin.losses.cross_entropy
    return [oracle.trajectory_gradients(net(0), loss, side, states) for side in (rows(N, 1), rows(M, 2))]


@pytest.mark.usefixtures("smallest_tiles")
@pytest.mark.parametrize("normalize", [False, True])
def test_one_batch_of_queries_at_a_time_gives_the_same_numbers(normalize: bool) -> None:
    test_tiles_of_queries_give_the_same_numbers("2GiB", normalize)


@pytest.mark.parametrize("memory", ["2GiB", "4kB"])
@pytest.mark.parametrize("normalize", [False, True])
def test_tiles_of_queries_give_the_same_numbers(memory: str, normalize: bool) -> None:
    found = method(memory=memory, batch_size=2, normalize=normalize).influence(rows(N, 1), rows(M, 2))
    judge = oracle.normalized_scores if normalize else oracle.scores
    oracle.assert_close(found.values, judge(*gradients(), RATES), 1e-12, f"scores under {memory}")


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_self_influence(batch_size: int) -> None:
    found = method(batch_size=batch_size).self_influence(rows(N, 1))
    oracle.assert_close(found.values, oracle.self_influence(gradients()[0], RATES), 1e-12, "self-influence")
    assert (found.values > 0).all()


def test_self_influence_under_rates_per_parameter() -> None:
    """The rate enters once, also where a weight and its bias share a block: √w on each side."""
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    rates = [
        dict(zip(names, values, strict=True)) for values in ((0.3, 0.05, 0.0, 0.2), (0.01, 0.4, 0.2, 0.0))
    ]
    chosen = tracin.TracInCP(task(), trajectory(rates=rates), batch_size=4, device="cpu", progress=False)
    own, scores = chosen.self_influence(rows(N, 1)).values, chosen.influence(rows(N, 1), rows(M, 2)).values
    oracle.assert_close(own, oracle.self_influence(gradients()[0], rates), 1e-12, "self-influence")
    oracle.assert_close(scores, oracle.scores(*gradients(), rates), 1e-12, "scores")


def test_normalized_self_influence_is_refused() -> None:
    with (
        pytest.raises(OptionError, match="same number for every row"),
        run(queries=False, normalize=True) as found,
    ):
        self_influence(found)


def test_normalize_takes_one_rate_per_checkpoint() -> None:
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    several = trajectory(rates=[dict(zip(names, (0.1, 0.1, 0.1, 0.2), strict=True)), 0.1])
    chosen = tracin.TracInCP(task(), several, normalize=True, device="cpu", progress=False)
    with pytest.raises(
        OptionError, match="one learning rate per checkpoint; checkpoint at step 0 has several"
    ):
        chosen.influence(rows(N, 1), rows(M, 2))


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a dataset makes are made anew for each checkpoint, as where memory keeps neither them nor parameters."""
    monkeypatch.setattr(order, "order_of", lambda **_: order.Order("checkpoints", 0, 1))


class Counted(Dataset):
    """Rows that count how often each is read in a batch of its own place.

    Tests of it are ``unchecked``: where ``random`` is drawn from, what was read ahead is read again.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.x, self.y = rows(n, seed)
        self.batches: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, chosen: list[int]) -> list[tuple[Tensor, Tensor]]:
        self.batches.append(list(chosen))
        return [(self.x[at], self.y[at]) for at in chosen]

    def passes(self) -> float:
        """Batches of four consecutive rows (or the short last one) per batch of a pass."""
        whole = [tuple(range(start, min(start + 4, len(self)))) for start in range(0, len(self), 4)]
        counts = Counter(tuple(batch) for batch in self.batches)
        found = {counts[batch] for batch in whole}
        assert len(found) == 1, f"some batches were read more often than others: {counts}"
        return found.pop()


@pytest.mark.usefixtures("unchecked")
def test_rows_that_fit_in_memory_are_made_once() -> None:
    train, queries = Counted(N, 1), Counted(3 * M, 2)
    method().influence(train, queries)
    assert train.passes() == 1
    train.batches.clear()
    method().self_influence(train)
    assert train.passes() == 1


@pytest.mark.usefixtures("unchecked", "read_again")
@pytest.mark.parametrize("small", [False, True])
def test_passes_are_as_many_as_planned(small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("smallest_tiles")
    train, queries = Counted(N, 1), Counted(3 * M, 2)
    chosen = method()
    planned = chosen.plan(train, queries).passes
    train.batches.clear()
    queries.batches.clear()
    chosen.influence(train, queries)
    assert train.passes() == planned
    assert queries.passes() == 1, "queries that fit in memory are made once"
    if not small:
        assert planned == len(RATES)
    else:
        assert planned > len(RATES), (
            "a small memory means tiles of queries, and a pass over the train rows for each"
        )


@pytest.mark.usefixtures("unchecked", "read_again")
def test_self_influence_reads_once_per_checkpoint() -> None:
    train = Counted(N, 1)
    method().self_influence(train)
    assert train.passes() == len(RATES)


def test_a_tile_holds_whole_batches_and_rates_sit_on_the_queries() -> None:
    with run(queries=rows(9, 2)) as found:
        found.load(0)
        everything = list(hold_queries(found, 1 << 30, Progress(0)))
        assert [(tile.start, tile.size) for tile in everything] == [(0, 9)]
        small = list(hold_queries(found, 1, Progress(0)))
        assert [(tile.start, tile.size) for tile in small] == [(0, 4), (4, 4), (8, 1)]
        assert everything[0].nbytes() == sum(block.nbytes for block in everything[0].blocks.values())
        for names, block in everything[0].blocks.items():
            assert isinstance(block, Outer | Dense)
            parts = torch.cat([tile.blocks[names].materialise() for tile in small])
            torch.testing.assert_close(block.materialise(), parts)
        assert everything[0].weights is None
    states = [checkpoint.load() for checkpoint in trajectory()]
    gradients = oracle.trajectory_gradients(net(0), tracin.losses.cross_entropy, rows(9, 2), states)[0]
    names = ("0.weight", "0.bias")
    expected = RATES[0] * torch.cat([gradients[name] for name in names], 1)
    torch.testing.assert_close(everything[0].blocks[names].materialise(), expected)


def test_a_tile_under_normalize_is_not_scaled_but_weighted() -> None:
    with run(normalize=True) as found:
        found.load(1)
        (tile,) = hold_queries(found, 1 << 30, Progress(0))
    lengths = torch.stack([block.squared_norm() for block in tile.blocks.values()]).sum(0).sqrt()
    assert tile.weights is not None
    torch.testing.assert_close(tile.weights * lengths, torch.full((M,), RATES[1], dtype=torch.float64))


def test_the_bar_is_told_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Progress] = []

    class Bar:
        def __init__(self, total: int) -> None:
            bars.append(Progress(total))

        def __enter__(self) -> Progress:
            return bars[-1]

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(passes, "progress", lambda label, total, show: Bar(total))
    for budget in (2 << 30, 0):
        monkeypatch.setattr(passes, "query_budget", lambda *_, most=budget: most)
        with run(batch_size=2) as found:
            influence(found)
        assert bars[-1].done == bars[-1].total, f"budget {budget}: {bars[-1].done} of {bars[-1].total} rows"
    with run(queries=False) as found:
        self_influence(found)
    assert bars[-1].done == bars[-1].total == 2 * N


class Drifting(Dataset):
    """Rows of which one changes when it is read in its batch for the second time."""

    def __init__(self, row: int) -> None:
        self.x, self.y = rows(N, 1)
        self.row, self.reads = row, 0

    def __len__(self) -> int:
        return N

    def __getitems__(self, chosen: list[int]) -> list[tuple[Tensor, Tensor]]:
        if len(chosen) > 2 and self.row in chosen and chosen == list(range(chosen[0], chosen[-1] + 1)):
            self.reads += 1
        change = 0.01 * (self.reads > 1)
        return [(self.x[at] + change * (at == self.row), self.y[at]) for at in chosen]


@pytest.mark.usefixtures("read_again")
@pytest.mark.parametrize("row", [5, 9])
@pytest.mark.parametrize("verb", ["influence", "self_influence"])
def test_a_row_that_changes_between_passes_is_named(verb: str, row: int) -> None:
    data = (Drifting(row), rows(M, 2)) if verb == "influence" else (Drifting(row),)
    with pytest.raises(DataError, match=f"train: row {row} changed between two passes"):
        getattr(method(), verb)(*data)


def test_a_gradient_whose_square_overflows_names_the_row() -> None:
    model = net(0, torch.float32)
    x, y = rows(N, 1, torch.float32)
    x[6] *= 1e22
    chosen = tracin.TracInCP(
        tracin.Task(model, lambda m, batch: m(batch[0])[:, 0] * batch[0][:, 0].clamp(-1, 1e30)),
        trajectory(torch.float32), batch_size=4, device="cpu", progress=False,
    )  # fmt: skip
    with pytest.raises(NotFiniteError, match=r"row 1.*queries"):
        chosen.influence((x, y), (x[5:8], y[5:8]))
    with pytest.raises(NotFiniteError, match=r"row 6.*train"):
        chosen.self_influence((x, y))


class TwoHeads(nn.Module):
    """A head for training and another for queries."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.asked = nn.Linear(3, 1), nn.Linear(3, 1)


def kinked(model: Any, batch: Any) -> Tensor:
    """Finite, with a gradient of 0/0 where the second column of the batch is zero."""
    z = model.trained(batch[0])[:, 0]
    return z + ((z - z.detach()) ** 2 + batch[1]).sqrt()


def test_a_nan_is_named_though_the_queries_do_not_use_its_parameters() -> None:
    torch.manual_seed(0)
    model = TwoHeads().double()
    x, ones = torch.randn(9, 3, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    bad = ones.clone()
    bad[6] = 0
    task = tracin.Task(model, kinked, query_loss=lambda model, batch: model.asked(batch[0])[:, 0])
    checkpoints = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.3)])
    scorer = tracin.TracInCP(task, checkpoints, batch_size=4, progress=False)
    assert not scorer.influence((x, ones), (x[:2], ones[:2])).values.any()
    with pytest.raises(NotFiniteError, match=r"row 6 for trained\.weight"):
        scorer.influence((x, bad), (x[:2], ones[:2]))


@pytest.mark.parametrize("row", [0, 3, 4, 8])
def test_a_nan_is_named_wherever_its_row_stands(row: int) -> None:
    """In the batch that is checked against autograd, whose own gradient is NaN as well, and in those after it."""
    torch.manual_seed(0)
    model = TwoHeads().double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    y[row] = 0
    task = tracin.Task(model, kinked)
    checkpoints = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.3)])
    scorer = tracin.TracInCP(task, checkpoints, batch_size=4, progress=False)
    with pytest.raises(NotFiniteError, match=rf"row {row} for trained\.(weight|bias)"):
        scorer.self_influence((x, y))
