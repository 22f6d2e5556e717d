"""What a few rows show about a model: its calls, where the rows stand in them, and autograd's gradients of each row.

The rows are run in three batches: as they are, with one of them again, and in reverse. What changed in the shapes shows
the row axis of every module (``layout``); a module whose input is not reversed with the rows (rows sorted by length,
tokens sent to experts) has none. A loss that changes with the rows around it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tracin.errors import LossError, ModelError
from tracin.gradients import reference, shared
from tracin.gradients.agreement import coarsest
from tracin.gradients.capture import Call, Tape, recording, tensors
from tracin.gradients.graph import Graph, added_bytes, walk
from tracin.gradients.layout import Layout, candidates, owns, to_rows
from tracin.gradients.local import CallLayout
from tracin.gradients.movement import Mover, movers_of
from tracin.gradients.shared import SharedSite
from tracin.gradients.sites import LOSS, LossModule

__all__ = ["Probe", "probe_rows", "refuse_mixing", "site_layouts"]


# How far a row's loss may move with the rows around it: a share of it, and an absolute amount (both are rounding).
MIXING = {torch.float64: (1e-8, 1e-10), torch.float32: (1e-4, 2e-5), torch.bfloat16: (0.1, 0.05)}


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
    movers: tuple[Mover, ...]
    shared_estimates: dict[str, tuple[SharedSite, Tensor]]
    totals: list[float]
    row_bytes: int
    row_tensor: int

    def delta(self, site: str, call: int) -> list[Tensor | None]:
        """∂(Σℓ)/∂output of a call, one per recorded output."""
        out: list[Tensor | None] = []
        for at in range(len(self.few.calls[site][call].edges)):
            found = [d for row in self.deltas if (d := row[(site, call, at)]) is not None]
            out.append(torch.stack(found).sum(0) if found else None)
        return out


def _refuse_writing(traced: Mapping[str, Tensor], versions: Mapping[str, int], error: RuntimeError) -> None:
    """Name the parameter where a backward pass failed because a forward pass had written into it."""
    written = [name for name, parameter in traced.items() if parameter._version != versions[name]]
    if written:
        raise ModelError(
            f"the model's forward pass writes into {written[0]}, which the backward pass needs as it was. An Embedding with "
            "max_norm whose weight another layer uses does so: give it max_norm=None, and bound the weights after each step."
        ) from error


def probe_rows(
    root: LossModule,
    run: Callable[[Any, list[int]], Tensor],
    traced: Mapping[str, nn.Parameter],
    take: Callable[[Sequence[int]], Any],
    rows: list[int],
) -> Probe:
    """Run a few rows in three batches, and take each row's gradient by autograd.

    Args:
        root: The loss around the model.
        run: ``run(batch, rows) -> losses [n]``.
        traced: Parameters by name.
        take: Makes a batch of the rows asked for.
        rows: The rows.

    Returns:
        What they showed.

    Raises:
        ModelError: A forward pass writes into a parameter that its backward pass needs.
        RuntimeError: A backward pass failed for another reason.
    """
    wanted = {id(p) for p in traced.values()}
    sites: dict[str, nn.Module] = {LOSS: root}
    modules = root.model.named_modules()
    sites |= {name: module for name, module in modules if any(id(p) in wanted for p in module.parameters())}
    everything = frozenset(sites)
    versions = {name: parameter._version for name, parameter in traced.items()}
    with recording(sites, everything) as tape:
        losses = run(take(rows), rows)
    with recording(sites, everything) as more_tape:
        more_losses = run(take([*rows, rows[0]]), [*rows, rows[0]])
    with recording(sites, everything) as back_tape:
        back_losses = run(take(rows[::-1]), rows[::-1])
    cast = [] if root.cast is None else [root.cast[1]]
    dtype = coarsest([losses.dtype, *cast, *(p.dtype for p in root.model.parameters())])
    refuse_mixing(losses, more_losses[:-1], rows, dtype)
    refuse_mixing(losses, back_losses.flip(0), rows, dtype)
    more_graph = walk(more_losses, traced)
    keys = [
        (site, at, out)
        for site, calls in tape.calls.items()
        for at, call in enumerate(calls)
        for out in range(len(call.edges))
    ]
    edges = [tape.calls[site][at].edges[out] for site, at, out in keys]
    deltas, truth = [], []
    n = len(rows)
    graph = walk(losses, traced)
    movers = movers_of(graph, more_graph)
    shared_found = _shared_estimates(losses, graph, more_graph, traced, n)
    for row in range(n):
        try:
            gradients, found = reference.in_graph_with_deltas(losses, traced, row, edges)
        except RuntimeError as error:
            _refuse_writing(traced, versions, error)
            raise
        deltas.append(dict(zip(keys, found, strict=True)))
        truth.append(gradients)
    dtype = coarsest([dtype, *(d.dtype for row in deltas for d in row.values() if d is not None)])
    totals = [
        float(torch.stack([torch.linalg.vector_norm(g) for g in row.values()]).cpu().double().norm())
        for row in truth
    ]
    row_bytes, row_tensor = added_bytes(graph, more_graph)
    return Probe(
        n=n,
        dtype=dtype,
        few=tape,
        more=more_tape,
        back=back_tape,
        deltas=deltas,
        truth=truth,
        graph=graph,
        movers=movers,
        shared_estimates=shared_found,
        totals=totals,
        row_bytes=row_bytes,
        row_tensor=row_tensor,
    )


def refuse_mixing(losses: Tensor, others: Tensor, rows: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse a loss of a row that changes with the rows around it.

    Args:
        losses: The losses of some rows.
        others: The losses of the same rows in another batch.
        rows: Their positions.
        dtype: The least precise dtype of the arithmetic.

    Raises:
        LossError: They differ beyond rounding.
    """
    mine, theirs = losses.detach(), others.detach()
    bound, rounding = MIXING.get(dtype, MIXING[torch.bfloat16])
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
        deltas = torch.autograd.grad(
            losses.sum(), [p.edge for p in places], retain_graph=True, allow_unused=True
        )
        try:
            found = shared.gradients(graph.leaves[name], traced[name], places, list(deltas), n)
        except RuntimeError:  # what made the shared tensor has no batching rule: the next route is tried
            continue
        out[name] = (site, found.reshape(n, -1))
    return out


_PLAIN: tuple[type, ...] = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


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
                (d := probe.deltas[row][(site, at, out)]) is None or owns(d, layout, probe.n, row)
                for row in range(probe.n)
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
            layout = found[0 if row_major else -1]
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
    tensors, others = _inputs(probe.few.calls[site][at]), _inputs(back[at])
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
    return bool(
        torch.allclose(
            x, y, rtol=bound, atol=bound * float(x.abs().max()) if x.numel() else 0.0, equal_nan=True
        )
    )


def _inputs(call: Call) -> list[Tensor]:
    return tensors(call.args, call.kwargs)


def site_layouts(probe: Probe, site: str, n_more: int) -> tuple[CallLayout, ...] | None:
    """The layouts of a module's calls in order, or None where it was not called or its rows cannot be told apart."""
    layouts = [_call_layout(probe, site, at, n_more) for at in range(len(probe.few.calls.get(site, [])))]
    found = tuple(layout for layout in layouts if layout is not None)
    return found if found and len(found) == len(layouts) else None
