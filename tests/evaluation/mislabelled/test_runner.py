"""The study: what it finds is what the methods say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import tracin
from evaluation.mislabelled.common import design
from tracin.errors import MissingExtraError, NotFiniteError, OptionError, ResultError
from tracin.evaluation import DetectionCurve, plant_flips
from tracin.evaluation.mislabelled import METHODS, named, read_data, run_study
from tracin.evaluation.mislabelled import runner as running
from tracin.evaluation.mislabelled.repair import repaired_labels
from tracin.evaluation.mislabelled.result import RANDOM_ORDER
from tracin.evaluation.mislabelled.training import Trainer
from tracin.scoring.evaluation import evaluate


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
