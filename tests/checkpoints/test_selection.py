"""The advice keeps the part of a run in which the loss falls, and says why of every checkpoint."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tracin
from tracin.checkpoints.selection import advise
from tracin.errors import NotFiniteError, OptionError
from tracin.scoring.evaluation import evaluate

NOISY, GOOD, TAIL = 5, 10, 8


def trained(seed: int) -> tuple[tracin.Task, tracin.Trajectory, tuple[torch.Tensor, torch.Tensor]]:
    """Single steps of a rate that is too high, then epochs of a good one, then epochs of one that moves nothing."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.5 * torch.randn(6, 16, generator=generator)
    labels = torch.arange(300) % 6
    rows = (centres[labels] + torch.randn(300, 16, generator=generator), labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpoints = []
    for rate, steps in [(4.0, 1)] * NOISY + [(0.1, 6)] * GOOD + [(0.0003, 6)] * TAIL:
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(steps):
            some = torch.randint(0, 300, (24,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows[0][some]), labels[some]).backward()
            optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        checkpoints.append(tracin.Checkpoint(state, learning_rate=rate, learning_rate_sum=rate * steps))
    return tracin.Task(model, tracin.losses.cross_entropy), tracin.Trajectory(checkpoints), rows


@pytest.mark.parametrize("seed", range(6))
def test_a_real_run_with_a_noisy_start_and_a_flat_tail_keeps_the_fall_between_them(seed):
    task, trajectory, rows = trained(seed)
    losses = evaluate(task, trajectory, rows, name="train", device="cpu").losses
    mean = losses.mean(1)
    assert (mean[1:NOISY] > mean[: NOISY - 1]).any(), "the start was not noisy"
    assert float(mean[-TAIL] - mean[-1]) < 0.02 * float(mean[NOISY] - mean[-1]), "the tail was not flat"
    selected = trajectory.select(losses=losses)
    advice = selected.advice
    assert advice is not None
    noisy, tail = set(range(NOISY - 1)), set(range(NOISY + GOOD, NOISY + GOOD + TAIL))
    assert not noisy & set(advice.kept), str(advice)
    assert not tail & set(advice.kept), str(advice)
    assert len(advice.kept) >= GOOD // 2, str(advice)
    assert advice.kept == advise(mean.tolist()).kept
    assert all("first fluctuations" in advice.reasons[at] for at in range(NOISY - 2)), str(advice)
    assert all("flat tail" in advice.reasons[at] for at in tail), str(advice)
    assert len(selected) == len(advice.kept)
    sums = sum(checkpoint.learning_rate_sum for checkpoint in trajectory[: advice.kept[-1] + 1])
    assert sum(checkpoint.learning_rate_sum for checkpoint in selected) == pytest.approx(sums)


curves = st.lists(st.floats(0, 1e3), min_size=1, max_size=40)


@given(losses=curves)
def test_any_losses_give_positions_in_order_and_a_sentence_for_each_checkpoint(losses):
    advice = advise(losses)
    assert advice.kept
    assert list(advice.kept) == sorted(set(advice.kept))
    assert advice.kept[0] >= 0
    assert advice.kept[-1] < len(losses)
    assert sorted(advice.kept + advice.skipped) == list(range(len(losses)))
    assert len(advice.reasons) == len(losses)
    assert all(advice.reasons)
    assert len(str(advice).splitlines()) == len(losses) + 1


@given(falls=st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_a_curve_that_only_falls_keeps_its_steepest_part_and_no_step_without_a_fall(falls):
    losses = torch.tensor([*falls, 0]).flip(0).cumsum(0).flip(0).double()
    advice = advise(losses)
    steepest = max(range(len(falls)), key=lambda at: (losses[at] - losses[at + 1], -at)) + 1
    assert steepest in advice.kept, str(advice)
    assert advice.kept[0] == 0
    assert all(losses[at] < losses[at - 1] for at in advice.kept[1:]), str(advice)
    assert float(losses[0] - losses[advice.kept[-1]]) >= 0.8 * sum(falls)


@given(
    fall=st.lists(st.floats(0.1, 1), min_size=3, max_size=12),
    jumps=st.lists(st.floats(0.5, 2), min_size=1, max_size=4),
    tail=st.integers(1, 15),
)
def test_jumps_before_the_fall_and_a_flat_tail_after_it_are_left_out(fall, jumps, tail):
    total = sum(fall)
    start = [total * 1.05 + jump * total * (at % 2 == 0) for at, jump in enumerate([0.0, *jumps], start=1)]
    start = [total * 1.05, *start, total * 1.6]
    descent = (torch.tensor(fall).flip(0).cumsum(0).flip(0) * 0.98 + 0.01).tolist()
    losses = [*start, *descent, *[0.01] * tail]
    advice = advise(losses)
    first = len(start)
    assert advice.kept[0] >= first, str(advice)
    assert advice.kept[-1] <= first + len(descent), str(advice)
    steepest = first + 1 + max(range(len(fall)), key=lambda at: (fall[at], -at))
    assert {first, steepest} & set(advice.kept), str(advice)


@given(loss=st.floats(0, 1e6), count=st.integers(1, 12), growth=st.floats(0, 10))
def test_losses_that_never_fall_keep_all_and_say_so(loss, count, growth):
    for losses in ([loss] * count, [loss + growth * at for at in range(count)]):
        advice = advise(losses)
        assert advice.kept == tuple(range(count))
        assert set(advice.reasons) == {
            "the loss never falls below that of the first checkpoint: no ground for a choice"
        }


def test_rounding_in_a_constant_loss_is_no_fall():
    assert advise([0.3, 0.1 + 0.2, 0.3]).kept == (0, 1, 2)


def test_one_lucky_checkpoint_in_the_start_does_not_hide_the_fall():
    advice = advise([2.3, 1.2, 3.0, 2.5, 1.9, 1.4, 1.15, 1.1])
    assert advice.kept == (4, 5, 6, 7)
    assert "jumps to 1.8 above its low" in advice.reasons[1]
    assert advice.reasons[3] == "no new low: the loss was 2.3 before"


def test_one_late_spike_changes_nothing_before_it():
    calm = [2.3, 2.0, 1.5, 1.0, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]
    spiked = [*calm[:9], 2.1, *calm[10:]]
    assert advise(spiked).kept == advise(calm).kept == (0, 1, 2, 3, 4, 5, 6, 7)


def test_the_share_thins_the_fall():
    losses = torch.linspace(2, 0, 101, dtype=torch.float64)
    assert 50 <= len(advise(losses).kept) <= 52
    few = advise(losses, share=0.25)
    assert few.kept[0] == 0
    assert len(few.kept) <= 6
    assert "of the whole fall since checkpoint" in few.reasons[few.kept[1] + 1]


@pytest.mark.parametrize("losses", [[], torch.zeros(2, 3, 4), torch.tensor(1.0), torch.zeros(2, 0)])
def test_losses_of_another_shape_are_refused(losses):
    with pytest.raises(OptionError, match=r"losses has the shape"):
        advise(losses)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_checkpoint(bad):
    with pytest.raises(NotFiniteError, match=r"at checkpoint 1 is .* Leave this checkpoint out"):
        advise([1.0, bad, 0.5])


@pytest.mark.parametrize("name", ["fluctuation", "share"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, float("nan")])
def test_parts_outside_0_to_1_are_refused(name, value):
    with pytest.raises(OptionError, match=rf"{name} is .* between 0 and 1"):
        advise([1.0, 0.5], **{name: value})


def test_a_trajectory_takes_positions_or_losses_and_as_many_losses_as_checkpoints():
    trajectory = tracin.Trajectory([tracin.Checkpoint({"w": torch.ones(1)}, step=at) for at in range(3)])
    assert trajectory.advice is None
    assert trajectory.select([0, 2]).advice is None
    assert [c.step for c in trajectory.select(losses=[1.0, 0.4, 0.399])] == [0, 1]
    with pytest.raises(OptionError, match="losses of 2 checkpoints for a trajectory of 3"):
        trajectory.select(losses=[1.0, 0.5])
    for arguments in ({}, {"keep": [0], "losses": [1.0, 0.5, 0.2]}):
        with pytest.raises(OptionError, match="one of the two"):
            trajectory.select(**arguments)
