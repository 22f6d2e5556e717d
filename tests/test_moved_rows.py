"""Rows that change places in a later batch: by operations of every kind in the model, by collate, by ragged batches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import oracle
import tracin
from tracin.errors import DataError, LossError

N, BATCH = 16, 4
LATE = slice(
    8, 12
)  # the batch whose rows are moved; the probe looks at rows 0, 8 and 15, the check at rows 0-3


def permuted_by_index(z: Tensor, order: list[int]) -> Tensor:
    return z[order]


MOVES: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "index": permuted_by_index,
    "index_select": lambda z, order: z.index_select(0, torch.tensor(order)),
    "gather": lambda z, order: z.gather(0, torch.tensor(order)[:, None].expand(-1, z.shape[1])),
    "stack of rows": lambda z, order: torch.stack([z[row] for row in order]),
    "stack of unbound": lambda z, order: torch.stack([z.unbind(0)[row] for row in order]),
    "cat of slices": lambda z, order: torch.cat([z[row : row + 1] for row in order]),
    "cat of split": lambda z, order: torch.cat([z.split(1)[row] for row in order]),
    "permutation matrix": lambda z, order: torch.eye(len(z), dtype=z.dtype)[order] @ z,
    "einsum": lambda z, order: torch.einsum("ij,jk->ik", torch.eye(len(z), dtype=z.dtype)[order], z),
    "embedding": lambda z, order: F.embedding(torch.tensor(order), z),
}


class Moving(nn.Module):
    """Puts rows in another order around a layer where a flag says so, and back again."""

    def __init__(self, move: Callable[[Tensor, list[int]], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.move = nn.Linear(3, 4), nn.Linear(4, 2), move

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        order = [*range(1, n), 0] if bool((x[:, 2] > 50).all()) else list(range(n))
        back = sorted(range(n), key=order.__getitem__)
        hidden = self.move(torch.tanh(self.first(x / 60)), order)
        return self.move(self.head(hidden), back)


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    x[:, 2] = 0
    x[LATE, 2] = 60
    return x, torch.arange(N) % 2


def method(model: nn.Module, loss: Callable = tracin.losses.cross_entropy, **options: Any) -> tracin.TracInCP:
    checkpoint = tracin.Checkpoint(model.state_dict(), learning_rate=0.3)
    task = tracin.Task(model, loss)
    options = {"batch_size": BATCH, "progress": False, "device": "cpu", **options}
    return tracin.TracInCP(task, tracin.Trajectory([checkpoint]), **options)


def alone(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Self-influence of every row, run by itself."""
    out = []
    for row in range(len(x)):
        loss = F.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        out.append(0.3 * sum(float(g.square().sum()) for g in grads))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("name", MOVES)
def test_moved_in_a_later_batch(name: str) -> None:
    torch.manual_seed(0)
    model = Moving(MOVES[name]).double()
    x, y = rows()
    found = method(model).self_influence((x, y))
    oracle.assert_close(found.values, alone(model, x, y), 1e-10, name)
    assert method(model).verify((x, y), rows=N).exact


def sorting(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    items = sorted(items, key=lambda item: -len(item[0]))
    return pad_sequence([tokens for tokens, _ in items], batch_first=True), torch.stack([y for _, y in items])


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).sum(1))


def test_a_collate_that_sorts_is_refused_in_the_batch_where_it_does() -> None:
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randint(1, 9, (6,), generator=generator), torch.tensor(i % 2)) for i in range(N)]
    data[9], data[10] = (data[9][0][:3], data[9][1]), (data[10][0][:2], data[10][1])
    with pytest.raises(DataError, match=r"collate.*rows 8-11"):
        method(Tokens().double(), collate=sorting).self_influence(data)


class Graphs(nn.Module):
    """Sums nodes by graph; the nodes of a batch's graphs stand one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(self.first(batch["x"]))
        return self.head(torch.stack([part.sum(0) for part in hidden.split(batch["sizes"].tolist())]))


def joined(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        "x": torch.cat([nodes for nodes, _ in items]),
        "sizes": torch.tensor([len(nodes) for nodes, _ in items]),
        "y": torch.stack([y for _, y in items]),
    }


def graph_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch), batch["y"], reduction="none")


def test_graphs_of_other_sizes_in_a_later_batch() -> None:
    torch.manual_seed(0)
    sizes = [3] * N
    sizes[9], sizes[10] = 1, 5  # the batch still holds four times three nodes
    data = [(torch.randn(size, 2, dtype=torch.float64), torch.tensor(i % 2)) for i, size in enumerate(sizes)]
    model = Graphs().double()
    expected = []
    for item in data:
        grads = torch.autograd.grad(graph_loss(model, joined([item]))[0], list(model.parameters()))
        expected.append(0.3 * sum(float(g.square().sum()) for g in grads))
    found = method(model, graph_loss, collate=joined).self_influence(data)
    oracle.assert_close(found.values, torch.tensor(expected, dtype=torch.float64), 1e-10)


def test_a_loss_whose_values_hide_that_its_gradients_mix() -> None:
    def mixing(model: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses + 0.1 * (losses.sum() - losses.sum().detach())

    with pytest.raises(LossError, match=r"weight|bias"):
        method(nn.Linear(3, 2).double(), mixing).self_influence(rows())


def test_two_threads_wait_for_each_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = [{name: value + i for name, value in before.items()} for i in range(3)]
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=0.1 + i) for i, state in enumerate(states)]
    )
    x, y = rows()
    data = (x.float(), y)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    expected = tracin.TracInCP(task, trajectory, progress=False, batch_size=2).self_influence(data).values
    found: dict[int, Tensor] = {}

    def score(number: int) -> None:
        scorer = tracin.TracInCP(task, trajectory, progress=False, batch_size=2)
        found[number] = scorer.self_influence(data).values

    threads = [threading.Thread(target=score, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected) for number in range(3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cosines_of_tiny_gradients() -> None:
    """A float32 gradient of 1e-22 has a square below the smallest float32."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = rows()
    data = (x.float(), y)
    cosines = method(model, normalize=True).influence(data, data).values

    def tiny(model: nn.Module, batch: Any) -> Tensor:
        return 1e-22 * tracin.losses.cross_entropy(model, batch)

    oracle.assert_close(method(model, tiny, normalize=True).influence(data, data).values, cosines, 1e-4)


def test_inside_inference_mode() -> None:
    model = nn.Linear(3, 2).double()
    data = rows()
    expected = method(model).influence(data, data).values
    with torch.inference_mode():
        assert torch.equal(method(model).influence(data, data).values, expected)
