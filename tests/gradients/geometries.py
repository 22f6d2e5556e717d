"""Geometries of convolutions, and autograd one picture at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from tracin.gradients.convolution import ConvolutionShape

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def one_at_a_time(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
    """∂⟨conv(x_n, W), δ_n⟩/∂W of each picture by autograd."""
    out = []
    for picture, delta in zip(x, d, strict=True):
        weight = x.new_zeros(
            shape.out_channels, shape.in_channels // shape.groups, *shape.kernel
        ).requires_grad_()
        y = CONV[len(shape.kernel)](
            picture[None],
            weight,
            stride=shape.stride,
            padding=shape.padding,
            dilation=shape.dilation,
            groups=shape.groups,
        )
        out.append(torch.autograd.grad((y[0] * delta).sum(), weight)[0])
    return torch.stack(out)


def pixels(space: tuple[int, ...], shape: ConvolutionShape) -> tuple[int, ...]:
    return tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, d, p in zip(
            space, shape.kernel, shape.stride, shape.dilation, shape.padding, strict=True
        )
    )


@st.composite
def geometries(draw: Any, most_groups: int = 3) -> dict[str, Any]:
    """Numbers alone: beartype, which checks what the library makes, draws from ``random``."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, most_groups))
    few = st.integers(1, 3 if dims < 3 else 2)
    kernel, stride, dilation = (tuple(draw(few) for _ in range(dims)) for _ in range(3))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    geometry = (groups * draw(few), groups * draw(few), kernel, stride, dilation, groups, padding)
    # The remainder is what the last window leaves over, up to more than one stride.
    space = tuple(d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True))
    return {
        "geometry": geometry,
        "space": space,
        "n": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 999)),
    }


def inside(x: Tensor) -> Tensor:
    """The same numbers with the channels of a pixel side by side."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
