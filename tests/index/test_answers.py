"""What an index answers, against the method's own exact scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import tracin
from index.indexing import RATES, M, N, by_parameter, entries, files, method, net, rows
from tracin.errors import IndexFolderError

WHOLE = entries(net(0))  # as many features as parameters: nothing is projected


def off(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tracin.Index:
    folder = tmp_path_factory.mktemp("whole") / "index"
    return tracin.Index.build(
        method(), rows(N, 1), folder, projection=WHOLE, dtype="float32", shard_rows=10,
        columns={"label": rows(N, 1)[1], "name": [f"row {at}" for at in range(N)]},
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rates": [by_parameter(rate) for rate in RATES]},
        {"weighting": "uniform"},
        {"normalize": True},
    ],
    ids=["rates", "rates by parameter", "uniform", "cosines"],
)
def test_without_projecting_it_is_exact(tmp_path: Path, options: dict[str, Any]) -> None:
    own = method(**options)
    train, queries = rows(N, 1), rows(M, 2)
    index = tracin.Index.build(own, train, tmp_path, projection=WHOLE, dtype="float32", shard_rows=10)
    truth = own.influence(train, queries).values
    assert off(index.influence(queries).values, truth) < 1e-6
    top, exact = index.top_k(queries, 5), own.top_k(train, queries, 5)
    assert torch.equal(top.proponents.ids, exact.proponents.ids)
    assert torch.equal(top.opponents.ids, exact.opponents.ids)
    assert off(top.opponents.values, exact.opponents.values) < 1e-6
    if not own.settings.normalize:
        assert off(index.self_influence().values, own.self_influence(train).values) < 1e-6


def test_weighting_is_chosen_when_asked(tmp_path: Path) -> None:
    """Nothing kept contains a rate: an index built under one weighting answers under another."""
    train, queries = rows(N, 1), rows(M, 2)
    tracin.Index.build(method(), train, tmp_path, projection=WHOLE, dtype="float32")
    other = method(weighting="uniform")
    found = tracin.Index.open(tmp_path, other).influence(queries, estimate=False).values
    assert off(found, other.influence(train, queries).values) < 1e-6


def test_projection_is_the_method_s_own(tmp_path: Path) -> None:
    """The index is the same estimate as the method gives under the same projection."""
    projection = tracin.Projection(64, seed=3)
    train, queries = rows(N, 1), rows(M, 2)
    index = tracin.Index.build(
        method(), train, tmp_path, projection=projection, dtype="float32", shard_rows=10
    )
    truth = method(projection=projection).influence(train, queries).values
    assert off(index.influence(queries).values, truth) < 1e-5


def test_half_precision_is_close(tmp_path: Path, whole: tracin.Index) -> None:
    train, queries = rows(N, 1), rows(M, 2)
    half = tracin.Index.build(method(), train, tmp_path, projection=WHOLE, shard_rows=10)
    assert 1e-6 < off(half.influence(queries).values, whole.influence(queries).values) < 2e-3
    assert half.info().nbytes < 0.6 * whole.info().nbytes


def test_aggregate_is_the_mean_over_the_queries(whole: tracin.Index) -> None:
    queries = rows(M, 2)
    each = whole.influence(queries).values
    everything = whole.aggregate(queries)
    assert off(everything.values[0], each.mean(0)) < 1e-5
    by = torch.tensor([7, 2, 7, 2, 2, 5, 7])
    grouped = whole.aggregate(queries, by=by)
    assert grouped.query_ids.tolist() == [2, 5, 7]
    for at, group in enumerate([2, 5, 7]):
        assert off(grouped.values[at], each[by == group].mean(0)) < 1e-5
    assert grouped.provenance["group_sizes"] == [3, 1, 3]
    totals = whole.aggregate(queries, by="label", reduction="sum")
    labels = queries[1]
    assert totals.query_ids.tolist() == labels.unique().tolist()
    for at, label in enumerate(labels.unique()):
        assert off(totals.values[at], each[labels == label].sum(0)) < 1e-5


def test_it_agrees_with_the_method_s_own_aggregate(whole: tracin.Index) -> None:
    for options in ({}, {"by": "label"}, {"by": [1, 1, 0, 2, 0, 1, 2], "reduction": "sum"}):
        found = whole.aggregate(rows(M, 2), **options)
        truth = method().aggregate(rows(N, 1), rows(M, 2), **options)
        assert torch.equal(found.query_ids, truth.query_ids)
        assert off(found.values, truth.values) < 1e-6


def test_both_sides_are_computed_in_the_method_s_precision(tmp_path: Path) -> None:
    """An index in bfloat16 is the method's bfloat16 scores, and no index of the float32 method."""
    train, queries = rows(N, 1), rows(M, 2)
    coarse = method(precision="bfloat16")
    index = tracin.Index.build(coarse, train, tmp_path, projection=WHOLE, dtype="float32")
    truth = coarse.influence(train, queries).values
    assert off(truth, method().influence(train, queries).values) > 1e-4, "bfloat16 changed nothing"
    assert off(index.influence(queries, estimate=False).values, truth) < 1e-5
    assert index.influence(queries).provenance["projection_error"]["relative_error"] < 1e-5
    with pytest.raises(IndexFolderError, match="precision: bfloat16 in the index, float32 now"):
        tracin.Index.open(tmp_path, method()).influence(queries)


def test_a_filter_restricts_the_lists(whole: tracin.Index) -> None:
    queries, labels = rows(M, 2), rows(N, 1)[1]
    truth = method().influence(rows(N, 1), queries).values
    kept = (labels == 1) | (labels == 2)
    found = whole.top_k(queries, 4, where={"label": [1, 2]})
    best = truth.masked_fill(~kept, -torch.inf).topk(4, 1).indices
    assert torch.equal(found.proponents.ids, best)
    scores = whole.influence(queries, where={"label": 0})
    assert scores.train_ids.tolist() == (labels == 0).nonzero()[:, 0].tolist()
    assert off(scores.values, truth[:, labels == 0]) < 1e-6
    own = whole.self_influence(where={"name": "row 3"})
    assert own.train_ids.tolist() == [3]


def test_a_filter_is_an_expression(whole: tracin.Index) -> None:
    field = pytest.importorskip("pyarrow.compute").field
    found = whole.influence(rows(M, 2), where=(field("label") > 0) & (field("row") < 20))
    labels = rows(N, 1)[1]
    assert found.train_ids.tolist() == [row for row in range(20) if labels[row] > 0]


def test_reranking_brings_exact_scores(tmp_path: Path) -> None:
    """With all rows as candidates a coarse index gives the exact lists."""
    train, queries = rows(N, 1), rows(M, 2)
    coarse = tracin.Index.build(method(), train, tmp_path, projection=16, shard_rows=10)
    exact = method().top_k(train, queries, 5)
    plain = coarse.top_k(queries, 5)
    assert not torch.equal(plain.proponents.ids, exact.proponents.ids), (
        "the projection is too good for this test"
    )
    found = coarse.top_k(queries, 5, rerank=N)
    assert torch.equal(found.proponents.ids, exact.proponents.ids)
    assert torch.equal(found.opponents.ids, exact.opponents.ids)
    assert off(found.proponents.values, exact.proponents.values) < 1e-6


def test_the_error_is_told(tmp_path: Path, whole: tracin.Index) -> None:
    """The estimate is what comparing with all exact scores gives, near enough, and both sizes are told apart."""
    train, queries = rows(N, 1), rows(M, 2)
    index = tracin.Index.build(method(), train, tmp_path, projection=32)
    scores = index.influence(queries)
    told = scores.provenance["projection_error"]
    truth = method().influence(train, queries).values
    assert told["relative_error"] == pytest.approx(
        off(scores.values, truth), rel=1e-6
    )  # 53 rows are all rows
    assert told["rows"] == N
    assert told["queries"] == M
    assert whole.influence(queries).provenance["projection_error"]["relative_error"] < 1e-6
    assert "relative error" in index.top_k(queries, 3).notes[-1]
    unknown = tracin.Index.open(tmp_path, method()).top_k(queries, 3)
    assert "not measured" in unknown.notes[-1]


@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_any_rows_make_the_same_index(tmp_path: Path, kind: str) -> None:
    train, queries = rows(N, 1), rows(M, 2)
    data: Any = TensorDataset(*train)
    data = DataLoader(data, batch_size=5) if kind == "loader" else data
    one = tracin.Index.build(method(), train, tmp_path / "one", projection=64, shard_rows=10)
    two = tracin.Index.build(method(), data, tmp_path / "two", projection=64, shard_rows=10)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    asked: Any = TensorDataset(*queries)
    asked = DataLoader(asked, batch_size=3) if kind == "loader" else asked
    found, plain = two.top_k(asked, 3, rerank=9), one.top_k(queries, 3, rerank=9)
    assert torch.equal(found.proponents.ids, plain.proponents.ids)


def test_appended_rows_go_on(tmp_path: Path) -> None:
    train, queries = rows(N, 1), rows(M, 2)
    first, rest = tuple(part[:30] for part in train), tuple(part[30:] for part in train)
    options = {"projection": WHOLE, "dtype": "float32", "shard_rows": 8}
    index = tracin.Index.build(method(), first, tmp_path, **options, columns={"label": first[1]})
    index = index.append(rest, columns={"label": rest[1]})
    assert len(index) == N
    assert off(index.influence(queries).values, method().influence(train, queries).values) < 1e-6
    before = files(tmp_path)
    again = tracin.Index.open(tmp_path, method()).append(rest, columns={"label": rest[1]})
    assert len(again) == N
    assert files(tmp_path) == before
    assert (
        index.self_influence(where={"label": 1}).train_ids.tolist()
        == (train[1] == 1).nonzero()[:, 0].tolist()
    )
