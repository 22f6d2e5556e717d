"""Rows that a model moves in training mode alone: refused where slot i is not row i's, followed where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin
from methods.online.common import Loop, N, Q, batches, ledger, replay, rows, sgd
from methods.online.test_models import build
from tracin.errors import LoopError, ModelError

Step = Callable[["Moved", Tensor], Tensor]


class Moved(nn.Module):
    """Two layers, and something done around them in training mode."""

    def __init__(self, step: Step, norm: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.step = nn.Linear(4, 6), nn.Linear(6, 3), step
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()

    def plain(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x) if self.training else self.plain(x)


def order(x: Tensor) -> Tensor:
    return x[:, 0].argsort()


def sorted_around(model: Moved, x: Tensor) -> Tensor:
    k = order(x)
    return model.plain(x[k])[k.argsort()]


def sorted_between(model: Moved, x: Tensor) -> Tensor:
    k = order(x)
    return model.b(torch.tanh(model.norm(model.a(x)))[k])[k.argsort()]


def flipped(model: Moved, x: Tensor) -> Tensor:
    return model.plain(x.flip(0)).flip(0)


def rolled(model: Moved, x: Tensor) -> Tensor:
    return model.plain(x.roll(1, 0)).roll(-1, 0)


def by_matrix(model: Moved, x: Tensor) -> Tensor:
    p = torch.eye(len(x), dtype=x.dtype)[order(x)]
    return p.T @ model.plain(p @ x)


def mixed_up(model: Moved, x: Tensor) -> Tensor:
    h = torch.tanh(model.norm(model.a(x)))
    return model.b(0.7 * h + 0.3 * h[order(x)])


def halves(model: Moved, x: Tensor) -> Tensor:
    first, second = x.split([1, len(x) - 1])
    h = torch.tanh(model.norm(model.a(torch.cat([second, first]))))
    return model.b(torch.cat([h[-1:], h[:-1]]))


def in_pairs(x: Tensor, rows: int) -> Tensor:
    return x.view(rows, -1, x.shape[1]).transpose(0, 1).reshape(x.shape)


def reshaped(model: Moved, x: Tensor) -> Tensor:
    padded = torch.cat([x, x[: len(x) % 2]])
    return in_pairs(model.plain(in_pairs(padded, 2)), len(padded) // 2)


MOVES = {
    "sorted around": sorted_around,
    "sorted between": sorted_between,
    "flipped": flipped,
    "rolled": rolled,
    "by a matrix": by_matrix,
    "mixed up": mixed_up,
    "two halves": halves,
}


def one_step(
    online: tracin.OnlineTracIn, optimizer: torch.optim.Optimizer, ids: Tensor, loss: Callable[[], Tensor]
) -> None:
    with online.step(ids):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def moved(step: Step, norm: bool = False, dtype: torch.dtype = torch.float64) -> Moved:
    return build(lambda: Moved(step, norm)).to(dtype)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("case", MOVES)
def test_rows_that_move_in_training_are_refused(case: str, norm: bool) -> None:
    model = moved(MOVES[case], norm)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        LoopError, match=r"does not come from slot i of (a|b|norm) alone.*reorder them before it"
    ):
        Loop(sgd()).run(model, rows(N, 1), ledger(model, rows(Q, 2)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_less_precise_arithmetic(dtype: torch.dtype) -> None:
    model = moved(sorted_around, dtype=dtype)
    with pytest.raises(LoopError, match="does not come from slot i"):
        Loop(sgd()).run(model, rows(N, 1, dtype), ledger(model, rows(Q, 2, dtype)))


def test_a_batch_that_moves_rows_after_others_that_did_not() -> None:
    """Sorting rows that are in order moves none; the next batch is looked at again."""
    model, (x, y) = moved(sorted_around), rows(N, 1)
    x = x[order(x)]
    loop = Loop(sgd(), [torch.tensor([0, 3, 5]), torch.tensor([2, 4, 6]), torch.tensor([5, 3, 0])])
    with pytest.raises(LoopError, match="does not come from slot i"):
        loop.run(model, (x, y), ledger(model, rows(Q, 2)))


def test_rows_that_move_by_reshaping_are_refused() -> None:
    model = moved(reshaped)
    with pytest.raises(LoopError, match="does not come from slot i of a alone"):
        Loop(sgd(), batches(2, 6)).run(model, rows(N, 1), ledger(model, rows(Q, 2)))


def columns(model: Moved, x: Tensor) -> Tensor:
    return model.plain(torch.cat([x[:, :2], x[:, 2:]], 1).flip(1).flip(1))


def hidden(model: Moved, x: Tensor) -> Tensor:
    h = torch.tanh(model.norm(model.a(x)))
    return model.b(torch.cat([h[:, :3], h[:, 3:]], 1)[torch.arange(len(x))])


def product(model: Moved, x: Tensor) -> Tensor:
    h = torch.tanh(model.norm(model.a(x)))
    return model.b(h @ torch.eye(6, dtype=x.dtype).flip(0))


STAYS = {"columns": columns, "hidden": hidden, "product": product}


@pytest.mark.parametrize("case", STAYS)
def test_other_operations_that_keep_rows_are_followed(case: str) -> None:
    loop, data, queries = Loop(sgd(), batches(4)), rows(N, 1), rows(Q, 2)
    truth = replay(moved(STAYS[case]), loop, data, queries)
    model = moved(STAYS[case])
    oracle.assert_close(
        loop.run(model, data, ledger(model, queries)).scores().values, truth.first_order, 1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_stay_beside_batch_statistics_are_followed(dtype: torch.dtype) -> None:
    model = moved(hidden, True, dtype)
    online = Loop(sgd(), batches(3)).run(model, rows(N, 1, dtype), ledger(model, rows(Q, 2, dtype)))
    assert online.steps == 3


@pytest.mark.parametrize("moves", [False, True], ids=["rows that stay", "rows that move"])
def test_below_a_float32_layer_the_graph_may_be_less_precise(moves: bool) -> None:
    """An embedding is float32 under autocast, and what reads it is not."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.deep = nn.Embedding(9, 8), nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])

        def forward(self, x: Tensor) -> Tensor:
            h = self.deep(self.table(x))
            if self.training:
                places = torch.arange(len(x)).flip(0) if moves else torch.arange(len(x))
                h = h[places]
            return h.sum(1)

    model = build(Words).float()
    x, y = torch.arange(N * 3).view(N, 3) % 9, torch.arange(N) % 8
    optimizer = sgd()(model)
    online = tracin.OnlineTracIn(tracin.Task(model, tracin.losses.cross_entropy), optimizer, (x, y), N)
    ids = torch.arange(4)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x[ids]), y[ids])

    if moves:
        with pytest.raises(LoopError, match="does not come from slot i"):
            one_step(online, optimizer, ids, loss)
    else:
        one_step(online, optimizer, ids, loss)
        assert online.steps == 1


def test_rows_picked_with_their_own_place_are_followed() -> None:
    """Whoever reorders rows before the model gives their ids in that order."""
    loop, data, queries = Loop(sgd(), batches(4)), rows(N, 1), rows(Q, 2)
    shuffled = Loop(sgd(), [ids.flip(0) for ids in loop.steps])
    models = [moved(hidden), moved(hidden)]
    found = [
        one.run(model, data, ledger(model, queries)).scores().values
        for one, model in zip((loop, shuffled), models, strict=True)
    ]
    oracle.assert_close(found[0], found[1], 1e-10)


def by_parts(model: Any, batch: Any) -> Tensor:
    """The loss calls the layers, never the model."""
    h = torch.tanh(model.a(batch[0]))
    if model.training:
        k = order(batch[0])
        return F.cross_entropy(model.b(h[k])[k.argsort()], batch[1], reduction="none")
    return F.cross_entropy(model.b(h), batch[1], reduction="none")


def test_rows_that_move_between_parts_are_refused() -> None:
    model, data = moved(sorted_around), rows(N, 1)
    task = tracin.Task(model, by_parts)
    optimizer = sgd()(model)
    online = tracin.OnlineTracIn(task, optimizer, rows(Q, 2), N)
    ids = torch.tensor([3, 1, 4, 7])
    with pytest.raises(LoopError, match="does not come from slot i of a alone"):
        one_step(online, optimizer, ids, lambda: by_parts(model, (data[0][ids], data[1][ids])).mean())


class Scalar(nn.Module):
    """Returns its mean loss in training, after operations that the queries did not show."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        k = order(x)
        out = self.b(torch.tanh(self.a(x)))
        return out[k].square().mean() if self.training else out


def test_an_output_without_rows_cannot_be_checked() -> None:
    model, data = build(Scalar), rows(N, 1)
    optimizer = sgd()(model)
    online = ledger(model, rows(Q, 2))(optimizer)
    with pytest.raises(LoopError, match="none of its outputs has a row axis"):
        one_step(online, optimizer, torch.tensor([3, 1]), lambda: model(data[0][[3, 1]]))


class Scaled(nn.Module):
    """Nothing but a parameter that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_a_forward_pass_without_backward_is_no_micro_batch() -> None:
    loop, data, queries = Loop(sgd(), batches(3)), rows(N, 1), rows(Q, 2)
    truth = replay(build(Scaled), loop, data, queries)
    model = build(Scaled)
    optimizer = sgd()(model)
    with ledger(model, queries)(optimizer) as online:
        for ids in loop.steps:
            with online.step(ids):
                optimizer.zero_grad()
                model(data[0])  # nobody asks for its gradient
                loop.loss(model, data, ids, len(ids)).backward()
                optimizer.step()
    oracle.assert_close(online.scores().values, truth.first_order, 1e-10)


def test_the_passes_that_decide_leave_training_as_it_is() -> None:
    """Dropout, batch statistics and an operation that is looked at in every step."""

    def trained(online: Any) -> dict[str, Tensor]:
        model = moved(hidden, True, torch.float32)
        model.norm = nn.Sequential(model.norm, nn.Dropout(0.3))
        with torch.random.fork_rng():
            torch.manual_seed(2)
            make = None if online is None else online(model)
            Loop(sgd(momentum=0.9), batches(4)).run(model, rows(N, 1, torch.float32), make)
        return model.state_dict()

    beside = trained(lambda model: ledger(model, rows(Q, 2, torch.float32)))
    plain = trained(None)
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, 0, 0].abs() * 2).long().clamp(1, 3)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        some = x[:, 0, 0] > 0
        out = x.new_zeros(len(x), 5)
        out[some] = self.a(x[some, 0])
        return self.head(out)


@pytest.mark.parametrize("make", [Packed, Masked])
def test_models_that_pick_rows_are_refused_when_the_ledger_is_made(make: Callable[[], nn.Module]) -> None:
    model = build(make)
    with pytest.raises(ModelError, match=r"cannot follow .* from inside the model"):
        ledger(model, rows(Q, 2, shape=(3, 4)))(sgd()(model))
