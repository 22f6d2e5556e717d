"""The rows that ask, append and repair are those that the index was made of, or are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import tracin
from index.indexing import M, N, files, method, rows
from tracin.errors import DataError, IndexFolderError, MemoryLimitError, OptionError, TracinError

OPTIONS: dict[str, Any] = {"projection": 64, "shard_rows": 10}
SHARD = "c0001-000000000010-000000000020.safetensors"


def build(folder: Path, train: Any = None, **options: Any) -> tracin.Index:
    return tracin.Index.build(method(), rows(N, 1) if train is None else train, folder, **OPTIONS, **options)


def permuted() -> tuple[Tensor, Tensor]:
    x, y = rows(N, 1)
    order = torch.arange(N)
    order[[20, 40]] = order[[40, 20]]
    return x[order], y[order]


def relabelled() -> tuple[Tensor, Tensor]:
    x, y = rows(N, 1)
    y[20] = (y[20] + 1) % 3
    return x, y


def parts(train: tuple[Tensor, Tensor], *stops: int) -> list[tuple[Tensor, Tensor]]:
    starts = (0, *stops)
    return [(train[0][a:b], train[1][a:b]) for a, b in zip(starts, (*stops, N), strict=True)]


# ---------------------------------------------------------------- asking


@pytest.mark.parametrize("other", [permuted, relabelled])
def test_other_rows_are_refused_by_name(tmp_path: Path, other: Callable[[], tuple[Tensor, Tensor]]) -> None:
    index = build(tmp_path)
    with pytest.raises(DataError, match="train: row 20 is not the row"):
        tracin.Index.open(tmp_path, method(), other())
    with pytest.raises(DataError, match="row 20"):
        index.asking(method(), other())
    dataset = tracin.Index.open(tmp_path, method(), TensorDataset(*other()))
    with pytest.raises(DataError, match="row 20"):
        dataset.check_rows()
    with pytest.raises(DataError, match="row 20"):
        dataset.influence(rows(M, 2))  # the sample of the estimate is all 53 rows
    with pytest.raises(DataError, match="row 20"):
        dataset.top_k(rows(M, 2), 3, rerank=N, estimate=False)
    index.check_rows(TensorDataset(*rows(N, 1)))


def test_an_audit_refuses_other_rows_before_it_reads_signals(tmp_path: Path) -> None:
    index = build(tmp_path)
    other = TensorDataset(*relabelled())
    for asked, train in ((tracin.Index.open(tmp_path, method(), other), None), (index, relabelled())):
        with pytest.raises(DataError, match="row 20"):
            tracin.audit.find_label_issues(asked, train, evidence=0)


@pytest.mark.parametrize("n", [N - 1, N + 1])
def test_train_rows_of_another_number_are_refused(tmp_path: Path, n: int) -> None:
    build(tmp_path)
    with pytest.raises(DataError, match=rf"train has {n} rows, and the index .* {N}"):
        tracin.Index.open(tmp_path, method(), rows(n, 1))
    with pytest.raises(DataError, match=f"train has {n} rows"):
        tracin.Index.open(tmp_path, method(), TensorDataset(*rows(n, 1)))


def test_the_check_needs_rows(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(OptionError, match="needs the train rows"):
        tracin.Index.open(tmp_path, method()).check_rows()


class Padded(torch.utils.data.Dataset):
    """Rows of several lengths."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = rows(N, 1)
        return x[row, 0, : 3 + row % 4].abs(), y[row]


class Sum(torch.nn.Module):
    """The sum over the length, without what is padded."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.0).sum(1)


def pad(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """To the longest of the batch, with -1."""
    x = torch.full((len(items), max(len(x) for x, _ in items), 6), -1.0)
    for at, (one, _) in enumerate(items):
        x[at, : len(one)] = one
    return x, torch.stack([y for _, y in items])


def test_padding_that_depends_on_the_batch_is_no_other_row(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Sum(), torch.nn.Linear(6, 3))
    steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
    task = tracin.Task(model, tracin.losses.cross_entropy)
    own = tracin.TracInCP(task, steps, batch_size=3, collate=pad, progress=False)
    index = tracin.Index.build(own, Padded(), tmp_path, **OPTIONS)
    index.check_rows()
    x, y = rows(3, 2)
    index.top_k((x[:, 0], y), 2, rerank=4)


def test_another_training_loss_is_refused_and_a_query_loss_is_not(tmp_path: Path) -> None:
    build(tmp_path)
    other = method(loss=other_loss)
    for ask in (lambda index: index.influence(rows(M, 2)), lambda index: index.self_influence()):
        with pytest.raises(IndexFolderError, match=r"the loss: .*only query_loss may be another"):
            ask(tracin.Index.open(tmp_path, other))
    own = method()
    own.task = tracin.Task(own.task.model, own.task.loss, query_loss=other_loss)
    tracin.Index.open(tmp_path, own).influence(rows(M, 2))


def other_loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])[:, 0]


def test_an_error_without_a_scale_is_told(tmp_path: Path) -> None:
    index = build(tmp_path)
    one = index.influence(rows(M, 2), where=None)
    assert one.provenance["projection_error"]["rank_correlation"] is not None
    x, y = rows(1, 1)
    alone = tracin.Index.build(method(), (x, y), tmp_path / "alone", **OPTIONS).top_k(rows(2, 2), 1)
    assert "too few different scores for a rank correlation" in alone.notes[-1]
    assert alone.provenance["projection_error"]["rank_correlation"] is None


def test_an_estimate_that_does_not_fit_the_memory_leaves_the_answer(tmp_path: Path) -> None:
    build(tmp_path)
    index = tracin.Index.open(tmp_path, method(memory="1KiB"), rows(N, 1))
    assert index.top_k(rows(M, 2), 3).notes[-1].endswith("does not fit memory=.")
    with pytest.raises(MemoryLimitError, match="KiB"):
        index.top_k(rows(M, 2), 3, rerank=5)


# ---------------------------------------------------------------- repairing


def appended(folder: Path, *stops: int) -> tuple[Tensor, Tensor]:
    train = rows(N, 1)
    first, *more = parts(train, *stops)
    index = build(folder, first, columns={"label": first[1]})
    for some in more:
        index = index.append(some, columns={"label": some[1]})
    return train


def test_all_rows_repair_every_segment(tmp_path: Path) -> None:
    train = appended(tmp_path, 20, 40)
    before = files(tmp_path)
    for name in (
        SHARD,
        "c0000-000000000020-000000000030.safetensors",
        "c0002-000000000050-000000000053.safetensors",
    ):
        (tmp_path / name).write_bytes(b"harm")
        other = method(batch_size=5)  # other batches change nothing
        index = tracin.Index.build(other, train, tmp_path, **OPTIONS, columns={"label": train[1]})
        assert files(tmp_path) == before, name
        assert index.verify() == []
        assert index.train is train
    first = parts(train, 20, 40)[0]
    (tmp_path / SHARD).unlink()
    index = build(tmp_path, first)
    assert files(tmp_path) == before
    assert len(index) == N
    assert index.train is None
    with pytest.raises(IndexFolderError, match=r"53 rows \(20 \+ 20 \+ 13\), and 30 are given"):
        build(tmp_path, tuple(part[:30] for part in train))
    with pytest.raises(IndexFolderError, match="other rows"):
        build(tmp_path, rows(N, 3))


def test_rows_in_memory_are_compared_by_build(tmp_path: Path) -> None:
    train = rows(200, 1)
    build(tmp_path, train)
    places = torch.linspace(0, 199, 64).round().long().tolist()
    row = next(row for row in range(90, 100) if row not in places)
    train[0][row] += 1
    with pytest.raises(DataError, match=f"row {row} "):
        build(tmp_path, train)


def test_a_shard_of_other_rows_is_not_taken(tmp_path: Path) -> None:
    index = build(tmp_path / "one")
    build(tmp_path / "two", rows(N, 3))
    whole = (tmp_path / "one" / SHARD).read_bytes()
    shutil.copy(tmp_path / "two" / SHARD, tmp_path / "one" / SHARD)
    assert index.verify() == [SHARD]
    with pytest.raises(IndexFolderError, match="made of other rows"):
        index.influence(rows(M, 2), estimate=False)
    build(tmp_path / "one")
    assert (tmp_path / "one" / SHARD).read_bytes() == whole


def test_a_folder_in_the_place_of_a_shard(tmp_path: Path) -> None:
    index = build(tmp_path)
    (tmp_path / SHARD).unlink()
    (tmp_path / SHARD).mkdir()
    assert index.verify() == [SHARD]
    with pytest.raises(IndexFolderError, match=f"{SHARD}.*remove it"):
        build(tmp_path)
    (tmp_path / SHARD).rmdir()
    build(tmp_path)
    assert index.verify() == []


def test_a_whole_index_is_built_again_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = appended(tmp_path, 30)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tracin.index.kept.storage.LocalFolder._partial", refused)
    build(tmp_path, train, columns={"label": train[1]}).self_influence()


def test_a_build_that_failed_at_once_leaves_its_folder_free(tmp_path: Path) -> None:
    x, y = rows(N, 1)
    x[9] = torch.nan
    with pytest.raises(TracinError):
        build(tmp_path / "failed", (x, y), columns={"label": y})
    assert "segment-000000000000.json" in files(tmp_path / "failed")
    build(tmp_path / "failed")
    build(tmp_path / "alone")
    assert files(tmp_path / "alone") == files(tmp_path / "failed")


# ---------------------------------------------------------------- appending


def test_equal_rows_go_on_with_their_segment_unless_they_are_placed(tmp_path: Path) -> None:
    train = rows(N, 1)
    first, second, third = parts(train, 20, 40)
    index = build(tmp_path, first)
    index = index.append(second).append(third)
    before = files(tmp_path)
    assert len(index.append(second)) == N
    assert len(index.append(first)) == N
    assert len(index.append(second, start=20)) == N
    assert files(tmp_path) == before
    with pytest.raises(OptionError, match="start is 21"):
        index.append(second, start=21)
    with pytest.raises(IndexFolderError, match="20 rows, and 13 are given"):
        index.append(third, start=20)
    again = index.append(second, start=N)
    assert len(again) == N + 20
    assert len(again.append(second, start=N)) == N + 20
    scores = again.influence(rows(M, 2)).values
    assert torch.equal(scores[:, 20:40], scores[:, N:])


def test_rows_that_only_look_like_a_segment_are_not_taken_for_it(tmp_path: Path) -> None:
    many = rows(200, 1)
    index = build(tmp_path, rows(30, 3)).append(many)
    places = torch.linspace(0, 199, 64).round().long().tolist()
    row = next(row for row in range(200) if row not in places)
    many[0][row] += 1
    with pytest.raises(DataError, match=rf"row {row} .*start=230"):
        index.append(many)
    assert len(index.append(many, start=230)) == 430


@pytest.mark.parametrize(
    ("before", "after"), [([1] * 30, ["a"] * 23), ([2**60 + 1] * 30, [0.5] * 23), ([True] * 30, [1] * 23)]
)
def test_columns_of_another_type_are_refused_before_anything_is_written(
    tmp_path: Path, before: list, after: list
) -> None:
    first, rest = parts(rows(N, 1), 30)
    index = build(tmp_path, first, columns={"kind": before})
    kept = files(tmp_path)
    with pytest.raises(OptionError, match="'kind' is"):
        index.append(rest, columns={"kind": after})
    assert files(tmp_path) == kept
    assert index.columns(["kind"])["kind"].to_pylist() == before


def test_types_that_go_together(tmp_path: Path) -> None:
    first, rest = parts(rows(N, 1), 30)
    index = build(tmp_path, first, columns={"a": [1] * 30, "b": [None] * 30})
    index = index.append(rest, columns={"a": [0.5] * 23, "b": ["x"] * 23})
    assert index.columns(["a"])["a"].to_pylist() == [1.0] * 30 + [0.5] * 23
    assert index.columns(["b"])["b"].to_pylist() == [None] * 30 + ["x"] * 23


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([2**70] * N, "cannot be kept"),
        ((1 for _ in range(N)), "is a generator"),
        (3, "is a int"),
        ([[1, 2]] * N, "lists as values"),
        ("a" * N, "is a str"),
        ([1, "a"] * 26 + [1], "cannot be kept"),
        (torch.tensor(3), "is a int"),
    ],
    ids=["large", "generator", "scalar", "lists", "text", "mixed", "scalar tensor"],
)
def test_columns_that_cannot_be(tmp_path: Path, values: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build(tmp_path / "index", columns={"kind": values})
    assert len(build(tmp_path / "index")) == N


# ---------------------------------------------------------------- verifying


def test_columns_are_verified_and_made_anew(tmp_path: Path) -> None:
    train = appended(tmp_path, 30)
    index = tracin.Index.open(tmp_path, method())
    path = tmp_path / "rows-000000000030.parquet"
    whole = path.read_bytes()
    harms = {"gone": None, "other": (tmp_path / "rows-000000000000.parquet").read_bytes(), "cut": whole[:-1]}
    for harm, content in harms.items():
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert index.verify() == [path.name], harm
        with pytest.raises(IndexFolderError, match=path.name):
            index.self_influence(where={"label": 1})
        with pytest.raises(IndexFolderError, match="not those that were kept"):
            build(tmp_path, train, columns={"label": [*train[1].tolist()[:-1], 7]})
        build(tmp_path, train, columns={"label": train[1]})
        assert path.read_bytes() == whole, harm
        assert index.verify() == []


@pytest.mark.parametrize("start", [0, 30])
def test_a_segment_that_is_gone_is_noticed(tmp_path: Path, start: int) -> None:
    train = rows(N, 1)
    first, rest = parts(train, 30)
    index = build(tmp_path, first)
    if start:
        index.append(rest)
    whole = files(tmp_path)
    (tmp_path / f"segment-{start:012d}.json").unlink()
    index = tracin.Index.open(tmp_path, method())
    assert index.verify() == [f"segment-{start:012d}.json"]
    with pytest.raises(IndexFolderError, match="is not whole"):
        index.influence(rows(M, 2))
    if start:
        index.append(rest)
    else:
        build(tmp_path, first)
    assert files(tmp_path) == whole


def test_an_index_that_grew_answers_about_its_first_rows(tmp_path: Path) -> None:
    first, rest = parts(rows(N, 1), 30)
    index = build(tmp_path, first)
    index.append(rest)
    assert index.influence(rows(M, 2)).values.shape == (M, 30)
    assert index.verify() == []


# ---------------------------------------------------------------- filtering and places


def test_values_of_a_filter(tmp_path: Path) -> None:
    train = rows(N, 1)
    index = build(tmp_path, columns={"label": train[1]})
    wanted = (train[1] >= 1).nonzero()[:, 0].tolist()
    for value in (torch.tensor([1, 2]), range(1, 3), {1, 2}, [torch.tensor(1), torch.tensor(2)]):
        assert index.self_influence(where={"label": value}).train_ids.tolist() == wanted
    for value in (10**30, object(), [1, "a"], {"a": 1}):
        with pytest.raises(OptionError, match="where"):
            index.self_influence(where={"label": value})


@pytest.mark.parametrize("url", ["s3://", "s3:///", "memory://"])
def test_a_url_of_no_bucket(url: str) -> None:
    with pytest.raises(OptionError, match="names no bucket or folder"):
        tracin.Index.open(url)
