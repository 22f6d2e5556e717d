"""How a convolution's weight gradients are held: not multiplied out, or with the entries in the order that cost least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tracin.gradients.blocks import Block, Dense, MultipliedOut, Outer, tiles, total_bytes
from tracin.gradients.convolution import (
    ConvolutionShape,
    kernel_first,
    kernel_first_gradient,
    patch_elements,
    patches,
    weight_gradient,
)
from tracin.gradients.gram import NormWork, gram_norm, norm_work
from tracin.shapes import Float

__all__ = ["Convolution", "Filters"]


@dataclass(frozen=True)
class Convolution(Block):
    """A convolution's input x [n, k, c, ...] and δ [n, k, o, ...]: k pictures per example.

    Patches or weight gradients are made when asked for.
    """

    x: Float[Tensor, "n k c ..."]
    d: Float[Tensor, "n k o ..."]
    shape: ConvolutionShape

    def __len__(self) -> int:
        return len(self.x)

    @property
    def nbytes(self) -> int:
        return total_bytes(self.x, self.d)

    @property
    def size(self) -> int:
        return self.shape.weight_size

    @property
    def norm_work(self) -> NormWork | None:
        """What the norm takes by each route; None where several pictures or groups of channels leave but one."""
        one = self.x.shape[1] == 1 and self.shape.groups == 1
        return norm_work(self.x[:, 0], self.d[:, 0], self.shape) if one else None

    def squared_norm(self) -> Float[Tensor, " n"]:
        work = self.norm_work
        if work and work.by_gram:
            return gram_norm(self.x[:, 0], self.d[:, 0], self.shape, by_pixels=work.by_pixels)
        return self.norm_multiplied_out()

    def norm_multiplied_out(self) -> Float[Tensor, " n"]:
        """The squared norm from gradients that are made for it, in tiles."""
        spans = tiles(len(self), self.size)
        return torch.cat([self.rows(*span).multiplied_out().squared_norm() for span in spans])

    def multiplied_out(self) -> Dense | Filters:
        """Multiplied out in the order of entries that costs least."""
        n, k = self.x.shape[:2]
        x, d = self.x.flatten(0, 1), self.d.flatten(0, 1)
        first = kernel_first(d, self.shape)
        route = kernel_first_gradient if first else weight_gradient
        spans = tiles(len(x), patch_elements(d, self.shape))
        parts = [route(x[start:stop], d[start:stop], self.shape) for start, stop in spans]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        values = values.view(n, k, -1).sum(1) if k > 1 else values.view(n, -1)
        return Filters(values, self.shape) if first else Dense(values)

    def materialise(self) -> Float[Tensor, "n p"]:
        return self.multiplied_out().materialise()

    def total(self) -> Float[Tensor, " p"]:
        parts = [self.rows(*span).multiplied_out().total() for span in tiles(len(self), self.size)]
        return torch.stack(parts).sum(0)

    def outer(self) -> Outer:
        """The same gradients as patches and δ, for a convolution without groups."""
        n = len(self.x)
        a = patches(self.x.flatten(0, 1), self.shape, tuple(self.d.shape[3:]))
        d = self.d.flatten(0, 1).flatten(2).mT
        return Outer(a.reshape(n, -1, a.shape[2]), d.reshape(n, -1, d.shape[2]))

    def scaled(self, rates: Sequence[float]) -> Convolution:
        (rate,) = rates
        return replace(self, d=self.d * rate)

    def weighted(self, weights: Tensor) -> Convolution:
        return replace(self, d=self.d * weights.to(self.d.dtype).view(-1, *[1] * (self.d.dim() - 1)))

    def rows(self, start: int, stop: int) -> Convolution:
        return replace(self, x=self.x[start:stop], d=self.d[start:stop])


@dataclass(frozen=True)
class Filters(MultipliedOut):
    """A convolution's weight with entries (output channel, kernel, input channel)."""

    shape: ConvolutionShape

    def materialise(self) -> Float[Tensor, "n p"]:
        o, c = self.shape.out_channels, self.shape.in_channels
        return self.values.view(len(self), o, -1, c).mT.reshape(len(self), -1)

    def ordered(self, values: Float[Tensor, "m p"]) -> Float[Tensor, "m p"]:
        """Gradients in the parameter's own order, brought into this one."""
        o, c = self.shape.out_channels, self.shape.in_channels
        return values.unflatten(1, (o, c, -1)).mT.reshape(len(values), -1)

    def total(self) -> Float[Tensor, " p"]:
        return replace(self, values=self.values.sum(0, keepdim=True)).materialise()[0]

    def scaled(self, rates: Sequence[float]) -> Filters:
        (rate,) = rates
        return replace(self, values=self.values * rate)

    def weighted(self, weights: Tensor) -> Filters:
        return replace(self, values=self.values * weights.to(self.values.dtype)[:, None])

    def rows(self, start: int, stop: int) -> Filters:
        return replace(self, values=self.values[start:stop])
