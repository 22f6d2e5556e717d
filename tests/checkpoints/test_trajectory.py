"""Trajectories are in the order of training, and refuse what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tracin import Checkpoint, Trajectory
from tracin.checkpoints.trajectory import natural_key
from tracin.errors import CheckpointError, OptionError, RateError


def put(folder: Path, *names: str) -> None:
    for at, name in enumerate(names):
        state = {"weight": torch.full((1,), float(at))}
        (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)


def names(trajectory: Trajectory) -> list[str]:
    return [checkpoint.name for checkpoint in trajectory]


@given(
    numbers=st.sets(st.integers(0, 10**6), min_size=1, max_size=12), width=st.integers(0, 3), data=st.data()
)
def test_natural_order_is_the_order_of_the_numbers(
    numbers: set[int], width: int, data: st.DataObject
) -> None:
    in_order = [f"run2-ckpt-{number:0{width}d}.pt" for number in sorted(numbers)]
    assert sorted(data.draw(st.permutations(in_order)), key=natural_key) == in_order


@given(st.lists(st.text(max_size=6)))
def test_natural_keys_of_any_names_compare(texts: list[str]) -> None:
    assert len(sorted(texts, key=natural_key)) == len(texts)


def test_steps_are_those_recorded_or_places() -> None:
    state = {"w": torch.zeros(1)}
    known = [Checkpoint(state, learning_rate=0.1, step=step) for step in (5, 30)]
    assert Trajectory(known).steps == [5, 30]
    assert Trajectory([*known, Checkpoint(state, learning_rate=0.1)]).steps == [1, 2, 3]


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    put(tmp_path, "ckpt-10.pt", "ckpt-2.safetensors", "ckpt-1.pth", "ckpt-100.ckpt")
    put(tmp_path, ".partial-12.safetensors", "notes.txt", "scores.npz")
    (tmp_path / "ckpt-3.pt").mkdir()
    (tmp_path / "config.json").write_text('{"lr": 1}')
    (tmp_path / "log.json").write_text('{"a": 1}\n{"b": 2}\n')
    trajectory = Trajectory.from_folder(tmp_path)
    assert names(trajectory) == ["ckpt-1.pth", "ckpt-2.safetensors", "ckpt-10.pt", "ckpt-100.ckpt"]
    assert [checkpoint.load()["weight"].item() for checkpoint in trajectory] == [2, 1, 0, 3]
    assert trajectory[0].rates("uniform", ["weight"]) == {"weight": 1.0}
    with pytest.raises(RateError, match=r"ckpt-1\.pth"):
        trajectory[0].rates("learning_rate", ["weight"])


def test_a_folder_with_a_key(tmp_path: Path) -> None:
    torch.save({"ema": {"weight": torch.ones(1)}, "model": {"weight": torch.zeros(1)}}, tmp_path / "a.pt")
    assert Trajectory.from_folder(tmp_path, key="ema")[0].load()["weight"].item() == 1


def test_folders_that_give_no_trajectory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone cannot be read as a folder"):
        Trajectory.from_folder(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: no file ends in \.safetensors"):
        Trajectory.from_folder(tmp_path)
    put(tmp_path, "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be read as a folder"):
        Trajectory.from_folder(tmp_path / "a.pt")


@pytest.mark.parametrize("pair", [("ckpt-2.pt", "ckpt-02.pt"), ("a.pt", "a.safetensors"), ("A.pt", "a.pth")])
def test_two_files_in_one_place_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    put(tmp_path, *pair)
    with pytest.raises(CheckpointError, match="the same place in the order") as caught:
        Trajectory.from_folder(tmp_path)
    assert all(name in str(caught.value) for name in pair)


def test_files_in_the_order_given(tmp_path: Path) -> None:
    put(tmp_path, "b.pt", "a.safetensors", "c.pt")
    files = [tmp_path / name for name in ("c.pt", "a.safetensors", "b.pt")]
    trajectory = Trajectory.from_files(files, [0.3, {"weight": 0.2}, None])
    assert names(trajectory) == ["c.pt", "a.safetensors", "b.pt"]
    assert [checkpoint.learning_rate for checkpoint in trajectory] == [0.3, {"weight": 0.2}, None]
    assert [c.learning_rate for c in Trajectory.from_files(map(str, files), 0.1)] == [0.1] * 3
    assert [c.learning_rate for c in Trajectory.from_files(files, {"weight": 0.1})] == [{"weight": 0.1}] * 3
    assert [c.learning_rate for c in Trajectory.from_files(files, None)] == [None] * 3


def test_files_with_a_key(tmp_path: Path) -> None:
    torch.save({"ema": {"weight": torch.ones(1)}, "model": {"weight": torch.zeros(1)}}, tmp_path / "a.pt")
    assert Trajectory.from_files([tmp_path / "a.pt"], [0.1], key="ema")[0].load()["weight"].item() == 1
    assert Trajectory.from_files([tmp_path / "a.pt"], [0.1])[0].load()["weight"].item() == 0


def test_files_that_give_no_trajectory(tmp_path: Path) -> None:
    put(tmp_path, "a.pt", "b.pt")
    with pytest.raises(RateError, match="2 files and 1 learning rates"):
        Trajectory.from_files([tmp_path / "a.pt", tmp_path / "b.pt"], [0.1])
    with pytest.raises(CheckpointError, match="no checkpoints"):
        Trajectory.from_files([], [])
    with pytest.raises(CheckpointError, match=r"c\.pt does not exist"):
        Trajectory.from_files([tmp_path / "a.pt", tmp_path / "c.pt"], [0.1, 0.2])


def some(*sums: Any) -> Trajectory:
    return Trajectory(
        [
            Checkpoint(
                {"weight": torch.ones(1)}, learning_rate=0.1 + at, step=10 * at, learning_rate_sum=total
            )
            for at, total in enumerate(sums)
        ]
    )


def test_a_trajectory_is_a_frozen_sequence() -> None:
    trajectory = some(1.0, 2.0, 3.0)
    assert len(trajectory) == 3
    assert trajectory[-1].step == 20
    assert [checkpoint.step for checkpoint in trajectory[1:]] == [10, 20]
    assert isinstance(trajectory[1:], Trajectory)
    assert trajectory[1] in trajectory
    assert next(reversed(trajectory)) is trajectory[2]
    assert repr(trajectory) == "Trajectory(3 checkpoints, steps 0 to 20)"
    assert repr(Trajectory([Checkpoint("a.pt")])) == "Trajectory(1 checkpoint)"
    with pytest.raises(AttributeError):
        trajectory.checkpoints = ()  # type: ignore[misc]
    with pytest.raises(CheckpointError, match="no checkpoints"):
        Trajectory([])
    with pytest.raises(CheckpointError, match="no checkpoints"):
        trajectory[3:]


@given(
    sums=st.lists(st.integers(0, 8).map(lambda eighths: eighths / 8), min_size=1, max_size=6),
    keep=st.lists(st.integers(0, 5), min_size=1),
)
def test_a_selection_counts_every_step_up_to_its_last(sums: list[float], keep: list[int]) -> None:
    keep = sorted({at % len(sums) for at in keep})
    trajectory = some(*sums)
    for selected in (trajectory.select(keep), trajectory.select(lambda c: c.step // 10 in keep)):
        assert [checkpoint.step for checkpoint in selected] == [10 * at for at in keep]
        found = [checkpoint.rates("integrated", ["weight"])["weight"] for checkpoint in selected]
        assert sum(found) == sum(sums[: keep[-1] + 1])
        assert [c.learning_rate for c in selected] == [trajectory[at].learning_rate for at in keep]


def test_a_selection_of_sums_per_parameter() -> None:
    mixed = some({"a": 1.0, "b": 2.0}, 0.5, {"a": 4.0, "c": 1.0}, 8.0)
    assert mixed.select([1, 3])[0].learning_rate_sum == {"a": 1.5, "b": 2.5}
    assert mixed.select(slice(None, None, -3)).select([0, 1])[1].learning_rate_sum == {"a": 12.5, "c": 9.5}
    assert mixed.select([2])[0].learning_rate_sum == {"a": 5.5}, "b and c are not known for every step"
    assert some(None, 1.0, 2.0).select([1, 2])[0].learning_rate_sum is None
    assert some(None, 1.0, 2.0)[1:][0].learning_rate_sum == 1.0


def test_a_selection_of_what_is_not_there() -> None:
    with pytest.raises(OptionError, match="no position 3 among 3"):
        some(1.0, 2.0, 3.0).select([0, 3])
    with pytest.raises(CheckpointError, match="no checkpoints"):
        some(1.0).select([])


def test_describe_is_json() -> None:
    trajectory = some({"weight": 0.5}, 1.0)
    described = json.loads(json.dumps(trajectory.describe()))
    assert described[0] == {
        "name": "checkpoint at step 0",
        "step": 0,
        "learning_rate": 0.1,
        "learning_rate_sum": {"weight": 0.5},
        "optimizer": None,
    }


def test_the_fingerprint_is_stable_and_tells_rates_steps_and_names_apart() -> None:
    make = "from tracin import *; t = Trajectory([Checkpoint('a.pt', 0.1, step=1), Checkpoint('b.pt', 0.2, step=2)])"
    command = [sys.executable, "-c", f"{make}; print(t.fingerprint())"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    first = Checkpoint("a.pt", 0.1, step=1)
    same = Trajectory([first, Checkpoint("b.pt", 0.2, step=2)]).fingerprint()
    assert out.stdout.strip() == same
    others = [
        Trajectory([first, Checkpoint("b.pt", 0.3, step=2)]),
        Trajectory([first, Checkpoint("b.pt", 0.2, step=3)]),
        Trajectory([first, Checkpoint("c.pt", 0.2, step=2)]),
        Trajectory([first]),
    ]
    assert len({same, *(other.fingerprint() for other in others)}) == 5
