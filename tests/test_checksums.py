"""One number per row tells whether a row is the same: within itself, when taken again, and in a later pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from tracin.checksums import Passes, SteadyTake, refuse_unsteady, row_checksums
from tracin.data import Batch, RowSource, open_rows
from tracin.errors import DataError

N = 7
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N)


def checksums(*leaves: Tensor) -> Tensor:
    found = row_checksums(Batch(range(len(leaves[0])), leaves))
    assert found is not None
    return found


@given(row=st.integers(0, N - 1), column=st.integers(0, 5), amount=st.floats(1e-3, 10))
def test_a_checksum_belongs_to_its_row(row: int, column: int, amount: float) -> None:
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[row, column] += amount
    different = checksums(x, Y) != checksums(changed, Y)
    assert different.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
)
def test_checksums_see_order_within_a_row(dtype: torch.dtype) -> None:
    x = torch.tensor([[[0, 1, 0], [1, 1, 0]]]).to(dtype)
    plain = checksums(x)
    assert plain.dtype == torch.float64
    for other in (x.flip(2), x.flip(1), x.transpose(1, 2)[:, :2], x.roll(1, 2)):
        assert not torch.equal(plain, checksums(other)), "a mirrored or shifted picture is another picture"


def test_checksums_see_which_tensor_holds_what() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert not torch.equal(checksums(a, b), checksums(b, a))
    assert row_checksums(Batch(range(2), ["words", "more"])) is None
    assert row_checksums(Batch(range(2), torch.zeros(3))) is None, "no row per example"


class Drifting(Dataset):
    """Row 4 is another one after so many reads."""

    def __init__(self, reads: int) -> None:
        self.left = reads

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        self.left -= 1
        return X[row] + float(row == 4 and self.left < 0), row


def opened(data: Any, **options: Any) -> RowSource:
    return open_rows(data, name="train", batch_size=3, **options)


def longest_first(rows: list) -> Any:
    rows = sorted(rows, key=lambda row: -float(row[0].abs().sum()))
    return torch.stack([x for x, _ in rows]), torch.tensor([at for _, at in rows])


def test_steady_rows_pass() -> None:
    holes = X.clone()
    holes[2, 1] = float("nan")
    for rows in (opened((holes, Y)), opened(Drifting(10**6)), opened(["a", "b"], collate=list)):
        passes, take = Passes(), SteadyTake(rows, torch.device("cpu"))
        for _ in range(2):
            for batch in rows.batches():
                passes.check(rows, batch)
                refuse_unsteady(rows, batch)
        take([0, 1])
        take([1, 0, 1])


def test_a_later_pass_must_give_the_same() -> None:
    rows, passes = opened(Drifting(N)), Passes()
    for batch in rows.batches():
        passes.check(rows, batch)
    with pytest.raises(DataError, match=r"train: row 4 changed between two passes.*augmentation"):
        [passes.check(rows, batch) for batch in rows.batches()]


def test_a_row_taken_again_must_be_the_same() -> None:
    take = SteadyTake(opened(Drifting(3)), torch.device("cpu"))
    take([4, 0])
    with pytest.raises(DataError, match="train: row 4 came back different when it was read again"):
        take([1, 4])
    rows = opened(Drifting(6))
    batches = list(rows.batches())
    with pytest.raises(DataError, match="train: row 4 came back different"):
        refuse_unsteady(rows, batches[1])


def test_a_collate_that_sorts_is_told_from_rows_that_change() -> None:
    rows = opened(Drifting(10**6), collate=longest_first)
    batch = next(iter(rows.batches()))
    for look in (refuse_unsteady, Passes().check):
        with pytest.raises(DataError, match=r"does not keep the rows of a batch in their order \(rows 0-2\)"):
            look(rows, batch)
