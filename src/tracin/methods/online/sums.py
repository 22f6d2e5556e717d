r"""The sum of a step's rows against the gradient that the optimizer is about to use.

Between the backward pass and ``optimizer.step`` a loop may scale all gradients by one number (clipping by norm, a loss
scale, an average over micro-batches):

    p.grad = c Σ_i g_i(p)   for every parameter p

c is found by least squares over all parameters, weighted by how precise each one's arithmetic is. What is left over is a
gradient that no row brought, and is refused.

The sum for the weight of a linear layer or an embedding, W [o, i], costs as much as training spends on its gradient. It
is not formed: both sides are compared along eight random directions (Freivalds 1977),

    V (Σ_i g_i)ᵀ = Σ_i Σ_t (V a_it) ⊗ δ_it   against   V p.gradᵀ,   V [8, i] with entries from N(0, 1/8).

E‖V Rᵀ‖² = ‖R‖² for every R, so the norms keep their meaning, and what is left over shows: by a Chernoff bound
P(‖V Rᵀ‖ ≤ ε‖R‖) ≤ (√e ε)⁸, below 1e-14 for a residue that would look a hundred times smaller than it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from tracin.errors import LoopError, NotFiniteError
from tracin.gradients.agreement import accumulation_dtype, rounding, tolerance
from tracin.gradients.blocks import Block, Dense, Outer, Rows, Sum
from tracin.gradients.pictures import Convolution
from tracin.methods.online.segment import Segment

__all__ = ["Captured", "captured", "common_factor", "each_norm"]

# One kernel for the norms of all tensors, three times a step; torch's public function of it gives their common norm alone.
each_norm = getattr(torch, "_foreach_norm")  # noqa: B009

# Kernels add tens of thousands of summands one after another: oneDNN's weight gradient of a ResNet's first convolution was off
# by 13 epsilons of what Cauchy and Schwarz allow the summands, where ten are granted.
SUMMED = 10
DIRECTIONS = 8


@dataclass(frozen=True)
class Captured:
    """A step's gradients: by micro-batch, and added up over all rows by parameter, flat, along ``directions`` if it has some."""

    segments: list[Segment]
    totals: dict[str, Tensor]
    directions: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """Rows over all micro-batches."""
        return sum(segment.rows or 0 for segment in self.segments)

    def seen(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient of a parameter as ``totals`` has it.

        Args:
            name: The parameter.
            gradient: Its gradient, of its own shape or flat.

        Returns:
            The gradient, flat, along the parameter's directions if it has some.
        """
        return _along(gradient, self.directions.get(name))

    def scales(self, name: str) -> tuple[float, float]:
        """How large what was added up to a parameter's gradient is, which bounds how well a sum that cancels can agree.

        Rows may cancel one another, and the pixels or tokens of a row may: batch norm makes both sums vanish.

        Args:
            name: The parameter.

        Returns:
            Σ_i ‖g_i‖ over the rows, and the bound of ``Segment.measure`` on what is added up within them.
        """
        rows = sum(
            float(block.squared_norm().sqrt().sum())
            for segment in self.segments
            for names, blocks in segment.blocks.items()
            if name in names
            for block in blocks
        )
        within = sum(float(size) for segment in self.segments for size in segment.sizes.get(name, []))
        return float(rows), float(within)


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
    directions = dict(_directions_of(segments, traced))
    for segment in segments:
        for key, blocks in segment.blocks.items():
            # Multiplied out once, for the sum here and the products with the queries later.
            blocks[:] = [
                Dense(block.materialise()) if isinstance(block, Convolution) else block for block in blocks
            ]
            for block in blocks:
                added = _added(block, [(traced[name].numel(), directions.get(name)) for name in key])
                for name, value in zip(key, added, strict=True):
                    totals[name] = totals[name] + value if name in totals else value
    for name in names:
        if name not in totals:
            totals[name] = torch.zeros_like(traced[name]).detach().reshape(-1)
    return Captured(list(segments), {name: totals[name] for name in names}, directions)


def _directions_of(
    segments: Sequence[Segment], traced: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """V of the parameters whose rows' gradients are factors, where it is smaller than the parameter."""
    factors: dict[str, Outer | Rows] = {}
    for segment in segments:
        for names, blocks in segment.blocks.items():
            for factor in (factor for block in blocks for factor in _factors(block)):
                factors[names[0]] = factor
    for name, factor in factors.items():
        shape = traced[name].shape
        if len(shape) == 2 and DIRECTIONS * sum(shape) < shape.numel():
            yield name, _drawn(shape[1], factor.d.dtype, factor.d.device)


def _factors(block: Block) -> list[Outer | Rows]:
    if isinstance(block, Sum):
        return [factor for part in block.parts for factor in _factors(part)]
    return [block] if isinstance(block, Outer | Rows) else []


@lru_cache(maxsize=256)
def _drawn(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    drawn = torch.randn(DIRECTIONS, columns, generator=generator, dtype=dtype, device="cpu")
    return (drawn / DIRECTIONS**0.5).to(device)


def _added(block: Block, parameters: Sequence[tuple[int, Tensor | None]]) -> list[Tensor]:
    """A block's sum over rows for each of its parameters, given by their sizes and directions."""
    _, v = parameters[0]
    if isinstance(block, Sum):
        return [
            torch.stack(parts).sum(0)
            for parts in zip(*(_added(part, parameters) for part in block.parts), strict=True)
        ]
    if isinstance(block, Outer) and v is not None and v.shape[1] == block.a.shape[2]:
        a, d = block.a.flatten(0, 1), block.d.flatten(0, 1)
        weight = ((v @ a.mT) @ d).reshape(-1)
        return [weight] if block.bias is None else [weight, d.sum(0) * block.bias]
    if isinstance(block, Rows) and v is not None and v.shape[1] == block.d.shape[2]:
        table = Rows(block.index, block.d @ v.mT, block.length).total()
        return [table.view(-1, len(v)).mT.reshape(-1)]
    sums = block.total().split([size for size, _ in parameters])
    return [_along(value, directions) for value, (_, directions) in zip(sums, parameters, strict=True)]


def _along(gradient: Tensor, directions: Tensor | None) -> Tensor:
    """A gradient, flat, or [o, i] along directions [k, i] and then flat, [k, o]."""
    if directions is None:
        return gradient.reshape(-1)
    return (directions @ gradient.reshape(-1, directions.shape[1]).mT.to(directions.dtype)).reshape(-1)


def common_factor(
    found: Captured, traced: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]
) -> float:
    """The number c with ``p.grad = c Σ_i g_i`` for every parameter.

    Args:
        found: The captured gradients.
        traced: Parameters by name, with the gradients that the optimizer is about to use.
        dtypes: The least precise dtype of each parameter's arithmetic, which bounds how well the two can agree.

    Returns:
        c.

    Raises:
        LoopError: A parameter's gradient holds something else; the error names it.
        NotFiniteError: A gradient is NaN or infinite.
    """
    actual = {name: found.seen(name, _gradient(traced[name])) for name in found.totals}
    pairs = {name: (total, actual[name].to(total.dtype)) for name, total in found.totals.items()}
    mixed = [torch.dot(mine, theirs) for mine, theirs in pairs.values()]
    products, squares = (
        torch.stack([*mixed, *(torch.dot(mine, mine) for mine, _ in pairs.values())]).double().chunk(2)
    )
    # A parameter counts as much as its arithmetic is precise.
    weights = products.new_tensor([tolerance(dtypes[name]) for name in pairs]).reciprocal().square()
    weights = weights / weights.max() if len(weights) else weights
    product, square = torch.stack([weights @ products, weights @ squares]).tolist()
    if not (math.isfinite(square) and math.isfinite(product)):
        raise NotFiniteError(
            f"the gradient of {_not_finite(found, actual)} is NaN or infinite when the optimizer steps. Lower the learning rate, "
            "or skip such steps."
        )
    factor = product / square if square > 0 else 1.0
    errors = _errors(found, pairs, factor, dtypes)
    wrong = {name: error for name, error in errors.items() if error > 1}
    if not wrong:
        return factor
    # One wrong parameter moves the least-squares factor; most parameters agree on the median.
    shares = torch.where(squares > 0, products / squares, torch.nan)
    median = float(shares.nanmedian())
    if math.isfinite(median):
        again = _errors(found, pairs, median, dtypes)
        wrong = {name: error for name, error in again.items() if error > 1} or wrong
    name, error = max(wrong.items(), key=lambda item: item[1])
    raise LoopError(
        f"the gradient of {name} is off by {error * tolerance(dtypes[name]):.1e} from the sum of its rows' gradients"
        f"{f' ({len(wrong)} parameters in all)' if len(wrong) > 1 else ''}. One factor over all parameters is found and applied "
        "(clipping by norm, a loss scale, accumulation); this is something else: a penalty in the loss, clipping by value or per "
        "group, a backward pass outside the with block, gradients left from a step before, or randomness inside one module."
    )


def _errors(
    found: Captured,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    factor: float,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, float]:
    """Errors of the parameters that look wrong, those that agree at first sight left out.

    ‖p.grad − c Σ g‖ may be ``tolerance`` of ‖p.grad‖, or, for a sum that cancels, what rounding leaves of it. Both sides add
    up the same δ, in float32 or better: ten of its epsilons of what was added up. Coarser arithmetic rounds a sum, or what
    is multiplied for it, once: one epsilon.

    Returns:
        Multiples of what is granted.
    """
    gradients = [theirs for _, theirs in pairs.values()]
    rest = [torch.sub(theirs, mine, alpha=factor) for mine, theirs in pairs.values()]
    norms = torch.stack(each_norm([*gradients, *rest])).double()
    norms, rests = norms.chunk(2)
    total = float(torch.linalg.vector_norm(norms))
    out = {}
    for name, norm, off in zip(pairs, norms.tolist(), rests.tolist(), strict=True):
        granted = tolerance(dtypes[name]) * norm
        if off <= granted:
            continue
        rows, within = (abs(factor) * scale for scale in found.scales(name))
        wide = accumulation_dtype(dtypes[name])
        noise = rounding(wide, max(rows, SUMMED * within, total))
        if dtypes[name] != wide:
            noise += torch.finfo(dtypes[name]).eps * max(rows, within)
        granted = max(granted, noise)
        out[name] = off / granted if granted > 0 and not math.isnan(off) else math.inf
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
