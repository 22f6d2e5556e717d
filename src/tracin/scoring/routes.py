"""Which route each block of parameters takes, and why, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tracin.gradients.blocks import Block, Outer, Rows, Sum
from tracin.gradients.pictures import Convolution
from tracin.gradients.sites import Wiring

__all__ = ["Route", "norm_routes", "routes_of"]

Names = tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """How one block of parameters is traced.

    Attributes:
        parameters: Their names.
        route: ``rule …``, ``shared by the rows``, ``unrolled …``, ``vmap …`` or ``by row``.
        queries_held: How the queries' gradients are held.
        bytes_per_query: What one of them takes.
        reason: Why not by a rule, where it is not.
        why: Why the queries are held as they are; for self-influence how the norm is taken.
    """

    parameters: Names
    route: str
    queries_held: str
    bytes_per_query: int
    reason: str = ""
    why: str = ""


def _count(value: float) -> str:
    for unit, power in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= power:
            return f"{value / power:.3g} {unit}"
    return f"{value:.0f}"


def _compared(factored: float, out: float, chosen: Block) -> str:
    held = "factored" if isinstance(chosen, Outer | Rows) else "multiplied out"
    return f"{held}: products per pair {_count(factored)} factored, {_count(out)} multiplied out"


def _why(made: Block, kept: Block, train_rows: int) -> str:
    """The costs that ``products.held`` compares, for one train row and one query."""
    m = max(1, len(made))
    if isinstance(made, Outer):
        t, i, o = made.uses, made.a.shape[2], made.d.shape[2]
        return _compared(float(t * t * (i + o)), (t + m) * i * o / m + t * i * o / train_rows, kept)
    if isinstance(made, Convolution):
        t, o = made.d[0, :, 0].numel(), made.shape.out_channels
        i = made.size // o
        if made.shape.groups > 1:
            return "multiplied out: a convolution in groups has no factors"
        return _compared(float(t * t * (i + o)), (t + m) * i * o / m, kept)
    if isinstance(made, Rows):
        t = made.index.shape[1]
        if isinstance(kept, Rows):
            return f"matching tokens: {t} of {made.length:,} rows of the table are touched"
        return f"multiplied out: {t} touched rows are many for a table of {made.length:,}"
    if isinstance(made, Sum):
        kinds = " and ".join(dict.fromkeys(type(part).__name__ for part in made.parts))
        return f"multiplied out: one parameter used as {kinds}, whose cross terms count"
    return ""


def _norm_of(block: Block) -> str:
    """How ``squared_norm`` goes, and what it would take otherwise."""
    if isinstance(block, Outer):
        if block.uses == 1:
            return "norm factored: that of the input times that of δ"
        return _less("pairs of uses", *block.norm_work)
    if isinstance(block, Convolution):
        work = block.norm_work
        if work is None:
            kind = "its channels are in groups" if block.shape.groups > 1 else "a row has several pictures"
            return f"norm multiplied out: {kind}"
        by, spent = ("pixels", work.pixels) if work.by_pixels else ("patches", work.patches)
        return _less(f"products of {by}", spent, work.multiplied_out)
    if isinstance(block, Rows):
        return "norm by matching tokens"
    if isinstance(block, Sum):
        return "norm multiplied out: cross terms of several uses count"
    return "norm of the gradient itself"


def _less(by: str, spent: int, out: int) -> str:
    if spent < out:
        return f"norm by {by}: about {_count(spent)} multiplications, {_count(out)} multiplied out"
    return f"norm multiplied out: about {_count(out)} multiplications, {_count(spent)} by {by}"


def norm_routes(
    wiring: Wiring, made: Mapping[Names, Block], compared: Mapping[Names, Block]
) -> tuple[Route, ...]:
    """The routes of a run that takes each row's norm.

    Args:
        wiring: The routes by parameter.
        made: A batch's gradients as the routes made them.
        compared: What norms are taken of: the same, or their features under a projection.

    Returns:
        One entry per block.
    """
    return tuple(
        replace(route, why=_projected(made[at], compared[at]) or _norm_of(compared[at]))
        for route in routes_of(wiring, made, {}, 0)
        for at in [route.parameters]
    )


def _projected(block: Block, features: Block) -> str:
    return f"projected to {features.size:,} features" if features.size != block.size else ""


def routes_of(
    wiring: Wiring, made: Mapping[Names, Block], kept: Mapping[Names, Block], train_rows: int
) -> tuple[Route, ...]:
    """The routes of a run.

    Args:
        wiring: The routes by parameter.
        made: A batch's gradients as the routes made them.
        kept: The same as they are held or compared; empty where nothing is held.
        train_rows: Train rows.

    Returns:
        One entry per block.
    """
    out = []
    for names, block in made.items():
        reasons = "; ".join(dict.fromkeys(wiring.reasons[name] for name in names if name in wiring.reasons))
        if names in kept:
            size, holding = kept[names].nbytes // max(1, len(block)), type(kept[names]).__name__
            why = _projected(block, kept[names]) or _why(block, kept[names], train_rows)
        else:
            size, holding, why = 0, "", ""
        out.append(Route(names, wiring.route(names[0]), holding, size, reasons, why))
    return tuple(out)
