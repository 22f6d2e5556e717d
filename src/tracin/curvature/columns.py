r"""Gauss-Newton as a sum of squares: what every layer sees when a root of the loss's Hessian is sent back.

With :math:`H_n = R_n R_n^\top` (``outputs.roots``), Gauss-Newton is :math:`\frac1N \sum_n \sum_k g_{nk} g_{nk}^\top`, where
:math:`g_{nk} = J_n^\top r_{nk}` is a gradient like any other: one forward pass, one backward pass per column k, and the
rules of the layers turn inputs and δ into blocks.

This is the Fisher information with the expectation over labels taken exactly. ``samples`` replaces the columns by S random
mixtures of them, :math:`R_n \varepsilon_{ns} / \sqrt S` with random signs ε, so that the sum keeps its expectation. No labels are
drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.curvature.checks import check_loss
from tracin.curvature.operators import CurvatureRows
from tracin.curvature.outputs import outputs_of, roots
from tracin.data import Batch, describe_rows, to_device
from tracin.errors import DataError, ModelError
from tracin.gradients.agreement import relative_error, tolerance
from tracin.gradients.blocks import Block
from tracin.gradients.capture import Call, recording
from tracin.gradients.layout import to_rows
from tracin.gradients.local import CallLayout
from tracin.gradients.sites import RuleSite, Wiring, rule_blocks

__all__ = ["Column", "Columns", "Use", "missing"]


@dataclass(frozen=True)
class Use:
    """One call of a layer: its site, the call, where the rows stand, and δ of the column (None: not reached)."""

    site: RuleSite
    call: Call
    layout: CallLayout
    delta: Tensor | None

    def input_rows(self, n: int) -> Tensor:
        """The input as [n, k, ...]."""
        x = self.call.args[0] if self.call.args else self.call.kwargs["input"]
        assert self.layout.inputs[0] is not None
        return to_rows(x, self.layout.inputs[0], n)

    def delta_rows(self, n: int) -> Tensor:
        """δ as [n, k, ...]; zeros where the column does not reach the call."""
        delta = self.delta
        if delta is None:
            delta = next(self.site.module.parameters()).new_zeros(self.call.shapes[0])
        return to_rows(delta, self.layout.outputs[0], n)


@dataclass(frozen=True)
class Column:
    """One root column of a batch of n rows: the uses of every layer."""

    n: int
    number: int
    uses: tuple[Use, ...]

    def blocks(self, site: RuleSite) -> list[dict[tuple[str, ...], Block]]:
        """The column's per-example gradients of one layer's parameters, call by call."""
        groups = [frozenset({role}) for role in site.roles]
        return [
            rule_blocks(site, use.call, use.layout, use.delta, self.n, groups)
            for use in self.uses
            if use.site is site and use.delta is not None
        ]


class Columns:
    """Root columns of the curvature rows.

    Args:
        rows: The curvature rows.
        wiring: The layers' rules and layouts.
        samples: Random mixtures of the columns per row instead of all columns; None: all.
        seed: Of the random columns.

    Raises:
        ModelError: A traced parameter is in no layer with a rule; ``missing`` tells before.
    """

    def __init__(
        self, rows: CurvatureRows, wiring: Wiring, samples: int | None = None, seed: int = 0
    ) -> None:
        self.rows, self.samples, self.seed = rows, samples, seed
        self.sites = dict(wiring.rules)
        left_out = missing(rows, wiring)
        if left_out:
            name, reason = next(iter(left_out.items()))
            raise ModelError(f"{name} is in no layer with a rule ({reason}).")

    def __iter__(self) -> Iterator[Column]:
        generator = torch.Generator().manual_seed(self.seed)
        first = True
        modules = {name: site.module for name, site in self.sites.items()}
        for batch, value in self.rows.batches():
            n = batch.size
            spare = to_device(value, self.rows.source.device, copy=True) if first else None
            with recording(modules, frozenset(modules)) as tape:
                found = outputs_of(self.rows.source, batch, value, self.rows.vectors.tensors)
            if first:
                check_loss(found, self.rows.source, batch, spare)
            at, root = roots(found, self.rows.source, value, n)
            made = found.made[at]
            uses = self._uses(tape.calls, batch)
            for number, column in enumerate(self._drawn(root, generator)):
                sent = column.reshape(made.shape)
                deltas = torch.autograd.grad(
                    made, [call.edges[0] for _, call, _ in uses], sent, retain_graph=True, allow_unused=True
                )
                done = Column(n, number, tuple(Use(*use, d) for use, d in zip(uses, deltas, strict=True)))
                if first:
                    self._check(done, made, sent)
                    first = False
                yield done

    def trace(self) -> float:
        """The trace of Gauss-Newton, in one pass."""
        total = 0.0
        for column in self:
            for site in self.sites.values():
                parts: dict[tuple[str, ...], list[Block]] = {}
                for blocks in column.blocks(site):
                    for names, block in blocks.items():
                        parts.setdefault(names, []).append(block)
                for found in parts.values():
                    if len(found) == 1:
                        total += float(found[0].squared_norm().double().sum())
                    else:
                        flat = torch.stack([block.materialise() for block in found]).sum(0)
                        total += float(flat.double().square().sum())
        return total / len(self.rows)

    def _drawn(self, root: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        if self.samples is None:
            yield from root.unbind(-1)
            return
        n, _, k = root.shape
        for _ in range(self.samples):
            signs = torch.randint(0, 2, (n, k, 1), generator=generator).to(root) * 2 - 1
            yield (root @ signs)[:, :, 0] / self.samples**0.5

    def _uses(self, calls: Mapping[str, list[Call]], batch: Batch) -> list[tuple[RuleSite, Call, CallLayout]]:
        out = []
        for name, site in self.sites.items():
            made = calls.get(name, [])
            same = len(made) == len(site.layouts)
            for at, call in enumerate(made):
                layout = site.layouts[at if same else 0]
                known = same or len(set(site.layouts)) == 1
                given = call.args[0] if call.args else call.kwargs["input"]
                fits = layout.inputs[0] is not None and layout.inputs[0].fits(given.shape, batch.size)
                if not (known and fits and len(call.edges) == 1):
                    raise DataError(
                        f"{self.rows.source.rows.name}, {describe_rows(batch.rows)}: the layer {name} is used otherwise than in "
                        "the rows that were tried first, so its factors cannot be formed. Use solver='cg'."
                    )
                out.append((site, call, layout))
        return out

    def _check(self, column: Column, made: Tensor, sent: Tensor) -> None:
        """The sum of the first column's gradients against autograd's."""
        parameters = self.rows.vectors.parameters
        found = torch.autograd.grad(
            made, list(parameters.values()), sent, retain_graph=True, allow_unused=True
        )
        truth = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
        total = float(torch.stack([torch.linalg.vector_norm(g) for g in truth.values()]).norm())
        mine: dict[str, Tensor] = {}
        for site in self.sites.values():
            for blocks in column.blocks(site):
                for (name,), block in blocks.items():
                    mine[name] = mine.get(name, torch.zeros(())) + block.total()
        for name, gradient in truth.items():
            dtype = self.rows.source.dtype if self.rows.source.found else gradient.dtype
            estimate = mine.get(name, torch.zeros_like(gradient))
            error = relative_error(estimate, gradient, dtype, 0.0, total)
            if error > tolerance(dtype):
                raise ModelError(
                    f"the curvature of {name} does not follow from its layer's inputs and outputs (off by {error:.1e} from "
                    "autograd). Use solver='cg'."
                )


def missing(rows: CurvatureRows, wiring: Wiring) -> dict[str, str]:
    """Traced parameters that no layer with a rule holds alone, and why.

    Args:
        rows: The curvature rows, whose parameters are asked for.
        wiring: The routes.

    Returns:
        Reasons by name; parameters that the loss does not use are not missing, their curvature is zero.
    """
    owners: dict[str, list[str]] = {}
    for site in wiring.rules.values():
        for name in site.roles.values():
            owners.setdefault(name, []).append(site.site)
    out = {}
    for name in rows.vectors.parameters:
        own = owners.get(name, [])
        if len(own) > 1:
            out[name] = f"shared by the layers {', '.join(own)}"
        elif not own and name not in wiring.unused:
            out[name] = wiring.reasons.get(name, wiring.route(name))
    return out
