"""What the tests of bad input share: a small model, its rows and checkpoints, and ``refused``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin

N, M = 8, 4


class Net(nn.Module):
    """Something of everything that a run could leave changed: BatchNorm, dropout, a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(5, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def build(kind: type[nn.Module] = Net, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind()


def rows(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def checkpoints(kind: type[nn.Module] = Net, rates: tuple[Any, ...] = (0.3, 0.07)) -> list[tracin.Checkpoint]:
    return [
        tracin.Checkpoint(build(kind, seed=index + 1).state_dict(), learning_rate=rate, step=10 * (index + 1))
        for index, rate in enumerate(rates)
    ]


def make(
    model: nn.Module, loss: Callable = cross_entropy, rates: tuple[Any, ...] = (0.3, 0.07), **options: Any
) -> Any:
    """TracInCP over two checkpoints of the model's class, batches of 3 unless told."""
    trajectory = tracin.Trajectory(checkpoints(type(model), rates))
    settings = {"batch_size": 3, "device": "cpu", "progress": False, **options}
    return tracin.TracInCP(tracin.Task(model, loss), trajectory, **settings)


@contextmanager
def refused(
    model: nn.Module, error: type[Exception] | tuple[type[Exception], ...], *facts: str
) -> Iterator[Any]:
    """The block raises ``error`` with every fact (a pattern) in its message, and changes nothing."""
    with oracle.untouched(model), pytest.raises(error) as caught:
        yield caught
    message = str(caught.value)
    missing = [fact for fact in facts if not re.search(fact, message, re.IGNORECASE | re.DOTALL)]
    assert not missing, f"the message lacks {missing}: {message}"
    assert isinstance(caught.value, tracin.errors.TracinError)


def ask_all(method: Any, train: Any, queries: Any) -> dict[str, Callable[[], Any]]:
    return {
        "influence": lambda: method.influence(train, queries),
        "top_k": lambda: method.top_k(train, queries, k=2),
        "self_influence": lambda: method.self_influence(train),
        "verify": lambda: method.verify(train),
    }


verbs = pytest.mark.parametrize("verb", ["influence", "top_k", "self_influence", "verify"])
