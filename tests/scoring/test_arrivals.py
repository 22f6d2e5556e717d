"""Numbers that are looked at late, as on an accelerator: the same scores, and the same words about what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracin
from scoring.common import M, N, method, net, rows, run, trajectory
from tracin.errors import NotFiniteError
from tracin.scoring import arrivals
from tracin.scoring.passes import influence, self_influence


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "at_once", lambda device: False)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_influence_is_the_same(monkeypatch: pytest.MonkeyPatch, batch_size: int, normalize: bool) -> None:
    chosen = method(batch_size=batch_size, normalize=normalize)
    soon = chosen.influence(rows(N, 1), rows(M, 2)).values
    late(monkeypatch)
    assert torch.equal(chosen.influence(rows(N, 1), rows(M, 2)).values, soon)


def test_self_influence_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert N > arrivals.DEPTH + 2, "enough batches of one row for some to be waited for"
    soon = method(batch_size=1).self_influence(rows(N, 1)).values
    late(monkeypatch)
    assert torch.equal(method(batch_size=1).self_influence(rows(N, 1)).values, soon)


def test_the_run_looks_again_when_a_pass_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    late(monkeypatch)
    with run(batch_size=2) as found:
        influence(found)
        self_influence(found)
        assert not found.train.deferred
        assert not found.asked.deferred


class Words(nn.Module):
    """An embedding, whose products skip tokens that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(400, 2)

    def forward(self, index: Tensor) -> Tensor:
        return self.words(index).sum((1, 2))


def _kinked(model: nn.Module, batch: Any) -> Tensor:
    """Finite, with a gradient of 0/0 where the last column of the batch is zero."""
    z = model(batch[0])
    z = z[:, 0] if z.dim() > 1 else z
    return z + ((z - z.detach()) ** 2 + batch[1]).sqrt()


def _overflowing(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:, 0] * batch[0][:, 0].clamp(-1, 1e30)


def _lost(model: nn.Module, batch: Any) -> Tensor:
    """A loss that is not finite though its gradient is."""
    return model(batch[0])[:, 0] + torch.where(batch[1] > 0, 0.0, torch.inf)


def _bad(row: int) -> Tensor:
    ones = torch.ones(N, dtype=torch.float64)
    ones[row] = 0
    return ones


def _small(loss: Callable, dtype: torch.dtype = torch.float64) -> tracin.TracInCP:
    task = tracin.Task(net(0, dtype), loss)
    return tracin.TracInCP(task, trajectory(dtype), batch_size=2, device="cpu", progress=False)


def _nan_gradient() -> None:
    x = rows(N, 1)[0]
    _small(_kinked).influence((x, _bad(6)), (x[:3], torch.ones(3, dtype=torch.float64)))


def _nan_query() -> None:
    x = rows(N, 1)[0]
    _small(_kinked).influence((x, torch.ones(N, dtype=torch.float64)), (x, _bad(7)))


def _infinite_loss() -> None:
    _small(_lost).self_influence((rows(N, 1)[0], _bad(8)))


def _infinite_loss_of_a_query() -> None:
    x = rows(N, 1)[0]
    _small(_lost).influence((x, torch.ones(N, dtype=torch.float64)), (x, _bad(4)))


def _overflow() -> None:
    x, y = rows(N, 1, torch.float32)
    x[6] *= 1e22
    _small(_overflowing, torch.float32).self_influence((x, y))


def _nan_at_an_embedding() -> None:
    torch.manual_seed(0)
    model = Words().double()
    checkpoint = tracin.Checkpoint(model.state_dict(), learning_rate=0.1)
    chosen = tracin.TracInCP(
        tracin.Task(model, _kinked),
        tracin.Trajectory([checkpoint]),
        batch_size=2,
        device="cpu",
        progress=False,
    )
    index = torch.arange(2 * N).reshape(N, 2)
    chosen.influence((index, _bad(5)), (index[:2] + 300, torch.ones(2, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (_nan_gradient, "row 6 for"),
        (_nan_query, "row 7 for"),
        (_infinite_loss, "loss of row 8"),
        (_infinite_loss_of_a_query, "loss of row 4"),
        (_overflow, "row 6"),
        (_nan_at_an_embedding, "row 5 for words"),
    ],
)
def test_what_is_not_finite_is_named_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[], None], words: str
) -> None:
    with pytest.raises(NotFiniteError, match=words) as soon:
        fails()
    late(monkeypatch)
    with pytest.raises(NotFiniteError, match=words) as told:
        fails()
    assert str(told.value) == str(soon.value)
