"""Every case against one-row-at-a-time autograd: influence, self-influence, top-k, normalize; two precisions.

Each verb has batch sizes of its own: of one row, with a short last batch, and larger than the data.
"""

from __future__ import annotations

import pytest
import torch

import oracle
from cases import CASES, Case
from gradients.common import source_of, wired
from judged import PLAIN, M, N, Run, truth
from tracin.errors import DataError, LossError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch takes its slower kernel
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("batch_size", [1, 3])
@cases
def test_influence(case: Case, batch_size: int) -> None:
    run = Run(case)
    found = run.ask("influence", run.train, run.queries, batch_size=batch_size)
    if found is None:
        return
    assert found.values.dtype == torch.float64
    assert found.train_ids.tolist() == list(range(N))
    assert found.query_ids.tolist() == list(range(M))
    oracle.assert_close(found.values, truth(case.name).scores, 1e-10)


@cases
def test_self_influence(case: Case) -> None:
    run = Run(case)
    found = run.ask("self_influence", run.train, batch_size=2)
    if found is not None:
        oracle.assert_close(found.values, truth(case.name).own, 1e-10, "self-influence")
        assert found.train_ids.tolist() == list(range(N))


@cases
def test_top_k(case: Case) -> None:
    """The k largest and the k smallest of the judge's scores, in order, signs kept."""
    run = Run(case)
    found = run.ask("top_k", run.train, run.queries, k=3, batch_size=16)
    if found is None:
        return
    expected = truth(case.name).scores
    scale = expected.abs().max().item()
    for ranking, largest in ((found.proponents, True), (found.opponents, False)):
        values = expected.topk(3, dim=1, largest=largest).values
        assert ranking.ids.shape == ranking.values.shape == (M, 3)
        assert all(len(set(row)) == 3 for row in ranking.ids.tolist())
        oracle.assert_close(ranking.values, values, 1e-10, largest=scale)
        oracle.assert_close(expected.gather(1, ranking.ids), values, 1e-10, "the rows named", largest=scale)


@cases
def test_normalize(case: Case) -> None:
    run = Run(case)
    found = run.ask("influence", run.train, run.queries, rates=PLAIN, normalize=True, batch_size=5)
    if found is not None:
        oracle.assert_close(found.values, truth(case.name).cosines, 1e-10, "normalized scores")


@cases
def test_float32_in_the_graph_of_the_batch(case: Case) -> None:
    run = Run(case, torch.float32)
    found = run.ask("influence", run.train, run.queries, batch_size=16)
    if found is None:
        return
    assert found.values.dtype == torch.float32
    oracle.assert_close(found.values, truth(case.name, torch.float32).scores, case.tolerance32)


@cases
def test_verify(case: Case) -> None:
    run = Run(case)
    found = run.ask("verify", run.train, batch_size=3)
    if found is not None:
        assert found.max_relative_error <= 1e-9
        assert 0 < found.coverage.fraction <= 1


@cases
def test_float32_goes_by_row_only_where_float64_does(case: Case) -> None:
    """What torch computes in another kernel for float32 must not throw a layer onto the slow route."""
    slow = []
    for dtype in (torch.float32, torch.float64):
        source = source_of(case.model(dtype), case.rows(N, seed=1, dtype=dtype), case.loss)
        try:
            slow.append(set(wired(source).wiring.by_row))
        except (DataError, LossError, ModelError):
            assert case.may_refuse
            return
    assert slow[0] == slow[1]
