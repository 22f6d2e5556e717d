"""An index at a URL, through fsspec's memory and local filesystems."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

import tracin
from index.indexing import M, N, files, method, rows
from tracin.errors import IndexFolderError, MissingExtraError, OptionError

pytest.importorskip("fsspec")

OPTIONS = {"projection": 64, "shard_rows": 10}


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/index" if request.param == "memory" else f"file://{tmp_path}/index"


def test_a_url_holds_the_same_bytes_and_answers(url: str, tmp_path: Path) -> None:
    train, queries = rows(N, 1), rows(M, 2)
    local = tracin.Index.build(method(), train, tmp_path / "local", **OPTIONS, columns={"label": train[1]})
    remote = tracin.Index.build(method(), train, url, **OPTIONS, columns={"label": train[1]})
    for name, content in files(tmp_path / "local").items():
        assert bytes(remote._contents.storage.read(name)) == content
    mine, theirs = local.top_k(queries, 4, where={"label": 1}), remote.top_k(queries, 4, where={"label": 1})
    assert torch.equal(mine.proponents.values, theirs.proponents.values)
    assert torch.equal(local.self_influence().values, remote.self_influence().values)
    assert remote.info().nbytes == local.info().nbytes


def test_a_build_goes_on(url: str) -> None:
    train = rows(N, 1)
    index = tracin.Index.build(method(), train, url, **OPTIONS)
    name = "c0001-000000000010-000000000020.safetensors"
    content = bytes(index._contents.storage.read(name))
    index._contents.storage.write(name, content[:-1])
    assert index.verify() == [name]
    tracin.Index.build(method(), train, url, **OPTIONS)
    assert bytes(index._contents.storage.read(name)) == content


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nowhere://"):
        tracin.Index.open("nowhere://bucket/index")
    with pytest.raises(IndexFolderError, match="holds no index"):
        tracin.Index.open(f"memory://{uuid.uuid4().hex}")
    with pytest.raises((MissingExtraError, OptionError, IndexFolderError)):
        tracin.Index.open(f"github://{tmp_path.name}")
    with pytest.raises(OptionError, match="folder is ''"):
        tracin.Index.open("")
