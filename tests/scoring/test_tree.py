"""One walk over a model finds what torch's own walks find, in their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tracin.scoring.tree import tree_of


class Tied(nn.Module):
    """A module under two names, a tied weight, an absent bias, child and buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.first
        self.out = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.out.weight
        self.missing: nn.Module | None = None
        self.register_module("none", None)
        self.register_buffer("kept", torch.zeros(2), persistent=False)
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.out(self.first(x)))


def test_the_walk_is_that_of_torch() -> None:
    model = Tied()
    tree = tree_of(model)
    assert [(name, id(module)) for name, module in tree.modules] == [
        (name, id(module)) for name, module in model.named_modules()
    ]
    assert [id(p) for p in tree.parameters] == [id(p) for p in model.parameters()]
    assert [id(b) for b in tree.buffers] == [id(b) for b in model.buffers()]
    assert len(tree.parameters) == 6
