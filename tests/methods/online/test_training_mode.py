"""Batch statistics: those that the pass saved, and the same ones computed anew where it saved none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oracle
from tracin.methods.online.training_mode import _statistics

CASES = {
    "rows": (nn.BatchNorm1d(3), (7, 3)),
    "sound": (nn.BatchNorm1d(3), (5, 3, 4)),
    "pictures": (nn.BatchNorm2d(3, eps=0.1), (5, 3, 4, 2)),
    "no running statistics": (nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 2)),
    "no affine map": (nn.BatchNorm3d(3, affine=False), (2, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_statistics_saved_and_computed_anew_are_the_same(case: str) -> None:
    layer, shape = CASES[case]
    x = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = layer.double()(x.clone().requires_grad_())
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    for node in (output.grad_fn, None):
        found, spread = _statistics(node, x, layer.eps)
        oracle.assert_close(found, mean, 1e-12, case)
        oracle.assert_close(spread, (variance + layer.eps).rsqrt(), 1e-12, case)
