"""Each command prints and writes what the library says."""

from __future__ import annotations

import csv
import json
import warnings
from dataclasses import replace

import pytest

import tracin
from tracin.cli import commands, main
from tracin.errors import AdaptiveOptimizerWarning
from tracin.explain import explain
from tracin.scoring.evaluation import evaluate
from tracin.study import load_study

PNG = b"\x89PNG\r\n\x1a\n"


def method(study, **options):
    return tracin.TracInCP(study.task, study.trajectory, progress=False, **options)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("command", ["demo", "audit", "explain", "verify", "plan"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert f"usage: tracin {command}" in told
    assert "--out FOLDER" in told
    if command != "demo":
        assert "FILE.py" in told
        assert "study() -> tracin.Study" in told


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert all(command in told for command in ("demo", "audit", "explain", "verify", "plan"))


@pytest.mark.parametrize(
    "args", [["audit"], ["explain", "mine.py"], ["sing"], ["audit", "a.py", "--format", "xls"]]
)
def test_a_mistake_in_the_arguments_exits_with_2(args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2


def test_a_report_needs_no_network(run, file, tmp_path):
    assert run("audit", file, "--out", tmp_path / "a").code == 0
    assert run("explain", file, "--query", 0, "--out", tmp_path / "b").code == 0
    for folder in ("a", "b"):
        text = (tmp_path / folder / "report.html").read_text()
        assert "http://" not in text
        assert "https://" not in text
        assert "data:image/png;base64," in text


@pytest.mark.parametrize(
    "target", [[], ["--target", "predicted"], ["--target", "label"], ["--target", "cow"]]
)
def test_explain_lists_proponents_and_opponents(run, file, tmp_path, monkeypatch, target):
    for drawing in ("_save_figures", "save_report"):  # slow, and tested below
        monkeypatch.setattr(commands, drawing, lambda *_: None)
    ran = run("explain", file, "--query", 4, 1, *target, "--top", 3, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    study = load_study(file)
    wanted = explain(
        method(study),
        study.train,
        study.test,
        [4, 1],
        target=target[1] if target else None,
        class_names=study.class_names,
    )
    table = read_csv(tmp_path / "out" / "explanations.csv")
    assert len(table) == 6 * len(wanted)
    for number, each in enumerate(wanted):
        lists = each.top_k(3)
        rows = table[6 * number : 6 * number + 6]
        assert [row["sign"] for row in rows] == ["proponent"] * 3 + ["opponent"] * 3
        ids = lists.proponents.ids[0].tolist() + lists.opponents.ids[0].tolist()
        assert [int(row["train"]) for row in rows] == ids
        scores = lists.proponents.values[0].tolist() + lists.opponents.values[0].tolist()
        assert [float(row["score"]) for row in rows] == scores
        assert {row["target"] for row in rows} == {each.target.kind}
        for row in rows:
            assert study.class_name(int(study.train[1][int(row["train"])])) == row["label_name"]
    assert "Test row 4:" in ran.out
    assert "Test row 1:" in ran.out


def test_explain_draws(run, file, tmp_path):
    out = tmp_path / "out"
    assert run("explain", file, "--query", 2, "--target", "dog", "--out", out).code == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "explanations.csv",
        "trajectory.csv",
        "explanation-2-class-2.png",
        "trajectory-2-class-2.png",
        "report.html",
    }
    for name in names:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(PNG)


def test_the_trajectory_table_adds_up(run, file, tmp_path):
    assert run("explain", file, "--query", 2, "--target", "label", "--out", tmp_path / "out").code == 0
    study = load_study(file)
    (found,) = explain(method(study), study.train, study.test, [2], target="label")
    table = read_csv(tmp_path / "out" / "trajectory.csv")
    assert [int(row["step"]) for row in table] == [10, 20]
    for at, row in enumerate(table):
        assert float(row["loss"]) == pytest.approx(float(found.losses[at]))
        assert float(row["sum"]) == pytest.approx(float(found.contributions[at].sum()), rel=1e-4)
        assert float(row["opponents"]) <= 0 <= float(row["proponents"])


def test_a_wrong_prediction_says_what_taught_and_what_opposed(run, file):
    study = load_study(file)
    said = evaluate(study.task, study.trajectory[-1:], study.test).predicted().tolist()
    wrong = next(row for row in range(6) if said[row] != int(study.test[1][row]))
    ran = run("explain", file, "--query", wrong, "--target", "predicted", "--top", 2)
    label = study.class_name(int(study.test[1][wrong]))
    assert f"predicted {study.class_name(said[wrong])}, label {label} (wrong)" in ran.out
    assert f"What taught {study.class_name(said[wrong])}, the wrong class" in ran.out
    assert f"What opposed {label}, the right class" in ran.out


def test_without_out_nothing_is_written(run, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    for args in (["audit"], ["explain", "--query", 0], ["verify"], ["plan"]):
        ran = run(args[0], file, *args[1:])
        assert ran.code == 0, ran.err
        assert "Written" not in ran.out
    assert {path.name for path in tmp_path.iterdir()} - before <= {"__pycache__"}


def test_verify_tells_the_error_and_each_route(run, file, tmp_path):
    ran = run("verify", file, "--rows", 4, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("exact: largest relative error")
    assert "4 rows × 2 checkpoints" in ran.out
    table = read_csv(tmp_path / "out" / "parameters.csv")
    assert [row["parameter"] for row in table] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    told = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert told["exact"] is True
    assert told["max_relative_error"] == max(float(row["error"]) for row in table)
    assert told["coverage"] == 1.0


def test_verify_exits_with_1_where_gradients_differ(run, file, monkeypatch):
    right = tracin.TracInCP.verify
    monkeypatch.setattr(
        tracin.TracInCP, "verify", lambda *a, **k: replace(right(*a, **k), max_relative_error=0.5)
    )
    ran = run("verify", file)
    assert ran.code == 1
    assert "NOT exact" in ran.out


def test_plan_tells_the_cost(run, file, tmp_path):
    ran = run("plan", file, "--queries", 4, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "4 test rows × 23 training rows × 2 checkpoints" in ran.out
    assert "passes over the train rows" in ran.out
    told = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert told["passes"] == 2
    assert told["peak_bytes"] > 0
    assert told["fits"]
    assert "6 test rows" in run("plan", file).out


def test_plan_of_the_other_verbs(run, file, tmp_path):
    ran = run("plan", file, "--verb", "top_k", "--k", 2)
    assert ran.code == 0, ran.err
    assert "top_k: 6 test rows × 23 training rows" in ran.out
    assert "memory: lists" in ran.out
    ran = run("plan", file, "--verb", "self_influence", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "self_influence: 23 training rows" in ran.out
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["verb"] == "self_influence"
    refused = run("plan", file, "--verb", "self_influence", "--queries", 2)
    assert refused.code == 2
    assert "--queries" in refused.err


def test_a_regression_has_the_columns_that_apply(run, write_study, tmp_path):
    loss = "lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square()"
    file = write_study(names="None", loss=loss, render="lambda row: f'target {row[1]}'")
    ran = run("audit", file, "--out", tmp_path / "a")
    assert ran.code == 0, ran.err
    assert list(read_csv(tmp_path / "a" / "suspects.csv")[0]) == [
        "rank",
        "train",
        "score",
        "is_issue",
        "loss",
        "mean_loss",
        "self_influence",
    ]
    assert "predicted" not in ran.out
    assert "target 2" in ran.out
    ran = run("explain", file, "--query", 3, "--out", tmp_path / "b")
    assert ran.code == 0, ran.err
    assert "The loss of its own target" in ran.out
    assert (tmp_path / "b" / "explanation-3-label.png").exists()


def test_settings_reach_the_method(run, file, tmp_path):
    args = ["--weighting", "uniform", "--batch-size", 5, "--device", "cpu", "--memory", "1MiB", "--quiet"]
    assert run("audit", file, *args, "--out", tmp_path / "out").code == 0
    study = load_study(file)
    own = method(study, weighting="uniform", batch_size=5).self_influence(study.train)
    saved = tracin.SelfInfluence.load(tmp_path / "out" / "self_influence.safetensors")
    assert saved.values.tolist() == own.values.tolist()


def test_foreign_text_is_printed_as_it_is(run, write_study):
    file = write_study(
        names="['[red]cat[/red]', ':cow:', 'do\\x1b[2Jg']",
        render="lambda row: '[bold]words[/bold] \\x1b]0;title\\x07'",
    )
    ran = run("explain", file, "--query", 0, 1, 2, "--target", "0", "--top", 23)
    assert ran.code == 0, ran.err
    for text in ("[red]cat[/red]", ":cow:", "do�[2Jg", "[bold]words[/bold]"):
        assert text in ran.out
    assert "\x1b" not in ran.out
    assert "\x07" not in ran.out


def test_warnings_are_one_line(run, write_study):
    file = write_study()
    file.write_text(file.read_text().replace("step=10 * seed", "step=10 * seed, optimizer='Adam'"))
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdaptiveOptimizerWarning)
        ran = run("audit", file)
    assert ran.code == 0
    notes = [line for line in ran.err.splitlines() if line.startswith("tracin: note:")]
    assert len(notes) == 1
    assert "Adam" in notes[0]
