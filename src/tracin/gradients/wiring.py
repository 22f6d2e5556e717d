"""Which route each parameter takes, found by running a few rows and comparing with autograd.

Three rows are run, then the same rows and one of them again: what changed in the shapes shows the row axis of every
module (``layout``). They are also run in reverse: a module whose input is not reversed with them (rows sorted by length,
tokens sent to experts) has no row axis. Then, cheapest first, each parameter tries

1. *rule*: all modules that own it have a rule, and the graph uses it exactly as often as these modules were called;
2. *shared*: it has no row axis until an elementwise operation joins it with the rows (``shared``);
3. *local*: vmap over a module that contains all its uses, from its owner upward to the loss itself;
4. *by row*: one example at a time.

A route is taken when its per-example gradients equal autograd's for every probe row. A parameter whose gradient is zero
on the probe rows proves nothing: it stays ``pending`` and is compared in the first batch where it is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracin.errors import LossError
from tracin.gradients import local, reference, shared
from tracin.gradients.agreement import accumulation_dtype, is_zero, relative_error, tolerance
from tracin.gradients.blocks import Block, Sum
from tracin.gradients.capture import Call, Tape, recording, tensors
from tracin.gradients.graph import Graph, walk
from tracin.gradients.layout import Layout, candidates, owns, to_rows
from tracin.gradients.local import CallLayout
from tracin.gradients.rules import Rule, rule_for
from tracin.gradients.shared import SharedSite

__all__ = ["LOSS", "LocalSite", "LossModule", "RuleSite", "Wiring", "refuse_mixing", "rule_blocks", "wire"]

# Site name of the loss itself, which contains the model.
LOSS = "(loss)"


class LossModule(nn.Module):
    """The user's loss as a module around the user's model, so that the loss is one more place to run vmap."""

    def __init__(self, model: nn.Module, losses_of: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._losses_of = losses_of

    def forward(self, value: Any) -> Any:
        """What the user's loss returns for a batch; the caller holds it to the contract."""
        return self._losses_of(self.model, value)


@dataclass(frozen=True)
class RuleSite:
    """A module whose parameters are traced by a rule: role → parameter, and the layouts of its calls in order."""

    site: str
    module: nn.Module
    rule: Rule
    roles: dict[str, str]
    layouts: tuple[CallLayout, ...]


@dataclass(frozen=True)
class LocalSite:
    """A module under vmap: parameter → its name within the module, and the layouts of its calls in order."""

    site: str
    module: nn.Module
    names: dict[str, str]
    layouts: tuple[CallLayout, ...]


@dataclass(frozen=True)
class Wiring:
    """Routes of one loss over one data source."""

    rules: dict[str, RuleSite]
    shared: dict[str, SharedSite]
    locals: dict[str, LocalSite]
    by_row: tuple[str, ...]
    unused: tuple[str, ...]
    pending: frozenset[str]
    uses: dict[str, tuple[int, int]]
    reasons: dict[str, str] = field(default_factory=dict)

    def sites(self) -> dict[str, nn.Module]:
        """Modules that must be recorded."""
        return {site.site: site.module for site in (*self.rules.values(), *self.locals.values())}

    def route(self, name: str) -> str:
        """The route of a parameter, in words."""
        for rule in self.rules.values():
            if name in rule.roles.values():
                return f"rule {rule.rule.layer.__name__}"
        if name in self.shared:
            return "shared by the rows"
        for place in self.locals.values():
            if name in place.names:
                return f"vmap {type(place.module).__name__ if place.site != LOSS else 'loss'}"
        return "unused" if name in self.unused else "by row"


@dataclass(frozen=True)
class Probe:
    """What a few rows showed: calls, δ of every edge and autograd's gradients, for each row's loss alone."""

    n: int
    dtype: torch.dtype
    few: Tape
    more: Tape
    back: Tape
    deltas: list[dict[tuple[str, int, int], Tensor | None]]
    truth: list[dict[str, Tensor]]
    graph: Graph
    shared_estimates: dict[str, tuple[SharedSite, Tensor]]
    totals: list[float]

    def delta(self, site: str, call: int) -> list[Tensor | None]:
        """∂(Σℓ)/∂output of a call, one per recorded output."""
        out: list[Tensor | None] = []
        for at in range(len(self.few.calls[site][call].edges)):
            found = [d for row in self.deltas if (d := row[(site, call, at)]) is not None]
            out.append(torch.stack(found).sum(0) if found else None)
        return out


def _probe(
    root: LossModule, run: Callable[[Any, list[int]], Tensor], traced: Mapping[str, nn.Parameter], take: Callable[[Sequence[int]], Any],
    rows: list[int],
) -> Probe:
    wanted = {id(p) for p in traced.values()}
    sites: dict[str, nn.Module] = {LOSS: root}
    for name, module in root.model.named_modules():
        if any(id(p) in wanted for p in module.parameters()):
            sites[name] = module
    everything = frozenset(sites)
    with recording(sites, everything) as tape:
        losses = run(take(rows), rows)
    with recording(sites, everything) as more_tape:
        more_losses = run(take([*rows, rows[0]]), [*rows, rows[0]])
    with recording(sites, everything) as back_tape:
        back_losses = run(take(rows[::-1]), rows[::-1])
    refuse_mixing(losses, more_losses[:-1], rows)
    refuse_mixing(losses, back_losses.flip(0), rows)
    more_graph = walk(more_losses, traced)
    keys = [
        (site, at, out) for site, calls in tape.calls.items() for at, call in enumerate(calls) for out in range(len(call.edges))
    ]
    edges = [tape.calls[site][at].edges[out] for site, at, out in keys]
    deltas, truth = [], []
    n = len(rows)
    graph = walk(losses, traced)
    shared_found = _shared_estimates(losses, graph, more_graph, traced, n)
    for row in range(n):
        found = torch.autograd.grad(losses[row], edges, retain_graph=True, allow_unused=True)
        deltas.append(dict(zip(keys, found, strict=True)))
        truth.append(reference.in_graph(losses, traced, row))
    totals = [float(torch.stack([torch.linalg.vector_norm(g) for g in row.values()]).double().norm()) for row in truth]
    return Probe(n, losses.dtype, tape, more_tape, back_tape, deltas, truth, graph, shared_found, totals)


def refuse_mixing(losses: Tensor, others: Tensor, rows: Sequence[int]) -> None:
    """Refuse a loss of a row that changes with the rows around it.

    Args:
        losses: The losses of some rows.
        others: The losses of the same rows in another batch.
        rows: Their positions.

    Raises:
        LossError: They differ beyond rounding.
    """
    mine, theirs = losses.detach(), others.detach()
    bound, rounding = {torch.float64: (1e-8, 1e-10), torch.float32: (1e-3, 2e-5)}.get(mine.dtype, (0.1, 0.05))
    allowed = bound * torch.maximum(mine.abs(), 1e-3 * mine.abs().max()) + rounding
    wrong = (mine - theirs).abs() > allowed
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise LossError(
            f"the loss of row {rows[at]} is {float(mine[at]):.6g} in one batch and {float(theirs[at]):.6g} in another: the model "
            "or the loss mixes rows, so a gradient per row does not exist. Look for batch statistics (BatchNorm without running "
            "statistics), a division by the batch size, in-batch negatives, or randomness that eval mode does not turn off."
        )


def _shared_estimates(
    losses: Tensor, graph: Graph, more: Graph, traced: Mapping[str, nn.Parameter], n: int
) -> dict[str, tuple[SharedSite, Tensor]]:
    """Parameters that rows share until an elementwise operation, with their per-example gradients [n, p]."""
    out: dict[str, tuple[SharedSite, Tensor]] = {}
    for name in graph.leaves.keys() & more.leaves.keys():
        site = shared.discover(name, graph, more, n, n + 1)
        places = shared.meetings(site, graph, n) if site is not None else None
        if site is None or not places:
            continue
        deltas = torch.autograd.grad(losses.sum(), [p.edge for p in places], retain_graph=True, allow_unused=True)
        try:
            found = shared.gradients(graph.leaves[name], traced[name], places, list(deltas), n)
        except RuntimeError:  # what made the shared tensor has no batching rule: the next route is tried
            continue
        out[name] = (site, found.reshape(n, -1))
    return out


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _call_layout(probe: Probe, site: str, at: int, n_more: int) -> CallLayout | None:
    """The layout of one call, or None where the rows cannot be told apart in it."""
    calls, others = probe.few.calls[site], probe.more.calls.get(site, [])
    if len(calls) != len(others):
        return None
    call, other = calls[at], others[at]
    if call.positions != other.positions:
        return None
    outputs: list[Layout] = []
    for out, (few, more) in enumerate(zip(call.shapes, other.shapes, strict=True)):
        fitting = [
            layout
            for layout in candidates(few, more, probe.n, n_more)
            if all(
                (d := probe.deltas[row][(site, at, out)]) is None or owns(d, layout, probe.n, row) for row in range(probe.n)
            )
        ]
        if not fitting:
            return None
        outputs.append(fitting[0])
    row_major = all(layout.row_major for layout in outputs)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    other_leaves, other_spec = pytree.tree_flatten((other.args, other.kwargs))
    if spec != other_spec:
        return None
    inputs: list[Layout | None] = []
    for leaf, twin in zip(leaves, other_leaves, strict=True):
        if isinstance(leaf, Tensor) and isinstance(twin, Tensor):
            if leaf.shape == twin.shape:
                inputs.append(None)
                continue
            found = candidates(leaf.shape, twin.shape, probe.n, n_more)
            if not found:
                return None
            layout = found[-1] if len(found) > 1 and not row_major else found[0]
            inputs.append(layout)
        elif not isinstance(leaf, _PLAIN) or leaf != twin:
            return None
    layout = CallLayout(tuple(inputs), tuple(outputs))
    return layout if _turns_with_the_rows(probe, site, at, layout) else None


def _turns_with_the_rows(probe: Probe, site: str, at: int, layout: CallLayout) -> bool:
    """Whether the inputs of a call come in reverse when the rows do."""
    back = probe.back.calls.get(site, [])
    if len(back) != len(probe.few.calls[site]):
        return False
    tensors, others = _call_tensors(probe.few.calls[site][at]), _call_tensors(back[at])
    if len(tensors) != len(others) or len(tensors) != len(layout.inputs):
        return False
    for x, reverse, lay in zip(tensors, others, layout.inputs, strict=True):
        if x.shape != reverse.shape:
            return False
        if lay is not None:
            x, reverse = to_rows(x, lay, probe.n), to_rows(reverse, lay, probe.n).flip(0)
        if not _same(x, reverse, probe.dtype):
            return False
    return True


def _same(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    if not x.is_floating_point():
        return bool(torch.equal(x, y))
    bound = 100 * torch.finfo(dtype).eps
    return bool(torch.allclose(x, y, rtol=bound, atol=bound * float(x.abs().max()) if x.numel() else 0.0, equal_nan=True))


def _call_tensors(call: Call) -> list[Tensor]:
    return tensors(call.args, call.kwargs)


def _site_layouts(probe: Probe, site: str, n_more: int) -> tuple[CallLayout, ...] | None:
    layouts = [_call_layout(probe, site, at, n_more) for at in range(len(probe.few.calls.get(site, [])))]
    found = tuple(layout for layout in layouts if layout is not None)
    return found if found and len(found) == len(layouts) else None


def rule_blocks(
    site: RuleSite, call: Call, layout: CallLayout, delta: Tensor, n: int, groups: Iterable[frozenset[str]]
) -> dict[tuple[str, ...], Block]:
    """A call's blocks by parameter names.

    Args:
        site: The module and its rule.
        call: What it was called on.
        layout: Where the rows stand.
        delta: ∂(Σℓ)/∂output.
        n: Rows.
        groups: Roles that share a block, such as a weight and its bias.

    Returns:
        Blocks by the names of the parameters they hold.
    """
    x = call.args[0] if call.args else call.kwargs["input"]
    input_layout = layout.inputs[0]
    if input_layout is None:
        raise ValueError(f"{site.site}: the layer's input has no row axis")
    rows_x, rows_d = to_rows(x, input_layout, n), to_rows(delta, layout.outputs[0], n)
    wide = accumulation_dtype(delta.dtype)
    rows_d = rows_d.to(wide)
    rows_x = rows_x.to(wide) if rows_x.is_floating_point() else rows_x
    out: dict[tuple[str, ...], Block] = {}
    for group in groups:
        for roles, block in site.rule.compute(site.module, rows_x, rows_d, group).items():
            out[tuple(site.roles[role] for role in roles)] = block
    return out


def _rule_sites(
    root: LossModule, traced: Mapping[str, nn.Parameter], probe: Probe, n_more: int
) -> tuple[dict[str, RuleSite], dict[str, str]]:
    """Modules with a rule whose calls have a known layout, and why others were left out."""
    names = {id(parameter): name for name, parameter in traced.items()}
    sites: dict[str, RuleSite] = {}
    reasons: dict[str, str] = {}
    for site, module in root.model.named_modules():
        roles = {role: names[id(p)] for role, p in module._parameters.items() if p is not None and id(p) in names}
        if not roles or not probe.few.calls.get(site):
            continue
        rule = rule_for(module)
        if rule is None or not set(roles) <= {"weight", "bias"}:
            reasons |= dict.fromkeys(roles.values(), f"{type(module).__name__} has no rule")
            continue
        layouts = _site_layouts(probe, site, n_more)
        usable = layouts is not None and all(
            layout.inputs and layout.inputs[0] is not None and len(layout.outputs) == 1 for layout in layouts
        )
        if usable and layouts is not None and rule.row_axis_first:
            usable = all(lay is not None and lay.axis == 0 for c in layouts for lay in (c.inputs[0], c.outputs[0]))
        if usable and layouts is not None:
            sites[site] = RuleSite(site, module, rule, roles, layouts)
        else:
            reasons |= dict.fromkeys(roles.values(), f"the rows are not an axis of {type(module).__name__}'s input")
    return sites, reasons


def _rule_estimates(sites: Mapping[str, RuleSite], probe: Probe) -> dict[str, Tensor]:
    """Per-example gradients [n, p] by parameter, from the rules."""
    parts: dict[str, list[Block]] = {}
    for site in sites.values():
        for at, call in enumerate(probe.few.calls[site.site]):
            delta = probe.delta(site.site, at)[0]
            if delta is None:
                continue
            groups = [frozenset({role}) for role in site.roles]
            for (name,), block in rule_blocks(site, call, site.layouts[at], delta, probe.n, groups).items():
                parts.setdefault(name, []).append(block)
    return {name: Sum(tuple(blocks)).materialise() for name, blocks in parts.items()}


def _error(estimate: Tensor | None, name: str, probe: Probe) -> float:
    """Largest relative error of a parameter's estimate over the probe rows; 0 where the reference is zero too."""
    worst = 0.0
    for row in range(probe.n):
        truth = probe.truth[row][name]
        mine = torch.zeros_like(truth) if estimate is None else estimate[row]
        norm = float(torch.linalg.vector_norm(truth))
        worst = max(worst, relative_error(mine, truth, probe.dtype, norm, probe.totals[row]))
    return worst


def _owners(root: LossModule, parameter: nn.Parameter) -> list[str]:
    """Modules that contain every alias of a parameter, deepest first, then the loss."""
    aliases = [name for name, p in root.model.named_parameters(remove_duplicate=False) if p is parameter]
    owners = [alias.rpartition(".")[0].split(".") if "." in alias else [] for alias in aliases]
    common = owners[0]
    for path in owners[1:]:
        keep = 0
        while keep < min(len(common), len(path)) and common[keep] == path[keep]:
            keep += 1
        common = common[:keep]
    return [".".join(common[:depth]) for depth in range(len(common), -1, -1)] + [LOSS]


def _local_name(module: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, p in module.named_parameters(remove_duplicate=False) if p is parameter)


def local_estimates(
    site: LocalSite, calls: Sequence[Call], deltas: Sequence[Sequence[Tensor | None]], n: int, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Per-example gradients [n, p] by parameter of all calls of a site under vmap.

    Args:
        site: The module and its parameters.
        calls: Its calls.
        deltas: ∂(Σℓ)/∂output of each call's outputs.
        n: Rows.
        parameters: The traced parameters.

    Returns:
        The gradients, multiplied out.
    """
    total: dict[str, Tensor] = {}
    inner = {own: parameters[name] for name, own in site.names.items()}
    for at, (call, delta) in enumerate(zip(calls, deltas, strict=True)):
        layout = site.layouts[at] if at < len(site.layouts) else site.layouts[0]
        found = local.gradients(site.module, inner, call, layout, delta, n)
        for name, own in site.names.items():
            value = found[own].reshape(n, -1)
            value = value.to(accumulation_dtype(value.dtype))
            total[name] = total[name] + value if name in total else value
    return total


def _settle_locals(
    root: LossModule, traced: Mapping[str, nn.Parameter], open_names: Sequence[str], probe: Probe, n_more: int
) -> tuple[dict[str, LocalSite], list[str], dict[str, str]]:
    """Try modules from the owner upward for each open parameter; those that fit none go by row."""
    chains = {name: _owners(root, traced[name]) for name in open_names}
    modules = {**dict(root.model.named_modules()), LOSS: root}
    layouts = {site: _site_layouts(probe, site, n_more) for site in {s for chain in chains.values() for s in chain}}
    chains = {name: [site for site in chain if layouts[site]] for name, chain in chains.items()}
    settled: dict[str, LocalSite] = {}
    by_row: list[str] = []
    reasons: dict[str, str] = {}
    waiting = list(open_names)
    while waiting:
        groups: dict[str, list[str]] = {}
        for name in waiting:
            if chains[name]:
                groups.setdefault(chains[name][0], []).append(name)
            else:
                by_row.append(name)
                reasons.setdefault(name, "no module could be run under vmap")
        waiting = []
        for site, names in groups.items():
            module = modules[site]
            trial = LocalSite(site, module, {n: _local_name(module, traced[n]) for n in names}, layouts[site] or ())
            calls = probe.few.calls[site]
            try:
                deltas = [probe.delta(site, at) for at in range(len(calls))]
                found = local_estimates(trial, calls, deltas, probe.n, traced)
            except Exception as error:  # whatever vmap or the user's module raises: the next module up is tried
                found = {}
                reasons |= dict.fromkeys(names, f"{type(module).__name__}: {str(error).splitlines()[0][:120]}")
            fit = [n for n in names if n in found and _error(found[n], n, probe) <= tolerance(probe.dtype)]
            for name in names:
                if name not in fit:
                    chains[name] = chains[name][1:]
                    waiting.append(name)
            if fit:
                held = settled[site].names if site in settled else {}
                settled[site] = LocalSite(site, module, {**held, **{n: trial.names[n] for n in fit}}, trial.layouts)
    return settled, by_row, reasons


def wire(
    root: LossModule,
    traced: Mapping[str, nn.Parameter],
    run: Callable[[Any, list[int]], Tensor],
    take: Callable[[Sequence[int]], Any],
    rows: Sequence[int],
) -> Wiring:
    """Find the cheapest exact route of every traced parameter.

    Args:
        root: The loss around the model, in eval mode and at a checkpoint.
        traced: Parameters by name.
        run: ``run(batch, rows) -> losses [n]`` through ``root``, with the loss contract checked.
        take: Makes a batch of the rows asked for.
        rows: Rows to probe with.

    Returns:
        The wiring.

    Raises:
        UserCodeError: The model cannot run three or four of its rows.
    """
    rows = [rows[at % len(rows)] for at in range(3)]
    probe = _probe(root, run, traced, take, rows)
    unused = [name for name in traced if probe.graph.uses(name) == 0]
    pending = {
        name
        for name in traced
        if all(is_zero(probe.truth[row][name], probe.dtype, probe.totals[row]) for row in range(probe.n))
    } - set(unused)
    sites, reasons = _rule_sites(root, traced, probe, 4)
    estimates = _rule_estimates(sites, probe)
    open_names = []
    for name in traced:
        if name in unused:
            continue
        calls = sum(len(probe.few.calls[s.site]) for s in sites.values() for owned in s.roles.values() if owned == name)
        if calls != probe.graph.uses(name):
            reasons.setdefault(name, f"used {probe.graph.uses(name)} times, {calls} of them by a layer with a rule")
            open_names.append(name)
        elif (error := _error(estimates.get(name), name, probe)) > tolerance(probe.dtype):
            reasons[name] = f"the rule's gradient is off by {error:.1e}"
            open_names.append(name)
    joined = {
        name: probe.shared_estimates[name][0]
        for name in open_names
        if name in probe.shared_estimates
        and _error(probe.shared_estimates[name][1], name, probe) <= tolerance(probe.dtype)
    }
    placed, by_row, why = _settle_locals(root, traced, [n for n in open_names if n not in joined], probe, 4)
    reasons |= {name: text for name, text in why.items() if name in by_row or name not in reasons}
    left = set(open_names) | set(unused)
    kept = {}
    for site, found in sites.items():
        roles = {role: name for role, name in found.roles.items() if name not in left}
        if roles:
            kept[site] = RuleSite(site, found.module, found.rule, roles, found.layouts)
    uses = {}
    for name in set(traced) - set(unused) - set(joined) - set(by_row):
        holders = [s.site for s in kept.values() for owned in s.roles.values() if owned == name]
        holders += [p.site for p in placed.values() if name in p.names]
        uses[name] = (probe.graph.uses(name), sum(len(probe.few.calls[site]) for site in holders))
    return Wiring(
        rules=kept,
        shared=joined,
        locals=placed,
        by_row=tuple(by_row),
        unused=tuple(unused),
        pending=frozenset(pending),
        uses=uses,
        reasons={name: text for name, text in reasons.items() if name in left and name not in unused and name not in joined},
    )
