"""Groups of queries: the mean or the sum of the rows of ``influence``, to rounding."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import oracle
import tracin
from cases import CASES, Case
from judged import M, Run, truth
from scoring.common import method, net, rows, trajectory
from tracin.errors import LossError, ModelError, NotFiniteError, OptionError
from tracin.gradients.targets import Factors, GroupSums

BY = torch.arange(M) % 3 * 10 - 10  # unequal groups, a negative label


def reduced(values: torch.Tensor, by: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    found = [values[by == label] for label in by.unique()]
    return torch.stack([part.mean(0) if reduction == "mean" else part.sum(0) for part in found])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_against_the_judge(case: Case) -> None:
    run = Run(case)
    refusals = (LossError, ModelError) if case.may_refuse else ()
    found = None
    with contextlib.suppress(*refusals), oracle.untouched(run.model, run.train, run.queries):
        found = run.method(None, batch_size=3).aggregate(run.train, run.queries, by=BY)
    if found is not None:
        assert found.query_ids.tolist() == BY.unique().tolist()
        oracle.assert_close(found.values, reduced(truth(case.name).scores, BY), 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"projection": 40}, {"memory": "1kB"}], ids=str)
@pytest.mark.parametrize("by", [None, "label", [4, 2, 2, 4, 4, 4, 2, 9, 4, 4, 4, 2, 2]], ids=str)
def test_it_is_the_reduced_influence(by: Any, options: dict[str, Any], reduction: str) -> None:
    train, validation = rows(11, 1), rows(13, 5)
    chosen = method(**options)
    full = method(**{**options, "memory": "2GiB"}).influence(train, validation).values
    labels = validation[1] if by == "label" else torch.zeros(13).long() if by is None else torch.tensor(by)
    found = chosen.aggregate(train, validation, by=by, reduction=reduction)
    oracle.assert_close(found.values, reduced(full, labels, reduction), 1e-12)
    assert found.query_ids.tolist() == labels.unique().tolist()
    assert found.provenance["reduction"] == reduction
    assert found.provenance["by"] == ("given" if isinstance(by, list) else by)


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ([1, 2], "2 entries for 13"),
        ([0.5] * 13, "float32"),
        ([True] * 13, "bool"),
        ("class", "'label'"),
        (3, "int"),
        (torch.full((13,), 2**63, dtype=torch.uint64), r"beyond 2\*\*63"),
    ],
)
def test_what_is_no_grouping(by: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        method().aggregate(rows(11, 1), rows(13, 5), by=by)


def test_other_refusals() -> None:
    with pytest.raises(OptionError, match="reduction"):
        method().aggregate(rows(11, 1), rows(13, 5), reduction="max")
    plain = tracin.Task(net(0), lambda model, batch: model(batch[0]).square().sum(1))
    with pytest.raises(OptionError, match="outputs"):
        tracin.TracInCP(plain, trajectory(), progress=False).aggregate(rows(11, 1), rows(13, 5), by="label")


@pytest.mark.parametrize("options", [{}, {"normalize": True}], ids=str)
@pytest.mark.parametrize("by", [None, [4, 2, 2, 4, 4, 4, 2]], ids=str)
def test_sums_that_stay_in_factors(
    by: list[int] | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        wide = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.Tanh(), torch.nn.Linear(60, 3)).double()
    task = tracin.Task(wide, tracin.losses.cross_entropy)
    names = [name for name, _ in wide.named_parameters()]
    rates = {name: 0.1 * (at + 1) for at, name in enumerate(names)}
    states = [{name: scale * value for name, value in wide.state_dict().items()} for scale in (1.0, 0.7)]
    steps = tracin.Trajectory([tracin.Checkpoint(state, 0.1 if options else rates) for state in states])
    chosen = tracin.TracInCP(task, steps, batch_size=3, progress=False, device="cpu", **options)
    x = torch.randn(18, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(18) % 3
    train, validation = (x[:11], y[:11]), (x[11:], y[11:])
    groups = torch.zeros(7).long() if by is None else torch.tensor(by)
    made, target = [], GroupSums.target
    monkeypatch.setattr(GroupSums, "target", lambda sums: made.append(target(sums)) or made[-1])
    found = chosen.aggregate(train, validation, by=by)
    assert any(isinstance(each, Factors) for each in made)
    full = chosen.influence(train, validation).values
    oracle.assert_close(found.values, reduced(full, groups), 1e-12)


def test_a_gradient_that_is_not_finite_names_its_row() -> None:
    x, y = rows(13, 5)
    kinks = tracin.Task(net(0), lambda model, batch: (model(batch[0]) * batch[2]).square().sum(1).sqrt())
    scale = torch.ones(13, 1, dtype=x.dtype)
    scale[9] = 0.0  # sqrt at zero: a finite loss, a gradient that is not
    chosen = tracin.TracInCP(kinks, trajectory(), batch_size=4, progress=False, device="cpu")
    ones = torch.ones(11, 1, dtype=x.dtype)
    with pytest.raises(NotFiniteError, match="row 9"):
        chosen.aggregate((*rows(11, 1), ones), (x, y, scale))
