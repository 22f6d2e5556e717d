"""What a run will cost, told before it: memory, time, passes, and each layer's route."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tracin.data import Batch, to_device
from tracin.gradients.blocks import TILE, Block
from tracin.gradients.capture import recording
from tracin.gradients.engine import Source
from tracin.gradients.products import held
from tracin.progress import progress
from tracin.scoring.passes import HeldQueries, compared, hold_queries, score_batch
from tracin.scoring.run import Run

__all__ = ["Plan", "Route", "plan"]


@dataclass(frozen=True)
class Route:
    """How one block of parameters is traced: its route, how the queries are held, and why not the fast way."""

    parameters: tuple[str, ...]
    route: str
    queries_held: str
    bytes_per_query: int
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The cost of ``influence(train, queries)``.

    Attributes:
        peak_bytes: Memory above the model, the data and the imports, estimated from the sizes of one batch.
        seconds: Time, from one timed batch of each side.
        passes: Passes over the train rows, all checkpoints together.
        routes: One entry per block of parameters.
    """

    peak_bytes: int
    seconds: float
    passes: int
    routes: tuple[Route, ...]

    def __str__(self) -> str:
        slow = [route for route in self.routes if not route.route.startswith("rule")]
        text = f"{self.passes} passes over the train rows, about {self.seconds:.1f} s, peak {self.peak_bytes / 2**20:,.0f} MiB"
        return f"{text}; {len(slow)} of {len(self.routes)} blocks off the fast route" if slow else text


def _tensor_bytes(value: object) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def plan(run: Run) -> Plan:
    """Load the first checkpoint, time one batch of each side, and add up.

    Args:
        run: A run with queries.

    Returns:
        The plan.
    """
    run.load(0)
    n, m, c = len(run.train.rows), len(run.asked.rows), len(run.trajectory)
    blocks, query_seconds, query_rows = _first_queries(run)
    per_query = sum(block.nbytes for block in blocks.values()) / query_rows
    budget = run.settings.memory // 2
    tile = max(*run.asked.rows.sizes, min(m, int(budget / max(per_query, 1e-9))))
    tiles = -(-m // tile)
    train_seconds, train_bytes, train_rows = _first_train(run)
    parameters = sum(p.numel() * p.element_size() for p in run.task.model.parameters())
    result = m * n * torch.empty(0, dtype=run.dtype).element_size()
    largest = max((block.size for block in blocks.values()), default=0)
    temporary = min(TILE, largest * train_rows) * torch.empty(0, dtype=run.dtype).element_size()
    peak = 2 * parameters + int(per_query * min(tile, m)) + result + train_bytes + temporary
    seconds = c * (query_seconds / query_rows * m + tiles * train_seconds / train_rows * n)
    return Plan(peak, seconds, c * tiles, _routes(run, blocks, query_rows))


def _usual(run: Run, source: Source) -> tuple[Batch, object]:
    """A batch of the usual size: the first one can be shorter."""
    sizes = source.rows.sizes
    return next(run.batches(source, start=sizes[0] if len(sizes) > 1 else 0))


def _first_queries(run: Run) -> tuple[dict[tuple[str, ...], Block], float, int]:
    source = run.asked
    batch, value = _usual(run, source)
    run.gradients(source, batch, to_device(value, run.loaded.device, copy=True))
    start = time.perf_counter()
    found = run.gradients(source, batch, value)
    kept = {names: held(block, len(run.train.rows)) for names, block in compared(run, found).items()}
    return kept, time.perf_counter() - start, batch.size


def _first_train(run: Run) -> tuple[float, int, int]:
    with progress("plan", 0, show=False) as bar:
        tile: HeldQueries = next(hold_queries(run, run.settings.memory // 2, bar))
    batch, value = _usual(run, run.train)
    score_batch(run, batch, to_device(value, run.loaded.device, copy=True), tile)
    start = time.perf_counter()
    score_batch(run, batch, value, tile)
    seconds = time.perf_counter() - start
    return seconds, _captured_bytes(run, batch, value), batch.size


def _captured_bytes(run: Run, batch: Batch, value: object) -> int:
    """Inputs and outputs of every leaf module for one batch, twice: the graph's own copies and their gradients."""
    leaves = {name: module for name, module in run.task.model.named_modules() if not list(module.children())}
    with recording(leaves) as tape:
        run.train.run(value, batch.rows)
    total = _tensor_bytes(value)
    for calls in tape.calls.values():
        for call in calls:
            element = torch.empty(0, dtype=run.dtype).element_size()
            total += (
                _tensor_bytes((call.args, call.kwargs))
                + 2 * sum(shape.numel() for shape in call.shapes) * element
            )
    return total


def _routes(run: Run, blocks: dict[tuple[str, ...], Block], rows: int) -> tuple[Route, ...]:
    wiring = run.train.wiring
    routes = []
    for names, block in blocks.items():
        reasons = "; ".join(dict.fromkeys(wiring.reasons[name] for name in names if name in wiring.reasons))
        routes.append(
            Route(names, wiring.route(names[0]), type(block).__name__, block.nbytes // rows, reasons)
        )
    return tuple(routes)
