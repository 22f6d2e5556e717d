"""Projected features of a batch of gradients, made from the factors that its blocks hold.

For an ``Outer`` block they are Σ_t (B δ_t)(A a_t)ᵀ, for a convolution A is a bank of filters over its input, for the rows
of a table B is read at the rows' numbers. Blocks of one parameter agree, whichever form they have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tracin.gradients.blocks import TILE, Block, Dense, Outer, Rows, Sum, tiles
from tracin.gradients.convolution import ConvolutionShape, patches
from tracin.gradients.pictures import Convolution
from tracin.gradients.projection import ParameterProjection, Projection, projected_sizes
from tracin.shapes import Float

__all__ = ["Projector", "project"]


def _project_matrices(p: ParameterProjection, values: Float[Tensor, "n p"]) -> Float[Tensor, "n d"]:
    """Features of gradients that are multiplied out."""
    if p.exact:
        return values
    if p.paired:
        return _project_pairs(p, values)
    o, i = p.shape
    _, a = p.widths
    parts = []
    for start, stop in tiles(len(values), o * a):
        right = p.right(values[start:stop].view(stop - start, o, i))  # [n, o, a]
        out = right if p.rows is None else p.left(right.mT).mT  # [n, b, a]
        parts.append(out.flatten(1))
    return torch.cat(parts)


def _project_pairs(p: ParameterProjection, values: Float[Tensor, "n p"]) -> Float[Tensor, "n d"]:
    """b_kᵀ G a_k with tiles of b_k ⊗ a_k as one matrix."""
    o, i = p.shape
    d = p.size
    if p.rows is None or p.columns is None:
        raise ValueError("a projection in pairs has both factors")
    step_i = min(i, max(1, TILE // d))
    step_o = max(1, TILE // (d * step_i))
    matrices = values.view(-1, o, i)
    out = values.new_zeros(len(values), d)
    for row in range(0, o, step_o):
        rows = p.rows.table(row, min(row + step_o, o), values)
        for column in range(0, i, step_i):
            columns = p.columns.table(column, min(column + step_i, i), values)
            pairs = (rows[:, None] * columns[None]).flatten(0, 1)  # [o·i, d]
            part = matrices[:, row : row + step_o, column : column + step_i].reshape(len(values), -1)
            out.addmm_(part, pairs)
    return out


def _multiplied_out(p: ParameterProjection, block: Block) -> Float[Tensor, "n d"]:
    parts = [
        _project_matrices(p, block.rows(start, stop).materialise())
        for start, stop in tiles(len(block), block.size)
    ]
    return torch.cat(parts)


def _project_outer(p: ParameterProjection, block: Outer) -> Float[Tensor, "n d"]:
    """Features of the weight, without its bias's column."""
    weight = Outer(block.a, block.d)
    t = block.uses
    i = block.a.shape[2]
    if p.cheaper_multiplied_out(t, i * p.widths[1], t):
        return _multiplied_out(p, weight)
    parts = [
        p.joined(p.left(block.d[start:stop]), p.right(block.a[start:stop]))
        for start, stop in tiles(len(block), 2 * t * sum(p.widths))
    ]
    return torch.cat(parts)


def _project_rows(p: ParameterProjection, block: Rows) -> Float[Tensor, "n d"]:
    """The gradient is Σ_t e_index ⊗ δ_t: B e_index is a column of B, and δ_t stands where a_t does elsewhere."""
    parts = []
    t = block.index.shape[1]
    for start, stop in tiles(len(block), 2 * t * sum(p.widths) if p.rows else p.size):
        index, right = block.index[start:stop], p.right(block.d[start:stop])
        if p.rows is None:
            parts.append(Rows(index, right, block.length).materialise())
        else:
            parts.append(p.joined(p.rows.at(index, right), right))
    return torch.cat(parts)


def _project_convolution(p: ParameterProjection, block: Convolution) -> Float[Tensor, "n d"]:
    """A as filters: the convolution of x with them is A times its patches, with a group of channels as a picture."""
    g, pixels = block.shape.groups, block.d[0, :, 0].numel()  # pixels of all k pictures
    a = p.widths[1]
    out_of_reach = p.rows is None and g > 1  # δ of one group fills its own rows of G alone
    if out_of_reach or p.cheaper_multiplied_out(pixels * g, p.shape[1] * a, pixels):
        return _multiplied_out(p, block)
    parts = [
        p.joined(*_convolution_sides(p, block.rows(start, stop)))
        for start, stop in tiles(len(block), 2 * pixels * g * sum(p.widths))
    ]
    return torch.cat(parts)


def _convolution_sides(p: ParameterProjection, block: Convolution) -> tuple[Tensor, Tensor]:
    """B δ [n, k·g·pixels, b] and A · patches [n, k·g·pixels, a]."""
    shape, (n, k, o), space = block.shape, block.d.shape[:3], tuple(block.d.shape[3:])
    g, inner = shape.groups, shape.in_channels // shape.groups
    x = block.x.reshape(n * k * g, inner, *block.x.shape[3:])
    right = _filtered(p, x, shape, space).reshape(n, -1, p.widths[1])
    d = block.d.reshape(n, k, g, o // g, -1).mT  # [n, k, g, pixels, o/g]
    if p.rows is None or g == 1:
        return p.left(d.reshape(n, -1, o)), right
    table = p.rows.table(0, o, d).view(g, o // g, -1)
    return torch.matmul(d, table).reshape(n, -1, p.widths[0]), right


def _filtered(p: ParameterProjection, x: Tensor, shape: ConvolutionShape, space: tuple[int, ...]) -> Tensor:
    """A · patches of pictures of one group, [pictures, pixels, a]."""
    one = ConvolutionShape(
        1, x.shape[1], shape.kernel, shape.stride, shape.dilation, groups=1, padding=shape.padding
    )
    if p.columns is None:
        return patches(x, one, space)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(shape.kernel) - 1]
    filters = p.columns.table(0, p.columns.size, x).mT.reshape(-1, x.shape[1], *shape.kernel)
    out = convolve(x, filters, None, shape.stride, shape.padding, shape.dilation)
    return out[(..., *(slice(0, size) for size in space))].flatten(2).mT


def project(block: Block, projections: Sequence[ParameterProjection]) -> list[Tensor]:
    """The features of each parameter that a block holds.

    Args:
        block: Gradients of one parameter, or of a weight and its bias.
        projections: One for each.

    Returns:
        Features [n, d] of each.
    """
    first = projections[0]
    if isinstance(block, Sum):
        parts = [project(part, projections) for part in block.parts]
        return [torch.stack(same).sum(0) for same in zip(*parts, strict=True)]
    if isinstance(block, Outer):
        weight = _project_outer(first, block)
        if block.bias is None:
            return [weight]
        return [weight, _project_matrices(projections[1], block.d.sum(1) * block.bias)]
    if isinstance(block, Rows):
        return [_project_rows(first, block)]
    if isinstance(block, Convolution):
        return [_project_convolution(first, block)]
    values = block.materialise()
    splits = values.split([math.prod(p.shape) for p in projections], 1)
    return [_project_matrices(p, part.contiguous()) for p, part in zip(projections, splits, strict=True)]


class Projector:
    """The projections of a model's parameters, and the features of their blocks.

    Args:
        projection: Size, seed and kind.
        shapes: The traced parameters' shapes by name, in order.

    Raises:
        OptionError: The size is smaller than the number of parameters.
    """

    def __init__(self, projection: Projection, shapes: Mapping[str, torch.Size]) -> None:
        self.projection, self.shapes = projection, dict(shapes)
        self._shares = projected_sizes({name: math.prod(s) for name, s in shapes.items()}, projection.size)
        self._draw = 0
        self._drawn = self._of_draw(0)

    def _of_draw(self, draw: int) -> dict[str, ParameterProjection]:
        return {
            name: ParameterProjection.of(self.projection, name, shape, self._shares[name], draw)
            for name, shape in self.shapes.items()
        }

    def drawn(self, draw: int) -> dict[str, ParameterProjection]:
        """The parameters' projections at a checkpoint; the tables of one checkpoint are kept."""
        if draw != self._draw:
            self._draw, self._drawn = draw, self._of_draw(draw)
        return self._drawn

    @property
    def sizes(self) -> dict[str, int]:
        """Features of each parameter."""
        return {name: p.size for name, p in self._drawn.items()}

    def blocks(self, blocks: Mapping[tuple[str, ...], Block], draw: int) -> dict[tuple[str, ...], Dense]:
        """Features of a batch, block by block.

        Args:
            blocks: The batch's gradients by the names of the parameters that a block holds.
            draw: The checkpoint's position in the trajectory; train rows and queries need the same.

        Returns:
            Features [n, d] under the same names, without any rate, in the gradients' dtype.
        """
        drawn = self.drawn(draw)
        out = {}
        for names, block in blocks.items():
            parts = project(block, [drawn[name] for name in names])
            values = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            out[names] = Dense(values, tuple(part.shape[1] for part in parts))
        return out

    def features(self, blocks: Mapping[tuple[str, ...], Block], n: int, draw: int) -> Float[Tensor, "n d"]:
        """Features of a batch side by side, parameters in their order; zeros for those that the batch does not use.

        Args:
            blocks: The batch's gradients.
            n: Rows.
            draw: The checkpoint's position in the trajectory.

        Returns:
            Features [n, d] in the gradients' dtype.

        Raises:
            ValueError: There is no block at all.
        """
        found: dict[str, Tensor] = {}
        for names, block in self.blocks(blocks, draw).items():
            found |= dict(zip(names, block.values.split(block.splits or (block.size,), 1), strict=True))
        if not found:
            raise ValueError("a batch without gradients has no features")
        like = next(iter(found.values()))
        return torch.cat(
            [found.get(name, like.new_zeros(n, size)) for name, size in self.sizes.items()], dim=1
        )
