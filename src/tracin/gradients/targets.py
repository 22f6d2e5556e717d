r"""Sums of gradients by group, and products of a batch with a few such sums.

    T_s = Σ_{z' in s} g(z')      [g, p]          ⟨g(z), T_s⟩      [n, g]

A sum (``sums``) costs what an ordinary weight gradient costs. Against few sums the train side need not be multiplied out:

    ⟨Σ_t δ_t ⊗ a_t, T⟩ = Σ_t δ_t · T a_t

Where the groups have few members for the size of the layer, their sums stay in the members' factors and the products are
summed instead:

    ⟨g(z), T_s⟩ = Σ_{z' in s} ⟨g(z), g(z')⟩

Axis letters: n rows · m members · t uses · i in · o out · p parameters · g groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tracin.gradients.blocks import Block, Dense, Outer, Sum, tiles, total_bytes
from tracin.gradients.products import concatenate, dot
from tracin.gradients.sums import Members, add_sums
from tracin.shapes import Float

__all__ = ["Factors", "GroupSums", "Target", "dot_targets"]

# What it costs to write and read an element, in multiply-adds.
MOVED = 8


def _splits_of(block: Block, parameters: int) -> tuple[int, ...] | None:
    """Entries of each parameter where a block holds several; None where it holds one.

    Args:
        block: The block.
        parameters: How many it holds.

    Returns:
        The sizes.

    Raises:
        ValueError: The block does not know them.
    """
    if parameters == 1:
        return None
    if isinstance(block, Sum):
        return _splits_of(block.parts[0], parameters)
    if isinstance(block, Dense) and block.splits is not None:
        return block.splits
    if isinstance(block, Outer) and block.bias is not None:
        out = block.d.shape[2]
        return block.size - out, out
    raise ValueError(f"a {type(block).__name__} does not tell its {parameters} parameters apart")


@dataclass(frozen=True)
class Factors:
    """The sums of g groups, left in the factors of their m members.

    Attributes:
        members: The members' gradients.
        weights: What each member counts in each group, 0 where it is not of it [m, g].
    """

    members: Block
    weights: Float[Tensor, "m g"]

    @property
    def nbytes(self) -> int:
        """Memory that they hold."""
        return self.members.nbytes + total_bytes(self.weights)

    @cached_property
    def multiplied_out(self) -> Dense:
        """The sums [g, p]."""
        return Dense(torch.stack([self.members.weighted(column).total() for column in self.weights.mT]))

    def scaled(self, rates: Sequence[float]) -> Factors:
        """Each parameter's gradient times its rate (one rate per parameter that the members hold)."""
        return replace(self, members=self.members.scaled(rates))

    def weighted(self, weights: Float[Tensor, " g"]) -> Factors:
        """Each group's sum times its weight."""
        return replace(self, weights=self.weights * weights.to(self.weights.dtype))


Target = Dense | Factors


class GroupSums:
    """The sums of one block's gradients by group, batch after batch: in factors where that costs less, else multiplied out.

    Args:
        groups: Groups g.
        members: Rows m of all groups, over all batches.
        parameters: How many parameters the block holds.
        like: A tensor of the sums' dtype and device.

    Example:
        >>> sums = GroupSums(groups=1, members=2, parameters=1, like=torch.empty(0))
        >>> _ = sums.add(Outer(torch.ones(2, 1, 3), torch.ones(2, 1, 4)), Members((0,), (2,), None))
        >>> dot_targets(Outer(torch.ones(1, 1, 3), torch.ones(1, 1, 4)), sums.target())
        tensor([[24.]])
    """

    def __init__(self, groups: int, members: int, parameters: int, like: Tensor) -> None:
        self._shape, self._parameters, self._like = (groups, members), parameters, like
        self._values: Tensor | None = None
        self._splits: tuple[int, ...] | None = None
        self._parts: list[tuple[Outer, Members]] = []

    def add(self, block: Block, members: Members) -> Tensor:
        """Add a batch.

        Args:
            block: n gradients.
            members: Which row belongs to which group.

        Returns:
            A number that is finite where everything added was, [].
        """
        if self._values is None and isinstance(block, Outer) and _factors_are_cheaper(block, *self._shape):
            order = members.order
            a, d = (_kept(values if order is None else values[order]) for values in (block.a, block.d))
            self._parts.append((replace(block, a=a, d=d), replace(members, order=None)))
            # The largest entry that each use adds: finite where every entry is.
            return (a.abs().amax(2) * d.abs().amax(2)).amax()
        if self._values is None:
            self._values = self._like.new_zeros(self._shape[0], block.size)
            self._splits = _splits_of(block, self._parameters)
        while self._parts:  # a batch of another kind: what was kept is multiplied out
            add_sums(*self._parts.pop(), self._values)
        return add_sums(block, members, self._values)

    def target(self) -> Target:
        """The sums of all that was added, at least one batch."""
        if self._values is not None:
            return Dense(self._values, self._splits)
        weights = []
        for block, members in self._parts:
            part = self._like.new_zeros(len(block), self._shape[0])
            for group, start, stop in members.parts():
                part[start:stop, group] = 1.0
            weights.append(part)
        return Factors(concatenate([block for block, _ in self._parts]), torch.cat(weights))


def _factors_are_cheaper(block: Outer, g: int, m: int) -> bool:
    """For each row of the other side: m products of factors, against g of what is multiplied out; and no more memory."""
    (_, t, i), o = block.a.shape, block.d.shape[2]
    return _factors_cost(t, t, i, o, m, g) < _dense_cost(t, i, o, g) and m * (t * (i + o) + g) < g * i * o


def _factors_pay(train: Outer, targets: Factors) -> bool:
    """The same once the train side is known, which may use the layer more often."""
    (_, t, i), o, (m, g) = train.a.shape, train.d.shape[2], targets.weights.shape
    s = targets.members.uses if isinstance(targets.members, Outer) else t
    return t == s or _factors_cost(t, s, i, o, m, g) < _dense_cost(t, i, o, g)


def _factors_cost(t: int, s: int, i: int, o: int, m: int, g: int) -> int:
    return m * (t * s * (i + o + MOVED) + g)


def _dense_cost(t: int, i: int, o: int, g: int) -> int:
    return min(_contracted_cost(t, i, o, g), _multiplied_out_cost(t, i, o, g))


def _kept(values: Tensor) -> Tensor:
    """Values that keep no more memory alive than their own."""
    own = values.numel() * values.element_size()
    return values.clone() if values.untyped_storage().nbytes() > own else values


def dot_targets(train: Block, targets: Target) -> Float[Tensor, "n g"]:
    """All products of a batch with the sums of a few groups.

    Args:
        train: n gradients.
        targets: g sums of gradients of the same parameters.

    Returns:
        The products, [n, g].

    Example:
        >>> x = Outer(torch.ones(2, 1, 3), torch.ones(2, 1, 4), bias=1.0)
        >>> dot_targets(x, Dense(x.total()[None]))
        tensor([[32.],
                [32.]])
    """
    if isinstance(train, Sum):
        return torch.stack([dot_targets(part, targets) for part in train.parts]).sum(0)
    if isinstance(targets, Factors):
        if isinstance(train, Outer) and _factors_pay(train, targets):
            return dot(train, targets.members).to(targets.weights.dtype) @ targets.weights
        targets = targets.multiplied_out
    if isinstance(train, Outer) and _contracting_is_cheaper(train, len(targets)):
        return _contracted(train, targets.values)
    return dot(train, targets)


def _contracting_is_cheaper(train: Outer, g: int) -> bool:
    """Σ_t δ_t · T a_t for each group against Σ_t δ_t ⊗ a_t and its products."""
    (_, t, i), o = train.a.shape, train.d.shape[2]
    return _contracted_cost(t, i, o, g) <= _multiplied_out_cost(t, i, o, g)


def _contracted_cost(t: int, i: int, o: int, g: int) -> int:
    """Multiply-adds and moved elements for each row."""
    return t * g * (i * o + MOVED * min(i, o))


def _multiplied_out_cost(t: int, i: int, o: int, g: int) -> int:
    return (t + MOVED + g) * i * o


def _contracted(train: Outer, targets: Float[Tensor, "g p"]) -> Float[Tensor, "n g"]:
    (n, t, i), o, g = train.a.shape, train.d.shape[2], len(targets)
    weight = targets[:, : o * i].reshape(g, o, i)
    # The longer side first, so that less is left to multiply with the other.
    first, second = (train.a, train.d) if i >= o else (train.d, train.a)
    table = (weight if i >= o else weight.mT).reshape(-1, max(i, o)).mT  # [longer, g·shorter]
    parts = []
    for start, stop in tiles(n, t * g * min(i, o)):
        left = first[start:stop].reshape((stop - start) * t, -1) @ table
        right = second[start:stop].reshape((stop - start) * t, -1, 1)
        found = torch.bmm(left.view(len(right), g, -1), right).view(stop - start, t, g)
        parts.append(found[:, 0] if t == 1 else found.sum(1))
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    if train.bias is not None:
        values = values + (train.d.sum(1) * train.bias) @ targets[:, o * i :].mT
    return values
