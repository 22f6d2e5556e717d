"""Decisions as the page posts them, and the export that has exactly these."""

from __future__ import annotations

import csv
import io
import threading

import pytest

from explorer.common import NAMES, TRAIN, client_of, name


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
