"""TracInCP with projected gradients, and with a subset of the parameters, against projections of plain autograd's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from gradients.common import normal, seeded
from gradients.test_projection import theory, written_out
from scoring.common import RATES, M, N, method, net, rows, task, trajectory
from tracin.errors import NotFiniteError, OptionError
from tracin.gradients.features import Projector

QUIET: dict[str, Any] = {"batch_size": 4, "device": "cpu", "progress": False}
kinds = pytest.mark.parametrize("kind", ["kronecker", "rank_one"])


def projected(
    gradients: Sequence[oracle.Gradients], model: nn.Module, projection: tracin.Projection
) -> list[oracle.Gradients]:
    """The oracle's gradients times each checkpoint's projection, written out."""
    shapes = {name: p.shape for name, p in model.named_parameters() if name in gradients[0]}
    projector = Projector(projection, shapes)
    return [
        {name: g.double() @ written_out(projector.drawn(at)[name]).mT for name, g in found.items()}
        for at, found in enumerate(gradients)
    ]


def sides(
    model: nn.Module, loss: Any, both: Sequence[Any], states: Sequence[Any], projection: tracin.Projection
) -> list[list[oracle.Gradients]]:
    return [
        projected(oracle.trajectory_gradients(model, loss, side, states), model, projection) for side in both
    ]


def small_sides(projection: tracin.Projection) -> list[list[oracle.Gradients]]:
    states = [checkpoint.load() for checkpoint in trajectory()]
    return sides(net(0), tracin.losses.cross_entropy, (rows(N, 1), rows(M, 2)), states, projection)


# ---------------------------------------------------------------- the verbs


@kinds
@pytest.mark.parametrize("size", [4, 20, 35])
def test_the_verbs(size: int, kind: Any) -> None:
    projection = tracin.Projection(size, seed=3, kind=kind)
    train, queries = small_sides(projection)
    chosen = method(projection=projection)
    expected = oracle.scores(train, queries, RATES)
    oracle.assert_close(chosen.influence(rows(N, 1), rows(M, 2)).values, expected, 1e-11, "influence")
    own = chosen.self_influence(rows(N, 1)).values
    oracle.assert_close(own, oracle.self_influence(train, RATES), 1e-11, "self-influence")
    assert bool((own >= 0).all())
    lists = chosen.top_k(rows(N, 1), rows(M, 2), k=3)
    torch.testing.assert_close(lists.proponents.values, expected.topk(3).values, rtol=1e-10, atol=1e-12)
    assert torch.equal(lists.opponents.ids, (-expected).topk(3).indices)
    cosines = method(projection=projection, normalize=True).influence(rows(N, 1), rows(M, 2)).values
    oracle.assert_close(cosines, oracle.normalized_scores(train, queries, RATES), 1e-11, "normalize")


@kinds
def test_rates_per_parameter(kind: Any) -> None:
    projection = tracin.Projection(25, kind=kind)
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    rates = [dict(zip(names, (0.3, 0.05, 0.0, 0.2), strict=True)), 0.07]
    chosen = tracin.TracInCP(task(), trajectory(rates=rates), projection=projection, **QUIET)
    train, queries = small_sides(projection)
    found = chosen.influence(rows(N, 1), rows(M, 2)).values
    oracle.assert_close(found, oracle.scores(train, queries, rates), 1e-11, "scores")
    own = chosen.self_influence(rows(N, 1)).values
    oracle.assert_close(own, oracle.self_influence(train, rates), 1e-11, "own")


def test_a_size_that_covers_the_model_gives_the_exact_scores() -> None:
    exact = method().influence(rows(N, 1), rows(M, 2)).values
    found = method(projection=51).influence(rows(N, 1), rows(M, 2)).values  # 4·6 + 6 + 6·3 + 3 parameters
    oracle.assert_close(found, exact, 1e-12)
    assert (method(projection=50).influence(rows(N, 1), rows(M, 2)).values - exact).abs().max() > 1e-6


def test_batches_and_memory_change_nothing() -> None:
    expected = method(projection=20).influence(rows(N, 1), rows(M, 2)).values
    for options in ({"batch_size": 1}, {"batch_size": 100}, {"memory": "8kB"}, {"batch_size": "auto"}):
        found = method(projection=20, **options).influence(rows(N, 1), rows(M, 2)).values
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_the_same_seed_gives_the_same_numbers_and_draws_nothing_from_the_user() -> None:
    def scores(seed: int) -> Tensor:
        chosen = method(projection=tracin.Projection(12, seed=seed))
        return chosen.influence(rows(N, 1), rows(M, 2)).values

    first = scores(1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, scores(1))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.allclose(first, scores(2))


@kinds
def test_scores_are_unbiased_over_seeds_and_vary_as_stated(unchecked: None, kind: Any) -> None:
    train, queries = rows(N, 1), rows(M, 2)
    exact = method().influence(train, queries).values
    found = torch.stack(
        [
            method(projection=tracin.Projection(16, seed=seed, kind=kind), batch_size=20)
            .influence(train, queries)
            .values
            for seed in range(120)
        ]
    )
    errors = (found.mean(0) - exact) / (found.std(0) / 120**0.5)
    assert float(errors.abs().max()) < 4.5
    stated = stated_variance(tracin.Projection(16, kind=kind))
    assert 0.8 < float((found.var(0) / stated).mean()) < 1.2


def stated_variance(projection: tracin.Projection) -> Tensor:
    """Σ_c Σ_k w_c² Var, [m, n]: checkpoints and parameters have projections of their own."""
    states = [checkpoint.load() for checkpoint in trajectory()]
    train, queries = (
        oracle.trajectory_gradients(net(0), tracin.losses.cross_entropy, side, states)
        for side in (rows(N, 1), rows(M, 2))
    )
    drawn = Projector(projection, {name: p.shape for name, p in net(0).named_parameters()}).drawn(0)
    out = torch.zeros(M, N, dtype=torch.float64)
    for rate, ours, theirs in zip(RATES, train, queries, strict=True):
        for name, p in drawn.items():
            for row, query in product(range(N), range(M)):
                both = ours[name][row].view(p.shape), theirs[name][query].view(p.shape)
                out[query, row] += rate**2 * theory(p, *both)
    return out


def test_float32() -> None:
    model, given = net(0, torch.float32), trajectory(torch.float32)
    chosen = tracin.TracInCP(task(model), given, projection=20, **QUIET)
    both = rows(N, 1, torch.float32), rows(M, 2, torch.float32)
    states = [checkpoint.load() for checkpoint in given]
    train, queries = sides(model, tracin.losses.cross_entropy, both, states, tracin.Projection(20))
    found = chosen.influence(*both).values
    assert found.dtype == torch.float32
    oracle.assert_close(found, oracle.scores(train, queries, RATES), 1e-5)


# ---------------------------------------------------------------- models


class Tied(nn.Module):
    """A table that is read and written, positions, and a norm: the shape of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 5)
        self.place = nn.Parameter(torch.randn(1, 4, 5))
        self.mix = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.mix(self.tokens(tokens) + self.place))))


def tokens(n: int, seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(0, 9, (n, 5), generator=seeded(seed))
    return drawn[:, :-1], drawn[:, 1:]


def token_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1)


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(n, 2, 9, 8, seed=seed), torch.randint(0, 3, (n,), generator=seeded(seed))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Tanh(),
        nn.Conv2d(6, 24, 3, groups=2), nn.Tanh(), nn.Conv2d(24, 30, 2, dilation=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(60, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "tied": (Tied, tokens, token_loss),
    "convolutional": (convolutional, pictures, tracin.losses.cross_entropy),
}


@kinds
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, kind: Any) -> None:
    make, data, loss = MODELS[name]
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(make().double().state_dict())
    model = make().double()
    steps = [tracin.Checkpoint(state, learning_rate=r) for state, r in zip(states, RATES, strict=True)]
    projection = tracin.Projection(120, kind=kind)
    both = data(7, 1), data(3, 2)
    train, queries = sides(model, loss, both, states, projection)
    chosen = tracin.TracInCP(
        tracin.Task(model, loss), tracin.Trajectory(steps), projection=projection, **QUIET
    )
    oracle.assert_close(chosen.influence(*both).values, oracle.scores(train, queries, RATES), 1e-10, name)
    oracle.assert_close(
        chosen.self_influence(both[0]).values, oracle.self_influence(train, RATES), 1e-10, name
    )


def test_queries_that_use_other_parameters() -> None:
    """A query loss on the hidden layer: the head has no gradient there."""

    def hidden(model: nn.Module, batch: Any) -> Tensor:
        return model[:2](batch[0]).square().sum(1)

    projection = tracin.Projection(20)
    states = [checkpoint.load() for checkpoint in trajectory()]
    train, _ = small_sides(projection)
    (queries,) = sides(net(0), hidden, (rows(M, 2),), states, projection)
    chosen = tracin.TracInCP(task(query_loss=hidden), trajectory(), projection=projection, **QUIET)
    oracle.assert_close(
        chosen.influence(rows(N, 1), rows(M, 2)).values, oracle.scores(train, queries, RATES), 1e-11
    )


# ---------------------------------------------------------------- what is told


def test_the_plan_and_the_check_and_the_record() -> None:
    chosen = method(projection=tracin.Projection(20, seed=7))
    plan = chosen.plan(rows(N, 1), rows(M, 2))
    assert sum(route.bytes_per_query for route in plan.routes) <= 20 * 8
    assert [route.route for route in plan.routes] == ["rule Linear"] * 2
    check = chosen.verify(rows(N, 1))
    assert check.exact
    record = chosen.influence(rows(N, 1), rows(M, 2)).provenance
    assert record["projection"] == {"size": 20, "seed": 7, "kind": "kronecker"}
    assert record["seed"] == 7
    assert json.loads(json.dumps(record)) == record
    assert method().influence(rows(N, 1), rows(M, 2)).provenance["projection"] is None


def test_a_gradient_that_is_not_finite_is_named() -> None:
    def length(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().sum(1).sqrt()

    model, train = nn.Linear(4, 3, bias=False).double(), rows(N, 1)
    train[0][6] = 0.0
    steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    chosen = tracin.TracInCP(tracin.Task(model, length), steps, projection=5, **QUIET)
    with pytest.raises(NotFiniteError, match=r"row 6.*weight"):
        chosen.self_influence(train)
    with pytest.raises(NotFiniteError, match=r"row 6.*weight"):
        chosen.influence(rows(N, 2), train)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As for a user: without the types that the tests check before our own messages come up."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("given", [0, -1, True, "512", 3.5, {"size": 3}])
def test_other_projections_are_refused(given: Any, unchecked: None) -> None:
    with pytest.raises(OptionError, match=r"rojection.*Give a (whole )?number"):
        method(projection=given)


def test_fewer_features_than_parameters_is_refused() -> None:
    with pytest.raises(OptionError, match=r"size is 3, but 4 parameters.*Task\(parameters="):
        method(projection=3).self_influence(rows(N, 1))
    only = tracin.TracInCP(task(parameters="2.*"), trajectory(), projection=3, **QUIET)
    assert only.self_influence(rows(N, 1)).values.shape == (N,)


# ---------------------------------------------------------------- a subset of the parameters


PASSED: list[Tensor] = []  # outside the model, which scoring gives back as it was


class Watched(nn.Module):
    """Notes when the backward pass comes by."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(PASSED.append)
        return x.clone()


@pytest.mark.parametrize(
    ("globs", "below"),
    [("*", True), ("0.*", True), (("0.bias", "4.*"), True), ("4.*", False), ("4.bias", False)],
)
@pytest.mark.parametrize("projection", [None, 12])
def test_the_backward_pass_stops_at_the_deepest_traced_layer(
    globs: Any, below: bool, projection: int | None
) -> None:
    """Only then does a subset cost less; with a parameter below traced, the hook is reached."""

    def deep(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Linear(4, 6), Watched(), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3)
            ).double()

    model = deep(0)
    steps = [tracin.Checkpoint(deep(at).state_dict(), learning_rate=rate) for at, rate in enumerate(RATES)]
    chosen = tracin.TracInCP(
        tracin.Task(model, tracin.losses.cross_entropy, parameters=globs),
        tracin.Trajectory(steps),
        projection=projection,
        **QUIET,
    )
    PASSED.clear()
    found = chosen.influence(rows(N, 1), rows(M, 2)).values
    assert bool(PASSED) == below
    if projection is None:
        names = [name for name in deep(0).state_dict() if name in chosen.task.select().traced]
        states = [checkpoint.load() for checkpoint in steps]
        both = [
            oracle.trajectory_gradients(deep(0), tracin.losses.cross_entropy, side, states, names)
            for side in (rows(N, 1), rows(M, 2))
        ]
        oracle.assert_close(found, oracle.scores(*both, RATES), 1e-11, str(globs))
