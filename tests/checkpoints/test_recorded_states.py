"""The states recorded are those of the plain model at the time, and recording changes nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import SGD

from checkpoints.training import Net, go, read, recorded, two_groups
from tracin import Checkpoint, CheckpointRecorder, Trajectory
from tracin.checkpoints import fit


def test_the_states_are_those_at_the_time(tmp_path: Path) -> None:
    model = Net()
    optimizer = two_groups(model)
    states = []
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        for step in (1, 2, 10):
            go(model, optimizer)
            assert recorder.save(step=step) == tmp_path / f"step-{step:08d}.safetensors"
            states.append({name: value.clone() for name, value in model.state_dict().items()})
        trajectory = recorder.trajectory()
    assert [checkpoint.name for checkpoint in trajectory] == [
        f"step-{step:08d}.safetensors" for step in (1, 2, 10)
    ]
    for checkpoint, state in zip(trajectory, states, strict=True):
        fitted = fit(checkpoint, Net())
        assert list(fitted) == list(state)
        assert all(torch.equal(fitted[name], state[name]) for name in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"step-{step:08d}.{suffix}" for step in (1, 2, 10) for suffix in ("json", "safetensors")
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_tied_weights_are_saved_once_and_known_by_both_names(tmp_path: Path) -> None:
    model = Tied()
    optimizer = SGD(
        [{"params": [model.first.weight], "lr": 0.5}, {"params": [model.first.bias, model.second.bias]}], 0.25
    )
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer)
        path = recorder.save(step=1)
    assert read(path)["aliases"] == {"second.weight": "first.weight"}
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["first.bias", "first.weight", "second.bias"]
    alone = Checkpoint(path).load()
    assert alone["second.weight"].data_ptr() == alone["first.weight"].data_ptr()
    checkpoint = Trajectory.from_folder(tmp_path)[0]
    expected = {"first.weight": 0.5, "second.weight": 0.5, "second.bias": 0.25}
    assert checkpoint.rates("learning_rate", list(expected)) == expected
    fit(checkpoint, Tied())
    loose = Tied()
    loose.second.weight = nn.Parameter(torch.zeros(2, 2))
    assert torch.equal(fit(checkpoint, loose)["second.weight"], model.first.weight)


@pytest.mark.parametrize("wrap", ["compile", "parallel", "both", "submodule"])
def test_a_wrapped_model_leaves_the_record_of_the_plain_one(tmp_path: Path, wrap: str) -> None:
    plain = Net()
    model: Any = plain
    if wrap in {"compile", "both"}:
        model = torch.compile(model, backend="eager")
    if wrap in {"parallel", "both"}:
        model = nn.DataParallel(model)
    if wrap == "submodule":
        plain.body = torch.compile(plain.body, backend="eager")  # type: ignore[assignment]
    optimizer = SGD(
        [{"params": plain.body.parameters(), "lr": 0.5}, {"params": plain.head.parameters(), "lr": 0.25}]
    )
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        for parameter in plain.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        record = read(recorder.save(step=1))
    assert sorted(record["parameters"]) == sorted(name for name, _ in Net().named_parameters())
    checkpoint = Trajectory.from_folder(tmp_path)[0]
    for target in (Net(), model):
        assert list(fit(checkpoint, target)) == list(target.state_dict())
        names = [name for name, _ in target.named_parameters()]
        assert set(checkpoint.rates("learning_rate", names).values()) == {0.5, 0.25}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def test_a_plain_model_with_an_attribute_called_module_keeps_its_names(tmp_path: Path) -> None:
    model = Inner()
    optimizer = SGD(
        [{"params": [model.module.weight], "lr": 0.5}, {"params": [model.module.bias], "lr": 0.25}]
    )
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer)
        record = read(recorder.save(step=1))
        checkpoint = recorder.trajectory()[0]
    assert sorted(record["parameters"]) == ["module.bias", "module.weight"]
    assert sorted(fit(checkpoint, Inner())) == ["module.bias", "module.weight"]
    assert checkpoint.rates("learning_rate", ["module.bias"]) == {"module.bias": 0.25}


def test_saving_the_same_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        torch.manual_seed(0)
        recorded(tmp_path / name, 1)
    for suffix in ("json", "safetensors"):
        file = f"step-00000001.{suffix}"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_recording_does_not_touch_the_training(tmp_path: Path) -> None:
    finals = []
    for record in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        recorder = CheckpointRecorder(tmp_path, model, optimizer) if record else None
        for step in range(4):
            go(model, optimizer)
            if recorder:
                recorder.save(step=step)
        finals.append([*(value.clone() for value in model.state_dict().values()), torch.rand(1)])
    assert all(torch.equal(one, other) for one, other in zip(*finals, strict=True))


class Odd(Net):
    def get_extra_state(self) -> Any:
        return {"scale": 2}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_extra_state_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Odd()
    with (
        CheckpointRecorder(tmp_path, model, SGD(model.parameters(), lr=0.5)) as recorder,
        caplog.at_level(logging.INFO, logger="tracin"),
    ):
        recorder.save(step=1)
        fit(recorder.trajectory()[0], Odd())
    assert "_extra_state" in caplog.text
