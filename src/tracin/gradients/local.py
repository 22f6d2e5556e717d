r"""Exact per-example gradients of any module: vmap over the module's own vector-Jacobian product.

For a call y = f(θ, x) of a module with δ = ∂(Σ_n ℓ_n)/∂y known from the batch's backward pass,

    g_n = (∂f(θ_n, x_n)/∂θ_n)ᵀ δ_n ,   θ_n = θ

with the parameters expanded per row (a view), since recurrent modules have no batching rule otherwise. A row is given
to the module with its entries on the axis where they stood, so the module sees a batch of that row alone, under the
autocast that the call was made under.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from tracin.gradients import recurrent
from tracin.gradients.capture import Call
from tracin.gradients.layout import Layout, from_rows, to_rows
from tracin.gradients.precision import autocast

__all__ = ["CallLayout", "gradients"]

# Largest result that one vmap makes, in elements.
CHUNK = 1 << 24


@dataclass(frozen=True)
class CallLayout:
    """Row layouts of a call: one per tensor among its inputs (None where rows share it), one per output."""

    inputs: tuple[Layout | None, ...]
    outputs: tuple[Layout, ...]


def gradients(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    call: Call,
    layout: CallLayout,
    deltas: Sequence[Tensor | None],
    n: int,
) -> dict[str, Tensor]:
    """Per-example gradients of a module's parameters for one call.

    Args:
        module: The module.
        parameters: The parameters to trace, by their name within the module.
        call: What the module was called on.
        layout: Where the rows stand in its inputs and outputs.
        deltas: ∂(Σℓ)/∂output for each recorded output; None where nothing depends on it.
        n: Rows.

    Returns:
        Each parameter's gradients [n, *shape].

    Raises:
        RuntimeError: vmap cannot run the module (data-dependent control flow, an operation without a rule).
    """
    used = tuple(at for at, delta in enumerate(deltas) if delta is not None)
    if not used:
        return {name: value.new_zeros(n, *value.shape) for name, value in parameters.items()}
    rows = layout.inputs[0] if layout.inputs else None
    unrolls = recurrent.unrolls(module, parameters, layout.inputs)
    if unrolls and isinstance(module, nn.RNNBase) and rows is not None and recurrent.repeatable(module, call):
        return recurrent.gradients(module, parameters, call, rows, deltas, n)
    one_row = _OneRow(module, call, layout, used)
    inputs = [to_rows(one_row.leaves[at], lay, n) for at, lay in one_row.by_row.items()]
    cotangents = [to_rows(delta, layout.outputs[at], n) for at in used if (delta := deltas[at]) is not None]
    expanded = {name: value.detach().expand(n, *value.shape) for name, value in parameters.items()}
    others = _recurrent(module, parameters, n)
    chunk = max(1, CHUNK // max(1, sum(value.numel() for value in parameters.values())))
    with torch.no_grad(), warnings.catch_warnings(), _own_lstm(module):
        # vmap falls back to a loop for operations without a batching rule: slow, exact, and reported by the coverage.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        in_rows = vmap(one_row.pull, in_dims=(0, 0, 0, 0), chunk_size=min(chunk, n))
        return in_rows(expanded, others, inputs, cotangents)


@contextmanager
def _own_lstm(module: nn.Module) -> Iterator[None]:
    """torch's own LSTM, as oneDNN's, which float32 takes on a CPU, has no batching rule.

    The switch belongs to the process: the first thread turns it off, the last one gives it back.
    """
    if not any(isinstance(layer, nn.LSTM) for layer in module.modules()):
        yield
        return
    switch: Any = torch.backends.mkldnn
    with _LOCK:
        _HELD.append(switch.enabled)
        switch.enabled = False
    try:
        yield
    finally:
        with _LOCK:
            # Whoever leaves last takes the first entry, which is the caller's.
            before = _HELD.pop()
            if not _HELD:
                switch.enabled = before


_LOCK = threading.Lock()
_HELD: list[bool] = []


class _OneRow:
    """The vector-Jacobian product of a module's call for one row."""

    def __init__(self, module: nn.Module, call: Call, layout: CallLayout, used: tuple[int, ...]) -> None:
        self.leaves, self._spec = pytree.tree_flatten((call.args, call.kwargs))
        at_tensor = [at for at, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        pairs = zip(at_tensor, layout.inputs, strict=True)
        self.by_row: dict[int, Layout] = {at: lay for at, lay in pairs if lay is not None}
        self._module = module
        self._outputs = [layout.outputs[at] for at in used]
        self._positions = [call.positions[at] for at in used]
        self._cast = call.cast

    def forward(
        self, others: dict[str, Tensor], args: tuple, kwargs: dict[str, Any], values: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The recorded outputs as a function of the parameters."""
        device = next(iter(values.values())).device.type
        with autocast(device, self._cast):
            outputs = pytree.tree_leaves(functional_call(self._module, {**others, **values}, args, kwargs))
        return tuple(outputs[position] for position in self._positions)

    def pull(
        self,
        expanded: dict[str, Tensor],
        others: dict[str, Tensor],
        row_inputs: list[Tensor],
        row_cotangents: list[Tensor],
    ) -> dict[str, Tensor]:
        """The gradient of each parameter for this row."""
        filled: list[Any] = list(self.leaves)
        for (at, lay), value in zip(self.by_row.items(), row_inputs, strict=True):
            filled[at] = from_rows(value, lay)
        args, kwargs = pytree.tree_unflatten(filled, self._spec)
        outputs, pullback, *_ = vjp(partial(self.forward, others, args, kwargs), expanded)
        pairs = zip(row_cotangents, self._outputs, outputs, strict=True)
        fitted = tuple(from_rows(value, lay).to(output.dtype) for value, lay, output in pairs)
        if any(value.shape != output.shape for value, output in zip(fitted, outputs, strict=True)):
            raise RuntimeError("the module makes another shape for a row alone")
        return pullback(fitted)[0]


def _recurrent(module: nn.Module, traced: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    """The other parameters of recurrent layers, expanded too: these layers mix no expanded with unexpanded ones."""
    out = {}
    for prefix, layer in module.named_modules():
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            for own, value in layer.named_parameters(recurse=False):
                name = f"{prefix}.{own}" if prefix else own
                if name not in traced and not any(value is other for other in traced.values()):
                    out[name] = value.detach().expand(n, *value.shape)
    return out
