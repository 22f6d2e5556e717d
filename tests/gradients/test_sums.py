"""A batch's gradients added to the sums of their groups, against what is multiplied out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gradients.common import normal
from tracin.gradients.blocks import Block, Dense, Outer, Rows, Sum
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.pictures import Convolution, Filters
from tracin.gradients.sums import Members, add_sums

SHAPE = ConvolutionShape(3, 2, (3,), (1,), (1,), 1, (0,))
N, SIZE = 4, 18
KINDS: dict[str, Callable[[], Block]] = {
    "outer": lambda: Outer(normal(N, 2, 6, seed=1), normal(N, 2, 3, seed=2)),
    "rows": lambda: Rows(torch.tensor([[0, 5], [2, 2], [5, 1], [4, 0]]), normal(N, 2, 3, seed=3), 6),
    "dense": lambda: Dense(normal(N, SIZE, seed=4)),
    "filters": lambda: Filters(normal(N, SIZE, seed=5), SHAPE),
    "convolution": lambda: Convolution(normal(N, 1, 2, 7, seed=6), normal(N, 1, 3, 5, seed=7), SHAPE),
    "sum": lambda: Sum((KINDS["rows"](), KINDS["outer"]())),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "group", [[3, 1, 3, 1], [3, -1, 1, 3], [4, 4, 4, 4], [4, 2, 3, 1], [-1, 2, -1, -1]], ids=str
)
def test_every_kind_finds_its_groups(kind: str, group: list[int]) -> None:
    """Groups that this batch has no rows of stay as they were, and rows of none are left out."""
    block = KINDS[kind]()
    before = normal(5, SIZE, seed=9)
    out, truth = before.clone(), before.clone()
    seen = add_sums(block, Members.of(torch.tensor(group), out.device), out)
    for row, gradient in zip(group, block.materialise(), strict=True):
        if row >= 0:
            truth[row] += gradient
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(seen)
