"""torch's switches of arithmetic: in full float32 within a run, as they were afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import tracin
from scoring.common import M, N, method, net, rows, task, trajectory
from tracin.errors import OptionError
from tracin.scoring.arithmetic import Digits, digits, exact_products, full_float32, require_arithmetic

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BACKENDS: Any = torch.backends


def _switches() -> list[Any]:
    cuda, cudnn, mkldnn = BACKENDS.cuda, BACKENDS.cudnn, BACKENDS.mkldnn
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _state() -> dict[str, Any]:
    return {
        "new": [switch.fp32_precision for switch in _switches()],
        "benchmark": BACKENDS.cudnn.benchmark,
        "deterministic": BACKENDS.cudnn.deterministic,
        "reduced": BACKENDS.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "matmul": _asked(torch.get_float32_matmul_precision),
        "cublas": _asked(lambda: BACKENDS.cuda.matmul.allow_tf32),
        "cudnn": _asked(lambda: BACKENDS.cudnn.allow_tf32),
    }


def _asked(switch: Any) -> Any:
    try:
        return switch()
    except RuntimeError:
        return "at odds"


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """The switches as they were before the test."""
    before = _state()
    yield
    torch.set_float32_matmul_precision(before["matmul"])
    BACKENDS.cudnn.allow_tf32 = before["cudnn"]
    BACKENDS.cudnn.benchmark, BACKENDS.cudnn.deterministic = before["benchmark"], before["deterministic"]
    for switch, value in zip(_switches(), before["new"], strict=True):
        switch.fp32_precision = value
    assert _state() == before


def _as_it_is() -> None:
    pass


def _older() -> None:
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cudnn.benchmark = True


def _newer() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    BACKENDS.cudnn.rnn.fp32_precision = "ieee"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("chosen", [_as_it_is, _older, _newer])
def test_switches_are_strict_inside_and_given_back(chosen: Any, device: torch.device) -> None:
    chosen()
    before = _state()
    found: list[dict[str, Any]] = []
    with pytest.raises(ZeroDivisionError):
        _seen(device, found)
    (inside,) = found
    strict = inside["new"] if device == CUDA else [inside["new"][0], *inside["new"][3:]]
    assert set(strict) <= {"none", "ieee"}
    if device == CUDA:
        assert (inside["benchmark"], inside["deterministic"], inside["reduced"]) == (False, True, False)
        assert (inside["matmul"], inside["cublas"]) == ("highest", False)
        assert inside["cudnn"] is False or before["cudnn"] == "at odds"
    assert _state() == before


def _seen(device: torch.device, found: list[dict[str, Any]]) -> None:
    """The switches within a run that fails."""
    with full_float32(device):
        found.append(_state())
        raise ZeroDivisionError


def test_runs_of_two_threads_share_the_switches() -> None:
    torch.set_float32_matmul_precision("medium")
    before = _state()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_float32(CPU):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with full_float32(CPU):
        thread.start()
        assert entered.wait(10)
    assert torch.get_float32_matmul_precision() == "highest", "the other run is not over"
    leave.set()
    thread.join()
    assert _state() == before


def test_loose_switches_of_the_caller_change_no_score() -> None:
    x, y = rows(N, 1, torch.float32)
    asked = (x[:M], y[:M])
    chosen = method_of(torch.float32)
    plain = chosen.influence((x, y), asked).values
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(chosen.influence((x, y), asked).values, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(chosen.influence((x, y), asked).values, plain)
        assert torch.is_autocast_enabled("cpu")


def method_of(dtype: torch.dtype) -> Any:

    return tracin.TracInCP(task(net(0, dtype)), trajectory(dtype), batch_size=4, device="cpu", progress=False)


def test_what_a_device_cannot_compute_in_is_refused() -> None:
    floats, doubles = frozenset({torch.float32}), frozenset({torch.float64})
    mps = torch.device("mps")
    with pytest.raises(OptionError, match=r"normalize=True computes lengths in float64.*device='cpu'"):
        require_arithmetic(mps, "float32", floats, True)
    with pytest.raises(OptionError, match="runs on the CPU and on CUDA, not on mps"):
        require_arithmetic(mps, "bfloat16", floats, False)
    with pytest.raises(OptionError, match="changes nothing in a float64 model"):
        require_arithmetic(CPU, "bfloat16", doubles, False)
    require_arithmetic(mps, "float32", floats, False)
    require_arithmetic(CPU, "bfloat16", floats, True)


def test_a_float64_model_under_bfloat16_is_refused() -> None:
    with pytest.raises(OptionError, match="float64 model"):
        method(precision="bfloat16").influence(rows(N, 1), rows(M, 2))


def test_a_switch_that_follows_another_goes_on_to() -> None:
    before = BACKENDS.fp32_precision
    try:
        BACKENDS.mkldnn.matmul.fp32_precision = "none"
        BACKENDS.mkldnn.conv.fp32_precision = "ieee"
        BACKENDS.fp32_precision = "tf32"
        assert BACKENDS.mkldnn.matmul.fp32_precision == "tf32"
        with full_float32(CPU):
            assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
        BACKENDS.fp32_precision = "bf16"
        assert BACKENDS.mkldnn.matmul.fp32_precision == "bf16"
        assert BACKENDS.mkldnn.conv.fp32_precision == "ieee"
    finally:
        BACKENDS.fp32_precision = before


def test_digits_that_float32_keeps() -> None:
    assert digits(CPU) == Digits(torch.float32, torch.float32, torch.float32)
    assert digits(torch.device("meta")).full
    assert isinstance(exact_products(CPU), nullcontext)
    _newer()
    assert digits(CPU) == Digits(torch.bfloat16, torch.float32, torch.float32)
    assert digits(torch.device("cuda")).matmul == torch.float16
    with exact_products(CPU):
        assert digits(CPU).full
    assert not digits(CPU).full


def test_autocast_is_off_where_products_are_exact() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with exact_products(CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
