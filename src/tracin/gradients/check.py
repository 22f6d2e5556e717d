"""The always-on check: on the first batch of a run, the gradients that will be scored against autograd's.

(a) The sum of the per-example gradients, each row with a weight of its own, equals autograd's gradient of the weighted
sum of the losses, for every parameter; or, where it does not, the weighted sum of the gradients that autograd finds for each
row by itself. (In float32 these can be far more accurate than its own sum over a batch, as for a convolution's bias whose
pixels cancel.) (b) For the few rows of the probe, the row's gradient equals autograd of ``losses[i]`` in the same graph
(``wiring``). (c) ``losses[i]`` equals the loss of row i without the others (the row twice, since some models cannot run a
batch of one).

A parameter that fails (a) or (b) goes row by row from there on and is named; (c) is an error. A parameter whose
reference is zero is checked in the first batch where it is not. A model that moves rows about (``movement``) is checked
on every batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracin.checksums import row_checksums, same_checksums
from tracin.data import Batch
from tracin.errors import DataError, LossError
from tracin.gradients import reference
from tracin.gradients.agreement import relative_error, tolerance
from tracin.gradients.engine import BatchGradients, Keys, Source, batch_gradients, name_not_finite
from tracin.gradients.probe import refuse_mixing as same_rows
from tracin.gradients.sites import LocalSite, RuleSite, Wiring

__all__ = ["checked_gradients", "refuse_mixing", "row_errors"]

logger = logging.getLogger("tracin")


def _by_parameter(
    blocks: Mapping[tuple[str, ...], Tensor], traced: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Flat gradients [..., p] of blocks as one gradient [..., p] per parameter; absent ones are left out."""
    out = {}
    for names, values in blocks.items():
        sizes = [traced[name].numel() for name in names]
        out |= dict(zip(names, values.split(sizes, -1), strict=True))
    return out


class _Comparison:
    """The largest error of each parameter so far, and those whose reference was zero everywhere."""

    def __init__(self, traced: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        self.traced, self.dtype = traced, dtype
        self.errors = dict.fromkeys(traced, 0.0)
        self.zero = set(traced)

    def add(
        self,
        blocks: Mapping[tuple[str, ...], Tensor],
        truth: Mapping[str, Tensor],
        scales: Mapping[str, float],
        total: float,
    ) -> None:
        """Compare gradients [p] with autograd's; ``scales`` and ``total`` are as in ``relative_error``."""
        mine = _by_parameter(blocks, self.traced)
        for name, reference_gradient in truth.items():
            if bool(reference_gradient.any()):
                self.zero.discard(name)
            estimate = mine.get(name)
            if estimate is None:
                estimate = torch.zeros_like(reference_gradient)
            error = relative_error(estimate, reference_gradient, self.dtype, scales.get(name, 0.0), total)
            self.errors[name] = max(self.errors[name], error)

    def failed(self) -> dict[str, float]:
        """The errors of what does not agree."""
        return {name: error for name, error in self.errors.items() if error > tolerance(self.dtype)}


def row_errors(
    found: BatchGradients, traced: Mapping[str, nn.Parameter], rows: list[int], dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors of single rows' gradients against autograd in the same graph.

    Args:
        found: Gradients with their graph kept.
        traced: Parameters to compare.
        rows: Positions in the batch.
        dtype: The least precise dtype of the arithmetic.

    Returns:
        The largest error per parameter.
    """
    comparison = _Comparison(traced, dtype)
    for row in rows:
        truth = reference.in_graph(found.losses, traced, row)
        norms = {name: float(torch.linalg.vector_norm(g)) for name, g in truth.items()}
        mine = {names: block.rows(row, row + 1).materialise()[0] for names, block in found.blocks.items()}
        comparison.add(mine, truth, norms, math.hypot(*norms.values()))
    return comparison.errors


def _failures(
    source: Source, batch: Batch, found: BatchGradients, against: Mapping[str, nn.Parameter]
) -> tuple[dict[str, float], set[str]]:
    """The parameters that fail (a), with their errors, and those whose reference is zero."""
    weights = _row_weights(found.losses)
    truth = reference.summed(found.losses, against, weights)
    wanted = {names: block for names, block in found.blocks.items() if set(names) <= set(against)}
    squares = {names: block.squared_norm() for names, block in wanted.items()}
    scales = {name: float(square.sqrt().sum()) for names, square in squares.items() for name in names}
    rows_total = float(torch.stack(list(squares.values())).sum(0).sqrt().sum()) if squares else 0.0
    total = max(rows_total, math.hypot(*(float(torch.linalg.vector_norm(g)) for g in truth.values())))
    sums = {names: block.weighted(weights).total() for names, block in wanted.items()}
    comparison = _Comparison(against, source.dtype)
    comparison.add(sums, truth, scales, total)
    failed = comparison.failed()
    doubted = {name: against[name] for name in failed if name not in source.wiring.by_row}
    if doubted:
        apart = _Comparison(against, source.dtype)
        alone = reference.summed_alone(source.run, source.take, batch.rows, doubted, weights)
        apart.add(sums, alone, scales, total)
        failed = {name: error for name, error in failed.items() if name not in doubted} | apart.failed()
    return failed, comparison.zero


def _row_weights(losses: Tensor) -> Tensor:
    """A different weight for each row, in no order: gradients that land on other rows change the sum."""
    n = len(losses)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return torch.linspace(0.5, 1.5, n)[order].to(dtype=losses.dtype, device=losses.device)


def refuse_mixing(source: Source, batch: Batch, losses: Tensor, seen: Tensor | None) -> None:
    """Hold ``losses[i]`` against the loss of row i alone.

    Args:
        source: The loss and its rows.
        batch: The batch whose losses these are.
        losses: Its losses [n].
        seen: Checksums of the batch's rows (in float64) from before the model ran, which may have written into the batch.

    Raises:
        LossError: The loss of a row depends on the rows around it.
        DataError: The dataset gave another row when asked again.
    """
    for at in sorted({0, batch.size - 1}):
        row = batch.rows[at]
        if seen is not None:
            _refuse_another_row(source, batch, row, seen[at])
        repeat = [row] * (3 if batch.size == 2 else 2)
        again = source.run(source.take(repeat), repeat)
        same_rows(losses[at : at + 1], again[:1], [row], source.dtype)


def _refuse_another_row(source: Source, batch: Batch, row: int, seen: Tensor) -> None:
    again = source.rows.take([row])
    fresh = row_checksums(Batch([row], again), double=True)
    same_shape = fresh is not None and _row_numel(again, 1) == _row_numel(batch.value, batch.size)
    if fresh is not None and same_shape and not bool(same_checksums(fresh[0], seen)):
        raise DataError(
            f"{source.rows.name}: row {row} came back different when it was read again. Turn off augmentation and other "
            "randomness in the dataset for tracing."
        )


def _row_numel(value: object, n: int) -> int:
    leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor) and x.dim() and x.shape[0] == n]
    return sum(x.numel() // n for x in leaves)


def _demoted(wiring: Wiring, errors: Mapping[str, float]) -> Wiring:
    """The wiring with these parameters going row by row."""
    rules, places = {}, {}
    for key, site in wiring.rules.items():
        roles = {role: name for role, name in site.roles.items() if name not in errors}
        if roles:
            rules[key] = RuleSite(site.site, site.module, site.rule, roles, site.layouts)
    for key, place in wiring.locals.items():
        names = {name: own for name, own in place.names.items() if name not in errors}
        if names:
            places[key] = LocalSite(place.site, place.module, names, place.layouts)
    reasons = {
        name: f"off by {error:.1e} from autograd on {wiring.route(name)}" for name, error in errors.items()
    }
    return replace(
        wiring,
        rules=rules,
        shared={name: site for name, site in wiring.shared.items() if name not in errors},
        locals=places,
        by_row=tuple(dict.fromkeys((*wiring.by_row, *errors))),
        unused=tuple(name for name in wiring.unused if name not in errors),
        uses={name: counts for name, counts in wiring.uses.items() if name not in errors},
        reasons={**wiring.reasons, **reasons},
    )


def checked_gradients(
    source: Source,
    keys: Keys,
    batch: Batch,
    value: object,
    traced: Mapping[str, nn.Parameter],
    first: bool,
    *,
    keep_graph: bool = False,
) -> BatchGradients:
    """A batch's gradients, checked against autograd where this batch is the first, or where a parameter is unchecked.

    Args:
        source: The loss, its rows and their wiring; a parameter that fails moves to the slow route in it.
        keys: Which parameters share a block.
        batch: The batch's place in the data.
        value: The batch itself, on the device.
        traced: Parameters by name.
        first: Whether this is the first batch of the source in this run.
        keep_graph: Keep the graph of the losses.

    Returns:
        The gradients.

    Raises:
        LossError: The loss mixes rows.
        NotFiniteError: A gradient is NaN or infinite.
    """
    wiring = source.wiring
    names = set(traced)
    if not first:
        pending = {name: traced[name] for name in wiring.pending}
        found = batch_gradients(source, keys, batch, value, traced, against=pending, keep_graph=keep_graph)
        if found.in_place and not any(bool(gradient.any()) for gradient in found.truth.values()):
            return found
        source.deferred = False
        value = source.take(batch.rows)  # the model may have written into the batch
        if found.in_place:
            names = set(wiring.pending)
    names |= {name for pair in keys.fused if set(pair) & names for name in pair}
    against = {name: traced[name] for name in traced if name in names}
    seen = row_checksums(batch, double=True) if first else None
    found = batch_gradients(source, keys, batch, value, traced, keep_graph=True)
    if first:
        refuse_mixing(source, batch, found.losses, seen)
    failed, zero = _failures(source, batch, found, against)
    source.found = replace(
        source.wiring,
        pending=frozenset(zero)
        & (source.wiring.pending | (names if first else set())) - set(source.wiring.unused),
    )
    if not failed:
        return found if keep_graph else BatchGradients(found.losses.detach(), found.blocks)
    alone = {name: error for name, error in failed.items() if name in source.wiring.by_row}
    if alone:
        # A NaN agrees with nothing, itself included.
        name_not_finite(found.blocks, batch, source.where, source.mend)
        name, error = max(alone.items(), key=lambda item: item[1])
        raise LossError(
            f"the gradient of a row for {name} depends on the rows around it (off by {error:.1e} in a batch, {source.where}): "
            "the loss or the model mixes rows, perhaps through a term whose value cancels. A gradient per row does not exist."
        )
    source.found = _demoted(source.wiring, failed)
    logger.warning(
        "%s went to the row-by-row route (%s): %s",
        ", ".join(failed),
        source.rows.name,
        "; ".join(source.wiring.reasons[name] for name in failed),
    )
    again = source.take(batch.rows)
    return batch_gradients(source, keys, batch, again, traced, keep_graph=keep_graph)
