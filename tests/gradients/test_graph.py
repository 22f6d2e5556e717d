"""What the graph of a batch tells about its size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tracin.gradients.graph import Graph, added_bytes, walk


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    return walk(model(x).square().sum(1), dict(model.named_parameters()))


def test_one_more_row_adds_to_all_tensors_and_to_the_largest() -> None:
    """A linear layer and a tanh make [n, 50] and [n, 50], a second layer [n, 2], the loss [n, 2] and [n]."""
    model = nn.Sequential(nn.Linear(7, 50), nn.Tanh(), nn.Linear(50, 2))
    few, more = graph_of(model, torch.randn(3, 7)), graph_of(model, torch.randn(4, 7))
    assert added_bytes(few, more) == (4 * (50 + 50 + 2 + 2 + 1), 4 * 50)


def test_a_large_weight_is_not_a_large_row() -> None:
    """The transposed weight is in the graph, and does not grow with the rows."""
    model = nn.Linear(1000, 3)
    _, largest = added_bytes(graph_of(model, torch.randn(3, 1000)), graph_of(model, torch.randn(4, 1000)))
    assert largest == 4 * 3


def test_graphs_with_other_tensors_are_compared_as_a_whole() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(len(x)):
                x = self.layer(x)
            return x

    model = Looped()
    whole, largest = added_bytes(graph_of(model, torch.randn(3, 4)), graph_of(model, torch.randn(4, 4)))
    assert whole == largest > 0


def test_a_graph_without_operations_adds_nothing_that_counts() -> None:
    few, more = walk(torch.zeros(3), {}), walk(torch.zeros(4), {})
    assert added_bytes(few, more) == (1, 1)
