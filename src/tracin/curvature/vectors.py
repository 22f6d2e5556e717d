"""Vectors over all traced parameters: flat for the solvers, shaped for autograd, in blocks for the products.

A batch of n vectors is [n, p]; the parameters stand in the order of the task's selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.gradients.blocks import Block, Dense
from tracin.shapes import Float

__all__ = ["Vectors"]


@dataclass(frozen=True)
class Vectors:
    """Where each parameter's entries stand in a flat vector.

    Attributes:
        parameters: The traced parameters by name, in order.
    """

    parameters: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Entries p of a vector."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters in order."""
        return list(self.parameters.values())

    def slices(self) -> dict[str, slice]:
        """Each parameter's place."""
        out, start = {}, 0
        for name, parameter in self.parameters.items():
            out[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        return out

    def shaped(self, flat: Float[Tensor, "k p"]) -> list[Tensor]:
        """Flat vectors as one tensor [k, *shape] per parameter, in the parameter's dtype."""
        return [
            flat[:, place].reshape(len(flat), *parameter.shape).to(parameter.dtype)
            for parameter, place in zip(self.tensors, self.slices().values(), strict=True)
        ]

    def add_to(self, flat: Float[Tensor, "k p"], found: Sequence[Tensor | None]) -> None:
        """Add one tensor [k, *shape] per parameter to flat vectors, in place; None adds nothing."""
        for place, value in zip(self.slices().values(), found, strict=True):
            if value is not None:
                flat[:, place] += value.reshape(len(flat), -1)

    def joined(
        self, blocks: Mapping[tuple[str, ...], Block], start: int, stop: int, dtype: torch.dtype
    ) -> Float[Tensor, "n p"]:
        """Examples ``start`` to ``stop`` of a batch's gradients as flat vectors; absent parameters are zero."""
        places = self.slices()
        like = self.tensors[0]
        flat = torch.zeros(stop - start, self.size, dtype=dtype, device=like.device)
        for names, block in blocks.items():
            values = block.rows(start, stop).materialise()
            sizes = [self.parameters[name].numel() for name in names]
            for name, part in zip(names, values.split(sizes, 1), strict=True):
                flat[:, places[name]] += part
        return flat

    def blocks(
        self, flat: Float[Tensor, "n p"], fused: Iterable[tuple[str, ...]], dtype: torch.dtype
    ) -> dict[tuple[str, ...], Block]:
        """Flat vectors as blocks: one per fused pair, one per other parameter."""
        places = self.slices()
        pairs = [pair for pair in fused if set(pair) <= set(places)]
        alone = [(name,) for name in places if not any(name in pair for pair in pairs)]
        out: dict[tuple[str, ...], Block] = {}
        for names in [*pairs, *alone]:
            parts = [flat[:, places[name]].to(dtype) for name in names]
            splits = tuple(part.shape[1] for part in parts) if len(parts) > 1 else None
            out[names] = Dense(torch.cat(parts, 1) if splits else parts[0].contiguous(), splits)
        return out
