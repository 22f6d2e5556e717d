"""A kept folder: the same pages as the live study's, without running anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from explorer.common import (
    TRAIN,
    Client,
    client_of,
    picture_study,
    regression_study,
    source_of,
    text_study,
)
from tracin.errors import OptionError, ResultError
from tracin.explorer.kept import keep, kept_source
from tracin.explorer.pages import Source
from tracin.files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "pages"
    keep(path, source, explained=4)
    return path


@pytest.fixture
def kept(folder: Path, tmp_path: Path) -> Client:
    return client_of(kept_source(folder), tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "/api/test",
        "/api/test?order=confidence&down=1",
        "/api/suspects?show=all&limit=500",
        "/api/trust",
        "/api/export?format=csv",
    ],
)
def test_the_pages_are_those_of_the_live_study(client, kept, path):
    assert kept.get(path).content == client.get(path).content


def test_the_study_says_that_it_is_kept(client, kept):
    told = kept.json("/api/study")
    assert (told["live"], told["upload"]) == (False, None)
    assert told["why_no_upload"]
    for name in ("title", "classes", "train", "test", "checkpoints"):
        assert told[name] == client.json("/api/study")[name]


def test_pictures_are_kept(client, kept):
    for row in range(TRAIN):
        assert kept.get(f"/face/train/{row}.png").content == client.get(f"/face/train/{row}.png").content
    assert kept.get(f"/face/train/{TRAIN}.png").status_code == 404


def test_some_explanations_are_kept(client, kept):
    tests = sorted(client.json("/api/test")["items"], key=lambda item: (item["correct"], -item["confidence"]))
    for side, rows in (
        ("test", [item["row"] for item in tests[:4]]),
        ("train", [item["row"] for item in client.json("/api/suspects", show="all", limit=4)["items"]]),
    ):
        for row in rows:
            found, live = (who.json(f"/api/explain/{side}/{row}", k=3) for who in (kept, client))
            assert found["query"] == live["query"]
            for mine, other in zip(found["targets"], live["targets"], strict=True):
                assert [c["row"] for c in mine["proponents"]] == [c["row"] for c in other["proponents"]]
                assert mine["path"]["losses"] == pytest.approx(other["path"]["losses"], rel=1e-4)
    missing = kept.get(f"/api/explain/test/{tests[-1]['row']}")
    assert missing.status_code == 400
    assert "Serve the study file" in missing.json()["error"]
    first = tests[0]["row"]
    assert kept.get(f"/api/explain/test/{first}?target=horse").status_code == 400


def test_a_folder_takes_decisions_and_no_uploads(kept):
    assert kept.decide(4, "relabel", "dog").status_code == 200
    assert "relabel" in kept.get("/api/export?format=csv").text
    found = kept.ask("POST", "/api/upload", content=b"x", headers={"Content-Type": "text/plain"})
    assert found.status_code == 400
    assert "kept folder" in found.json()["error"]


def test_nothing_of_a_folder_is_run(folder, tmp_path, monkeypatch):
    """A Python file in it is not imported, and the folder is not on the path."""
    (folder / "sitecustomize.py").write_text("raise SystemExit('ran')")
    (folder / "study.py").write_text("raise SystemExit('ran')")
    before = list(sys.path), set(sys.modules)
    kept_source(folder)
    assert (list(sys.path), set(sys.modules)) == before
    assert b"pickle" not in (folder / "explorer" / "rows.safetensors").read_bytes()


def test_texts_and_regressions_are_kept(tmp_path):
    for at, study in enumerate((text_study(), regression_study())):
        live = source_of(study)
        keep(tmp_path / str(at), live, explained=2)
        mine = client_of(kept_source(tmp_path / str(at)), tmp_path / f"kept-{at}")
        theirs = client_of(live, tmp_path / f"live-{at}")
        for path in ("/api/test", "/api/suspects?show=all"):
            assert mine.get(path).content == theirs.get(path).content
        live.answers.close()


def test_faces_beyond_the_room_are_left_out(source, tmp_path):
    """Those that are looked at first are there."""
    keep(tmp_path / "small", source, explained=1, room=1500)
    client = client_of(kept_source(tmp_path / "small"), tmp_path)
    items = client.json("/api/suspects", show="all", limit=500)["items"]
    kinds = [item["face"]["kind"] for item in items]
    assert "text" in kinds
    assert {item["face"]["text"] for item in items if item["face"]["kind"] == "text"} == {"not kept"}
    assert "image" in kinds[:5]


def test_an_audit_alone_is_shown(source, tmp_path):
    source.content.audit.save(tmp_path / "only" / "audit")
    client = client_of(kept_source(tmp_path / "only"), tmp_path)
    told = client.json("/api/study")
    assert (told["title"], told["train"], told["test"], told["classes"]) == (
        "only",
        TRAIN,
        0,
        list(source.content.names),
    )
    first = client.json("/api/suspects")["items"][0]
    assert first["face"] == {"kind": "text", "text": f"train row {first['row']}"}
    assert client.json("/api/test") == {"total": 0, "items": []}
    trust = client.json("/api/trust")
    assert (trust["coverage"], trust["verification"], trust["cost"]) == (None, None, None)
    assert "audit alone" in trust["notes"][-1]
    assert client.get("/api/explain/train/1").status_code == 400


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ResultError, match=r"no audit.*--out"):
        kept_source(tmp_path)


def test_a_kept_folder_is_not_kept_again(folder, tmp_path):
    with pytest.raises(OptionError, match="Copy the folder"):
        keep(tmp_path, kept_source(folder))


@pytest.fixture
def copy(source: Source, tmp_path: Path) -> Path:
    keep(tmp_path / "copy", source, explained=0)
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["study.json", "explained.json", "rows.safetensors", "faces.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x80\x04N."])
def test_a_damaged_folder_is_refused(copy, name, content):
    (copy / "explorer" / name).write_bytes(content)
    with pytest.raises(ResultError):
        kept_source(copy)


@pytest.mark.parametrize(
    "change", [{"version": 9}, {"format": "other"}, {"rows": {"train": 1, "test": 1}}, {"rows": None}]
)
def test_pages_of_another_version_or_audit_are_refused(copy, change):
    path = copy / "explorer" / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ResultError):
        kept_source(copy)


@pytest.mark.parametrize(
    "place", [[0, 0, 10**9, 0], [0, -5, 5, 0], [0, 9, 3, 0], [TRAIN, 0, 1, 0], [0, 0, 1, 77]]
)
def test_faces_outside_the_file_are_refused(copy, place):
    """Numbers of a stranger's file lead to nothing outside it."""
    tensors = {
        "bytes": torch.zeros(10, dtype=torch.uint8),
        "train.places": torch.tensor([place]),
        "test.places": torch.zeros(0, 4, dtype=torch.int64),
    }
    write_tensors(copy / "explorer" / "faces.safetensors", tensors, {}, ResultError)
    with pytest.raises(ResultError, match="face"):
        kept_source(copy)


def changed(value, path, new):
    """A copy of JSON with another value at a path."""
    if not path:
        return new(value) if callable(new) else new
    key, *rest = path
    if isinstance(value, dict):
        return {**value, key: changed(value.get(key), rest, new)}
    return [changed(each, rest, new) if at == key else each for at, each in enumerate(value)]


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (["rows", "test"], float("inf")),
        (["rows", "test"], 9.0),
        (["rows", "train"], True),
        (["rows", "test"], -1),
        (["names"], ["cat", "dog"]),
        (["names"], ["cat", "dog", "cat"]),
        (["names"], [{}, {"a": 1}, "dog"]),
        (["names"], None),
        (["names"], "cat"),
        (["title"], {}),
        (["title"], None),
        (["checkpoints"], {}),
        (["checkpoints"], [{}]),
        (["checkpoints", 0, "learning_rate"], float("nan")),
        (["checkpoints", 0, "learning_rate"], []),
        (["trust"], []),
        (["trust", "cutoff", "score"], float("nan")),
        (["trust", "verification"], []),
        (["trust", "notes"], [7]),
        (["trust", "notes"], None),
    ],
)
def test_a_tampered_study_is_refused_when_it_is_loaded(copy, path, new):
    file = copy / "explorer" / "study.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, new)))
    with pytest.raises(ResultError, match="keep"):
        kept_source(copy)


@pytest.mark.parametrize("number", ["1e999", "9" * 5000, "[" * 60_000])
def test_numbers_that_json_cannot_hold_are_refused(copy, number):
    file = copy / "explorer" / "study.json"
    file.write_text(file.read_text().replace('"title": "small"', f'"title": {number}'))
    with pytest.raises(ResultError, match="keep"):
        kept_source(copy)


@pytest.fixture(scope="module")
def told(folder: Path) -> dict:
    """The explanations of a folder."""
    return json.loads((folder / "explorer" / "explained.json").read_text())


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ([], None),
        ([], []),
        (["query"], None),
        (["query", "row"], 10**9),
        (["query", "row"], "1"),
        (["query", "side"], "valid"),
        (["query", "face"], []),
        (["query", "face", "kind"], "html"),
        (["query", "face", "src"], "https://example.org/x.png"),
        (["query", "score"], float("nan")),
        (["query", "label"], {}),
        (["targets"], None),
        (["targets", 0], []),
        (["targets", 0, "name"], 7),
        (["targets", 0, "words"], None),
        (["targets", 0, "proponents"], {}),
        (["targets", 0, "proponents", 0], {}),
        (["targets", 0, "opponents", 0, "score"], "1"),
        (["targets", 0, "path"], None),
        (["targets", 0, "path", "losses"], [1.0]),
        (["targets", 0, "path", "steps"], ["a", "b", "c"]),
    ],
)
def test_a_tampered_explanation_is_refused_when_it_is_loaded(copy, told, path, new):
    file = copy / "explorer" / "explained.json"
    key = next(
        key
        for key, each in told.items()
        if all(each["targets"][0][name] for name in ("proponents", "opponents"))
    )
    file.write_text(json.dumps(told))
    kept_source(copy)
    file.write_text(json.dumps(changed(told, [key, *path], new)))
    with pytest.raises(ResultError, match="keep"):
        kept_source(copy)


@pytest.mark.parametrize("key", ["test", "test/", "test/99", "valid/1", "test/-1", "test/1/2", "../1"])
def test_an_explanation_of_no_row_is_refused(copy, told, key):
    (copy / "explorer" / "explained.json").write_text(json.dumps({key: next(iter(told.values()))}))
    with pytest.raises(ResultError, match="keep"):
        kept_source(copy)


@pytest.mark.parametrize(
    ("kind", "data"),
    [(0, b"GIF89a"), (2, b"no json"), (2, b"[1]"), (2, b'{"a": 1}'), (2, b'[["a", 1]]'), (2, b"[" * 60_000)],
)
def test_a_face_of_another_kind_is_refused(copy, kind, data):
    tensors = {
        "bytes": torch.tensor(list(data), dtype=torch.uint8),
        "train.places": torch.tensor([[0, 0, len(data), kind]]),
        "test.places": torch.zeros(0, 4, dtype=torch.int64),
    }
    write_tensors(copy / "explorer" / "faces.safetensors", tensors, {}, ResultError)
    with pytest.raises(ResultError, match="train row 0"):
        kept_source(copy)


def test_values_of_another_kind_are_refused(copy):
    file = copy / "explorer" / "rows.safetensors"
    tensors, _ = read_tensors(file, ResultError)
    for name, dtype in (
        ("train.labels", torch.bool),
        ("test.losses", torch.int64),
        ("test.losses", torch.complex64),
    ):
        values = {key: value.clone() for key, value in tensors.items()}
        write_tensors(file, {**values, name: values[name].to(dtype)}, {}, ResultError)
        with pytest.raises(ResultError, match=name):
            kept_source(copy)


def test_a_place_that_cannot_be_written_is_told(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        keep(tmp_path / "file" / "pages", source, explained=0)


def test_the_live_study_can_be_kept_twice(tmp_path):
    live = source_of(picture_study())
    keep(tmp_path / "a", live, explained=1)
    before = (tmp_path / "a" / "explorer" / "faces.safetensors").read_bytes()
    keep(tmp_path / "a", live, explained=1)
    assert (tmp_path / "a" / "explorer" / "faces.safetensors").read_bytes() == before
    live.answers.close()
