"""Decisions: an append-only log of which nothing acknowledged is lost, whoever writes and whatever dies."""

from __future__ import annotations

import pytest

from explorer.common import name, told
from explorer.forking import audit
from tracin.errors import OptionError, ResultError
from tracin.explorer.decisions import ConflictError, DecisionLog


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


def test_two_logs_of_one_file_see_each_other(log, path):
    other = DecisionLog(path, audit())
    first = log.decide(name(), 3, "keep", None, None)
    with pytest.raises(ConflictError):
        other.decide(name(), 3, "remove", None, None)
    other.decide(name(), 3, "remove", None, first.seq)
    assert log.stale
    assert log.refresh() == 2
    assert told(log) == told(other) == {3: ("remove", None)}
