"""Norms of convolutions' weight gradients by products of pixels and of patches, against autograd one picture at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gradients.common import normal
from gradients.geometries import geometries, inside, one_at_a_time, pixels
from tracin.gradients import blocks, gram, pictures
from tracin.gradients.convolution import ConvolutionShape, patches
from tracin.gradients.gram import gram_norm
from tracin.gradients.pictures import Convolution


def leaves(shape: ConvolutionShape, space: tuple[int, ...], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """x and δ."""
    x = normal(n, shape.in_channels, *space, seed=seed)
    return x, normal(n, shape.out_channels, *pixels(space, shape), seed=seed + 1)


@settings(max_examples=80)
@given(drawn=geometries(most_groups=1))
def test_any_geometry(drawn: dict[str, Any]) -> None:
    """Gram matrices are those of the patches, by either route and in either order of memory; the norms autograd's."""
    shape, space = ConvolutionShape(*drawn["geometry"]), drawn["space"]
    x, d = leaves(shape, space, drawn["n"], drawn["seed"])
    a = patches(x, shape, tuple(d.shape[2:]))
    expected, truth = torch.bmm(a, a.mT), one_at_a_time(x, d, shape).flatten(1).square().sum(1)
    for route in (gram._by_pixels, gram._by_patches):
        for some in ((x, d), (inside(x), inside(d))):
            found = route(*some, shape)
            said = f"{route.__name__}, {shape}, {space}"
            torch.testing.assert_close(
                found, expected, rtol=1e-11, atol=1e-12, msg=lambda m, s=said: f"{s}: {m}"
            )
    for by_pixels in (True, False):
        found = gram_norm(x, d, shape, by_pixels=by_pixels)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)
    found = Convolution(x[:, None], d[:, None], shape).squared_norm()
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("by_pixels", [True, False])
def test_pictures_go_in_tiles(by_pixels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short last one included."""
    shape = ConvolutionShape(4, 6, (3, 3), (1, 1), (1, 1), 1, (1, 1))
    x, d = leaves(shape, (3, 4), 5, 1)
    name = "_by_pixels" if by_pixels else "_by_patches"
    elements = (gram._pixel_elements if by_pixels else gram._patch_elements)(x, d, shape)
    monkeypatch.setattr(blocks, "TILE", 2 * elements + 1)
    seen, route = [], getattr(gram, name)

    def noted(x: Tensor, d: Tensor, shape: ConvolutionShape) -> Tensor:
        seen.append(len(x))
        return route(x, d, shape)

    monkeypatch.setattr(gram, name, noted)
    truth = one_at_a_time(x, d, shape).flatten(1).square().sum(1)
    torch.testing.assert_close(gram_norm(x, d, shape, by_pixels=by_pixels), truth, rtol=1e-11, atol=1e-12)
    assert seen == [2, 2, 1]


@pytest.mark.parametrize(
    ("channels", "out", "side", "kernel", "stride", "groups", "route"),
    [
        (64, 64, 7, 3, 1, 1, "_by_pixels"),
        (64, 64, 14, 3, 1, 1, "_by_pixels"),
        (128, 128, 14, 3, 2, 1, "_by_pixels"),
        (512, 512, 7, 1, 1, 1, "_by_patches"),
        (64, 128, 8, 4, 4, 1, "_by_patches"),
        (16, 32, 14, 3, 1, 1, None),
        (3, 64, 32, 7, 2, 1, None),
        (64, 64, 7, 3, 1, 2, None),
    ],
)
def test_which_route_a_norm_takes(
    channels: int,
    out: int,
    side: int,
    kernel: int,
    stride: int,
    groups: int,
    route: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of pixels on small maps, of patches where no two windows overlap; otherwise it is multiplied out."""
    pad = kernel // 2 if kernel % 2 else 0
    shape = ConvolutionShape(out, channels, (kernel, kernel), (stride, stride), (1, 1), groups, (pad, pad))
    x, d = leaves(shape, (side, side), 1, 1)
    taken: list[str | None] = []
    for name in ("_by_pixels", "_by_patches"):
        monkeypatch.setattr(gram, name, noting(taken, name, getattr(gram, name)))
    monkeypatch.setattr(pictures, "weight_gradient", noting(taken, None, pictures.weight_gradient))
    monkeypatch.setattr(
        pictures, "kernel_first_gradient", noting(taken, None, pictures.kernel_first_gradient)
    )
    found = Convolution(x[:, None], d[:, None], shape).squared_norm()
    truth = one_at_a_time(x, d, shape).flatten(1).square().sum(1)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)
    assert taken == [route]


def noting(taken: list[str | None], name: str | None, route: Any) -> Any:
    def run(*args: Any) -> Tensor:
        taken.append(name)
        return route(*args)

    return run


def test_several_pictures_of_a_row_are_multiplied_out() -> None:
    """Their gradients are added, so that pixels of one meet those of the other."""
    shape = ConvolutionShape(32, 32, (3, 3), (1, 1), (1, 1), 1, (1, 1))
    x, d = leaves(shape, (4, 4), 6, 1)
    truth = one_at_a_time(x, d, shape).flatten(1).view(3, 2, -1).sum(1).square().sum(1)
    found = Convolution(x.view(3, 2, 32, 4, 4), d.view(3, 2, 32, 4, 4), shape).squared_norm()
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


def test_a_map_that_is_read_in_part() -> None:
    """A transposed convolution's outputs may end before the last window that would fit: pixels beyond are not read."""
    shape = ConvolutionShape(2, 3, (3,), (2,), (1,), 1, (1,))
    x, d = normal(2, 3, 8, seed=1), normal(2, 2, 3, seed=2)
    a = patches(x, shape, (3,))
    torch.testing.assert_close(gram._by_pixels(x, d, shape), torch.bmm(a, a.mT), rtol=1e-11, atol=1e-12)


def test_a_norm_is_never_negative() -> None:
    """Where δ of equal patches cancel, rounding alone is left."""
    shape = ConvolutionShape(64, 64, (3, 3), (1, 1), (1, 1), 1, (0, 0))
    x = normal(50, 64, 1, 1, seed=1, dtype=torch.float32).expand(50, 64, 7, 7)
    d = normal(50, 64, 5, 5, seed=2, dtype=torch.float32)
    d = d - d.mean((2, 3), keepdim=True)
    for by_pixels in (True, False):
        found = gram_norm(x, d, shape, by_pixels=by_pixels)
        assert (found >= 0).all()
        assert (found == 0).any(), "some are below zero by rounding, and held to it"
