"""One micro-batch of a step: which calls it made, how many rows it has, and what its backward pass left of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tracin.gradients.agreement import accumulation_dtype
from tracin.gradients.blocks import Block
from tracin.gradients.sites import RuleSite
from tracin.methods.online.order import Place

__all__ = ["Segment", "Use"]


@dataclass
class Use:
    """A recorded call: its place among those of its site, its module's mode, and δ where it must wait.

    It does not know its segment: in a circle of the two, a step's gradients would wait for Python's collector.
    """

    site: str
    at: int
    training: bool
    deltas: list[Tensor | None]
    spent: bool = False


@dataclass
class Segment:
    """One micro-batch: its calls by site, its rows once they are known, and their gradients."""

    uses: dict[str, list[Use]] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    rows: int | None = None
    checked: bool = False
    blocks: dict[tuple[str, ...], list[Block]] = field(default_factory=dict)
    sizes: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether a backward pass came by."""
        return self.rows is not None

    def add(self, names: tuple[str, ...], block: Block) -> None:
        """One more block of these rows."""
        self.blocks.setdefault(names, []).append(block)

    def measure(self, site: RuleSite, x: Tensor, delta: Tensor) -> None:
        """Bound the size of what a layer's gradients add up within a row, which a sum that cancels does not show.

        Cauchy and Schwarz: ‖Σ_t |δ_t| ⊗ |a_t|‖ ≤ ‖δ‖ ‖a‖, where the a of a bias, a scale or a token is 1, and that of a
        convolution has every pixel as often as its kernel has places.
        """
        wide = accumulation_dtype(delta.dtype)
        length = torch.linalg.vector_norm(delta, dtype=wide)
        for role, name in site.roles.items():
            parameter = getattr(site.module, role)
            matrix = x.is_floating_point() and parameter.dim() > 1
            ones = (delta.numel() / parameter.shape[-1]) ** 0.5
            places = math.prod(parameter.shape[2:]) ** 0.5
            size = length * (places * torch.linalg.vector_norm(x.detach(), dtype=wide) if matrix else ones)
            self.sizes.setdefault(name, []).append(size)
