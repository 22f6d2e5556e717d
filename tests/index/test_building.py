"""Builds that are cut short, killed, damaged, doubled, or without room: the same bytes in the end, or a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import tracin
from index.indexing import N, files, method, rows
from tracin.errors import DataError, IndexFolderError
from tracin.index.kept.storage import PARTIAL, LocalFolder

OPTIONS = {"projection": 64, "shard_rows": 10}


def build(folder: Path, **options: object) -> tracin.Index:
    return tracin.Index.build(method(), rows(N, 1), folder, **{**OPTIONS, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "index"
    build(folder)
    return files(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twenty_times_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """``killing.py`` kills builds at random moments, and one in the middle of a file, and compares in the end."""
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split("=") for line in done.stdout.split())
    assert int(told["killed"]) >= 20
    assert int(told["unfinished"]) >= 5, "too few kills fell into the middle of the work"
    assert told["halves"] == "1"
    assert told["same"] == "True"


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "text"])
def test_a_damaged_shard_is_found_and_made_anew(
    tmp_path: Path, undisturbed: dict[str, bytes], harm: str
) -> None:
    index = build(tmp_path)
    path = tmp_path / "c0001-000000000010-000000000020.safetensors"
    content = path.read_bytes()
    middle = len(content) * 3 // 4
    path.write_bytes({
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "cut": content[:middle],
        "empty": b"",
        "text": b"this is not a shard",
    }[harm])  # fmt: skip
    assert index.verify() == [path.name]
    with pytest.raises(IndexFolderError, match=path.name):
        index.influence(rows(3, 2))
    build(tmp_path)
    assert files(tmp_path) == undisturbed


def test_every_flipped_byte_of_the_tensors_is_seen(tmp_path: Path) -> None:
    index = build(tmp_path)
    path = tmp_path / "c0000-000000000050-000000000053.safetensors"
    content = path.read_bytes()
    for at in range(0, len(content), 37):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        assert index.verify() == [path.name], f"byte {at} of {len(content)}"


def test_a_shard_of_another_index_is_not_taken(tmp_path: Path) -> None:
    build(tmp_path / "one")
    build(tmp_path / "two", projection=tracin.Projection(64, seed=1))
    name = "c0000-000000000000-000000000010.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    assert tracin.Index.open(tmp_path / "one").verify() == [name]


def test_temporary_files_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    build(tmp_path)
    dead = tmp_path / f"{PARTIAL}dead.safetensors"
    dead.write_bytes(b"half")
    storage = LocalFolder(tmp_path)
    with storage._partial("living.json", b"content") as living:
        assert storage.sweep() == [living.name]
        assert living.read_bytes() == b"content"
    assert not dead.exists()
    assert not living.exists()


def test_two_builds_at_once(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    errors: list[Exception] = []

    def one(own: tracin.TracInCP) -> None:
        try:
            tracin.Index.build(own, rows(N, 1), tmp_path, **OPTIONS)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=one, args=(method(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert files(tmp_path) == undisturbed


@pytest.mark.parametrize("workers", [2])
def test_processes_make_the_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes], workers: int) -> None:
    index = build(tmp_path, workers=workers)
    assert files(tmp_path) == undisturbed
    queries = rows(5, 2)
    alone, together = index.top_k(queries, 4), index.top_k(queries, 4, workers=workers)
    assert torch.equal(alone.proponents.values, together.proponents.values)
    assert torch.equal(alone.opponents.ids, together.opponents.ids)


def test_other_choices_are_refused_with_the_difference(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(IndexFolderError, match="size 64 in the index, size 32 now"):
        build(tmp_path, projection=32)
    with pytest.raises(IndexFolderError, match="float16 in the index, float32 now"):
        build(tmp_path, dtype="float32")
    with pytest.raises(IndexFolderError, match="shard_rows: 10 in the index, 11 now"):
        build(tmp_path, shard_rows=11)
    with pytest.raises(IndexFolderError, match=r"checkpoints: number 0: digest"):
        tracin.Index.build(method(seed=20), rows(N, 1), tmp_path, **OPTIONS)
    with pytest.raises(IndexFolderError, match=r"checkpoints: number 1: learning_rate 0.07 .* 0.08"):
        tracin.Index.build(method(rates=(0.3, 0.08, 0.11)), rows(N, 1), tmp_path, **OPTIONS)
    with pytest.raises(IndexFolderError, match="53 rows, and 52 are given"):
        tracin.Index.build(method(), rows(N - 1, 1), tmp_path, **OPTIONS)
    with pytest.raises(IndexFolderError, match="other rows"):
        tracin.Index.build(method(), rows(N, 3), tmp_path, **OPTIONS)


def test_columns_of_other_values_are_refused(tmp_path: Path) -> None:
    train = rows(N, 1)
    build(tmp_path, columns={"label": train[1], "text": ["a"] * N})
    before = files(tmp_path)
    build(tmp_path, columns={"text": ["a"] * N, "label": train[1].tolist()})
    with pytest.raises(IndexFolderError, match="other values in its columns"):
        build(tmp_path, columns={"label": train[1], "text": ["b"] * N})
    with pytest.raises(IndexFolderError, match="columns label, text, and label are given"):
        build(tmp_path, columns={"label": train[1]})
    assert files(tmp_path) == before


class Changing(torch.utils.data.Dataset):
    """Row 25 changes after some reads."""

    def __init__(self) -> None:
        self.rows, self.reads = rows(N, 1), 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.rows[0][row], self.rows[1][row]
        if row == 25:
            self.reads += 1
            x = x + self.reads * (self.reads > 3)
        return x, y


def test_rows_that_change_between_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 25"):
        tracin.Index.build(method(), Changing(), tmp_path, **OPTIONS)


def test_a_resumed_build_sees_changed_rows_too(tmp_path: Path) -> None:
    """Row 17 is not among those of the fingerprint, and its first shard is from before."""
    train = rows(200, 1)
    tracin.Index.build(method(), train, tmp_path, **OPTIONS)
    (tmp_path / "c0002-000000000090-000000000100.safetensors").unlink()
    places = torch.linspace(0, 199, 64).round().long().tolist()
    row = next(row for row in range(90, 100) if row not in places)
    train[0][row] += 1
    with pytest.raises(DataError, match=f"row {row} "):
        tracin.Index.build(method(), train, tmp_path, **OPTIONS)
