"""The products of a step's rows with the queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.gradients.blocks import Block, Dense
from tracin.gradients.products import dot
from tracin.methods.online.segment import Segment

__all__ = ["Weighted", "row_products"]


@dataclass(frozen=True)
class Weighted:
    """Query gradients, and one number that their products are multiplied with."""

    block: Block
    factor: float = 1.0


def row_products(
    segments: Sequence[Segment], queries: Mapping[tuple[str, ...], Weighted], like: Tensor
) -> Tensor:
    """Products of every row of a step with every query, [b, q].

    Args:
        segments: The micro-batches in forward order.
        queries: The queries' gradients, and what their products are multiplied with.
        like: [q], of the products' dtype.

    Returns:
        The products in float64 on the CPU.
    """
    parts = []
    for segment in segments:
        totals: dict[float, Tensor] = {}
        for names, blocks in segment.blocks.items():
            if names not in queries:
                continue
            query = queries[names]
            total = totals.get(query.factor)
            if total is None:
                total = totals[query.factor] = like.new_zeros(segment.rows or 0, len(like))
            for block in blocks:
                _add_products(total, block, query.block)
        own = torch.zeros(segment.rows or 0, len(like), dtype=torch.float64)
        for factor, total in totals.items():
            own.add_(total.double().cpu(), alpha=factor)
        parts.append(own)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add_products(total: Tensor, rows: Block, queries: Block) -> None:
    if (
        isinstance(rows, Dense)
        and isinstance(queries, Dense)
        and rows.values.dtype == queries.values.dtype == total.dtype
    ):
        total.addmm_(rows.values, queries.values.mT)
    else:
        total += dot(rows, queries)
