"""The theorem holds, against the user's own model with the refitted head, and scores are those of the formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tracin
from methods.representer_points.common import (
    LOSSES,
    QUERIES,
    TRAIN,
    C,
    M,
    N,
    method,
    net,
    rows,
    smoothed,
    squared_hinge,
    theorem,
    weighted,
    with_head,
)
from oracle import assert_close, untouched
from tracin.errors import (
    OptionError,
)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("l2", [1.0, 0.01, 1e-4])
def test_the_scores_sum_to_the_logit(loss: Any, bias: bool, l2: float) -> None:
    found = method(net(bias), loss, l2=l2)
    scores = found.influence(TRAIN, QUERIES)
    assert scores.values.dtype == torch.float64
    assert scores.provenance["residual"] <= 1e-10
    theorem(found.refit(TRAIN), net(bias), QUERIES, scores.values, 1e-8)


def test_the_theorem_catches_a_wrong_scale_and_a_missing_row() -> None:
    found = method()
    refit, values = found.refit(TRAIN), found.influence(TRAIN, QUERIES).values
    with pytest.raises(AssertionError, match=r"best overall factor 0\.95"):
        theorem(refit, net(), QUERIES, values * (N - 1) / N, 1e-8)
    with pytest.raises(AssertionError, match="sums of scores"):
        theorem(refit, net(), QUERIES, values[:, 1:], 1e-8)
    bent = replace(refit, weight=refit.weight * (1 + 1e-7))
    with pytest.raises(AssertionError, match="sums of scores"):
        theorem(bent, net(), QUERIES, values, 1e-8)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_scores_are_those_of_the_formula_row_by_row(loss: Any) -> None:
    found = method(loss=loss)
    model = with_head(net(), found.refit(TRAIN))
    expected = torch.zeros(M, N, dtype=torch.float64)
    features = [torch.cat([model[:-1](part[0]), torch.ones(len(part[0]), 1)], 1) for part in (TRAIN, QUERIES)]
    for i in range(N):
        row = (TRAIN[0][i : i + 1], TRAIN[1][i : i + 1])
        logits = model(row[0]).detach().requires_grad_()
        stub = nn.Identity()
        slope = torch.autograd.grad(loss(stub, (logits, row[1])).sum(), logits)[0][0]
        for q in range(M):
            alpha = -slope[QUERIES[1][q]] / (2 * 0.01 * N)
            expected[q, i] = alpha * torch.dot(features[0][i], features[1][q])
    # The loss that narrows to float32 is judged in float32, and scored in float64.
    tolerance = 1e-6 if loss is smoothed else 1e-9
    assert_close(found.influence(TRAIN, QUERIES).values, expected.detach(), tolerance)


def test_targets() -> None:
    found = method()
    refit = found.refit(TRAIN)
    model = with_head(net(), refit)
    logits = model(QUERIES[0]).detach()
    predicted = net().eval()(QUERIES[0]).argmax(1)
    for target, classes in (("label", QUERIES[1]), ("predicted", predicted), (2, torch.full((M,), 2))):
        scores = found.influence(TRAIN, QUERIES, target=target)
        assert_close(scores.values.sum(1), logits.gather(1, classes[:, None])[:, 0], 1e-8, str(target))
        assert scores.provenance["target"] == target
    for wrong in (3, -1, "class"):
        with pytest.raises(OptionError, match=r"target is .* a class from 0 to 2"):
            found.influence(TRAIN, QUERIES, target=wrong)


def test_rows_of_a_class_hold_up_its_logit() -> None:
    """Under cross-entropy α is positive for the row's own label alone."""
    alpha = method().refit(TRAIN).alpha
    own = F.one_hot(TRAIN[1], C).bool()
    assert (alpha[own] > 0).all()
    assert (alpha[~own] < 0).all()
    assert torch.allclose(alpha.sum(1), torch.zeros(N, dtype=torch.float64), atol=1e-12)


def test_self_influence_is_the_diagonal_without_its_sign() -> None:
    own = method().self_influence(TRAIN)
    assert_close(own.values, method().influence(TRAIN, TRAIN).values.diagonal().abs(), 1e-12)
    assert own.provenance["verb"] == "self_influence"
    negative = method(loss=squared_hinge, l2=1e-3).self_influence(TRAIN)
    assert (negative.values >= 0).all()


@pytest.mark.parametrize("memory", ["2GiB", 40_000])
@pytest.mark.parametrize("within", [None, "label", 1])
def test_top_k_is_the_sorted_influence(memory: Any, within: Any) -> None:
    found = method(memory=memory)
    values = found.influence(TRAIN, QUERIES).values
    lists = found.top_k(TRAIN, QUERIES, k=4, within=within)
    for q in range(M):
        wanted = {"label": int(QUERIES[1][q]), 1: 1}.get(within)
        ids = [i for i in range(N) if wanted is None or int(TRAIN[1][i]) == wanted]
        assert lists.proponents.ids[q].tolist() == sorted(ids, key=lambda i: (-values[q, i], i))[:4]
        assert lists.opponents.ids[q].tolist() == sorted(ids, key=lambda i: (values[q, i], i))[:4]
        assert_close(lists.proponents.values[q], values[q, lists.proponents.ids[q]], 1e-12)
        assert_close(lists.opponents.values[q], values[q, lists.opponents.ids[q]], 1e-12)
    assert lists.provenance["k"] == 4


def test_tied_scores_go_by_id() -> None:
    """Rows whose features are all zero score exactly 0."""
    x = TRAIN[0].clone()
    x[3:20:2] = -x[3:20:2].abs()
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, C, bias=False)).double()
    lists = method(model, memory=20_000).top_k((x, TRAIN[1]), QUERIES, k=N)
    for ids, values in ((side.ids, side.values) for side in (lists.proponents, lists.opponents)):
        for row in range(M):
            tied = ids[row][values[row] == 0].tolist()
            assert len(tied) >= 9
            assert tied == sorted(tied)


class Pictures(Dataset):
    """Rows one by one, as dicts."""

    def __init__(self, data: tuple[Tensor, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"inputs": self.data[0][row], "targets": self.data[1][row]}


@pytest.mark.parametrize("loss", [tracin.losses.cross_entropy, weighted], ids=["ready", "weighted"])
def test_batches_do_not_matter(loss: Any) -> None:
    expected = method(loss=loss, batch_size=N).influence(TRAIN, QUERIES).values
    for size in (1, 4, "auto"):
        assert_close(method(loss=loss, batch_size=size).influence(TRAIN, QUERIES).values, expected, 1e-9)
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=6)
    assert_close(method(loss=loss).influence(loader, QUERIES).values, expected, 1e-9)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    mixed = method(loss=loss).influence((TRAIN[0][order], TRAIN[1][order]), QUERIES).values
    assert_close(mixed, expected[:, order], 1e-9)


def test_dict_batches_and_models_that_return_more_than_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Any]:
            features = self.net[:-1](x)
            return {"features": features, "logits": self.net[-1](features), "size": 3}

    model = Wrapped()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    found = tracin.RepresenterPoints(
        task, tracin.Checkpoint(model.state_dict()), l2=0.01, batch_size=5, progress=False
    )
    assert found.head == "net.6"
    expected = method().influence(TRAIN, QUERIES).values
    assert_close(found.influence(Pictures(TRAIN), Pictures(QUERIES)).values, expected, 1e-12)
    reader = tracin.Task(
        model,
        lambda model, batch: F.cross_entropy(
            model(batch["inputs"])["logits"], batch["targets"], reduction="none"
        ),
        outputs=lambda model, batch: (model(batch["inputs"])["logits"], batch["targets"]),
    )
    own = tracin.RepresenterPoints(reader, found.checkpoint, l2=0.01, batch_size=5, progress=False)
    assert_close(own.influence(Pictures(TRAIN), Pictures(QUERIES)).values, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_are_refitted_in_float64_and_scored_in_float32(dtype: torch.dtype) -> None:
    train, queries = rows(N, 1, dtype), rows(M, 2, dtype)
    found = method(net(dtype=dtype))
    scores = found.influence(train, queries)
    assert scores.values.dtype == torch.float32
    assert scores.provenance["residual"] <= 1e-10
    refit = found.refit(train)
    features = torch.cat([net(dtype=dtype).eval()[:-1](queries[0]).double(), torch.ones(M, 1)], 1)
    logits = (features @ refit.weight.mT).detach()
    assert_close(scores.values.sum(1), logits.gather(1, queries[1][:, None])[:, 0], 1e-5)


def test_the_model_is_left_as_it_was_and_the_checkpoint_counts() -> None:
    model, other = net(), net(seed=9)
    found = tracin.RepresenterPoints(
        tracin.Task(model, tracin.losses.cross_entropy),
        tracin.Checkpoint(other.state_dict()),
        l2=0.01,
        batch_size=5,
        progress=False,
    )
    with untouched(model, TRAIN, QUERIES):
        values = found.influence(TRAIN, QUERIES).values
        found.self_influence(TRAIN)
        found.top_k(TRAIN, QUERIES, k=2)
    assert_close(values, method(net(seed=9)).influence(TRAIN, QUERIES).values, 1e-12)


def test_a_linear_model_is_its_own_head() -> None:
    model = nn.Linear(4, C).double()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    found = tracin.RepresenterPoints(task, tracin.Checkpoint(model.state_dict()), l2=0.01, progress=False)
    assert not found.head
    refit = found.refit(TRAIN)
    logits = QUERIES[0] @ refit.weight[:, :4].mT + refit.weight[:, 4]
    sums = found.influence(TRAIN, QUERIES).values.sum(1)
    assert_close(sums, logits.gather(1, QUERIES[1][:, None])[:, 0], 1e-8)


def test_wrong_labels_come_first() -> None:
    """A tenth of the labels of well separated classes is wrong: they stand at the top of the list."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(120) % C
    x = 3 * F.one_hot(labels, 4).double() + 0.5 * torch.randn(
        120, 4, generator=generator, dtype=torch.float64
    )
    given = labels.clone()
    given[:12] = (labels[:12] + 1) % C
    own = method().self_influence((x, given))
    assert len(set(own.ranking()[:24].tolist()) & set(range(12))) >= 10
