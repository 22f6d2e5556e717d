"""Per-example gradients of one batch, by the routes that the wiring chose.

One forward pass with hooks, one backward pass to the recorded outputs (the parameters' own gradients are not computed),
then each site turns its inputs and δ into blocks. A batch that uses a parameter otherwise than the probe did (another
number of uses, another shape) sends that parameter row by row for this batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracin.data import Batch, RowSource, to_device
from tracin.errors import NotFiniteError
from tracin.gradients import reference, shared
from tracin.gradients.agreement import accumulation_dtype
from tracin.gradients.blocks import Block, Dense, Sum, concatenate
from tracin.gradients.capture import Call, Tape, recording, tensors
from tracin.gradients.graph import Graph, walk
from tracin.gradients.local import CallLayout
from tracin.gradients.wiring import (
    LOSS,
    LocalSite,
    LossModule,
    RuleSite,
    Wiring,
    local_estimates,
    rule_blocks,
)
from tracin.tasks.task import Loss, row_losses

__all__ = ["BatchGradients", "Keys", "Source", "batch_gradients", "irregular_names"]

# Parameter names held by one block → the block.
Blocks = dict[tuple[str, ...], Block]


@dataclass(frozen=True)
class Keys:
    """Which parameters share a block: a weight and its bias where one rule holds both and neither is used elsewhere."""

    fused: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, *wirings: Wiring) -> Keys:
        """The pairs that every wiring can hold in one block."""
        pairs: set[tuple[str, ...]] = set()
        apart: set[str] = set()
        for wiring in wirings:
            owned = Counter(name for site in wiring.rules.values() for name in site.roles.values())
            apart |= {name for name, count in owned.items() if count > 1}
            apart |= {name for site in wiring.locals.values() for name in site.names}
            apart |= set(wiring.by_row) | set(wiring.shared)
            for site in wiring.rules.values():
                if set(site.roles) == {"weight", "bias"} and site.rule.fused:
                    pairs.add((site.roles["weight"], site.roles["bias"]))
                else:
                    apart |= set(site.roles.values())
        return cls(frozenset(pair for pair in pairs if not apart & set(pair)))

    def groups(self, site: RuleSite) -> list[frozenset[str]]:
        """The site's roles by block."""
        pair = (site.roles.get("weight", ""), site.roles.get("bias", ""))
        if pair in self.fused:
            return [frozenset({"weight", "bias"})]
        return [frozenset({role}) for role in site.roles]


@dataclass
class Source:
    """One side of the score: its loss, rows, device, and, once a batch was seen, its wiring."""

    root: LossModule
    loss: Loss
    rows: RowSource
    device: torch.device
    where: str = ""
    wiring: Wiring | None = None
    irregular: Counter[str] = field(default_factory=Counter)

    def run(self, value: object, rows: Sequence[int]) -> Tensor:
        """The losses of a batch, held to the contract."""
        return row_losses(lambda _, given: self.root(given), self.root.model, value, rows, self.where)

    def take(self, rows: Sequence[int]) -> object:
        """A batch of these rows on the device."""
        return to_device(self.rows.take(rows), self.device)


@dataclass(frozen=True)
class BatchGradients:
    """Losses [n] (with their graph where it was kept) and per-example gradients of a batch.

    ``truth`` are autograd's own gradients of the weighted sum Σ v_n ℓ_n for the parameters that were asked for.
    """

    losses: Tensor
    blocks: Blocks
    truth: Mapping[str, Tensor] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Memory that the blocks hold."""
        return sum(block.nbytes for block in self.blocks.values())


def _layout_of(layouts: tuple[CallLayout, ...], at: int, calls: int) -> CallLayout | None:
    """The layout of call number ``at``; None where the calls of this batch cannot be matched with the probe's."""
    if calls == len(layouts):
        return layouts[at]
    return layouts[0] if len(set(layouts)) == 1 else None


def _call_fits(call: Call, layout: CallLayout | None, n: int) -> bool:
    if layout is None or not call.intact() or len(call.shapes) != len(layout.outputs):
        return False
    inputs = tensors(call.args, call.kwargs)
    if len(inputs) != len(layout.inputs):
        return False
    inputs_fit = all(lay is None or lay.fits(x.shape, n) for lay, x in zip(layout.inputs, inputs, strict=True))
    return inputs_fit and all(lay.fits(shape, n) for lay, shape in zip(layout.outputs, call.shapes, strict=True))


def irregular_names(wiring: Wiring, tape: Tape, graph: Graph, n: int) -> set[str]:
    """Parameters that this batch uses otherwise than the probe did.

    Args:
        wiring: The routes.
        tape: The batch's calls.
        graph: Its graph.
        n: Rows.

    Returns:
        Their names.
    """
    calls_of: Counter[str] = Counter()
    out: set[str] = {name for name in wiring.unused if graph.uses(name)}
    for site in (*wiring.rules.values(), *wiring.locals.values()):
        names = set(site.roles.values()) if isinstance(site, RuleSite) else set(site.names)
        calls = tape.calls.get(site.site, [])
        for name in names:
            calls_of[name] += len(calls)
        if not all(_call_fits(call, _layout_of(site.layouts, at, len(calls)), n) for at, call in enumerate(calls)):
            out |= names
    for name, (probe_edges, probe_calls) in wiring.uses.items():
        if graph.uses(name) * probe_calls != probe_edges * calls_of[name]:
            out.add(name)
    return out


Deltas = dict[str, list[list[Tensor | None]]]


@dataclass(frozen=True)
class _Backward:
    """∂(Σ v ℓ)/∂: every recorded call's outputs by site, every meeting of a shared parameter, and some parameters."""

    calls: Deltas
    places: dict[str, list[Tensor | None]]
    parameters: dict[str, Tensor]


def _backward(
    losses: Tensor,
    tape: Tape,
    places: Mapping[str, list[shared.Meeting]],
    weights: Tensor | None,
    parameters: Mapping[str, Tensor],
    keep: bool,
) -> _Backward:
    edges: list[Any] = [edge for calls in tape.calls.values() for call in calls for edge in call.edges]
    edges += [place.edge for found in places.values() for place in found]
    edges += parameters.values()
    if not edges:
        return _Backward({}, {}, {})
    ones = torch.ones_like(losses) if weights is None else weights
    keep = keep or bool(places and parameters)  # what made a shared tensor is differentiated once more
    found = iter(torch.autograd.grad(losses, edges, ones, retain_graph=keep, allow_unused=True))
    by_call = {site: [[next(found) for _ in call.edges] for call in calls] for site, calls in tape.calls.items()}
    by_place = {name: [next(found) for _ in at] for name, at in places.items()}
    by_parameter = {name: next(found) for name in parameters}
    return _Backward(by_call, by_place, {name: _dense(g, parameters[name]) for name, g in by_parameter.items()})


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _shared_blocks(
    graph: Graph, places: Mapping[str, list[shared.Meeting]], deltas: Mapping[str, list[Tensor | None]], n: int,
    traced: Mapping[str, nn.Parameter],
) -> Blocks:
    out: Blocks = {}
    for name, at in places.items():
        values = shared.gradients(graph.leaves[name], traced[name], at, deltas[name], n).reshape(n, -1)
        out[name,] = Dense(values.to(accumulation_dtype(values.dtype)))
    return out


def _add(blocks: dict[tuple[str, ...], list[Block]], names: tuple[str, ...], block: Block) -> None:
    blocks.setdefault(names, []).append(block)


def _site_blocks(
    wiring: Wiring, keys: Keys, tape: Tape, deltas: dict[str, list[list[Tensor | None]]], n: int, skipped: set[str],
    traced: Mapping[str, nn.Parameter],
) -> Blocks:
    parts: dict[tuple[str, ...], list[Block]] = {}
    for site in wiring.rules.values():
        groups = [g for g in keys.groups(site) if not {site.roles[role] for role in g} & skipped]
        calls = tape.calls.get(site.site, [])
        for at, call in enumerate(calls):
            delta = deltas[site.site][at][0]
            if delta is not None and groups:
                layout = _layout_of(site.layouts, at, len(calls))
                for names, block in rule_blocks(site, call, layout, delta, n, groups).items():
                    _add(parts, names, block)
    for place in wiring.locals.values():
        names_left = {name: own for name, own in place.names.items() if name not in skipped}
        calls = tape.calls.get(place.site, [])
        if names_left and calls:
            trial = LocalSite(place.site, place.module, names_left, place.layouts)
            for name, values in local_estimates(trial, calls, deltas[place.site], n, traced).items():
                _add(parts, (name,), Dense(values))
    return {names: _joined(blocks) for names, blocks in parts.items()}


def _joined(blocks: list[Block]) -> Block:
    """Several uses of one parameter as one block: factors side by side along t where they can be."""
    from tracin.gradients.blocks import Outer, Rows

    if len(blocks) == 1:
        return blocks[0]
    if all(isinstance(block, Outer) for block in blocks):
        outers = [block for block in blocks if isinstance(block, Outer)]
        return Outer(torch.cat([b.a for b in outers], 1), torch.cat([b.d for b in outers], 1), outers[0].bias)
    if all(isinstance(block, Rows) for block in blocks):
        tables = [block for block in blocks if isinstance(block, Rows)]
        return Rows(torch.cat([b.index for b in tables], 1), torch.cat([b.d for b in tables], 1), tables[0].length)
    if all(isinstance(block, Dense) for block in blocks):
        return Dense(torch.stack([block.materialise() for block in blocks]).sum(0))
    return Sum(tuple(blocks))


def _by_row_blocks(source: Source, keys: Keys, batch: Batch, names: set[str], traced: Mapping[str, nn.Parameter]) -> Blocks:
    """Parameters that go one example at a time, with their partners of a shared block."""
    if not names:
        return {}
    pairs = [pair for pair in keys.fused if set(pair) & names]
    wanted = {name: traced[name] for name in traced if name in names or any(name in pair for pair in pairs)}
    found = reference.alone(source.run, source.take, batch.rows, wanted)
    found = {name: value.to(accumulation_dtype(value.dtype)) for name, value in found.items()}
    out: Blocks = {}
    for pair in pairs:
        parts = [found.pop(name) for name in pair]
        out[pair] = Dense(torch.cat(parts, 1), tuple(part.shape[1] for part in parts))
    out |= {(name,): Dense(value) for name, value in found.items()}
    return out


def batch_gradients(
    source: Source,
    keys: Keys,
    batch: Batch,
    value: object,
    traced: Mapping[str, nn.Parameter],
    *,
    weights: Tensor | None = None,
    against: Mapping[str, nn.Parameter] | None = None,
    keep_graph: bool = False,
) -> BatchGradients:
    """The per-example gradients of a batch.

    Args:
        source: The loss, the rows and their wiring.
        keys: Which parameters share a block.
        batch: The batch's place in the data.
        value: The batch itself, on the device.
        traced: Parameters by name.
        weights: Weights v [n] of the backward pass. The blocks are those of v_n ℓ_n.
        against: Parameters whose own gradient is asked of the same backward pass.
        keep_graph: Keep the graph of the losses.

    Returns:
        Losses and blocks.

    Raises:
        NotFiniteError: A gradient is NaN or infinite; the error names row and parameter.
    """
    wiring = source.wiring
    if wiring is None:
        raise RuntimeError("the source has no wiring yet")
    sites = wiring.sites()
    with recording(sites, frozenset(site for site in sites if site in wiring.locals)) as tape:
        losses = source.run(value, batch.rows)
    graph = walk(losses, traced)
    irregular = irregular_names(wiring, tape, graph, batch.size)
    met = {name: shared.meetings(site, graph, batch.size) for name, site in wiring.shared.items()}
    irregular |= {name for name, found in met.items() if found is None}
    places = {name: found for name, found in met.items() if found is not None}
    source.irregular.update(dict.fromkeys(irregular, batch.size))
    slow = irregular | set(wiring.by_row)
    slow |= {name for pair in keys.fused if set(pair) & slow for name in pair}
    back = _backward(losses, tape, places, weights, against or {}, keep_graph)
    blocks = _site_blocks(wiring, keys, tape, back.calls, batch.size, slow, traced)
    blocks |= _shared_blocks(graph, places, back.places, batch.size, traced)
    by_row = _by_row_blocks(source, keys, batch, slow, traced)
    if weights is not None:
        by_row = {names: block.weighted(weights) for names, block in by_row.items()}
    _refuse_not_finite(back.calls, blocks | by_row, batch, source.where)
    return BatchGradients(losses if keep_graph else losses.detach(), blocks | by_row, back.parameters)


def _refuse_not_finite(
    deltas: dict[str, list[list[Tensor | None]]], blocks: Blocks, batch: Batch, where: str
) -> None:
    sums = [d.sum() for calls in deltas.values() for outs in calls for d in outs if d is not None]
    sums += [block.values.sum() for block in blocks.values() if isinstance(block, Dense)]
    if not sums or bool(torch.isfinite(torch.stack([s.float() for s in sums])).all()):
        return
    name_not_finite(blocks, batch, where)


def name_not_finite(blocks: Blocks, batch: Batch, where: str) -> None:
    """Find and name the row and parameter of a NaN or infinite gradient.

    Args:
        blocks: The batch's gradients.
        batch: Its rows.
        where: The checkpoint, for the message.

    Raises:
        NotFiniteError: If there is one.
    """
    for names, block in blocks.items():
        finite = torch.isfinite(block.squared_norm())
        if not bool(finite.all()):
            row = batch.rows[int((~finite).nonzero()[0])]
            raise NotFiniteError(
                f"the gradient of row {row} for {' / '.join(names)} is not finite ({where}). Look at this row's input and at "
                "divisions, logarithms and square roots near zero in the model and the loss, or leave the checkpoint out."
            )


__all__ += ["LOSS", "concatenate", "name_not_finite"]
