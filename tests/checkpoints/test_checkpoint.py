"""A checkpoint keeps what it was given, and its rates are right or refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tracin import Checkpoint
from tracin.errors import CheckpointError, OptionError, RateError

NAMES = ["weight", "bias"]


def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def test_training_on_does_not_change_a_checkpoint_in_memory() -> None:
    model = nn.Linear(3, 2)
    checkpoint = Checkpoint(model.state_dict(), learning_rate=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for name, value in checkpoint.load().items():
        assert torch.equal(value, before[name])


def test_the_mapping_given_is_left_as_it_was() -> None:
    given_state: dict[str, Any] = {
        "module.weight": nn.Parameter(torch.ones(2)),
        "module.bias": torch.zeros(1),
    }
    kept = dict(given_state)
    copies = {name: value.clone() for name, value in given_state.items()}
    checkpoint = Checkpoint(given_state, learning_rate=0.1)
    loaded = checkpoint.load()
    for value in loaded.values():
        assert not value.requires_grad
        value.fill_(7)
    assert list(given_state) == list(kept)
    assert all(given_state[name] is kept[name] for name in kept)
    assert all(torch.equal(given_state[name], copies[name]) for name in kept)
    assert torch.equal(checkpoint.load()["weight"], torch.ones(2)), (
        "load() hands out the caller's own tensors"
    )


def test_tied_tensors_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    loaded = Checkpoint(model.state_dict()).load()
    assert loaded["0.weight"] is not loaded["0.bias"]
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()


def test_frozen_and_replaceable() -> None:
    checkpoint = Checkpoint(state(), learning_rate=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.step = 3  # type: ignore[misc]
    assert dataclasses.replace(checkpoint, step=3).learning_rate == 0.1


@pytest.mark.parametrize(
    ("checkpoint", "name", "shown"),
    [
        (
            Checkpoint(Path("runs/a-1.pt"), learning_rate=0.5),
            "a-1.pt",
            "Checkpoint('a-1.pt', learning_rate=0.5)",
        ),
        (Checkpoint("b.safetensors", step=2), "b.safetensors", "Checkpoint('b.safetensors', step=2)"),
        (Checkpoint({"a": torch.ones(1)}, step=3), "checkpoint at step 3", "Checkpoint(step=3)"),
        (Checkpoint({"a": torch.ones(1)}), "checkpoint", "Checkpoint()"),
        (
            Checkpoint({"a": torch.ones(1)}, {"a": 1.0, "b": 2.0}, learning_rate_sum=0.25, optimizer="SGD"),
            "checkpoint",
            "Checkpoint(learning_rate={2 parameters}, learning_rate_sum=0.25, optimizer='SGD')",
        ),
    ],
)
def test_name_and_repr(checkpoint: Checkpoint, name: str, shown: str) -> None:
    assert checkpoint.name == name
    assert repr(checkpoint) == shown


def test_the_three_weightings() -> None:
    checkpoint = Checkpoint(state(), learning_rate={"weight": 0.3, "bias": 0.07}, learning_rate_sum=2.5)
    assert checkpoint.rates("learning_rate", NAMES) == {"weight": 0.3, "bias": 0.07}
    assert checkpoint.rates("integrated", NAMES) == {"weight": 2.5, "bias": 2.5}
    assert checkpoint.rates("uniform", NAMES) == {"weight": 1.0, "bias": 1.0}
    assert list(checkpoint.rates("learning_rate", NAMES[::-1])) == NAMES[::-1]
    assert Checkpoint(state()).rates("uniform", NAMES) == {"weight": 1.0, "bias": 1.0}


def test_zero_is_a_rate() -> None:
    assert Checkpoint(state(), learning_rate=0.0).rates("learning_rate", ["weight"]) == {"weight": 0.0}


@pytest.mark.parametrize(
    "number", [1, np.float32(1), np.float64(1), np.int64(1), torch.tensor(1.0), torch.tensor(1)]
)
def test_numbers_of_every_kind(number: Any) -> None:
    for rate in (number, {"weight": number}):
        found = Checkpoint(state(), learning_rate=rate).rates("learning_rate", ["weight"])["weight"]
        assert type(found) is float
        assert found == 1.0


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        ("weight", "module.weight"),
        ("module.weight", "weight"),
        ("encoder._orig_mod.weight", "encoder.weight"),
        ("weight", "_orig_mod.module.weight"),
    ],
)
def test_rates_are_found_for_a_wrapped_and_a_plain_model(asked: str, known: str) -> None:
    assert Checkpoint(state(), learning_rate={known: 0.5}).rates("learning_rate", [asked]) == {asked: 0.5}


def test_a_parameter_of_another_name_has_no_rate() -> None:
    checkpoint = Checkpoint(state(), learning_rate={"weight": 0.5, "head.bias": 0.2})
    with pytest.raises(RateError, match=r"module\.weight"):
        checkpoint.rates("learning_rate", ["head.bias", "module.weight"])


@given(
    rate=st.one_of(st.none(), st.floats(max_value=-1e-30), st.sampled_from([math.nan, math.inf])),
    field=st.sampled_from([("learning_rate", "learning_rate"), ("integrated", "learning_rate_sum")]),
    per_parameter=st.booleans(),
)
def test_a_bad_rate_is_an_error_only_where_it_is_read(
    rate: float | None, field: tuple[str, str], per_parameter: bool
) -> None:
    weighting, name = field
    other = "integrated" if weighting == "learning_rate" else "learning_rate"
    other_name = "learning_rate_sum" if name == "learning_rate" else "learning_rate"
    bad: Any = rate
    if per_parameter:
        bad = {"weight": 0.1} | ({} if rate is None else {"bias": rate})
    checkpoint = Checkpoint(state(), step=7, **{name: bad, other_name: 0.2})
    with pytest.raises(RateError, match="step 7") as caught:
        checkpoint.rates(weighting, NAMES)
    assert name in str(caught.value)
    assert ("'bias'" in str(caught.value)) or (not per_parameter)
    assert checkpoint.rates(other, NAMES) == {"weight": 0.2, "bias": 0.2}
    assert checkpoint.rates("uniform", NAMES) == {"weight": 1.0, "bias": 1.0}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rate", ["0.1", True, [0.1], {"weight": "0.1"}, torch.ones(2), object(), 1j])
def test_a_rate_that_is_no_number_is_named(rate: Any) -> None:
    for name in ("learning_rate", "learning_rate_sum"):
        with pytest.raises(RateError, match=f"a.pt: {name}.* not a number"):
            Checkpoint("a.pt", **{name: rate})


@pytest.mark.usefixtures("unchecked")
def test_other_arguments_of_a_wrong_kind() -> None:
    for step in (1.5, True, "3"):
        with pytest.raises(CheckpointError, match="not a whole number"):
            Checkpoint("a.pt", step=step)  # type: ignore[arg-type]
    assert Checkpoint("a.pt", step=np.int64(3)).step == 3  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="state is a int"):
        Checkpoint(3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="its 'weight' is a int"):
        Checkpoint({"weight": 3, "bias": torch.ones(1)}, key=None).load()  # type: ignore[dict-item]


def test_an_unknown_weighting() -> None:
    with pytest.raises(OptionError, match="'learning_rate', 'integrated', 'uniform'"):
        Checkpoint(state(), learning_rate=0.1).rates("lr", NAMES)
