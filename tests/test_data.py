"""Rows in a fixed order: what each source yields, and what it leaves alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from tracin.data import RowSource, describe_rows, open_rows, to_device, user_code
from tracin.errors import DataError, OptionError, UserCodeError

N = 7
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N)


class Pair(NamedTuple):
    """A batch with names."""

    x: Tensor
    y: Tensor


class Rows(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        return X[at], at


class Many(Rows):
    """Reads a batch at once."""

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        return [super(Many, self).__getitem__(at) for at in rows]


SOURCES: dict[str, Any] = {
    "tuple": (X, Y),
    "named tuple": Pair(X, Y),
    "dict": {"x": X, "y": Y},
    "dataset": Rows(),
    "dataset of many": Many(),
    "tensor dataset": TensorDataset(X, Y),
    "subset": Subset(TensorDataset(torch.cat([X[:2], X]), torch.cat([Y[:2], Y])), range(2, N + 2)),
    "list": list(zip(X, Y, strict=True)),
    "loader": DataLoader(Rows(), batch_size=3),
    "loader with a sampler": DataLoader(Rows(), batch_size=3, sampler=SequentialSampler(Rows())),
    "loader with an order of its own": DataLoader(Rows(), batch_size=3, sampler=range(N)),
    "loader with its own batches": DataLoader(Rows(), batch_sampler=[[0, 1, 2], [3, 4, 5], [6]]),
}


def labels(value: Any) -> list[int]:
    return (value["y"] if isinstance(value, dict) else value[1]).tolist()


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_yields_all_rows_in_order_twice(name: str) -> None:
    source = open_rows(SOURCES[name], name="train", batch_size=3)
    assert isinstance(source, RowSource)
    assert len(source) == N
    assert list(source.sizes) == [3, 3, 1]
    for _ in range(2):
        batches = list(source.batches())
        assert [list(batch.rows) for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
        assert [labels(batch.value) for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
        assert [(batch.start, batch.size) for batch in batches] == [(0, 3), (3, 3), (6, 1)]
    assert labels(source.take([5, 0, 5])) == [5, 0, 5], "rows may be asked for in any order, and twice"


def test_the_structure_stays() -> None:
    assert isinstance(next(iter(open_rows(Pair(X, Y), name="train", batch_size=3).batches())).value, Pair)
    nested = open_rows({"a": (X, [Y]), "b": {"c": Y}}, name="train", batch_size=3)
    value = next(iter(nested.batches())).value
    assert torch.equal(value["a"][1][0], Y[:3])
    assert torch.equal(nested.take([1])["b"]["c"], Y[1:2])
    arrays = open_rows((X.numpy(), Y.numpy()), name="train", batch_size=3)
    assert isinstance(next(iter(arrays.batches())).value[0], Tensor)


def test_batches_of_tensors_are_copies() -> None:
    data = (X.clone(), Y.clone())
    source = open_rows(data, name="train", batch_size=3)
    for batch in source.batches():
        batch.value[0].add_(1)
    source.take([0, 1])[0].add_(1)
    assert torch.equal(data[0], X), "a model that writes into its input must not reach the user's data"


def test_a_loader_keeps_its_batches_and_collate() -> None:
    loader = DataLoader(
        Rows(), batch_size=2, collate_fn=lambda rows: {"x": len(rows), "y": Y[[at for _, at in rows]]}
    )
    source = open_rows(loader, name="train", batch_size=3)
    assert list(source.sizes) == [2, 2, 2, 1]
    assert [batch.value["x"] for batch in source.batches()] == [2, 2, 2, 1]
    assert source.take([0, 4])["x"] == 2


def test_a_collate_for_a_dataset() -> None:
    source = open_rows(Rows(), name="train", batch_size=3, collate=lambda rows: [at for _, at in rows])
    assert [batch.value for batch in source.batches()] == [[0, 1, 2], [3, 4, 5], [6]]


def test_random_states_are_not_drawn_from() -> None:
    """A loader draws a seed at each pass, from its generator or from the global one."""
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(Rows(), batch_size=3, generator=generator)
    before = generator.get_state()
    list(open_rows(loader, name="train", batch_size=3).batches())
    assert torch.equal(generator.get_state(), before)
    state = torch.get_rng_state()
    open_rows(DataLoader(Rows(), batch_size=3, sampler=range(N)), name="train", batch_size=3)
    assert torch.equal(torch.get_rng_state(), state), "listing the order draws nothing"


@pytest.mark.parametrize("batch_size", [0, -1, True])
def test_batch_sizes_out_of_range(batch_size: int) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        open_rows((X, Y), name="train", batch_size=batch_size)


BAD: dict[str, tuple[Any, str]] = {
    "unequal": ((X, Y[:3]), r"train: tensors of unequal length .*7.*3 rows"),
    "no rows at all": ((X[:0],), "train is empty"),
    "no tensors at all": ((), "train is empty"),
    "an empty dict": ({}, "train is empty"),
    "a number in the tuple": ((X, 3), "no row dimension"),
    "words in the tuple": ((X, "words"), "not a tensor"),
    "a string": ("words", "a str"),
    "a number": (7, "an? int"),
    "a generator": ((x for x in X), "a generator"),
    "shuffled": (DataLoader(Rows(), batch_size=3, shuffle=True), "shuffle=False"),
    "backwards": (DataLoader(Rows(), batch_size=3, sampler=range(N - 1, -1, -1)), "in order"),
    "a row twice": (DataLoader(Rows(), batch_sampler=[[0, 1, 2], [2, 3, 4], [5, 6]]), "in order"),
    "drop_last": (DataLoader(Rows(), batch_size=3, drop_last=True), "drop_last"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_data(name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(DataError, match=message):
        open_rows(data, name="train", batch_size=3)


def test_a_loader_that_ends_early_is_told() -> None:
    class Short(DataLoader):
        def __iter__(self) -> Any:
            return iter(list(super().__iter__())[:1])

    with pytest.raises(DataError, match="the train loader ended at row 3 of 7"):
        list(open_rows(Short(Rows(), batch_size=3), name="train", batch_size=3).batches())


class Broken(Rows):
    def __getitem__(self, at: int) -> tuple[Tensor, int]:
        if at == 4:
            raise OSError("no such picture")
        return super().__getitem__(at)


def test_a_row_that_cannot_be_read_is_named() -> None:
    source = open_rows(Broken(), name="queries", batch_size=3)
    batches = source.batches()
    assert next(batches).size == 3
    with pytest.raises(
        UserCodeError, match="the queries dataset raised OSError on row 4: no such picture"
    ) as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, OSError)
    loader = open_rows(DataLoader(Broken(), batch_size=3), name="queries", batch_size=3)
    with pytest.raises(UserCodeError, match="the queries loader raised OSError on rows 3-5"):
        list(loader.batches())
    collated = open_rows(Rows(), name="train", batch_size=3, collate=lambda rows: rows[9])
    with pytest.raises(UserCodeError, match="collate function of train raised IndexError on rows 0-2"):
        list(collated.batches())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([3], "row 3"),
        ([3, 3], "row 3"),
        (range(5, 9), "rows 5-8"),
        ([1, 5], "rows 1, 5"),
        ([9, 1, 2, 3, 4, 5], "rows 9, 1, 2, 3, 4, …"),
    ],
)
def test_rows_in_words(rows: Any, expected: str) -> None:
    assert describe_rows(rows) == expected


def test_user_code_lets_control_flow_through() -> None:
    with pytest.raises(KeyboardInterrupt), user_code("the loss", [0]):
        raise KeyboardInterrupt
    with pytest.raises(DataError, match=r"^ours$"), user_code("the loss", [0]):
        raise DataError("ours")


def test_to_device() -> None:
    class Movable:
        def to(self, device: torch.device) -> str:
            return f"moved to {device}"

    here = torch.device("cpu")
    value = {"x": X, "words": ["a", "b"], "more": (Y, Movable())}
    moved = to_device(value, here)
    assert moved["x"].data_ptr() == X.data_ptr()
    assert moved["words"] == ["a", "b"]
    assert moved["more"][1] == "moved to cpu"
    copied = to_device(value, here, copy=True)
    assert copied["x"].data_ptr() != X.data_ptr()
    assert torch.equal(copied["x"], X)


@pytest.mark.parametrize("kind", ["tensors", "dataset"])
def test_rows_opened_with_auto_take_other_sizes(kind: str) -> None:
    tensors = (torch.arange(10.0)[:, None], torch.arange(10))
    data = tensors if kind == "tensors" else TensorDataset(*tensors)
    rows = open_rows(data, name="train", batch_size="auto")
    assert rows.sizes == [10]
    rows.resize(2, 5)
    assert rows.sizes == [2, 5, 3] == [batch.size for batch in rows.batches()]
    assert [row for batch in rows.batches() for row in batch.value[1].tolist()] == list(range(10))


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_sizes_that_the_user_chose_stay(kind: str) -> None:
    tensors = (torch.arange(10.0)[:, None], torch.arange(10))
    data = tensors if kind == "tensors" else DataLoader(TensorDataset(*tensors), batch_size=4)
    rows = open_rows(data, name="train", batch_size=4 if kind == "tensors" else "auto")
    rows.resize(2, 5)
    assert rows.sizes == [4, 4, 2]


@pytest.mark.parametrize("size", [0, -1, True])
def test_a_batch_size_that_is_none(size: Any) -> None:
    with pytest.raises(OptionError, match="batch_size is"):
        open_rows((torch.zeros(3, 1),), name="train", batch_size=size)
