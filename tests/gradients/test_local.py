"""Any module under vmap over its own vector-Jacobian product, against autograd one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradients.common import assert_exact, build, judged, normal, route, source_of, traced, wired
from tracin.gradients import local
from tracin.gradients.capture import recording
from tracin.gradients.layout import Layout
from tracin.gradients.local import CallLayout, gradients
from tracin.gradients.sites import LOSS


class First(nn.Module):
    """A recurrent layer as a module of one output."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows = 0 if self.layer.batch_first else 1
        return self.layer(x.movedim(0, rows))[0].movedim(rows, 0)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm time first": (lambda: First(nn.LSTM(3, 2)), (3, 3)),
    "gru batch first, both directions": (
        lambda: First(nn.GRU(3, 2, batch_first=True, bidirectional=True)),
        (4, 3),
    ),
    "rnn of two layers": (lambda: First(nn.RNN(3, 2, num_layers=2)), (2, 3)),
    "prelu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)), (3,)),
    "instance norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), (3, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), (3,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_through_the_wiring(name: str) -> None:
    make, shape = MODULES[name]
    source = wired(source_of(build(make), (normal(5, *shape, seed=1),)))
    assert source.wiring is not None
    assert source.wiring.locals, f"{name}: nothing ran under vmap, the routes are {source.wiring}"
    assert not source.wiring.by_row, f"{name}: {source.wiring.reasons}"
    assert_exact(source)


def call_of(module: nn.Module, *args: Any) -> tuple[Any, Any]:
    with recording({"": module}, frozenset({""})) as tape:
        output = module(*args)
    return tape.calls[""][0], output


@pytest.mark.parametrize("chunk", [local.CHUNK, 1, 100], ids=["one chunk", "row by row", "some rows"])
def test_one_call(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-first with as many steps as rows: the layouts alone say which axis the rows are."""
    monkeypatch.setattr(local, "CHUNK", chunk)
    module = build(lambda: nn.LSTM(3, 2))
    x = normal(4, 4, 3, seed=1)
    call, (output, _) = call_of(module, x)
    delta = normal(4, 4, 2, seed=2)
    layout = CallLayout((Layout(1),), (Layout(1), Layout(1), Layout(1)))
    found = gradients(module, dict(module.named_parameters()), call, layout, [delta, None, None], 4)
    for row in range(4):
        alone = (module(x[:, row : row + 1])[0] * delta[:, row : row + 1]).sum()
        for name, truth in zip(found, torch.autograd.grad(alone, list(module.parameters())), strict=True):
            torch.testing.assert_close(
                found[name][row], truth, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    wrong = CallLayout((Layout(0),), (Layout(0), Layout(1), Layout(1)))
    other = gradients(module, dict(module.named_parameters()), call, wrong, [delta, None, None], 4)
    assert not torch.allclose(other["weight_hh_l0"], found["weight_hh_l0"]), (
        "the case can tell the axes apart"
    )
    assert output.shape == (4, 4, 2)


def test_outputs_that_nothing_depends_on() -> None:
    module = build(lambda: nn.GRU(3, 2))
    call, _ = call_of(module, normal(2, 4, 3, seed=1))
    layout = CallLayout((Layout(1),), (Layout(1), Layout(1)))
    found = gradients(module, dict(module.named_parameters()), call, layout, [None, None], 4)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: (4, *parameter.shape) for name, parameter in module.named_parameters()
    }
    assert not any(value.any() for value in found.values())


def test_the_parameters_and_the_callers_grad_mode_stay() -> None:
    module = build(lambda: nn.Linear(3, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    call, _ = call_of(module, normal(4, 3, seed=1))
    layout = CallLayout((Layout(0),), (Layout(0),))
    gradients(module, dict(module.named_parameters()), call, layout, [normal(4, 2, seed=2)], 4)
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_module_that_makes_another_shape_for_a_row_alone() -> None:
    class Squeezed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    module = Squeezed(3, 2)
    call, _ = call_of(module, torch.zeros(4, 3))
    layout = CallLayout((Layout(0),), (Layout(0),))
    with pytest.raises(RuntimeError, match="another shape"):
        gradients(module, dict(module.named_parameters()), call, layout, [torch.zeros(4, 2)], 4)


class Gate(nn.Module):
    """Its flow depends on the data, which vmap cannot follow; the module around it holds nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        return torch.stack([row if row.sum().item() > 0 else row * 2 for row in out])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = Gate(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.gate(x)))


def test_what_vmap_cannot_run_goes_row_by_row_and_says_why() -> None:
    source = wired(source_of(build(Gated), (normal(6, 3, seed=1),)))
    assert route(source, "gate.weight") == "by row"
    assert source.wiring is not None
    assert "item" in source.wiring.reasons["gate.weight"] or "vmap" in source.wiring.reasons["gate.weight"]
    assert route(source, "out.weight") == "rule Linear", "the rest of the model keeps its routes"
    assert_exact(source)


class Functional(nn.Module):
    """A layer's weight used outside the layer: only the module around both uses sees all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.layer.weight


def test_the_smallest_module_around_all_uses_is_taken() -> None:
    source = wired(
        source_of(build(lambda: nn.Sequential(Functional(), nn.Linear(3, 2))), (normal(5, 3, seed=1),))
    )
    assert route(source, "0.layer.weight") == "vmap Functional"
    assert route(source, "0.layer.bias") == "rule Linear"
    assert source.wiring is not None
    assert "used 2 times, 1 of them" in source.wiring.reasons["0.layer.weight"]
    assert_exact(source)


def test_a_weight_in_the_loss_takes_the_loss() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch).square().sum(1) + model[0].weight.square().sum()  # type: ignore[index]

    model = build(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    source = wired(source_of(model, (normal(5, 3, seed=1),), loss))
    assert source.wiring is not None
    assert route(source, "0.weight") == "vmap loss", source.wiring.reasons
    assert list(source.wiring.locals) == [LOSS]
    assert_exact(source)
    assert judged(source).keys() == traced(source).keys()


class Own(nn.LSTM):
    """A forward of its own: not unrolled."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return super().forward(x.flip(-1))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_float32_lstm_runs_under_vmap_and_its_kernel_stays_on(enabled: bool) -> None:
    """oneDNN's LSTM, which float32 takes on a CPU, has no batching rule."""
    switch: Any = torch.backends.mkldnn
    before, switch.enabled = switch.enabled, enabled
    try:
        module = build(lambda: Own(3, 2)).float()
        x, delta = normal(4, 4, 3, seed=1).float(), normal(4, 4, 2, seed=2).float()
        call, (output, _) = call_of(module, x)
        layout = CallLayout((Layout(1),), (Layout(1), Layout(1), Layout(1)))
        with local._own_lstm(module):  # of another thread, which is done later
            found = gradients(module, dict(module.named_parameters()), call, layout, [delta, None, None], 4)
            assert not switch.enabled
        assert switch.enabled == enabled
    finally:
        switch.enabled = before
    truth = torch.autograd.grad((output * delta).sum(), list(module.parameters()))
    for (name, mine), theirs in zip(found.items(), truth, strict=True):
        torch.testing.assert_close(
            mine.sum(0), theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
