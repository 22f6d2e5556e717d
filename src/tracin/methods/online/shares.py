r"""The rows' gradients of a step against what the optimizer is about to use, and their products with the queries.

Between the backward pass and ``optimizer.step`` a loop may scale all gradients by one number (clipping by norm, a loss
scale, an average over micro-batches):

    p.grad = c Σ_i g_i(p)   for every parameter p

c is found by least squares over all parameters. What is left over is a gradient that no row brought, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracin.errors import LoopError, NotFiniteError
from tracin.gradients.agreement import relative_error, tolerance
from tracin.gradients.blocks import Block, Convolution, Dense
from tracin.gradients.products import dot
from tracin.methods.online.segment import Segment

# One call for all tensors; the public function of it gives their common norm alone.
each_norm = getattr(torch, "_foreach_norm")  # noqa: B009

__all__ = ["Captured", "Weighted", "captured", "common_factor", "each_norm", "row_products"]

# Kernels add tens of thousands of summands one after another: oneDNN's weight gradient of a ResNet's first convolution was off
# by 13 epsilons of what Cauchy and Schwarz allow the summands, where ``agreement`` grants ten.
SUMMED = 10

Blocks = dict[tuple[str, ...], Block]


@dataclass(frozen=True)
class Weighted:
    """Query gradients, and one number that their products are multiplied with."""

    block: Block
    factor: float = 1.0


@dataclass(frozen=True)
class Captured:
    """A step's gradients: by micro-batch, and added up over all rows by parameter."""

    segments: list[Segment]
    totals: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """Rows over all micro-batches."""
        return sum(segment.rows or 0 for segment in self.segments)

    def scale(self, name: str) -> float:
        """How large what was added up to a parameter's gradient is, which bounds how well a sum that cancels can agree.

        Rows may cancel one another, and the pixels or tokens of a row may: batch norm makes both sums vanish.

        Args:
            name: The parameter.

        Returns:
            Σ_i ‖g_i‖ over the rows, or the bound of ``Segment.measure`` where that is larger.
        """
        rows = sum(
            float(block.squared_norm().sqrt().sum())
            for segment in self.segments
            for names, blocks in segment.blocks.items()
            if name in names
            for block in blocks
        )
        within = sum(float(size) for segment in self.segments for size in segment.sizes.get(name, []))
        return max(rows, SUMMED * within)


def captured(
    segments: Sequence[Segment], traced: Mapping[str, nn.Parameter], names: Sequence[str]
) -> Captured:
    """Add a step's gradients up.

    Args:
        segments: The micro-batches.
        traced: Parameters by name.
        names: Parameters whose gradients are read from the pass.

    Returns:
        The gradients; zeros for a parameter that no row used.
    """
    totals: dict[str, Tensor] = {}
    for segment in segments:
        for key, blocks in segment.blocks.items():
            # Multiplied out once, for the sum here and the products with the queries later.
            blocks[:] = [
                Dense(block.materialise()) if isinstance(block, Convolution) else block for block in blocks
            ]
            for block in blocks:
                sizes = [traced[name].numel() for name in key]
                for name, value in zip(key, block.total().split(sizes), strict=True):
                    totals[name] = totals[name] + value if name in totals else value
    for name in names:
        if name not in totals:
            totals[name] = torch.zeros_like(traced[name]).detach().reshape(-1)
    return Captured(list(segments), {name: totals[name] for name in names})


def common_factor(found: Captured, traced: Mapping[str, nn.Parameter], dtype: torch.dtype) -> float:
    """The number c with ``p.grad = c Σ_i g_i`` for every parameter.

    Args:
        found: The captured gradients.
        traced: Parameters by name, with the gradients that the optimizer is about to use.
        dtype: The least precise dtype of the arithmetic, which bounds how well the two can agree.

    Returns:
        c.

    Raises:
        LoopError: A parameter's gradient holds something else; the error names it.
        NotFiniteError: A gradient is NaN or infinite.
    """
    actual = {name: _gradient(traced[name]) for name in found.totals}
    pairs = {name: (total, actual[name].to(total.dtype)) for name, total in found.totals.items()}
    mixed = [torch.dot(mine, theirs) for mine, theirs in pairs.values()]
    products, squares = (
        torch.stack([*mixed, *(torch.dot(mine, mine) for mine, _ in pairs.values())]).double().chunk(2)
    )
    product, square = torch.stack([products.sum(), squares.sum()]).tolist()
    if not (math.isfinite(square) and math.isfinite(product)):
        raise NotFiniteError(
            f"the gradient of {_not_finite(found, actual)} is NaN or infinite when the optimizer steps. Lower the learning rate, "
            "or skip such steps."
        )
    factor = product / square if square > 0 else 1.0
    errors = _errors(found, pairs, factor, dtype)
    wrong = {name: error for name, error in errors.items() if error > tolerance(dtype)}
    if not wrong:
        return factor
    # One wrong parameter moves the least-squares factor; most parameters agree on the median.
    shares = torch.where(squares > 0, products / squares, torch.nan)
    median = float(shares.nanmedian())
    if math.isfinite(median):
        again = _errors(found, pairs, median, dtype)
        wrong = {name: error for name, error in again.items() if error > tolerance(dtype)} or wrong
    name, error = max(wrong.items(), key=lambda item: item[1])
    raise LoopError(
        f"the gradient of {name} is off by {error:.1e} from the sum of its rows' gradients"
        f"{f' ({len(wrong)} parameters in all)' if len(wrong) > 1 else ''}. One factor over all parameters is found and applied "
        "(clipping by norm, a loss scale, accumulation); this is something else: a penalty in the loss, clipping by value or per "
        "group, a backward pass outside the with block, gradients left from a step before, or randomness inside one module."
    )


def _errors(
    found: Captured, pairs: Mapping[str, tuple[Tensor, Tensor]], factor: float, dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors of the parameters that look wrong; those that agree at first sight are left out."""
    sums, gradients = [mine for mine, _ in pairs.values()], [theirs for _, theirs in pairs.values()]
    rest = torch._foreach_sub(gradients, sums, alpha=factor)  # pyright: ignore[reportPrivateImportUsage]
    norms = torch.stack(each_norm([*gradients, *rest])).double()
    norms, rests = norms.chunk(2)
    agree = (rests <= tolerance(dtype) * norms).tolist()
    total = float(torch.linalg.vector_norm(norms))
    out = {}
    for (name, (mine, theirs)), agreed in zip(pairs.items(), agree, strict=True):
        if not agreed:
            scale = abs(factor) * found.scale(name)
            out[name] = relative_error(mine * factor, theirs, dtype, scale, total)
    return out


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter).detach().reshape(-1)
    return (gradient.to_dense() if gradient.layout != torch.strided else gradient).detach().reshape(-1)


def _not_finite(found: Captured, actual: Mapping[str, Tensor]) -> str:
    for name, total in found.totals.items():
        if not bool(torch.isfinite(total).all() & torch.isfinite(actual[name]).all()):
            return name
    return "some parameter"


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
