r"""Seeded random projections of per-example gradients, applied to the factors that the gradients are held in.

The gradient of a parameter of shape [o, ...] is a matrix G [o, i]. Its features are linear in G:

- ``"kronecker"``: B G Aᵀ with A [a, i] and B [b, o], so that the projection is P = B ⊗ A and d = b·a;
- ``"rank_one"``: :math:`b_k^\top G a_k / \sqrt{d}`, k = 1..d: each feature has a pair of vectors of its own.

All entries are independent signs, scaled so that E[PᵀP] is the identity: products of features are unbiased for products
of gradients, and their squared lengths for squared lengths. For :math:`G = \sum_t \delta_t a_t^\top` both need only
A a_t and B δ_t; G itself is multiplied out, a few rows at a time, only where that costs less.

With :math:`K = G' G^\top, H = G^\top G'`, the variance of the Kronecker estimate of :math:`\langle G, G' \rangle` is

.. math::
    \tfrac{1}{a}\, v(H) + \tfrac{1}{b}\, v(K) + \tfrac{1}{ab} \left[ \lVert G \rVert^2 \lVert G' \rVert^2
    + \langle G, G' \rangle^2 + \langle G'^\top G', G^\top G \rangle + \lVert G'^\top G \rVert^2 - \text{(diagonal terms)} \right]

with :math:`v(M) = \lVert M \rVert^2 + \operatorname{tr} M^2 - 2 \sum_j M_{jj}^2`, and so at most
:math:`(2/a + 2/b + 4/ab) \lVert G \rVert^2 \lVert G' \rVert^2`; that of the rank-one estimate is 1/d times the same at
a = b = 1, at most :math:`8/d`. A factor that is as long as its side of G is the identity, and its terms are zero. The
page on projections derives this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tracin.errors import OptionError
from tracin.gradients.blocks import Outer
from tracin.gradients.signs import Signs, key_of
from tracin.shapes import Float

__all__ = ["KINDS", "ParameterProjection", "Projection", "projected_sizes"]

KINDS = ("kronecker", "rank_one")


@dataclass(frozen=True)
class Projection:
    r"""How gradients are projected onto few features: how many, from which seed, and by which kind of matrix.

    .. math:: \mathbb{E} \langle P g, P g' \rangle = \langle g, g' \rangle

    Args:
        size: Features of a row's gradient at one checkpoint, all parameters together. Every parameter gets the same share;
            one that has fewer entries than its share is kept whole, and leaves the rest to the others.
        seed: Which projection. The matrices depend on it, on the checkpoint's position, and on each parameter's name,
            shape and share; not on the device, the batches or the route.
        kind: ``"kronecker"``: two small matrices per parameter, the cheapest. ``"rank_one"``: a pair of vectors per
            feature, for a standard error that falls like 1/√size whatever the gradients are.

    Raises:
        OptionError: A size below 1, a seed that is no whole number, or an unknown kind.

    Example:
        >>> import tracin
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3))
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
        >>> rows = (torch.randn(8, 20), torch.arange(8) % 3)
        >>> method = tracin.TracInCP(task, steps, projection=tracin.Projection(256, seed=1))
        >>> method.self_influence(rows).values.shape
        torch.Size([8])
    """

    size: int
    seed: int = 0
    kind: Literal["kronecker", "rank_one"] = "kronecker"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise OptionError(
                f"Projection: size is {self.size!r}. Give a whole number of features, at least 1."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(f"Projection: seed is {self.seed!r}. Give a whole number.")
        if self.kind not in KINDS:
            raise OptionError(f"Projection: kind is {self.kind!r}. Choose one of {', '.join(KINDS)}.")


def projected_sizes(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """The share of each parameter: the same for all, and no more than it has entries.

    Args:
        sizes: Entries of each parameter.
        total: Features to hand out.

    Returns:
        Features by parameter, at most ``total`` together.

    Raises:
        OptionError: There are more parameters than features.

    Example:
        >>> projected_sizes({"weight": 1000, "bias": 10, "scale": 30}, 110)
        {'weight': 70, 'bias': 10, 'scale': 30}
    """
    if total < len(sizes):
        raise OptionError(
            f"projection: size is {total}, but {len(sizes)} parameters are traced. Give at least one feature for each, or trace "
            "fewer with Task(parameters=...)."
        )
    out: dict[str, int] = {}
    left = total
    for at, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        out[name] = min(sizes[name], left // (len(sizes) - at))
        left -= out[name]
    return {name: out[name] for name in sizes}


def _matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """A parameter as a matrix [o, i]: its first axis and all others; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def _widths(o: int, i: int, share: int) -> tuple[int, int]:
    """Lengths (b, a) of the two factors, b·a at most ``share``, with the smallest bound on the variance."""

    def bound(b: int) -> float:
        a = min(i, share // b)
        rows, columns = (0.0 if b == o else 1 / b), (0.0 if a == i else 1 / a)
        return 2 * rows + 2 * columns + 4 * rows * columns

    best = min(range(1, min(o, share) + 1), key=bound)
    return best, min(i, share // best)


@dataclass(frozen=True)
class ParameterProjection:
    """The projection of one parameter, as a matrix [o, i].

    ``rows`` is B and ``columns`` is A; None is the identity. ``paired``: both have d rows, and feature k is made from row
    k of each.
    """

    shape: tuple[int, int]
    rows: Signs | None
    columns: Signs | None
    paired: bool

    @classmethod
    def of(
        cls, projection: Projection, name: str, shape: torch.Size | tuple[int, ...], share: int, draw: int = 0
    ) -> ParameterProjection:
        """The projection of a parameter onto at most ``share`` features.

        Args:
            projection: Seed and kind.
            name: The parameter's name.
            shape: Its shape.
            share: Its features.
            draw: Which of several independent projections, such as a checkpoint's position.

        Returns:
            The projection; the identity where the share covers the parameter.
        """
        o, i = _matrix_shape(shape)
        if share >= o * i:
            return cls((o, i), None, None, False)
        key = (projection.seed, draw, name, o, i, projection.kind)
        if projection.kind == "rank_one":
            scale = share**-0.25
            rows, columns = (
                Signs(size, share, key_of(*key, side), scale) for side, size in (("o", o), ("i", i))
            )
            return cls((o, i), rows, columns, True)
        b, a = _widths(o, i, share)
        return cls(
            (o, i),
            None if b == o else Signs(o, b, key_of(*key, "o"), b**-0.5),
            None if a == i else Signs(i, a, key_of(*key, "i"), a**-0.5),
            False,
        )

    @property
    def widths(self) -> tuple[int, int]:
        """Lengths (b, a) of B δ and A a."""
        o, i = self.shape
        return o if self.rows is None else self.rows.width, i if self.columns is None else self.columns.width

    @property
    def size(self) -> int:
        """Features d."""
        b, a = self.widths
        return a if self.paired else b * a

    @property
    def exact(self) -> bool:
        """Whether nothing is projected."""
        return self.rows is None and self.columns is None

    def left(self, d: Tensor) -> Tensor:
        """B δ, [..., b]."""
        return d if self.rows is None else self.rows.apply(d)

    def right(self, a: Tensor) -> Tensor:
        """A a, [..., a]."""
        return a if self.columns is None else self.columns.apply(a)

    def joined(self, left: Float[Tensor, "n t b"], right: Float[Tensor, "n t a"]) -> Float[Tensor, "n d"]:
        """Features from the two sides, summed over uses."""
        if self.paired:
            return (left * right).sum(1)
        return Outer(right, left).materialise()

    def cheaper_multiplied_out(self, uses: int, columns_cost: int, uses_out: int) -> bool:
        """Whether making G and projecting it costs fewer multiply-adds than projecting its factors.

        Args:
            uses: Uses per example on the way of the factors.
            columns_cost: Multiply-adds of A a per use.
            uses_out: Uses that are added up to make G.

        Returns:
            Whether it does.
        """
        (o, i), (b, a) = self.shape, self.widths
        joining = a if self.paired else b * a
        factors = uses * ((columns_cost if self.columns else 0) + (o * b if self.rows else 0) + joining)
        projecting = (
            o * i * a if self.paired else (o * i * a if self.columns else 0) + (o * b * a if self.rows else 0)
        )
        return uses_out * o * i + projecting <= factors
