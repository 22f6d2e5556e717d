"""Decisions: an append-only log of which nothing acknowledged is lost, whoever writes and whatever dies."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
import uuid
from pathlib import Path

import pytest

from explorer.common import NAMES, TRAIN, client_of
from explorer.forking import audit
from tracin.errors import OptionError, ResultError
from tracin.explorer.decisions import ConflictError, DecisionLog
from tracin.explorer.logfile import check_place


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "decisions.jsonl"


@pytest.fixture
def log(path: Path) -> DecisionLog:
    return DecisionLog(path, audit())


def name() -> str:
    return str(uuid.uuid4())


def told(log: DecisionLog) -> dict:
    return {row: (one.action, one.label) for row, one in log.decided().items()}


def test_decisions_are_there_after_a_restart(log, path):
    log.decide(name(), 3, "relabel", "2", None)
    first = log.decide(name(), 4, "keep", None, None)
    log.decide(name(), 4, "remove", None, first.seq)
    log.close()
    again = DecisionLog(path, audit())
    assert told(again) == {3: ("relabel", "2"), 4: ("remove", None)}
    assert again.seq == 3
    assert [chosen.action for chosen in again.chosen().values()] == ["relabel", "remove"]


def test_the_same_id_is_the_same_decision(log):
    mine = name()
    first = log.decide(mine, 3, "relabel", "2", None)
    assert log.decide(mine, 3, "relabel", "2", None) is first
    assert log.seq == 1
    with pytest.raises(OptionError, match="another decision"):
        log.decide(mine, 3, "keep", None, None)
    with pytest.raises(OptionError, match="another decision"):
        log.undo(mine, 1)


def test_an_older_view_of_a_row_is_a_conflict(log):
    first = log.decide(name(), 3, "keep", None, None)
    with pytest.raises(ConflictError, match="row 3") as caught:
        log.decide(name(), 3, "remove", None, None)
    assert caught.value.now is first
    second = log.decide(name(), 3, "remove", None, first.seq)
    with pytest.raises(ConflictError):
        log.undo(name(), first.seq)
    assert log.decided()[3] is second


def test_undoing_brings_back_what_was_before(log, path):
    first = log.decide(name(), 3, "keep", None, None)
    second = log.decide(name(), 3, "relabel", "0", first.seq)
    mine = name()
    entry, now = log.undo(mine, second.seq)
    assert (entry.action, entry.undoes, now) == ("undo", second.seq, first)
    assert log.undo(mine, second.seq) == (entry, first)
    _, now = log.undo(name(), first.seq)
    assert now is None
    assert told(log) == {}
    with pytest.raises(OptionError, match="no decision 3"):
        log.undo(name(), 3)
    with pytest.raises(OptionError, match="no decision 99"):
        log.undo(name(), 99)
    log.decide(name(), 3, "remove", None, None)
    log.close()
    assert told(DecisionLog(path, audit())) == {3: ("remove", None)}


def test_changes_are_those_since_an_entry(log):
    log.decide(name(), 3, "keep", None, None)
    second = log.decide(name(), 4, "keep", None, None)
    log.undo(name(), second.seq)
    changes = log.changes(1)
    assert changes == {"seq": 3, "changes": [{"row": 4, "decision": None}]}
    rows = {change["row"]: change["decision"] for change in log.changes(0)["changes"]}
    assert rows[3]["action"] == "keep"
    assert log.changes(3)["changes"] == []


@pytest.mark.parametrize("torn", [b"{", b'{"seq": 3, "id": "abc', b"\x00" * 100])
def test_a_torn_tail_is_cut_off(log, path, torn):
    log.decide(name(), 3, "keep", None, None)
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    again = DecisionLog(path, audit())
    assert told(again) == {3: ("keep", None)}
    assert path.read_bytes() == whole
    with path.open("ab") as file:
        file.write(torn)  # of a process that died meanwhile
    again.decide(name(), 4, "keep", None, None)
    again.close()
    lines = path.read_bytes().splitlines()
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line).get("row") for line in lines] == [None, 3, 4]


def test_a_torn_head_is_written_anew(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"format": "trac')
    log = DecisionLog(path, audit())
    log.decide(name(), 3, "keep", None, None)
    log.close()
    assert told(DecisionLog(path, audit())) == {3: ("keep", None)}


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"row,label\n", "no log of decisions"),
        (b"[" * 60_000 + b"\n", "no log of decisions"),
        (b"a note without an end of line", "no log of decisions"),
        (b'{"format": "tracin.index"}\n', "no log of decisions"),
        (b'{"format": "tracin.decisions", "version": 9}\n', "another version"),
        (b'{"format": "tracin.decisions", "version": 1, "rows": "abc"}\n', "other training rows"),
    ],
)
def test_other_files_are_left_alone(path, content, names):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ResultError, match=names) as caught:
        DecisionLog(path, audit())
    assert path.name in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "record",
    [
        {"seq": 3, "row": 1, "action": "keep"},
        {"seq": 2, "row": 1, "action": "burn"},
        {"seq": 2, "row": 99, "action": "keep"},
        {"seq": 2, "row": 3, "action": "undo", "undoes": 7},
        {"seq": 2},
        {"seq": 2, "row": 1.5, "action": "keep"},
        {"seq": 2, "row": 34.0, "action": "keep"},
        {"seq": 2, "row": True, "action": "keep"},
        {"seq": True, "row": 3, "action": "keep"},
        {"seq": 2, "row": 3, "action": "keep", "id": 7},
        {"seq": 2, "row": 3, "action": ["keep"]},
        {"seq": 2, "row": 3, "action": "keep", "label": "cat"},
        {"seq": 2, "row": 3, "action": "keep", "undoes": 1},
        {"seq": 2, "row": 3, "action": "keep", "more": 1},
        {"seq": 2, "row": 3, "action": "keep", "at": 7},
        {"seq": 2, "row": 3, "action": "keep", "at": float("inf")},
        {"seq": 2, "row": 3, "action": "relabel"},
        {"seq": 2, "row": 3, "action": "relabel", "label": "horse"},
        {"seq": 2, "row": 3, "action": "relabel", "label": 1},
        {"seq": 2, "row": 3, "action": "relabel", "label": float("nan")},
        {"seq": 2, "row": 3, "action": "undo", "undoes": 1.0},
        {"seq": 2, "row": 3, "action": "undo"},
    ],
)
def test_a_damaged_line_in_the_middle_is_named(log, path, record):
    log.decide(name(), 3, "keep", None, None)
    log.close()
    with path.open("ab") as file:
        file.write(json.dumps({"id": "someone", "at": "", **record}).encode() + b"\n")
    with pytest.raises(ResultError, match="line 3"):
        DecisionLog(path, audit())


@pytest.mark.parametrize(
    "line", [b"[" * 60_000, b"", b"\xff", b'{"seq": 1e999}', b'{"seq": ' + b"9" * 5000 + b"}", b"7"]
)
def test_what_is_no_entry_is_named_by_file_and_line(log, path, line):
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + line + b"\n")
    with pytest.raises(ResultError, match=r"decisions\.jsonl: line 2 is no decision"):
        DecisionLog(path, audit())
    assert path.read_bytes() == whole + line + b"\n"


def test_an_id_that_is_used_twice_is_named(log, path):
    log.decide("someone else", 3, "keep", None, None)
    log.close()
    head, line = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + line + line.replace(b'"seq": 1', b'"seq": 2'))
    with pytest.raises(ResultError, match="line 3"):
        DecisionLog(path, audit())


def test_lines_of_another_systems_editor_are_read(log, path):
    """A carriage return ends no line: what follows it must not be taken for torn and cut off."""
    log.decide(name(), 3, "keep", None, None)
    log.decide(name(), 4, "remove", None, None)
    log.close()
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert told(DecisionLog(path, audit())) == {3: ("keep", None), 4: ("remove", None)}
    assert path.read_bytes().count(b"\n") == 3


def test_a_pipe_is_no_log(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for refused in (lambda path: DecisionLog(path, audit()), check_place):
        with pytest.raises(ResultError, match=r"pipe.*regular file"):
            refused(tmp_path / "pipe")


def test_a_place_is_checked_before_the_work(log, path, tmp_path):
    check_place(path)
    check_place(tmp_path / "new" / "decisions.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("a table\n")
    (tmp_path / "link").symlink_to(path)
    for bad in (tmp_path / "file", tmp_path / "file" / "log", tmp_path / "link", tmp_path):
        with pytest.raises(ResultError, match=bad.name):
            check_place(bad)
    assert (tmp_path / "file").read_text() == "a table\n"


@pytest.mark.parametrize("names", [("0", "1", "dog"), ("1", "0", "2"), ("0", "1")])
def test_decisions_on_other_classes_are_refused(log, path, names):
    """Renamed or in another order, a name means another class, or none."""
    log.decide(name(), 3, "relabel", "1", None)
    log.close()
    whole = path.read_bytes()
    with pytest.raises(ResultError, match="classes: their names or their order"):
        DecisionLog(path, audit(), names)
    assert path.read_bytes() == whole
    assert told(DecisionLog(path, audit(), ("0", "1", "2"))) == {3: ("relabel", "1")}


def test_each_log_has_an_identity_that_stays(log, path, tmp_path):
    assert DecisionLog(path, audit()).identity == log.identity
    assert DecisionLog(tmp_path / "other.jsonl", audit()).identity != log.identity


def test_decisions_on_other_rows_are_refused(log, path):
    log.close()
    with pytest.raises(ResultError, match="other training rows"):
        DecisionLog(path, audit(49))


def test_a_link_is_not_followed(tmp_path):
    """In a folder from somebody else it could lead to any file of the user's."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"")
    (tmp_path / "decisions.jsonl").symlink_to(mine)
    with pytest.raises(ResultError, match="cannot write"):
        DecisionLog(tmp_path / "decisions.jsonl", audit())
    assert mine.read_bytes() == b""


def test_a_log_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        DecisionLog(tmp_path / "file" / "decisions.jsonl", audit())


def test_what_did_not_reach_the_disk_is_not_acknowledged(log, path, monkeypatch):
    """A full disk: the line is taken back, and the next decision goes on where it was."""
    log.decide(name(), 3, "keep", None, None)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultError, match="No space left"):
        log.decide(name(), 4, "keep", None, None)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert log.decide(name(), 4, "remove", None, None).seq == 2


def test_a_log_that_was_replaced_is_not_written(log, path):
    """Otherwise decisions would be acknowledged that nobody finds again."""
    path.rename(path.with_suffix(".old"))
    with pytest.raises(ResultError, match="cannot write"):
        log.decide(name(), 3, "keep", None, None)
    path.write_bytes(path.with_suffix(".old").read_bytes())
    with pytest.raises(ResultError, match="replaced"):
        log.decide(name(), 3, "keep", None, None)
    path.with_suffix(".old").replace(path)
    with path.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(ResultError, match="shorter"):
        log.refresh()


def test_two_logs_of_one_file_see_each_other(log, path):
    other = DecisionLog(path, audit())
    first = log.decide(name(), 3, "keep", None, None)
    with pytest.raises(ConflictError):
        other.decide(name(), 3, "remove", None, None)
    other.decide(name(), 3, "remove", None, first.seq)
    assert log.stale
    assert log.refresh() == 2
    assert told(log) == told(other) == {3: ("remove", None)}


def test_decisions_are_posted_and_shown(client):
    suspects = client.json("/api/suspects")
    row = suspects["items"][0]["row"]
    assert suspects["items"][0]["decision"] is None
    found = client.decide(row, "relabel", "<b>cow</b>").json()
    assert (found["seq"], found["decision"]["label"]) == (1, "<b>cow</b>")
    after = client.json("/api/suspects")
    assert after["items"][0]["decision"] == found["decision"]
    flagged = suspects["progress"]["flagged"]
    assert after["progress"] == {
        "decided": 1,
        "flagged": flagged,
        "settled": 1,
        "kept": 0,
        "relabelled": 1,
        "removed": 0,
    }
    assert [item["row"] for item in client.json("/api/suspects", show="decided")["items"]] == [row]
    assert row not in [item["row"] for item in client.json("/api/suspects", show="undecided")["items"]]
    assert client.json("/api/decisions", since=0)["changes"] == [{"row": row, "decision": found["decision"]}]


def test_the_later_of_two_tabs_is_told_of_the_other(client):
    first = client.decide(4, "keep").json()
    late = client.decide(4, "remove")
    assert late.status_code == 409
    assert late.json()["decision"] == first["decision"]
    assert "row 4" in late.json()["error"]
    assert client.decide(4, "remove", seen=first["seq"]).status_code == 200
    undo = {"id": name(), "seq": first["seq"]}
    assert client.post("/api/decisions/undo", undo).status_code == 409


def test_undo_is_posted(client):
    first = client.decide(4, "keep").json()
    second = client.decide(4, "relabel", "dog", seen=first["seq"]).json()
    undo = {"id": name(), "seq": second["seq"]}
    found = client.post("/api/decisions/undo", undo)
    assert found.json() == {"seq": 3, "row": 4, "decision": first["decision"]}
    assert client.post("/api/decisions/undo", undo).json() == found.json()


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"row": TRAIN}, "row 90"),
        ({"row": -1}, "row"),
        ({"row": True}, "row"),
        ({"row": "1"}, "row"),
        ({"action": "burn"}, "burn"),
        ({"action": "relabel"}, "label"),
        ({"action": "relabel", "label": "horse"}, "horse"),
        ({"action": "relabel", "label": ["cat"]}, "cat"),
        ({"label": "cat"}, "keep takes no label"),
        ({"id": ""}, "id"),
        ({"id": "x" * 200}, "id"),
        ({"id": 7}, "id"),
        ({"seen": "1"}, "seen"),
    ],
)
def test_a_decision_of_another_form_is_refused(client, more, names):
    found = client.post("/api/decisions", {"id": name(), "row": 1, "action": "keep", "seen": None, **more})
    assert found.status_code == 400
    assert names in found.json()["error"]
    assert client.json("/api/decisions", since=0) == {"seq": 0, "changes": [], "log": client.log}


def test_a_tab_of_another_study_decides_nothing_here(client):
    """It was opened when another study was served at this address."""
    first = client.decide(4, "keep").json()
    theirs = {"log": "of another study", "id": name()}
    for path, more in (
        ("/api/decisions", {"row": 5, "action": "keep", "seen": None}),
        ("/api/decisions/undo", {"seq": first["seq"]}),
    ):
        found = client.post(path, {**theirs, **more})
        assert found.status_code == 409
        assert found.json()["log"] == client.log
        assert "another study is served here now" in found.json()["error"]
        for log in (None, 7):
            found = client.post(path, {**theirs, **more, "log": log})
            assert found.status_code == 400
            assert "/api/study" in found.json()["error"]
    assert client.json("/api/study")["log"] == client.log
    found = client.json("/api/decisions", since=0)
    assert found == {"seq": 1, "changes": [{"row": 4, "decision": first["decision"]}], "log": client.log}


@pytest.mark.parametrize("value", [[], "text", None, 3])
def test_what_is_no_object_is_refused(client, value):
    for path in ("/api/decisions", "/api/decisions/undo"):
        assert client.post(path, value).status_code == 400


def test_the_export_has_exactly_the_decisions(client):
    client.decide(4, "relabel", "dog")
    client.decide(11, "remove")
    client.decide(20, "keep")
    gone = client.decide(2, "remove").json()
    client.post("/api/decisions/undo", {"id": name(), "seq": gone["seq"]})
    rows = list(csv.DictReader(io.StringIO(client.get("/api/export?format=csv").text)))
    decided = {int(row["row"]): row["decision"] for row in rows if row["decision"]}
    assert decided == {4: "relabel", 11: "remove", 20: "keep"}
    assert rows[4]["decided_label"] == "dog"
    listed = client.get("/api/export?format=json").json()
    assert {row["row"]: row["decision"] for row in listed if row["decision"]} == decided
    assert [row["given_label"] for row in listed][:2] == NAMES[:2]


def test_posts_at_once_are_all_kept(source, tmp_path):
    """Clients in threads: each decision is acknowledged once, and the row that all want goes to one."""
    client = client_of(source, tmp_path)
    codes: list[int] = []

    def post(at: int) -> None:
        codes.append(client.decide(at, "keep").status_code)
        codes.append(client.decide(30, "remove").status_code)

    threads = [threading.Thread(target=post, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(codes) == [200] * 9 + [409] * 7
    assert client.json("/api/decisions", since=0)["seq"] == 9
