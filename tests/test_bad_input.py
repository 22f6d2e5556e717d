"""Losses, models and options that are refused: facts in the message, the model bit-identical, a second try works."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
)

import oracle
import tracin
from refusals import M, N, Net, ask_all, build, checkpoints, cross_entropy, make, refused, rows, verbs
from tracin.errors import (
    LossError,
    ModelError,
    NotFiniteError,
    OptionError,
    UserCodeError,
)


def _tokens(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square()


BAD_LOSSES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "scalar": (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), ("reduction=.none",)),
    "too_short": (lambda model, batch: cross_entropy(model, batch)[:-1], (r"\b2\b", r"\b3\b", "row")),
    "too_long": (lambda model, batch: cross_entropy(model, batch).repeat(2), (r"\b6\b", r"\b3\b", "row")),
    "token_axis": (_tokens, (r"3, 3[\])]", "sum")),
    "column": (lambda model, batch: cross_entropy(model, batch)[:, None], (r"3, 1[\])]",)),
    "detached": (lambda model, batch: cross_entropy(model, batch).detach(), ("detach|no_grad",)),
    "number": (lambda model, batch: cross_entropy(model, batch).sum().item(), ("float", "tensor")),
    "tuple": (lambda model, batch: (cross_entropy(model, batch), 0), ("tuple", "tensor")),
    "integers": (lambda model, batch: model(batch[0]).argmax(1), ("floating|int64",)),
}


@verbs
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_loss_that_is_no_vector_of_rows(name: str, verb: str) -> None:
    loss, facts = BAD_LOSSES[name]
    model = build()
    method = make(model, loss)
    with refused(model, LossError, *facts):
        ask_all(method, rows(), rows(M, 2))[verb]()


def test_a_query_loss_is_held_to_the_same() -> None:
    model = build()
    task = tracin.Task(model, cross_entropy, query_loss=BAD_LOSSES["scalar"][0])
    trajectory = tracin.Trajectory(checkpoints())
    method = tracin.TracInCP(task, trajectory, device="cpu", progress=False)
    with refused(model, LossError, "reduction=.none"):
        method.influence(rows(), rows(M, 2))


def _in_batch_negatives(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


class TrainModeNorm(nn.Module):
    """Normalises by the batch, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.head(x), None, None, training=True)


class RowAttention(nn.Module):
    """Attends from row to row."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ x.T).softmax(-1) @ x)


MIXERS: dict[str, tuple[type[nn.Module], Callable]] = {
    "loss_over_n": (Net, lambda model, batch: cross_entropy(model, batch) / len(batch[0])),
    "loss_less_its_mean": (
        Net,
        lambda model, batch: cross_entropy(model, batch) - cross_entropy(model, batch).mean(),
    ),
    "mean_for_all": (Net, lambda model, batch: cross_entropy(model, batch).mean().expand(len(batch[0]))),
    "in_batch_negatives": (Net, _in_batch_negatives),
    "batch_statistics": (TrainModeNorm, cross_entropy),
    "attention_over_rows": (RowAttention, cross_entropy),
}


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("name", MIXERS)
def test_rows_that_mix(name: str, batch_size: int) -> None:
    kind, loss = MIXERS[name]
    model = build(kind)
    for call in ask_all(make(model, loss, batch_size=batch_size), rows(), rows(M, 2)).values():
        with refused(model, (LossError, ModelError), "row", "mix"):
            call()


class Stateless(nn.Module):
    """BatchNorm without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_norm_without_running_statistics(batch_size: int) -> None:
    model = build(Stateless)
    with refused(model, (ModelError, LossError), "running stat|track_running_stats", "norm"):
        make(model, batch_size=batch_size).influence(rows(), rows(M, 2))


def test_a_scripted_model() -> None:
    """TorchScript runs without the hooks of its modules: refused by name, or traced exactly; never left changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would like to retire it
        model = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    trajectory = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.3)])
    method = tracin.TracInCP(tracin.Task(model, cross_entropy), trajectory, device="cpu", progress=False)
    with refused(model, ModelError, "script"):
        method.influence(rows(), rows(M, 2))


class Noisy(nn.Module):
    """Dropout that eval mode does not turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, 0.5, training=True))


def test_a_forward_pass_that_writes_into_a_weight_which_is_used_again() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 5, max_norm=0.5), nn.Linear(5, 9, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x).mean(1))

    model = Tied()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.arange(24).view(12, 2) % 9, torch.arange(12) % 9
    method = tracin.TracInCP(
        tracin.Task(model, tracin.losses.cross_entropy),
        tracin.Trajectory([tracin.Checkpoint(state, learning_rate=0.1)]),
        device="cpu",
        progress=False,
    )
    with refused(model, ModelError, "writes into words.weight", "max_norm=None"):
        method.influence((x, y), (x, y))


def test_a_model_that_is_random_in_eval_mode() -> None:
    model = build(Noisy)
    with refused(model, (ModelError, LossError), "random|mix"):
        make(model).influence(rows(), rows(M, 2))


# Gradients that are no numbers


class Shift(nn.Module):
    """√(x + b): finite at x = −b, where its gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :1] + self.shift).sqrt()


class Length(nn.Module):
    """‖W x‖: finite at x = 0, where its gradient is 0/0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum(1, keepdim=True).sqrt()


def only(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).squeeze(1)


SINGULAR = {"infinite": (Shift, -0.5, r"\bshift\b"), "nan": (Length, 0.0, r"layer\.weight")}


@pytest.mark.parametrize("side", ["train", "queries"])
@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("row", [1, 3])
def test_a_gradient_that_is_not_finite(name: str, side: str, row: int) -> None:
    """In the first batch and in a later one: row and parameter are named."""
    kind, place, parameter = SINGULAR[name]
    model = kind()
    bad, good = (rows()[0].abs() + 1,), (rows(M, 2)[0].abs() + 1,)
    bad[0][row] = place
    state = model.state_dict()
    trajectory = tracin.Trajectory([tracin.Checkpoint(state, learning_rate=rate) for rate in (0.3, 0.07)])
    method = tracin.TracInCP(tracin.Task(model, only), trajectory, batch_size=3, device="cpu", progress=False)
    for verb, call in ask_all(method, *((bad, good) if side == "train" else (good, bad))).items():
        if verb != "verify" and (side == "train" or verb != "self_influence"):
            with refused(model, NotFiniteError, rf"\brow {row}\b", parameter):
                call()


@pytest.mark.parametrize("row", [1, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float, row: int) -> None:
    model = build()
    train = rows()
    train[0][row, 2] = value
    with refused(model, NotFiniteError, rf"\brow {row}\b", "nan|inf"):
        make(model).influence(train, rows(M, 2))


# The user's own errors


@pytest.mark.parametrize("side", ["train", "queries"])
def test_labels_out_of_range(side: str) -> None:
    model = build()
    bad = rows()
    bad[1][4] = 3
    data = (bad, rows(M, 2)) if side == "train" else (rows(), bad)
    with refused(model, UserCodeError, "rows 3-5|row 4", side, "checkpoint|step 10", "3") as caught:
        make(model).influence(*data)
    assert isinstance(caught.value.__cause__, IndexError)


class Failing(Dataset):
    """A file that is not there."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 5:
            raise FileNotFoundError("picture-5.png")
        return tuple(column[index] for column in rows())


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: DataLoader(data, batch_size=3)])
@verbs
def test_a_dataset_that_fails(wrap: Callable, verb: str) -> None:
    model = build()
    with refused(model, UserCodeError, "row 5|rows 3-5", "FileNotFoundError", r"picture-5\.png") as caught:
        ask_all(make(model), wrap(Failing()), rows(M, 2))[verb]()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def breaking(at: int, error: BaseException) -> Callable:
    """A loss that raises at its ``at``-th call, halfway through the forward pass."""
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        hidden = model.body(batch[0])
        if calls == at:
            raise error
        return F.cross_entropy(model.head(hidden), batch[1], reduction="none")

    return loss


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_loss_that_fails_now_and_then(at: int) -> None:
    model = build()
    with refused(model, UserCodeError, "ZeroDivisionError", "row", "train|queries") as caught:
        make(model, breaking(at, ZeroDivisionError("mine"))).influence(rows(), rows(M, 2))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@verbs
@pytest.mark.parametrize("at", [1, 2, 3, 4, 6])
def test_ctrl_c_leaves_the_model_as_it_was_and_a_second_run_works(at: int, verb: str) -> None:
    model = build()
    model.head.weight.grad = torch.ones(3, 5)
    method = make(model, breaking(at, KeyboardInterrupt()))
    calls = ask_all(method, rows(), rows(M, 2))
    with oracle.untouched(model), pytest.raises(KeyboardInterrupt):
        calls[verb]()
    again = method.influence(rows(), rows(M, 2))
    assert torch.equal(again.values, make(model).influence(rows(), rows(M, 2)).values)


class Interrupted(Failing):
    """Ctrl-C while a row is being read."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 5:
            raise KeyboardInterrupt
        return tuple(column[index] for column in rows())


def test_ctrl_c_in_the_dataset() -> None:
    model = build()
    with oracle.untouched(model), pytest.raises(KeyboardInterrupt):
        make(model).influence(Interrupted(), rows(M, 2))


# Options


@pytest.mark.parametrize("glob", ["heads.*", ("head.*", "nothing*"), "[", ""])
def test_a_glob_that_matches_nothing(glob: Any) -> None:
    model = build()
    named = re.escape(glob if isinstance(glob, str) else "nothing*")
    with refused(model, OptionError, named, r"body\.0\.weight"):
        task = tracin.Task(model, cross_entropy, parameters=glob)
        tracin.TracInCP(task, tracin.Trajectory(checkpoints()), progress=False).influence(rows(), rows(M, 2))


@pytest.mark.parametrize("names", ["*", "head.bias"])
def test_nothing_left_to_train(names: str) -> None:
    model = build()
    if names == "*":
        model.requires_grad_(False)
    with refused(model, ModelError, "requires_grad|frozen"):
        task = tracin.Task(model, cross_entropy, parameters=names)
        tracin.TracInCP(task, tracin.Trajectory(checkpoints()), progress=False).influence(rows(), rows(M, 2))


@pytest.mark.parametrize("k", [N + 1, 0, -1])
def test_k_beyond_the_rows(k: Any) -> None:
    model = build()
    with refused(model, OptionError, r"\bk\b", re.escape(str(k)), *(["8"] if k == N + 1 else [])):
        make(model).top_k(rows(), rows(M, 2), k=k)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "batch_size_0": ({"batch_size": 0}, ("batch_size", "0")),
    "batch_size_negative": ({"batch_size": -3}, ("batch_size", "-3")),
    "weighting": ({"weighting": "adam"}, ("weighting", "adam", "learning_rate", "integrated", "uniform")),
    "device": ({"device": "abacus"}, ("device", "abacus")),
    "memory": ({"memory": "lots"}, ("memory", "lots")),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_out_of_range(name: str) -> None:
    options, facts = BAD_OPTIONS[name]
    model = build()
    with refused(model, OptionError, *facts):
        make(model, **options).influence(rows(), rows(M, 2))
