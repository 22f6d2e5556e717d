"""Which route each parameter takes, found by running a few rows and comparing with autograd.

Three rows are run, then the same rows and one of them again: what changed in the shapes shows the row axis of every
module (``layout``). They are also run in reverse: a module whose input is not reversed with them (rows sorted by length,
tokens sent to experts) has no row axis. Then, cheapest first, each parameter tries

1. *rule*: all modules that own it have a rule, and the graph uses it exactly as often as these modules were called;
2. *shared*: it has no row axis until an elementwise operation joins it with the rows (``shared``);
3. *local*: a recurrent layer unrolled in time (``recurrent``), or vmap over a module that contains all its uses, from its
   owner upward to the loss itself (``local``);
4. *by row*: one example at a time.

A route is taken when its per-example gradients equal autograd's for every probe row. A parameter whose gradient is zero
on the probe rows proves nothing: it stays ``pending`` and is compared in the first batch where it is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracin.gradients.agreement import accumulation_dtype, relative_error, tolerance
from tracin.gradients.probe import Probe, probe_rows, site_layouts
from tracin.gradients.rules import rule_for
from tracin.gradients.sites import LOSS, LocalSite, LossModule, RuleSite, Wiring, local_estimates, rule_blocks

__all__ = ["wire"]


def _rule_sites(
    root: LossModule, traced: Mapping[str, nn.Parameter], probe: Probe, n_more: int
) -> tuple[dict[str, RuleSite], dict[str, str]]:
    """Modules with a rule whose calls have a known layout, and why others were left out."""
    names = {id(parameter): name for name, parameter in traced.items()}
    sites: dict[str, RuleSite] = {}
    reasons: dict[str, str] = {}
    for site, module in root.model.named_modules():
        roles = {
            role: names[id(p)] for role, p in module._parameters.items() if p is not None and id(p) in names
        }
        if not roles or not probe.few.calls.get(site):
            continue
        rule = rule_for(module)
        if rule is None or not set(roles) <= {"weight", "bias"}:
            reasons |= dict.fromkeys(roles.values(), f"{type(module).__name__} has no rule")
            continue
        layouts = site_layouts(probe, site, n_more)
        usable = layouts is not None and all(
            layout.inputs and layout.inputs[0] is not None and len(layout.outputs) == 1 for layout in layouts
        )
        if usable and layouts is not None and rule.row_axis_first:
            usable = all(
                lay is not None and lay.axis == 0 for c in layouts for lay in (c.inputs[0], c.outputs[0])
            )
        if usable and layouts is not None:
            sites[site] = RuleSite(site, module, rule, roles, layouts)
        else:
            reasons |= dict.fromkeys(
                roles.values(), f"the rows are not an axis of {type(module).__name__}'s input"
            )
    return sites, reasons


def _rule_estimates(
    sites: Mapping[str, RuleSite], probe: Probe, reasons: dict[str, str]
) -> dict[str, Tensor]:
    """Per-example gradients [n, p] by parameter, from the rules; why a rule could not be used goes to ``reasons``."""
    out: dict[str, Tensor] = {}
    for site in sites.values():
        for at, call in enumerate(probe.few.calls[site.site]):
            delta = probe.delta(site.site, at)[0]
            if delta is None:
                continue
            groups = [frozenset({role}) for role in site.roles]
            try:
                blocks = rule_blocks(site, call, site.layouts[at], delta, probe.n, groups)
                values = {name: block.materialise() for (name,), block in blocks.items()}
            # A rule reads a layer's attributes, which the user may have changed: the next route is tried.
            except Exception as error:  # noqa: BLE001
                reasons |= dict.fromkeys(site.roles.values(), f"the rule raised {error!r}"[:160])
                continue
            for name, value in values.items():
                if value.shape[1] == probe.truth[0][name].numel():
                    out[name] = out[name] + value if name in out else value
    return out


def _error(estimate: Tensor | None, name: str, probe: Probe) -> float:
    """Largest relative error of a parameter's estimate over the probe rows; 0 where the reference is zero too."""
    worst = 0.0
    for row in range(probe.n):
        truth = probe.truth[row][name]
        mine = torch.zeros_like(truth) if estimate is None else estimate[row]
        norm = float(torch.linalg.vector_norm(truth))
        worst = max(worst, relative_error(mine, truth, probe.dtype, norm, probe.totals[row]))
    return worst


def _owners(root: LossModule, parameter: nn.Parameter, inside: bool) -> list[str]:
    """Modules that contain every alias of a parameter, deepest first, then the loss unless only the model may be used."""
    aliases = [name for name, p in root.model.named_parameters(remove_duplicate=False) if p is parameter]
    # A module that stands in two places is one module, recorded under its first name.
    modules = dict(root.model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in reversed(modules.items())}
    places = dict.fromkeys(first[id(modules[alias.rpartition(".")[0]])] for alias in aliases)
    owners = [place.split(".") if place else [] for place in places]
    common = owners[0]
    for path in owners[1:]:
        keep = 0
        while keep < min(len(common), len(path)) and common[keep] == path[keep]:
            keep += 1
        common = common[:keep]
    return [".".join(common[:depth]) for depth in range(len(common), -1, -1)] + ([] if inside else [LOSS])


def _local_name(module: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, p in module.named_parameters(remove_duplicate=False) if p is parameter)


def _settle_locals(
    root: LossModule,
    traced: Mapping[str, nn.Parameter],
    open_names: Sequence[str],
    probe: Probe,
    n_more: int,
    inside: bool,
    owner_only: Collection[str] = (),
) -> tuple[dict[str, LocalSite], list[str], dict[str, str]]:
    """Try modules from the owner upward for each open parameter; those that fit none go by row."""
    chains = {name: _owners(root, traced[name], inside) for name in open_names}
    modules = {**dict(root.model.named_modules()), LOSS: root}
    # Small modules, and those that are run again for another of their parameters.
    again = {chains[name][0] for name in open_names if name not in owner_only and chains[name]}
    for name in owner_only:
        chains[name] = [s for s in chains[name][:1] if s in again or not [*modules[s].children()]]
    layouts = {
        site: site_layouts(probe, site, n_more) for site in {s for chain in chains.values() for s in chain}
    }
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
            trial = LocalSite(
                site, module, {n: _local_name(module, traced[n]) for n in names}, layouts[site] or ()
            )
            calls = probe.few.calls[site]
            try:
                deltas = [probe.delta(site, at) for at in range(len(calls))]
                found = local_estimates(trial, calls, deltas, probe.n, traced)
            # vmap and the user's module raise what they like: the next module up is tried.
            except Exception as error:  # noqa: BLE001
                found = {}
                reasons |= dict.fromkeys(
                    names, f"{type(module).__name__}: {str(error).splitlines()[0][:120]}"
                )
            fit = [n for n in names if n in found and _error(found[n], n, probe) <= tolerance(probe.dtype)]
            for name in names:
                if name not in fit:
                    chains[name] = chains[name][1:]
                    waiting.append(name)
            if fit:
                held = settled[site].names if site in settled else {}
                settled[site] = LocalSite(
                    site, module, {**held, **{n: trial.names[n] for n in fit}}, trial.layouts
                )
    return settled, by_row, reasons


def _plain_rows(probe: Probe) -> bool:
    """Whether each tensor of the batch has a row axis with one entry per row, or none: a graph's nodes have not."""
    layouts = site_layouts(probe, LOSS, probe.n + 1)
    return layouts is not None and all(lay is None or lay.per_row == 1 for c in layouts for lay in c.inputs)


def _gradient_bytes(parameter: Tensor) -> int:
    return parameter.numel() * accumulation_dtype(parameter.dtype).itemsize


def wire(
    root: LossModule,
    traced: Mapping[str, nn.Parameter],
    run: Callable[[Any, list[int]], Tensor],
    take: Callable[[Sequence[int]], Any],
    rows: Sequence[int],
    *,
    inside: bool = False,
) -> Wiring:
    """Find the cheapest exact route of every traced parameter.

    Args:
        root: The loss around the model, in eval mode and at a checkpoint.
        traced: Parameters by name.
        run: ``run(batch, rows) -> losses [n]`` through ``root``, with the loss contract checked.
        take: Makes a batch of the rows asked for.
        rows: Rows to probe with.
        inside: Use no place outside the model: the loss will be computed by someone else.

    Returns:
        The wiring.

    Raises:
        UserCodeError: The model cannot run three or four of its rows.
    """
    rows = [rows[at % len(rows)] for at in range(3)]
    probe = probe_rows(root, run, traced, take, rows)
    unused = [name for name in traced if probe.graph.uses(name) == 0]
    pending = {name for name in traced if not any(bool(truth[name].any()) for truth in probe.truth)} - set(
        unused
    )
    sites, reasons = _rule_sites(root, traced, probe, 4)
    estimates = _rule_estimates(sites, probe, reasons)
    open_names = []
    for name in traced:
        if name in unused:
            continue
        calls = sum(
            len(probe.few.calls[s.site])
            for s in sites.values()
            for owned in s.roles.values()
            if owned == name
        )
        if calls != probe.graph.uses(name):
            reasons.setdefault(
                name, f"used {probe.graph.uses(name)} times, {calls} of them by a layer with a rule"
            )
            open_names.append(name)
        elif (error := _error(estimates.get(name), name, probe)) > tolerance(probe.dtype):
            reasons.setdefault(name, f"the rule's gradient is off by {error:.1e}")
            open_names.append(name)
    joined = {
        name: probe.shared_estimates[name][0]
        for name in open_names
        if name in probe.shared_estimates
        and _error(probe.shared_estimates[name][1], name, probe) <= tolerance(probe.dtype)
    }
    # Where only the model may be used, a layer's own vmap is steadier than a place in the graph, which training may change.
    apart = [name for name in open_names if inside or name not in joined]
    placed, by_row, why = _settle_locals(
        root, traced, apart, probe, 4, inside, list(joined) if inside else ()
    )
    if inside:
        joined = {name: site for name, site in joined.items() if name in by_row}
        by_row = [name for name in by_row if name not in joined]
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
    # On these routes a row's gradient is multiplied out, whatever the graph keeps of the row.
    multiplied = [*joined, *by_row, *(name for place in placed.values() for name in place.names)]
    return Wiring(
        rules=kept,
        shared=joined,
        locals=placed,
        by_row=tuple(by_row),
        unused=tuple(unused),
        pending=frozenset(pending),
        uses=uses,
        movers=probe.movers,
        plain_rows=_plain_rows(probe),
        dtype=probe.dtype,
        row_bytes=probe.row_bytes + sum(_gradient_bytes(traced[name]) for name in multiplied),
        row_tensor=probe.row_tensor,
        reasons={
            name: text
            for name, text in reasons.items()
            if name in left and name not in unused and (name not in joined or "rule" in text)
        },
    )
