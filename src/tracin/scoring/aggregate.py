r"""Scores for groups of queries, for the price of one query each: the queries' gradients are summed first.

    score(z, S) = Σ_c w_c ⟨g_c(z), Σ_{z' in S} g_c(z')⟩  (/ |S|)        (unit gradients in place of g_c under ``normalize``)

By linearity this is the sum (mean) of the scores for the group's queries. At a checkpoint memory holds one gradient for each
group or less, whatever the number of queries; where that exceeds the budget, groups go in tiles, with a pass over the data for
each.

Axis letters: n train rows · m queries · g groups · p parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracin.data import Batch
from tracin.errors import NotFiniteError, OptionError
from tracin.gradients.blocks import Block
from tracin.gradients.engine import BatchGradients, name_not_finite
from tracin.gradients.products import widened
from tracin.gradients.sums import Members
from tracin.gradients.targets import GroupSums, Target, dot_targets
from tracin.progress import Progress, progress
from tracin.scoring.fits import query_budget, refuse_too_large
from tracin.scoring.passes import compared
from tracin.scoring.run import Run, refuse_products
from tracin.shapes import Float, Int

__all__ = [
    "REDUCTIONS",
    "Groups",
    "Sums",
    "Targets",
    "add_batch",
    "aggregate",
    "check_reduction",
    "score_targets",
    "tiled",
    "weighted",
]

REDUCTIONS = ("mean", "sum")
Sums = dict[tuple[str, ...], GroupSums]
Targets = dict[tuple[str, ...], Target]


def check_reduction(reduction: Any) -> None:
    """Refuse what is no reduction.

    Args:
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        OptionError: It is something else.
    """
    if reduction not in REDUCTIONS:
        raise OptionError(f"aggregate: reduction is {reduction!r}. Choose 'mean' or 'sum'.")


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group every query belongs to.

    Attributes:
        labels: The groups' labels, ascending [g].
        member: The place of each query's group among them [m].
        sizes: Queries of each group [g].
    """

    labels: Int[Tensor, " g"]
    member: Int[Tensor, " m"]
    sizes: Int[Tensor, " g"]

    @classmethod
    def of(cls, labels: Int[Tensor, " m"] | None, m: int) -> Groups:
        """The groups of m queries.

        Args:
            labels: The label of each; None: one group of all, with the label 0.
            m: Queries.

        Returns:
            The groups.

        Raises:
            OptionError: There are more or fewer labels than queries.

        Example:
            >>> groups = Groups.of(torch.tensor([7, 3, 7]), 3)
            >>> groups.labels, groups.member, groups.sizes
            (tensor([3, 7]), tensor([1, 0, 1]), tensor([1, 2]))
        """
        given = torch.zeros(m, dtype=torch.int64) if labels is None else labels.cpu().long()
        if len(given) != m:
            raise OptionError(f"aggregate: by has {len(given)} entries for {m} rows. Give the group of each.")
        found, member, sizes = torch.unique(given, return_inverse=True, return_counts=True)
        return cls(found, member, sizes)

    def __len__(self) -> int:
        return len(self.labels)

    def divisors(self, span: range, reduction: str, like: Tensor) -> Float[Tensor, " g"]:
        """What the sums of these groups are divided by."""
        sizes = self.sizes[span.start : span.stop].to(like)
        return sizes if reduction == "mean" else torch.ones_like(sizes)


def tiled(run: Run, groups: Groups) -> list[range]:
    """The groups in tiles whose sums fit the memory.

    Args:
        run: A run at its first checkpoint.
        groups: The groups.

    Returns:
        Each tile's groups, one at the least.
    """
    budget = query_budget(run, "aggregate", groups=len(groups))
    at_once = max(1, budget // (run.size * _dtype(run).itemsize))
    return [range(start, min(start + at_once, len(groups))) for start in range(0, len(groups), at_once)]


def _dtype(run: Run) -> torch.dtype:
    """Sums of unit gradients stay in float64, in which they are made."""
    return torch.float64 if run.settings.normalize else run.dtype


def _units(blocks: Mapping[tuple[str, ...], Block]) -> tuple[dict[tuple[str, ...], Block], Tensor]:
    """The gradients in float64, and one over their lengths [n]; 0 for a zero gradient."""
    wide = {names: widened(block) for names, block in blocks.items()}
    lengths = torch.stack([block.squared_norm() for block in wide.values()]).sum(0).sqrt()
    tiny = torch.finfo(lengths.dtype).tiny
    return wide, torch.where(lengths > 0, 1.0 / lengths.clamp_min(tiny), 0.0)


def _summed(run: Run, groups: Groups, span: range, bar: Progress) -> Targets:
    """The sums of the queries' gradients by group, at the loaded checkpoint, without any rate."""
    sums: Sums = {}
    for batch, value in run.batches(run.asked):
        add_batch(run, groups, span, sums, batch, value)
        bar.advance(batch.size)
    return {names: found.target() for names, found in sums.items()}


def add_batch(run: Run, groups: Groups, span: range, sums: Sums, batch: Batch, value: Any) -> None:
    """Add a batch's gradients to the sums of their groups, in place; unit gradients under ``normalize``.

    Args:
        run: A run with queries, at a checkpoint.
        groups: Which query belongs to which group.
        span: The groups to sum.
        sums: What was added so far; parameters that no query uses stay absent.
        batch: Queries.
        value: The batch on the device.

    Raises:
        NotFiniteError: A gradient is NaN or infinite; the row and parameter are named.
    """
    member = groups.member[batch.start : batch.start + batch.size] - span.start
    member = member.masked_fill(member >= len(span), -1).clamp_min(-1)
    if not bool((member >= 0).any()):
        return
    found = run.gradients(run.asked, batch, value)
    blocks = compared(run, found)
    if run.settings.normalize and blocks:
        wide, inverse = _units(blocks)
        blocks = {names: block.weighted(inverse) for names, block in wide.items()}
    members = int(groups.sizes[span.start : span.stop].sum())
    like = torch.empty(0, dtype=_dtype(run), device=run.loaded.device)
    seen, mine = [], Members.of(member, run.loaded.device)
    for names, block in blocks.items():
        if names not in sums:
            sums[names] = GroupSums(len(span), members, len(names), like)
        seen.append(sums[names].add(block, mine))
    _refuse_infinite(run, seen, found, batch)


def _refuse_infinite(run: Run, seen: list[Tensor], found: BatchGradients, batch: Batch) -> None:
    if not seen or bool(torch.isfinite(torch.stack([one.double() for one in seen])).all()):
        return
    name_not_finite(found.blocks, batch, f"queries, {run.where}")
    raise NotFiniteError(
        f"the sum of the gradients of rows {batch.rows[0]} to {batch.rows[-1]} overflows {run.dtype} (queries, {run.where}). "
        "Use a float64 model."
    )


def score_targets(
    run: Run, batch: Batch, value: Any, targets: Targets, g: int, weights: Tensor | None = None
) -> Float[Tensor, "n g"]:
    """A train batch's products with the targets at the loaded checkpoint.

    Args:
        run: The run.
        batch: The batch's place.
        value: The batch.
        targets: One gradient for each group, weighted.
        g: Groups.
        weights: Under ``normalize``, the weight of each group [g].

    Returns:
        The products, on the device, in the scores' dtype.

    Raises:
        NotFiniteError: A product is NaN or infinite.
    """
    found = run.gradients(run.train, batch, value)
    blocks = compared(run, found)
    inverse = None
    if weights is not None and blocks:
        blocks, inverse = _units(blocks)
    values = torch.zeros(batch.size, g, dtype=_dtype(run), device=run.loaded.device)
    for names, block in blocks.items():
        if names in targets:
            values += dot_targets(block, targets[names])
        else:
            # No query uses these parameters: nothing to add, but a NaN in them must not pass unseen.
            values += 0.0 * block.squared_norm()[:, None]
    if weights is not None and inverse is not None:
        values = (values * inverse[:, None] * weights).to(run.dtype)
    refuse_products(values, found, batch, f"train, {run.where}")
    return values.to(run.dtype)


def aggregate(run: Run, groups: Groups, reduction: str) -> Float[Tensor, "g n"]:
    """The scores of every train row for every group.

    Args:
        run: A run with queries.
        groups: Which query belongs to which group.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        The scores on the CPU.

    Raises:
        MemoryLimitError: The scores and a batch do not fit ``memory``; the message says what would.
    """
    n, m, c = len(run.train.rows), len(run.asked.rows), len(run.trajectory)
    with progress("aggregate", c * (n + m), show=run.settings.progress) as bar:
        run.go(0)
        refuse_too_large(run, "aggregate", groups=len(groups))
        values = torch.zeros(len(groups), n, dtype=run.dtype)
        tiles = tiled(run, groups)
        for index in range(c):
            run.go(index)
            for span in tiles:
                if span.start:
                    bar.grow(n + m)
                _add_tile(run, groups, span, reduction, values, bar)
    return values


def _add_tile(
    run: Run, groups: Groups, span: range, reduction: str, values: Float[Tensor, "g n"], bar: Progress
) -> None:
    """Add a tile's scores at the loaded checkpoint, in place; its sums are freed at the end."""
    targets, weights = weighted(run, _summed(run, groups, span, bar), groups, span, reduction)
    for batch, value in run.batches(run.train):
        part = score_targets(run, batch, value, targets, len(span), weights)
        values[span.start : span.stop, batch.start : batch.start + batch.size] += part.cpu().mT
        bar.advance(batch.size)


def weighted(
    run: Run, sums: Targets, groups: Groups, span: range, reduction: str
) -> tuple[Targets, Tensor | None]:
    """The sums times the rates and over the groups' sizes; under ``normalize`` these stay apart.

    Args:
        run: The run at the sums' checkpoint.
        sums: The sums of a tile's groups.
        groups: All groups.
        span: The tile.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        The targets, and under ``normalize`` the weight of each.
    """
    like = torch.empty(0, dtype=_dtype(run), device=run.loaded.device)
    inverse = 1.0 / groups.divisors(span, reduction, like)
    if run.settings.normalize:
        return sums, next(iter(run.rates.values())) * inverse
    return {
        names: target.scaled(run.rates_of(names)).weighted(inverse) for names, target in sums.items()
    }, None
