"""Where parameters are traced: modules with a rule, modules that are run again, and the routes of a whole loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracin.gradients import local
from tracin.gradients.agreement import accumulation_dtype
from tracin.gradients.blocks import Block
from tracin.gradients.capture import Call
from tracin.gradients.layout import to_rows
from tracin.gradients.local import CallLayout
from tracin.gradients.movement import Mover
from tracin.gradients.precision import autocast
from tracin.gradients.recurrent import unrolls
from tracin.gradients.rules import Rule
from tracin.gradients.shared import SharedSite

__all__ = ["LOSS", "LocalSite", "LossModule", "RuleSite", "Wiring", "local_estimates", "rule_blocks"]

# Site name of the loss itself, which contains the model.
LOSS = "(loss)"


class LossModule(nn.Module):
    """The user's loss as a module around the user's model, so that the loss is one more place to run vmap.

    Args:
        model: The user's model.
        losses_of: The user's loss.
        cast: The device and dtype of the autocast to run both in; None: as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        losses_of: Callable[[nn.Module, Any], Any],
        cast: tuple[str, torch.dtype] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.cast = model, cast
        self._losses_of = losses_of

    def forward(self, value: Any) -> Any:
        """What the user's loss returns for a batch; the caller holds it to the contract."""
        if self.cast is None:
            return self._losses_of(self.model, value)
        with autocast(*self.cast):
            return self._losses_of(self.model, value)

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Without the autocast, within the block."""
        cast, self.cast = self.cast, None
        try:
            yield
        finally:
            self.cast = cast


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
    """A module that is run again, under vmap or unrolled: parameter → its name within it, and the layouts of its calls."""

    site: str
    module: nn.Module
    names: dict[str, str]
    layouts: tuple[CallLayout, ...]

    @property
    def unrolled(self) -> bool:
        """Whether it is a recurrent layer that is unrolled in time."""
        return all(unrolls(self.module, self.names.values(), layout.inputs) for layout in self.layouts)


@dataclass(frozen=True)
class Wiring:
    """Routes of one loss over one data source.

    ``plain_rows`` says that every tensor of a batch has one entry per row on its row axis, ``dtype`` is the least precise
    dtype of the arithmetic that was seen, ``row_bytes`` what one more row adds to the graph's tensors and to the gradients that
    no rule keeps as factors, ``row_tensor`` to the largest tensor of the graph.
    """

    rules: dict[str, RuleSite]
    shared: dict[str, SharedSite]
    locals: dict[str, LocalSite]
    by_row: tuple[str, ...]
    unused: tuple[str, ...]
    pending: frozenset[str]
    uses: dict[str, tuple[int, int]]
    movers: tuple[Mover, ...] = ()
    plain_rows: bool = True
    dtype: torch.dtype = torch.float32
    row_bytes: int = 0
    row_tensor: int = 0
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
                way = "unrolled" if place.unrolled else "vmap"
                return f"{way} {type(place.module).__name__ if place.site != LOSS else 'loss'}"
        return "unused" if name in self.unused else "by row"


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

    Raises:
        ValueError: The input has no row axis, so the site should not have been made.
    """
    x = call.args[0] if call.args else call.kwargs["input"]
    input_layout = layout.inputs[0]
    if input_layout is None:
        raise ValueError(f"{site.site}: the layer's input has no row axis")
    rows_x, rows_d = to_rows(x, input_layout, n), to_rows(delta, layout.outputs[0], n)
    wide = accumulation_dtype(delta.dtype)
    rows_d = rows_d.to(wide)
    rows_x = rows_x.to(wide) if rows_x.is_floating_point() else rows_x
    asked = list(groups)
    # Where each role comes as a block of its own, what the roles share is computed once.
    if asked and not site.rule.fused:
        asked = [frozenset().union(*asked)]
    out: dict[tuple[str, ...], Block] = {}
    for group in asked:
        for roles, block in site.rule.compute(site.module, rows_x, rows_d, group).items():
            out[tuple(site.roles[role] for role in roles)] = block
    return out


def local_estimates(
    site: LocalSite,
    calls: Sequence[Call],
    deltas: Sequence[Sequence[Tensor | None]],
    n: int,
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Per-example gradients [n, p] by parameter of all calls of a module that is run again.

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
