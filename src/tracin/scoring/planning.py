"""What a run will cost, told before it: memory, time, passes, and each layer's route.

The first checkpoint is loaded, the first batch of each side is checked as the run would check it, and one more batch of
each side is run twice: once with the allocator watched, once with a clock. What grows with rows, queries and checkpoints is
then added up as the verbs hold it:

    influence        max(loading, Q + a query batch + its largest block, Q + a train batch) + result
    top_k            max(loading, Q of all checkpoints + a train batch + a tile of scores and of rows)
    self_influence   max(loading, a train batch) + result
    aggregate        max(loading, S + a query batch, S + its weighting, S + a train batch) + result

with Q a tile of held queries, S the sums of a tile of groups, and always the copies of the parameters and what the libraries
take on first use and keep of freed tensors: the process's own growth over these batches, less what the tensors of them
explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tracin.data import to_device, value_bytes
from tracin.gradients.blocks import total_bytes
from tracin.gradients.engine import Source
from tracin.gradients.products import concatenate, held
from tracin.gradients.targets import Factors, Target
from tracin.scoring.aggregate import Groups, Sums, Targets, add_batch, score_targets, tiled, weighted
from tracin.scoring.fits import VERBS, Sizes, query_budget, shorten_batches, sizes_of, ways_to_fit
from tracin.scoring.measuring import Cost, Measuring
from tracin.scoring.order import tile_spans
from tracin.scoring.passes import HeldQueries, compared, same_queries, score_batch
from tracin.scoring.plan import Plan
from tracin.scoring.routes import Route, norm_routes, routes_of
from tracin.scoring.run import Run
from tracin.scoring.top_k import Strongest, most_rows

__all__ = ["plan"]

# The least that libraries take when they are first used (kernels, buffers for packing), and free pieces between tensors, as
# `python benchmarks/plan.py` found it on two CPU cores.
LIBRARIES = 48 << 20


def _usual(source: Source) -> int:
    """Where a batch of the usual size begins: the first one can be shorter."""
    sizes = source.rows.sizes
    return sizes[0] if len(sizes) > 1 else 0


def _tiles(sizes: Sequence[int], per_query: float, budget: int) -> list[int]:
    """Queries of each tile: whole batches, as many as the budget allows, one at the least."""
    tiles: list[int] = []
    for size in sizes:
        if tiles and (tiles[-1] + size) * per_query <= budget:
            tiles[-1] += size
        else:
            tiles.append(size)
    return tiles


def plan(run: Run, verb: str = "influence", k: int = 10, groups: Groups | None = None) -> Plan:
    """Load the first checkpoint, run a few batches, and add up.

    Args:
        run: A run, with queries unless ``verb`` is ``"self_influence"``.
        verb: ``"influence"``, ``"top_k"``, ``"self_influence"`` or ``"aggregate"``.
        k: List length of ``top_k``.
        groups: Groups of ``aggregate``; one of all queries unless given.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown verb.
    """
    if verb not in VERBS:
        raise ValueError(f"no such verb: {verb}")
    return _Planning(run, verb, k, groups).plan()


class _Planning:
    """The measurements behind a plan, in the order of a run."""

    def __init__(self, run: Run, verb: str, k: int, groups: Groups | None) -> None:
        self.run, self.verb, self.k = run, verb, k
        if verb == "aggregate":
            groups = groups or Groups.of(None, len(run.asked.rows))
        self.groups = groups
        self.n, self.c = len(run.train.rows), len(run.trajectory)
        self.clock = Measuring(run.loaded.device)
        self.first, _ = self.clock.once(partial(run.load, 0))
        shorten_batches(run, self._sizes())
        self.again, _ = self.clock.once(partial(run.loaded.load, run.trajectory[0]))
        self.checks: list[Cost] = []
        self.copies = total_bytes(*{id(t): t for t in _tensors(run)}.values())

    def plan(self) -> Plan:
        if self.verb == "self_influence":
            return self._self_influence()
        if self.groups is not None:
            return self._with_groups(self.groups)
        return self._with_queries()

    def _sizes(self) -> Sizes:
        return sizes_of(self.run, self.verb, self.k, len(self.groups or ()))

    def _check(self, source: Source) -> Any:
        """The first batch, checked; its gradients."""
        # Watching thousands of small operations takes more memory than they do.
        cost, found = self.clock.once(partial(self._first_batch, source), watch=not self.clock.told_by_kernel)
        self.checks.append(cost)
        return found

    def _first_batch(self, source: Source) -> Any:
        batch, value = next(iter(self.run.batches(source)))
        return self.run.gradients(source, batch, value)

    def _self_influence(self) -> Plan:
        run = self.run
        made = self._check(run.train)
        routes = norm_routes(run.train.wiring, made.blocks, compared(run, made))
        del made
        step = self.clock.repeated(self._own_step)
        self.clock.explain(self.first.peak, max(step.peak, self.checks[0].peak))
        parts = {"scores": self._sizes().result, "a batch": max(step.peak, self.checks[0].peak)}
        parts["rows kept"] = self._kept_rows(run.train)
        seconds = self._fixed() + self.c * step.per_row * self.n
        return self._told(parts, seconds, self.c, routes)

    def _own_step(self) -> int:
        run, rows = self.run, 0
        for batch, value in islice(run.batches(run.train, start=_usual(run.train)), 2):
            for block in compared(run, run.gradients(run.train, batch, value)).values():
                block.squared_norm()
            rows += batch.size
        return rows

    def _with_queries(self) -> Plan:
        run, m = self.run, len(self.run.asked.rows)
        found = self._check(run.asked)
        routes = self._routes(found)
        del found
        asked, one = self._query_step()
        per_query = one.nbytes() / one.size
        total = 1 if self.verb == "influence" else self.c
        tiles = _tiles(run.asked.rows.sizes, per_query, query_budget(run, self.verb, self.k) // total)
        tile = max(tiles)
        queries = _stretched(one, tile)
        largest = max((block.nbytes for block in queries.blocks.values()), default=0)
        del one
        self._check(run.train)
        step = self.clock.repeated(partial(self._train_step, queries))
        holding = int(per_query * tile)
        self.clock.explain(
            self.first.peak, holding + max(step.peak, asked.peak, *(check.peak for check in self.checks))
        )
        del queries
        fixed = self._fixed() + self.c * asked.per_row * m
        passes = self.c * len(tiles)
        if self.verb == "influence":
            parts, extra = self._influence_parts(holding, asked, largest, step)
        else:
            parts, extra = self._top_k_parts(holding, asked, largest, step, tile)
        return self._told(parts, fixed + passes * step.per_row * self.n + extra, passes, routes)

    def _with_groups(self, groups: Groups) -> Plan:
        run, made = self.run, self._check(self.run.asked).blocks
        tiles = tiled(run, groups)
        tile = tiles[0]
        asked = self.clock.repeated(lambda: self._sum_step(groups, tile)[0])
        members = int(groups.sizes[tile.start : tile.stop].sum())
        made_sums = self._sum_step(groups, tile)[1]
        sums = {names: _with_members(found.target(), members) for names, found in made_sums.items()}
        del made_sums
        holding = sum(target.nbytes for target in sums.values())
        joined = sum(target.nbytes for target in sums.values() if isinstance(target, Factors))
        routes = tuple(
            _summed_route(route, sums.get(route.parameters), len(tile))
            for route in routes_of(run.train.wiring, made, {}, self.n)
        )
        del made
        weighting, (targets, weights) = self.clock.once(partial(weighted, run, sums, groups, tile, "mean"))
        del sums
        self._check(run.train)
        step = self.clock.repeated(partial(self._target_step, targets, len(tile), weights))
        batch = max(asked.peak, joined, weighting.peak, step.peak, *(check.peak for check in self.checks))
        self.clock.explain(self.first.peak, holding + batch)
        parts = {"scores": self._sizes().result, "sums of groups": holding, "a batch": batch}
        parts["rows kept"] = self._kept_rows(*run.sources())
        read = sum(_rows_read(run.asked.rows.sizes, groups, span) for span in tiles)
        passes = self.c * len(tiles)
        each = passes * (step.per_row * self.n + weighting.seconds) + self.c * asked.per_row * read
        return self._told(parts, self._fixed() + each, passes, routes)

    def _sum_step(self, groups: Groups, tile: range) -> tuple[int, Sums]:
        """One batch, as if all of its queries were of the tile."""
        run, sums = self.run, Sums()
        batch, value = next(iter(run.batches(run.asked, start=_usual(run.asked))))
        add_batch(run, replace(groups, member=groups.member % len(tile)), tile, sums, batch, value)
        return batch.size, sums

    def _target_step(self, targets: Targets, g: int, weights: Tensor | None) -> int:
        run, rows = self.run, 0
        for batch, value in islice(run.batches(run.train, start=_usual(run.train)), 2):
            score_targets(run, batch, value, targets, g, weights).cpu()
            rows += batch.size
        return rows

    def _routes(self, found: Any) -> tuple[Route, ...]:
        plain = compared(self.run, found)
        kept = {names: held(block, self.n) for names, block in plain.items()}
        return routes_of(self.run.train.wiring, found.blocks, kept, self.n)

    def _query_step(self) -> tuple[Cost, HeldQueries]:
        """One batch of queries, held."""
        run = self.run
        start = _usual(run.asked)
        size = next(iter(run.batches(run.asked, start=start)))[0].size
        rows = range(start, start + size)
        cost = self.clock.repeated(lambda: same_queries(run, rows).size)
        return cost, same_queries(run, rows)

    def _train_step(self, queries: HeldQueries) -> int:
        run, rows = self.run, 0
        for batch, value in islice(run.batches(run.train, start=_usual(run.train)), 2):
            value = to_device(value, run.loaded.device, copy=self.verb == "top_k" and run.train.rows.decodes)
            part = score_batch(run, batch, value, queries).cpu()
            sums = torch.zeros_like(part)
            sums += part
            rows += batch.size
        return rows

    def _influence_parts(
        self, holding: int, asked: Cost, largest: int, step: Cost
    ) -> tuple[dict[str, int], float]:
        run = self.run
        result = self._sizes().result
        # Batches are joined while the process still holds what they freed.
        joined = asked.peak + largest
        batch = max(step.peak, joined, *(check.peak for check in self.checks))
        parts = {"scores": result, "held queries": holding, "a batch": batch}
        return {**parts, "rows kept": self._kept_rows(*run.sources())}, 0.0

    def _top_k_parts(
        self, holding: int, asked: Cost, largest: int, step: Cost, tile: int
    ) -> tuple[dict[str, int], float]:
        run = self.run
        spans = tile_spans(run, most_rows(run, tile))
        rows, tiles = max(len(span) for span in spans), len(spans)
        value = next(iter(run.batches(run.train, start=_usual(run.train))))[0]
        # What is in memory already is only looked at.
        decoded = (value_bytes(value.value) or 0) // value.size if run.train.rows.decodes else 0
        lists = Strongest(min(self.k, self.n), slice(0, tile), None)
        scores = torch.zeros(tile, rows, dtype=run.dtype)
        cost, _ = self.clock.once(partial(lists.add, scores, torch.arange(rows)))
        del scores
        batch = max(step.peak, asked.peak, largest, *(check.peak for check in self.checks), cost.peak)
        run.stay_resident()
        # The train rows are read once for each tile of queries.
        again = run.sources() if tile < len(run.asked.rows) else [run.asked]
        parts = {
            "lists": self._sizes().result,
            "held queries": holding * self.c,
            "a tile of rows and scores": rows * (decoded + tile * run.dtype.itemsize),
            "a batch": batch,
            "rows kept": self._kept_rows(*again),
            "checkpoints kept": self.c * run.loaded.nbytes() if run.resident else 0,
        }
        return parts, tiles * (cost.seconds + self.c * self.again.seconds)

    def _kept_rows(self, *sources: Source) -> int:
        """Decoded batches that stay for the checkpoints after."""
        total = 0
        for source in sources:
            held_rows = self.run.decoded.get(source.rows.name)
            if held_rows is not None:
                batch = next(iter(self.run.batches(source)))[0]
                total += held_rows.expected((value_bytes(batch.value) or 0) * len(source.rows) // batch.size)
        return total

    def _fixed(self) -> float:
        """Seconds of loading, wiring and checking."""
        return (
            self.first.seconds
            + (self.c - 1) * self.again.seconds
            + sum(check.seconds for check in self.checks)
        )

    def _told(self, parts: dict[str, int], seconds: float, passes: int, routes: tuple[Route, ...]) -> Plan:
        run = self.run
        loading = max(0, self.first.peak - sum(parts.values()))
        libraries = max(LIBRARIES, self.clock.unexplained)
        own = {"copies of the parameters": self.copies, "loading": loading, "libraries": libraries}
        peak = sum(parts.values()) + sum(own.values())
        sizes = self._sizes()
        ways = ways_to_fit(run, sizes) if sizes.least > run.settings.memory else ()
        return Plan(
            peak,
            seconds,
            passes,
            routes,
            self.verb,
            run.settings.memory,
            (*parts.items(), *own.items()),
            ways,
        )


def _stretched(one: HeldQueries, m: int) -> HeldQueries:
    """As many queries as a tile holds, of one batch again and again: their number counts, not what they are."""
    times = -(-m // one.size)
    blocks = {names: concatenate([block] * times).rows(0, m) for names, block in one.blocks.items()}
    weights = None if one.weights is None else one.weights.repeat(times)[:m]
    return HeldQueries(0, m, blocks, weights)


def _with_members(target: Target, m: int) -> Target:
    """Sums as they are with m members: more of the same, where they stay in factors."""
    if not isinstance(target, Factors):
        return target
    times = -(-m // len(target.members))
    members = concatenate([target.members] * times).rows(0, m)
    return replace(target, members=members, weights=target.weights.repeat(times, 1)[:m])


def _rows_read(sizes: Sequence[int], groups: Groups, span: range) -> int:
    """Queries in batches that have one of these groups."""
    mine = (groups.member >= span.start) & (groups.member < span.stop)
    return sum(size for size, part in zip(sizes, mine.split(list(sizes)), strict=True) if bool(part.any()))


def _summed_route(route: Route, target: Target | None, g: int) -> Route:
    """A route with how the sums are held."""
    if target is None:
        return route
    held = "left in the members' factors" if isinstance(target, Factors) else "multiplied out"
    size = target.nbytes // g
    return replace(route, queries_held=type(target).__name__, bytes_per_query=size, why=f"sums, {held}")


def _tensors(run: Run) -> list[Tensor]:
    return [*run.task.model.parameters(), *run.task.model.buffers()]
