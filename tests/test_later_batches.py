"""What shows only after the first batch or checkpoint: the first check must not be the last word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import oracle
import tracin
from cases import BY_NAME, Case
from judged import PLAIN, Run
from tracin.errors import ModelError


def exact_or_refused(run: Run, rows: Any, train: Any = None) -> None:
    """Influence on rows made for the purpose equals the judge's, or the model is refused."""
    case = run.case
    sides = [
        oracle.trajectory_gradients(case.model(), case.loss, side, case.states())
        for side in (rows, run.queries)
    ]
    try:
        found = run.ask("influence", rows if train is None else train, run.queries, batch_size=3)
    except ModelError:
        return
    oracle.assert_close(found.values, oracle.scores(*sides, case.rates()), 1e-10)


def test_rows_sorted_only_later() -> None:
    """A model that happens to keep the row order on the first batch, and not on the second."""
    run = Run(BY_NAME["rows_sorted"])
    x, queries = run.train[0], run.queries[0]
    x[:3] = x[:3][x[:3, 0].argsort()]
    x[3:6] = x[3:6][x[3:6, 0].argsort(descending=True)]
    queries[:] = queries[queries[:, 0].argsort()]
    exact_or_refused(run, run.train)


def test_rows_sorted_by_length_where_the_first_are_equally_long() -> None:
    """What is looked at first (the ends, the middle, the first batch) has one length; rows 4 and 5 have not."""
    run = Run(BY_NAME["rows_by_length"])
    run.train[1][:] = torch.tensor([2, 2, 2, 2, 1, 3, 2])
    run.queries[1][:] = 2
    exact_or_refused(run, run.train)


def test_rows_turned_in_a_later_larger_batch() -> None:
    run = Run(BY_NAME["rows_turned_when_many"])
    exact_or_refused(
        run, run.train, DataLoader(TensorDataset(*run.train), batch_sampler=[[0, 1], [2, 3, 4, 5, 6]])
    )


def test_experts_that_share_rows_only_later() -> None:
    """On the first batch one expert takes every row; on the second the rows are dealt out."""
    case = BY_NAME["experts"]
    run = Run(case)
    model = case.model()
    model.load_state_dict(case.states()[0])
    pool = case.rows(200, seed=5)[0]
    first = model.c(pool).argmax(-1) == 0
    x = torch.cat([pool[first][:3], pool[~first][:1], pool[first][3:5], pool[~first][1:2]])
    sides = [
        oracle.trajectory_gradients(case.model(), case.loss, rows, case.states())
        for rows in ((x,), run.queries)
    ]
    found = run.ask("influence", (x,), run.queries, batch_size=3)
    oracle.assert_close(found.values, oracle.scores(*sides, case.rates()), 1e-10)


def test_control_flow_that_turns_only_later() -> None:
    """A layer that no row of the first batch uses, and some row of a later one does."""
    case = BY_NAME["control_flow"]
    run = Run(case)
    model = case.model()
    model.load_state_dict(case.states()[0])
    pool = case.rows(200, seed=5)[0]
    quiet = (model.a(pool).tanh().sum(1) <= 0) & ((pool[:, 0].abs() * 2).int() % 3 == 0)
    x = torch.cat([pool[quiet][:3], pool[~quiet][:4]])
    sides = [
        oracle.trajectory_gradients(case.model(), case.loss, rows, case.states())
        for rows in ((x,), run.queries)
    ]
    found = run.ask("influence", (x,), run.queries, batch_size=3)
    oracle.assert_close(found.values, oracle.scores(*sides, case.rates()), 1e-10)


class Padded(nn.Module):
    """Reads sequences padded to the longest of the batch; what is padded has no say."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.layer, self.out = nn.Embedding(9, 3), nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1])
        out = self.out(self.layer((x + self.place(steps)).transpose(0, 1))[0]).transpose(0, 1)
        return (out * (steps < lengths[:, None])[:, :, None]).sum(1)


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


class Sequences(Dataset):
    """Rows of unequal length."""

    def __init__(self, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = [torch.randn(length, 3, generator=generator, dtype=torch.float64) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def test_batches_padded_to_different_lengths() -> None:
    """The number of steps changes from batch to batch, and is now and then the number of rows."""
    case = Case("padded", Padded, [])
    train, queries = Sequences([3, 2, 3, 5, 1, 2, 1]), Sequences([2, 1, 4, 3])
    sides = [
        [
            {name: torch.cat([row[index][name] for row in per_row]) for name in case.names()}
            for index in range(2)
        ]
        for per_row in (
            [
                oracle.trajectory_gradients(case.model(), case.loss, pad([row]), case.states())
                for row in data.rows
            ]
            for data in (train, queries)
        )
    ]
    model = case.model()
    trajectory = tracin.Trajectory(
        [
            tracin.Checkpoint(state, learning_rate=rate)
            for state, rate in zip(case.states(), case.rates(), strict=True)
        ]
    )
    method = tracin.TracInCP(tracin.Task(model, case.loss), trajectory, device="cpu", progress=False)
    for batch_size in (1, 2, 3):
        loaders = [DataLoader(data, batch_size=batch_size, collate_fn=pad) for data in (train, queries)]
        with oracle.untouched(model):
            found = method.influence(*loaders)
        oracle.assert_close(found.values, oracle.scores(*sides, case.rates()), 1e-10)


def test_a_parameter_without_gradient_at_the_first_checkpoint() -> None:
    """LoRA starts with B = 0, where A has no gradient: nothing can be checked there, and later it must be."""
    run = Run(BY_NAME["lora_adapter"])
    states = run.case.states()
    for name in states[0]:
        if name.endswith("B.weight"):
            states[0][name].zero_()
    sides = [
        oracle.trajectory_gradients(run.case.model(), run.case.loss, rows, states)
        for rows in (run.train, run.queries)
    ]
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=rate) for state, rate in zip(states, PLAIN, strict=True)]
    )
    task = tracin.Task(run.model, run.case.loss)
    method = tracin.TracInCP(task, trajectory, batch_size=3, device="cpu", progress=False)
    oracle.assert_close(method.influence(run.train, run.queries).values, oracle.scores(*sides, PLAIN), 1e-10)
