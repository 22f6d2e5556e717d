"""``tracin index``: build, query, info, verify, append, and what they refuse."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tracin
from tracin.index.index import Index
from tracin.study import study_file

Run = Callable[..., Any]


@pytest.fixture
def built(file: Path, run: Run, tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "index"
    done = run(
        "index", "build", file, "--out", folder, "--size", "40", "--shard-rows", "10", "--labels", "--quiet"
    )
    assert done.code == 0, done.err
    assert "23 rows × 2 checkpoints, whole" in done.out
    assert "6 of 6" in done.out
    return file, folder


def test_a_query_tells_lists_and_error(built: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    file, folder = built
    done = run(
        "index", "query", file, "--index", folder, "--query", "4", "1", "--top", "3", "--where", "label=1", "label=2",
        "--rerank", "5", "--out", tmp_path / "out", "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "Test row 4" in done.out
    assert "relative error" in done.out
    with (tmp_path / "out" / "answers.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [row["query"] for row in rows] == ["4"] * 6 + ["1"] * 6
    assert all(int(row["train"]) % 3 in (1, 2) for row in rows)


def test_verify_finds_a_damaged_shard_and_build_mends_it(built: tuple[Path, Path], run: Run) -> None:
    file, folder = built
    assert run("index", "verify", folder).code == 0
    shard = folder / "c0001-000000000010-000000000020.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    done = run("index", "verify", folder)
    assert done.code == 1
    assert shard.name in done.out
    again = (
        "index",
        "build",
        file,
        "--out",
        folder,
        "--size",
        "40",
        "--shard-rows",
        "10",
        "--labels",
        "--quiet",
    )
    assert run(*again).code == 0
    assert shard.read_bytes() == whole


def test_refusals(built: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    file, folder = built
    for words, message in (
        (("query", file, "--index", folder, "--query", "99"), "0 to 5"),
        (("query", file, "--index", folder, "--query", "1", "--where", "label"), "COLUMN=VALUE"),
        (("query", file, "--index", folder, "--query", "1", "--where", "colour=3"), "no column 'colour'"),
        (("query", file, "--index", folder, "--query", "1", "--top", "24"), "k"),
        (("build", file, "--out", folder, "--size", "41"), "size 40 in the index, size 41 now"),
        (("build", file, "--out", tmp_path / "two", "--workers", "0"), "--workers"),
        (("append", file, "--out", folder), "nothing to add"),
        (("info", tmp_path / "nothing"), "holds no index"),
    ):
        done = run("index", *words)
        assert done.code == 2, (words, done.out)
        assert message in done.err, (words, done.err)


def test_appended_rows_keep_their_labels(built: tuple[Path, Path], run: Run) -> None:
    file, folder = built
    file.write_text(file.read_text().replace("train=rows(23, 1)", "train=rows(31, 1)"))
    done = run("index", "append", file, "--out", folder, "--quiet")
    assert done.code == 0, done.err
    assert "31 rows × 2 checkpoints, whole" in done.out
    labels = Index.open(folder).columns(["label"])
    assert labels["label"].to_pylist() == [row % 3 for row in range(31)]
    assert labels["row"].to_pylist() == list(range(31))


def test_append_refuses_columns_that_only_python_can_give(file: Path, run: Run, tmp_path: Path) -> None:
    with study_file(file) as study:
        method = tracin.TracInCP(study.task, study.trajectory, device="cpu", progress=False)
        tracin.Index.build(method, study.train, tmp_path / "own", projection=8, columns={"path": ["p"] * 23})
    file.write_text(file.read_text().replace("train=rows(23, 1)", "train=rows(31, 1)"))
    done = run("index", "append", file, "--out", tmp_path / "own", "--quiet")
    assert done.code == 2
    assert "the columns path" in done.err


def test_a_grown_study_repairs_every_segment(built: tuple[Path, Path], run: Run) -> None:
    file, folder = built
    file.write_text(
        file.read_text().replace(
            "train=rows(23, 1)", "train=tuple(map(torch.cat, zip(rows(23, 1), rows(8, 3))))"
        )
    )
    assert run("index", "append", file, "--out", folder, "--quiet").code == 0
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in (
        "c0001-000000000010-000000000020.safetensors",
        "c0000-000000000023-000000000031.safetensors",
    ):
        for words in (
            ("build", "--size", "40", "--shard-rows", "10", "--labels", "--batch-size", "5"),
            ("append",),
        ):
            (folder / name).write_bytes(b"harm")
            assert run("index", "verify", folder).code == 1
            done = run("index", words[0], file, "--out", folder, "--quiet", *words[1:])
            assert done.code == 0, done.err
            assert "8 of 8" in done.out
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_append_compares_the_rows_before(built: tuple[Path, Path], run: Run) -> None:
    file, folder = built
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    file.write_text(file.read_text().replace("train=rows(23, 1)", "train=rows(31, 5)"))
    done = run("index", "append", file, "--out", folder, "--quiet")
    assert done.code == 2
    assert "other rows" in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_row_of_the_other_sign_is_listed(built: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    file, folder = built
    done = run(
        "index", "query", file, "--index", folder, "--query", "4", "--top", "23", "--out", tmp_path / "out", "--quiet"
    )  # fmt: skip
    assert done.code == 0, done.err
    with (tmp_path / "out" / "answers.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    signs = {
        row["sign"]: [float(other["score"]) for other in rows if other["sign"] == row["sign"]] for row in rows
    }
    assert min(signs["proponent"]) >= 0.0
    assert max(signs["opponent"]) <= 0.0
    assert len(rows) == 23
