"""Forward passes along a trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from scoring.common import N, net, rows, task, trajectory
from tracin.errors import LossError, OptionError, UserCodeError
from tracin.scoring.evaluation import evaluate


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_losses_and_logits_at_every_checkpoint(batch_size: int) -> None:
    asked = task()
    with oracle.untouched(asked.model):
        found = evaluate(asked, trajectory(), rows(N, 1), batch_size=batch_size, device="cpu")
    x, y = rows(N, 1)
    assert found.logits is not None
    for at in range(2):
        logits = net(10 + at)(x).detach()
        torch.testing.assert_close(found.logits[at], logits)
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(found.losses[at], losses)
    assert found.labels is not None
    assert torch.equal(found.labels, y)
    assert torch.equal(found.predicted(), net(11)(x).argmax(1))


def test_the_training_loss_or_the_query_loss() -> None:
    def double(model: nn.Module, batch: Any) -> Tensor:
        return 2 * tracin.losses.cross_entropy(model, batch)

    asked = task(query_loss=double)
    train = evaluate(asked, trajectory(), rows(N, 1), name="train", device="cpu")
    queries = evaluate(asked, trajectory(), rows(N, 1), device="cpu")
    torch.testing.assert_close(queries.losses, 2 * train.losses)
    assert torch.equal(evaluate(task(), trajectory(), rows(N, 1), device="cpu").losses, train.losses)


def test_rates_are_not_read() -> None:
    states = tracin.Trajectory([tracin.Checkpoint(net(10).state_dict())])
    assert evaluate(task(), states, rows(N, 1), device="cpu").losses.shape == (1, N)


def test_without_outputs_there_is_no_prediction() -> None:
    asked = tracin.Task(net(0), lambda model, batch: model(batch[0]).square().sum(1))
    found = evaluate(asked, trajectory(), rows(N, 1), device="cpu")
    assert found.logits is None
    assert found.labels is None
    with pytest.raises(OptionError, match="outputs"):
        found.predicted()


BAD: dict[str, Any] = {
    "a tensor": lambda model, batch: model(batch[0]),
    "three things": lambda model, batch: (model(batch[0]), batch[1], batch[1]),
    "probabilities of one class": lambda model, batch: (model(batch[0])[:, 0], batch[1]),
    "labels of another length": lambda model, batch: (model(batch[0]), batch[1][:-1]),
    "one-hot labels": lambda model, batch: (model(batch[0]), nn.functional.one_hot(batch[1], 3)),
    "a list of labels": lambda model, batch: (model(batch[0]), batch[1].tolist()),
    "nothing": lambda model, batch: None,
}


@pytest.mark.parametrize("name", BAD)
def test_outputs_of_another_shape(name: str) -> None:
    asked = task(outputs=BAD[name])
    with oracle.untouched(asked.model), pytest.raises(LossError, match=r"\(logits \[n, C\], labels \[n\]\)"):
        evaluate(asked, trajectory(), rows(N, 1), device="cpu")


def test_outputs_that_raise_name_rows_and_checkpoint() -> None:
    def outputs(model: nn.Module, batch: Any) -> Any:
        raise KeyError("no logits here")

    asked = task(outputs=outputs)
    with (
        oracle.untouched(asked.model),
        pytest.raises(UserCodeError, match="outputs raised KeyError on rows 0-3 at queries"),
    ):
        evaluate(asked, trajectory(), rows(N, 1), batch_size=4, device="cpu")


def test_bfloat16_logits_and_dict_batches() -> None:
    model = net(0, torch.bfloat16)
    x, y = rows(N, 1, torch.bfloat16)
    found = evaluate(task(model), trajectory(torch.bfloat16), {"inputs": x, "targets": y}, device="cpu")
    assert found.logits is not None
    assert found.logits.dtype == torch.bfloat16
    assert found.losses.shape == (2, N)
