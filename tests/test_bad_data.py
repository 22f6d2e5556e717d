"""Rows that are refused: out of order, changing, missing, of unequal length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from refusals import M, N, ask_all, build, make, refused, rows, verbs
from tracin.errors import (
    DataError,
    LossError,
)


def _loaders() -> dict[str, tuple[Any, str]]:
    dataset = TensorDataset(*rows())
    weights = WeightedRandomSampler([1.0] * N, N)
    return {
        "shuffle": (DataLoader(dataset, batch_size=3, shuffle=True), "shuffle"),
        "random_sampler": (
            DataLoader(dataset, batch_size=3, sampler=RandomSampler(dataset)),
            "shuffle|order",
        ),
        "subset": (DataLoader(dataset, batch_size=3, sampler=SubsetRandomSampler(range(N))), "shuffle|order"),
        "weighted": (DataLoader(dataset, batch_size=3, sampler=weights), "shuffle|order"),
        "backwards": (DataLoader(dataset, batch_size=3, sampler=range(N - 1, -1, -1)), "order"),
        "part": (DataLoader(dataset, batch_size=3, sampler=range(5)), "order|every row"),
        "batch_sampler": (
            DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 3, drop_last=False)),
            "shuffle|order",
        ),
        "drop_last": (DataLoader(dataset, batch_size=3, drop_last=True), "drop_last"),
        "no_batches": (DataLoader(dataset, batch_size=None), "batch_size=None"),
    }


@pytest.mark.parametrize("side", ["train", "queries"])
@pytest.mark.parametrize("name", _loaders())
def test_a_loader_out_of_order(name: str, side: str) -> None:
    model = build()
    loader, fact = _loaders()[name]
    data = (loader, rows(M, 2)) if side == "train" else (rows(), loader)
    for verb, call in ask_all(make(model), *data).items():
        if side == "train" or verb in {"influence", "top_k"}:
            with refused(model, DataError, fact, side):
                call()


class Stream(IterableDataset):
    """Rows without positions."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*rows(), strict=True))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: DataLoader(data, batch_size=3)])
def test_an_iterable_dataset(wrap: Callable) -> None:
    model = build()
    with refused(model, DataError, "IterableDataset", "__getitem__|map-style"):
        make(model).influence(wrap(Stream()), rows(M, 2))


class Changing(Dataset):
    """Rows that an augmentation changes each time they are read."""

    def __init__(self, change: Callable[[Tensor, int, int], tuple[Tensor, int]], n: int = N) -> None:
        self.inputs, self.labels = rows(n)
        self.change, self.reads = change, torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        coin = int(torch.randint(0, 2, (), generator=self.reads))
        return self.change(self.inputs[index], int(self.labels[index]), coin)


CHANGES: dict[str, Callable[[Tensor, int, int], tuple[Tensor, int]]] = {
    "noise": lambda x, label, coin: (x + 0.01 * coin, label),
    "flip_that_keeps_sums": lambda x, label, coin: (x.flip(0) if coin else x, label),
    "swap_of_two_pixels": lambda x, label, coin: (x[[1, 0, 2, 3]] if coin else x, label),
    "sign": lambda x, label, coin: (-x if coin else x, label),
    "label": lambda x, label, coin: (x, (label + coin) % 3),
}


@verbs
@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_change_between_passes(name: str, verb: str) -> None:
    model = build()
    with refused(model, (DataError, LossError), "row"):
        ask_all(make(model), Changing(CHANGES[name]), rows(M, 2))[verb]()


@pytest.mark.parametrize("name", CHANGES)
def test_queries_that_change_between_passes(name: str) -> None:
    model = build()
    with refused(model, (DataError, LossError), "row|quer"):
        make(model).influence(rows(), Changing(CHANGES[name], 6))


class LateChange(Dataset):
    """Quiet while the first rows are read; only row 6 changes, from its second reading on."""

    def __init__(self) -> None:
        self.inputs, self.labels = rows()
        self.read = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += index == 6
        changed = index == 6 and self.read > 1
        return (self.inputs[index].flip(0) if changed else self.inputs[index]), self.labels[index]


@pytest.mark.parametrize("verb", ["influence", "self_influence"])
def test_one_row_of_a_later_batch_that_changes_is_named(verb: str) -> None:
    model = build()
    with refused(model, DataError, r"rows? \b6\b|rows 6-7", "pass|again"):
        ask_all(make(model), LateChange(), rows(M, 2))[verb]()


@pytest.mark.parametrize("side", ["train", "queries"])
@pytest.mark.parametrize(
    "empty", [rows(0), TensorDataset(*rows(0)), DataLoader(TensorDataset(*rows(0)), batch_size=2)]
)
def test_no_rows(empty: Any, side: str) -> None:
    model = build()
    with refused(model, DataError, "empty", side):
        make(model).influence(*((empty, rows(M, 2)) if side == "train" else (rows(), empty)))


@pytest.mark.parametrize("side", ["train", "queries"])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_tensors_of_unequal_length(kind: str, side: str) -> None:
    model = build()
    uneven: Any = (rows(8)[0], rows(5)[1])
    uneven = uneven if kind == "tuple" else dict(zip(("inputs", "labels"), uneven, strict=True))
    with refused(model, DataError, r"\b8\b", r"\b5\b", side):
        make(model).influence(*((uneven, rows(M, 2)) if side == "train" else (rows(), uneven)))


@pytest.mark.parametrize("data", [7, None, "rows.csv", (rows()[0], "labels"), (torch.tensor(1.0), rows()[1])])
def test_what_is_no_data(data: Any) -> None:
    model = build()
    with refused(model, DataError, "train"):
        make(model).influence(data, rows(M, 2))
