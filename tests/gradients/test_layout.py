"""The row axis is found by what grew between two batch sizes, never by a length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradients.common import normal
from tracin.gradients.layout import Layout, candidates, from_rows, owns, to_rows


@pytest.mark.parametrize(
    ("few", "more", "expected"),
    [
        ((3, 8), (4, 8), [Layout(0)]),
        ((3, 3, 8), (3, 4, 8), [Layout(1)]),  # as many steps as rows
        ((3, 3, 3), (3, 3, 4), [Layout(2)]),
        ((6, 8), (8, 8), [Layout(0, 2, True), Layout(0, 2, False)]),
        ((8, 3), (8, 3), []),  # shared by the rows
        ((3, 3), (4, 4), []),  # rows against rows
        ((5, 8), (6, 8), []),  # one more, but not in proportion
        ((0, 8), (0, 8), []),
        ((0, 8), (4, 8), []),
        ((3, 8), (4, 8, 1), []),
        ((3,), (4,), [Layout(0)]),
        ((), (), []),
    ],
)
def test_candidates(few: tuple[int, ...], more: tuple[int, ...], expected: list[Layout]) -> None:
    assert list(candidates(few, more, 3, 4)) == expected


def place(rows: Tensor, layout: Layout) -> Tensor:
    """[n, per_row, ...rest] as the tensor that a module would see."""
    n, per_row = rows.shape[:2]
    ordered = rows if layout.row_major else rows.transpose(0, 1)
    return ordered.reshape(n * per_row, *rows.shape[2:]).movedim(0, layout.axis)


@given(
    n=st.integers(1, 5), per_row=st.integers(1, 4), rest=st.lists(st.integers(1, 3), max_size=3),
    axis=st.integers(0, 3), row_major=st.booleans(),
)  # fmt: skip
def test_there_and_back(n: int, per_row: int, rest: list[int], axis: int, row_major: bool) -> None:
    layout = Layout(min(axis, len(rest)), per_row, row_major)
    rows = normal(n, per_row, *rest, seed=1)
    seen = place(rows, layout)
    assert layout.fits(seen.shape, n)
    assert not layout.fits(seen.shape, n + 1)
    torch.testing.assert_close(to_rows(seen, layout, n), rows, rtol=0, atol=0)
    for row in range(n):
        alone = place(rows[row : row + 1], layout)
        torch.testing.assert_close(from_rows(rows[row], layout), alone, rtol=0, atol=0)


def test_fits_asks_for_the_axis() -> None:
    assert not Layout(2).fits((3, 3), 3)
    assert Layout(1, 2).fits((5, 6), 3)


@pytest.mark.parametrize("row_major", [True, False])
def test_owns_tells_the_order_of_several_entries(row_major: bool) -> None:
    """The gradient of row 1 of 3, two entries per row: side by side, or one entry in each half."""
    gradient = torch.zeros(6, 2)
    gradient[[2, 3] if row_major else [1, 4]] = 1.0
    assert owns(gradient, Layout(0, 2, row_major), 3, 1)
    assert not owns(gradient, Layout(0, 2, not row_major), 3, 1)
    assert not owns(gradient, Layout(0, 2, row_major), 3, 2)
    assert owns(torch.zeros(6, 2), Layout(0, 2), 3, 0), "nothing belongs to everybody"
