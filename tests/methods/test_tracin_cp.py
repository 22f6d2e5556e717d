"""TracInCP by its own words: weightings, rates, notes, warnings, provenance, dtypes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from scoring.common import RATES, M, N, method, net, rows, task, trajectory
from tracin.errors import AdaptiveOptimizerWarning, OptionError, RateError

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
QUIET: dict[str, Any] = {"batch_size": 4, "device": "cpu", "progress": False}


def truth(rates: Any, judge: Any = oracle.scores, dtype: torch.dtype = torch.float64) -> Tensor:
    states = [checkpoint.load() for checkpoint in trajectory(dtype)]
    how = oracle.gradients_alone if dtype == torch.float64 else oracle.gradients_in_graph
    sides = [
        oracle.trajectory_gradients(net(0, dtype), tracin.losses.cross_entropy, side, states, how=how)
        for side in (rows(N, 1, dtype), rows(M, 2, dtype))
    ]
    return judge(*sides, rates)


def steps(**fields: Any) -> tracin.Trajectory:
    """The two checkpoints with these fields, one value each."""
    return tracin.Trajectory(
        [
            tracin.Checkpoint(
                net(10 + at).state_dict(), step=at, **{key: value[at] for key, value in fields.items()}
            )
            for at in range(2)
        ]
    )


WEIGHTINGS: dict[str, tuple[Any, Any]] = {
    "learning_rate": (RATES, RATES),
    "integrated": ((2.5, 0.4), (2.5, 0.4)),
    "uniform": (None, (1.0, 1.0)),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_reads_its_own_rate(weighting: str) -> None:
    both = steps(learning_rate=RATES, learning_rate_sum=(2.5, 0.4))
    found = tracin.TracInCP(task(), both, weighting=weighting, **QUIET).influence(rows(N, 1), rows(M, 2))
    oracle.assert_close(found.values, truth(WEIGHTINGS[weighting][1]), 1e-12, weighting)
    assert found.provenance["weighting"] == weighting


def test_a_weighting_asks_for_nothing_else() -> None:
    only = {
        "learning_rate": steps(learning_rate=RATES),
        "integrated": steps(learning_rate_sum=RATES),
        "uniform": steps(),
    }
    for weighting, given in only.items():
        assert (
            tracin.TracInCP(task(), given, weighting=weighting, **QUIET)
            .self_influence(rows(N, 1))
            .values.all()
        )
        for other, missing in only.items():
            if weighting not in {other, "uniform"}:
                with pytest.raises(RateError, match="step 0"):
                    tracin.TracInCP(task(), missing, weighting=weighting, **QUIET).self_influence(rows(N, 1))


def test_rates_per_parameter() -> None:
    rates = [dict(zip(NAMES, (0.3, 0.05, 0.0, 0.2), strict=True)), 0.07]
    chosen = tracin.TracInCP(task(), steps(learning_rate=rates), **QUIET)
    oracle.assert_close(chosen.influence(rows(N, 1), rows(M, 2)).values, truth(rates), 1e-12)


def test_rates_per_parameter_where_a_pair_goes_row_by_row() -> None:
    """A weight and its bias multiplied out side by side still have a rate each."""

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            far = x[:, :1] > 50
            return (
                torch.where(far, x @ self.layer.weight.T + 2 * self.layer.bias, out)
                if bool(far.any())
                else out
            )

    model = Careful().double()
    states, rate = [model.state_dict()], [{"layer.weight": 0.3, "layer.bias": 0.04}]
    train, queries = rows(N, 1), rows(M, 2)
    train[0][2, 0], queries[0][1, 0] = 60.0, 70.0  # among the probe's rows is neither
    loss = tracin.losses.cross_entropy
    sides = [oracle.trajectory_gradients(model, loss, side, states) for side in (train, queries)]
    chosen = tracin.TracInCP(
        tracin.Task(model, loss),
        tracin.Trajectory([tracin.Checkpoint(states[0], learning_rate=rate[0])]),
        **QUIET,
    )
    oracle.assert_close(chosen.influence(train, queries).values, oracle.scores(*sides, rate), 1e-12, "scores")
    oracle.assert_close(
        chosen.self_influence(train).values, oracle.self_influence(sides[0], rate), 1e-12, "own"
    )


@pytest.mark.parametrize("small", [False, True])
def test_normalize_is_a_sum_of_cosines(small: bool, request: pytest.FixtureRequest) -> None:
    if small:
        request.getfixturevalue("smallest_tiles")
    found = method(normalize=True).influence(rows(N, 1), rows(M, 2)).values
    oracle.assert_close(found, truth(RATES, oracle.normalized_scores), 1e-12)
    assert float(found.abs().max()) <= sum(RATES) + 1e-12


def test_query_loss_and_a_subset_of_parameters() -> None:
    def margin(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0] - model(batch[0])[:, 1]

    chosen = tracin.TracInCP(task(query_loss=margin, parameters=["2.*", "0.bias"]), trajectory(), **QUIET)
    states = [checkpoint.load() for checkpoint in trajectory()]
    names = ["0.bias", "2.weight", "2.bias"]
    train = oracle.trajectory_gradients(net(0), tracin.losses.cross_entropy, rows(N, 1), states, names)
    queries = oracle.trajectory_gradients(net(0), margin, rows(M, 2), states, names)
    found = chosen.influence(rows(N, 1), rows(M, 2))
    oracle.assert_close(found.values, oracle.scores(train, queries, RATES), 1e-12)
    assert found.provenance["task"] == {
        "model": "Sequential", "loss": "cross_entropy", "query_loss": "margin", "parameters": ["2.*", "0.bias"]
    }  # fmt: skip
    assert found.provenance["coverage"] == {"rule Linear": 27, "excluded": 24}


def test_an_adaptive_optimizer_is_told_once() -> None:
    recorded = steps(learning_rate=RATES, optimizer=("AdamW", "AdamW"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        chosen = tracin.TracInCP(task(), recorded, **QUIET)
        chosen.influence(rows(N, 1), rows(M, 2))
        chosen.top_k(rows(N, 1), rows(M, 2), k=2)
        chosen.self_influence(rows(N, 1))
        chosen.verify(rows(N, 1))
        chosen.plan(rows(N, 1), rows(M, 2))
    (warning,) = [w for w in seen if issubclass(w.category, AdaptiveOptimizerWarning)]
    assert "AdamW" in str(warning.message)


@pytest.mark.parametrize("optimizer", [("SGD", "SGD"), (None, None)])
def test_sgd_and_the_unknown_are_not_warned_of(optimizer: Any) -> None:
    tracin.TracInCP(task(), steps(learning_rate=RATES, optimizer=optimizer), **QUIET)


def large_rows(scale: float) -> tuple[Tensor, Tensor]:
    """Sixty rows; four have gradients ``scale`` times as long, and for any query two of these pull either way."""
    x, y = rows(60, 1)
    x[:4] = scale * x[:1] * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    y[:4] = 0
    return x, y


def test_a_few_rows_that_fill_every_list_are_noted() -> None:
    loud, quiet = large_rows(1e4), large_rows(1.0)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(1e-6)
    linear = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    chosen = tracin.TracInCP(task(model), linear, **QUIET)
    (note,) = chosen.top_k(loud, rows(40, 2), k=2).notes
    assert "normalize=True" in note
    assert "rows fill" in note
    assert chosen.top_k(quiet, rows(40, 2), k=2).notes == ()
    assert (
        tracin.TracInCP(task(model), linear, normalize=True, **QUIET).top_k(loud, rows(40, 2), k=2).notes
        == ()
    )
    assert chosen.top_k(loud, rows(4, 2), k=2).notes == (), "four queries are too few to speak of all"
    assert chosen.top_k(loud, rows(40, 2), k=30).notes == (), "long lists hold half of all rows by themselves"


RESULTS: dict[str, Any] = {
    "influence": lambda chosen: chosen.influence(rows(N, 1), rows(M, 2)),
    "top_k": lambda chosen: chosen.top_k(rows(N, 1), rows(M, 2), k=2, within="label"),
    "self_influence": lambda chosen: chosen.self_influence(rows(N, 1)),
}


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, tracin.TopK):
        lists = (result.proponents, result.opponents)
        return [result.query_ids, *(tensor for ranking in lists for tensor in (ranking.ids, ranking.values))]
    ids = [result.train_ids, *([result.query_ids] if isinstance(result, tracin.Scores) else [])]
    return [result.values, *ids]


@pytest.mark.parametrize("verb", RESULTS)
def test_provenance_is_plain_json_and_survives_saving(verb: str, tmp_path: Path) -> None:
    rates = [dict(zip(NAMES, (0.3, 0.05, 0.01, 0.2), strict=True)), 0.07]
    found = RESULTS[verb](tracin.TracInCP(task(), steps(learning_rate=rates), **QUIET))
    told = json.loads(json.dumps(dict(found.provenance)))
    assert told == dict(found.provenance), "nothing in it is changed by JSON"
    assert told["method"] == "TracInCP"
    assert told["verb"] == verb
    assert [checkpoint["step"] for checkpoint in told["checkpoints"]] == [0, 1]
    assert told["checkpoints"][1]["learning_rate"] == 0.07
    assert told["dtype"] == "float64"
    assert told["device"] == "cpu"
    assert set(told["versions"]) == {"tracin", "torch", "python"}
    found.save(tmp_path / "result.safetensors")
    again = type(found).load(tmp_path / "result.safetensors")
    assert dict(again.provenance) == dict(found.provenance)
    for one, other in zip(flat(found), flat(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("verb", RESULTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_same_numbers_twice(verb: str, dtype: torch.dtype) -> None:
    def ask(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        chosen = tracin.TracInCP(task(net(0, dtype)), trajectory(dtype), **QUIET)
        side = {"train": rows(N, 1, dtype), "queries": rows(M, 2, dtype)}
        if verb == "influence":
            return flat(chosen.influence(**side))
        return flat(chosen.top_k(**side, k=3) if verb == "top_k" else chosen.self_influence(side["train"]))

    with torch.random.fork_rng():
        first, second = ask(1), ask(2)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), "two runs differ"


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)], ids=str
)
def test_narrow_models_accumulate_in_float32(dtype: torch.dtype, limit: float) -> None:
    """The gradients have the model's rounding, as autograd's have; what is summed from them has float32's."""
    chosen = tracin.TracInCP(task(net(0, dtype)), trajectory(dtype), device="cpu", progress=False)
    found = chosen.influence(rows(N, 1, dtype), rows(M, 2, dtype))
    assert found.values.dtype == torch.float32
    assert found.provenance["dtype"] == "float32"
    oracle.assert_close(found.values, truth(RATES, dtype=dtype), limit, str(dtype))
    assert chosen.self_influence(rows(N, 1, dtype)).values.dtype == torch.float32
    verified = chosen.verify(rows(N, 1, dtype))
    assert verified.exact, str(verified)
    assert verified.coverage.by_route() == {"rule Linear": 51}


def test_bfloat16_products_are_not_rounded_to_bfloat16() -> None:
    """A sum of 4,096 equal products: bfloat16 would stop counting at 256 of them."""
    model = nn.Linear(4096, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.zero_()
    x = torch.ones(3, 4096, dtype=torch.bfloat16)
    asked = tracin.Task(model, lambda m, batch: m(batch[0])[:, 0])
    states = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=1.0)])
    found = tracin.TracInCP(asked, states, **QUIET).influence((x,), (x[:2],))
    assert torch.equal(found.values, torch.full((2, 3), 4096.0))


def test_verify_tells_rows_checkpoints_and_errors() -> None:
    found = method().verify(rows(30, 1), rows=8, seed=3)
    assert found.exact
    assert found.max_relative_error < 1e-12
    assert found.tolerance == 1e-9
    assert (len(found.rows), len(set(found.rows))) == (8, 8)
    assert list(found.rows) == sorted(found.rows)
    assert found.checkpoints == 2
    assert set(found.errors) == set(NAMES)
    assert found.coverage.fraction == 1.0
    assert method().verify(rows(30, 1), rows=8, seed=3).rows == found.rows, "the same seed, the same rows"
    assert method().verify(rows(30, 1), rows=8, seed=4).rows != found.rows
    assert method().verify(rows(3, 1)).rows == (0, 1, 2), "all of them, where there are fewer"
    assert "exact: largest relative error" in str(found)
    assert "8 rows × 2 checkpoints" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weighting": "rate"}, "learning_rate, integrated, uniform"),
        ({"batch_size": 0}, "at least 1"),
        ({"memory": "much"}, "2GiB"),
    ],
)
def test_options_are_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tracin.TracInCP(task(), trajectory(), **{**QUIET, **change})


def test_ids_are_positions() -> None:
    found = method().influence(rows(N, 1), rows(M, 2))
    assert torch.equal(found.train_ids, torch.arange(N))
    assert torch.equal(found.query_ids, torch.arange(M))
    assert found.values.shape == (M, N)
    assert torch.equal(method().top_k(rows(N, 1), rows(M, 2), k=2).query_ids, torch.arange(M))
