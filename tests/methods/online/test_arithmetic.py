"""Loops that round: autocast wherever it is opened, and switches of torch that leave float32 fewer digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin
from methods.online.common import generator
from tracin.errors import LoopError

N, Q = 12, 3
MKLDNN: Any = torch.backends.mkldnn


def net() -> nn.Sequential:
    """Every kind of layer whose rows' gradients are products: linear, convolution, embedding, recurrent."""

    class Last(nn.Module):
        def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
            return x[0][:, -1]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution = [nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()]
        return nn.Sequential(
            nn.Embedding(9, 8),
            nn.Linear(8, 8),
            *convolution,
            nn.LSTM(8, 8, batch_first=True),
            Last(),
            nn.Linear(8, 3),
        )


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    drawn = generator(seed)
    return torch.randint(0, 9, (n, 8), generator=drawn), torch.randint(0, 3, (n,), generator=drawn)


def cast(here: bool) -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16) if here else nullcontext()


def scores_of(place: str) -> Tensor:
    """First-order scores of a loop whose autocast covers the forward pass, the backward pass too, or the whole step."""
    model, (x, y) = net(), rows(N, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    with tracin.OnlineTracIn(task, optimizer, rows(Q, 2), N) as online:
        for ids in torch.arange(N).split(5):
            with cast(place == "step"), online.step(ids):
                optimizer.zero_grad()
                with cast(place == "backward"):
                    with cast(place == "forward"):
                        loss = F.cross_entropy(model(x[ids]), y[ids])
                    loss.backward()
                optimizer.step()
        return online.scores().values


@pytest.mark.parametrize("place", ["backward", "step"])
def test_autocast_may_reach_beyond_the_forward_pass(place: str) -> None:
    """Products of gradients are float32 wherever the loop leaves autocast on."""
    assert torch.equal(scores_of(place), scores_of("forward"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    ],
)
def test_attention_under_autocast(make: Callable[[], nn.Module]) -> None:
    """Its packed projection is another operation there."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = make(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.body(x, x, x)[0] if isinstance(self.body, nn.MultiheadAttention) else self.body(x)
            return self.head(mixed.mean(1))

    scores = []
    for here in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Attends()
        x, y = torch.randn(8, 5, 8, generator=generator(1)), rows(8, 1)[1]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        task = tracin.Task(model, tracin.losses.cross_entropy)
        with tracin.OnlineTracIn(task, optimizer, (x[:2], y[:2]), 8) as online, online.step(range(8)):
            with cast(here):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        scores.append(online.scores().values)
    oracle.assert_close(scores[1], scores[0], 5e-2)


def residue_under_autocast(change: Callable[[nn.Module], None]) -> None:
    """One step of a net over tokens under autocast, its gradients changed before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Embedding(30, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)]
        model = nn.Sequential(*body, nn.Linear(16, 30))
    x = torch.randint(0, 30, (8, 16), generator=generator(1))

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(net(batch)[:, :-1].mT.float(), batch[:, 1:], reduction="none").sum(1)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tracin.OnlineTracIn(tracin.Task(model, loss), optimizer, x[:2], 8) as online, online.step(range(8)):
        with cast(here=True):
            mean = loss(model, x).mean()
        mean.backward()
        change(model)
        optimizer.step()


def test_what_bfloat16_rounds_is_little() -> None:
    residue_under_autocast(lambda model: None)
    residue_under_autocast(lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.1))


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "2.weight", "4.weight", "5.weight", "5.bias"])
@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0, 0.75])
def test_bfloat16_hides_no_residue(name: str, factor: float) -> None:
    def change(model: nn.Module) -> None:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient *= factor

    with pytest.raises(LoopError, match=rf"gradient of {name.replace('.', '[.]')} is off by"):
        residue_under_autocast(change)


@pytest.fixture
def switches() -> Iterator[None]:
    kinds = (MKLDNN.matmul, MKLDNN.conv, MKLDNN.rnn)
    before = [kind.fp32_precision for kind in kinds]
    yield
    for kind, value in zip(kinds, before, strict=True):
        kind.fp32_precision = value


def train(off: str) -> None:
    """One step in which a parameter's gradient is off by what bfloat16 may round."""
    model, (x, y) = net(), rows(N, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    with tracin.OnlineTracIn(task, optimizer, rows(Q, 2), N) as online, online.step(torch.arange(N)):
        F.cross_entropy(model(x), y).backward()
        gradient = model.get_parameter(off).grad
        assert gradient is not None
        noise = torch.randn(gradient.shape, generator=generator(4))
        total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        gradient += 5e-3 * total * noise / noise.norm()
        optimizer.step()


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("kind", "name"), [("matmul", "1.weight"), ("conv", "2.weight"), ("rnn", "5.weight_ih_l0")]
)
def test_what_the_switches_round_is_no_residue(kind: str, name: str) -> None:
    with pytest.raises(LoopError, match=rf"gradient of {name.replace('.', '[.]')} is off by"):
        train(name)
    getattr(MKLDNN, kind).fp32_precision = "bf16"
    train(name)
    others = {"1.weight", "2.weight", "5.weight_ih_l0", "3.bias"} - {name}
    for other in sorted(others):
        with pytest.raises(LoopError, match=rf"gradient of {other.replace('.', '[.]')} is off by"):
            train(other)
