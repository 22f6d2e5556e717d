"""Parameters that rows share until an elementwise operation: each operation, each way to get there, and ways out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradients.common import assert_exact, build, gradients_of, normal, route, source_of, wired
from tracin.gradients.engine import Source
from tracin.gradients.shared import FACTORS

T, D = 3, 4  # as many tokens as probe rows
SHARED = "shared by the rows"


class Joined(nn.Module):
    """x [n, t, d] joined with a bare parameter by a function."""

    def __init__(self, join: Callable[[Tensor, nn.Parameter], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(shape))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.join(x, self.p))


Join = Callable[[Tensor, Tensor], Tensor]
JOINS: dict[str, tuple[str, Join, tuple[int, ...]]] = {
    # name: (operation, join, shape of the parameter)
    "x + p": ("AddBackward0", lambda x, p: x + p, (T, D)),
    "p + x": ("AddBackward0", lambda x, p: p + x, (T, D)),
    "x + 2p": ("AddBackward0", lambda x, p: torch.add(x, p, alpha=2), (T, D)),
    "p + 2x": ("AddBackward0", lambda x, p: torch.add(p, x, alpha=2), (T, D)),
    "x - p": ("SubBackward0", lambda x, p: x - p, (T, D)),
    "p - x": ("SubBackward0", lambda x, p: p - x, (T, D)),
    "x - 3p": ("SubBackward0", lambda x, p: torch.sub(x, p, alpha=3), (T, D)),
    "p - 3x": ("SubBackward0", lambda x, p: torch.sub(p, x, alpha=3), (T, D)),
    "x p": ("MulBackward0", lambda x, p: x * p, (T, D)),
    "p x": ("MulBackward0", lambda x, p: p * x, (T, D)),
    "x / p": ("DivBackward0", lambda x, p: x / p, (T, D)),
    "p / x": ("DivBackward0", lambda x, p: p / (x.square() + 1), (T, D)),
    "where x else p": ("WhereBackward0", lambda x, p: torch.where(x > 0, x, p), (T, D)),
    "where p else x": ("WhereBackward0", lambda x, p: torch.where(x > 0, p, x), (T, D)),
    "expanded beside x": (
        "ExpandBackward0",
        lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1),
        (1, D),
    ),
}

WAYS: dict[str, tuple[Join, tuple[int, ...]]] = {
    "a vector": (lambda x, p: x + p, (D,)),
    "one per token": (lambda x, p: x * p, (T, 1)),
    "one number": (lambda x, p: x * p, (1,)),
    "no axes at all": (lambda x, p: x * p, ()),
    "an axis of one where the rows stand": (lambda x, p: x + p, (1, T, D)),
    "a function of it": (lambda x, p: x * (p.exp() + p.square()), (T, D)),
    "a slice": (lambda x, p: x + p[1 : 1 + x.shape[1]], (T + 4, D)),
    "a slice and the rest": (lambda x, p: x * p[:T] + p[T:], (2 * T, D)),
    "turned": (lambda x, p: x + p.T, (D, T)),
    "taken by position": (lambda x, p: x + p[torch.arange(T)], (T + 2, D)),
    "two meetings": (lambda x, p: (x * p).sin() + p, (T, D)),
    "a diamond": (lambda x, p: x + p.exp() * p.tanh(), (T, D)),
    "a diamond and a meeting": (lambda x, p: x * p + (2 * p - p.square()), (D,)),
    "rows last": (lambda x, p: (x.movedim(0, -1) + p[..., None]).movedim(-1, 0), (T, D)),
    "rows in the middle": (lambda x, p: (x.transpose(0, 1) * p[:, None]).transpose(0, 1), (T, D)),
    "a sum of several numbers of it": (lambda x, p: x * p.sum() + x * p.norm(), (T, D)),
}


def joined(join: Join, shape: tuple[int, ...], n: int = 5) -> Source:
    return wired(source_of(build(lambda: Joined(join, shape)), (normal(n, T, D, seed=1),)))


def test_every_operation_has_a_case() -> None:
    assert {operation for operation, _, _ in JOINS.values()} == set(FACTORS), (
        "an operation without a case is not judged"
    )


@pytest.mark.parametrize("name", JOINS)
def test_every_operation(name: str) -> None:
    operation, join, shape = JOINS[name]
    source = joined(join, shape)
    assert route(source, "p") == SHARED, (
        f"{name} left the fast route: {source.wiring and source.wiring.reasons}"
    )
    assert source.wiring is not None
    met = [step.operation for step in source.wiring.shared["p"].steps if step.layout is not None]
    assert met == [operation], f"{name}: the rows join in {met}"
    assert_exact(source)
    assert not source.irregular


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_the_rows(name: str) -> None:
    source = joined(*WAYS[name])
    assert route(source, "p") == SHARED, (
        f"{name} left the fast route: {source.wiring and source.wiring.reasons}"
    )
    assert_exact(source)
    assert not source.irregular


@pytest.mark.parametrize("name", JOINS)
def test_a_wrong_factor_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, join, shape = JOINS[name]
    sound = FACTORS[operation]
    monkeypatch.setitem(FACTORS, operation, lambda node, at: lambda g: 1.001 * sound(node, at)(g))
    source = joined(join, shape)
    assert route(source, "p") != SHARED, f"{name}: a factor of 1.001 was taken for exact"
    assert_exact(source)


class Positions(nn.Module):
    """Learned positions by an embedding of ``arange``, beside words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(6, D), nn.Embedding(8, D)

    def forward(self, index: Tensor) -> Tensor:
        steps = torch.arange(index.shape[1])
        return torch.tanh(self.words(index) + self.positions(steps))


def test_an_embedding_of_arange() -> None:
    index = torch.randint(0, 6, (5, T), generator=torch.Generator().manual_seed(1))
    source = wired(source_of(build(Positions), (index,)))
    assert route(source, "positions.weight") == SHARED
    assert route(source, "words.weight") == "rule Embedding"
    assert_exact(source)


LEAVING: dict[str, tuple[Join, tuple[int, ...]]] = {
    "pow": (lambda x, p: (x.square() + 1) ** p, (D,)),
    "maximum": (torch.maximum, (T, D)),
    "matmul": (lambda x, p: x @ p, (D, D)),
    "einsum": (lambda x, p: torch.einsum("ntd,de->nte", x, p), (D, D)),
    "lerp": (lambda x, p: torch.lerp(x, x.square(), p), (D,)),
    "atan2": (torch.atan2, (T, D)),
    "a meeting and a pow": (lambda x, p: x + p + (x.square() + 1) ** p, (D,)),
    "stacked by hand": (lambda x, p: x + torch.stack([p] * len(x)), (T, D)),
}


@pytest.mark.parametrize("name", LEAVING)
def test_any_other_reader_falls_to_vmap(name: str) -> None:
    assert "PowBackward1" not in FACTORS
    source = joined(*LEAVING[name])
    assert route(source, "p").startswith("vmap"), f"{name}: {route(source, 'p')}"
    assert source.wiring is not None
    assert source.wiring.reasons["p"], "a parameter off the fast route says why"
    assert_exact(source)


def test_a_batch_of_another_graph_goes_row_by_row() -> None:
    """On the probe's rows p joins by a sum; a batch with a large entry multiplies it as well."""

    def join(x: Tensor, p: Tensor) -> Tensor:
        return x * p + p if bool((x > 50).any()) else x + p

    rows = normal(6, T, D, seed=1)
    rows[1, 0, 0] = 60.0  # not among the probe's rows 0, 3 and 5
    source = wired(source_of(build(lambda: Joined(join, (T, D))), (rows,), batch_size=3))
    assert route(source, "p") == SHARED
    _, found = gradients_of(source)
    assert len(source.irregular["p"]) == 3, "the batch was not traced along the probe's way"
    assert ("p",) in found.blocks
    assert_exact(source)


def test_short_batches_and_one_row() -> None:
    rows = normal(7, T, D, seed=1)
    for n in (1, 2, 7):
        source = wired(source_of(build(lambda: Joined(lambda x, p: x * p + p, (T, D))), (rows[:n],)))
        assert route(source, "p") == SHARED
        assert_exact(source)
