"""Inner products of two batches of gradients, and the representation that queries are held in.

The query's representation decides the route: against a ``Dense`` query the train side is multiplied out, against an
``Outer`` query the product stays factored. Cost in multiply-adds:

    factored         n m t s (i + o)
    multiplied out   n t i o + n m i o
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tracin.gradients.blocks import Block, Dense, MultipliedOut, Outer, Rows, Sum, tiles
from tracin.gradients.pictures import Convolution, Filters
from tracin.shapes import Float

__all__ = ["concatenate", "dot", "held", "widened"]

# A long sum is cut into this many pieces where the result has at most so many rows or columns, and where it and a piece are
# large enough: as `python benchmarks/narrow.py` found it on two CPU cores.
PIECES, NARROW, LEAST_RESULT, LEAST_PIECE = 8, 64, 512, 4096


def dot(train: Block, queries: Block) -> Float[Tensor, "n m"]:
    r"""All inner products :math:`\langle g(z_n), g(z'_m) \rangle` of two blocks of the same parameter.

    Args:
        train: n examples.
        queries: m examples; their representation decides the route (see the module's docstring).

    Returns:
        The products, [n, m].

    Example:
        >>> x = Outer(torch.ones(2, 1, 3), torch.ones(2, 1, 4), bias=1.0)
        >>> dot(x, Dense(x.materialise()))
        tensor([[16., 16.],
                [16., 16.]])
    """
    if isinstance(queries, Sum):
        return torch.stack([dot(train, part) for part in queries.parts]).sum(0)
    if isinstance(train, Convolution) and isinstance(queries, Outer) and train.shape.groups == 1:
        train = train.outer()
    if isinstance(train, Outer) and isinstance(queries, Outer):
        return _dot_factored(train, queries)
    if isinstance(train, Rows) and isinstance(queries, Rows):
        return _dot_matching(train, queries)
    if isinstance(train, Rows) and isinstance(queries, Dense) and train.index.shape[1] < train.length:
        return _dot_gathered(train, queries)
    if isinstance(queries, MultipliedOut) and isinstance(train, Convolution | Filters):
        parts = [_of_filters(train.rows(*span), queries) for span in tiles(len(train), train.size)]
    else:
        other = queries.materialise().mT
        parts = [_multiplied_out(train.rows(*span), other) for span in tiles(len(train), train.size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_filters(train: Convolution | Filters, queries: MultipliedOut) -> Float[Tensor, "n m"]:
    """The products as the entries lie; where one side's kernel comes first alone, the smaller side is brought into order."""
    out = train.multiplied_out() if isinstance(train, Convolution) else train
    if type(out) is type(queries):
        return _product(out.values, queries.values.mT)
    if isinstance(out, Filters) and len(queries) < len(out):
        return _product(out.values, out.ordered(queries.values).mT)
    return _product(out.materialise(), queries.materialise().mT)


def _multiplied_out(train: Block, queries: Float[Tensor, "p m"]) -> Float[Tensor, "n m"]:
    """Each example's gradient, piece by piece, times the queries'."""
    first, *more = train.pieces()
    out, at = _product(first, queries[: first.shape[1]]), first.shape[1]
    for piece in more:
        out = out.addmm_(piece, queries[at : at + piece.shape[1]])
        at += piece.shape[1]
    return out


def _product(left: Float[Tensor, "n p"], right: Float[Tensor, "p m"]) -> Float[Tensor, "n m"]:
    """left @ right; where one side is narrow, the long sum is cut into pieces that threads can share."""
    # A matrix product shares out the rows and columns of its result, and has too few of them here.
    (n, p), m = left.shape, right.shape[1]
    length = p // PIECES
    narrow = min(n, m) <= NARROW and n * m >= LEAST_RESULT and length >= LEAST_PIECE
    if not narrow or left.device.type != "cpu" or torch.get_num_threads() == 1:
        return left @ right
    cut = length * PIECES
    pieces = left[:, :cut].unflatten(1, (PIECES, length)).transpose(0, 1)
    out = torch.bmm(pieces, right[:cut].unflatten(0, (PIECES, length))).sum(0)
    return out if cut == p else out.addmm_(left[:, cut:], right[cut:])


def _dot_factored(train: Outer, queries: Outer) -> Float[Tensor, "n m"]:
    """Σ_ts (a_t·a'_s + b b')(δ_t·δ'_s), in tiles of train rows."""
    (n, t, _), (m, s, _) = train.a.shape, queries.a.shape
    bias = 0.0 if train.bias is None or queries.bias is None else train.bias * queries.bias
    query_a, query_d = queries.a.reshape(m * s, -1).mT, queries.d.reshape(m * s, -1).mT
    parts = []
    for start, stop in tiles(n, 2 * t * m * s):
        a = train.a[start:stop].reshape((stop - start) * t, -1) @ query_a  # [nt, ms]
        if bias:
            a += bias
        a *= train.d[start:stop].reshape((stop - start) * t, -1) @ query_d
        parts.append(a if t == s == 1 else a.view(stop - start, t, m, s).sum((1, 3)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dot_matching(train: Rows, queries: Rows) -> Float[Tensor, "n m"]:
    """Σ_ts [index_t = index'_s] δ_t·δ'_s, in tiles of train rows."""
    (n, t, _), (m, s, _) = train.d.shape, queries.d.shape
    query_d, query_index = queries.d.reshape(m * s, -1).mT, queries.index.reshape(1, m * s)
    parts = []
    for start, stop in tiles(n, 3 * t * m * s):
        products = train.d[start:stop].reshape((stop - start) * t, -1) @ query_d
        same = train.index[start:stop].reshape(-1, 1) == query_index
        parts.append(torch.where(same, products, 0.0).view(stop - start, t, m, s).sum((1, 3)))
    return torch.cat(parts)


def _dot_gathered(train: Rows, queries: Dense) -> Float[Tensor, "n m"]:
    """Σ_t δ_t · Q[index_t], token by token, where the queries are multiplied out."""
    n, t, o = train.d.shape
    m = len(queries)
    table = queries.values.view(m, train.length, o).transpose(0, 1)  # [v, m, o]
    parts = []
    for start, stop in tiles(n, t * m * o):
        gathered = table[train.index[start:stop].reshape(-1)]  # [nt, m, o]
        d = train.d[start:stop].reshape(-1, o, 1)
        parts.append(torch.bmm(gathered, d).view(stop - start, t, m).sum(1))
    return torch.cat(parts)


def widened(block: Block) -> Block:
    """The gradients in float64, in which the square of a tiny float32 gradient does not vanish."""
    if isinstance(block, Outer):
        return replace(block, a=block.a.double(), d=block.d.double())
    if isinstance(block, Rows):
        return replace(block, d=block.d.double())
    if isinstance(block, MultipliedOut):
        return replace(block, values=block.values.double())
    if isinstance(block, Sum):
        return Sum(tuple(widened(part) for part in block.parts))
    return Dense(block.materialise().double())


def held(block: Block, train_rows: int, train_uses: int | None = None) -> Block:
    """The representation in which queries are held: multiplied out where that costs less over the run.

    Args:
        block: The queries' gradients.
        train_rows: Train rows that will be multiplied with each held query.
        train_uses: Uses t per train example, where it differs from the queries'.

    Returns:
        A ``Dense``, ``Outer`` or ``Rows`` block (or a ``Sum`` of such).
    """
    m = len(block)
    if isinstance(block, Outer):
        s, i, o = block.uses, block.a.shape[2], block.d.shape[2]
        t = train_uses or s
        factored = train_rows * m * t * s * (i + o)
        out = train_rows * (t + m) * i * o + m * s * i * o
        return block if factored <= out else Dense(block.materialise())
    if isinstance(block, Convolution):
        t = block.d[0, :, 0].numel()
        i, o = block.size // block.shape.out_channels, block.shape.out_channels
        if block.shape.groups == 1 and train_rows * m * t * t * (i + o) < train_rows * (t + m) * i * o:
            return block.outer()
        return block.multiplied_out()
    if isinstance(block, Rows):
        t, o = block.index.shape[1], block.d.shape[2]
        # Matching multiplies t·s pairs, gathering t; the table costs v·o memory per query.
        return Dense(block.materialise()) if block.length <= 4 * t * t else block
    if isinstance(block, Sum):
        return Dense(block.materialise())
    return block


def concatenate(blocks: Sequence[Block]) -> Block:
    """Blocks of consecutive batches as one; shorter ones are padded with uses that contribute nothing.

    Args:
        blocks: At least one, all of one kind after ``held``.

    Returns:
        One block of all examples.
    """
    if len(blocks) == 1 and not isinstance(blocks[0], MultipliedOut):
        return blocks[0]
    if all(isinstance(block, Outer) for block in blocks):
        outers = [block for block in blocks if isinstance(block, Outer)]
        if len({block.bias for block in outers}) == 1:
            t = max(block.uses for block in outers)
            a = torch.cat([_padded(block.a, t) for block in outers])
            return Outer(a, torch.cat([_padded(block.d, t) for block in outers]), outers[0].bias)
    if all(isinstance(block, Rows) for block in blocks):
        tables = [block for block in blocks if isinstance(block, Rows)]
        t = max(block.index.shape[1] for block in tables)
        index = torch.cat([_padded(block.index, t) for block in tables])
        return Rows(index, torch.cat([_padded(block.d, t) for block in tables]), tables[0].length)
    # Laid out as [p, m]: a product with few rows on either side reads its right factor along the rows, which is a sixth
    # faster than along the columns.
    if all(isinstance(block, Filters) for block in blocks):
        filters = [block for block in blocks if isinstance(block, Filters)]
        return replace(filters[0], values=torch.cat([block.values.mT for block in filters], 1).mT)
    return Dense(torch.cat([block.materialise().mT for block in blocks], 1).mT)


def _padded(values: Tensor, t: int) -> Tensor:
    if values.shape[1] == t:
        return values
    padding = values.new_zeros(values.shape[0], t - values.shape[1], *values.shape[2:])
    return torch.cat([values, padding], 1)
