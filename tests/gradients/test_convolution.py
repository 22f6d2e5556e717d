"""Weight gradients of convolutions by both routes against autograd, one picture at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gradients.common import normal
from gradients.geometries import geometries, inside, one_at_a_time, pixels
from tracin.gradients import convolution
from tracin.gradients.convolution import (
    ConvolutionShape,
    kernel_first,
    kernel_first_gradient,
    patches,
    weight_gradient,
)

ROUTES = {"patches": convolution._by_patches, "grouped": convolution._by_grouped_convolution}


@settings(max_examples=60)
@given(drawn=geometries())
def test_both_routes(drawn: dict[str, Any]) -> None:
    shape, space, n = ConvolutionShape(*drawn["geometry"]), drawn["space"], drawn["n"]
    x = normal(n, shape.in_channels, *space, seed=drawn["seed"])
    d = normal(n, shape.out_channels, *pixels(space, shape), seed=drawn["seed"] + 1)
    truth = one_at_a_time(x, d, shape)
    assert truth[0].numel() == shape.weight_size
    for name, route in ROUTES.items():
        found = route(x, d, shape)
        assert found.shape == truth.shape, (
            f"{name}: {tuple(found.shape)}, not {tuple(truth.shape)} for {shape}"
        )
        torch.testing.assert_close(
            found, truth, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}, {shape}: {m}"
        )
    torch.testing.assert_close(weight_gradient(x, d, shape), truth, rtol=1e-11, atol=1e-12)
    if shape.groups == 1:
        turned = truth.flatten(3).mT.flatten(2)
        for how, leaves in (("channels first", (x, d)), ("channels last", (inside(x), inside(d)))):
            found = kernel_first_gradient(*leaves, shape)
            torch.testing.assert_close(
                found, turned, rtol=1e-11, atol=1e-12, msg=lambda m, how=how: f"{how}, {shape}: {m}"
            )


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups", "pixels", "first", "last"),
    [
        (64, 3, 1, 1, 64, True, True),
        (63, 3, 1, 1, 64, False, True),
        (90, 3, 1, 1, 81, False, True),
        (16, 3, 1, 1, 16, True, True),
        (16, 3, 1, 1, 81, False, False),
        (16, 3, 2, 1, 81, False, True),
        (64, 3, 1, 1, 256, False, True),
        (64, 3, 1, 1, 257, False, False),
        (15, 3, 1, 1, 15, True, False),
        (15, 3, 2, 1, 81, False, False),
        (16, 1, 1, 1, 400, False, True),
        (15, 1, 1, 1, 4, False, True),
        (16, 3, 2, 2, 16, False, False),
    ],
)
def test_when_the_kernel_comes_first(
    channels: int, kernel: int, stride: int, groups: int, pixels: int, first: bool, last: bool
) -> None:
    """``first`` where channels lie apart, ``last`` where those of a pixel lie side by side."""
    shape = ConvolutionShape(channels, channels, (kernel,), (stride,), (1,), groups, (0,))
    d = normal(2, channels, pixels, seed=1)
    assert kernel_first(d, shape) is first
    assert kernel_first(inside(d), shape) is last


def test_each_route_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps go by patches and large ones in float32 by the grouped convolution; both say the same."""
    shape = ConvolutionShape(48, 48, (3, 3), (1, 1), (1, 1), 1, (0, 0))
    taken = []
    for name in ("_by_patches", "_by_grouped_convolution"):
        route = getattr(convolution, name)

        def noted(*args: Any, name: str = name, route: Any = route) -> Tensor:
            taken.append(name)
            return route(*args)

        monkeypatch.setattr(convolution, name, noted)
    for side in (5, 20):
        x = normal(3, 48, side, side, seed=1, dtype=torch.float32)
        d = normal(3, 48, side - 2, side - 2, seed=2, dtype=torch.float32)
        truth = one_at_a_time(x, d, shape)
        torch.testing.assert_close(weight_gradient(x, d, shape), truth, rtol=1e-4, atol=1e-4)
    assert taken == ["_by_patches", "_by_grouped_convolution"]


def test_patches_are_what_each_pixel_reads() -> None:
    """x [1, 2, 7], kernel 3, dilation 2, stride 1: pixel p reads positions p, p+2, p+4 of each channel."""
    x = torch.arange(14.0).view(1, 2, 7)
    shape = ConvolutionShape(1, 2, (3,), (1,), (2,), 1, (0,))
    found = patches(x, shape)
    assert found.tolist() == [[[p, p + 2, p + 4, p + 7, p + 9, p + 11] for p in range(3)]]
    assert patches(x, shape, (2,)).shape == (1, 2, 6), "a map that is read in part: two pixels of three"
    padded = patches(x, ConvolutionShape(1, 2, (3,), (1,), (2,), 1, (1,)))
    assert padded[0, 0].tolist() == [0, 1, 3, 0, 8, 10], "one zero before each channel"


def test_two_axes_of_different_geometry_are_not_exchanged() -> None:
    x = normal(2, 1, 6, 9, seed=1)
    shape = ConvolutionShape(2, 1, (2, 3), (1, 2), (3, 1), 1, (1, 2))
    d = normal(2, 2, *pixels((6, 9), shape), seed=2)
    truth = one_at_a_time(x, d, shape)
    for name, route in ROUTES.items():
        torch.testing.assert_close(
            route(x, d, shape), truth, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
