"""Rows' shares in training mode: batch statistics, dropout, recurrence, shared parameters, reused layers.

The judge gives each row its own copy of the parameters and runs the training pass once, with all rows in it and the
random numbers of that pass: the gradient of row i's copy is row i's own term.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin
from methods.online.common import Loop, N, Q, generator, gradient_form, ledger, replay, rows, sgd, two_groups
from tracin.errors import LoopError, ModelError


class ConvNet(nn.Module):
    """Convolution, batch norm, dropout, linear; ``forward_rows`` is the same with parameters [n, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)), inplace=True).flatten(1)))

    def forward_rows(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        maps = torch.cat(
            [F.conv2d(x[i : i + 1], p["conv.weight"][i], p["conv.bias"][i], padding=1) for i in range(len(x))]
        )
        mean = maps.mean((0, 2, 3), keepdim=True)
        spread = (maps - mean).square().mean((0, 2, 3), keepdim=True)
        normal = (maps - mean) / (spread + self.norm.eps).sqrt()
        normal = normal * p["norm.weight"][:, :, None, None] + p["norm.bias"][:, :, None, None]
        flat = F.dropout(F.relu(normal).flatten(1), 0.3, True)
        return torch.einsum("ni,noi->no", flat, p["head.weight"]) + p["head.bias"]


class Classifier(nn.Module):
    """Positions and a class token shared by the rows, dropout after them, layers used twice, tokens flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.drop = nn.Dropout(0.25)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.positions
        x = self.drop(x)
        x = torch.tanh(self.mix(x.reshape(-1, 4))).view(n, -1, 4)
        x = torch.tanh(self.mix(x))
        return self.head(x.sum(1))

    def forward_rows(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        x = torch.cat([p["token"][:, 0], x], 1) + p["positions"][:, 0]
        x = F.dropout(x, 0.25, True)
        for _ in range(2):
            x = torch.tanh(torch.einsum("nti,noi->nto", x, p["mix.weight"]) + p["mix.bias"][:, None])
        return torch.einsum("ni,noi->no", x.sum(1), p["head.weight"]) + p["head.bias"]


class Embedded(nn.Module):
    """Embeddings by token and by position, tied to nothing, layer norm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(3, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        x = F.dropout(self.norm(self.tokens(x) + self.places(places)), 0.2, self.training)
        return self.head(x.mean(1))

    def forward_rows(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        table = p["tokens.weight"]
        x = torch.stack([table[i][x[i]] + p["places.weight"][i] for i in range(len(x))])
        x = F.layer_norm(x, (4,), eps=self.norm.eps) * p["norm.weight"][:, None] + p["norm.bias"][:, None]
        x = F.dropout(x, 0.2, True).mean(1)
        return torch.einsum("ni,noi->no", x, p["head.weight"]) + p["head.bias"]


class Recurrent(nn.Module):
    def __init__(self, dropout: float = 0.0, layers: int = 2) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def own_terms(model: nn.Module, loop: Loop, data: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
    """[b, p]: each row's own term, all micro-batches of the step, with the random numbers that training is about to draw."""
    twin = copy.deepcopy(model)
    state, found = STATES[-1], []
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        for part in ids.chunk(loop.micro):
            copies = {
                name: p.detach().expand(len(part), *p.shape).clone().requires_grad_()
                for name, p in twin.named_parameters()
            }
            logits = twin.forward_rows(copies, data[0][part])
            loss = F.cross_entropy(logits, data[1][part], reduction="sum") / len(ids)
            grads = torch.autograd.grad(loss, list(copies.values()))
            found.append(torch.cat([g.flatten(1) for g in grads], 1))
    return torch.cat(found)


STATES: list[Tensor] = []


class Seeded(Loop):
    """A loop whose random numbers start afresh at each step and are remembered."""

    def _step(self, model: nn.Module, data: Any, optimizer: Any, at: int, ids: Tensor, before: Any) -> None:
        torch.manual_seed(at)
        STATES.append(torch.get_rng_state())
        super()._step(model, data, optimizer, at, ids, before)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


def tokens(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 7, (n, 3), generator=generator(seed)), rows(n, seed)[1]


STOCHASTIC = {
    "batch norm and dropout": (ConvNet, (2, 4, 4)),
    "class token and positions": (Classifier, (3, 4)),
    "embeddings": (Embedded, None),
}


@pytest.mark.parametrize("case", STOCHASTIC)
@pytest.mark.parametrize("micro", [1, 2])
def test_rows_have_their_own_term_of_the_training_pass(case: str, micro: int) -> None:
    make, shape = STOCHASTIC[case]
    data, queries = (
        (tokens(N, 1), tokens(Q, 2)) if shape is None else (rows(N, 1, shape=shape), rows(Q, 2, shape=shape))
    )
    loop = Seeded(two_groups(), micro=micro, clip=0.5, gamma=0.9)
    with torch.random.fork_rng():
        truth = replay(build(make), loop, data, queries, gradient_form, terms=own_terms)
        model = build(make)
        online = loop.run(model, data, ledger(model, queries))
    oracle.assert_close(online.scores("first_order").values, truth.first_order, 1e-10, case)
    oracle.assert_close(online.scores("ideal").values, truth.ideal, 1e-10, case)
    total = truth.losses[0] - truth.losses[-1]
    assert float((online.scores("ideal").values.sum(1) - total).abs().max()) < 1e-10


def test_lstm() -> None:
    data, queries = rows(N, 1, shape=(3, 4)), rows(Q, 2, shape=(3, 4))
    loop = Loop(two_groups(), micro=2)
    truth = replay(build(Recurrent), loop, data, queries, gradient_form)
    model = build(Recurrent)
    online = loop.run(model, data, ledger(model, queries))
    oracle.assert_close(online.scores("first_order").values, truth.first_order, 1e-10)
    assert online.scores("ideal").provenance["routes"]["lstm.weight_ih_l0"] == "unrolled LSTM"


def test_sequences_longer_than_the_queries() -> None:
    data, queries = rows(N, 1, shape=(5, 4)), rows(Q, 2, shape=(3, 4))

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.tanh(self.inner(x.reshape(-1, 4))).view(len(x), -1, 5)
            return self.head(out.mean(1))

    loop = Loop(sgd())
    truth = replay(build(Flattened), loop, data, queries, gradient_form)
    model = build(Flattened)
    online = loop.run(model, data, ledger(model, queries))
    oracle.assert_close(online.scores().values, truth.first_order, 1e-10)


def test_frozen_batch_norm_is_that_of_eval() -> None:
    data, queries = rows(N, 1, shape=(2, 4, 4)), rows(Q, 2, shape=(2, 4, 4))
    loop = Loop(sgd(), mode=False)
    truth = replay(build(ConvNet), loop, data, queries, gradient_form)
    model = build(ConvNet)
    online = loop.run(model, data, ledger(model, queries))
    oracle.assert_close(online.scores().values, truth.first_order, 1e-10)


def test_only_the_selected_parameters() -> None:
    data, queries = rows(N, 1, shape=(2, 4, 4)), rows(Q, 2, shape=(2, 4, 4))
    loop = Loop(sgd(), mode=False)
    model = build(ConvNet)
    task = tracin.Task(model, tracin.losses.cross_entropy, parameters="head.*")
    online = loop.run(model, data, lambda optimizer: tracin.OnlineTracIn(task, optimizer, queries, N))

    def form(twin: nn.Module, optimizer: Any, rates: Tensor) -> Tensor:
        kept = torch.cat(
            [torch.full((p.numel(),), float("head" in name)) for name, p in twin.named_parameters()]
        )
        return rates * kept

    truth = replay(build(ConvNet), loop, data, queries, form)
    oracle.assert_close(online.scores().values, truth.first_order, 1e-10)


def test_parameters_that_the_optimizer_does_not_move_add_nothing() -> None:
    data, queries = rows(N, 1, shape=(2, 4, 4)), rows(Q, 2, shape=(2, 4, 4))
    loop = Loop(lambda model: torch.optim.SGD([model.head.weight], lr=0.3), mode=False)
    truth = replay(build(ConvNet), loop, data, queries, gradient_form)
    model = build(ConvNet)
    online = loop.run(model, data, ledger(model, queries))
    oracle.assert_close(online.scores().values, truth.first_order, 1e-10)


def test_dropout_inside_a_module_under_vmap_is_refused() -> None:
    data, queries = rows(N, 1, shape=(3, 4)), rows(Q, 2, shape=(3, 4))
    model = build(lambda: Recurrent(dropout=0.5))
    with torch.random.fork_rng(), pytest.raises(LoopError, match=r"lstm.*dropout=0"):
        Loop(sgd()).run(model, data, ledger(model, queries))


def test_a_parameter_of_the_loss_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 3), nn.Parameter(torch.rand(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]) @ model.scale, batch[1], reduction="none")

    model = build(Scaled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match=r"scale from inside the model.*Task\(parameters"):
        tracin.OnlineTracIn(tracin.Task(model, loss), optimizer, rows(Q, 2), N)
