r"""How a batch of per-example gradients of one parameter (or a weight with its bias) is held.

For a layer used t times per example the gradient of example n is :math:`\sum_t \delta_{nt} \otimes a_{nt}`.

- ``Outer``: the two factors, a [n, t, i] and δ [n, t, o]; a bias is one more column of a.
- ``Rows``: the touched rows of an embedding, index [n, t] and δ [n, t, o].
- ``Dense``: multiplied out, [n, p].
- ``Convolution`` and ``Filters``, in ``pictures``.
- ``Sum``: several of these for one parameter (a weight shared by two modules): cross terms count.

Every block knows ``squared_norm() [n]``, ``materialise() [n, p]``, ``total() [p]``, ``scaled(rates)`` and
``weighted(weights)``; ``products`` multiplies two of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tracin.shapes import Float, Int

__all__ = [
    "TILE",
    "Block",
    "Dense",
    "MultipliedOut",
    "Outer",
    "Rows",
    "Sum",
    "add_rows",
    "tiles",
    "total_bytes",
]

# Largest temporary that one product makes, in elements: 7 Mi float32 are 28 MiB. From 32 MiB on glibc asks the system for
# every block anew.
TILE = 7 << 20


class Block(ABC):
    """Per-example gradients of one parameter, or of a weight and its bias."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples n."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that the block holds."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of parameters p."""

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """The squared norm of each example's gradient, [n]."""

    @abstractmethod
    def materialise(self) -> Tensor:
        """Multiplied out, [n, p]; the weight's entries first, then the bias's."""

    @abstractmethod
    def total(self) -> Tensor:
        """The sum over examples, [p]."""

    @abstractmethod
    def scaled(self, rates: Sequence[float]) -> Block:
        """Each parameter's gradient times its rate (one rate per parameter that the block holds)."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Block:
        """Each example's gradient times its weight, weights [n]."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Block:
        """Examples ``start`` to ``stop``."""

    def pieces(self) -> tuple[Tensor, ...]:
        """``materialise`` in columns that follow one another, where they are made faster apart."""
        return (self.materialise(),)


def total_bytes(*tensors: Tensor) -> int:
    """Memory of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def tiles(n: int, per_row: int) -> Iterator[tuple[int, int]]:
    """Row ranges whose temporaries of ``per_row`` elements a row stay below ``TILE``."""
    step = max(1, TILE // max(per_row, 1))
    for start in range(0, n, step):
        yield start, min(start + step, n)


@dataclass(frozen=True)
class MultipliedOut(Block):
    """Every entry of every gradient, values [n, p]; their order is up to the kind."""

    values: Float[Tensor, "n p"]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        return total_bytes(self.values)

    @property
    def size(self) -> int:
        return self.values.shape[1]

    def squared_norm(self) -> Float[Tensor, " n"]:
        return torch.linalg.vector_norm(self.values, dim=1).square()


@dataclass(frozen=True)
class Dense(MultipliedOut):
    """In the parameters' own order; ``splits`` are the sizes of the parameters where there are several."""

    splits: tuple[int, ...] | None = None

    def materialise(self) -> Float[Tensor, "n p"]:
        return self.values

    def total(self) -> Float[Tensor, " p"]:
        return self.values.sum(0)

    def scaled(self, rates: Sequence[float]) -> Dense:
        if len(rates) != len(self.splits or (self.size,)):
            raise ValueError(
                f"{len(rates)} rates for a block of {len(self.splits or (self.size,))} parameters"
            )
        if len(set(rates)) == 1:
            return replace(self, values=self.values * rates[0])
        sizes = self.splits or (self.size,)
        filled = [self.values.new_full((size,), rate) for size, rate in zip(sizes, rates, strict=True)]
        return replace(self, values=self.values * torch.cat(filled))

    def weighted(self, weights: Tensor) -> Dense:
        return replace(self, values=self.values * weights.to(self.values.dtype)[:, None])

    def rows(self, start: int, stop: int) -> Dense:
        return replace(self, values=self.values[start:stop])


@dataclass(frozen=True)
class Outer(Block):
    """Two factors: a [n, t, i], δ [n, t, o]; ``bias`` is the value of the bias's column of a, None without a bias."""

    a: Float[Tensor, "n t i"]
    d: Float[Tensor, "n t o"]
    bias: float | None = None

    def __len__(self) -> int:
        return len(self.a)

    @property
    def nbytes(self) -> int:
        return total_bytes(self.a, self.d)

    @property
    def size(self) -> int:
        return (self.a.shape[2] + (self.bias is not None)) * self.d.shape[2]

    @property
    def uses(self) -> int:
        """Uses t of the layer within an example."""
        return self.a.shape[1]

    @property
    def norm_work(self) -> tuple[int, int]:
        """Multiplications of one example's norm by every two uses, and multiplied out."""
        (_, t, i), o = self.a.shape, self.d.shape[2]
        return t * t * (i + o), t * i * o

    def squared_norm(self) -> Float[Tensor, " n"]:
        (n, t, _), (paired, multiplied_out) = self.a.shape, self.norm_work
        if t == 1:
            squares = self.a.square().sum((1, 2)) + (self.bias or 0.0) ** 2
            return squares * self.d.square().sum((1, 2))
        if paired < multiplied_out:
            # ‖Σ_t δ_t ⊗ a_t‖² = Σ_ts (a_t·a_s)(δ_t·δ_s)
            parts = []
            for start, stop in tiles(n, 2 * t * t):
                a, d = self.a[start:stop], self.d[start:stop]
                gram = torch.bmm(a, a.mT) + (self.bias or 0.0) ** 2
                parts.append((gram * torch.bmm(d, d.mT)).sum((1, 2)))
            return torch.cat(parts).clamp_min(0.0)
        return _squared_norm_in_tiles(self)

    def materialise(self) -> Float[Tensor, "n p"]:
        n, t, i = self.a.shape
        o = self.d.shape[2]
        out = self.a.new_empty(n, self.size)
        weight = out[:, : o * i].view(n, o, i)
        if t == 1:
            torch.mul(self.d.mT, self.a, out=weight)
        else:
            torch.bmm(self.d.mT, self.a, out=weight)
        if self.bias is not None:
            torch.sum(self.d, 1, out=out[:, o * i :])
            if self.bias != 1.0:
                out[:, o * i :].mul_(self.bias)
        return out

    def pieces(self) -> tuple[Tensor, ...]:
        n, t, i = self.a.shape
        if t == 1 or self.bias is None:
            return super().pieces()
        # A batched product whose results do not lie side by side goes row by row, in up to twice the time.
        return torch.bmm(self.d.mT, self.a).view(n, self.d.shape[2] * i), self.d.sum(1) * self.bias

    def total(self) -> Float[Tensor, " p"]:
        a, d = self.a.flatten(0, 1), self.d.flatten(0, 1)
        weight = (d.mT @ a).reshape(-1)
        return weight if self.bias is None else torch.cat([weight, d.sum(0) * self.bias])

    def scaled(self, rates: Sequence[float]) -> Outer:
        if self.bias is None:
            (rate,) = rates
            return replace(self, d=self.d * rate)
        weight_rate, bias_rate = rates
        if weight_rate == bias_rate:
            return replace(self, d=self.d * weight_rate)
        return replace(self, a=self.a * weight_rate, bias=self.bias * bias_rate)

    def weighted(self, weights: Tensor) -> Outer:
        return replace(self, d=self.d * weights.to(self.d.dtype)[:, None, None])

    def rows(self, start: int, stop: int) -> Outer:
        return replace(self, a=self.a[start:stop], d=self.d[start:stop])


@dataclass(frozen=True)
class Rows(Block):
    """The touched rows of a table [v, o]: index [n, t], δ [n, t, o]."""

    index: Int[Tensor, "n t"]
    d: Float[Tensor, "n t o"]
    length: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        return total_bytes(self.index, self.d)

    @property
    def size(self) -> int:
        return self.length * self.d.shape[2]

    def squared_norm(self) -> Float[Tensor, " n"]:
        parts = []
        t = self.index.shape[1]
        for start, stop in tiles(len(self), 2 * t * t):
            index, d = self.index[start:stop], self.d[start:stop]
            same = index[:, :, None] == index[:, None, :]
            parts.append(torch.where(same, torch.bmm(d, d.mT), 0.0).sum((1, 2)))
        return torch.cat(parts).clamp_min(0.0)

    def materialise(self) -> Float[Tensor, "n p"]:
        values = self.d.new_zeros(len(self), self.size)
        self.add_to(values)
        return values

    def add_to(self, values: Float[Tensor, "n p"]) -> None:
        """Add the touched rows to gradients that are multiplied out, in place."""
        n, t, o = self.d.shape
        offset = torch.arange(n, device=self.index.device)[:, None] * self.length
        table = values.view(n * self.length, o)
        add_rows(table, (self.index + offset).reshape(-1), self.d.reshape(n * t, o))

    def total(self) -> Float[Tensor, " p"]:
        table = self.d.new_zeros(self.length, self.d.shape[2])
        return add_rows(table, self.index.reshape(-1), self.d.flatten(0, 1)).reshape(-1)

    def scaled(self, rates: Sequence[float]) -> Rows:
        (rate,) = rates
        return replace(self, d=self.d * rate)

    def weighted(self, weights: Tensor) -> Rows:
        return replace(self, d=self.d * weights.to(self.d.dtype)[:, None, None])

    def rows(self, start: int, stop: int) -> Rows:
        return replace(self, index=self.index[start:stop], d=self.d[start:stop])


@dataclass(frozen=True)
class Sum(Block):
    """One parameter's gradient as the sum of several blocks."""

    parts: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def size(self) -> int:
        return self.parts[0].size

    def squared_norm(self) -> Float[Tensor, " n"]:
        return _squared_norm_in_tiles(self)

    def materialise(self) -> Float[Tensor, "n p"]:
        tables = [part for part in self.parts if isinstance(part, Rows)]
        others = [part for part in self.parts if not isinstance(part, Rows)]
        first = others.pop() if others else tables.pop()
        total = first.materialise()
        if isinstance(first, MultipliedOut):  # which may have given its own values
            total = total.clone()
        for part in others:
            total += part.materialise()
        for table in tables:
            table.add_to(total)
        return total

    def total(self) -> Float[Tensor, " p"]:
        return torch.stack([part.total() for part in self.parts]).sum(0)

    def scaled(self, rates: Sequence[float]) -> Sum:
        return Sum(tuple(part.scaled(rates) for part in self.parts))

    def weighted(self, weights: Tensor) -> Sum:
        return Sum(tuple(part.weighted(weights) for part in self.parts))

    def rows(self, start: int, stop: int) -> Sum:
        return Sum(tuple(part.rows(start, stop) for part in self.parts))


def add_rows(table: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Add rows to a table in place, in an order that is the same on every run."""
    if table.device.type == "cuda":
        # By sorting, where index_add_ adds in the order in which threads arrive.
        return table.index_put_((index,), values, accumulate=True)
    return table.index_add_(0, index, values)


def _squared_norm_in_tiles(block: Block) -> Float[Tensor, " n"]:
    parts = []
    for start, stop in tiles(len(block), block.size):
        pieces = block.rows(start, stop).pieces()
        parts.append(sum(torch.linalg.vector_norm(piece, dim=1).square() for piece in pieces))
    return torch.cat(parts)
