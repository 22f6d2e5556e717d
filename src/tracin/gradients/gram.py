r"""The norm of a convolution's weight gradient by Gram matrices of its pictures, for small maps of many channels.

With δ_t at the pixel t of the output and patches a_t[k, c] = x[c, stride·t + dilation·k - padding], 0 outside the picture,

    ‖Σ_t δ_t ⊗ a_t‖² = Σ_ts ⟨a_t, a_s⟩ ⟨δ_t, δ_s⟩
    ⟨a_t, a_s⟩ = Σ_k P[stride·t + dilation·k - padding, stride·s + dilation·k - padding] ,   P[u, v] = ⟨x_u, x_v⟩

so that products of pixels do, which are fewer than those of patches by the size of the kernel: each k reads P further
along its diagonals. Only pixels whose places leave the same remainder by the stride ever meet, so that every remainder has a
P of its own. The sum over k is taken axis by axis. Patches serve where they cost less: windows that do not overlap.

Rounding is relative to Σ_ts |⟨a_t, a_s⟩ ⟨δ_t, δ_s⟩|. As a rule that is less than what multiplying out loses; it is more where δ
cancel over patches that are nearly the same (nothing padded, and a norm layer next).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from tracin.gradients.blocks import tiles
from tracin.gradients.convolution import ConvolutionShape, columns, kernel_first, kernel_first_patches
from tracin.shapes import Float

__all__ = ["NormWork", "gram_norm", "norm_work"]

# One addition in memory takes as long as so many multiplications of a matrix product, and products are added fastest where
# tiles are smaller by so much, in the caches: as `python benchmarks/convolutions.py --norms` found it on two CPU cores.
ADDITION, CACHED = 8, 8

# Places of an axis that leave the same remainder by the stride: the remainder, and the offsets q of the kernel among them.
# Window t reads there at stride·(t + q) + remainder.
Remainder = tuple[int, list[int]]


@dataclass(frozen=True)
class NormWork:
    """What one picture's norm takes by each route, in multiplications or what takes as long."""

    pixels: int
    patches: int
    multiplied_out: int

    @property
    def by_pixels(self) -> bool:
        """Whether products of pixels take less than products of patches."""
        return self.pixels < self.patches

    @property
    def by_gram(self) -> bool:
        """Whether Gram matrices take less than to multiply out: few pixels of many channels."""
        return min(self.pixels, self.patches) < self.multiplied_out


def norm_work(x: Float[Tensor, "n c ..."], d: Float[Tensor, "n o ..."], shape: ConvolutionShape) -> NormWork:
    """What the routes of a norm take.

    Args:
        x: Inputs [n, c, *space] of a convolution without groups.
        d: δ at its outputs [n, o, *pixels].
        shape: The geometry.

    Returns:
        The work for one picture.
    """
    t = math.prod(d.shape[2:])
    own, patches = t * t * shape.out_channels, t * t * shape.in_channels * math.prod(shape.kernel)
    return NormWork(_work_by_pixels(x, shape) + own, patches + own, t * shape.weight_size)


def gram_norm(
    x: Float[Tensor, "n c ..."], d: Float[Tensor, "n o ..."], shape: ConvolutionShape, *, by_pixels: bool
) -> Float[Tensor, " n"]:
    """The squared norm of each picture's weight gradient.

    Args:
        x: Inputs [n, c, *space] of a convolution without groups.
        d: δ at its outputs [n, o, *pixels].
        shape: The geometry.
        by_pixels: By products of pixels; False: of patches.

    Returns:
        Squared norms [n].
    """
    route, elements = (_by_pixels, _pixel_elements) if by_pixels else (_by_patches, _patch_elements)
    parts = []
    for start, stop in tiles(len(x), elements(x, d, shape)):
        some, flat = d[start:stop], d[start:stop].flatten(2)  # [n, o, t]
        parts.append((route(x[start:stop], some, shape) * torch.bmm(flat.mT, flat)).sum((1, 2)))
    return torch.cat(parts).clamp_min(0.0)


def _by_patches(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Float[Tensor, "n t t"]:
    pixels, first = tuple(d.shape[2:]), kernel_first(d, shape)
    a = kernel_first_patches(x, shape, pixels) if first else columns(x, shape, pixels).mT  # [n, t, i]
    return torch.bmm(a, a.mT)


def _by_pixels(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Float[Tensor, "n t t"]:
    pixels = tuple(d.shape[2:])
    every = product(*(_remainders(shape, axis) for axis in range(len(pixels))))
    total = reduce(Tensor.add_, (_that_meet(x, remainders, pixels, shape.stride) for remainders in every))
    return total.flatten(1).view(len(x), math.prod(pixels), -1)


def _that_meet(
    x: Tensor, remainders: tuple[Remainder, ...], pixels: tuple[int, ...], stride: tuple[int, ...]
) -> Float[Tensor, "n ..."]:
    """The part of the Gram matrix [n, *pixels, *pixels] of the places with these remainders."""
    some = x[(..., *(slice(first, None, step) for (first, _), step in zip(remainders, stride, strict=True)))]
    flat = some.reshape(*some.shape[:2], -1)
    part = torch.bmm(flat.mT, flat).view(len(x), *some.shape[2:], *some.shape[2:])
    for axis, (_, offsets) in enumerate(remainders):
        part = _along(part, axis, offsets, pixels[axis])
    return part


def _along(products: Tensor, axis: int, offsets: list[int], size: int) -> Tensor:
    """Σ_q P[t + q, s + q] for t, s < size on one axis of both sides of P [n, *places, *places], which is 0 outside."""
    axes, length = (1 + axis, 1 + axis + products.dim() // 2), products.shape[1 + axis]
    straight = length == size and 0 in offsets
    if straight and len(offsets) == 1:
        return products
    sizes = [size if at in axes else had for at, had in enumerate(products.shape)]
    out = products.clone() if straight else products.new_zeros(sizes)
    for q in offsets:
        start, stop = max(0, -q), min(size, length - q)
        if start < stop and not (straight and q == 0):
            _square(out, axes, start, stop).add_(_square(products, axes, start + q, stop + q))
    return out


def _square(products: Tensor, axes: tuple[int, int], start: int, stop: int) -> Tensor:
    for axis in axes:
        products = products.narrow(axis, start, stop - start)
    return products


def _remainders(shape: ConvolutionShape, axis: int) -> list[Remainder]:
    found: dict[int, list[int]] = {}
    for k in range(shape.kernel[axis]):
        q, remainder = divmod(shape.dilation[axis] * k - shape.padding[axis], shape.stride[axis])
        found.setdefault(remainder, []).append(q)
    return list(found.items())


def _work_by_pixels(x: Tensor, shape: ConvolutionShape) -> int:
    """Multiplications of one picture, and its additions by the time that they take."""
    pairs, additions = 1, 0
    for axis, (size, step) in enumerate(zip(x.shape[2:], shape.stride, strict=True)):
        found = [(len(range(first, size, step)) ** 2, len(qs)) for first, qs in _remainders(shape, axis)]
        had, own = sum(square for square, _ in found), sum(square * reads for square, reads in found)
        pairs, additions = pairs * had, additions * had + pairs * own
    return pairs * shape.in_channels + ADDITION * additions


def _patch_elements(x: Tensor, d: Tensor, shape: ConvolutionShape) -> int:
    """Elements that one picture takes by patches."""
    t = math.prod(d.shape[2:])
    return t * (shape.in_channels * math.prod(shape.kernel) + 2 * t)


def _pixel_elements(x: Tensor, d: Tensor, shape: ConvolutionShape) -> int:
    """The largest matrix of one picture, times what keeps a tile in the caches."""
    places = math.prod(-(-size // step) for size, step in zip(x.shape[2:], shape.stride, strict=True))
    return CACHED * max(places, math.prod(d.shape[2:])) ** 2
