"""Files become tensors, and nothing in them is run."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tracin import Checkpoint, Trajectory
from tracin.errors import CheckpointError


class RunsCode:
    """A pickle of this touches a file when it is opened by the ordinary unpickler."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.mark),)


def old_torch_format(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def numpy_file(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([content], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("write", [torch.save, old_torch_format, bare_pickle, numpy_file])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".safetensors"])
def test_a_pickle_that_runs_code_runs_nothing(tmp_path: Path, write: Any, suffix: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    write({"weight": torch.ones(1), "bias": RunsCode(mark)}, path)
    for read in (
        lambda: Checkpoint(path).load(),
        lambda: Checkpoint(path, key="weight").load(),
        Trajectory.from_files([path], 0.1)[0].load,
    ):
        with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
            read()
        assert "weights_only=False" not in str(caught.value)
    assert not mark.exists()


def test_the_malicious_pickle_would_have_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save(RunsCode(mark), tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()


def test_a_pickled_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 1), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"would run torch\.nn\.modules\.linear\.Linear.*state_dict"):
        Checkpoint(tmp_path / "model.pt").load()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 1)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"script\.pt is not a file of tensors"):
        Checkpoint(tmp_path / "script.pt").load()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    (torch.save if suffix == ".pt" else save_file)(nn.Linear(50, 50).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        Checkpoint(path).load()


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 100, b"\x80\x02.", b"PK\x03\x04" + b"x" * 99])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".bin"])
def test_junk_is_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        Checkpoint(path).load()


def test_a_zip_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        Checkpoint(path).load()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_missing_files_and_folders_are_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match=r"gone\S+ does not exist"):
        Checkpoint(tmp_path / f"gone{suffix}").load()
    with pytest.raises(CheckpointError, match=r"gone\S+ does not exist"):
        Trajectory.from_files([tmp_path / f"gone{suffix}"], 0.1)
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        Checkpoint(tmp_path / f"folder{suffix}").load()


STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def wrapped(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


FOUND = {
    "plain": (STATE, None),
    "state_dict": ({"epoch": 3, "state_dict": STATE, "optimizer": {"lr": 0.1}}, None),
    "model_state_dict": ({"model_state_dict": STATE, "loss": torch.tensor(1.0)}, None),
    "model": ({"model": STATE, "args": None}, None),
    "nested": ({"model": {"state_dict": STATE, "name": "net"}, "step": 1}, None),
    "by key": ({"ema": STATE, "model": wrapped("x.")}, "ema"),
    "by dotted key": ({"ema": {"shadow": STATE}, "model": {}}, "ema.shadow"),
    "key to a wrapper": ({"run": {"state_dict": STATE, "epoch": 1}}, "run"),
    "data parallel": (wrapped("module."), None),
    "compiled": (wrapped("_orig_mod."), None),
    "compiled data parallel": (wrapped("_orig_mod.module."), None),
    "data parallel compiled": ({"state_dict": wrapped("module._orig_mod.")}, None),
    "compiled submodule": (
        {name.replace("0.", "0._orig_mod."): value for name, value in STATE.items()},
        None,
    ),
    "extra state": ({**STATE, "0._extra_state": {"scale": 2}}, None),
    "tied": ({**STATE, "again": STATE["0.bias"]}, None),
}


@pytest.mark.parametrize("where", ["memory", "torch.save"])
@pytest.mark.parametrize("case", FOUND)
def test_the_state_is_found_and_named_plainly(tmp_path: Path, case: str, where: str) -> None:
    content, key = FOUND[case]
    if where == "memory":
        source: Any = content
    else:
        source = tmp_path / "run.pt"
        torch.save(content, source)
    state = Checkpoint(source, key=key).load()
    assert sorted(state) == sorted([*STATE, *(["again"] if case == "tied" else [])])
    for name, value in STATE.items():
        assert torch.equal(state[name], value)


def test_what_was_tidied_is_logged_and_noted(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint({**wrapped("module._orig_mod."), "module._extra_state": 1}, step=4)
    with caplog.at_level(logging.INFO, logger="tracin"):
        checkpoint.load()
    said = "\n".join(record.getMessage() for record in caplog.records)
    for text in ("checkpoint at step 4", "'module.'", "'_orig_mod.'", "from 2 names", "'_extra_state'"):
        assert text in said
        assert text == "checkpoint at step 4" or any(text in note for note in checkpoint.notes)
    assert Checkpoint(STATE).notes == ()


def test_names_stay_where_only_some_have_the_prefix_or_two_would_become_one() -> None:
    for names in (["module.a", "head.b"], ["_orig_mod.a", "a"]):
        assert sorted(Checkpoint({name: torch.ones(1) for name in names}).load()) == sorted(names)


LOST = {
    "no state": (
        {"epoch": 3, "lr": 0.1},
        None,
        r"no state of a model \(it has 'epoch', 'lr'; its 'epoch' is a int\)",
    ),
    "two states": ({"model": STATE, "state_dict": STATE, "n": 1}, None, r"2 states.*key="),
    "a list": ([STATE], None, "holds a list"),
    "a tensor": (torch.ones(2), None, "holds a Tensor"),
    "unknown key": ({"model": STATE}, "ema", r"no 'ema'.*'model'"),
    "unknown inner key": ({"ema": {"a": 1}}, "ema.shadow", r"no 'ema\.shadow'.*'a'"),
    "key to a tensor": (STATE, "0.bias", "holds a Tensor"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_holds_no_state_is_told(tmp_path: Path, case: str) -> None:
    content, key, message = LOST[case]
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=rf"(?s)run\.pt.*{message}"):
        Checkpoint(tmp_path / "run.pt", key=key).load()


def test_a_safetensors_file_has_no_keys(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="leave key='model' out"):
        Checkpoint(tmp_path / "a.safetensors", key="model").load()


def test_entries_that_are_no_dense_tensors_are_named() -> None:
    with pytest.raises(CheckpointError, match="'b' is on the meta device"):
        Checkpoint({"a": torch.ones(1), "b": torch.ones(1, device="meta")})
    with pytest.raises(CheckpointError, match=r"'b' is of layout torch\.sparse_coo"):
        Checkpoint({"a": torch.ones(1), "b": torch.eye(2).to_sparse()})


def test_tied_names_that_the_file_lacks_are_told(tmp_path: Path) -> None:
    for header in ('{"aliases": {"a": "gone"}}', '{"aliases": 3}', "[]", "{"):
        save_file(STATE, tmp_path / "a.safetensors", metadata={"tracin": header})
        with pytest.raises(CheckpointError, match=r"a\.safetensors names tied tensors that it does not hold"):
            Checkpoint(tmp_path / "a.safetensors").load()


def test_a_file_object_is_no_state() -> None:
    with pytest.raises(Exception, match="state"):
        Checkpoint(io.BytesIO())  # type: ignore[arg-type]
