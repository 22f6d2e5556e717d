r"""A batch's gradients added to the sums of their groups.

    T_s += Σ_{z in s} g(z)      [g, p]

Σ_n δ_nᵀ a_n over the rows of a group is one matrix product, and no row is multiplied out by itself. What is multiplied out
already is added where it lies; so are the gradients of a convolution's single rows, which cost about what that of the batch
costs.

Axis letters: n rows · r of them with a group · p parameters · g groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import grad as conv_grad

from tracin.gradients.blocks import Block, Dense, MultipliedOut, Outer, Rows, Sum, add_rows, tiles
from tracin.gradients.pictures import Convolution
from tracin.shapes import Float, Int

__all__ = ["Members", "add_sums"]


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
    if isinstance(block, Rows):
        return _add_rows(block, members, out)
    mine = block if members.order is None else _taken(block, members.order)
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
    groups, of_row = torch.tensor(members.groups, device=out.device), members.of_rows().to(out.device)
    offset = (groups[of_row] * block.length)[:, None]
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
