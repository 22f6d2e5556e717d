r"""Weight gradients of convolutions, one per picture.

A convolution y = x * W (cross-correlation, W [o, c/g, *kernel]) has the weight gradient of picture n

    ∂ℓ/∂W[o, c, k] = Σ_pixels δ[n, o, pixel] · x[n, c, stride·pixel + dilation·k]

Exact routes: one grouped convolution-backward in which each picture is its own group; or patches of x (a strided view)
times δ as a batched matrix product, with the channels before the kernel, as W has them, or after it (``kernel_first``),
where a patch is read in runs of channels that lie side by side. A transposed convolution is the same with x and δ
exchanged: its weight gradient correlates δ (the larger map) with x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

__all__ = [
    "ConvolutionShape",
    "columns",
    "kernel_first",
    "kernel_first_gradient",
    "kernel_first_patches",
    "patch_elements",
    "patches",
    "weight_gradient",
]

# Up to so many pixels patches with the kernel first are the cheapest route, unless output channels are fewer than pixels; where
# channels lie side by side, also with some output channels, and up to more pixels with many. As
# `python benchmarks/convolutions.py` found it on two CPU cores, like the bounds below.
FEW_PIXELS, SOME_CHANNELS, SOME_PIXELS, MANY_CHANNELS = 64, 16, 256, 64


@dataclass(frozen=True)
class ConvolutionShape:
    """Geometry of a convolution; W is [out_channels, in_channels/groups, *kernel].

    ``padding`` are zeros on both sides of each space axis; other padding is done to x beforehand.
    """

    out_channels: int
    in_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]

    @property
    def weight_size(self) -> int:
        """Entries of W."""
        return self.out_channels * (self.in_channels // self.groups) * math.prod(self.kernel)


def kernel_first(d: Tensor, shape: ConvolutionShape) -> bool:
    """Whether the weight's gradients come cheapest from patches with the kernel before the input channels.

    Args:
        d: δ at the outputs [n, o, *pixels].
        shape: The geometry.

    Returns:
        True for small maps; where channels lie side by side also for strides, pointwise kernels and many channels.
    """
    pixels, pointwise, o = math.prod(d.shape[2:]), math.prod(shape.kernel) == 1, shape.out_channels
    if shape.groups > 1:
        return False
    if o == 1 or d.stride(1) > 1:
        return pixels <= min(FEW_PIXELS, o) and not pointwise
    most = SOME_PIXELS if o >= MANY_CHANNELS else FEW_PIXELS
    return pointwise or (o >= SOME_CHANNELS and (pixels <= most or min(shape.stride) > 1))


def patch_elements(d: Tensor, shape: ConvolutionShape) -> int:
    """Elements of the patches that the cheapest route makes of one picture; 0 where it makes none.

    Args:
        d: δ at the outputs [n, o, *pixels].
        shape: The geometry.

    Returns:
        How many.
    """
    if not (kernel_first(d, shape) or _patches_are_cheaper(d, shape)):
        return 0
    return math.prod(d.shape[2:]) * math.prod(shape.kernel) * shape.in_channels


def kernel_first_gradient(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
    """Weight gradient of each picture with the kernel before the channels, for a convolution without groups.

    Args:
        x: Inputs [n, c, *space].
        d: δ at the outputs [n, o, *pixels].
        shape: The geometry.

    Returns:
        Gradients [n, o, kernel·c].
    """
    a = kernel_first_patches(x, shape, tuple(d.shape[2:]))
    return torch.bmm(_pixels_first(d).mT, a)


def kernel_first_patches(x: Tensor, shape: ConvolutionShape, pixels: tuple[int, ...]) -> Tensor:
    """Patches of pictures x [n, c, *space] as [n, pixels, kernel·c] (channels fastest)."""
    inside = x.movedim(1, -1)  # [n, *space, c]
    inside = (F.pad(inside, [0, 0, *_sides(shape)]) if any(shape.padding) else inside).contiguous()
    unpadded = replace(shape, padding=(0,) * len(shape.padding))
    view = _windows(inside.movedim(-1, 1), unpadded, pixels).movedim(1, -1)
    return view.reshape(len(x), math.prod(pixels), math.prod(shape.kernel) * shape.in_channels)


def _pixels_first(d: Tensor) -> Tensor:
    """Maps [n, o, *pixels] as [n, pixels, o]."""
    return d.movedim(1, -1).reshape(len(d), -1, d.shape[1])


def patches(x: Tensor, shape: ConvolutionShape, pixels: tuple[int, ...] | None = None) -> Tensor:
    """Patches of pictures x [n, c, *space] as [n, pixels, c·kernel] (kernel fastest)."""
    view = _windows(x, shape, pixels)  # [n, c, *pixels, *kernel]
    dims = len(shape.kernel)
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    n = x.shape[0]
    return view.permute(order).reshape(n, -1, shape.in_channels * math.prod(shape.kernel))


def columns(x: Tensor, shape: ConvolutionShape, pixels: tuple[int, ...]) -> Tensor:
    """Patches of pictures x [n, c, *space] as [n, c·kernel, pixels], copied along the rows of the picture."""
    view = _windows(x, shape, pixels)  # [n, c, *pixels, *kernel]
    dims = len(shape.kernel)
    kernel_first = (0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return view.permute(kernel_first).reshape(len(x), -1, math.prod(pixels))


def _windows(x: Tensor, shape: ConvolutionShape, pixels: tuple[int, ...] | None) -> Tensor:
    dims = len(shape.kernel)
    sides = _sides(shape)
    view = F.pad(x, sides) if any(sides) else x
    for axis in range(dims):
        span = shape.dilation[axis] * (shape.kernel[axis] - 1) + 1
        view = view.unfold(2 + axis, span, shape.stride[axis])
    for axis in range(dims):
        last = 2 + dims + axis
        index = [slice(None)] * view.dim()
        index[last] = slice(None, None, shape.dilation[axis])
        if pixels is not None:
            index[2 + axis] = slice(0, pixels[axis])
        view = view[tuple(index)]
    return view


def _sides(shape: ConvolutionShape) -> list[int]:
    """Zeros around the space axes, last axis first, as ``F.pad`` takes them."""
    return [side for padding in reversed(shape.padding) for side in (padding, padding)]


def weight_gradient(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
    """Weight gradient of each picture.

    Args:
        x: Inputs [n, c, *space].
        d: δ at the outputs [n, o, *pixels].
        shape: The geometry.

    Returns:
        Gradients [n, o, c/g, *kernel].
    """
    if _patches_are_cheaper(d, shape):
        return _by_patches(x, d, shape)
    return _by_grouped_convolution(x, d, shape)


def _patches_are_cheaper(d: Tensor, shape: ConvolutionShape) -> bool:
    """Few input channels, pointwise kernels, many channels on small maps."""
    # Float64 has no fast convolution.
    inner, pixels = shape.in_channels // shape.groups, d[0, 0].numel()
    many_on_small_maps = pixels <= FEW_PIXELS and inner * shape.out_channels >= 2048
    return inner <= 3 or many_on_small_maps or math.prod(shape.kernel) == 1 or d.dtype == torch.float64


def _by_patches(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
    n, g, t = x.shape[0], shape.groups, math.prod(d.shape[2:])
    a = columns(x, shape, tuple(d.shape[2:])).reshape(n * g, -1, t)  # [ng, c/g·kernel, t]
    d = d.reshape(n * g, -1, t)
    # With few columns the product is faster turned around, and copying it back costs little: measured on two CPU cores.
    few = a.shape[1] < min(32, d.shape[1])
    out = torch.bmm(a, d.mT).mT.contiguous() if few else torch.bmm(d, a.mT)  # [ng, o/g, c/g·kernel]
    return out.view(n, shape.out_channels, shape.in_channels // g, *shape.kernel)


def _by_grouped_convolution(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
    n = x.shape[0]
    size = (n * shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)
    function: Callable[..., Tensor] = (
        conv_grad.conv1d_weight,
        conv_grad.conv2d_weight,
        conv_grad.conv3d_weight,
    )[len(shape.kernel) - 1]
    out = function(
        x.reshape(1, n * shape.in_channels, *x.shape[2:]),
        size,
        d.reshape(1, n * shape.out_channels, *d.shape[2:]),
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=n * shape.groups,
    )
    return out.view(n, shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)
