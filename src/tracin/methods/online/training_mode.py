"""Layers whose training mode differs from their eval mode: batch statistics, and randomness inside a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd as _Dropout

from tracin.errors import LoopError
from tracin.gradients.agreement import accumulation_dtype
from tracin.gradients.blocks import Block, Dense
from tracin.gradients.capture import Call
from tracin.gradients.layout import to_rows
from tracin.gradients.local import CallLayout
from tracin.gradients.rules import batch_norm_terms
from tracin.gradients.sites import LocalSite, RuleSite

__all__ = ["batch_statistics", "refuse_inner_randomness"]


def refuse_inner_randomness(site: LocalSite) -> None:
    """A module under vmap is run again row by row: what it draws, or averages over the batch, cannot come back.

    Args:
        site: The module.

    Raises:
        LoopError: Something in it draws at random or averages over the batch in its present mode.
    """
    for name, module in site.module.named_modules():
        if not module.training:
            continue
        where = f"{site.site}.{name}".strip(".") or "the model"
        drawn = isinstance(module, _Dropout) and module.p > 0
        drawn |= isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1
        drawn |= isinstance(module, nn.MultiheadAttention) and module.dropout > 0
        if drawn:
            raise LoopError(
                f"{', '.join(site.names)}: {site.site or 'the model'} is run again row by row, and {where} drops out at random "
                "inside it. Set dropout=0 there and put nn.Dropout between layers, or leave these out with Task(parameters=...)."
            )
        if isinstance(module, _BatchNorm):
            raise LoopError(
                f"{', '.join(site.names)}: {site.site or 'the model'} is run again row by row, and {where} averages over the "
                "batch inside it. Put the batch norm into eval mode, or leave these out with Task(parameters=...)."
            )


def batch_statistics(
    site: RuleSite, call: Call, layout: CallLayout, delta: Tensor, n: int
) -> dict[tuple[str, ...], Block]:
    r"""Own terms :math:`\delta_i \hat x_i` and :math:`\delta_i` of a batch norm that normalises by its batch.

    Args:
        site: The batch norm.
        call: What it was called on.
        layout: Where the rows stand.
        delta: Gradient of the loss at its output.
        n: Rows.

    Returns:
        Blocks by parameter.

    Raises:
        LoopError: Its input has no row axis.
    """
    x = (call.args[0] if call.args else call.kwargs["input"]).detach()
    eps: Any = site.module.eps
    if layout.inputs[0] is None:
        raise LoopError(f"{site.site}: the rows are not an axis of its input.")
    wide = accumulation_dtype(delta.dtype)
    x = x.to(wide)
    mean, spread = (part.to(wide) for part in _statistics(call.edges[0].node, x, eps))
    rows, d = to_rows(x, layout.inputs[0], n), to_rows(delta, layout.outputs[0], n).to(wide)  # [n, k, c, ...]
    weight, bias = batch_norm_terms(rows, d, mean, spread.pow(-2) - eps, eps)
    found = {"weight": weight, "bias": bias}
    return {(name,): Dense(found[role]) for role, name in site.roles.items()}


def _statistics(node: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Each channel's mean and 1/√(variance + eps): what the pass has saved for its backward pass, or computed anew."""
    if type(node).__name__ in {"NativeBatchNormBackward0", "CudnnBatchNormBackward0"}:
        return node._saved_result1, node._saved_result2
    # Its own kernel: torch.var_mean takes three times as long.
    _, mean, spread = torch.ops.aten.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
    return mean, spread
