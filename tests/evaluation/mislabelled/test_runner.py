"""The study: what it finds is what the methods say, and it goes on where it was cut short."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import tracin
from tracin.errors import MissingExtraError, NotFiniteError, OptionError, ResultError
from tracin.evaluation import DetectionCurve, plant_flips
from tracin.evaluation.mislabelled import METHODS, Design, StudyResult, named, own_data, read_data, run_study
from tracin.evaluation.mislabelled import runner as running
from tracin.evaluation.mislabelled.measure import Measured
from tracin.evaluation.mislabelled.repair import repaired_labels
from tracin.evaluation.mislabelled.result import GRID, RANDOM_ORDER, Cell, Found, found_of
from tracin.evaluation.mislabelled.training import Trainer
from tracin.scoring.evaluation import evaluate

SMALL = {
    "data": "digits",
    "rows": 240,
    "epochs": 2,
    "checkpoints": 3,
    "seeds": 1,
    "rate": 0.1,
    "model": "mlp",
}


def design(*methods, **changes):
    return Design(**{**SMALL, "methods": methods or ("tracin", "loss"), **changes})


@pytest.fixture(scope="module")
def data():
    return read_data(design())


def numbers(result):
    drop = ("seconds", "cpu_seconds", "peak_bytes", "train_seconds")
    return [{name: row[name] for name in row if name not in drop} for row in result.seed_table()]


@pytest.fixture
def count(monkeypatch):
    """How often a model of the study is trained."""
    calls = []
    real = Trainer.train

    def train(self, rows, folder, *, schedule, seed):
        calls.append((schedule, seed))
        return real(self, rows, folder, schedule=schedule, seed=seed)

    monkeypatch.setattr(Trainer, "train", train)
    return calls


def by_hand(data, schedule, seed, folder):
    """Flips, checkpoints and task, without the study."""
    flips = plant_flips(data.train[1], 0.1, classes=10, seed=seed)
    trainer = Trainer(design(), data, "cpu")
    rows = (data.train[0], flips.labels)
    return flips, rows, trainer.task(), trainer.train(rows, folder, schedule=schedule, seed=seed)


def test_the_numbers_are_those_of_the_methods(data, tmp_path):
    plan = design(
        "tracin", "tracin-integrated", "tracin-uniform", "tracin-last", "loss", "loss-last", seeds=2
    )
    result = run_study(plan, data, tmp_path / "out", device="cpu")
    assert [cell.key for cell in result.cells] == plan.cells
    for cell in result.cells:
        flips, rows, task, trajectory = by_hand(data, cell.schedule, cell.seed, tmp_path / cell.key.name)
        losses = evaluate(task, trajectory, rows, name="train").losses.double()

        def own(weighting, trajectory, task=task, rows=rows):
            method = tracin.TracInCP(task, trajectory, weighting=weighting, progress=False)
            return method.self_influence(rows).values

        scores = {
            "tracin": own("learning_rate", trajectory),
            "tracin-integrated": own("integrated", trajectory),
            "tracin-uniform": own("uniform", trajectory),
            "tracin-last": own("uniform", trajectory[-1:]),
            "loss": losses.mean(0),
            "loss-last": losses[-1],
        }
        kept, _ = running.read_tensors(
            tmp_path / "out" / "cells" / f"{cell.key.name}.safetensors", ResultError
        )
        agree(cell, kept, scores, flips.mask)
        assert (cell.rows, cell.planted) == (240, 24)
        assert [saved["step"] for saved in cell.checkpoints] == [3, 6, 8]
        with pytest.raises(AssertionError, match="tracin"):
            agree(cell, kept, {"tracin": scores["tracin"] * 1.001}, flips.mask)
        with pytest.raises(AssertionError, match="tracin"):
            agree(cell, kept, {"tracin": scores["tracin"]}, flips.mask.roll(1))


def agree(cell, kept, scores, planted):
    """The kept scores against those made without the study, and what the cell says of them, exactly."""
    for name, values in scores.items():
        torch.testing.assert_close(kept[name], values.double(), rtol=1e-4, atol=1e-9, msg=name)
        curve, found = DetectionCurve(kept[name], planted), cell.found[name]
        assert found.auroc == curve.auroc, name
        assert found.average_precision == curve.average_precision, name
        for share in (0.1, 0.2, 0.3, 0.95):
            assert found.at(share) == pytest.approx(curve.found_at(share), abs=1e-6), name
        assert found.seconds is not None
        assert found.seconds > 0.0


def test_a_curve_is_read_at_the_share_asked_for():
    found = found_of(torch.arange(10.0, 0.0, -1.0), torch.arange(10) % 2 == 1, Measured(1.0))
    assert [found.at(share) for share in (0.1, 0.2, 0.3, 0.4, 1.0)] == [0.0, 0.2, 0.2, 0.4, 1.0]


def test_every_method_finds_flips(tmp_path):
    plan = design(*METHODS, rows=300, epochs=12, schedules=("constant",))
    result = run_study(plan, read_data(plan), tmp_path, device="cpu")
    for row in result.table():
        assert row["not_run"] is None, row
        assert row["auroc"] > 0.75, row
        assert row["seconds"] > 0.0
    found = result.cells[0].found
    assert found["gradient-norm"].auroc == pytest.approx(found["tracin-last"].auroc, abs=1e-6), (
        "they rank alike"
    )


def test_without_cleanlab_its_method_is_listed_and_the_study_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    result = run_study(design("confidence", "loss", schedules=("constant",)), data, tmp_path, device="cpu")
    confidence, loss = result.table()
    assert "pip install 'tracin[eval]'" in confidence["not_run"]
    assert loss["auroc"] is not None


def test_weightings_agree_under_a_constant_schedule_and_differ_under_a_cosine(data, tmp_path):
    names = ("tracin", "tracin-uniform")
    result = run_study(design(*names, epochs=4), data, tmp_path, device="cpu")
    constant, cosine = ([cell.found[name].auroc for name in names] for cell in result.cells)
    assert constant[0] == constant[1]
    assert cosine[0] != cosine[1]


def test_hardest_flips_are_the_strongest_wrong_class_of_a_clean_model(data, tmp_path, count):
    plan = design("loss", flips=("random", "hardest"), schedules=("constant", "step"))
    run_study(plan, data, tmp_path, device="cpu")
    assert len(count) == 5, "four cells, and one training on true labels"
    labels = {}
    for key in plan.cells:
        kept, _ = running.read_tensors(tmp_path / "cells" / f"{key.name}.safetensors", ResultError)
        labels[key.flips, key.schedule] = kept["labels"]
    assert torch.equal(labels["hardest", "constant"], labels["hardest", "step"])
    trainer = Trainer(plan, data, "cpu")
    clean = trainer.last(data.train, 0, schedule="cosine")
    logits = evaluate(trainer.task(), clean, data.train, name="train").logits[-1]
    true = data.train[1]
    wrong = logits.scatter(1, true[:, None], -torch.inf).argmax(1)
    hard, random = labels["hardest", "step"], labels["random", "step"]
    assert torch.equal(hard != true, random != true), "the same rows"
    assert torch.equal(hard[hard != true], wrong[hard != true])
    assert not torch.equal(hard, random)


def test_the_same_call_does_nothing_twice(data, tmp_path, count):
    first = run_study(design(), data, tmp_path, device="cpu")
    trained = len(count)
    again = run_study(design(), data, tmp_path, device="cpu")
    assert len(count) == trained
    assert again.to_json()["cells"] == first.to_json()["cells"]


def test_a_study_that_was_cut_short_goes_on(data, tmp_path, count, monkeypatch):
    whole = run_study(design(repair=(0.1,)), data, tmp_path / "whole", device="cpu")
    count.clear()
    real = METHODS["loss"].score
    begun = []

    def killed(context):
        begun.append(context)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(context)

    monkeypatch.setitem(METHODS, "loss", replace(METHODS["loss"], score=killed))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_study(design(repair=(0.1,)), data, out, device="cpu")
    second = json.loads((out / "cells" / "random-cosine-0.json").read_text())
    assert list(second["found"]) == ["tracin"]
    assert (out / "cells" / "random-cosine-0").is_dir(), "the checkpoints of the cell in work"
    before = count.copy()
    lines = []
    resumed = run_study(design(repair=(0.1,)), data, out, device="cpu", tell=lines.append)
    assert len(begun) == 3
    assert numbers(resumed) == numbers(whole)
    assert resumed.repair_table() == whole.repair_table()
    assert "2 training runs, 1 of them there already" in lines[1]
    more = count[len(before) :]
    assert more.count(("constant", 0)) == 0
    assert len(more) < len(before), "neither the first cell nor the training of the second was done again"
    assert [path.name for path in (out / "cells").iterdir() if path.is_dir()] == []


def test_a_training_that_was_cut_short_starts_anew(data, tmp_path, monkeypatch):
    whole = run_study(design(schedules=("constant",)), data, tmp_path / "whole", device="cpu")
    real = tracin.CheckpointRecorder.save

    def killed(self, step):
        if step > 3:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(tracin.CheckpointRecorder, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run_study(design(schedules=("constant",)), data, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "cells" / "random-constant-0").exists()
    assert numbers(
        run_study(design(schedules=("constant",)), data, tmp_path / "out", device="cpu")
    ) == numbers(whole)


def test_methods_seeds_and_schedules_can_be_added(data, tmp_path):
    run_study(design("loss", schedules=("constant",)), data, tmp_path, device="cpu")
    more = design("loss", "tracin", seeds=2, schedules=("constant", "step"))
    result = run_study(more, data, tmp_path, device="cpu")
    fresh = run_study(more, data, tmp_path / "fresh", device="cpu")
    assert numbers(result) == numbers(fresh)


def test_other_weights_of_the_same_run_start_the_cell_anew(data, tmp_path):
    plan = design("loss", schedules=("constant",))
    run_study(plan, data, tmp_path, device="cpu")
    path = tmp_path / "cells" / "random-constant-0.json"
    kept = json.loads(path.read_text())
    kept["weights"] = "of another processor"
    kept["found"]["loss"]["auroc"] = 0.123
    path.write_text(json.dumps(kept))
    lines = []
    again = run_study(
        design("loss", "loss-last", schedules=("constant",)), data, tmp_path, device="cpu", tell=lines.append
    )
    assert any("other weights" in line for line in lines)
    assert again.cells[0].found["loss"].auroc != 0.123


def test_cells_of_another_study_are_refused(data, tmp_path):
    run_study(design("loss", schedules=("constant",)), data, tmp_path, device="cpu")
    with pytest.raises(OptionError, match=r"random-constant-0\.json.*epochs was 2 and is 3.*another folder"):
        run_study(design("loss", schedules=("constant",), epochs=3), data, tmp_path, device="cpu")
    other = read_data(design(rows=241))
    with pytest.raises(OptionError, match="digest"):
        run_study(design("loss", schedules=("constant",)), other, tmp_path, device="cpu")


@pytest.mark.parametrize("end", [".json", ".safetensors"])
def test_a_damaged_cell_is_told_before_anything_is_trained(data, tmp_path, count, end):
    run_study(design("loss"), data, tmp_path, device="cpu")
    path = tmp_path / "cells" / f"random-constant-0{end}"
    path.write_bytes(path.read_bytes()[:60])
    before = len(count)
    with pytest.raises(ResultError, match=r"(?i)remove"):
        run_study(design("loss", "margin"), data, tmp_path, device="cpu")
    assert len(count) == before


def test_a_method_that_lacks_its_extra_is_listed_and_tried_again(data, tmp_path, monkeypatch):
    def missing(context):
        raise MissingExtraError("loss needs a crystal ball: pip install 'tracin[ball]'")

    plan = design("loss", "loss-last", schedules=("constant",))
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "loss", replace(METHODS["loss"], score=missing))
        lines = []
        result = run_study(plan, data, tmp_path, device="cpu", tell=lines.append)
    row = result.table()[0]
    assert row["method"] == "loss"
    assert row["auroc"] is None
    assert "pip install 'tracin[ball]'" in row["not_run"]
    assert result.table()[1]["auroc"] is not None
    assert result.methods_run() == ["loss-last"]
    assert any("loss: not run: loss needs a crystal ball" in line for line in lines)
    again = run_study(plan, data, tmp_path, device="cpu")
    assert again.methods_run() == ["loss", "loss-last"]


def test_a_method_that_fails_is_told_apart_from_one_that_refuses(data, tmp_path, monkeypatch):
    def broken(context):
        raise NotFiniteError("row 3 has a NaN")

    monkeypatch.setitem(METHODS, "loss", replace(METHODS["loss"], score=broken))
    plan = design("loss", "loss-last", schedules=("constant",))
    result = run_study(plan, data, tmp_path, device="cpu")
    assert result.table()[0]["not_run"] == "NotFiniteError: row 3 has a NaN"
    assert result.methods_run() == ["loss-last"]


def test_a_mistake_in_the_code_ends_the_study_and_nothing_before_it_is_lost(data, tmp_path, monkeypatch):
    def mistaken(context):
        raise IndexError("list index out of range")

    monkeypatch.setitem(METHODS, "loss-last", replace(METHODS["loss-last"], score=mistaken))
    with pytest.raises(IndexError):
        run_study(design("loss", "loss-last", schedules=("constant",)), data, tmp_path, device="cpu")
    kept = json.loads((tmp_path / "cells" / "random-constant-0.json").read_text())
    assert list(kept["found"]) == ["loss"]


def test_repairs(data, tmp_path, count):
    plan = design("loss", "loss-last", schedules=("constant",), repair=(0.1, 1.0), epochs=6)
    result = run_study(plan, data, tmp_path, device="cpu")
    cell = result.cells[0]
    assert {(each.order, each.share) for each in cell.repaired} == {
        (order, share) for order in (RANDOM_ORDER, "loss", "loss-last") for share in (0.1, 1.0)
    }
    whole = {each.accuracy for each in cell.repaired if each.share == 1.0}
    assert whole == {cell.clean_accuracy}, "every label looked at: as if none had been wrong"
    assert all(each.corrected == 24 for each in cell.repaired if each.share == 1.0)
    assert len(count) <= 1 + 1 + 3, "equal labels are trained on once"
    for row in result.repair_table():
        assert row["accuracy_before"] == cell.accuracy


def test_what_a_repair_corrects():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9])
    given, true = torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 0, 0])
    assert repaired_labels(scores, given, true, 0.5).tolist() == [1, 0, 1, 0]
    assert repaired_labels(scores, given, true, 0.25).tolist() == [1, 0, 1, 1]
    assert given.tolist() == [1, 1, 1, 1]


def fit(train, folder, seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for step in range(1, 31):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(train[0]), train[1]).backward()
            optimizer.step()
            if step % 10 == 0:
                recorder.save(step=step)
        return recorder.trajectory()


def own_study(folder, out, methods=("tracin", "tracin-last-layer", "loss"), seeds=2):
    """The study of a file whose code is ``fit`` above, whatever its bytes are."""
    labels = torch.arange(90) % 3
    noise = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    rows = (torch.nn.functional.one_hot(labels, 5).float() + 0.1 * noise, labels)
    task = tracin.Task(torch.nn.Linear(5, 3), tracin.losses.cross_entropy)
    plan = Design(data=str(folder / "mine.py"), methods=methods, seeds=seeds, flips=("random", "hardest"))
    with torch.random.fork_rng():
        return run_study(plan, own_data(plan, task, rows, rows, fit), out, device="cpu")


def test_a_study_file(tmp_path):
    (tmp_path / "mine.py").write_text("one")
    result = own_study(tmp_path, tmp_path)
    assert {cell.schedule for cell in result.cells} == {"own"}
    for row in result.table():
        assert row["auroc"] > 0.9, row
    assert len(result.cells[0].checkpoints) == 3


def test_cells_of_a_study_file_that_was_changed_are_refused(tmp_path, count):
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text("one")
    own_study(tmp_path, out, ("loss",), seeds=1)
    trained = len(count)
    own_study(tmp_path, out, ("loss",), seeds=1)
    assert len(count) == trained
    file.write_text("two")
    with pytest.raises(OptionError, match=r"random-own-0\.json is of another study: file was .* and is "):
        own_study(tmp_path, out, ("loss",), seeds=1)
    for cell in (out / "cells").glob("*-own-0.*"):
        cell.unlink()
    own_study(tmp_path, out, ("loss",), seeds=1)
    assert len(count) == 2 * trained, "the clean model of the hardest flips is trained anew, too"


def test_json_of_a_study(data, tmp_path):
    result = run_study(design(repair=(0.2,), schedules=("step",)), data, tmp_path, device="cpu")
    path = tmp_path / "study.json"
    path.write_text(json.dumps(result.to_json()))
    read = StudyResult.load(path)
    assert read.table() == result.table()
    assert read.repair_table() == result.repair_table()
    assert read.design == result.design
    assert read.made_with["torch"] == torch.__version__
    values = result.to_json()
    for broken, fact in (
        ("[]", "holds a list"),
        ("{", "no JSON"),
        (json.dumps({**values, "study": "else"}), "no study of mislabelled data"),
        (json.dumps({**values, "cells": [{"flips": "random"}]}), "a cell of the study cannot be read"),
        (json.dumps({name: values[name] for name in values if name != "made_with"}), "made_with"),
    ):
        path.write_text(broken)
        with pytest.raises(ResultError, match=fact):
            StudyResult.load(path)
    with pytest.raises(ResultError, match="cannot be read"):
        StudyResult.load(tmp_path / "none.json")


def test_tables_hold_means_and_spreads():
    flags = torch.tensor([True, False, False, False])
    found = [
        found_of(torch.tensor(scores), flags, Measured(1.0)) for scores in ([9.0, 1, 2, 3], [2.5, 1, 2, 3])
    ]
    cells = [
        Cell(
            "random",
            "constant",
            seed,
            {},
            "",
            4,
            1,
            0.5,
            1.0,
            [],
            {"loss": each, "tracin": Found(not_run="no")},
        )
        for seed, each in enumerate(found)
    ]
    plan = Design(data="digits", methods=("loss", "tracin"), seeds=2, schedules=("constant",))
    rows = StudyResult(plan, {}, cells).table()
    assert rows[0]["auroc"] == pytest.approx((1.0 + 2 / 3) / 2)
    assert rows[0]["auroc_sd"] == pytest.approx((1 / 3) / 2**0.5)
    assert rows[0]["seeds"] == 2
    assert (rows[1]["auroc"], rows[1]["not_run"], rows[1]["seeds"]) == (None, "no", 0)
    assert found[0].curve[0] == 0.0
    assert found[0].curve[-1] == 1.0
    assert len(found[0].curve) == len(GRID)


def test_names_of_methods(data, tmp_path):
    assert named(()) == tuple(METHODS)
    assert named(("loss", "tracin", "loss")) == ("loss", "tracin")
    with pytest.raises(
        OptionError,
        match=r"methods='trackin': there is no such method\. Did you mean tracin\?.*Known are tracin,",
    ):
        named(("trackin",))
    with pytest.raises(OptionError, match="methods='magic': there is no such method"):
        run_study(design("magic"), data, tmp_path)
