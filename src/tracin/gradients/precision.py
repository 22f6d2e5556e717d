"""Arithmetic of the forward and backward pass: as the model is, or under autocast to bfloat16.

Autocast runs without its cache of cast weights: with it, the graph reads a weight once however often a layer is called,
and the number of reads is what tells the routes apart (``wiring``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["PRECISIONS", "autocast", "cast_of", "current_cast"]

PRECISIONS = ("float32", "bfloat16")

# Devices whose autocast is asked for.
CASTING = ("cpu", "cuda", "mps")


def cast_of(precision: str) -> torch.dtype | None:
    """What autocast goes to under a precision; None where the model runs as it is.

    Args:
        precision: One of ``PRECISIONS``.

    Returns:
        The dtype.

    Example:
        >>> cast_of("bfloat16")
        torch.bfloat16
    """
    return None if precision == "float32" else torch.bfloat16


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast on a device without its cache; nothing where no dtype is given.

    Args:
        device_type: Such as ``"cuda"``.
        dtype: What to cast to.

    Returns:
        The context.
    """
    if dtype is None:
        return nullcontext()
    return torch.autocast(device_type, dtype=dtype, cache_enabled=False)


def current_cast(device_type: str) -> torch.dtype | None:
    """What autocast casts to here and now on a device; None where it is off."""
    if device_type not in CASTING or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
