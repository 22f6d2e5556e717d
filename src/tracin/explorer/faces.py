"""What is shown of a row: a small PNG picture, a text, or a table. Text stays text: nothing here makes markup."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from tracin.errors import TracinError
from tracin.plots.pictures import as_shown, png_bytes
from tracin.prefetch import reading
from tracin.study import Study

__all__ = ["ABSENT", "KINDS", "Face", "Faces", "LiveFaces", "face_of"]

Kind = Literal["image", "text", "table"]
KINDS: tuple[Kind, ...] = ("image", "text", "table")

LARGEST, FEW_PIXELS = 320, 64
"""Pictures are made no larger than the first, and drawn pixel by pixel up to the second."""
LONGEST = 4_000
"""Characters of a text that a card holds."""
ROOM = 64 << 20
"""Bytes of faces held at a time."""


@dataclass(frozen=True)
class Face:
    """What is shown of a row.

    Args:
        kind: What ``data`` is.
        data: A PNG file; UTF-8 text; or a JSON list of pairs.
        pixels: The picture is so small that each pixel is to be seen.
    """

    kind: Kind
    data: bytes
    pixels: bool = False

    def told(self, src: str, alt: str) -> dict[str, Any]:
        """The face as the page reads it.

        Args:
            src: Where a picture can be fetched.
            alt: What a picture is, in words.

        Returns:
            A JSON object.
        """
        if self.kind == "image":
            return {"kind": "image", "src": src, "pixels": self.pixels, "alt": alt}
        if self.kind == "table":
            return {"kind": "table", "rows": json.loads(self.data)}
        return {"kind": "text", "text": self.data.decode("utf-8", "replace")}

    @property
    def words(self) -> str:
        """What a search looks through."""
        if self.kind == "image":
            return ""
        if self.kind == "table":
            return " ".join(f"{key} {value}" for key, value in json.loads(self.data))
        return self.data.decode("utf-8", "replace")

    @property
    def tag(self) -> str:
        """A short name of the content."""
        return blake2b(self.data, digest_size=8).hexdigest()


ABSENT = Face("text", b"not kept")
"""What stands for a row whose face is not known."""


@runtime_checkable
class Faces(Protocol):
    """The faces of the rows of both sides."""

    def of(self, side: str, row: int) -> Face:
        """The face of a row that exists."""
        ...


def face_of(value: Any) -> Face:
    """Anything that can be shown as a face.

    Args:
        value: What ``Study.render`` may return: a picture array, a text, or a mapping.

    Returns:
        The face.

    Example:
        >>> face_of({"age": 41.5}).told("", "")
        {'kind': 'table', 'rows': [['age', '41.5']]}
    """
    shown = as_shown(value)
    if isinstance(shown, np.ndarray):
        return Face("image", png_bytes(smaller(shown)), max(shown.shape[:2]) <= FEW_PIXELS)
    if isinstance(shown, Mapping):
        pairs = [[key, cut(text)] for key, text in shown.items()]
        return Face("table", json.dumps(pairs, ensure_ascii=False).encode("utf-8", "replace"))
    return Face("text", cut(str(shown)).encode("utf-8", "replace"))


def cut(text: str) -> str:
    """The text, or its beginning where it is long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def smaller(picture: np.ndarray) -> np.ndarray:
    """A picture of bytes in a size fit for a card."""
    height, width = picture.shape[:2]
    if max(height, width) <= LARGEST:
        return picture
    from PIL import Image

    scale = LARGEST / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


class LiveFaces:
    """Faces made of a study's rows when they are asked for; the last ones are held."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._held: OrderedDict[tuple[str, int], Face] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def of(self, side: str, row: int) -> Face:
        """The face of a row; where the user's code fails, the failure in words.

        Args:
            side: ``"train"`` or ``"test"``.
            row: The row's position.

        Returns:
            The face.
        """
        key = (side, row)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        face = self._made(side, row)
        with self._lock:
            if key not in self._held:
                self._held[key] = face
                self._size += len(face.data)
            while self._size > ROOM:
                self._size -= len(self._held.popitem(last=False)[1].data)
        return face

    def _made(self, side: str, row: int) -> Face:
        try:
            with reading():
                return face_of(self._study.shown("train" if side == "train" else "test", row))
        except TracinError as error:
            return Face("text", cut(f"cannot be shown: {error}").encode("utf-8", "replace"))
