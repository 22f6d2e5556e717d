"""What a row looks like: any array to a picture of bytes, anything else to text."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from tracin.errors import DataError

__all__ = ["Shown", "as_picture", "as_shown", "plain", "png_bytes"]

Shown = np.ndarray | str | Mapping[str, str]
"""A uint8 picture (H×W grey or H×W×3), a text, or a table of keys and values."""

_CHANNELS = (1, 3, 4)
_DARKEST_BYTE_RANGE = 64


def as_shown(value: Any) -> Shown:
    """What ``Study.render`` returns, made ready to draw.

    A two- or three-dimensional array or tensor becomes a picture, a mapping a table of strings, a short
    array of numbers its numbers, anything else its text.

    Args:
        value: Anything.

    Returns:
        A uint8 picture, a text, or a dict of strings.

    Raises:
        DataError: An array that is no picture.

    Example:
        >>> as_shown({"age": 41.5, "sex": "f"})
        {'age': '41.5', 'sex': 'f'}
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        value = (
            value.detach().cpu().float().numpy()
            if value.is_floating_point()
            else value.detach().cpu().numpy()
        )
    elif hasattr(value, "__array__") and not isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.ndim >= 2:
        return as_picture(value)
    return plain(value)


def plain(value: Any) -> str:
    """A number in at most four digits, a short array as its numbers, anything else as its text."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(entry) for entry in value)
    return "" if value is None else str(value)


def as_picture(array: np.ndarray) -> np.ndarray:
    """An array as a picture of bytes: H×W grey or H×W×3 colour.

    The channels may come last or first; a fourth one is opacity, laid over white. The range is read
    from the numbers: bytes as they are; 0 to 1 and −1 to 1 as fractions of the full range; whole numbers
    that fill most of 0 to 255 as bytes; anything else is stretched from its least to its largest value.

    Args:
        array: H×W, H×W×C or C×H×W with C = 1, 3 or 4, of any real dtype.

    Returns:
        A uint8 array, H×W or H×W×3.

    Raises:
        DataError: A shape that is no picture, no pixels, or entries that aren't numbers.

    Example:
        >>> as_picture(np.array([[0.0, 0.5], [1.0, 0.25]])).tolist()
        [[0, 128], [255, 64]]
    """
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_) or np.iscomplexobj(array):
        raise DataError(
            f"a picture holds real numbers, got an array of {array.dtype}; render such rows as text"
        )
    pixels = channels_last(array)
    if pixels.size == 0:
        raise DataError(f"a picture needs pixels, got the shape {array.shape}")
    scaled = full_range(pixels)
    if scaled.ndim == 3 and scaled.shape[2] == 4:
        opacity = scaled[..., 3:] / 255.0
        scaled = scaled[..., :3] * opacity + 255.0 * (1.0 - opacity)
    return np.rint(scaled).astype(np.uint8)


def channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        return array
    if array.ndim == 3:
        first, last = array.shape[0], array.shape[2]
        if (first in {1, 3} and last not in {1, 3}) or (first in _CHANNELS and last not in _CHANNELS):
            array = np.moveaxis(array, 0, 2)
        if array.shape[2] == 1:
            return array[..., 0]
        if array.shape[2] in _CHANNELS:
            return array
    raise DataError(
        f"a picture is H×W, H×W×3 or 3×H×W, got the shape {array.shape}; let render return one of these"
    )


def full_range(pixels: np.ndarray) -> np.ndarray:
    """The numbers spread over 0 to 255, as float64."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float64)
    values = pixels.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if low >= 0.0 and high <= 1.0:
        return values * 255.0
    if low >= -1.0 and high <= 1.0:
        return (values + 1.0) * 127.5
    if np.issubdtype(pixels.dtype, np.integer) and low >= 0 and _DARKEST_BYTE_RANGE <= high <= 255:
        return values
    if high == low:
        return np.full_like(values, 127.5)
    # In halves, which are exact: the distance of the two ends can be more than the largest number.
    return (values / 2 - low / 2) / (high / 2 - low / 2) * 255.0


def png_bytes(picture: np.ndarray) -> bytes:
    """A uint8 picture (H×W or H×W×3) as a PNG file. The same picture gives the same bytes."""
    height, width = picture.shape[:2]
    colour_type = 0 if picture.ndim == 2 else 2
    lines = picture.reshape(height, -1)
    unfiltered = np.concatenate([np.zeros((height, 1), dtype=np.uint8), lines], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, body) for kind, body in chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
