"""Rates and checkpoints that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tracin
from refusals import M, Net, ask_all, build, cross_entropy, make, refused, rows, verbs
from tracin.errors import (
    CheckpointError,
    OptionError,
    RateError,
)

BAD_RATES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "missing": (None, ("uniform|learning_rate",)),
    "negative": (-0.1, (r"-0\.1",)),
    "nan": (float("nan"), ("nan",)),
    "infinite": (float("inf"), ("inf",)),
    "missing_for_a_parameter": ({"body.0.weight": 0.1}, (r"body\.0\.bias",)),
    "negative_for_a_parameter": (
        {name: -0.1 if name == "head.weight" else 0.1 for name, _ in Net().named_parameters()},
        (r"head\.weight", r"-0\.1"),
    ),
}


@verbs
@pytest.mark.parametrize("name", BAD_RATES)
def test_a_rate_that_is_none(name: str, verb: str) -> None:
    rate, facts = BAD_RATES[name]
    model = build()
    with refused(model, RateError, *facts, "20"):
        ask_all(make(model, rates=(0.3, rate)), rows(), rows(M, 2))[verb]()


def test_integrated_needs_the_sums() -> None:
    model = build()
    with refused(model, RateError, "integrated|learning_rate_sum", "10"):
        make(model, weighting="integrated").influence(rows(), rows(M, 2))


def test_uniform_needs_no_rate() -> None:
    model = build()
    found = make(model, rates=(None, None), weighting="uniform").influence(rows(), rows(M, 2))
    assert torch.isfinite(found.values).all()


def test_normalize_wants_one_rate_per_checkpoint() -> None:
    model = build()
    rate = {name: 0.1 + index for index, (name, _) in enumerate(model.named_parameters())}
    with refused(model, (RateError, OptionError), "normalize", "rate"):
        make(model, rates=(0.3, rate), normalize=True).influence(rows(), rows(M, 2))


def test_normalize_has_no_self_influence() -> None:
    model = build()
    with refused(model, OptionError, "normalize", "self"):
        make(model, normalize=True).self_influence(rows())


def test_an_empty_trajectory() -> None:
    model = build()
    with refused(model, CheckpointError, "empty|no checkpoint|at least one"):
        task = tracin.Task(model, cross_entropy)
        tracin.TracInCP(task, tracin.Trajectory([]), progress=False).influence(rows(), rows(M, 2))


def _renamed() -> dict[str, Tensor]:
    return {key.replace("head", "classifier"): value for key, value in build(seed=2).state_dict().items()}


def _wider() -> dict[str, Tensor]:
    return {**build(seed=2).state_dict(), "head.weight": torch.zeros(7, 5)}


def _with(name: str, value: Tensor) -> dict[str, Tensor]:
    return {**build(seed=2).state_dict(), name: value}


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in build(seed=2).state_dict().items() if key != name}


MISFITS: dict[str, tuple[Callable[[], dict[str, Tensor]], tuple[str, ...]]] = {
    "renamed": (_renamed, (r"(head|classifier)\.weight",)),
    "another_shape": (_wider, (r"head\.weight", "7, 5", "3, 5")),
    "one_more": (lambda: _with("extra.weight", torch.zeros(2)), (r"extra\.weight",)),
    "one_less": (lambda: _without("body.0.bias"), (r"body\.0\.bias",)),
    "buffer_missing": (lambda: _without("body.1.running_var"), (r"body\.1\.running_var",)),
    "not_finite": (
        lambda: _with("head.weight", torch.full((3, 5), float("nan"))),
        (r"head\.weight", "nan|finite"),
    ),
    "more_precise": (
        lambda: _with("head.weight", torch.zeros(3, 5).double()),
        (r"head\.weight", "float64", "float32"),
    ),
    "empty": (dict, (r"body\.0\.weight",)),
}


@pytest.mark.parametrize("first", [True, False], ids=["as_first", "as_second"])
@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_of_another_model(name: str, first: bool) -> None:
    state, facts = MISFITS[name]
    model = build()
    good = tracin.Checkpoint(build(seed=1).state_dict(), learning_rate=0.3, step=10)
    with refused(model, CheckpointError, *facts, "33"):
        bad = tracin.Checkpoint(state(), learning_rate=0.1, step=33)
        trajectory = tracin.Trajectory([bad, good] if first else [good, bad])
        task = tracin.Task(model, cross_entropy)
        tracin.TracInCP(task, trajectory, device="cpu", progress=False).influence(rows(), rows(M, 2))
