"""An uploaded picture, text or table as the inputs of a row: decoded within limits, never executed or unpickled."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from tracin.data import user_code
from tracin.errors import OptionError, TracinError
from tracin.explorer.faces import Face, Kind, face_of
from tracin.explorer.pages import Content
from tracin.plots.pictures import as_shown
from tracin.prefetch import reading
from tracin.study import Study, row_of

__all__ = ["LARGEST_BODY", "LARGEST_PICTURE", "Reading", "array_of", "reading_of", "table_of", "text_of"]

LARGEST_BODY = 4 << 20
"""Bytes of an upload."""
LARGEST_PICTURE = 16_000_000
"""Pixels of an uploaded picture."""
MOST_KEYS = 1_000
"""Keys of an uploaded table."""

_TARGET_KEYS = ("targets", "labels", "label", "target", "y")
_INPUT_KEYS = ("inputs", "input", "x", "images", "image", "text")
_SAMPLE = 256
_TOO_LARGE = f"the picture has more than {LARGEST_PICTURE / 1e6:.0f} million pixels. Make it smaller."

Decode = Callable[[bytes], tuple[Any, Face]]


@dataclass(frozen=True)
class Reading:
    """How uploads become rows of a study.

    Args:
        kind: What is taken.
        read: The inputs of a row, and what is shown of it, from a file.
        rows: A test set of one row, from inputs and a class.
    """

    kind: Kind
    read: Decode
    rows: Callable[[Any, int], Any]


def reading_of(study: Study, content: Content) -> Reading | str:
    """How uploads become rows of this study.

    Args:
        study: The study.
        content: What is known of its rows.

    Returns:
        It, or in a sentence why there is no upload.
    """
    if content.names is None:
        return "an upload has no label, and is explained for its predicted class: the task has no classes."
    if content.test.rows == 0 or content.train.rows == 0:
        return "there is no row to make an upload alike."
    try:
        with reading(), user_code("the datasets", [0]):
            template, first = row_of(study.test, 0), row_of(study.train, 0)
            shown = as_shown(study.shown("train", 0))
    except TracinError as error:
        return f"the first row cannot be read: {error}"
    why = _unlike(template)
    if why:
        return why
    rows = _rows_of(study.test, template)
    if study.read is not None:
        return _by_read(study, shown, rows)
    shape = _plain_pictures(study, content.train.rows, _inputs(first))
    if isinstance(shape, str):
        return shape
    if find_spec("PIL") is None:
        return "pictures need Pillow: pip install 'tracin[web]'"
    like = _inputs(first)

    def read(body: bytes) -> tuple[Any, Face]:
        picture = array_of(body, shape[-2:], grey=len(shape) == 2 or shape[0] == 1)
        pixels = torch.as_tensor(picture.copy()).to(like.dtype) / 255
        if len(shape) == 3:
            pixels = pixels[None] if picture.ndim == 2 else pixels.movedim(2, 0)
        return pixels, face_of(picture)

    return Reading("image", read, rows)


def _by_read(study: Study, shown: Any, rows: Callable[[Any, int], Any]) -> Reading:
    """By the study's own function, of the kind in which its rows are shown."""
    assert study.read is not None
    own = study.read
    kind: Kind = (
        "image" if isinstance(shown, np.ndarray) else "table" if isinstance(shown, Mapping) else "text"
    )

    def decoded(body: bytes) -> Any:
        if kind == "image":
            assert isinstance(shown, np.ndarray)
            return array_of(body, shown.shape[:2], grey=shown.ndim == 2)
        return table_of(body) if kind == "table" else text_of(body)

    def read(body: bytes) -> tuple[Any, Face]:
        value = decoded(body)
        with user_code("read", [0], "the upload"):
            return own(value), face_of(value)

    return Reading(kind, read, rows)


def _plain_pictures(study: Study, n: int, inputs: Any) -> tuple[int, ...] | str:
    """The shape of pictures that need no function of the study: floats from 0 to 1."""
    hint = "Give Study(read=lambda upload: inputs), which makes the inputs of a row of an upload."
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return f"the inputs of a row are no picture of floats. {hint}"
    shape = tuple(inputs.shape)
    grey = len(shape) == 2
    if not (grey or (len(shape) == 3 and shape[0] in (1, 3))) or min(shape[-2:]) < 2:
        return f"the inputs of a row have the shape {list(shape)}, and those of a picture [C, H, W] or [H, W]. {hint}"
    for row in range(0, n, max(1, n // _SAMPLE)):
        with reading(), user_code("the train dataset", [row]):
            values = _inputs(row_of(study.train, row))
        if tuple(values.shape) != shape:
            return f"training row {row} has another shape than row 0. {hint}"
        if not bool(((values >= 0) & (values <= 1)).all()):
            return f"training row {row} has values outside 0 to 1, so that it was made of a picture in some other way. {hint}"
    return shape


def _inputs(row: Any) -> Any:
    if isinstance(row, Mapping):
        return next((row[key] for key in _INPUT_KEYS if key in row), None)
    return row[0] if isinstance(row, tuple | list) and row else None


def _unlike(row: Any) -> str:
    """Why no row like this can be made of inputs alone; nothing if one can."""
    if isinstance(row, Mapping):
        label = next((row[key] for key in _TARGET_KEYS if key in row), None)
        told = f"keys {', '.join(map(str, row))}"
    else:
        label = row[1] if isinstance(row, tuple | list) and len(row) == 2 else None
        told = type(row).__name__
    one = label is not None and getattr(label, "numel", lambda: 1)() == 1
    if one:
        return ""
    return f"a test row is no pair (inputs, label) and no dict with both ({told}), so none can be made of inputs alone."


def _rows_of(data: Any, template: Any) -> Callable[[Any, int], Any]:
    """Makes a test set of one row like the template."""

    def rows(inputs: Any, label: int) -> Any:
        row = _row(template, inputs, label)
        if isinstance(data, DataLoader):
            return DataLoader([row], batch_size=1, collate_fn=data.collate_fn)  # type: ignore[arg-type]
        if isinstance(data, tuple | Mapping):
            return pytree.tree_map(lambda leaf: torch.as_tensor(leaf)[None], row)
        return [row]

    return rows


def _row(template: Any, inputs: Any, label: int) -> Any:
    if isinstance(template, Mapping):
        target = next(key for key in _TARGET_KEYS if key in template)
        key = next((key for key in _INPUT_KEYS if key in template), None)
        mine = dict(inputs) if isinstance(inputs, Mapping) else {key: inputs}
        return {**template, **mine, target: _like(template[target], label)}
    return type(template)((inputs, _like(template[1], label)))


def _like(value: Any, label: int) -> Any:
    if isinstance(value, Tensor):
        return torch.full_like(value, label)
    return np.full_like(value, label) if isinstance(value, np.ndarray | np.generic) else label


def array_of(body: bytes, size: tuple[int, ...], *, grey: bool) -> np.ndarray:
    """A PNG or JPEG file as bytes of a given size; cut at the edges where its proportions are others.

    Args:
        body: The file.
        size: Height and width.
        grey: One channel in place of three.

    Returns:
        [H, W] or [H, W, 3], uint8.

    Raises:
        OptionError: It is no such file, damaged, or larger than ``LARGEST_PICTURE``.
    """
    from PIL import Image

    refused = OptionError("this is no PNG or JPEG picture, or a damaged one. Send another file.")
    try:
        return _decoded(body, size, grey)
    except OptionError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise OptionError(_TOO_LARGE) from error
    except (OSError, SyntaxError, ValueError, EOFError, ArithmeticError) as error:
        raise refused from error


def _decoded(body: bytes, size: tuple[int, ...], grey: bool) -> np.ndarray:
    """The picture; its size is looked at before any pixel is decoded."""
    from PIL import Image, ImageOps

    height, width = size
    with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as opened:
        if opened.width * opened.height > LARGEST_PICTURE:
            raise OptionError(_TOO_LARGE)
        opened.load()
        picture = _eight_bits(ImageOps.exif_transpose(opened))
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture.convert("L" if grey else "RGB")).copy()


def _eight_bits(picture: Any) -> Any:
    """Deep grey scaled to bytes, palettes resolved, opacity laid over white."""
    from PIL import Image

    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return picture if picture.mode in {"L", "RGB"} else picture.convert("RGB")


def text_of(body: bytes) -> str:
    """A text file.

    Args:
        body: The file.

    Returns:
        The text.

    Raises:
        OptionError: It is empty, or not UTF-8.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"the text is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    if not text.strip():
        raise OptionError("the text is empty.")
    return text


def table_of(body: bytes) -> dict[str, Any]:
    """A JSON object of plain values.

    Args:
        body: The file.

    Returns:
        The values by name.

    Raises:
        OptionError: It is something else.
    """
    try:
        found = json.loads(text_of(body), parse_constant=_no_constant)
    except OptionError:
        raise
    except (ValueError, RecursionError) as error:
        raise OptionError('this is no JSON. Send an object such as {"age": 41}.') from error
    plain = isinstance(found, dict) and 0 < len(found) <= MOST_KEYS
    if not plain or not all(isinstance(value, str | int | float | None) for value in found.values()):
        raise OptionError(
            f'send a JSON object of 1 to {MOST_KEYS} numbers, texts, true, false or null, such as {{"age": 41}}.'
        )
    return found


def _no_constant(name: str) -> None:
    raise OptionError(f"{name} is no JSON value. Use null.")
