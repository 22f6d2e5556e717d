"""The judge of the other routes, judged by finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradients.common import build, normal, source_of, traced, wave
from tracin.gradients import reference


class Net(nn.Module):
    """A used weight, a sparse table and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3, sparse=True)
        self.layer = nn.Linear(3, 2)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.layer(torch.tanh(x + self.table(index)))


def rows() -> tuple[Tensor, Tensor]:
    return normal(4, 3, seed=1), torch.tensor([0, 1, 1, 3])


def finite_differences(model: nn.Module, batch: Any, name: str, step: float = 1e-6) -> Tensor:
    """∂ℓ_n/∂θ [n, p] of one parameter by central differences."""
    flat = model.get_parameter(name).detach().view(-1)
    columns = []
    for at in range(len(flat)):
        sides = []
        for sign in (1, -1):
            flat[at] += sign * step
            sides.append(wave(model, batch).detach())
            flat[at] -= sign * step
        columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns, 1)


def all_ways(model: nn.Module, batch: Any) -> dict[str, dict[str, Tensor]]:
    """Per-row gradients [n, p] in the batch's graph, and of each row alone."""
    source = source_of(model, batch)
    parameters = traced(source)
    losses = wave(model, batch)
    graph = [reference.in_graph(losses, parameters, row) for row in range(len(losses))]
    return {
        "in_graph": {name: torch.stack([g[name].reshape(-1) for g in graph]) for name in parameters},
        "alone": reference.alone(source.run, source.take, range(len(losses)), parameters),
    }


@pytest.mark.parametrize("way", ["in_graph", "alone"])
def test_agrees_with_finite_differences(way: str) -> None:
    model = build(Net)
    for name, found in all_ways(model, rows())[way].items():
        slope = finite_differences(model, rows(), name)
        assert not found.is_sparse
        torch.testing.assert_close(
            found, slope, rtol=1e-7, atol=1e-8, msg=lambda m, name=name: f"{way}, {name}: {m}"
        )


@pytest.mark.parametrize("way", ["in_graph", "alone"])
@pytest.mark.parametrize("planted", ["scaled", "transposed", "row shifted", "bias of the sum"])
def test_a_planted_error_is_noticed(planted: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: each error, planted in the one function that takes gradients, is seen."""
    sound = reference._grad

    def wrong(scalar: Tensor, parameters: Any, keep: bool) -> dict[str, Tensor]:
        found = sound(scalar, parameters, keep)
        weight, bias = found["layer.weight"], found["layer.bias"]
        changed = {
            "scaled": {"layer.weight": weight * (1 + 1e-5)},
            "transposed": {"layer.weight": weight.T.reshape(weight.shape)},
            "row shifted": {"table.weight": found["table.weight"].roll(1, 0)},
            "bias of the sum": {"layer.bias": bias.sum().expand_as(bias)},
        }
        return {**found, **changed[planted]}

    monkeypatch.setattr(reference, "_grad", wrong)
    with pytest.raises(AssertionError, match="not close"):
        test_agrees_with_finite_differences(way)


def test_the_weighted_sum_of_rows() -> None:
    model = build(Net)
    losses = wave(model, rows())
    parameters = dict(model.named_parameters())
    each = [reference.in_graph(losses, parameters, row) for row in range(4)]
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    for given, used in ((None, torch.ones(4, dtype=torch.float64)), (weights, weights)):
        total = reference.summed(losses, parameters, given)
        for name, value in total.items():
            expected = sum(weight * row[name] for weight, row in zip(used, each, strict=True))
            torch.testing.assert_close(value, expected)
    assert losses.grad_fn is not None, "the graph is kept"
    reference.in_graph(losses, parameters, 0)


def test_what_is_not_used_is_zero() -> None:
    model = build(Net)
    for way, found in all_ways(model, rows()).items():
        assert found["idle"].shape == (4, 2)
        assert not found["idle"].any(), f"{way}: nothing reads this parameter"
        assert not found["table.weight"].view(4, 4, 3)[0, 1:].any(), f"{way}: row 0 reads entry 0 alone"


def test_rows_are_run_by_themselves_and_named() -> None:
    seen: list[tuple[int, list[int]]] = []
    model = build(Net)
    x, index = rows()

    def losses_of(value: Any, asked: Sequence[int]) -> Tensor:
        seen.append((len(value[0]), list(asked)))
        return wave(model, value)

    def take(asked: Sequence[int]) -> Any:
        return x[list(asked)], index[list(asked)]

    bias = {"layer.bias": model.get_parameter("layer.bias")}
    found = reference.alone(losses_of, take, [2, 0], bias)
    assert seen == [(1, [2]), (1, [0])]
    assert found["layer.bias"].shape == (2, 2)
    torch.testing.assert_close(found["layer.bias"], all_ways(model, rows())["alone"]["layer.bias"][[2, 0]])
    weights = torch.tensor([0.5, 3.0], dtype=torch.float64)
    total = reference.summed_alone(losses_of, take, [2, 0], bias, weights)
    torch.testing.assert_close(total["layer.bias"], weights @ found["layer.bias"])


def test_deltas_come_with_the_same_gradients() -> None:
    """At a tensor right before the losses δ is known; a place that a row does not reach has none."""
    weight = normal(3, seed=4).requires_grad_()
    x = normal(4, 3, seed=5)
    outputs = x @ weight
    aside = (2 * weight).sum()
    places = [get_gradient_edge(outputs), get_gradient_edge(aside)]
    losses = outputs.square()
    for row in range(4):
        gradients, deltas = reference.in_graph_with_deltas(losses, {"weight": weight}, row, places)
        assert torch.equal(gradients["weight"], reference.in_graph(losses, {"weight": weight}, row)["weight"])
        expected = torch.zeros_like(outputs)
        expected[row] = 2 * outputs[row].detach()
        assert deltas[0] is not None
        torch.testing.assert_close(deltas[0], expected)
        assert deltas[1] is None
