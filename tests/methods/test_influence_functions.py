"""InfluenceFunctions by its own words: scores, lists, self-influence, curvature data, provenance, refusals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from curvature.common import (
    DOUBLE,
    M,
    N,
    Tied,
    cnn,
    flat_rows,
    gauss_newton,
    hessian,
    mlp,
    once,
    pictures,
    row_gradients,
    softmax_hessian,
)
from tracin.errors import DataError, ModelError, NotFiniteError, OptionError, TracinError
from tracin.scoring.run import Run

LOSS = tracin.losses.cross_entropy
DAMPING = 0.02
QUIET: dict[str, Any] = {"batch_size": 8, "device": "cpu", "progress": False}
MAKERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (mlp, flat_rows),
    "cnn": (cnn, pictures),
    "tied": (lambda: Tied().double(), flat_rows),
}


def method(model: nn.Module, **options: Any) -> tracin.InfluenceFunctions:
    own = {key: options.pop(key) for key in ("loss", "query_loss", "parameters") if key in options}
    task = tracin.Task(model, own.pop("loss", LOSS), **own)
    at = tracin.Checkpoint(model.state_dict())
    return tracin.InfluenceFunctions(task, at, **{**QUIET, "damping": DAMPING, **options})


def seeded_model(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return make()


def truth(
    model: nn.Module, matrix: Tensor, train: Any, queries: Any, damping: float = DAMPING, **kinds: Any
) -> Tensor:
    names = kinds.get("names")
    g = row_gradients(model, LOSS, train, names)
    asked = row_gradients(model, kinds.get("query_loss", LOSS), queries, names)
    return asked @ torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=DOUBLE), g.T)


@pytest.mark.parametrize("solver", ["exact", "cg"])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("name", MAKERS)
def test_scores_against_the_obvious_matrix(name: str, curvature: str, solver: str) -> None:
    make, rows = MAKERS[name]
    model = seeded_model(make)
    train, queries = rows(N, 1), rows(M, 7)
    matrix = (
        hessian(model, LOSS, train) if curvature == "hessian" else gauss_newton(model, train, softmax_hessian)
    )
    damping = DAMPING - min(0.0, 1.5 * float(torch.linalg.eigvalsh(matrix)[0]))
    chosen = method(model, curvature=curvature, solver=solver, damping=damping)
    with oracle.untouched(model, train, queries):
        found = chosen.influence(train, queries)
    expected = truth(model, matrix, train, queries, damping)
    oracle.assert_close(found.values, expected, 1e-8)
    top = chosen.top_k(train, queries, k=4)
    best = expected.topk(4, 1)
    oracle.assert_close(top.proponents.values, best.values, 1e-8)
    assert torch.equal(top.proponents.ids, best.indices)
    assert torch.equal(top.opponents.ids, (-expected).topk(4, 1).indices)
    own = truth(model, matrix, train, train, damping).diagonal()
    oracle.assert_close(chosen.self_influence(train).values, own, 1e-8, "own")


@pytest.mark.parametrize("solver", ["exact", "cg", "ekfac"])
def test_tiles_and_batches_do_not_matter(solver: str) -> None:
    model, train, queries = cnn(), pictures(N, 1), pictures(M, 7)
    p = sum(parameter.numel() for parameter in model.parameters())
    results = []
    for options in (
        {"batch_size": 100},
        {"batch_size": 3, "memory": 3 * 8 * p * p + 2 * p * 8 * 20},
    ):
        chosen = method(model, solver=solver, **options)
        top = chosen.top_k(train, queries, k=3)
        results.append(
            (
                chosen.influence(train, queries).values,
                chosen.self_influence(train).values,
                top.proponents.values,
                top.opponents.values,
            )
        )
    for whole, tiled in zip(*results, strict=True):
        oracle.assert_close(tiled, whole, 1e-8)


def test_a_subset_of_parameters_and_another_query_loss() -> None:
    def margin(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0] - model(batch[0])[:, 1]

    names = ["0.bias", "2.weight"]
    model, train, queries = mlp(), flat_rows(N, 1), flat_rows(M, 7)
    found = method(model, parameters=names, query_loss=margin).influence(train, queries)
    matrix = gauss_newton(model, train, softmax_hessian, names)
    oracle.assert_close(
        found.values, truth(model, matrix, train, queries, names=names, query_loss=margin), 1e-8
    )
    assert found.provenance["coverage"]["excluded"] == 27


def test_parameters_that_the_queries_do_not_use_still_count() -> None:
    """The curvature carries a query's gradient over to parameters that the query loss never reads."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.body(x))
            return self.head(h) + self.other(h)

    def first(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(
            model.head(torch.tanh(model.body(batch[0]))), batch[1], reduction="none"
        )

    model, train, queries = seeded_model(lambda: Two().double()), flat_rows(N, 1), flat_rows(M, 7)
    matrix = gauss_newton(model, train, softmax_hessian)
    found = method(model, query_loss=first).influence(train, queries).values
    oracle.assert_close(found, truth(model, matrix, train, queries, query_loss=first), 1e-8)


def test_ten_rows_never_build_the_curvature() -> None:
    model, everything, queries = mlp(), flat_rows(N, 1), flat_rows(M, 7)
    ten = everything[0][:10], everything[1][:10]
    matrix = gauss_newton(model, everything, softmax_hessian)
    whole = method(model).influence(everything, queries)
    assert whole.provenance["curvature_rows"] == N
    assert whole.provenance["curvature_data"] == "train"
    given = method(model, curvature_data=everything)
    few = given.influence(ten, queries)
    oracle.assert_close(few.values, truth(model, matrix, ten, queries), 1e-8)
    oracle.assert_close(few.values, whole.values[:, :10], 1e-10)
    assert few.provenance["curvature_rows"] == N
    assert few.provenance["curvature_data"] == "given"
    assert "score / n" in few.provenance["scale"]
    own = given.self_influence(ten).values
    oracle.assert_close(own, truth(model, matrix, ten, ten).diagonal(), 1e-8)
    # Queries are scored with the curvature of the train set, never with their own.
    alone = method(model).influence(ten, queries).values
    assert float((alone - few.values).abs().max()) > 0.05 * float(few.values.abs().max())
    with pytest.raises(OptionError, match="positive definite"):
        method(model, damping=0.0, curvature_data=ten).influence(everything, queries)


@pytest.mark.parametrize("solver", ["cg", "lissa", "ekfac"])
def test_curvature_data_of_every_solver(solver: str) -> None:
    model, everything, queries = mlp(), flat_rows(N, 1), flat_rows(M, 7)
    ten = everything[0][:10], everything[1][:10]
    options: dict[str, Any] = {"solver": solver, "damping": 0.3}
    whole = method(model, **options).influence(everything, queries).values[:, :10]
    found = method(model, curvature_data=everything, **options).influence(ten, queries).values
    oracle.assert_close(found, whole, 1e-9)


def test_within_a_class() -> None:
    model, train, queries = mlp(), flat_rows(N, 1), flat_rows(M, 7)
    chosen = method(model)
    scores = chosen.influence(train, queries).values
    found = chosen.top_k(train, queries, k=2, within="label")
    for row in range(M):
        same = train[1] == queries[1][row]
        assert bool(same[found.proponents.ids[row]].all())
        assert float(found.proponents.values[row, 0]) == pytest.approx(float(scores[row][same].max()))
    with pytest.raises(OptionError, match="only"):
        chosen.top_k(train, queries, k=N, within=0)


def test_float32_in_float32_out() -> None:
    double, single = cnn(), cnn(torch.float32)
    single.load_state_dict(double.state_dict())
    exact = method(double).influence(pictures(N, 1), pictures(M, 7)).values
    for solver, tolerance in (("exact", 1e-4), ("cg", 1e-2)):
        found = method(single, solver=solver).influence(
            pictures(N, 1, torch.float32), pictures(M, 7, torch.float32)
        )
        assert found.values.dtype == torch.float32
        oracle.assert_close(found.values, exact, tolerance, solver)


def test_provenance_tells_the_solution() -> None:
    model, train, queries = mlp(), flat_rows(N, 1), flat_rows(M, 7)
    told = {
        solver: method(model, solver=solver, damping=None).influence(train, queries).provenance
        for solver in ("exact", "cg", "lissa", "ekfac")
    }
    for solver, record in told.items():
        assert json.loads(json.dumps(record)) == record
        assert record["method"] == "InfluenceFunctions"
        assert (record["curvature"], record["solver"]) == ("gauss_newton", solver)
        assert record["mean_eigenvalue"] == pytest.approx(told["exact"]["mean_eigenvalue"])
    assert told["cg"]["damping_rule"] == "0.1 × mean eigenvalue (exact)"
    assert told["cg"]["solution"]["residual"] < 1e-9
    assert told["lissa"]["solution"]["residual"] <= 0.05
    assert told["ekfac"]["solution"]["factored"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    bent = method(model, curvature="hessian", damping=None).self_influence(train).provenance
    assert bent["lambda_min"] < 0 < bent["damping"]


def test_verify_and_plan() -> None:
    model, train, queries = mlp(), flat_rows(N, 1), flat_rows(M, 7)
    verified = method(model).verify(train)
    assert verified.exact
    assert verified.coverage.fraction == 1.0
    base = tracin.TracInCP(
        tracin.Task(model, LOSS),
        tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.3)]),
        **QUIET,
    ).plan(train, queries)
    for solver in ("exact", "cg", "lissa", "ekfac"):
        plan = method(model, solver=solver).plan(train, queries)
        assert plan.passes > base.passes
        assert plan.peak_bytes > base.peak_bytes
        assert plan.seconds > 0
    with pytest.raises(OptionError, match="GiB"):
        method(model, memory=10_000).plan(train, queries)


@pytest.mark.parametrize("memory", ["1GiB", 20_000])
@pytest.mark.parametrize(
    "options",
    [{"solver": "exact"}, {"solver": "ekfac"}, {"solver": "exact", "curvature": "hessian", "damping": 2.0}],
)
def test_a_plan_counts_the_passes_of_the_run(
    options: dict[str, Any], memory: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: Counter[str] = Counter()
    batches = Run.batches

    def counted(run: Run, source: Any, **kinds: Any) -> Any:
        passes[source.rows.name] += 1
        return batches(run, source, **kinds)

    names = ["0.bias", "2.bias"]
    chosen = method(mlp(), parameters=names, memory=memory, **options)
    train, queries = flat_rows(N, 1), flat_rows(40, 7)
    plan = chosen.plan(train, queries)
    monkeypatch.setattr(Run, "batches", counted)
    chosen.influence(train, queries)
    assert plan.passes == passes["train"]
    assert (plan.passes > 3) == (memory == 20_000)


def test_a_plan_of_ekfac_makes_no_products() -> None:
    chosen = method(once(), solver="ekfac")
    assert chosen.plan(flat_rows(N, 1), flat_rows(M, 7)).passes == 3
    with pytest.raises(ModelError, match="@once_differentiable"):
        method(once(), solver="cg").plan(flat_rows(N, 1), flat_rows(M, 7))


def test_provenance_has_the_seed_of_what_was_drawn_and_the_rows_that_were_given() -> None:
    model, train, queries = mlp(), flat_rows(N, 1), flat_rows(M, 7)

    def record(**options: Any) -> dict[str, Any]:
        return method(model, **{"seed": 5, "damping": None, **options}).influence(train, queries).provenance

    for options, seed in (
        ({"solver": "exact"}, None),
        ({"solver": "cg"}, None),
        ({"solver": "ekfac"}, None),
        ({"solver": "ekfac", "samples": 2}, 5),
        ({"solver": "lissa"}, 5),
        ({"solver": "cg", "curvature": "hessian"}, 5),
        ({"solver": "exact", "curvature": "hessian"}, None),
    ):
        assert record(**options)["seed"] == seed, options
    assert "curvature_digest" not in record()
    other = train[0].clone(), train[1]
    other[0][3, 0] += 1e-3
    given = record(curvature_data=train)["curvature_digest"]
    assert given == record(curvature_data=train, batch_size=5)["curvature_digest"]
    assert given != record(curvature_data=other)["curvature_digest"]


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"curvature": "fisher"}, "curvature is 'fisher'. Choose one of gauss_newton, hessian"),
    ({"solver": "newton"}, "solver is 'newton'. Choose one of exact, cg, lissa, ekfac"),
    ({"solver": "ekfac", "curvature": "hessian"}, "approximates Gauss-Newton, not the Hessian"),
    ({"damping": -0.1}, "damping is -0.1"),
    ({"damping": float("nan")}, "damping is nan"),
    ({"damping": "1"}, "damping is '1'"),
    ({"tolerance": 0.1}, "tolerance is read by solver='cg' or 'lissa', not by 'exact'"),
    ({"solver": "cg", "tolerance": 0.0}, "tolerance is 0.0"),
    ({"solver": "cg", "tolerance": float("inf")}, "tolerance is inf"),
    ({"solver": "cg", "iterations": 2.5}, "iterations is 2.5"),
    ({"solver": "cg", "iterations": 50.0}, "iterations is 50.0. Give a positive whole number"),
    ({"solver": "ekfac", "samples": 1.0}, "samples is 1.0"),
    ({"solver": "lissa", "damping": 0}, "damping is 0: solver='lissa' needs a positive one"),
    ({"solver": "cg", "damping": 0.0}, "damping is 0: solver='cg' needs a positive one"),
    ({"solver": "ekfac", "damping": 0.0}, "damping is 0: solver='ekfac' needs a positive one"),
    ({"damping": float("inf")}, "damping is inf"),
    ({"solver": "cg", "scale": 2.0}, "scale is read by solver='lissa'"),
    ({"solver": "lissa", "samples": 1}, "samples is read by solver='ekfac'"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"memory": "much"}, "memory is 'much'"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        method(mlp(), **options)
    assert message in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_a_trajectory_is_not_a_checkpoint() -> None:
    model = mlp()
    at = tracin.Trajectory([tracin.Checkpoint(model.state_dict())])
    with pytest.raises(OptionError, match=r"trajectory\[-1\]"):
        tracin.InfluenceFunctions(tracin.Task(model, LOSS), at)  # type: ignore[arg-type]


def test_refusals_leave_the_model_as_it_was() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        return LOSS(model, batch) + sum(p.square().sum() for p in model.parameters())

    model, train = mlp(), flat_rows(N, 1)
    refused: list[tuple[type[TracinError], str, Callable[[], object]]] = [
        (ModelError, "past the model's output", lambda: method(model, loss=penalised).self_influence(train)),
        (OptionError, "more than memory", lambda: method(model, memory=10_000).self_influence(train)),
        (OptionError, "k is 99", lambda: method(model).top_k(train, flat_rows(M, 7), k=99)),
        (DataError, "curvature_data is empty", lambda: method(model, curvature_data=flat_rows(0, 1)).self_influence(train)),
        (OptionError, "rows is 0", lambda: method(model).verify(train, rows=0)),
    ]  # fmt: skip
    for kind, message, call in refused:
        with oracle.untouched(model, train), pytest.raises(kind, match=message):
            call()
    broken = train[0].clone(), train[1]
    broken[0][12, 1] = float("nan")
    with oracle.untouched(model), pytest.raises(NotFiniteError, match="row 12"):
        method(model).self_influence(broken)
    queries = flat_rows(M, 7)
    queries[0][3, 0] = float("inf")
    with oracle.untouched(model), pytest.raises(NotFiniteError, match="row 3"):
        method(model).influence(train, queries)


def test_curvature_data_that_changes_between_passes() -> None:
    class Noisy(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.rows, self.reads = flat_rows(N, 1), 0

        def __len__(self) -> int:
            return N

        def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
            self.reads += 1
            return self.rows[0][at] + self.reads, self.rows[1][at]

    model, train = mlp(), flat_rows(N, 1)
    with pytest.raises(DataError, match="curvature_data: row 0 changed between two passes"):
        method(model, solver="cg", curvature_data=Noisy()).influence(train, flat_rows(M, 7))
