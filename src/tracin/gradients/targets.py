r"""Sums of gradients by group, and products of a batch with a few such sums.

    T_s = Σ_{z' in s} g(z')      [g, p]          ⟨g(z), T_s⟩      [n, g]

A sum costs what an ordinary weight gradient costs: Σ_n δ_nᵀ a_n over the rows of a group is one matrix product, and no row
is multiplied out by itself. Against few sums the train side need not be multiplied out either:

    ⟨Σ_t δ_t ⊗ a_t, T⟩ = Σ_t δ_t · T a_t

Where the groups have few members for the size of the layer, their sums stay in the members' factors and the products are
summed instead:

    ⟨g(z), T_s⟩ = Σ_{z' in s} ⟨g(z), g(z')⟩

Axis letters: n rows · m members · t uses · i in · o out · p parameters · g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import grad as conv_grad

from tracin.gradients.blocks import (
    Block,
    Dense,
    MultipliedOut,
    Outer,
    Rows,
    Sum,
    add_rows,
    tiles,
    total_bytes,
)
from tracin.gradients.pictures import Convolution
from tracin.gradients.products import concatenate, dot
from tracin.shapes import Float, Int

__all__ = ["Factors", "GroupSums", "Members", "Target", "add_sums", "dot_targets"]

# What it costs to write and read an element, in multiply-adds.
MOVED = 8


@dataclass(frozen=True)
class Members:
    """Which rows of a batch belong to which group.

    Attributes:
        groups: The groups that the batch has rows of, ascending.
        sizes: Rows of each.
        order: The batch's rows that belong to a group, group by group [r]; None: they stand in that order already.
    """

    groups: tuple[int, ...]
    sizes: tuple[int, ...]
    order: Int[Tensor, " r"] | None

    @classmethod
    def of(cls, group: Int[Tensor, " n"], device: torch.device) -> Members:
        """The members of a batch.

        Args:
            group: The group of each row, on the CPU; negative: of none.
            device: Where the gradients are.

        Returns:
            Its members.
        """
        inside = group[group >= 0]
        found, counts = torch.unique(inside, return_counts=True)
        groups, sizes = tuple(found.tolist()), tuple(counts.tolist())
        if len(groups) == 1 and len(inside) == len(group):
            return cls(groups, sizes, None)
        order = torch.sort(group, stable=True).indices[len(group) - len(inside) :]
        return cls(groups, sizes, order.to(device))

    def __len__(self) -> int:
        return sum(self.sizes)

    def parts(self) -> list[tuple[int, int, int]]:
        """Each group with where its rows start and stop in the order."""
        found, start = [], 0
        for group, size in zip(self.groups, self.sizes, strict=True):
            found.append((group, start, start + size))
            start += size
        return found

    def of_rows(self) -> Int[Tensor, " r"]:
        """The place of each row's group among those of the batch, in the batch's order, where every row has a group."""
        place = torch.arange(len(self.groups)).repeat_interleave(torch.tensor(self.sizes))
        if self.order is None:
            return place
        found = torch.empty_like(place, device=self.order.device)
        found[self.order] = place.to(found.device)
        return found


def add_sums(block: Block, members: Members, out: Float[Tensor, "g p"]) -> Tensor:
    """Add the gradients of a batch to the sums of their groups, in place.

    Args:
        block: n gradients.
        members: Which row belongs to which group.
        out: The sums so far; the weight's entries first, then the bias's.

    Returns:
        A number that is finite where everything added was, [].

    Example:
        >>> x, sums = Outer(torch.ones(3, 1, 2), torch.ones(3, 1, 1)), torch.zeros(2, 2)
        >>> _ = add_sums(x, Members.of(torch.tensor([1, 0, 1]), sums.device), sums)
        >>> sums
        tensor([[1., 1.],
                [2., 2.]])
    """
    if isinstance(block, Sum):
        return torch.stack([add_sums(part, members, out) for part in block.parts]).sum()
    if members.order is not None and len(members) < len(block):
        block, members = _taken(block, members.order), replace(members, order=None)
    several = len(members.groups) > 1
    if isinstance(block, Convolution) and (several or block.d.dtype == torch.float64):
        spans = tiles(len(block), block.size)
        pieces = (block.rows(*span).multiplied_out() for span in spans)
        return _add_multiplied_out(pieces, members, out)
    if isinstance(block, MultipliedOut):
        return _add_multiplied_out([block], members, out)
    mine = block if members.order is None else _taken(block, members.order)
    if isinstance(mine, Rows):
        return _add_rows(mine, members, out)
    seen = []
    for group, start, stop in members.parts():
        part = mine.rows(start, stop) if several else mine
        total = _weight_gradient(part) if isinstance(part, Convolution) else part.total()
        out[group] += total
        seen.append(total.sum())
    return torch.stack(seen).sum()


def _taken(block: Block, rows: Tensor) -> Block:
    """These rows of a block, in this order."""
    if isinstance(block, Outer):
        return replace(block, a=block.a[rows], d=block.d[rows])
    if isinstance(block, Convolution):
        return replace(block, x=block.x[rows], d=block.d[rows])
    if isinstance(block, Rows):
        return replace(block, index=block.index[rows], d=block.d[rows])
    if isinstance(block, MultipliedOut):
        return replace(block, values=block.values[rows])
    return Dense(block.materialise()[rows])


def _add_rows(block: Rows, members: Members, out: Tensor) -> Tensor:
    """Every touched row goes to its place in the table of its group."""
    groups = torch.tensor(members.groups, device=out.device)
    sizes = torch.tensor(members.sizes, device=out.device)
    offset = (groups * block.length).repeat_interleave(sizes, output_size=len(block))[:, None]
    table = out.view(len(out) * block.length, block.d.shape[2])
    add_rows(table, (block.index + offset).reshape(-1), block.d.flatten(0, 1).to(out.dtype))
    return block.d.sum()


def _add_multiplied_out(pieces: Iterable[MultipliedOut], members: Members, out: Tensor) -> Tensor:
    """Single rows' gradients, in pieces of consecutive rows."""
    groups, of_row = torch.tensor(members.groups, device=out.device), members.of_rows().to(out.device)
    seen, start = [], 0
    for piece in pieces:
        rows, group = piece, of_row[start : start + len(piece)]
        if len(groups) < len(rows):
            table = rows.values.new_zeros(len(groups), rows.size)
            rows = replace(rows, values=add_rows(table, group, rows.values))
            group = torch.arange(len(groups), device=out.device)
        values = rows.materialise()
        add_rows(out, groups[group], values.to(out.dtype))
        seen.append(values.sum())
        start += len(piece)
    return torch.stack(seen).sum()


def _weight_gradient(block: Convolution) -> Float[Tensor, " p"]:
    """The ordinary weight gradient of the whole batch."""
    shape = block.shape
    function: Callable[..., Tensor] = (
        conv_grad.conv1d_weight,
        conv_grad.conv2d_weight,
        conv_grad.conv3d_weight,
    )[len(shape.kernel) - 1]
    return function(
        block.x.flatten(0, 1),
        (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel),
        block.d.flatten(0, 1),
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
    ).reshape(-1)


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
