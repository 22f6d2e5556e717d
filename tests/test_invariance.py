"""What must not change the scores (kind of data, order, batches, the caller) and what must (weightings, rates)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import oracle
import tracin
from cases import BY_NAME, Case
from judged import PLAIN, M, N, Run, truth

_SOME = [
    "mlp_relu",
    "conv2d_chain",
    "lstm_time_first_bidirectional_t3",
    "tied_embeddings",
    "bare_parameters",
    "rows_sorted",
]
some = pytest.mark.parametrize("case", [BY_NAME[name] for name in _SOME], ids=str)


@some
@pytest.mark.parametrize("weighting", ["uniform", "integrated"])
def test_weightings(case: Case, weighting: str) -> None:
    run = Run(case)
    task = tracin.Task(run.model, case.loss)
    sums = [0.9, 0.4]
    trajectory = tracin.Trajectory(
        [
            tracin.Checkpoint(state, learning_rate_sum=rate)
            for state, rate in zip(case.states(), sums, strict=True)
        ]
    )
    method = tracin.TracInCP(
        task, trajectory, weighting=weighting, batch_size=3, device="cpu", progress=False
    )
    found = method.influence(run.train, run.queries)
    sides = [
        oracle.trajectory_gradients(case.model(), case.loss, rows, case.states())
        for rows in (run.train, run.queries)
    ]
    oracle.assert_close(
        found.values, oracle.scores(*sides, sums if weighting == "integrated" else [1.0, 1.0]), 1e-10
    )


@some
def test_a_rate_of_zero_takes_its_checkpoint_out(case: Case) -> None:
    run = Run(case)
    both = run.ask("influence", run.train, run.queries, rates=[0.3, 0.0], batch_size=3)
    task = tracin.Task(run.model, case.loss)
    one = tracin.Trajectory([tracin.Checkpoint(case.states()[0], learning_rate=0.3)])
    alone = tracin.TracInCP(task, one, batch_size=3, device="cpu", progress=False).influence(
        run.train, run.queries
    )
    oracle.assert_close(both.values, alone.values, 1e-14)


@some
@pytest.mark.parametrize("memory", ["2GiB", 16_000])
def test_batches_that_go_by_the_model(case: Case, memory: Any) -> None:
    """Under a bound of 16,000 bytes the batches have a few rows, else all rows fit into the first."""
    run = Run(case)
    found = run.ask("influence", run.train, run.queries, batch_size="auto", memory=memory)
    oracle.assert_close(found.values, truth(case.name).scores, 1e-10)


def batches(rows: Any, kind: str) -> Any:
    """The same rows as another kind of data."""
    if kind == "tensors":
        return rows
    dataset = TensorDataset(*rows)
    return dataset if kind == "dataset" else DataLoader(dataset, batch_size=2)


@some
@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_every_kind_of_data_says_the_same(case: Case, kind: str) -> None:
    run = Run(case)
    expected = truth(case.name).scores
    found = run.ask("influence", batches(run.train, kind), batches(run.queries, kind), batch_size=3)
    oracle.assert_close(found.values, expected, 1e-10)
    mixed = run.ask("influence", batches(run.train, kind), run.queries, batch_size=3)
    oracle.assert_close(mixed.values, expected, 1e-10)


@some
def test_row_order_only_moves_the_scores(case: Case) -> None:
    run = Run(case)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    moved = tuple(tensor[order] for tensor in run.train)
    found = run.ask("influence", moved, run.queries, batch_size=3)
    oracle.assert_close(found.values, truth(case.name).scores[:, order], 1e-10)


@some
def test_same_numbers_twice(case: Case) -> None:
    run = Run(case)
    method = run.method(batch_size=3)
    first, second = (method.influence(run.train, run.queries).values for _ in range(2))
    assert torch.equal(first, second)


@some
def test_top_k_in_full_is_the_influence_sorted(case: Case) -> None:
    run = Run(case)
    found = run.ask("top_k", run.train, run.queries, k=N, batch_size=3)
    expected = truth(case.name).scores
    assert torch.equal(found.proponents.ids, found.opponents.ids.flip(1))
    assert torch.equal(found.proponents.ids, expected.argsort(dim=1, descending=True))


def test_ties_go_to_the_lower_id() -> None:
    """Small whole numbers, so that equal scores are equal to the last bit however they are summed."""
    model = nn.Linear(2, 1, bias=False).double()
    task = tracin.Task(model, lambda model, batch: model(batch[0]).squeeze(1))
    state = {"weight": torch.ones(1, 2, dtype=torch.float64)}
    trajectory = tracin.Trajectory([tracin.Checkpoint(state, learning_rate=rate) for rate in (0.5, 0.25)])
    method = tracin.TracInCP(task, trajectory, batch_size=2, device="cpu", progress=False)
    train = (torch.tensor([[1, 0], [2, 0], [1, 5], [2, 7], [0, 1], [1, 1], [2, 2]]).double(),)
    found = method.top_k(train, (torch.tensor([[4.0, 0.0]]).double(),), k=4)
    assert found.proponents.ids.tolist() == [[1, 3, 6, 0]]
    assert found.proponents.values.tolist() == [[6.0, 6.0, 6.0, 3.0]]
    assert found.opponents.ids.tolist() == [[4, 0, 2, 5]]
    assert found.opponents.values.tolist() == [[0.0, 3.0, 3.0, 3.0]]


def test_queries_that_are_train_rows_give_self_influence() -> None:
    run = Run(BY_NAME["conv2d_chain"])
    scores = run.ask("influence", run.train, run.train, batch_size=3).values
    oracle.assert_close(scores.diagonal(), truth("conv2d_chain").own, 1e-10)


def test_a_zero_gradient_has_no_direction() -> None:
    """With a weight of 0 a row's gradient is 0: its normalized score is 0, not NaN."""
    run = Run(BY_NAME["weighted_rows"])
    run.train[2][4], run.queries[2][1] = 0.0, 0.0
    found = run.ask("influence", run.train, run.queries, rates=PLAIN, normalize=True, batch_size=3).values
    assert torch.isfinite(found).all()
    assert (found[:, 4] == 0).all()
    assert (found[1] == 0).all()
    assert (found != 0).sum() == (M - 1) * (N - 1)


@some
def test_under_the_callers_no_grad(case: Case) -> None:
    run = Run(case)
    with torch.no_grad():
        found = run.ask("influence", run.train, run.queries, batch_size=3)
    oracle.assert_close(found.values, truth(case.name).scores, 1e-10)


@some
def test_what_training_left_behind_stays(case: Case) -> None:
    """Accumulated gradients, hooks of the user on modules and tensors."""
    run = Run(case)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
        parameter.register_hook(lambda grad: grad)
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    for module in run.model.modules():
        module.register_forward_hook(lambda *_: None)
    found = run.ask("influence", run.train, run.queries, batch_size=3)
    oracle.assert_close(found.values, truth(case.name).scores, 1e-10)


ALONE = """
import random, torch, tracin
model = torch.nn.Linear(2, 2)
task = tracin.Task(model, tracin.losses.cross_entropy)
trajectory = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
rows = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
random.seed(1)
before = random.getstate()
method = tracin.TracInCP(task, trajectory, batch_size=2, device="cpu", progress=False)
method.influence(rows, rows), method.top_k(rows, rows, k=2), method.self_influence(rows), method.verify(rows)
assert random.getstate() == before, "drawn from"
"""


def test_pythons_random_state_stays() -> None:
    """In a process of its own: beartype, which the tests switch on, draws from it."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@some
@pytest.mark.usefixtures("smallest_tiles")
def test_little_memory_changes_no_score(case: Case) -> None:
    run = Run(case)
    options = {"batch_size": 3}
    expected = truth(case.name)
    oracle.assert_close(
        run.ask("influence", run.train, run.queries, **options).values, expected.scores, 1e-10
    )
    oracle.assert_close(run.ask("self_influence", run.train, **options).values, expected.own, 1e-10)
    found = run.ask("top_k", run.train, run.queries, k=N, **options)
    oracle.assert_close(found.proponents.values, expected.scores.sort(dim=1, descending=True).values, 1e-10)


def test_a_loader_with_workers() -> None:
    run = Run(BY_NAME["mlp_relu"])
    loader = DataLoader(TensorDataset(*run.train), batch_size=3, num_workers=1)
    found = run.ask("influence", loader, run.queries, batch_size=3)
    oracle.assert_close(found.values, truth("mlp_relu").scores, 1e-10)
