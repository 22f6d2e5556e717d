"""Switches of torch that change numbers, set for the time of a run and given back afterwards.

Exact products need float32 in full: TF32 keeps 10 bits of 23, and convolutions on CUDA use it unless told otherwise. The
same numbers on every run need convolution algorithms that are chosen by shape, not by a clock. Autocast that the caller has
on would round the products; a run opens its own where ``precision`` asks for it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch

from tracin.errors import OptionError
from tracin.gradients.precision import autocast, cast_of, current_cast

__all__ = ["Digits", "digits", "exact_products", "full_float32", "require_arithmetic"]

STRICT = ("none", "ieee")
# TF32 keeps as many digits as float16.
KEPT = {"tf32": torch.float16, "bf16": torch.bfloat16}


def require_arithmetic(
    device: torch.device, precision: str, dtypes: frozenset[torch.dtype], normalize: bool
) -> None:
    """Refuse what the device, or the model, cannot compute in.

    Args:
        device: Where the run takes place.
        precision: ``"float32"`` or ``"bfloat16"``.
        dtypes: The traced parameters' dtypes.
        normalize: Whether cosines are asked for, which are computed in float64.

    Raises:
        OptionError: No float64 on MPS, no bfloat16 on this device, or a float64 model, which autocast leaves as it is.
    """
    if device.type == "mps" and normalize:
        raise OptionError(
            "normalize=True computes lengths in float64, which MPS does not have. Use device='cpu', or normalize=False."
        )
    cast = cast_of(precision)
    if cast is None:
        return
    if dtypes == {torch.float64}:
        raise OptionError(
            "precision='bfloat16' changes nothing in a float64 model: autocast casts float32 alone. Use model.float(), or "
            "precision='float32'."
        )
    if device.type not in ("cpu", "cuda"):
        raise OptionError(
            f"precision='bfloat16' runs on the CPU and on CUDA, not on {device}. Use precision='float32'."
        )
    try:
        with autocast(device.type, cast):
            pass
    except RuntimeError as error:
        raise OptionError(
            f"precision='bfloat16' cannot be used on {device}: {str(error).splitlines()[0]} Use precision='float32'."
        ) from error


@dataclass(frozen=True)
class Digits:
    """The dtypes whose digits float32 products keep: float32, float16 (under TF32), or bfloat16."""

    matmul: torch.dtype
    convolution: torch.dtype
    recurrent: torch.dtype

    @property
    def full(self) -> bool:
        """Whether all are float32."""
        return set(astuple(self)) == {torch.float32}


def digits(device: torch.device) -> Digits:
    """What the switches of the moment make of float32 products on a device.

    Args:
        device: Where they are computed.

    Returns:
        The dtypes, by the kind of operation.

    Example:
        >>> digits(torch.device("cpu")).full
        True
    """
    backends: Any = torch.backends
    if device.type == "cuda":
        switches = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    elif device.type == "cpu":
        switches = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    else:
        return Digits(torch.float32, torch.float32, torch.float32)
    return Digits(*(KEPT.get(switch.fp32_precision, torch.float32) for switch in switches))


def exact_products(device: torch.device) -> AbstractContextManager[object]:
    """``full_float32`` where the caller's switches or autocast would round products, and nothing where they do not.

    Args:
        device: Where the products are computed.

    Returns:
        The context, cheap enough for once per layer.
    """
    if current_cast(device.type) is None and digits(device).full:
        return nullcontext()
    return full_float32(device)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Full float32, deterministic convolutions and no autocast of the caller's on a device, within the block.

    Runs of several threads share the switches: the first one sets them, the last one gives them back.

    Args:
        device: Where the run takes place.
    """
    kind = device.type
    with ExitStack() as stack:
        if kind in ("cpu", "cuda", "mps") and torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        with _LOCK:
            count, back = _HELD.get(kind, (0, []))
            if count == 0:
                back = _set_all(kind)
            _HELD[kind] = (count + 1, back)
        try:
            yield
        finally:
            with _LOCK:
                count, back = _HELD[kind]
                _HELD[kind] = (count - 1, back)
                if count == 1:
                    _restore(back)


Restore = list[Callable[[], object]]
_LOCK = threading.Lock()
_HELD: dict[str, tuple[int, Restore]] = {}


def _set_all(kind: str) -> Restore:
    """Set the switches; what gives them back, in that order."""
    back: Restore = []
    backends: Any = torch.backends
    switches = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn, backends.cuda.matmul]
    if kind == "cuda":
        switches += [backends.cudnn.conv, backends.cudnn.rnn]
    before = [(switch, switch.fp32_precision) for switch in switches]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its older switches deprecated
        # The older switches first, so that reading either kind within the block does not find them at odds.
        matmul = _read(torch.get_float32_matmul_precision)
        if matmul not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
            back.append(lambda: torch.set_float32_matmul_precision(matmul))
        if kind == "cuda":
            if _read(lambda: backends.cudnn.allow_tf32):
                back += _changed(backends.cudnn, "allow_tf32", to=False)
            back += _changed(backends.cudnn, "benchmark", to=False)
            back += _changed(backends.cudnn, "deterministic", to=True)
            if backends.cuda.matmul.allow_bf16_reduced_precision_reduction:
                back += _changed(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", to=False)
        for switch, value in before:
            if switch.fp32_precision not in STRICT:
                switch.fp32_precision = "ieee"
            back.append(lambda switch=switch, value=value: _put_back(switch, value))
    return back


def _read(switch: Callable[[], Any]) -> Any:
    """An older switch, or None where a newer one contradicts it and torch refuses to say."""
    try:
        return switch()
    except RuntimeError:
        return None


def _changed(owner: Any, name: str, *, to: bool) -> Restore:
    before = getattr(owner, name)
    if before == to:
        return []
    setattr(owner, name, to)
    return [lambda: setattr(owner, name, before)]


def _put_back(switch: Any, value: str) -> None:
    switch.fp32_precision = "none"  # as the switch above it says, and goes on to say if that one is moved
    if switch.fp32_precision != value:
        switch.fp32_precision = value


def _restore(back: Restore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in back:
            step()
