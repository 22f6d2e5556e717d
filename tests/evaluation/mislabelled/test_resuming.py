"""A study goes on where it was cut short, and takes over nothing that is of another study."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import tracin
from evaluation.mislabelled.common import design, numbers
from tracin.errors import OptionError, ResultError
from tracin.evaluation.mislabelled import METHODS, Design, own_data, read_data, run_study


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


def test_a_study_file(tmp_path):
    (tmp_path / "mine.py").write_text("one")
    result = own_study(tmp_path, tmp_path)
    assert {cell.schedule for cell in result.cells} == {"own"}
    for row in result.table():
        assert row["auroc"] > 0.9, row
    assert len(result.cells[0].checkpoints) == 3
