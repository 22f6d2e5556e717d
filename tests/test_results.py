"""Results: frozen, checked, and the same after a round trip."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tracin.errors import MissingExtraError, ResultError
from tracin.files import read_tensors, write_tensors
from tracin.results import Ranking, Scores, SelfInfluence, TopK

DTYPES = st.sampled_from([torch.float32, torch.float64])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PROVENANCE = st.dictionaries(st.text(max_size=8), JSON, max_size=4)


def values(draw: st.DrawFn, *shape: int) -> Tensor:
    number = st.floats(width=32, allow_nan=False)
    count = int(torch.Size(shape).numel())
    drawn = draw(st.lists(number, min_size=count, max_size=count))
    return torch.tensor(drawn, dtype=draw(DTYPES)).reshape(shape)


def ids(draw: st.DrawFn, *shape: int) -> Tensor:
    count = int(torch.Size(shape).numel())
    drawn = draw(st.lists(st.integers(0, 2**62), min_size=count, max_size=count))
    return torch.tensor(drawn, dtype=torch.int64).reshape(shape)


@st.composite
def results(draw: st.DrawFn) -> Callable[[], Scores | TopK | SelfInfluence]:
    """A call that makes a result: the type checks draw random numbers, which a strategy may not."""
    q, n = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    provenance = draw(PROVENANCE)
    kind = draw(st.sampled_from([Scores, TopK, SelfInfluence]))
    if kind is Scores:
        return partial(Scores, values(draw, q, n), ids(draw, n), ids(draw, q), provenance)
    if kind is SelfInfluence:
        return partial(SelfInfluence, values(draw, n), ids(draw, n), provenance)
    lists = [(ids(draw, q, n), values(draw, q, n)) for _ in range(2)]
    query_ids, notes = ids(draw, q), draw(st.lists(st.text(max_size=5), max_size=2))
    return lambda: TopK(Ranking(*lists[0]), Ranking(*lists[1]), query_ids, provenance, notes)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        elif isinstance(a, Ranking):
            assert_same(a, b)
        else:
            assert a == b, field.name


def scores() -> Scores:
    return Scores(
        torch.tensor([[0.5, -1.0, 2.0], [0.0, 4.0, -3.0]]),
        torch.tensor([3, 5, 8]),
        torch.tensor([17, 2]),
        {"method": "TracInCP", "seed": 0},
    )


def top_k() -> TopK:
    return TopK(
        Ranking(torch.tensor([[8, 3], [5, 3]]), torch.tensor([[2.0, 0.5], [4.0, 0.0]])),
        Ranking(torch.tensor([[5, 3], [8, 3]]), torch.tensor([[-1.0, 0.5], [-3.0, 0.0]])),
        torch.tensor([17, 2]),
        {"method": "TracInCP"},
        ("3 rows fill most lists",),
    )


def own() -> SelfInfluence:
    return SelfInfluence(
        torch.tensor([0.1, 3.0, 0.1, 0.2]), torch.tensor([9, 6, 7, 1]), {"method": "TracInCP"}
    )


ALL = pytest.mark.parametrize("make", [scores, top_k, own])


@given(make=results())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, make: Any) -> None:
    result = make()
    path = tmp_path_factory.mktemp("results") / "new" / "r.safetensors"
    result.save(path)
    assert_same(type(result).load(path), result)
    assert [file.name for file in path.parent.iterdir()] == ["r.safetensors"]


@ALL
def test_saving_twice_gives_the_same_bytes(tmp_path: Path, make: Any) -> None:
    make().save(tmp_path / "a")
    make().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@ALL
def test_frozen(make: Any) -> None:
    result = make()
    for field in dataclasses.fields(result):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, field.name, getattr(result, field.name))


def test_provenance_is_a_copy_and_plain_json() -> None:
    mine = {"checkpoints": ("a", "b"), "versions": {"torch": "2"}}
    result = SelfInfluence(torch.ones(1), torch.arange(1), mine)
    mine["versions"]["torch"] = "3"
    assert result.provenance == {"checkpoints": ["a", "b"], "versions": {"torch": "2"}}
    assert json.loads(json.dumps(result.provenance)) == result.provenance


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (scores, "Scores(2 queries × 3 train rows, float32, TracInCP)"),
        (top_k, "TopK(2 queries, k=2, float32, TracInCP)"),
        (own, "SelfInfluence(4 train rows, float32, TracInCP)"),
        (lambda: top_k().opponents, "Ranking(2 queries × 2, float32)"),
    ],
)
def test_repr(make: Any, shown: str) -> None:
    assert repr(make()) == shown


def test_ranking_is_by_descending_value_and_ties_by_lower_id() -> None:
    assert own().ranking().tolist() == [6, 1, 7, 9]


@given(st.data())
def test_ranking_agrees_with_sorting_pairs(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 8))
    numbers = data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5]), min_size=count, max_size=count))
    rows = data.draw(st.permutations(range(count)))
    result = SelfInfluence(torch.tensor(numbers), torch.tensor(rows, dtype=torch.int64))
    pairs = sorted(zip(numbers, rows, strict=True), key=lambda pair: (-pair[0], pair[1]))
    assert result.ranking().tolist() == [row for _, row in pairs]
    assert result.to_pandas().sort_values("rank")["train"].tolist() == result.ranking().tolist()


def test_scores_to_pandas() -> None:
    table = scores().to_pandas()
    assert (table.index.name, table.columns.name) == ("query", "train")
    assert table.loc[17, 8] == 2.0
    assert table.loc[2, 5] == 4.0
    assert table.shape == (2, 3)


def test_top_k_to_pandas() -> None:
    table = top_k().to_pandas()
    assert list(table.columns) == ["query", "rank", "sign", "train", "score"]
    second = table[(table["query"] == 2) & (table["sign"] == "opponent")]
    assert second[["rank", "train", "score"]].values.tolist() == [[1, 8, -3.0], [2, 3, 0.0]]
    assert len(table) == 8


def test_self_influence_to_pandas() -> None:
    table = own().to_pandas()
    assert table["train"].tolist() == [9, 6, 7, 1]
    assert table["rank"].tolist() == [4, 1, 3, 2]


@ALL
def test_a_table_is_the_users_to_write_into(make: Any) -> None:
    result, before = make(), make()
    table = result.to_pandas()
    table.iloc[:, -1] = 0
    assert_same(result, before)


@ALL
def test_without_pandas(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tracin\[eval\]'"):
        make().to_pandas()


ONES, IDS = torch.ones(2, 3), torch.arange(3)
BAD = {
    "one axis too few": (
        lambda: Scores(torch.ones(3), IDS, IDS),
        r"Scores.values is \[3\], not a tensor \[q, n\]",
    ),
    "no tensor": (lambda: Scores(None, IDS, IDS), "Scores.values is NoneType"),
    "half precision": (lambda: Scores(ONES.half(), IDS, IDS[:2]), "float16"),
    "swapped ids": (lambda: Scores(ONES, IDS[:2], IDS), r"Scores.train_ids is \[2\], not \[3\]"),
    "too many queries": (
        lambda: Scores(ONES, IDS, IDS),
        r"Scores.query_ids is \[3\], not \[2\]: one id per query",
    ),
    "float ids": (lambda: Scores(ONES, IDS.float(), IDS[:2]), "Scores.train_ids is float32"),
    "mask for ids": (lambda: Scores(ONES, IDS > 0, IDS[:2]), "Scores.train_ids is bool"),
    "ids of another shape": (lambda: Ranking(IDS, ONES), r"Ranking.ids is \[3\], not \[2, 3\]"),
    "two axes": (lambda: SelfInfluence(ONES, IDS), r"SelfInfluence.values is \[2, 3\]"),
    "too few ids": (lambda: SelfInfluence(torch.ones(3), IDS[:2]), r"SelfInfluence.train_ids is \[2\]"),
    "different k": (
        lambda: TopK(Ranking(IDS[None], ONES[:1]), Ranking(IDS[None, :2], ONES[:1, :2]), IDS[:1]),
        r"proponents are \[1, 3\] and opponents \[1, 2\]",
    ),
    "no ranking": (lambda: TopK(ONES, ONES, IDS), "TopK.proponents is a Tensor"),
    "provenance": (lambda: SelfInfluence(ONES[0], IDS, {"device": object()}), r"provenance\['device'\]"),
    "provenance list": (lambda: SelfInfluence(ONES[0], IDS, ["cp"]), "provenance is a list"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", BAD)
def test_what_does_not_agree_is_refused(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(ResultError, match=message):
        make()


@ALL
def test_another_type_is_named(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "r.safetensors"
    make().save(path)
    kind = type(make())
    for other in {Scores, TopK, SelfInfluence} - {kind}:
        with pytest.raises(ResultError, match=f"holds a {kind.__name__}, not a {other.__name__}"):
            other.load(path)


def rewrite(path: Path, change: dict[str, Any], drop: str | None = None) -> None:
    tensors, header = read_tensors(path, error=ResultError)
    tensors = {name: value.clone() for name, value in tensors.items() if name != drop}
    header = {"tracin": json.dumps({**json.loads(header["tracin"]), **change})}
    write_tensors(path, tensors, header, error=ResultError)


@ALL
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format 99.*upgrade"),
        ({"version": None}, "format None"),
        ({"provenance": []}, "is damaged: provenance is a list"),
        ({"format": "pt"}, "no saved result"),
        ({"type": "Future"}, "holds a Future"),
    ],
)
def test_a_header_that_is_not_ours_is_named(
    tmp_path: Path, make: Any, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "r.safetensors"
    make().save(path)
    rewrite(path, change)
    with pytest.raises(ResultError, match=rf"{re.escape(str(path))}.*{message}"):
        type(make()).load(path)


@pytest.mark.parametrize(
    ("header", "message"), [({}, "no saved result"), ({"tracin": "{"}, "damaged header")]
)
def test_another_safetensors_file_is_named(tmp_path: Path, header: dict[str, str], message: str) -> None:
    write_tensors(tmp_path / "model", {"weight": torch.ones(1)}, header, error=ResultError)
    with pytest.raises(ResultError, match=message):
        Scores.load(tmp_path / "model")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    own().save(tmp_path / "r")
    rewrite(tmp_path / "r", {}, drop="train_ids")
    with pytest.raises(ResultError, match=r"holds the tensors \['values'\]"):
        SelfInfluence.load(tmp_path / "r")


@ALL
def test_files_that_are_cut_short_or_missing_are_named(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "r.safetensors"
    make().save(path)
    whole = path.read_bytes()
    for size in (0, 3, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ResultError, match=re.escape(str(path))):
            type(make()).load(path)
    with pytest.raises(ResultError, match="does not exist"):
        type(make()).load(tmp_path / "gone")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    scores().save(path)
    with pytest.raises(ResultError, match="cannot write"):
        own().save(path / "below" / "a.safetensors")
    assert_same(Scores.load(path), scores())


@pytest.mark.parametrize("kind", ["scores", "self_influence"])
def test_a_flipped_byte_is_found(tmp_path: Path, kind: str) -> None:
    result = (
        Scores(torch.rand(2, 3), torch.arange(3), torch.arange(2), {})
        if kind == "scores"
        else SelfInfluence(torch.rand(4), torch.arange(4), {})
    )
    path = tmp_path / "result.safetensors"
    result.save(path)
    assert type(result).load(path).values.equal(result.values)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ResultError, match="damaged"):
        type(result).load(path)
