"""Matrices of random signs that need no memory of their own: any part can be made again from a key.

Column k of a matrix is read from a counter-based generator (Philox, Salmon et al. 2011) at a place that depends on k
alone, so that a matrix is the same on every device, whether it is made whole, in tiles, or for a few columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tracin.shapes import Int, Shaped

__all__ = ["Signs", "key_of"]

# Entries of the largest table that is kept, or made at once.
TILE = 1 << 24
# Columns that are made together where single ones are asked for.
_RUN = 1024


def key_of(*words: object) -> int:
    """A key of 128 bits from any words: the same in every process and on every machine."""
    text = "\0".join(str(word) for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


class Signs:
    r"""A matrix S [width, size] of independent entries ±scale, held transposed, [size, width].

    Args:
        size: Columns, the length of the vectors that S is applied to.
        width: Rows, the length of the result.
        key: Which matrix; see ``key_of``.
        scale: The size of an entry; :math:`1/\sqrt{width}` makes E[SᵀS] the identity.

    Example:
        >>> signs = Signs(size=5, width=4, key=key_of(0, "weight"), scale=0.5)
        >>> torch.equal(signs.apply(torch.eye(5)), signs.table(0, 5, torch.empty(0)))
        True
    """

    def __init__(self, size: int, width: int, key: int, scale: float) -> None:
        self.size, self.width, self.key, self.scale = size, width, key, scale
        self._kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def table(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Columns ``start`` to ``stop`` of S, transposed.

        Args:
            start: First column.
            stop: The column after the last.
            like: A tensor of the dtype and on the device that are wanted.

        Returns:
            Entries [stop − start, width].
        """
        if self.size * self.width > TILE:
            return self._made(start, stop, like)
        place = (like.dtype, like.device)
        if place not in self._kept:
            self._kept[place] = self._made(0, self.size, like)
        return self._kept[place][start:stop]

    def apply(self, x: Shaped[Tensor, "... size"]) -> Shaped[Tensor, "... width"]:
        """S x for every vector in x.

        Args:
            x: Vectors [..., size].

        Returns:
            [..., width].
        """
        out: Tensor | None = None
        for start, stop in self.tiles():
            part = x[..., start:stop] @ self.table(start, stop, x)
            out = part if out is None else out.add_(part)
        return x.new_zeros(*x.shape[:-1], self.width) if out is None else out

    def at(self, index: Int[Tensor, "*shape"], like: Tensor) -> Shaped[Tensor, "*shape width"]:
        """The columns of S with these numbers.

        Args:
            index: Column numbers.
            like: A tensor of the dtype and on the device that are wanted.

        Returns:
            [*index.shape, width].
        """
        if self.size * self.width <= TILE:
            return self.table(0, self.size, like)[index]
        used, places = index.unique(return_inverse=True)
        runs = [
            self._made(run * _RUN, min((run + 1) * _RUN, self.size), like)[used[used // _RUN == run] % _RUN]
            for run in (used // _RUN).unique().tolist()
        ]
        return torch.cat(runs)[places]

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Ranges of columns whose tables stay below ``TILE`` entries."""
        step = max(1, TILE // self.width)
        for start in range(0, self.size, step):
            yield start, min(start + step, self.size)

    def _made(self, start: int, stop: int, like: Tensor) -> Tensor:
        words = -(-self.width // 64)  # of 64 signs, per column
        stream = np.random.Philox(key=self.key)
        before, skipped = divmod(start * words, 4)  # a step of the counter makes four words
        stream.advance(before)
        raw = stream.random_raw(skipped + (stop - start) * words)[skipped:]
        bits = np.unpackbits(raw.astype("<u8").view(np.uint8), bitorder="little")
        bits = np.ascontiguousarray(bits.reshape(stop - start, words * 64)[:, : self.width])
        values = torch.from_numpy(bits).to(like.device).to(like.dtype)
        return values.mul_(2 * self.scale).sub_(self.scale)
