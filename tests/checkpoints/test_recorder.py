"""The rates recorded are those that the steps used."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Optimizer

from checkpoints.training import Net, backward, go, rates, read, two_groups
from tracin import CheckpointRecorder, Trajectory
from tracin.errors import CheckpointError, OptionError, RateError

ACTIONS = st.lists(
    st.one_of(
        st.just("step"),
        st.just("accumulate"),
        st.just("idle step"),
        st.just("schedule"),
        st.just("save"),
        st.just("save again"),
        st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.3, 0.07, 1.5])),
    ),
    max_size=25,
)


@settings(max_examples=40)
@given(actions=ACTIONS, tensor_rate=st.booleans())
def test_recorded_rates_are_those_of_a_replay_by_hand(actions: list[Any], tensor_rate: bool) -> None:
    model = Net()
    start = torch.tensor(0.7, dtype=torch.float64) if tensor_rate else 0.7
    optimizer = two_groups(model, body=start, head=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    shown, last, sums = [0.7, 0.2], None, None
    expected: dict[int, tuple[Any, Any]] = {}
    since = [0.0, 0.0]
    with tempfile.TemporaryDirectory() as folder, CheckpointRecorder(folder, model, optimizer) as recorder:
        for at, action in enumerate(["step", *actions, "save"]):
            if action == "step":
                go(model, optimizer)
                last, since = list(shown), [total + rate for total, rate in zip(since, shown, strict=True)]
            elif action == "accumulate":
                backward(model)
                model.zero_grad()
            elif action == "idle step":
                optimizer.step()
            elif action == "schedule":
                schedule.step()
                shown = [0.9 * rate for rate in shown]
            elif action == "save" or (action == "save again" and not expected):
                recorder.save(step=at)
                expected[at], since = (last, list(since)), [0.0, 0.0]
            elif action == "save again":
                step, (_, sums) = list(expected.items())[-1]
                recorder.save(step=step)
                total = [before + rate for before, rate in zip(sums, since, strict=True)]
                expected[step], since = (last, total), [0.0, 0.0]
            else:
                group, rate = action
                shown[group] = rate
                held = optimizer.param_groups[group]["lr"]
                if isinstance(held, torch.Tensor):
                    held.fill_(rate)
                else:
                    optimizer.param_groups[group]["lr"] = rate
        trajectory = recorder.trajectory()
    assert [checkpoint.step for checkpoint in trajectory] == sorted(expected)
    for checkpoint in trajectory:
        for weighting, of_groups in zip(
            ("learning_rate", "integrated"), expected[checkpoint.step], strict=True
        ):
            assert list(rates(checkpoint, weighting).values()) == pytest.approx(of_groups, rel=1e-12)


def test_the_last_rate_is_the_one_used_and_not_the_next(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 2 else 1.0)
    recorder = CheckpointRecorder(tmp_path, model, optimizer)
    for _ in range(2):
        go(model, optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    recorder.save(step=2)
    assert recorder.trajectory()[0].learning_rate == 0.5
    assert recorder.trajectory()[0].learning_rate_sum == 1.0


class DecaysItself(SGD):
    """Shows the next rate as soon as its step is over, with no scheduler."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.5


def test_an_optimizer_that_changes_its_rate_inside_the_step(tmp_path: Path) -> None:
    model = Net()
    optimizer = DecaysItself(model.parameters(), lr=0.5)
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer, 2)
        recorder.save(step=2)
        found = recorder.trajectory()[0]
    assert (found.learning_rate, found.learning_rate_sum) == (0.25, 0.75)


def test_the_record(tmp_path: Path) -> None:
    model = Net()
    model.spare = nn.Parameter(torch.ones(2))
    optimizer = two_groups(model)
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer, 2)
        record = read(recorder.save(step=12))
    assert record["step"] == 12
    assert record["file"] == "step-00000012.safetensors"
    assert record["optimizer"] == "SGD"
    assert record["learning_rate"] == [0.5, 0.125]
    assert record["learning_rate_sum"] == [1.0, 0.25]
    assert record["parameters"]["body.1.weight"] == 0
    assert record["parameters"]["head.bias"] == 1
    assert record["untrained"] == ["spare"]
    checkpoint = Trajectory.from_folder(tmp_path)[0]
    assert rates(checkpoint) == {"body.0.weight": 0.5, "head.bias": 0.125}
    with pytest.raises(RateError, match=r"step-00000012\.safetensors.*'spare'"):
        checkpoint.rates("learning_rate", ["spare"])


def test_one_rate_for_the_whole_model_is_one_number_but_not_for_what_is_not_trained(tmp_path: Path) -> None:
    for name, extra in (("whole", False), ("part", True)):
        model = Net()
        optimizer = two_groups(model, 0.5, 0.5)
        if extra:
            model.spare = nn.Parameter(torch.ones(2), requires_grad=False)
        with CheckpointRecorder(tmp_path / name, model, optimizer) as recorder:
            go(model, optimizer)
            recorder.save(step=1)
    assert Trajectory.from_folder(tmp_path / "whole")[0].learning_rate == 0.5
    found = Trajectory.from_folder(tmp_path / "part")[0].learning_rate
    assert isinstance(found, dict)
    assert set(found.values()) == {0.5}
    assert "spare" not in found


def test_before_any_step_there_is_no_rate(tmp_path: Path) -> None:
    model = Net()
    optimizer = two_groups(model)
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        recorder.save(step=0)
        go(model, optimizer)
        recorder.save(step=1)
        first, second = recorder.trajectory()
    assert read(tmp_path / "step-00000000.json")["learning_rate"] == [None, None]
    for weighting in ("learning_rate", "integrated"):
        with pytest.raises(RateError, match=r"step-00000000\.safetensors.*trajectory\[1:\]"):
            rates(first, weighting)
        assert rates(second, weighting) == {"body.0.weight": 0.5, "head.bias": 0.125}


def test_a_group_that_joins_later(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.body.parameters(), lr=0.5)
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer, 2)
        recorder.save(step=2)
        optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.25})
        recorder.save(step=3)
        go(model, optimizer, 3)
        recorder.save(step=6)
        early, joined, late = recorder.trajectory()
    for checkpoint in (early, joined):
        assert checkpoint.rates("learning_rate", ["body.0.weight"]) == {"body.0.weight": 0.5}
        with pytest.raises(RateError, match=r"'head\.bias'"):
            rates(checkpoint)
    assert rates(late, "integrated") == {"body.0.weight": 1.5, "head.bias": 0.75}


def test_a_parameter_used_in_no_group_order_but_its_own(tmp_path: Path) -> None:
    """Groups go by identity: the order of parameters in the optimizer is not that of the model."""
    model = Net()
    reversed_groups = [
        {"params": [p], "lr": 0.5 / (at + 1)} for at, p in enumerate(reversed(list(model.parameters())))
    ]
    optimizer = SGD(reversed_groups)
    names = [name for name, _ in model.named_parameters()][::-1]
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer)
        recorder.save(step=1)
        found = recorder.trajectory()[0].rates("learning_rate", names)
    assert found == {name: 0.5 / (at + 1) for at, name in enumerate(names)}


def test_a_step_that_the_gradient_scaler_cancels_does_not_count(tmp_path: Path) -> None:
    for fused in (False, True):
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        with CheckpointRecorder(tmp_path / str(fused), model, optimizer) as recorder:
            for factor in (1.0, torch.inf, 1.0):
                optimizer.zero_grad()
                scaler.scale(factor * model(torch.ones(3, 2)).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
            recorder.save(step=3)
            assert recorder.trajectory()[0].learning_rate_sum == 1.0, f"fused={fused}"


def test_a_closure_is_a_step(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().sum()
        loss.backward()
        return loss

    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        optimizer.zero_grad()
        optimizer.step(closure)
        recorder.save(step=1)
        found = recorder.trajectory()[0]
    assert (found.learning_rate, found.learning_rate_sum, found.optimizer) == (0.5, 0.5, "LBFGS")


def test_a_step_that_fails_does_not_count(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)

    def closure() -> float:
        raise ValueError("no loss today")

    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer)
        with pytest.raises(ValueError, match="no loss"):
            optimizer.step(closure)
        recorder.save(step=1)
        assert recorder.trajectory()[0].learning_rate_sum == 0.5


class NoRate(Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        pass


class MySGD(SGD):
    pass


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: SGD(p, lr=0.5, momentum=0.9), "SGD"),
        (lambda p: torch.optim.Adam(p, lr=0.5), "Adam"),
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.5)), "Adam"),
        (lambda p: torch.optim.AdamW(p, lr=0.5), "AdamW"),
        (lambda p: MySGD(p, lr=0.5), f"{__name__}.MySGD"),
    ],
)
def test_the_optimizers_class_is_recorded(tmp_path: Path, make: Any, name: str) -> None:
    model = Net()
    optimizer = make(model.parameters())
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer)
        recorder.save(step=1)
        assert recorder.trajectory()[0].optimizer == name
        assert recorder.trajectory()[0].learning_rate == 0.5


def test_an_optimizer_without_a_rate(tmp_path: Path) -> None:
    model = Net()
    optimizer = NoRate(model.parameters())
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer)
        recorder.save(step=1)
        checkpoint = recorder.trajectory()[0]
    with pytest.raises(RateError, match="has no learning_rate"):
        rates(checkpoint)
    assert rates(checkpoint, "uniform") == {"body.0.weight": 1.0, "head.bias": 1.0}


def test_closing_stops_listening(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    before = dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)
    recorder = CheckpointRecorder(tmp_path, model, optimizer)
    go(model, optimizer)
    recorder.save(step=1)
    recorder.close()
    recorder.close()
    assert (dict(optimizer._optimizer_step_pre_hooks), dict(optimizer._optimizer_step_post_hooks)) == before
    with pytest.raises(CheckpointError, match="closed"):
        recorder.save(step=2)
    assert len(recorder.trajectory()) == 1


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_make_no_recorder(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    with pytest.raises(OptionError, match=r"none of the model's parameters"):
        CheckpointRecorder(tmp_path, Net(), optimizer)
    with pytest.raises(OptionError, match="model is a function"):
        CheckpointRecorder(tmp_path, backward, optimizer)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="optimizer is a ExponentialLR"):
        CheckpointRecorder(tmp_path, model, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))  # type: ignore[arg-type]
    recorder = CheckpointRecorder(tmp_path, model, optimizer)
    for step in (-1, 1.5, "3", True, None):
        with pytest.raises(CheckpointError, match="step is"):
            recorder.save(step=step)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        recorder.trajectory()


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that may not be written to, also where the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.rmdir()


def test_a_folder_that_may_not_be_written_to_is_named_at_once(read_only: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    for folder in (read_only, read_only / "below"):
        with pytest.raises(CheckpointError, match=rf"cannot write into the folder {folder}.*Choose a folder"):
            CheckpointRecorder(folder, model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_save_that_fails_loses_no_steps(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    folder = tmp_path / "run"
    recorder = CheckpointRecorder(folder, model, optimizer)
    go(model, optimizer, 2)
    folder.rmdir()
    folder.touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*step-00000002\.safetensors.*Choose a folder"):
        recorder.save(step=2)
    folder.unlink()
    folder.mkdir()
    recorder.save(step=2)
    assert recorder.trajectory()[0].learning_rate_sum == 1.0
