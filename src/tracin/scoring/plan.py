"""What a run will cost, told before it: memory, time, passes, and each layer's route.

The first checkpoint is loaded, the first batch of each side is checked as the run would check it, and one more batch of
each side is run twice: once with the allocator watched, once with a clock. What grows with rows, queries and checkpoints is
then added up as the verbs hold it:

    influence        max(loading, Q + a query batch + its largest block, Q + a train batch) + result
    top_k            max(loading, Q of all checkpoints + a train batch + a tile of scores and of rows)
    self_influence   max(loading, a train batch) + result

with Q a tile of held queries, and always the copies of the parameters and what the libraries take on first use and keep of
freed tensors: the process's own growth over these batches, less what the tensors of them explain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracin.data import to_device, value_bytes
from tracin.gradients.engine import Source
from tracin.gradients.products import concatenate, held
from tracin.scoring.fits import VERBS, query_budget, shorten_batches, sizes_of, ways_to_fit
from tracin.scoring.memory import Resident, Watched, size_text, watched
from tracin.scoring.order import tile_spans
from tracin.scoring.passes import HeldQueries, compared, same_queries, score_batch
from tracin.scoring.routes import Route, routes_of
from tracin.scoring.run import Run
from tracin.scoring.top_k import Strongest, most_rows

__all__ = ["Plan", "Route", "plan"]

# The least that libraries take when they are first used (kernels, buffers for packing), and free pieces between tensors, as
# `python benchmarks/plan.py` found it on two CPU cores.
LIBRARIES = 48 << 20
# Seconds that repeating a batch for its time may take, and how often it is repeated at the most.
PATIENCE, REPEATS = 0.5, 5


@dataclass(frozen=True)
class Plan:
    """The cost of a verb.

    Attributes:
        peak_bytes: Memory above the model, the data and the imports: the parameters' copies, held queries, the tensors of
            a batch, and the scores.
        seconds: Time, from one timed batch of each side and the fixed costs.
        passes: Passes over the train rows, all checkpoints together.
        routes: One entry per block of parameters.
        verb: What is planned.
        memory: The bound that the method was given.
        parts: What the peak is made of, in bytes.
        ways: Where the run does not fit, the three cheapest ways to make it, with what each costs.
    """

    peak_bytes: int
    seconds: float
    passes: int
    routes: tuple[Route, ...]
    verb: str = "influence"
    memory: int = 0
    parts: tuple[tuple[str, int], ...] = ()
    ways: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the run will be started: what it must hold is within ``memory``."""
        return not self.ways

    def __str__(self) -> str:
        slow = [route for route in self.routes if not route.route.startswith("rule")]
        text = f"{self.passes} passes over the train rows, about {self.seconds:.1f} s, peak {self.peak_bytes / 2**20:,.0f} MiB"
        if slow:
            text = f"{text}; {len(slow)} of {len(self.routes)} blocks off the fast route"
        if self.parts:
            text += "\nmemory: " + ", ".join(f"{name} {size_text(size)}" for name, size in self.parts if size)
        for way in self.ways:
            text += f"\ndoes not fit memory={size_text(self.memory)}: {way}"
        return "\n".join([text, *_table(self.routes)])


def _table(routes: tuple[Route, ...]) -> list[str]:
    """A line per block, in columns; blocks that go the same way in one."""
    alike: dict[tuple[str, str, str], list[Route]] = {}
    for route in routes:
        alike.setdefault((route.route, route.queries_held, route.reason or route.why), []).append(route)
    rows = []
    for (name, holding, why), group in alike.items():
        first = ", ".join(group[0].parameters)
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        size = size_text(sum(route.bytes_per_query for route in group)) if holding else ""
        rows.append((first + more, name, size, why))
    widths = [max((len(row[at]) for row in rows), default=0) for at in range(3)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    ]


@dataclass(frozen=True)
class _Cost:
    """A piece of work: its peak in bytes, what it leaves, its seconds, and the rows that it did."""

    peak: int
    kept: int
    seconds: float
    rows: int = 1

    @property
    def per_row(self) -> float:
        return self.seconds / self.rows


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


def plan(run: Run, verb: str = "influence", k: int = 10) -> Plan:
    """Load the first checkpoint, run a few batches, and add up.

    Args:
        run: A run, with queries unless ``verb`` is ``"self_influence"``.
        verb: ``"influence"``, ``"top_k"`` or ``"self_influence"``.
        k: List length of ``top_k``.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown verb.
    """
    if verb not in VERBS:
        raise ValueError(f"no such verb: {verb}")
    return _Planning(run, verb, k).plan()


class _Planning:
    """The measurements behind a plan, in the order of a run."""

    def __init__(self, run: Run, verb: str, k: int) -> None:
        self.run, self.verb, self.k = run, verb, k
        self.n, self.c = len(run.train.rows), len(run.trajectory)
        self.device = run.loaded.device
        with watched(self.device):
            pass  # what watching itself takes is not the run's
        self.resident, self.unexplained = Resident(), 0
        self.first, _ = self._once(partial(run.load, 0))
        shorten_batches(run, sizes_of(run, verb, k))
        self.again, _ = self._once(partial(run.loaded.load, run.trajectory[0]))
        self.checks: list[_Cost] = []
        self.copies = sum(_bytes(t) for t in {id(t): t for t in _tensors(run)}.values())

    def plan(self) -> Plan:
        if self.verb == "self_influence":
            return self._self_influence()
        return self._with_queries()

    def _once(self, work: Callable[[], Any], *, watch: bool = True) -> tuple[_Cost, Any]:
        """Work that cannot be repeated, watched and timed at once."""
        start = time.perf_counter()
        with watched(self.device) if watch else nullcontext(Watched()) as found:
            out = work()
        seconds = time.perf_counter() - start
        self.resident.look()
        return _Cost(found.peak, found.kept, seconds), out

    def _repeated(self, work: Callable[[], int]) -> _Cost:
        """Work that says how many rows it did: timed, and watched in the end, since watching takes memory and time."""
        rows, times = work(), list[float]()
        while len(times) < REPEATS and sum(times) < PATIENCE:
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        self.resident.look()
        with watched(self.device) as found:
            work()
        return _Cost(found.peak, found.kept, median(times), rows)

    @property
    def _told_by_kernel(self) -> bool:
        return self.device.type == "cpu" and self.resident.tells

    def _check(self, source: Source) -> Any:
        """The first batch, checked; its gradients."""
        # Watching thousands of small operations takes more memory than they do.
        cost, found = self._once(partial(self._first_batch, source), watch=not self._told_by_kernel)
        self.checks.append(cost)
        return found

    def _first_batch(self, source: Source) -> Any:
        batch, value = next(iter(self.run.batches(source)))
        return self.run.gradients(source, batch, value)

    def _self_influence(self) -> Plan:
        run = self.run
        routes = routes_of(run.train.wiring, self._check(run.train).blocks, {}, self.n)
        step = self._repeated(self._own_step)
        self._explain(max(step.peak, self.checks[0].peak))
        parts = {"scores": sizes_of(run, self.verb).result, "a batch": max(step.peak, self.checks[0].peak)}
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
        step = self._repeated(partial(self._train_step, queries))
        holding = int(per_query * tile)
        self._explain(holding + max(step.peak, asked.peak, *(check.peak for check in self.checks)))
        del queries
        fixed = self._fixed() + self.c * asked.per_row * m
        passes = self.c * len(tiles)
        if self.verb == "influence":
            parts, extra = self._influence_parts(holding, asked, largest, step)
        else:
            parts, extra = self._top_k_parts(holding, asked, largest, step, tile)
        return self._told(parts, fixed + passes * step.per_row * self.n + extra, passes, routes)

    def _explain(self, tensors: int) -> None:
        """What loading and these batches took beyond their tensors."""
        if self._told_by_kernel:
            held_at_once = max(tensors, self.first.peak)
            self.unexplained = max(self.unexplained, self.resident.growth - held_at_once)

    def _routes(self, found: Any) -> tuple[Route, ...]:
        plain = compared(self.run, found)
        kept = {names: held(block, self.n) for names, block in plain.items()}
        return routes_of(self.run.train.wiring, found.blocks, kept, self.n)

    def _query_step(self) -> tuple[_Cost, HeldQueries]:
        """One batch of queries, held."""
        run = self.run
        start = _usual(run.asked)
        size = next(iter(run.batches(run.asked, start=start)))[0].size
        rows = range(start, start + size)
        cost = self._repeated(lambda: same_queries(run, rows).size)
        return cost, same_queries(run, rows)

    def _train_step(self, queries: HeldQueries) -> int:
        run, rows = self.run, 0
        for batch, value in islice(run.batches(run.train, start=_usual(run.train)), 2):
            value = to_device(value, run.loaded.device, copy=self.verb == "top_k")
            part = score_batch(run, batch, value, queries).cpu()
            sums = torch.zeros_like(part)
            sums += part
            rows += batch.size
        return rows

    def _influence_parts(
        self, holding: int, asked: _Cost, largest: int, step: _Cost
    ) -> tuple[dict[str, int], float]:
        run = self.run
        result = sizes_of(run, "influence").result
        # Batches are joined while the process still holds what they freed.
        joined = asked.peak + largest
        batch = max(step.peak, joined, *(check.peak for check in self.checks))
        parts = {"scores": result, "held queries": holding, "a batch": batch}
        return {**parts, "rows kept": self._kept_rows(*run.sources())}, 0.0

    def _top_k_parts(
        self, holding: int, asked: _Cost, largest: int, step: _Cost, tile: int
    ) -> tuple[dict[str, int], float]:
        run = self.run
        spans = tile_spans(run, most_rows(run, tile))
        rows, tiles = max(len(span) for span in spans), len(spans)
        value = next(iter(run.batches(run.train, start=_usual(run.train))))[0]
        decoded = sum(_bytes(leaf) for leaf in _leaves(value.value)) // value.size
        lists = Strongest(min(self.k, self.n), slice(0, tile), None)
        scores = torch.zeros(tile, rows, dtype=run.dtype)
        cost, _ = self._once(partial(lists.add, scores, torch.arange(rows)))
        del scores
        batch = max(step.peak, asked.peak, largest, *(check.peak for check in self.checks), cost.peak)
        run.stay_resident()
        # The train rows are read once for each tile of queries.
        again = run.sources() if tile < len(run.asked.rows) else [run.asked]
        parts = {
            "lists": sizes_of(run, "top_k", self.k).result,
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
        libraries = max(LIBRARIES, self.unexplained)
        own = {"copies of the parameters": self.copies, "loading": loading, "libraries": libraries}
        peak = sum(parts.values()) + sum(own.values())
        sizes = sizes_of(run, self.verb, self.k)
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


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(run: Run) -> list[Tensor]:
    return [*run.task.model.parameters(), *run.task.model.buffers()]
