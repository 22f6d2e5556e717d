"""``tracin serve``: what it prepares, where it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from tracin.explorer import serving

TOKEN = "a-token-of-some-length"


@pytest.fixture
def decisions():
    """What is decided while the page is served."""
    return []


@pytest.fixture
def served(monkeypatch, decisions):
    """What would have been served."""
    seen: list[dict[str, Any]] = []

    def serve(source, log, place, *, ready, **more):
        ready("http://127.0.0.1:1234/")
        seen.append({"source": source, "log": log.path, "address": place.getsockname(), **more})
        for row, action in decisions:
            log.decide(f"decision-{row}", row, action, None, None)
        source.answers.close()
        log.close()
        place.close()

    real = serving.listen
    # The usual port may be in use where the tests run.
    monkeypatch.setattr(serving, "listen", lambda host, port: real(host, 0 if port == 8000 else port))
    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.delenv("TRACIN_TOKEN", raising=False)
    return seen


def test_a_study_file_is_served(run, file, served):
    ran = run("serve", file, "--port", "0")
    assert ran.code == 0
    assert ran.out.splitlines()[-2] == "tracin: ready at http://127.0.0.1:1234/"
    (told,) = served
    assert told["source"].content.title == "mine"
    assert told["source"].answers.live
    assert (told["host"], told["token"], told["names"]) == ("127.0.0.1", None, ())
    assert told["address"][0] == "127.0.0.1"
    assert told["log"] == file.with_name("mine.decisions.jsonl")
    assert told["log"].exists()
    assert "Preparing: audit" in ran.out


def test_a_folder_is_kept_and_served(run, file, served, tmp_path):
    out = tmp_path / "out"
    assert run("serve", file, "--out", out, "--explained", "2", "--quiet").code == 0
    assert {path.name for path in (out / "explorer").iterdir()} == {
        "study.json",
        "rows.safetensors",
        "faces.safetensors",
        "explained.json",
    }
    report = (out / "report.html").read_text(encoding="utf-8")
    assert report.casefold().startswith("<!doctype html>")
    file.unlink()
    assert run("serve", out).code == 0
    live, kept = served
    assert (live["log"], kept["log"]) == (out / "decisions.jsonl", out / "decisions.jsonl")
    assert not kept["source"].answers.live
    assert kept["source"].trust() == live["source"].trust()
    assert run("serve", out, "--decisions", tmp_path / "other.jsonl").code == 0
    assert served[2]["log"] == tmp_path / "other.jsonl"


def held(report):
    """The decisions in a report."""
    block = re.search(r'id="tracin-data">(.*?)</script>', report.read_text(encoding="utf-8"), re.DOTALL)
    found = json.loads(block[1])["suspects"]
    return {item["row"]: item["decision"]["action"] for item in found if item["decision"] is not None}


def test_the_report_holds_the_decisions(run, file, served, decisions, tmp_path):
    """Those of the folder's log, and after Ctrl-C those that were taken meanwhile."""
    out = tmp_path / "out"
    args = ("serve", file, "--port", "0", "--out", out, "--explained", "1", "--quiet")
    assert run(*args).code == 0
    assert held(out / "report.html") == {}
    decisions.append((3, "remove"))
    assert run(*args).code == 0
    assert held(out / "report.html") == {3: "remove"}
    decisions.clear()
    assert run(*args).code == 0
    assert held(out / "report.html") == {3: "remove"}


def test_a_port_that_is_taken_is_told_before_the_work(run, file, served):
    with serving.listen("127.0.0.1", 0) as taken:
        ran = run("serve", file, "--port", str(taken.getsockname()[1]))
    assert ran.code == 2
    assert "--port" in ran.err
    assert "Preparing" not in ran.out


def test_a_log_that_cannot_be_written_is_told_before_the_work(run, file, served, tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    for place in (tmp_path / "table.csv", tmp_path / "table.csv" / "log.jsonl", tmp_path):
        ran = run("serve", file, "--port", "0", "--decisions", place)
        assert ran.code == 2
        assert place.name in ran.err
        assert "Preparing" not in ran.out
    assert (tmp_path / "table.csv").read_text() == "a,b\n"


def test_the_token_comes_from_the_environment_too(run, file, served, monkeypatch):
    monkeypatch.setenv("TRACIN_TOKEN", TOKEN)
    ran = run("serve", file, "--port", "0", "--host", "0.0.0.0", "--name", "hub.example", "--quiet")
    assert ran.code == 0
    assert TOKEN not in ran.out + ran.err
    assert (served[0]["token"], served[0]["names"]) == (TOKEN, ("hub.example",))


def test_the_cutoff_is_calibrated_by_the_studys_fit(run, write_study, served):
    more = """
def fit(train, folder, seed):
    model = build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for step in (1, 2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[0]), train[1]).backward()
            optimizer.step()
            recorder.save(step=step)
    return recorder.trajectory()


plain = study


def study():
    from dataclasses import replace

    return replace(plain(), fit=fit)
"""
    ran = run("serve", write_study(more=more), "--calibrate", "--precision", "0.5", "--quiet")
    assert ran.code == 0, ran.err
    told = served[0]["source"].trust()["calibration"]
    assert len(told["score"]) == len(told["precision"]) == len(told["found"])
    assert "made wrong on purpose" in told["why"]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("--host", "0.0.0.0"), "--token"),
        (("--token", "short"), "16"),
        (("--precision", "2.0"), "--precision"),
        (("--precision", "0.8"), "add --calibrate"),
        (("--evidence", "-1"), "--evidence"),
        (("--explained", "-1"), "--explained"),
        (("--calibrate",), "fit"),
    ],
)
def test_what_cannot_be_served_is_told(run, file, served, args, names):
    ran = run("serve", file, *args, "--quiet")
    assert ran.code == 2
    assert names in ran.err
    assert served == []


def test_without_the_extra_its_name_is_told(run, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ran = run("serve", file)
    assert ran.code == 2
    assert "tracin[web]" in ran.err


def test_the_other_commands_need_no_web_server():
    code = "import sys; sys.modules |= {'starlette': None, 'uvicorn': None}; import tracin.cli"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


def test_a_folder_of_something_else_is_refused(run, served, tmp_path):
    ran = run("serve", tmp_path)
    assert ran.code == 2
    assert "no audit" in ran.err
    assert "study file" in run("serve", tmp_path, "--out", tmp_path / "x").err
    assert "does not exist" in run("serve", tmp_path / "missing.py").err


def test_decisions_on_other_rows_are_refused(run, file, served, tmp_path):
    log = tmp_path / "mine.decisions.jsonl"
    log.write_text('{"format": "tracin.decisions", "version": 1, "rows": "abc"}\n')
    ran = run("serve", file, "--quiet")
    assert ran.code == 2
    assert "--decisions" in ran.err
    assert log.read_text().count("\n") == 1
