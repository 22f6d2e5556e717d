"""Every export, read back."""

from __future__ import annotations

import csv
import json
import os
import sys

import pandas
import pytest
import torch

from audit.common import N, audited_digits, made
from audit.test_saving import full
from tracin.audit import Decision
from tracin.errors import MissingExtraError, OptionError, ResultError

DECISIONS = {1: ("relabel", "fly"), 4: "remove", 3: "keep"}


def test_csv(tmp_path):
    audit = full()
    with audit.export(tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, audit.records(), strict=True):
        assert list(row) == list(record)
        assert row["given_label"] == record["given_label"]
        assert float(row["score"]) == record["score"]
        assert row["is_issue"] == str(record["is_issue"])
        assert row["proponents"] == " ".join(map(str, record["proponents"] or ()))
        assert row["proponent_agreement"] == (
            "" if record["proponent_agreement"] is None else str(record["proponent_agreement"])
        )


def test_json_and_parquet_hold_the_same(tmp_path):
    audit = full()
    rows = json.loads(audit.export(tmp_path / "a.json", decisions=DECISIONS).read_text(encoding="utf-8"))
    plain = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}
        for record in audit.records()
    ]
    assert [{k: v for k, v in row.items() if k not in ("decision", "decided_label")} for row in rows] == plain
    frame = pandas.read_parquet(audit.export(tmp_path / "a.parquet", decisions=DECISIONS))
    for name in rows[0]:
        found = [None if value is None or value is pandas.NA else value for value in frame[name]]
        for one, row in zip(found, rows, strict=True):
            if isinstance(row[name], list):
                assert list(one) == row[name]
            elif row[name] is not None:
                assert one == row[name]
            else:
                assert one is None or one != one  # noqa: PLR0124  NaN


def test_decisions_are_columns(tmp_path):
    rows = json.loads(made().export(tmp_path / "a.json", decisions=DECISIONS).read_text())
    assert [row["decision"] for row in rows] == [None, "relabel", None, "keep", "remove"]
    assert [row["decided_label"] for row in rows] == ["ant", "fly", "fly", "ant", None]
    assert "decision" not in json.loads(made().export(tmp_path / "b.json").read_text())[0]


def test_cleanlab(tmp_path):
    frame = pandas.read_csv(made().export(tmp_path / "a.csv", "cleanlab"))
    assert list(frame) == ["is_label_issue", "label_score", "given_label", "predicted_label"]
    assert frame["is_label_issue"].tolist() == [False, True, True, True, False]
    assert frame["label_score"].tolist() == pytest.approx([0.9, 0.1, 0.5, 0.1, 0.7])
    assert frame["given_label"].tolist() == ["ant", "bee", "fly", "ant", "bee"]
    assert frame["predicted_label"].tolist() == ["ant", "fly", "ant", "fly", "bee"]


def test_label_studio(tmp_path):
    path = full().export(tmp_path / "tasks.json", "label-studio", decisions={**DECISIONS, 2: "remove"})
    tasks = json.loads(path.read_text())
    assert [task["data"]["row"] for task in tasks] == [1, 3, 2, 4]  # flagged or decided, most suspect first
    first = tasks[0]
    assert first["predictions"][0]["result"][0]["value"] == {"choices": ["fly"]}
    assert first["predictions"][0]["score"] == 0.9
    assert first["annotations"][0]["result"][0]["value"] == {"choices": ["fly"]}
    assert tasks[1]["annotations"][0]["result"][0]["value"] == {"choices": ["ant"]}
    assert tasks[2]["annotations"] == [{"was_cancelled": True, "result": []}]
    assert first["data"]["proponents"] == [0, 2]
    bare = json.loads(full().export(tmp_path / "b.json", "label-studio").read_text())
    assert all("annotations" not in task for task in bare)
    for task in tasks:
        for result in task["predictions"][0]["result"]:
            assert result["from_name"] == "label"
            assert result["to_name"] in task["data"]


def test_text_of_the_data_stays_text(tmp_path):
    names = ('a,"b"\n', "1=1", "<b>ü</b>")
    audit = made(class_names=names)
    with audit.export(tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert [row["given_label"] for row in csv.DictReader(file)] == [names[i] for i in (0, 1, 2, 0, 1)]
    assert json.loads(audit.export(tmp_path / "a.json").read_text("utf-8"))[2]["given_label"] == names[2]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "'="])
def test_a_text_that_a_spreadsheet_would_run_has_an_apostrophe_in_csv_alone(tmp_path, start):
    names = (f"{start}1+cmd", "bee", "fly")
    audit = made(class_names=names, signals={"aum": torch.tensor([-1.0, 2.0, 0.0, 1.0, 3.0]).double()})
    decisions = {1: ("relabel", names[0])}
    for kind, columns in (
        ("csv", ("given_label", "suggested_label", "decided_label")),
        ("cleanlab", ("given_label", "predicted_label")),
    ):
        told = audit.export(tmp_path / "a.csv", kind, decisions)
        with told.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for column in columns:
            cells = {row[column] for row in rows}
            assert f"'{names[0]}" in cells, column
            assert names[0] not in cells, column
        if kind == "csv":
            assert [float(row["aum"]) for row in rows] == [-1.0, 2.0, 0.0, 1.0, 3.0]
            # The name without the apostrophe is the class again.
            read = {
                int(row["row"]): ("relabel", row["decided_label"].removeprefix("'"))
                for row in rows
                if row["decision"]
            }
            assert audit.apply(read).labels.tolist() == audit.apply(decisions).labels.tolist()
    assert json.loads(audit.export(tmp_path / "a.json").read_text("utf-8"))[0]["given_label"] == names[0]
    assert pandas.read_parquet(audit.export(tmp_path / "a.parquet"))["given_label"][0] == names[0]
    assert audit.table["given_label"][0] == names[0]


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ResultError, match=r"cannot write .*pipe\.csv.*a device, a pipe or a socket"):
        made().export(tmp_path / "pipe.csv")
    assert (tmp_path / "pipe.csv").is_fifo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe.csv"]


def test_the_table_is_the_records(tmp_path):
    audit = audited_digits()
    frame = audit.table
    assert list(frame.index) == list(range(N))
    assert frame["row"].tolist() == list(range(N))
    assert set(frame["given_label"]) == {f"digit {number}" for number in range(10)}
    issues = audit.issues
    assert issues["is_issue"].all()
    assert len(issues) == int(audit.is_issue.sum())
    assert issues["rank"].is_monotonic_increasing
    assert issues["score"].is_monotonic_decreasing
    assert frame["self_influence_rank"][int(frame["self_influence"].argmax())] == 1


def test_columns_that_do_not_apply_are_left_out():
    audit = made(
        classes=None, class_names=None, given_labels=None, suggested_labels=None, predicted_labels=None
    )
    assert list(audit.records()[0]) == [
        "row",
        "score",
        "is_issue",
        "rank",
        "self_influence",
        "self_influence_rank",
        "aum",
    ]
    assert [record["row"] for record in audit.records([3, 1])] == [3, 1]


@pytest.mark.parametrize(
    ("name", "kind", "fact"),
    [
        ("a.xls", None, "a.xls ends in .xls: give format="),
        ("a", None, "ends in nothing"),
        ("a.csv", "excel", "format is 'excel'. Choose one of csv, parquet, json, cleanlab, label-studio"),
    ],
)
def test_an_unknown_format(tmp_path, name, kind, fact):
    with pytest.raises(OptionError, match=fact):
        made().export(tmp_path / name, kind)


@pytest.mark.parametrize("kind", ["cleanlab", "label-studio"])
def test_formats_that_need_classes(tmp_path, kind):
    audit = made(
        classes=None,
        class_names=None,
        given_labels=torch.ones(5).double(),
        suggested_labels=None,
        predicted_labels=None,
    )
    with pytest.raises(OptionError, match="need"):
        audit.export(tmp_path / "a", kind)


def test_a_decision_that_does_not_fit_writes_nothing(tmp_path):
    with pytest.raises(OptionError, match="row 9"):
        made().export(tmp_path / "a.csv", decisions=[Decision(9, "keep")])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(ResultError, match=f"cannot write .*{name}"):
            made().export(tmp_path / "taken" / name)


def test_missing_extras(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        made().export(tmp_path / "a.parquet")
    with pytest.raises(MissingExtraError, match="pip install"):
        _ = made().table
    assert made().export(tmp_path / "a.csv").exists()
