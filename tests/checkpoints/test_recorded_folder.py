"""Recorded folders: resumed, interrupted, damaged, mended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.optim import SGD

import tracin.checkpoints.recorder as recorder_module
from checkpoints.training import Net, go, rates, read, recorded
from tracin import CheckpointRecorder, Trajectory
from tracin.checkpoints import fit
from tracin.errors import CheckpointError, RateError


def test_a_later_recorder_continues_in_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    with CheckpointRecorder(tmp_path, model, optimizer) as recorder:
        go(model, optimizer, 2)
        recorder.save(step=2)
    resumed = Net()
    resumed.load_state_dict(fit(Trajectory.from_folder(tmp_path)[-1], resumed))
    optimizer = SGD(resumed.parameters(), lr=0.25)
    with CheckpointRecorder(tmp_path, resumed, optimizer) as recorder:
        recorder.save(step=2)
        assert recorder.trajectory()[0].learning_rate == 0.5, (
            "saved again before any step, the rates are kept"
        )
        assert recorder.trajectory()[0].learning_rate_sum == 1.0
        go(resumed, optimizer, 3)
        recorder.save(step=5)
        trajectory = recorder.trajectory()
    assert [c.step for c in trajectory] == [2, 5]
    assert [c.learning_rate for c in trajectory] == [0.5, 0.25]
    assert [c.learning_rate_sum for c in trajectory] == [1.0, 0.75]
    assert not caplog.records


def test_a_new_run_in_an_old_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    for steps in ([1, 7], [1, 2]):
        with (
            CheckpointRecorder(tmp_path, model, optimizer) as recorder,
            caplog.at_level(logging.WARNING, "tracin"),
        ):
            for step in steps:
                go(model, optimizer)
                recorder.save(step=step)
    assert len(caplog.records) == 1
    assert "step 7 of an earlier run, later than step 1" in caplog.text


def test_an_interrupted_overwrite_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.5)
    recorder = CheckpointRecorder(tmp_path, model, optimizer)
    go(model, optimizer)
    path = recorder.save(step=1)
    go(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(recorder_module.Record, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recorder.save(step=1)
    with pytest.raises(CheckpointError, match=r"step-00000001\.json was written for other tensors"):
        recorder.trajectory()
    recorder.save(step=1)
    assert recorder.trajectory()[0].learning_rate_sum == 1.0
    assert path.exists()


def test_tensors_whose_record_was_not_written_have_no_rates(tmp_path: Path) -> None:
    paths = recorded(tmp_path, 3, 12)
    paths[1].with_suffix(".json").unlink()
    trajectory = Trajectory.from_folder(tmp_path)
    assert [checkpoint.name for checkpoint in trajectory] == [path.name for path in paths]
    assert trajectory[0].learning_rate == 0.5
    with pytest.raises(RateError, match=r"step-00000012\.safetensors"):
        rates(trajectory[1])


def test_some_with_records_in_another_order_than_their_names(tmp_path: Path) -> None:
    recorded(tmp_path, 3, 12)
    for name in ("step-00000003", "step-00000012"):
        record = read(tmp_path / f"{name}.json")
        record["step"] = 15 - record["step"]
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert [checkpoint.step for checkpoint in Trajectory.from_folder(tmp_path)] == [3, 12]
    torch.save(Net().state_dict(), tmp_path / "initial.pt")
    with pytest.raises(CheckpointError, match="some files have a record and some have none"):
        Trajectory.from_folder(tmp_path)


def test_a_rate_mended_by_hand_counts(tmp_path: Path) -> None:
    (path,) = recorded(tmp_path, 1)
    record = read(path)
    record["learning_rate"] = [0.125]
    path.with_suffix(".json").write_text(json.dumps(record))
    assert Trajectory.from_folder(tmp_path)[0].learning_rate == 0.125


def change(**fields: Any) -> Any:
    def damage(path: Path) -> None:
        path.with_suffix(".json").write_text(json.dumps({**read(path), **fields}))

    return damage


def without(field: str) -> Any:
    def damage(path: Path) -> None:
        path.with_suffix(".json").write_text(json.dumps({k: v for k, v in read(path).items() if k != field}))

    return damage


def other_tensors(path: Path) -> None:
    save_file({"weight": torch.ones(1)}, path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def renamed(path: Path) -> None:
    path.rename(path.with_name("best.safetensors"))
    path.with_suffix(".json").rename(path.with_name("best.json"))


DAMAGE = {
    "no tensors": (
        Path.unlink,
        r"step-00000002\.json names the tensors step-00000002\.safetensors.*not beside it",
    ),
    "other tensors": (other_tensors, r"step-00000002\.json was written for other tensors"),
    "tensors cut short": (cut_short, r"step-00000002\.safetensors cannot be read"),
    "renamed": (renamed, r"best\.json is the record of step-00000002\.safetensors"),
    "same step": (change(step=1), "the same recorded step"),
    "no json": (
        lambda path: path.with_suffix(".json").write_text("{"),
        r"step-00000002\.json cannot be read as JSON",
    ),
    "newer": (change(version=9), r"step-00000002\.json is of format 9.*upgrade"),
    "no step": (without("step"), r"step-00000002\.json is damaged.*'step'"),
    "text for a rate": (change(learning_rate=["0.5"]), r"step-00000002\.json is damaged"),
    "no list": (change(learning_rate=0.5), r"step-00000002\.json is damaged"),
    "a group too many": (change(parameters={"head.bias": 3}), "contradict"),
    "a file elsewhere": (change(file="../a.safetensors"), "contradict"),
    "other sums": (change(learning_rate_sum=[]), "contradict"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_told(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    _, second = recorded(tmp_path, 1, 2)
    damage(second)
    with pytest.raises(CheckpointError, match=message):
        Trajectory.from_folder(tmp_path)
