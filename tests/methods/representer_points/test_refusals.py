"""What breaks the terms of the theorem is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tracin
from methods.representer_points.common import (
    QUERIES,
    TRAIN,
    C,
    D,
    N,
    method,
    net,
    outputs,
    weighted,
)
from tracin.errors import (
    DataError,
    LossError,
    ModelError,
    NotFiniteError,
    OptionError,
)


def test_lists_that_cannot_be() -> None:
    for k in (0, N + 1):
        with pytest.raises(OptionError, match=f"k is {k}"):
            method().top_k(TRAIN, QUERIES, k=k)
    few = (TRAIN[0][:5], torch.tensor([0, 0, 1, 2, 2]))
    with pytest.raises(OptionError, match="only 1 train rows have class 1"):
        method().top_k(few, QUERIES, k=2, within=1)


def test_heads_that_cannot_be() -> None:
    with pytest.raises(OptionError, match=r"no module 'fc'\. The Linear layers are '0', '4', '6'"):
        method(head="fc")
    with pytest.raises(OptionError, match=r"'5' is a Tanh, and the head must be a Linear\. .* '0', '4', '6'"):
        method(head="5")
    with pytest.raises(OptionError, match="the model Conv2d has no Linear layer"):
        method(nn.Conv2d(1, 2, 3))
    with pytest.raises(ModelError, match=r"the output \[5, 5\] of '4' is not the logits \[5, 3\]"):
        method(head="4").influence(TRAIN, QUERIES)
    with pytest.raises(ModelError, match="is not the logits"):
        method(nn.Sequential(*net(), nn.Softplus())).influence(TRAIN, QUERIES)


def test_heads_that_do_more_than_one_product_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * super().forward(x)

    class Tokens(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, None])

    with pytest.raises(ModelError, match="'6' is a Doubled whose output is not weight"):
        method(nn.Sequential(*net()[:-1], Doubled(D, C).double())).influence(TRAIN, QUERIES)
    with pytest.raises(ModelError, match="'6' was called 2 times for one prediction"):
        method(Twice(*net())).influence(TRAIN, QUERIES)
    model = Tokens(nn.Linear(4, C).double())
    task = tracin.Task(model, weighted, outputs=lambda model, batch: (model(batch[0])[:, 0], batch[1]))
    with pytest.raises(ModelError, match=r"'0' gave \[23, 1, 3\] for 23 rows"):
        tracin.RepresenterPoints(
            task, tracin.Checkpoint(model.state_dict()), batch_size=N, progress=False
        ).self_influence(TRAIN)


@pytest.mark.parametrize("name", ["l2", "tolerance"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_penalties_that_are_not_positive_are_refused(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value!r}. Give a positive number"):
        method(**{name: value})


def test_losses_that_are_no_classification_are_refused() -> None:
    task = tracin.Task(net(), tracin.losses.mean_squared_error)
    with pytest.raises(
        OptionError, match="needs the logits and labels of a classifier, and this task has none"
    ):
        tracin.RepresenterPoints(task, tracin.Checkpoint(net().state_dict()), l2=0.01)


def test_losses_that_read_more_than_the_output_are_refused() -> None:
    def penalised(model: Any, batch: Any) -> Tensor:
        return outputs(model, batch)[0].logsumexp(1) + model[6].weight.square().sum()

    def penalised_by_name(model: Any, batch: Any) -> Tensor:
        return weighted(model, batch) + model.head.weight.square().sum()

    def penalised_in_all(model: Any, batch: Any) -> Tensor:
        return weighted(model, batch) + sum(p.square().sum() for p in model.parameters())

    def mixing(model: Any, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits - logits.mean(0), batch[1], reduction="none")

    def random(model: Any, batch: Any) -> Tensor:
        return weighted(model, batch) * torch.rand(len(batch[0]))

    class Named(nn.Sequential):
        @property
        def head(self) -> nn.Module:
            return self[-1]

    for loss, told in (
        (penalised, "everything else that the model returns being None"),
        (penalised_by_name, r"the loss reads model\.head"),
        (penalised_in_all, "not a function of the head's output alone: its values differ"),
        (mixing, "the loss of row 0 depends on the logits of other rows"),
        (random, "its values differ .* draw nothing at random"),
    ):
        with pytest.raises(LossError, match=told):
            method(Named(*net()), loss).self_influence(TRAIN)


def test_a_loss_that_does_not_get_the_heads_output_is_refused() -> None:
    class Returns(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clone()

    with pytest.raises(ModelError, match="the loss does not get the output of '6' as it is"):
        method(Returns(*net())).self_influence(TRAIN)


def sorts_pairs(found: list) -> Any:
    found = sorted(found, key=lambda row: float(row[0][0])) if len(found) == 2 else found
    return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])


def test_a_collate_that_sorts_a_later_batch_is_refused() -> None:
    asked = TensorDataset(*QUERIES)
    with pytest.raises(
        DataError, match=r"queries: the collate function does not keep the rows .* \(rows 5-6\)"
    ):
        method(collate=sorts_pairs).influence(TRAIN, asked)


def test_bad_rows_are_named() -> None:
    broken = (TRAIN[0].clone(), TRAIN[1])
    broken[0][7] = float("nan")
    with pytest.raises(NotFiniteError, match=r"the features of row 7 are not finite \(train, "):
        method().influence(broken, QUERIES)
    with pytest.raises(NotFiniteError, match=r"row 7 are not finite \(queries, "):
        method().influence(TRAIN, broken)
    labels = TRAIN[1].clone()
    labels[9] = 3
    with pytest.raises(DataError, match="row 9 has the label 3, and the head has 3 outputs"):
        method().influence((TRAIN[0], labels), QUERIES)
