"""The file of a log: torn tails, damage, links, pipes, full disks, and files that are something else."""

from __future__ import annotations

import json
import os

import pytest

from explorer.common import name, told
from explorer.forking import audit
from tracin.errors import ResultError
from tracin.explorer.decisions import DecisionLog
from tracin.explorer.logfile import check_place


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
