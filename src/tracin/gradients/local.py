r"""Exact per-example gradients of any module: vmap over the module's own vector-Jacobian product.

For a call y = f(θ, x) of a module with δ = ∂(Σ_n ℓ_n)/∂y known from the batch's backward pass,

    g_n = (∂f(θ_n, x_n)/∂θ_n)ᵀ δ_n ,   θ_n = θ

with the parameters expanded per row (a view), since recurrent modules have no batching rule otherwise. A row is given
to the module with its entries on the axis where they stood, so the module sees a batch of that row alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from tracin.gradients.capture import Call
from tracin.gradients.layout import Layout, from_rows, to_rows

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
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    at_tensor = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    by_row: dict[int, Layout] = {
        at: lay for at, lay in zip(at_tensor, layout.inputs, strict=True) if lay is not None
    }
    used = [at for at, delta in enumerate(deltas) if delta is not None]
    if not used:
        return {name: value.new_zeros(n, *value.shape) for name, value in parameters.items()}
    inputs = [to_rows(leaves[at], lay, n) for at, lay in by_row.items()]
    cotangents = [to_rows(delta, layout.outputs[at], n) for at in used if (delta := deltas[at]) is not None]

    def pull(
        expanded: dict[str, Tensor],
        others: dict[str, Tensor],
        row_inputs: list[Tensor],
        row_cotangents: list[Tensor],
    ) -> dict[str, Tensor]:
        filled: list[Any] = list(leaves)
        for (at, lay), value in zip(by_row.items(), row_inputs, strict=True):
            filled[at] = from_rows(value, lay)
        args, kwargs = pytree.tree_unflatten(filled, spec)

        def forward(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
            outputs = pytree.tree_leaves(functional_call(module, {**others, **values}, args, kwargs))
            return tuple(outputs[call.positions[at]] for at in used)

        outputs, pullback, *_ = vjp(forward, expanded)
        fitted = tuple(
            from_rows(value, layout.outputs[at]) for at, value in zip(used, row_cotangents, strict=True)
        )
        if any(value.shape != output.shape for value, output in zip(fitted, outputs, strict=True)):
            raise RuntimeError("the module makes another shape for a row alone")
        return pullback(tuple(value.to(output.dtype) for value, output in zip(fitted, outputs, strict=True)))[
            0
        ]

    expanded = {name: value.detach().expand(n, *value.shape) for name, value in parameters.items()}
    others = _recurrent(module, parameters, n)
    chunk = max(1, CHUNK // max(1, sum(value.numel() for value in parameters.values())))
    with torch.no_grad(), warnings.catch_warnings():
        # vmap falls back to a loop for operations without a batching rule: slow, exact, and reported by the coverage.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        return vmap(pull, in_dims=(0, 0, 0, 0), chunk_size=min(chunk, n))(
            expanded, others, inputs, cotangents
        )


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
