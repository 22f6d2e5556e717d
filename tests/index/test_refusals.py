"""Bad input: each gets an error of ours that says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import tracin
from index.indexing import M, N, method, rows
from tracin.errors import IndexFolderError, OptionError, TracinError

OPTIONS = {"projection": 64, "shard_rows": 10}


@pytest.fixture
def index(tmp_path: Path) -> tracin.Index:
    return tracin.Index.build(
        method(), rows(N, 1), tmp_path / "index", **OPTIONS, columns={"label": rows(N, 1)[1]}
    )


@pytest.fixture
def folder(index: tracin.Index, tmp_path: Path) -> Path:
    assert len(index) == N
    return tmp_path / "index"


def test_a_folder_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(IndexFolderError, match="holds no index"):
        tracin.Index.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("version", "mend"),
    [(3, "upgrade tracin"), (1, "build the index again"), ("old", "build the index again")],
)
def test_another_version(folder: Path, version: object, mend: str) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    with pytest.raises(IndexFolderError, match=mend):
        tracin.Index.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "something"}'])
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(IndexFolderError, match=r"manifest\.json"):
        tracin.Index.open(folder)


def test_a_changed_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"batch_rows": 8', '"batch_rows": 9'))
    with pytest.raises(IndexFolderError, match="damaged"):
        tracin.Index.open(folder)


def test_a_missing_segment(folder: Path) -> None:
    index = tracin.Index.open(folder, method())
    index.append(rows(5, 3), columns={"label": rows(5, 3)[1]})
    (folder / "segment-000000000000.json").unlink()
    with pytest.raises(IndexFolderError, match="rows from 0 is missing"):
        tracin.Index.open(folder)


def test_an_index_of_another_model(folder: Path) -> None:
    with pytest.raises(IndexFolderError, match=r"another model: .*digest"):
        tracin.Index.open(folder, method(seed=20)).influence(rows(M, 2))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    steps = tracin.Trajectory([tracin.Checkpoint(wide.state_dict(), learning_rate=0.1)])
    other = tracin.TracInCP(tracin.Task(wide, tracin.losses.cross_entropy), steps, progress=False)
    with pytest.raises(IndexFolderError, match="another model"):
        tracin.Index.open(folder, other).top_k(rows(M, 2), 3)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "c0001-000000000010-000000000020.safetensors").unlink()
    with pytest.raises(IndexFolderError, match=r"1 of 18 shards are missing, c0001-000000000010"):
        tracin.Index.open(folder, method()).top_k(rows(M, 2), 3)


def test_options_out_of_range(index: tracin.Index, folder: Path) -> None:
    queries = rows(M, 2)
    with pytest.raises(OptionError, match=f"{N}"):
        index.top_k(queries, N + 1)
    with pytest.raises(OptionError, match=r"no column 'colour'\. It has label"):
        index.top_k(queries, 3, where={"colour": "red"})
    with pytest.raises(OptionError, match="leaves no row"):
        index.top_k(queries, 3, where={"label": 7})
    with pytest.raises(OptionError, match="where cannot be applied"):
        index.top_k(queries, 3, where={"label": "three"})
    with pytest.raises(OptionError, match="where is a str"):
        index.top_k(queries, 3, where="label = 3")
    with pytest.raises(OptionError, match="rerank"):
        index.top_k(queries, 3, rerank=2)
    with pytest.raises(OptionError, match="rerank needs the train rows"):
        tracin.Index.open(folder, method()).top_k(queries, 3, rerank=9)
    with pytest.raises(OptionError, match="needs the model"):
        tracin.Index.open(folder).top_k(queries, 3)
    with pytest.raises(OptionError, match="7 rows"):
        index.aggregate(queries, by=[1, 2])
    with pytest.raises(OptionError, match=r"by is float32 \[7\]\. Give the group of each row: whole numbers"):
        index.aggregate(queries, by=[0.5] * M)
    with pytest.raises(OptionError, match="by is 'labels'"):
        index.aggregate(queries, by="labels")
    with pytest.raises(OptionError, match="reduction is 'median'"):
        index.aggregate(queries, reduction="median")
    with pytest.raises(OptionError, match="workers"):
        index.top_k(queries, 3, workers=0)


def test_building_options(tmp_path: Path) -> None:
    train = rows(N, 1)
    for options, words in (
        ({"dtype": "float8"}, "float32, float16"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"columns": {"label": [1, 2]}}, "2 values for 53 rows"),
        ({"columns": {"row": list(range(N))}}, "'row'"),
    ):
        with pytest.raises(OptionError, match=words):
            tracin.Index.build(method(), train, tmp_path / words, **{**OPTIONS, **options})


def test_queries_of_another_shape(index: tracin.Index) -> None:
    x, y = rows(M, 2)
    with pytest.raises(TracinError, match=r"queries|train"):
        index.top_k((x[:, :, :5], y), 3)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(IndexFolderError, match="another folder"):
        tracin.Index.build(method(), rows(N, 1), tmp_path / "index", **OPTIONS)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("no folder")
    with pytest.raises(IndexFolderError, match="cannot"):
        tracin.Index.build(method(), rows(N, 1), tmp_path / "index", **OPTIONS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_clearly_and_can_go_on(small_disk: Path, tmp_path: Path) -> None:
    train = rows(200, 1)
    with pytest.raises(IndexFolderError, match="Make room"):
        tracin.Index.build(method(), train, small_disk / "index", **OPTIONS)
    left = {path.name for path in (small_disk / "index").iterdir()}
    assert any(name.startswith("c0000") for name in left), "nothing was finished before the disk was full"
    assert not any(name.startswith(".") for name in left), "half a file was left"
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    tracin.Index.build(method(), train, small_disk / "index", **OPTIONS)
    tracin.Index.build(method(), train, tmp_path / "whole", **OPTIONS)
    for path in (tmp_path / "whole").iterdir():
        assert (small_disk / "index" / path.name).read_bytes() == path.read_bytes()


def test_one_thread_more_is_no_other_index(folder: Path) -> None:
    """Versions, threads and device are told, and never refused."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["made_with"]["threads"] = 99
    path.write_text(json.dumps(content))
    tracin.Index.build(method(), rows(N, 1), folder, **OPTIONS)
    assert torch.get_num_threads() != 99
