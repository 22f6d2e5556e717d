"""The always-on check: on the first batch of a run, the gradients that will be scored against autograd's.

(a) the sum of the per-example gradients equals autograd's gradient for every parameter; (b) the first and the last row's
gradient equals autograd of ``losses[i]`` in the same graph; (c) ``losses[i]`` equals the loss of row i without the others
(the row twice, since some models cannot run a batch of one). A parameter
that fails (a) or (b) goes row by row from there on and is named; (c) is an error. A parameter whose reference is zero is
checked in the first batch where it is not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tracin.data import Batch, row_checksums
from tracin.errors import DataError, LossError
from tracin.gradients import reference
from tracin.gradients.agreement import accumulation_dtype, is_zero, relative_error, tolerance
from tracin.gradients.engine import BatchGradients, Keys, Source, batch_gradients
from tracin.gradients.wiring import LocalSite, RuleSite, Wiring

__all__ = ["checked_gradients", "gradient_errors", "refuse_mixing"]

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


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(g.double())) ** 2 for g in gradients.values()) ** 0.5


def gradient_errors(
    found: BatchGradients, traced: Mapping[str, nn.Parameter], rows: list[int]
) -> tuple[dict[str, float], set[str]]:
    """Relative errors of a batch's gradients against autograd in the same graph.

    Args:
        found: Gradients with their graph kept.
        traced: Parameters to compare.
        rows: Positions in the batch to compare one by one, besides the sum.

    Returns:
        The largest error per parameter, and the parameters whose reference is zero everywhere here.
    """
    dtype = found.losses.dtype
    wanted = {names: block for names, block in found.blocks.items() if set(names) <= set(traced)}
    norms = {names: block.squared_norm().double().sqrt() for names, block in wanted.items()}
    rows_total = float(torch.stack([n.square() for n in norms.values()]).sum(0).sqrt().sum()) if norms else 0.0
    scales = {name: float(norm.sum()) for names, norm in norms.items() for name in names}
    errors = dict.fromkeys(traced, 0.0)
    zero = set(traced)

    def compare(mine: dict[str, Tensor], truth: dict[str, Tensor], scale: Mapping[str, float], total: float) -> None:
        for name, reference_gradient in truth.items():
            if not is_zero(reference_gradient, dtype, total):
                zero.discard(name)
            estimate = mine.get(name, torch.zeros_like(reference_gradient))
            error = relative_error(estimate, reference_gradient, dtype, scale.get(name, 0.0), total)
            errors[name] = max(errors[name], error)

    ones = torch.ones_like(found.losses)
    mixed = torch.linspace(0.5, 1.5, len(ones), dtype=ones.dtype, device=ones.device)[_shuffled(len(ones))]
    for weights in (ones, mixed):
        truth = reference.summed(found.losses, traced, weights)
        total = max(rows_total, _norm(truth))
        wide = weights.to(accumulation_dtype(dtype))
        compare(_by_parameter({n: b.weighted(wide).total() for n, b in wanted.items()}, traced), truth, scales, total)
    for row in rows:
        truth = reference.in_graph(found.losses, traced, row)
        mine = {names: block.rows(row, row + 1).materialise()[0] for names, block in wanted.items()}
        own = {name: float(torch.linalg.vector_norm(g)) for name, g in truth.items()}
        compare(_by_parameter(mine, traced), truth, own, _norm(truth))
    return errors, zero


def _shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


def _check_rows(n: int) -> list[int]:
    return sorted({0, n - 1})


def refuse_mixing(source: Source, batch: Batch, losses: Tensor, seen: Tensor | None) -> None:
    """Hold ``losses[i]`` against the loss of row i alone.

    Args:
        source: The loss and its rows.
        batch: The batch whose losses these are.
        losses: Its losses [n].
        seen: Checksums of the batch's rows from before the model ran, which may have written into the batch.

    Raises:
        LossError: The loss of a row depends on the rows around it.
        DataError: The dataset gave another row when asked again.
    """
    losses = losses.detach()
    spread = float(losses.abs().max())
    bound, rounding = {torch.float64: (1e-8, 1e-10), torch.float32: (1e-3, 2e-5)}.get(losses.dtype, (0.1, 0.05))
    for at in _check_rows(batch.size):
        row = batch.rows[at]
        again = source.rows.take([row])
        if seen is not None:
            fresh = row_checksums(Batch([row], again))
            same_shape = fresh is not None and _row_numel(again, 1) == _row_numel(batch.value, batch.size)
            if same_shape and fresh is not None and float(fresh[0]) != float(seen[at]) and not _close(fresh[0], seen[at]):
                raise DataError(
                    f"{source.rows.name}: row {row} came back different when it was read again. Turn off augmentation and "
                    "other randomness in the dataset for tracing."
                )
        repeat = [row] * (3 if batch.size == 2 else 2)
        single = source.run(source.take(repeat), repeat).detach()[0]
        difference = float((single - losses[at]).abs())
        if difference > bound * max(float(losses[at].abs()), 1e-3 * spread) + rounding:
            raise LossError(
                f"the loss of row {row} is {float(losses[at]):.6g} in its batch and {float(single):.6g} alone "
                f"({source.where}): the model or the loss mixes rows, so a gradient per row does not exist. Look for batch "
                "statistics (BatchNorm without running statistics), a division by the batch size, in-batch negatives, or "
                "randomness that eval mode does not turn off."
            )


def _row_numel(value: object, n: int) -> int:
    from torch.utils import _pytree as pytree

    leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor) and x.dim() and x.shape[0] == n]
    return sum(x.numel() // n for x in leaves)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=1e-5, atol=1e-6))


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
    reasons = {name: f"off by {error:.1e} from autograd on {wiring.route(name)}" for name, error in errors.items()}
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
    source: Source, keys: Keys, batch: Batch, value: object, traced: Mapping[str, nn.Parameter], first: bool
) -> BatchGradients:
    """A batch's gradients, checked against autograd where this batch is the first, or where a parameter is unchecked.

    Args:
        source: The loss, its rows and their wiring; a parameter that fails moves to the slow route in it.
        keys: Which parameters share a block.
        batch: The batch's place in the data.
        value: The batch itself, on the device.
        traced: Parameters by name.
        first: Whether this is the first batch of the source in this run.

    Returns:
        The gradients.

    Raises:
        LossError: The loss mixes rows.
    """
    wiring = source.wiring
    if wiring is None:
        raise RuntimeError("the source has no wiring yet")
    if not first and not wiring.pending:
        return batch_gradients(source, keys, batch, value, traced)
    seen = row_checksums(batch) if first else None
    found = batch_gradients(source, keys, batch, value, traced, keep_graph=True)
    names = set(traced) if first else set(wiring.pending)
    names |= {name for pair in keys.fused if set(pair) & names for name in pair}
    if first:
        refuse_mixing(source, batch, found.losses, seen)
    elif not any(bool(g.any()) for g in reference.summed(found.losses, {n: traced[n] for n in names}).values()):
        return BatchGradients(found.losses.detach(), found.blocks)
    errors, zero = gradient_errors(found, {name: traced[name] for name in traced if name in names}, [batch.size - 1])
    failed = {name: error for name, error in errors.items() if error > tolerance(found.losses.dtype)}
    source.wiring = replace(wiring, pending=frozenset(zero) - set(wiring.unused))
    if failed:
        source.wiring = _demoted(source.wiring, failed)
        logger.warning(
            "%s went to the row-by-row route (%s): %s",
            ", ".join(failed),
            source.rows.name,
            "; ".join(source.wiring.reasons[name] for name in failed),
        )
        return batch_gradients(source, keys, batch, value, traced)
    return BatchGradients(found.losses.detach(), found.blocks)
