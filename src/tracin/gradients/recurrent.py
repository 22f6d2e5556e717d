r"""Exact per-example gradients of recurrent layers: one more pass through the layer, unrolled in time.

The rows of a batch do not meet in a recurrent layer, so one pass over all of them shows each row's own δ, where a
perturbation ε = 0 is added to what a gate adds up:

    pre_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh + ε_t ,    δ_t = ∂(Σ_n ℓ_n)/∂ε_t   [n, gates]

    ∂ℓ_n/∂W_ih = Σ_t δ_nt ⊗ x_nt ,    ∂ℓ_n/∂W_hh = Σ_t δ_nt ⊗ h_n,t-1 ,    ∂ℓ_n/∂b = Σ_t δ_nt

The candidate of a GRU, tanh(W_in x_t + b_in + r ⊙ (W_hn h_{t-1} + b_hn)), has an ε on either side of r; the projection of an
LSTM has its own. The weights are read, not differentiated: under vmap every row would multiply with a copy of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracin.gradients.agreement import accumulation_dtype
from tracin.gradients.capture import Call
from tracin.gradients.layout import Layout, to_rows
from tracin.gradients.precision import autocast

__all__ = ["gradients", "repeatable", "unrolls"]

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)


@dataclass(frozen=True)
class _Use:
    """A weight and its bias at every step: what they read, a [t, b, i], and where δ [t, b, o] will be read."""

    weight: str
    bias: str
    a: Tensor
    epsilon: Tensor


def unrolls(layer: nn.Module, names: Collection[str], inputs: Sequence[Layout | None]) -> bool:
    """Whether a module is a recurrent layer as torch has it, with rows where it has its batch.

    Args:
        layer: Any module.
        names: The parameters asked for, by their name within it.
        inputs: Where the rows stand in a call's inputs.

    Returns:
        Whether ``gradients`` can be asked about its calls, as far as they are ``repeatable``.
    """
    kind = next((kind for kind in LAYERS if isinstance(layer, kind)), None)
    if not isinstance(layer, nn.RNNBase) or kind is None or type(layer).forward is not kind.forward:
        return False
    rows, own = inputs[0] if inputs else None, set(layer._parameters)
    placed = rows is not None and rows.axis == _rows_axis(layer)
    return placed and own >= {*names, *layer._flat_weights_names}


def repeatable(layer: nn.RNNBase, call: Call) -> bool:
    """Whether a recurrent layer was called on a tensor of padded rows, and draws nothing at random in its present mode."""
    x, _ = _given(call)
    drops = layer.training and layer.dropout > 0 and layer.num_layers > 1
    return isinstance(x, Tensor) and x.dim() == 3 and not drops


def gradients(
    layer: nn.RNNBase,
    names: Collection[str],
    call: Call,
    rows: Layout,
    deltas: Sequence[Tensor | None],
    n: int,
) -> dict[str, Tensor]:
    """Per-example gradients of a recurrent layer's parameters for a call that is ``repeatable``.

    Args:
        layer: The layer.
        names: The parameters, by their name within it.
        call: What it was called on.
        rows: Where the rows stand in its input.
        deltas: ∂(Σℓ)/∂output for each recorded output; None where nothing depends on it. One at least is there.
        n: Rows.

    Returns:
        Each parameter's gradients [n, *shape].
    """
    x, states = _given(call)
    x = x.detach().movedim(_rows_axis(layer), 1)  # [t, b, i]
    with torch.enable_grad(), autocast(x.device.type, call.cast):
        outputs, uses = _Unrolled(layer, x, states).run()
        pairs = zip(call.positions, deltas, strict=True)
        given = [(outputs[at], delta) for at, delta in pairs if delta is not None]
        found = torch.autograd.grad(
            [output for output, _ in given],
            [use.epsilon for use in uses],
            [delta.to(output.dtype) for output, delta in given],
            allow_unused=True,
        )
    asked = {name: layer._parameters[name] for name in names}
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        for use, delta in zip(uses, found, strict=True):
            d = torch.zeros_like(use.epsilon) if delta is None else delta
            a, d = (_by_row(value, rows, n) for value in (use.a, d))
            for name, parameter in asked.items():  # a weight may be that of several layers or directions
                if parameter is layer._parameters[use.weight]:
                    out[name] = _plus(out.get(name), torch.bmm(d.mT, a))
                elif parameter is layer._parameters.get(use.bias):
                    out[name] = _plus(out.get(name), d.sum(1))
    return {name: out[name] for name in names}


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _by_row(values: Tensor, rows: Layout, n: int) -> Tensor:
    """[t, b, i] of the layer's batch as [n, uses, i], in the dtype of sums."""
    found = to_rows(values.transpose(0, 1), replace(rows, axis=0), n).flatten(1, 2)
    return found.to(accumulation_dtype(found.dtype))


def _given(call: Call) -> tuple[Any, Any]:
    """The input and the first states of a call."""
    x = call.args[0] if call.args else call.kwargs["input"]
    return x, call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")


def _rows_axis(layer: nn.RNNBase) -> int:
    return 0 if layer.batch_first else 1


class _Unrolled:
    """A recurrent layer's forward pass, step by step, with a perturbation of zero on whatever a weight adds to.

    Args:
        layer: The layer.
        x: Its input [t, b, i].
        states: First states as torch takes them, or None for zeros.
    """

    def __init__(self, layer: nn.RNNBase, x: Tensor, states: Any) -> None:
        self.layer, self.x = layer, x
        named = layer._parameters.items()
        self.values: Mapping[str, Tensor] = {
            name: value.detach() for name, value in named if value is not None
        }
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        if states is None:
            width = layer.proj_size or layer.hidden_size
            states = x.new_zeros(count, x.shape[1], width), x.new_zeros(count, x.shape[1], layer.hidden_size)
        elif isinstance(states, Tensor):
            states = states, states
        self.hidden, self.cells = (state.detach() for state in states)
        self.uses: list[_Use] = []

    def run(self) -> tuple[list[Tensor], list[_Use]]:
        """Run the layer.

        Returns:
            Its outputs in torch's order (output, last hidden states, last cell states), and where each weight was used.
        """
        x, hidden, cells = self.x, [], []
        for depth in range(self.layer.num_layers):
            ways = []
            for suffix in ("", "_reverse")[: 2 if self.layer.bidirectional else 1]:
                at = len(hidden)
                steps, h, c = self._way(
                    x.flip(0) if suffix else x, f"_l{depth}{suffix}", self.hidden[at], self.cells[at]
                )
                ways.append(steps.flip(0) if suffix else steps)
                hidden.append(h)
                cells.append(c)
            x = torch.cat(ways, -1)
        return [x.movedim(1, _rows_axis(self.layer)), torch.stack(hidden), torch.stack(cells)], self.uses

    def _way(self, x: Tensor, suffix: str, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One layer in one direction: its hidden states [t, b, h], and the last hidden and cell state."""
        outer = F.linear(x, self.values[f"weight_ih{suffix}"], self.values.get(f"bias_ih{suffix}"))
        epsilon = self._perturbation("ih", suffix, x, outer)
        weight, bias = self.values[f"weight_hh{suffix}"], self.values.get(f"bias_hh{suffix}")
        narrow = self.values.get(f"weight_hr{suffix}")
        # Of a GRU's two sums the hidden state's has δ of its own; elsewhere both are added up at once.
        within = torch.zeros_like(outer).requires_grad_(self.layer.mode == "GRU")
        # Without a projection this stays aside.
        behind = x.new_zeros(*x.shape[:2], self.layer.proj_size).requires_grad_()
        read, hidden, wide = [], [], []
        # Taken apart once: the backward pass of a step's index would fill a tensor of all steps.
        parts = zip((outer + epsilon).unbind(0), within.unbind(0), behind.unbind(0), strict=True)
        for step, own, last in parts:
            read.append(h)
            h, c = self._cell(step, F.linear(h, weight, bias) + own, h, c)
            if narrow is not None:
                wide.append(h)
                h = F.linear(h, narrow) + last
            hidden.append(h)
        self._use("hh", suffix, torch.stack(read), within if within.requires_grad else epsilon)
        if narrow is not None:
            self._use("hr", suffix, torch.stack(wide), behind)
        return torch.stack(hidden), h, c

    def _perturbation(self, kind: str, suffix: str, a: Tensor, sums: Tensor) -> Tensor:
        epsilon = torch.zeros_like(sums).detach().requires_grad_()
        self._use(kind, suffix, a, epsilon)
        return epsilon

    def _use(self, kind: str, suffix: str, a: Tensor, epsilon: Tensor) -> None:
        self.uses.append(_Use(f"weight_{kind}{suffix}", f"bias_{kind}{suffix}", a.detach(), epsilon))

    def _cell(self, outer: Tensor, inner: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The next hidden and cell state, of what the input and the hidden state add up to."""
        if self.layer.mode == "LSTM":
            i, f, g, o = (outer + inner).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        if self.layer.mode == "GRU":
            (r, z, new), (inner_r, inner_z, inner_new) = outer.chunk(3, -1), inner.chunk(3, -1)
            new = (new + (r + inner_r).sigmoid() * inner_new).tanh()
            return new + (z + inner_z).sigmoid() * (h - new), c
        total = outer + inner
        return (total.tanh() if self.layer.mode == "RNN_TANH" else total.relu()), c
