"""Models and their training: seeded, scheduled, with checkpoints where they are due."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import tracin
from tracin.errors import NotFiniteError, OptionError, UserCodeError
from tracin.evaluation.mislabelled import Design, own_data, read_data
from tracin.evaluation.mislabelled.models import build
from tracin.evaluation.mislabelled.training import Trainer, batches, save_steps, scheduler_of


def design(**changes):
    given = {"data": "digits", "methods": ("loss",), "rows": 130, "epochs": 2, "checkpoints": 3, **changes}
    return Design(**given)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28)])
def test_a_model_suits_the_pictures(kind, shape):
    model = build(kind, shape, 7, seed=1)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
    assert isinstance(model[-1], torch.nn.Linear)


def test_weights_come_from_the_seed_and_leave_the_random_state():
    before = torch.get_rng_state()
    one, two, other = (build("cnn", (1, 8, 8), 10, seed).state_dict() for seed in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(OptionError, match="vit"):
        build("vit", (1, 8, 8), 10, 0)


def test_the_resnet_normalises_batches():
    names = [type(module).__name__ for module in build("resnet", (1, 8, 8), 10, 0).modules()]
    assert names.count("BatchNorm2d") == 9


def rates(schedule, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler, seen = scheduler_of(optimizer, schedule, steps), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_schedules():
    assert rates("constant", 4) == [0.4] * 4
    assert rates("step", 8) == pytest.approx([0.4] * 4 + [0.04] * 2 + [0.004] * 2)
    cosine = rates("cosine", 10)
    assert cosine[0] == 0.4
    assert cosine[5] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(cosine))
    cycle = rates("onecycle", 10)
    assert 0.38 < max(cycle) <= 0.4
    assert cycle[0] == pytest.approx(0.4 / 25)
    assert 0 < cycle[-1] < cycle[-2] < 0.1
    with pytest.raises(OptionError, match="linear"):
        rates("linear", 4)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "onecycle"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_trainings_have_schedules_too(schedule, steps):
    assert all(rate > 0 for rate in rates(schedule, steps))


def test_steps_to_save_at():
    assert save_steps(264, 8) == [33, 66, 99, 132, 165, 198, 231, 264]
    assert save_steps(3, 8) == [1, 2, 3]
    assert save_steps(5, 1) == [5]


def test_a_single_row_left_over_joins_the_batch_before():
    assert [len(batch) for batch in batches(torch.arange(65), 64)] == [65]
    assert [len(batch) for batch in batches(torch.arange(66), 64)] == [64, 2]
    assert torch.cat(batches(torch.arange(129), 64)).tolist() == list(range(129))


def test_training_is_repeatable_and_records_the_rates(tmp_path):
    data = read_data(design())
    trainer = Trainer(design(), data, "cpu")
    before = torch.get_rng_state()
    one, two, other = (
        trainer.train(data.train, tmp_path / str(place), schedule="cosine", seed=seed)
        for place, seed in enumerate((4, 4, 5))
    )
    assert torch.equal(before, torch.get_rng_state())
    assert [checkpoint.step for checkpoint in one] == [2, 4, 6]
    assert all(same(a.load(), b.load()) for a, b in zip(one, two, strict=True))
    assert not same(one[-1].load(), other[-1].load())
    taken = rates("cosine", 6)
    scale = design().rate / 0.4
    assert [checkpoint.learning_rate for checkpoint in one] == pytest.approx(
        [scale * taken[at] for at in (1, 3, 5)]
    )
    sums = [scale * sum(taken[at : at + 2]) for at in (0, 2, 4)]
    assert [checkpoint.learning_rate_sum for checkpoint in one] == pytest.approx(sums)


def test_the_last_checkpoint_in_memory_is_that_of_the_folder(tmp_path):
    data = read_data(design(model="resnet"))
    trainer = Trainer(design(model="resnet"), data, "cpu")
    folder = trainer.train(data.train, tmp_path, schedule="step", seed=0)
    kept = trainer.last(data.train, 0, schedule="step")
    assert same(folder[-1].load(), kept[-1].load())
    assert trainer.accuracy(folder) == trainer.accuracy(kept)


def test_the_model_learns():
    plan = design(rows=600, epochs=10, model="mlp", rate=0.1)
    data = read_data(plan)
    trainer = Trainer(plan, data, "cpu")
    assert trainer.accuracy(trainer.last(data.train, 0, schedule="constant")) > 0.85


def test_divergence_names_the_knob(tmp_path):
    plan = design(rate=1e6)
    data = read_data(plan)
    with pytest.raises(NotFiniteError, match="take a lower rate"):
        Trainer(plan, data, "cpu").train(data.train, tmp_path, schedule="constant", seed=0)


def test_an_unknown_device():
    data = read_data(design())
    with pytest.raises(OptionError, match="device=abacus is not there"):
        Trainer(design(), data, "abacus")


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A study file in the working directory, whose bytes count and whose code does not."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text("def study(): ...")
    return path


def own(fit):
    task = tracin.Task(torch.nn.Linear(2, 3), tracin.losses.cross_entropy)
    rows = (torch.randn(6, 2), torch.arange(6) % 3)
    plan = Design(data="mine.py", methods=("loss",))
    return Trainer(plan, own_data(plan, task, rows, rows, fit), "cpu")


def test_the_fit_of_a_study_file(tmp_path):
    seen = []

    def fit(train, folder, seed):
        seen.append((train, folder, seed))
        return tracin.Trajectory([tracin.Checkpoint(torch.nn.Linear(2, 3).state_dict(), learning_rate=0.1)])

    trainer = own(fit)
    trajectory = trainer.train(trainer.data.train, tmp_path, schedule="own", seed=3)
    assert len(trajectory) == 1
    assert seen == [(trainer.data.train, tmp_path, 3)]
    assert trainer.seconds_per_pass() is None
    assert 0.0 <= trainer.accuracy(trajectory) <= 1.0


def test_a_fit_that_breaks_or_returns_something_else(tmp_path):
    def broken(train, folder, seed):
        raise KeyError("lost")

    with pytest.raises(UserCodeError, match=r"mine\.py: fit raised KeyError: 'lost'"):
        own(broken).train(own(broken).data.train, tmp_path, schedule="own", seed=0)
    with pytest.raises(OptionError, match="fit returned a list"):
        own(lambda *_: []).train(own(broken).data.train, tmp_path, schedule="own", seed=0)


def test_a_probe_tells_what_a_pass_takes():
    plan = replace(design(), rows=300)
    seconds = Trainer(plan, read_data(plan), "cpu").seconds_per_pass()
    assert seconds is not None
    assert 0.0 < seconds < 60.0
