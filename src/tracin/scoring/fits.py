"""What a run will hold, by its sizes alone, and the refusal of one that cannot fit in ``memory=``.

``memory`` bounds what a run holds beside the model, the data and the imports: the scores that it returns, the queries'
gradients, tiles of scores, and the tensors of one batch. Queries are held in tiles that fit, so what cannot shrink is

    result   q·n numbers                                 (influence)
             4·q·k numbers of lists                      (top_k)
             n numbers                                   (self_influence)
    batch    what the graph keeps of a row · the rows of the largest batch
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tracin.errors import MemoryLimitError
from tracin.scoring.memory import size_text
from tracin.scoring.run import Run

__all__ = ["VERBS", "Sizes", "query_budget", "refuse_too_large", "sizes_of", "ways_to_fit"]

VERBS = ("influence", "top_k", "self_influence")


@dataclass(frozen=True)
class Sizes:
    """What a verb holds at the least, in bytes: its result, and one batch."""

    verb: str
    result: int
    batch: int
    queries: int
    rows: int

    @property
    def least(self) -> int:
        """What cannot shrink."""
        return self.result + self.batch


def sizes_of(run: Run, verb: str, k: int = 10) -> Sizes:
    """The sizes of a run whose sources are wired.

    Args:
        run: The run, at its first checkpoint.
        verb: One of ``VERBS``.
        k: List length of ``top_k``.

    Returns:
        The sizes.
    """
    n, m = len(run.train.rows), 0 if run.queries is None else len(run.queries.rows)
    item = run.dtype.itemsize
    result = {"influence": m * n * item, "top_k": 2 * m * k * (item + 8), "self_influence": n * item}
    largest = [
        source.wiring.row_bytes * max(source.rows.sizes)
        for source in (run.train, run.queries)
        if source is not None
    ]
    return Sizes(verb, result[verb], max(largest), m, max(run.train.rows.sizes))


def query_budget(run: Run, verb: str) -> int:
    """Bytes for one tile of held queries: half of the memory, or what the rest of the run leaves of it.

    Args:
        run: A run at its first checkpoint.
        verb: One of ``VERBS``.

    Returns:
        The bytes; a tile holds at least one batch.
    """
    memory = run.settings.memory
    return max(0, min(memory // 2, memory - sizes_of(run, verb).least))


def refuse_too_large(run: Run, verb: str, k: int = 10) -> None:
    """Refuse a run that cannot fit, before it computes.

    Args:
        run: A run at its first checkpoint.
        verb: One of ``VERBS``.
        k: List length of ``top_k``.

    Raises:
        MemoryLimitError: It holds more than ``memory`` whatever the tiles; the message says what would fit, and at what cost.
    """
    sizes, memory = sizes_of(run, verb, k), run.settings.memory
    if sizes.least <= memory:
        return
    what = (
        f"the scores of {sizes.queries:,} queries × {len(run.train.rows):,} train rows take {size_text(sizes.result)}"
        if sizes.result > sizes.batch
        else f"a batch of {sizes.rows:,} rows takes about {size_text(sizes.batch)}"
    )
    ways = "; ".join(f"({at}) {way}" for at, way in enumerate(ways_to_fit(run, sizes), start=1))
    raise MemoryLimitError(f"{verb}: {what}, and memory= allows {size_text(memory)}. Cheapest first: {ways}.")


def ways_to_fit(run: Run, sizes: Sizes) -> tuple[str, ...]:
    """The three cheapest ways to make a run fit, with what each costs.

    Args:
        run: A run at its first checkpoint.
        sizes: Its sizes.

    Returns:
        Ways in words, cheapest first.
    """
    memory = run.settings.memory
    ways: list[tuple[float, str]] = [(1.0, f"memory={_asked(sizes.least)!r}: no more time")]
    if sizes.verb == "influence":
        lists = sizes_of(run, "top_k").least
        if lists <= memory:
            ways.append(
                (
                    1.1,
                    f"top_k(k=10) in place of influence: {size_text(lists)} for lists and a batch, about the same time",
                )
            )
        room = memory - sizes.batch
        if room > 0:
            parts = math.ceil(sizes.result / room)
            if 1 < parts <= sizes.queries:
                each = sizes.queries // parts
                ways.append(
                    (
                        float(parts),
                        f"{each:,} queries at a time, each saved: {parts} passes over the train rows in place of one",
                    )
                )
    for rows in _smaller(sizes, memory):
        # A step costs what 25 more rows would, as benchmarks/batches.py has it for small models.
        cost = (1 + 25 / rows) / (1 + 25 / sizes.rows)
        ways.append((cost, f"batch_size={rows}: about {cost:.1f} times the time"))
    return tuple(text for _, text in sorted(ways, key=lambda way: way[0])[:3])


def _smaller(sizes: Sizes, memory: int) -> list[int]:
    """The largest batch that fits beside the result, where a batch is what is too large."""
    room = memory - sizes.result
    if sizes.rows <= 1 or room <= 0 or sizes.least <= memory:
        return []
    rows = int(room / (sizes.batch / sizes.rows))
    return [1 << (rows.bit_length() - 1)] if rows >= 1 else []


def _asked(need: int) -> str:
    """The need, a tenth more, as one writes it for ``memory``."""
    wanted = need * 1.1
    if wanted > 4 << 30:
        return f"{math.ceil(wanted / (1 << 30))}GiB"
    if wanted > 16 << 20:
        return f"{math.ceil(wanted / (1 << 20))}MiB"
    return f"{math.ceil(wanted / (1 << 10))}KiB"
