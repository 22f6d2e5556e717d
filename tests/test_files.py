"""Files are whole or absent."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracin.errors import CheckpointError, OptionError, ResultError
from tracin.files import (
    atomic_path,
    csv_cell,
    path_of,
    read_layout,
    read_tensors,
    require_file,
    write_csv,
    write_tensors,
    write_text,
)


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_ends_well_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "scores.csv"
    write_text(target, "old")
    with atomic_path(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
        assert partial.parent == target.parent
        assert partial.suffix == ".csv"
    assert target.read_text() == "new"
    assert everything(target.parent) == ["scores.csv"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "scores.csv"
    write_text(target, "old")

    def write() -> None:
        with atomic_path(target) as partial:
            partial.write_text("half of it")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "old"
    assert everything(tmp_path) == ["scores.csv"]


def test_who_reads_the_old_file_reads_it_to_the_end(tmp_path: Path) -> None:
    target = tmp_path / "scores.csv"
    write_text(target, "old")
    with target.open() as reader:
        write_text(target, "new")
        assert reader.read() == "old"
    assert target.read_text() == "new"


def test_a_block_that_writes_nothing_is_an_error_and_not_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "scores.csv"):
        pass
    assert everything(tmp_path) == []


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtype=st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
    ),
)
def test_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    tensors = {str(at): torch.randint(0, 2, shape).to(dtype) for at, shape in enumerate(shapes)}
    write_tensors(path, tensors, {"note": "ü"}, error=CheckpointError)
    found, header = read_tensors(path, error=CheckpointError)
    assert header == {"note": "ü"}
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    assert [(name, shape) for name, _, shape in read_layout(path, error=CheckpointError)[0]] == sorted(
        (str(at), shape) for at, shape in enumerate(shapes)
    )


def test_tensors_that_share_memory_and_strided_views_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "again": base,
        "transposed": base.T,
        "row": base[1],
        "expanded": base[:1].expand(3, 4),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {}, error=CheckpointError)
    found, _ = read_tensors(tmp_path / "a.safetensors", error=CheckpointError)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name


def test_writing_into_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {}, error=CheckpointError)
    read_tensors(path, error=CheckpointError)[0]["a"].zero_()
    assert torch.equal(read_tensors(path, error=CheckpointError)[0]["a"], torch.ones(3))


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(100)}, {}, error=CheckpointError)
    path.write_bytes(path.read_bytes()[:cut])
    for read in (read_tensors, read_layout):
        with pytest.raises(ResultError, match=re.escape(str(path))):
            read(path, error=ResultError)


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt does not exist"):
        require_file(tmp_path / "gone.pt", CheckpointError)
    with pytest.raises(CheckpointError, match="is a folder"):
        require_file(tmp_path, CheckpointError)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match=r"empty\.pt is empty"):
        require_file(tmp_path / "empty.pt", CheckpointError)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match=r"cannot write .*a\.safetensors.*Choose a folder"):
        write_tensors(tmp_path / "file" / "a.safetensors", {}, {}, error=ResultError)
    assert everything(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_regular_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    before = everything(tmp_path)
    for name, fact in (("pipe", "a pipe"), ("link", "a pipe"), ("folder", "it is a folder")):
        with pytest.raises(OSError, match=fact):
            write_text(tmp_path / name, "text")
        with pytest.raises(ResultError, match=f"cannot write .*{name}.*{fact}"):
            write_tensors(tmp_path / name, {}, {}, error=ResultError)
    assert everything(tmp_path) == before
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_to_a_file_or_to_nothing_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "old", "old")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "old").read_text() == "old"


@given(text=st.text(alphabet="'=+-@\t\ra1", max_size=5))
def test_cells_that_begin_a_formula_come_back_without_an_apostrophe(text: str) -> None:
    cell = csv_cell(text)
    assert cell[:1] not in {"=", "+", "-", "@", "\t", "\r"}
    changed = re.match(r"'+[=+\-@\t\r]", cell)
    assert (cell[1:] if changed else cell) == text
    assert bool(changed) == (text.lstrip("'")[:1] in {"=", "+", "-", "@", "\t", "\r"})


def test_numbers_stay_numbers_in_csv() -> None:
    text = io.StringIO(newline="")
    write_csv(text, [{"a": -1.5, "b": "-1.5", "c": None, "d": True, "e": (3, 4)}])
    assert text.getvalue() == "a,b,c,d,e\r\n-1.5,'-1.5,,True,3 4\r\n"


@pytest.mark.parametrize(("value", "fact"), [(3, "export: path is a int"), ("a\0b", "no null character")])
def test_what_is_no_path_is_named(value: object, fact: str) -> None:
    with pytest.raises(OptionError, match=fact):
        path_of(value, "export: path", OptionError)


def test_files_have_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {}, ResultError)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
