"""When two gradients agree: relative to the reference, with a floor where the reference is rounding noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradients.common import build, keys_of, normal, source_of, traced, wired
from tracin.gradients.agreement import TOLERANCE, accumulation_dtype, relative_error, tolerance
from tracin.gradients.check import checked_gradients

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
def test_the_error_is_relative_to_the_reference(dtype: torch.dtype) -> None:
    reference = normal(50, seed=1, dtype=dtype) * 1e-2
    norm = float(reference.double().norm())
    estimate = reference.double() * 1.25
    error = relative_error(estimate, reference, dtype, norm, norm)
    assert error == pytest.approx(0.25, rel=1e-3)
    assert relative_error(reference, reference, dtype, norm, norm) == 0.0
    assert relative_error(torch.zeros_like(reference), reference, dtype, norm, norm) == pytest.approx(1.0)
    assert relative_error(-reference, reference, dtype, norm, norm) == pytest.approx(2.0)


@dtypes
def test_the_tolerance_lies_between_rounding_and_a_mistake(dtype: torch.dtype) -> None:
    assert 10 * torch.finfo(dtype).eps < tolerance(dtype) < 0.5
    if dtype in {torch.float64, torch.float32}:
        assert tolerance(dtype) < 1e-3, "a factor of 1.001 is a mistake"
    assert tolerance(torch.float64) < tolerance(torch.float32) < tolerance(torch.float16)


@dtypes
def test_noise_far_below_the_total_is_no_error(dtype: torch.dtype) -> None:
    """A gradient that cancels to rounding noise agrees with other noise of its size, but not with a real gradient."""
    eps, total = torch.finfo(dtype).eps, 100.0
    noise = torch.full((4,), eps * total)
    assert relative_error(-noise, noise, dtype, 0.0, total) <= tolerance(dtype)
    real = torch.full((4,), 100 * eps * total)
    assert relative_error(real, noise, dtype, 0.0, total) > tolerance(dtype)
    assert relative_error(-noise, noise, dtype, 0.0, 0.0) == pytest.approx(2.0), (
        "without a scale there is no floor"
    )


def test_nothing_against_nothing_and_something() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert relative_error(zero, zero, torch.float32, 0.0, 0.0) == 0.0
    assert relative_error(one, zero, torch.float32, 0.0, 0.0) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_never_agrees(value: float) -> None:
    one = torch.ones(3)
    broken = torch.tensor([1.0, value, 1.0])
    assert relative_error(broken, one, torch.float32, 1.0, 1.0) == math.inf
    assert not relative_error(one, broken, torch.float32, 1.0, 1.0) <= tolerance(torch.float32)
    assert not relative_error(broken, broken, torch.float32, 1.0, 1.0) <= tolerance(torch.float32)


def test_the_wider_dtype_adds_up() -> None:
    assert accumulation_dtype(torch.float64) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert accumulation_dtype(dtype) == torch.float32


def test_a_dtype_without_an_entry_is_held_to_float32() -> None:
    assert tolerance(torch.float8_e4m3fn) == tolerance(torch.float32)


class Attention(nn.Module):
    """Query, key and value by layers of their own: the key's bias shifts all logits of a query alike."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT / 4).softmax(-1)
        return weights @ self.value(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_key_bias_of_attention_does_not_fail(dtype: torch.dtype) -> None:
    """Its true gradient is zero; what autograd gives is noise, and so is ours."""
    source = wired(source_of(build(Attention, dtype), (normal(20, 6, 16, seed=1, dtype=dtype),)))
    batch = next(iter(source.rows.batches()))
    checked_gradients(source, keys_of(source), batch, batch.value, traced(source), first=True)
    assert source.wiring is not None
    for name in traced(source):
        assert source.wiring.route(name) == "rule Linear", f"{name}: {source.wiring.reasons.get(name)}"
