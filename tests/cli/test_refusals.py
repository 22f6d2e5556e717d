"""What goes wrong: one paragraph, the exit code, nothing half-written, and no work before a refusal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tracin.cli.output import Folder
from tracin.errors import OptionError, ResultError

COMMAND = [sys.executable, "-c", "import sys; from tracin.cli import main; sys.exit(main())"]


def refused(ran, *facts):
    assert ran.code == 2
    assert "Traceback" not in ran.err
    message = [line for line in ran.err.splitlines() if line.startswith("tracin: ")]
    assert len(message) == 1, ran.err
    assert [fact for fact in facts if fact not in message[0]] == []


@pytest.mark.parametrize("command", [["audit"], ["explain", "--query", "0"], ["verify"], ["plan"]])
def test_a_file_that_is_no_study(run, tmp_path, command):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    refused(run(command[0], path, *command[1:]), "empty.py has no study()", "Define a function study()")
    refused(run(command[0], tmp_path / "none.py", *command[1:]), "none.py does not exist")
    refused(run(command[0], tmp_path, *command[1:]), "is a folder")
    (tmp_path / "notes.txt").write_text("text")
    refused(run(command[0], tmp_path / "notes.txt", *command[1:]), "not a Python file")


def test_an_error_in_the_users_code_names_the_line(run, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def study():\n    return 1 / 0\n")
    refused(run("audit", path), "ZeroDivisionError", "line 2", "--debug")


def test_debug_shows_the_traceback(run, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def study():\n    return 1 / 0\n")
    ran = run("audit", path, "--debug")
    assert ran.code == 2
    assert "Traceback (most recent call last)" in ran.err
    assert "return 1 / 0" in ran.err
    assert ran.err.rstrip().splitlines()[-1].startswith("tracin: study() raised ZeroDivisionError")


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["explain", "--query", "6"], "query 6 does not exist: the 6 rows count from 0 to 5"),
        (["explain", "--query", "-1"], "query -1"),
        (["explain", "--query", "0", "--target", "horse"], "'horse' is no class"),
        (["explain", "--query", "0", "--target", "7"], "0 to 2"),
        (["explain", "--query", "0", "--top", "24"], "k is 24: give 1 to 23"),
        (["explain", "--query", "0", "--top", "0"], "--top is 0"),
        (["audit", "--top", "0"], "--top is 0"),
        (["audit", "--batch-size", "0"], "batch_size is 0"),
        (["audit", "--device", "abacus"], "abacus"),
        (["audit", "--memory", "lots"], "lots"),
        (["audit", "--weighting", "integrated"], "learning_rate_sum"),
        (["verify", "--rows", "0"], "--rows is 0"),
        (["plan", "--queries", "0"], "--queries is 0"),
    ],
)
def test_an_argument_out_of_range(run, file, args, fact):
    refused(run(args[0], file, *args[1:]), fact)


def no_permission(tmp_path):
    """A place that not even root can write into."""
    (tmp_path / "taken").write_text("a file")
    return tmp_path / "taken" / "out"


@pytest.mark.parametrize("command", [["audit"], ["explain", "--query", "0"], ["verify"], ["plan"]])
def test_out_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, command):
    path = tmp_path / "working.py"
    path.write_text(f"open({str(tmp_path / 'worked')!r}, 'w').close()\n")
    out = no_permission(tmp_path)
    refused(run(command[0], path, *command[1:], "--out", out), f"--out {out}", "cannot be written")
    assert not (tmp_path / "worked").exists()


def test_the_demo_refuses_it_too(run, tmp_path):
    refused(run("demo", "--out", no_permission(tmp_path)), "cannot be written")
    refused(run("demo", "--out", tmp_path / "demo", "--epochs", 0), "--epochs is 0")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(run, file, tmp_path):
    out = tmp_path / "locked"
    out.mkdir(mode=0o500)
    refused(run("audit", file, "--out", out), "cannot be written", "Permission denied")


@pytest.mark.parametrize(
    ("module", "args", "extra"),
    [
        ("pyarrow", ["audit", "--format", "parquet"], "tracin[eval]"),
        ("matplotlib", ["explain", "--query", "0"], "tracin[plot]"),
    ],
)
def test_a_missing_extra_is_told_before_the_work(run, tmp_path, monkeypatch, module, args, extra):
    path = tmp_path / "working.py"
    path.write_text(f"open({str(tmp_path / 'worked')!r}, 'w').close()\n")
    monkeypatch.setitem(sys.modules, module, None)
    refused(run(args[0], path, *args[1:], "--out", tmp_path / "out"), module, f"pip install '{extra}'")
    assert not (tmp_path / "worked").exists()


def test_the_demo_says_where_its_data_comes_from(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(run("demo", "--out", tmp_path), "scikit-learn", "pip install 'tracin[demo]'")


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    folder = Folder(tmp_path, ["csv"])
    folder.table("suspects", [{"train": 1}])
    before = (tmp_path / "suspects.csv").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("csv.DictWriter.writerow", full)
    with pytest.raises(ResultError, match=r"suspects\.csv.*No space left"):
        folder.table("suspects", [{"train": 2}])
    assert (tmp_path / "suspects.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["suspects.csv"]


def test_an_older_result_stays_after_a_refusal(run, file, tmp_path):
    out = tmp_path / "out"
    assert run("explain", file, "--query", 0, "--out", out).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(run("explain", file, "--query", 99, "--out", out), "query 99")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_is_made_with_its_parents(tmp_path):
    Folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(OptionError, match="--out"):
        Folder(no_permission(tmp_path))


def test_ctrl_c(run, write_study):
    loss = "lambda model, batch: (_ for _ in ()).throw(KeyboardInterrupt)"
    ran = run("audit", write_study(loss=loss))
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "Traceback" not in ran.err


def test_a_process_is_interrupted_cleanly(write_study, tmp_path):
    """The real thing: a process in the middle of its work, a signal, an exit code."""
    more = f"""
import pathlib, time

def slow(model, batch):
    pathlib.Path({str(tmp_path / "begun")!r}).touch()
    time.sleep(0.2)
    return tracin.losses.cross_entropy(model, batch)
"""
    file = write_study(loss="slow", more=more)
    command = [*COMMAND, "audit", str(file), "--batch-size", "1", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "begun").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert out == ""
    assert list((tmp_path / "out").iterdir()) == []


def test_a_reader_that_has_enough(file):
    """As in ``tracin audit FILE.py | head -1``: no complaint about the closed pipe."""
    process = subprocess.Popen(
        [*COMMAND, "audit", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert "Traceback" not in told
    assert "Exception" not in told
