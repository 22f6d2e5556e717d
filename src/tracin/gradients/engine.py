"""Per-example gradients of one batch, by the routes that the wiring chose.

One forward pass with hooks, one backward pass to the recorded outputs (the parameters' own gradients are not computed),
then each site turns its inputs and δ into blocks. A batch that uses a parameter otherwise than the probe did (another
number of uses, another shape) sends that parameter row by row for this batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tracin.data import Batch, RowSource, to_device
from tracin.errors import NotFiniteError
from tracin.gradients import reference, shared
from tracin.gradients.agreement import accumulation_dtype
from tracin.gradients.backward import Output, backward, marked_nodes
from tracin.gradients.blocks import Block, Dense, MultipliedOut, Outer, Rows, Sum
from tracin.gradients.capture import Call, Tape, recording, tensors
from tracin.gradients.graph import Graph, walk
from tracin.gradients.local import CallLayout
from tracin.gradients.movement import in_place
from tracin.gradients.sites import LocalSite, LossModule, RuleSite, Wiring, local_estimates, rule_blocks
from tracin.tasks.task import Loss, row_losses

__all__ = ["BatchGradients", "Keys", "Source", "batch_gradients", "irregular_names", "name_not_finite"]

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
    found: Wiring | None = None
    irregular: dict[str, set[int]] = field(default_factory=dict)
    mend: str = "leave the checkpoint out"
    deferred: bool = False  # somebody else looks for losses and embeddings that are not finite

    @property
    def dtype(self) -> torch.dtype:
        """The least precise dtype of the arithmetic, which bounds how exact gradients can be."""
        return self.wiring.dtype

    @property
    def wiring(self) -> Wiring:
        """The routes, once they were found."""
        if self.found is None:
            raise RuntimeError(f"{self.rows.name} were not wired yet")
        return self.found

    def went_by_row(self, names: set[str], rows: Sequence[int]) -> None:
        """Note the rows for which parameters went one by one, though their route is another."""
        for name in names:
            self.irregular.setdefault(name, set()).update(rows)

    def run(self, value: object, rows: Sequence[int]) -> Tensor:
        """The losses of a batch, held to the contract."""
        return row_losses(
            lambda _, given: self.root(given),
            self.root.model,
            value,
            rows,
            self.where,
            self.mend,
            look=not self.deferred,
        )

    def take(self, rows: Sequence[int]) -> object:
        """A batch of these rows on the device."""
        return to_device(self.rows.take(rows), self.device)


@dataclass(frozen=True)
class BatchGradients:
    """Losses [n] (with their graph where it was kept) and per-example gradients of a batch.

    ``truth`` are autograd's own gradients of Σ_n ℓ_n for the parameters that were asked for; ``in_place`` says
    that no operation in the graph can have moved a row.
    """

    losses: Tensor
    blocks: Blocks
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    in_place: bool = True

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
    inputs_fit = all(
        lay is None or lay.fits(x.shape, n) for lay, x in zip(layout.inputs, inputs, strict=True)
    )
    return inputs_fit and all(
        lay.fits(shape, n) for lay, shape in zip(layout.outputs, call.shapes, strict=True)
    )


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
        if not all(
            _call_fits(call, _layout_of(site.layouts, at, len(calls)), n) for at, call in enumerate(calls)
        ):
            out |= names
    for name, (probe_edges, probe_calls) in wiring.uses.items():
        if graph.uses(name) * probe_calls != probe_edges * calls_of[name]:
            out.add(name)
    return out


def _shared_blocks(
    graph: Graph,
    places: Mapping[str, list[shared.Meeting]],
    deltas: Mapping[str, list[Tensor | None]],
    n: int,
    traced: Mapping[str, nn.Parameter],
) -> Blocks:
    out: Blocks = {}
    for name, at in places.items():
        values = shared.gradients(graph.leaves[name], traced[name], at, deltas[name], n).reshape(n, -1)
        out[name,] = Dense(values.to(accumulation_dtype(values.dtype)))
    return out


class _Collector:
    """Blocks of a batch, made from δ as the backward pass brings it."""

    def __init__(self, wiring: Wiring, keys: Keys, tape: Tape, n: int, skipped: set[str]) -> None:
        self._wiring, self._tape, self._n = wiring, tape, n
        self._groups = {
            name: [g for g in keys.groups(site) if not {site.roles[role] for role in g} & skipped]
            for name, site in wiring.rules.items()
        }
        self._skipped = skipped
        self._parts: dict[tuple[str, ...], list[Block]] = {}
        self._held: dict[Output, Tensor] = {}

    def receive(self, output: Output, delta: Tensor) -> None:
        """Turn δ of a site with a rule into blocks; keep that of the others."""
        name, at, _ = output
        site = self._wiring.rules.get(name)
        if name in self._wiring.locals:
            self._held[output] = delta
        groups = self._groups.get(name)
        if site is None or not groups:
            return
        calls = self._tape.calls[name]
        layout = _layout_of(site.layouts, at, len(calls))
        if layout is None:
            raise RuntimeError(f"{name}: a call without a layout was not sent row by row")
        for names, block in rule_blocks(site, calls[at], layout, delta.detach(), self._n, groups).items():
            self._parts.setdefault(names, []).append(block)
        # What the blocks do not hold can be freed while the backward pass goes on.
        calls[at] = replace(calls[at], args=(), kwargs={}, versions=())

    def blocks(self, traced: Mapping[str, nn.Parameter]) -> tuple[Blocks, set[str]]:
        """All blocks, those of the modules under vmap included, and the parameters for which vmap could not run."""
        failed: set[str] = set()
        for place in self._wiring.locals.values():
            names_left = {name: own for name, own in place.names.items() if name not in self._skipped}
            calls = self._tape.calls.get(place.site, [])
            if not names_left or not calls:
                continue
            deltas = [
                [self._held.get((place.site, at, number)) for number in range(len(call.edges))]
                for at, call in enumerate(calls)
            ]
            trial = LocalSite(place.site, place.module, names_left, place.layouts)
            try:
                found = local_estimates(trial, calls, deltas, self._n, traced)
            # The probe ran this module under vmap; on this batch it raises what it likes, and goes row by row.
            except Exception:  # noqa: BLE001
                failed |= set(names_left)
                continue
            for name, values in found.items():
                self._parts.setdefault((name,), []).append(Dense(values))
        return {names: _joined(blocks) for names, blocks in self._parts.items()}, failed


def _joined(blocks: list[Block]) -> Block:
    """Several uses of one parameter as one block: factors side by side along t where they can be."""
    if len(blocks) == 1:
        return blocks[0]
    if all(isinstance(block, Outer) for block in blocks):
        outers = [block for block in blocks if isinstance(block, Outer)]
        return Outer(torch.cat([b.a for b in outers], 1), torch.cat([b.d for b in outers], 1), outers[0].bias)
    if all(isinstance(block, Rows) for block in blocks):
        tables = [block for block in blocks if isinstance(block, Rows)]
        return Rows(
            torch.cat([b.index for b in tables], 1), torch.cat([b.d for b in tables], 1), tables[0].length
        )
    kinds = {type(block) for block in blocks}
    if len(kinds) == 1 and isinstance(blocks[0], MultipliedOut):
        tables = [block.values for block in blocks if isinstance(block, MultipliedOut)]
        return replace(blocks[0], values=torch.stack(tables).sum(0))
    return Sum(tuple(blocks))


def _by_row_blocks(
    source: Source, keys: Keys, batch: Batch, names: set[str], traced: Mapping[str, nn.Parameter]
) -> Blocks:
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
        against: Parameters whose own gradient is asked of the same backward pass.
        keep_graph: Keep the graph of the losses.

    Returns:
        Losses and blocks.

    Raises:
        NotFiniteError: A gradient is NaN or infinite; the error names row and parameter.
    """
    wiring = source.wiring
    sites = wiring.sites()
    with recording(sites, frozenset(site for site in sites if site in wiring.locals)) as tape:
        losses = source.run(value, batch.rows)
    marked = marked_nodes(tape)
    graph = walk(losses, traced, marked)
    irregular = irregular_names(wiring, tape, graph, batch.size)
    met = {name: shared.meetings(site, graph, batch.size) for name, site in wiring.shared.items()}
    irregular |= {name for name, found in met.items() if found is None}
    places = {name: found for name, found in met.items() if found is not None}
    source.went_by_row(irregular, batch.rows)
    slow = irregular | set(wiring.by_row)
    slow |= {name for pair in keys.fused if set(pair) & slow for name in pair}
    # Before the backward pass frees what the operations saved.
    stay = wiring.plain_rows and in_place(wiring.movers, graph)
    collector = _Collector(wiring, keys, tape, batch.size, slow)
    back = backward(losses, graph, marked, places, collector.receive, against or {}, keep_graph)
    blocks, failed = collector.blocks(traced)
    source.went_by_row(failed, batch.rows)
    blocks |= _shared_blocks(graph, places, back.places, batch.size, traced)
    by_row = _by_row_blocks(source, keys, batch, slow | failed, traced)
    if not source.deferred:
        _refuse_not_finite(blocks | by_row, batch, source)
    return BatchGradients(losses if keep_graph else losses.detach(), blocks | by_row, back.parameters, stay)


def _refuse_not_finite(blocks: Blocks, batch: Batch, source: Source) -> None:
    """Look at embeddings, whose products skip tokens that do not match; elsewhere a NaN reaches the product."""
    tables = [
        part
        for block in blocks.values()
        for part in getattr(block, "parts", (block,))
        if isinstance(part, Rows)
    ]
    if not all(bool(torch.isfinite(table.d.sum())) for table in tables):
        name_not_finite(blocks, batch, source.where, source.mend)


def name_not_finite(blocks: Blocks, batch: Batch, where: str, mend: str = "leave the checkpoint out") -> None:
    """Find and name the row and parameter of a NaN or infinite gradient.

    Args:
        blocks: The batch's gradients.
        batch: Its rows.
        where: The checkpoint, for the message.
        mend: What else can be done, for the message.

    Raises:
        NotFiniteError: If there is one.
    """
    for names, block in blocks.items():
        for at in range(len(block)):
            if bool(torch.isfinite(block.rows(at, at + 1).materialise()).all()):
                continue
            row = batch.rows[at]
            raise NotFiniteError(
                f"the gradient of row {row} for {' / '.join(names)} is not finite ({where}). Look at this row's input and at "
                f"divisions, logarithms and square roots near zero in the model and the loss, or {mend}."
            )
