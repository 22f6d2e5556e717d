"""Ready-made losses: one number per row, for the batches and outputs that people have."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracin.errors import DataError, LossError
from tracin.tasks.losses import binary_cross_entropy, cross_entropy, mean_squared_error, predict, split_batch

N, C = 5, 3
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1, 0])


@dataclass
class Output:
    """As Hugging Face models return it."""

    logits: Tensor


class Wrapped(nn.Module):
    """A linear model that returns its prediction in some wrapping, and takes other names."""

    def __init__(self, wrap: Any, out: int = C) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(2, out), wrap

    def forward(self, x: Any = None, pixels: Any = None) -> Any:
        return self.wrap(self.layer(x if pixels is None else pixels))


WRAPS = {
    "a tensor": lambda out: out,
    "a tuple": lambda out: (out, "more"),
    "a list": lambda out: [out],
    "a dict": lambda out: {"logits": out, "loss": out.sum()},
    "an ordered dict": lambda out: OrderedDict(logits=out),
    "an object": Output,
}


@pytest.mark.parametrize("name", WRAPS)
def test_what_models_return(name: str) -> None:
    model = Wrapped(WRAPS[name])
    expected = F.cross_entropy(model.layer(X), Y, reduction="none")
    assert torch.equal(cross_entropy(model, (X, Y)), expected)
    assert torch.equal(predict(model, X), model.layer(X))


@pytest.mark.parametrize(
    "wrap", [lambda out: "logits", lambda out: {"scores": out}, lambda out: (), lambda out: ("a", out)]
)
def test_what_has_no_prediction_in_it(wrap: Any) -> None:
    with pytest.raises(LossError, match="without 'logits'"):
        cross_entropy(Wrapped(wrap), (X, Y))


BATCHES: dict[str, Any] = {
    "a tuple": (X, Y),
    "a list": [X, Y],
    "inputs and targets": {"inputs": X, "targets": Y},
    "image and label": {"label": Y, "image": X},
    "x and y": {"x": X, "y": Y},
    "names of the model": {"pixels": X, "labels": Y},
}


@pytest.mark.parametrize("name", BATCHES)
def test_what_a_batch_may_be(name: str) -> None:
    model = Wrapped(lambda out: out)
    inputs, targets = split_batch(BATCHES[name])
    assert torch.equal(targets, Y)
    assert torch.equal(
        cross_entropy(model, BATCHES[name]), F.cross_entropy(model.layer(X), Y, reduction="none")
    )
    assert isinstance(inputs, dict) == (name == "names of the model")


@pytest.mark.parametrize(
    ("batch", "fact"),
    [
        ((X,), "tuple of 1"),
        ((X, Y, Y), "tuple of 3"),
        (X, "a Tensor"),
        ({"inputs": X}, r"\['inputs'\].*targets, labels"),
        ({}, "target key"),
    ],
)
def test_what_a_batch_may_not_be(batch: Any, fact: str) -> None:
    with pytest.raises(DataError, match=fact):
        cross_entropy(Wrapped(lambda out: out), batch)


def test_cross_entropy_by_hand() -> None:
    model = nn.Linear(2, C)
    logits = model(X)
    by_hand = torch.stack([logits[i].logsumexp(0) - logits[i, Y[i]] for i in range(N)])
    torch.testing.assert_close(cross_entropy(model, (X, Y)), by_hand)
    soft = torch.full((N, C), 1 / C)
    torch.testing.assert_close(cross_entropy(model, (X, soft)), logits.logsumexp(1) - logits.mean(1))


def test_cross_entropy_of_tokens_is_refused() -> None:
    with pytest.raises(LossError, match=r"logits \[n, C\]; the model returned \[5, 4, 3\]"):
        cross_entropy(nn.Linear(2, C), (X[:, None].expand(N, 4, 2), Y))


def test_outputs_of_cross_entropy() -> None:
    model = nn.Linear(2, C)
    logits, labels = cross_entropy.outputs(model, (X, Y))  # type: ignore[attr-defined]
    assert torch.equal(logits, model(X))
    assert torch.equal(labels, Y)
    _, soft = cross_entropy.outputs(model, (X, F.one_hot(Y, C).float()))  # type: ignore[attr-defined]
    assert torch.equal(soft, Y)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 3), (N, 2, 3)])
def test_squared_error_by_hand(shape: tuple[int, ...]) -> None:
    targets = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(2, targets[0].numel()), nn.Unflatten(1, shape[1:] or (1,)))
    found = mean_squared_error(model, (X, targets))
    by_hand = (model(X).reshape(N, -1) - targets.reshape(N, -1)).square().mean(1)
    torch.testing.assert_close(found, by_hand)
    assert not hasattr(mean_squared_error, "outputs"), "a regression has no classes"


def test_whole_number_targets_of_a_regression() -> None:
    model = nn.Linear(2, 1)
    torch.testing.assert_close(mean_squared_error(model, (X, Y)), (model(X)[:, 0] - Y).square())


@pytest.mark.parametrize("loss", [mean_squared_error, binary_cross_entropy])
def test_shapes_that_would_broadcast_are_refused(loss: Any) -> None:
    """[5, 1] against [5, 3] would broadcast to a wrong number without a word."""
    with pytest.raises(LossError, match=r"\[5, 1\] and the targets \[5, 3\]"):
        loss(nn.Linear(2, 1), (X, torch.zeros(N, 3)))
    with pytest.raises(LossError, match=r"\[5, 3\] and the targets \[3, 5\]"):
        loss(nn.Linear(2, 3), (X, torch.zeros(3, N)))


@pytest.mark.parametrize("outputs", [1, 4])
def test_binary_cross_entropy_by_hand(outputs: int) -> None:
    targets = torch.randint(0, 2, (N, outputs), generator=torch.Generator().manual_seed(1))
    model = nn.Linear(2, outputs)
    p = model(X).sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(1)
    torch.testing.assert_close(binary_cross_entropy(model, (X, targets)), by_hand)


def test_outputs_of_binary_cross_entropy() -> None:
    model = nn.Linear(2, 1)
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    logits, labels = binary_cross_entropy.outputs(model, (X, y))  # type: ignore[attr-defined]
    assert torch.equal(labels, y.long())
    torch.testing.assert_close(logits.softmax(1)[:, 1], model(X)[:, 0].sigmoid())
    with pytest.raises(LossError, match="several labels"):
        binary_cross_entropy.outputs(nn.Linear(2, 3), (X, torch.zeros(N, 3)))  # type: ignore[attr-defined]
