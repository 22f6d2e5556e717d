"""bfloat16, and models and losses of more than one precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from cases import BY_NAME, wave, wave_of
from cases.table import normal
from judged import PLAIN, M, N, Run, truth
from tracin.errors import OptionError


def test_bfloat16_accumulates_in_float32() -> None:
    case = BY_NAME["mlp_relu"]
    run = Run(case, torch.bfloat16)
    found = run.ask("influence", run.train, run.queries, batch_size=16)
    assert found.values.dtype == torch.float32
    oracle.assert_close(found.values, truth(case.name, torch.bfloat16).scores, 2e-2)


class TwoPrecisions(nn.Module):
    """A float32 body under a float64 head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.float()).tanh().double())


def _two_precisions() -> nn.Module:
    model = TwoPrecisions()
    model.head.double()
    return model


class WideNorm(nn.LayerNorm):
    """Computes in float64 and hands on float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).float()


def _with_wide_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), WideNorm(4, dtype=torch.float64), nn.Linear(4, 2))


def _wide_loss(model: nn.Module, batch: Any) -> Tensor:
    return wave_of(model(*batch).double())


@pytest.mark.parametrize(
    ("name", "build", "loss"),
    [
        ("float64_loss_of_a_float32_model", BY_NAME["mlp_relu"].build, _wide_loss),
        ("float64_head_on_a_float32_body", _two_precisions, wave),
        ("float64_norm_in_a_float32_model", _with_wide_norm, wave),
    ],
)
def test_more_than_one_precision(name: str, build: Any, loss: Any) -> None:
    """The rows' losses carry float32 noise whatever their dtype: that is no mixing of rows."""

    def fresh() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return build()

    states = [fresh().state_dict()] * 2
    train, queries = (normal(4)(n, torch.Generator().manual_seed(n)).float() for n in (N, M))
    sides = [
        oracle.trajectory_gradients(fresh(), loss, (rows,), states, how=oracle.gradients_in_graph)
        for rows in (train, queries)
    ]
    model = fresh()
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=rate) for state, rate in zip(states, PLAIN, strict=True)]
    )
    method = tracin.TracInCP(
        tracin.Task(model, loss), trajectory, batch_size=16, device="cpu", progress=False
    )
    with oracle.untouched(model):
        found = method.influence((train,), (queries,))
    oracle.assert_close(found.values, oracle.scores(*sides, PLAIN), 1e-5)


class Twice(nn.Module):
    """A convolution, and a layer that is called twice: the graph must show both uses under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.again, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).tanh().flatten(1)
        return self.head(self.again(self.again(x).tanh()).tanh())


class Recurrent(nn.Module):
    """Tokens through a GRU, which goes by vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(9, 4), nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.body(self.words(index))[0][:, -1])


def _pictures(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, 4, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def _sentences(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 9, (n, 6), generator=generator), torch.randint(0, 3, (n,), generator=generator)


CAST = {"twice": (Twice, _pictures), "recurrent": (Recurrent, _sentences)}


def _cast(
    name: str, loss: Any = tracin.losses.cross_entropy, **options: Any
) -> tuple[tracin.TracInCP, Any, list]:
    build, data = CAST[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        models = [build() for _ in range(3)]
    checkpoints = [
        tracin.Checkpoint(model.state_dict(), learning_rate=rate)
        for model, rate in zip(models, PLAIN, strict=False)
    ]
    options = {"batch_size": 3, "device": "cpu", "progress": False, **options}
    method = tracin.TracInCP(tracin.Task(models[-1], loss), tracin.Trajectory(checkpoints[:2]), **options)
    return method, data, [model.state_dict() for model in models[:2]]


def _judged(name: str, states: list) -> Tensor:
    build, data = CAST[name]
    sides = [
        oracle.trajectory_gradients(
            build().double(), tracin.losses.cross_entropy, _double(data(n)), [_double(s) for s in states]
        )
        for n in (N, M)
    ]
    return oracle.scores(*sides, PLAIN[:2])


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(entry) for key, entry in value.items()}
    return tuple(_double(entry) for entry in value)


@pytest.mark.parametrize("name", CAST)
def test_autocast_is_near_and_float32_exact(name: str) -> None:
    expected = None
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 3e-2)):
        method, data, states = _cast(name, precision=precision)
        expected = _judged(name, states) if expected is None else expected
        with oracle.untouched(method.task.model):
            found = method.influence(data(N), data(M))
        assert found.values.dtype == torch.float32
        assert found.provenance["precision"] == precision
        oracle.assert_close(found.values, expected, tolerance, precision)
    with pytest.raises(AssertionError, match="off by"):
        oracle.assert_close(found.values, expected, 1e-5, "bfloat16 rounds")


@pytest.mark.parametrize("name", CAST)
def test_autocast_takes_the_same_routes(name: str) -> None:
    """Casts between a parameter and its layer do not send it the slow way."""
    routes = []
    for precision in ("float32", "bfloat16"):
        method, data, _ = _cast(name, precision=precision)
        table = method.verify(data(N)).coverage
        routes.append(table.by_route())
    assert routes[0] == routes[1]
    assert not any("row" in route and "rows" not in route for route in routes[1])


@pytest.mark.parametrize("name", CAST)
def test_all_verbs_under_autocast_agree(name: str) -> None:
    method, data, _ = _cast(name, precision="bfloat16")
    scores = method.influence(data(N), data(M)).values
    top = method.top_k(data(N), data(M), k=3)
    assert torch.equal(top.proponents.values, scores.topk(3).values)
    own = method.self_influence(data(N)).values
    square = method.influence(data(N), data(N)).values
    assert own.dtype == torch.float32
    oracle.assert_close(own, square.diagonal().double(), 1e-5, "self-influence")


def test_verify_tells_the_error_of_the_rounding() -> None:
    exact, data, _ = _cast("twice")
    rough, _, _ = _cast("twice", precision="bfloat16")
    low, high = exact.verify(data(N)), rough.verify(data(N))
    assert low.max_relative_error < 1e-5, str(low)
    assert 1e-3 < high.max_relative_error < 0.1, "against the model as it is, not against the same rounding"
    assert high.exact
    assert str(high).startswith("right to bfloat16: largest relative error")
    assert "autograd without autocast" in str(high)
    assert str(low).startswith("exact: ")


def test_autocast_of_the_users_own_goes_the_same_way() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return tracin.losses.cross_entropy(model, batch)

    for name in CAST:
        ours, data, _ = _cast(name, precision="bfloat16")
        theirs, _, _ = _cast(name, loss)
        found = theirs.influence(data(N), data(M)).values
        assert torch.equal(found, ours.influence(data(N), data(M)).values), name


def test_an_unknown_precision_names_the_choices() -> None:
    with pytest.raises(OptionError, match=r"precision is 'half'\. Choose one of float32, bfloat16\."):
        _cast("twice", precision="half")
