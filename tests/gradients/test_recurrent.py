"""Recurrent layers unrolled in time, against autograd of one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from gradients.common import assert_exact, build, normal, route, source_of, wired
from tracin.gradients import recurrent
from tracin.gradients.capture import recording
from tracin.gradients.layout import Layout, to_rows

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
}
INPUT, HIDDEN = 3, 4


def leaves(outputs: Any) -> list[Tensor]:
    """Output, last hidden and last cell state."""
    output, states = outputs
    return [output, *(states if isinstance(states, tuple) else (states,))]


def found_and_true(
    layer: nn.RNNBase,
    rows: Layout,
    n: int,
    t: int,
    given_states: bool,
    by_name: bool,
    used: tuple[bool, ...],
    width: int = INPUT,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients per row as the module makes them, and by autograd from one row's share of the outputs at a time."""
    b = n * rows.per_row
    x = normal(b, t, width, seed=1) if layer.batch_first else normal(t, b, width, seed=1)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    states: Any = normal(count, b, layer.proj_size or HIDDEN, seed=2)
    if layer.mode == "LSTM":
        states = states, normal(count, b, HIDDEN, seed=3)
    args, kwargs = ((), {"input": x}) if by_name else ((x,), {})
    if given_states:
        args, kwargs = (args, {**kwargs, "hx": states}) if by_name else ((*args, states), kwargs)
    with recording({"": layer}) as tape:
        outputs = leaves(layer(*args, **kwargs))
    (call,) = tape.calls[""]
    deltas = [
        normal(*output.shape, seed=5 + at) if use else None
        for at, (output, use) in enumerate(zip(outputs, used, strict=False))
    ]
    names = [name for name, _ in layer.named_parameters()]
    assert recurrent.repeatable(layer, call)
    found = recurrent.gradients(layer, names, call, rows, deltas, n)
    true: dict[str, list[Tensor]] = {name: [] for name in names}
    axes = [rows.axis, 1, 1]
    for row in range(n):
        mask = torch.zeros(n)
        mask[row] = 1.0
        each = to_rows(
            torch.arange(b), Layout(0, rows.per_row, rows.row_major), n
        )  # [n, k]: entries of a row
        keep = torch.zeros(b, dtype=torch.float64)
        keep[each[row]] = 1.0
        loss = sum(
            (output * delta * keep.view([-1 if at == axis else 1 for at in range(3)])).sum()
            for output, delta, axis in zip(outputs, deltas, axes, strict=False)
            if delta is not None
        )
        assert isinstance(loss, Tensor)
        grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True, materialize_grads=True)
        for name, gradient in zip(names, grads, strict=True):
            true[name].append(gradient)
    return found, {name: torch.stack(values) for name, values in true.items()}


@given(st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_any_layer(kind: str, data: st.DataObject) -> None:
    first, deep, both = (data.draw(st.booleans()) for _ in range(3))
    options = {
        "num_layers": 2 if deep else 1,
        "bidirectional": both,
        "batch_first": first,
        "bias": data.draw(st.booleans()),
    }
    layer = build(lambda: LAYERS[kind](INPUT, HIDDEN, **options))
    assert isinstance(layer, nn.RNNBase)
    rows = Layout(0 if first else 1, data.draw(st.integers(1, 3)), data.draw(st.booleans()))
    used = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(lambda use: any(use[:2])))
    n, t = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    found, true = found_and_true(layer, rows, n, t, data.draw(st.booleans()), data.draw(st.booleans()), used)
    for name, truth in true.items():
        oracle.assert_close(found[name], truth, 1e-10, f"{kind} {options} {name}", largest=1.0)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_weights_that_are_used_twice(kind: str) -> None:
    layer = build(lambda: LAYERS[kind](HIDDEN, HIDDEN, num_layers=2))
    assert isinstance(layer, nn.RNNBase)
    layer.weight_ih_l1, layer.weight_hh_l0, layer.bias_hh_l1 = (
        layer.weight_ih_l0,
        layer.weight_ih_l0,
        layer.bias_ih_l0,
    )
    found, true = found_and_true(layer, Layout(1), 3, 4, True, False, (True, True, False), width=HIDDEN)
    assert set(found) == {"weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "bias_hh_l0", "bias_ih_l1"}
    for name, truth in true.items():
        oracle.assert_close(found[name], truth, 1e-10, f"{kind} {name}")


def test_what_is_not_unrolled() -> None:
    layer = build(lambda: nn.LSTM(INPUT, HIDDEN, num_layers=2, dropout=0.5))
    names, rows = ["weight_ih_l0"], (Layout(1),)
    assert recurrent.unrolls(layer.eval(), names, rows)
    assert recurrent.unrolls(layer.train(), names, rows), "a layer's route is told in any mode"
    with recording({"": layer}) as tape:
        layer(normal(3, 2, INPUT, seed=1))
    assert recurrent.repeatable(layer.eval(), tape.calls[""][0])
    assert not recurrent.repeatable(layer.train(), tape.calls[""][0]), "dropout cannot come back"
    assert not recurrent.unrolls(layer.eval(), names, (Layout(0),)), "rows along time"
    assert not recurrent.unrolls(layer, names, (None,))
    assert not recurrent.unrolls(layer, ["elsewhere"], rows)
    assert not recurrent.unrolls(nn.LSTMCell(INPUT, HIDDEN), ["weight_ih"], (Layout(0),))
    assert not recurrent.unrolls(type("Own", (nn.GRU,), {"forward": lambda self, x: x})(3, 4), names, rows)
    normed = nn.utils.parametrizations.weight_norm(nn.GRU(INPUT, HIDDEN), "weight_hh_l0")
    assert not recurrent.unrolls(normed, names, rows)
    packed = nn.utils.rnn.pack_padded_sequence(normal(3, 2, INPUT, seed=1), [3, 2])
    with recording({"": layer}) as tape:
        layer(packed)
    assert not recurrent.repeatable(layer.eval(), tape.calls[""][0])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_under_autocast(kind: str, given: torch.dtype) -> None:
    layer = build(lambda: LAYERS[kind](INPUT, HIDDEN)).float()
    x, delta = normal(5, 6, INPUT, seed=1).to(given), normal(5, 6, HIDDEN, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        try:
            layer(x)
        except RuntimeError as error:
            pytest.skip(
                f"torch runs no such layer in bfloat16 on this processor: {str(error).splitlines()[0]}"
            )
    with recording({"": layer}) as tape, torch.autocast("cpu", torch.bfloat16):
        output = leaves(layer(x))[0]
    (call,) = tape.calls[""]
    names = [name for name, _ in layer.named_parameters()]
    deltas = [delta.to(output.dtype), *[None] * (len(call.edges) - 1)]
    found = recurrent.gradients(layer, names, call, Layout(1), deltas, 6)
    truth = torch.autograd.grad(output, list(layer.parameters()), delta.to(output.dtype))
    for name, theirs in zip(names, truth, strict=True):
        assert found[name].dtype == torch.float32
        oracle.assert_close(found[name].sum(0), theirs.float(), 5e-2, name)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_layer_that_stands_in_two_places(kind: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = LAYERS[kind](INPUT, INPUT, batch_first=True)
            self.second = nn.ModuleList([self.first])

        def forward(self, x: Tensor) -> Tensor:
            return self.second[0](self.first(x)[0] + 1)[0][:, -1]

    source = wired(source_of(build(Twice), (normal(5, 4, INPUT, seed=1),)))
    assert route(source, "first.weight_hh_l0").startswith("unrolled")
    assert_exact(source)


def test_the_route_is_told_right_for_a_model_in_training_mode() -> None:
    """Scoring runs in eval mode, and the mode comes back before anyone reads the routes."""
    layer = build(lambda: nn.LSTM(INPUT, HIDDEN, num_layers=2, dropout=0.5, batch_first=True))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    source = wired(source_of(Last(), (normal(5, 4, INPUT, seed=1),)))
    layer.train()
    assert route(source, "layer.weight_hh_l1") == "unrolled LSTM"
