r"""Layer type → block: the per-example gradients of a layer from its input and δ = ∂(Σ_n ℓ_n)/∂output.

A rule is a pure function of (layer, input, δ, wanted roles). It sees the rows as [n, k, ...]: n examples with k
entries each along the row axis (k = 1 but for flattened or windowed activations), then whatever the layer reads.

| layer | ∂ℓ_n/∂weight | ∂ℓ_n/∂bias |
|---|---|---|
| Linear | Σ_t δ_nt ⊗ a_nt | Σ_t δ_nt |
| Conv | Σ_pixels δ · patch of the padded input | Σ_pixels δ |
| transposed Conv | Σ_pixels x · patch of the padded δ | Σ_pixels δ |
| Embedding | δ_nt in the row of its token, none at ``padding_idx`` | |
| LayerNorm, GroupNorm, BatchNorm in eval, RMSNorm | Σ_t x̂ ⊙ δ, x̂ the normalised input | Σ_t δ |

A rule holds for a class and for subclasses that do not override what computes. To add one: write the function,
register it with the methods it relies on, and give it a case in the tests of every rule and of every mutation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tracin.gradients.blocks import Block, Dense, Outer, Rows
from tracin.gradients.convolution import ConvolutionShape
from tracin.gradients.pictures import Convolution
from tracin.shapes import Float

__all__ = ["RULES", "Rule", "batch_norm_terms", "convolution_block", "rule_for"]

# Elements of a tile, 1 MiB in float32, beside which two more of its size are read.
CACHED = 1 << 18

# Roles ("weight", "bias") of the parameters that a block holds → the block.
Gradients = Mapping[tuple[str, ...], Block]


@dataclass(frozen=True)
class Rule:
    """How one layer type's gradients are read from a call.

    ``compute(layer, x, d, wanted)`` gets x and d as [n, k, ...]; ``wanted`` is the set of roles to trace.
    ``methods`` are the methods that a subclass must leave alone for the rule to hold. ``row_axis_first`` says that the
    layer itself reads rows on axis 0, ``fused`` that a weight and a bias come as one block.
    """

    layer: type[nn.Module]
    compute: Callable[[Any, Tensor, Tensor, frozenset[str]], Gradients]
    methods: tuple[str, ...] = ("forward",)
    row_axis_first: bool = False
    fused: bool = False


def _linear(layer: nn.Linear, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Gradients:
    n = len(x)
    a, delta = x.reshape(n, -1, x.shape[-1]), d.reshape(n, -1, d.shape[-1])  # [n, t, i], [n, t, o]
    if wanted == {"weight", "bias"}:
        return {("weight", "bias"): Outer(a, delta, bias=1.0)}
    if wanted == {"bias"}:
        return {("bias",): Dense(delta.sum(1))}
    return {("weight",): Outer(a, delta)}


def _channel_sum(d: Tensor) -> Dense:
    """δ [n, k, o, ...] summed over everything but rows and channels."""
    return Dense(d.flatten(3).sum((1, 3)) if d.dim() > 3 else d.sum(1))


def _convolution(layer: _ConvNd, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Gradients:
    out: dict[tuple[str, ...], Block] = {}
    if "weight" in wanted:
        out["weight",] = _smaller(convolution_block(layer, x, d))
    if "bias" in wanted:
        out["bias",] = _channel_sum(d)
    return out


def convolution_block(layer: _ConvNd, x: Tensor, d: Tensor) -> Convolution:
    """The weight's gradients as the (padded) input and δ, not multiplied out.

    Args:
        layer: A convolution.
        x: Its input [n, k, c, ...].
        d: δ at its output [n, k, o, ...].

    Returns:
        The block.
    """
    padding, sides = _padding(layer)
    if any(sides):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x.flatten(0, 1), sides, mode=mode)
        x = padded.reshape(*x.shape[:2], *padded.shape[1:])
    return Convolution(x, d, _shape(layer, layer.out_channels, layer.in_channels, padding))


def _shape(layer: _ConvNd, out_channels: int, in_channels: int, padding: tuple[int, ...]) -> ConvolutionShape:
    stride, dilation = tuple(layer.stride), tuple(layer.dilation)
    return ConvolutionShape(
        out_channels, in_channels, tuple(layer.kernel_size), stride, dilation, layer.groups, padding
    )


def _smaller(block: Convolution) -> Block:
    """Multiplied out where that takes less memory than the layer's input and δ."""
    factors = block.x[0].numel() + block.d[0].numel()
    return block.multiplied_out() if block.size <= factors else block


def _padding(layer: _ConvNd) -> tuple[tuple[int, ...], list[int]]:
    """Zeros on both sides of each space axis, and padding to do beforehand (last axis first, as ``F.pad`` takes it)."""
    dims = len(layer.kernel_size)
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return tuple(int(side) for side in layer.padding), []
    sides: list[int] = []
    for axis in reversed(range(dims)):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0 if isinstance(layer.padding, str) else int(layer.padding[axis])] * 2
    return (0,) * dims, sides


def _transposed_convolution(
    layer: _ConvTransposeNd, x: Tensor, d: Tensor, wanted: frozenset[str]
) -> Gradients:
    out: dict[tuple[str, ...], Block] = {}
    if "weight" in wanted:
        padding, _ = _padding(layer)
        out["weight",] = _smaller(
            Convolution(d, x, _shape(layer, layer.in_channels, layer.out_channels, padding))
        )
    if "bias" in wanted:
        out["bias",] = _channel_sum(d)
    return out


def _embedding(layer: nn.Embedding, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Gradients:
    n = len(x)
    index, delta = x.reshape(n, -1), d.reshape(n, -1, d.shape[-1])
    if layer.padding_idx is not None:
        delta = delta.masked_fill((index == layer.padding_idx)[..., None], 0.0)
    return {("weight",): Rows(index, delta, layer.num_embeddings)}


def _affine(normalised: Tensor, d: Tensor, wanted: frozenset[str], kept: tuple[int, ...]) -> Gradients:
    """Gradients of an elementwise affine map on the axes ``kept`` of [n, ...]."""
    summed = tuple(axis for axis in range(1, d.dim()) if axis not in kept)
    n = len(d)
    out: dict[tuple[str, ...], Block] = {}
    if "weight" in wanted:
        product = normalised * d
        out[("weight",)] = Dense((product.sum(summed) if summed else product).reshape(n, -1))
    if "bias" in wanted:
        out[("bias",)] = Dense((d.sum(summed) if summed else d).reshape(n, -1))
    return out


def _layer_norm(layer: nn.LayerNorm, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Gradients:
    shape = layer.normalized_shape
    normalised = F.layer_norm(x, shape, None, None, layer.eps)
    return _affine(normalised, d, wanted, tuple(range(d.dim() - len(shape), d.dim())))


def _rms_norm(layer: nn.RMSNorm, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Gradients:
    shape = layer.normalized_shape
    normalised = F.rms_norm(x, shape, None, layer.eps)
    return _affine(normalised, d, wanted, tuple(range(d.dim() - len(shape), d.dim())))


def _group_norm(layer: nn.GroupNorm, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Gradients:
    normalised = F.group_norm(x.flatten(0, 1), layer.num_groups, None, None, layer.eps).view_as(x)
    return _affine(normalised, d, wanted, (2,))


def _batch_norm(layer: _BatchNorm, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Gradients:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError("batch norm without running statistics mixes rows")
    weight, bias = batch_norm_terms(x, d, layer.running_mean, layer.running_var, layer.eps)
    out: dict[tuple[str, ...], Block] = {}
    if "weight" in wanted:
        out["weight",] = Dense(weight)
    if "bias" in wanted:
        out["bias",] = Dense(bias)
    return out


def batch_norm_terms(
    x: Float[Tensor, "n k c ..."],
    d: Float[Tensor, "n k c ..."],
    mean: Float[Tensor, " c"],
    variance: Float[Tensor, " c"],
    eps: float,
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
    """Each row's Σ δ x̂ and Σ δ for a batch norm with these statistics.

    Args:
        x: Its input.
        d: δ at its output.
        mean: Mean of each channel.
        variance: Variance of each channel.
        eps: What is added to it.

    Returns:
        The terms of the scale and of the shift.
    """
    n, k, channels = x.shape[:3]
    if d.dim() > 3 and channels > 1 and d.stride(2) == x.stride(2) == 1:
        return _terms_of_channels_last(x, d, mean, torch.rsqrt(variance + eps))
    # Batch norm's own backward pass with every channel of every row as a channel: one fused pass over x and δ.
    _, weight, bias = torch.ops.aten.native_batch_norm_backward(
        d.reshape(1, n * k * channels, -1),
        x.reshape(1, n * k * channels, -1),
        None,
        mean.to(x.dtype).repeat(n * k),
        variance.to(x.dtype).repeat(n * k),
        None,
        None,
        False,
        eps,
        [False, True, True],
    )
    return weight.view(n, k, channels).sum(1), bias.view(n, k, channels).sum(1)


def _terms_of_channels_last(x: Tensor, d: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the channels of a pixel lie side by side, in tiles that stay in the caches."""
    inside = [leaf.movedim(2, -1).reshape(len(leaf), -1, leaf.shape[2]) for leaf in (x, d)]  # [n, pixels, c]
    step = max(1, CACHED // inside[0][0].numel())
    tiles = zip(*(leaf.split(step) for leaf in inside), strict=True)
    parts = [((a - mean).mul_(delta).sum(1), delta.sum(1)) for a, delta in tiles]
    weights, biases = (torch.cat(part) for part in zip(*parts, strict=True))
    return weights * scale, biases


_CONV = ("forward", "_conv_forward")
RULES: dict[type[nn.Module], Rule] = {
    rule.layer: rule
    for rule in (
        Rule(nn.Linear, _linear, fused=True),
        Rule(nn.Conv1d, _convolution, _CONV, True),
        Rule(nn.Conv2d, _convolution, _CONV, True),
        Rule(nn.Conv3d, _convolution, _CONV, True),
        Rule(nn.ConvTranspose1d, _transposed_convolution, row_axis_first=True),
        Rule(nn.ConvTranspose2d, _transposed_convolution, row_axis_first=True),
        Rule(nn.ConvTranspose3d, _transposed_convolution, row_axis_first=True),
        Rule(nn.Embedding, _embedding),
        Rule(nn.LayerNorm, _layer_norm),
        Rule(nn.RMSNorm, _rms_norm),
        Rule(nn.GroupNorm, _group_norm, row_axis_first=True),
        Rule(nn.BatchNorm1d, _batch_norm, row_axis_first=True),
        Rule(nn.BatchNorm2d, _batch_norm, row_axis_first=True),
        Rule(nn.BatchNorm3d, _batch_norm, row_axis_first=True),
    )
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module's class, or of the layer that it inherits its computation from.

    Args:
        module: Any module.

    Returns:
        The rule, or None where the module computes in its own way.
    """
    for cls in type(module).__mro__:
        rule = RULES.get(cls)
        if rule is not None:
            same = all(getattr(type(module), name) is getattr(cls, name) for name in rule.methods)
            return rule if same else None
    return None
