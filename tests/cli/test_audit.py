"""``tracin audit``: what it prints and what it keeps."""

from __future__ import annotations

import csv
import json
import sys

import pandas
import pytest

import tracin
from tracin.audit import Audit, find_label_issues
from tracin.scoring.evaluation import evaluate
from tracin.study import load_study

FIT = """
def fit(train, folder, seed):
    return study().trajectory
"""


def method(study):
    return tracin.TracInCP(study.task, study.trajectory, progress=False)


def audited(file):
    study = load_study(file)
    return study, find_label_issues(method(study), study.train, class_names=study.class_names)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_it_prints_and_keeps_what_the_library_says(run, file, tmp_path):
    out = tmp_path / "out"
    ran = run("audit", file, "--top", 5, "--out", out)
    assert ran.code == 0, ran.err
    assert "Suspects: the first 5 of 23 training rows" in ran.out
    assert "of 47 parameters traced" in ran.out
    study, found = audited(file)
    table = read_csv(out / "suspects.csv")
    assert [int(row["train"]) for row in table] == found.order.tolist()
    own = method(study).self_influence(study.train)
    seen = evaluate(study.task, study.trajectory, study.train, name="train")
    for row in table:
        at = int(row["train"])
        assert float(row["self_influence"]) == own.values[at]
        assert float(row["loss"]) == seen.losses[-1, at]
        assert float(row["mean_loss"]) == pytest.approx(float(seen.losses.mean(0)[at]))
        assert int(row["label"]) == study.train[1][at]
        assert row["label_name"] == study.class_name(int(row["label"]))
        assert row["suggested_name"] == study.class_name(int(found.suggested_labels[at]))
        assert row["is_issue"] == str(bool(found.is_issue[at]))
    printed = [line.split()[1] for line in ran.out.splitlines() if line[:4].strip().isdecimal()]
    assert printed == [row["train"] for row in table[:5]]
    whole = read_csv(out / "audit.csv")
    assert [int(row["row"]) for row in whole] == list(range(23))
    assert [float(row["score"]) for row in whole] == found.score.tolist()
    kept = Audit.load(out / "audit")
    assert kept.records() == found.records()
    words = " ".join(ran.out.split())
    assert f"{int(found.is_issue.sum())} rows are flagged" in words
    assert " ".join(found.cutoff.why.split()) in words
    saved = tracin.SelfInfluence.load(out / "self_influence.safetensors")
    assert saved.values.tolist() == own.values.tolist()
    page = (out / "report.html").read_text()
    assert "whose labels to look at first" in page
    assert "self-influential first" not in page


def test_every_format_holds_the_same(run, file, tmp_path):
    out = tmp_path / "out"
    assert run("audit", file, "--out", out, "--format", "csv", "parquet", "json").code == 0
    frames = [
        pandas.read_csv(out / "suspects.csv"),
        pandas.read_parquet(out / "suspects.parquet"),
        pandas.DataFrame(json.loads((out / "suspects.json").read_text())),
    ]
    for frame in frames[1:]:
        pandas.testing.assert_frame_equal(frames[0], frame, check_dtype=False)
    parts = [
        pandas.read_parquet(out / "audit.parquet"),
        pandas.DataFrame(json.loads((out / "audit.json").read_text())),
    ]
    assert parts[0]["score"].tolist() == parts[1]["score"].tolist()
    assert [list(value) for value in parts[0]["proponents"]] == parts[1]["proponents"].tolist()


def test_csv_and_json_need_no_extra(run, file, tmp_path, monkeypatch):
    for module in ("pandas", "pyarrow", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    ran = run("audit", file, "--out", tmp_path / "out", "--format", "csv", "json")
    assert ran.code == 0, ran.err


def test_other_tools_get_their_files(run, file, tmp_path):
    out = tmp_path / "out"
    assert run("audit", file, "--out", out, "--export", "cleanlab", "label-studio").code == 0
    _, found = audited(file)
    frame = pandas.read_csv(out / "cleanlab.csv")
    assert frame["is_label_issue"].tolist() == found.is_issue.tolist()
    tasks = json.loads((out / "label-studio.json").read_text())
    assert [task["data"]["row"] for task in tasks] == [
        row for row in found.order.tolist() if found.is_issue[row]
    ]


def test_names_that_a_spreadsheet_would_run_or_that_occur_twice(run, write_study, tmp_path):
    file = write_study(names="['=1+1', 'cat', 'cat']")
    out = tmp_path / "out"
    assert run("audit", file, "--out", out, "--format", "csv", "json", "--export", "cleanlab").code == 0
    shown = {"'=1+1", "cat (1)", "cat (2)"}
    assert {row["label_name"] for row in read_csv(out / "suspects.csv")} == shown
    assert {row["given_label"] for row in read_csv(out / "audit.csv")} == shown
    assert {row["given_label"] for row in read_csv(out / "cleanlab.csv")} == shown
    rows = json.loads((out / "suspects.json").read_text())
    assert {row["label_name"] for row in rows} == {"=1+1", "cat (1)", "cat (2)"}
    assert Audit.load(out / "audit").class_names == ("=1+1", "cat (1)", "cat (2)")


def test_calibrate_sets_the_cut_off(run, write_study, tmp_path):
    file = write_study()
    file.write_text(file.read_text().replace("class_names=NAMES,", "class_names=NAMES, fit=fit,") + FIT)
    out = tmp_path / "out"
    ran = run("audit", file, "--calibrate", "--precision", 0.8, "--out", out)
    assert ran.code == 0, ran.err
    assert "made wrong on purpose, and the model was trained anew once" in " ".join(ran.out.split())
    kept = Audit.load(out / "audit")
    assert kept.calibration.wanted == 0.8
    table = read_csv(out / "calibration.csv")
    assert [float(row["score"]) for row in table] == list(kept.calibration.thresholds)
    assert list(table[0]) == ["score", "precision", "found", "flagged", "planted_precision"]


def test_an_index_gives_self_influence_and_evidence(run, file, tmp_path):
    study = load_study(file)
    tracin.Index.build(method(study), study.train, tmp_path / "index", projection=64)
    ran = run("audit", file, "--index", tmp_path / "index", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "Note: proponents, opponents and their agreement come from an index" in ran.out
    assert Audit.load(tmp_path / "out" / "audit").score.tolist() == audited(file)[1].score.tolist()


def test_opposing_rows_are_told(run, file, tmp_path):
    ran = run("audit", file, "--opposing", "--evidence", 0, "--no-duplicates", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "oppose the test rows as a whole" in ran.out
    kept = Audit.load(tmp_path / "out" / "audit")
    study = load_study(file)
    influence = method(study).aggregate(study.train, study.test).values[0].double()
    assert kept.signals["opposes_validation"].tolist() == (-influence).tolist()
    assert kept.evidence is None
    assert kept.duplicates is None


def test_a_regression_names_its_residuals(run, write_study, tmp_path):
    file = write_study(
        names="None", loss="tracin.losses.mean_squared_error", render="lambda row: f'target {row[1]}'"
    )
    text = (
        file.read_text()
        .replace("nn.Linear(8, 3)", "nn.Linear(8, 1)")
        .replace("torch.arange(n) % 3", "torch.arange(n) / 3")
    )
    file.write_text(text)
    ran = run("audit", file, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "residual" in ran.out
    assert "target" in ran.out
    assert "label" not in (tmp_path / "out" / "suspects.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["--evidence", "-1"], "--evidence is -1"),
        (["--calibrate", "--precision", "1.5"], "--precision is 1.5"),
        (["--precision", "0.9"], "--precision is for the cut-off of --calibrate: add --calibrate"),
        (["--export", "cleanlab"], "--export cleanlab writes into the folder of --out: add --out FOLDER"),
        (["--calibrate"], "calibrate trains anew: give Study(fit="),
        (["--index", "nowhere"], "nowhere"),
    ],
)
def test_refusals(run, file, args, fact):
    ran = run("audit", file, *args)
    assert ran.code == 2
    assert fact in ran.err
    assert "Traceback" not in ran.err
