"""What a run will hold, by its sizes alone, and the refusal of one that cannot fit in ``memory=``.

``memory`` bounds what a run holds beside the model, the data and the imports: the scores that it returns, the queries'
gradients, tiles of scores, and the tensors of one batch. Queries are held in tiles that fit, so what cannot shrink is

    result   q·n numbers                                 (influence)
             4·q·k numbers of lists                      (top_k)
             n numbers                                   (self_influence)
             g·n numbers                                 (aggregate, for g groups)
    batch    what the graph keeps of a row, and its gradients that no rule keeps as factors · the rows of the largest batch

Batches whose size was left to us are shortened to what the result leaves, so that only a row has to fit beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tracin.errors import MemoryLimitError
from tracin.scoring.memory import size_text
from tracin.scoring.run import Run

__all__ = [
    "VERBS",
    "Sizes",
    "query_budget",
    "refuse_too_large",
    "shorten_batches",
    "sizes_of",
    "ways_to_fit",
]

VERBS = ("influence", "top_k", "self_influence", "aggregate")


@dataclass(frozen=True)
class Sizes:
    """What a verb holds at the least, in bytes: its result, and one batch.

    Attributes:
        verb: The verb.
        result: Bytes of what it returns.
        batch: Bytes of the largest batch.
        columns: Queries, or groups of them.
        n: Train rows.
        rows: Rows of the largest batch.
        k: List length of ``top_k``.
    """

    verb: str
    result: int
    batch: int
    columns: int
    n: int
    rows: int
    k: int

    @property
    def least(self) -> int:
        """What cannot shrink."""
        return self.result + self.batch

    @property
    def told(self) -> str:
        """The result in words."""
        return {
            "influence": f"the scores of {self.columns:,} queries × {self.n:,} train rows",
            "top_k": f"two lists of {self.k:,} rows for each of {self.columns:,} queries",
            "self_influence": f"the scores of {self.n:,} train rows",
            "aggregate": f"the scores of {self.columns:,} groups × {self.n:,} train rows",
        }[self.verb]


def sizes_of(run: Run, verb: str, k: int = 10, groups: int = 0) -> Sizes:
    """The sizes of a run whose sources are wired.

    Args:
        run: The run, at its first checkpoint.
        verb: One of ``VERBS``.
        k: List length of ``top_k``.
        groups: Groups of ``aggregate``.

    Returns:
        The sizes.
    """
    n, m = len(run.train.rows), 0 if run.queries is None else len(run.queries.rows)
    item = run.dtype.itemsize
    result = {
        "influence": m * n * item,
        "top_k": 2 * m * k * (item + 8),
        "self_influence": n * item,
        "aggregate": groups * n * item,
    }
    batches = [(source.wiring.row_bytes, max(source.rows.sizes)) for source in run.sources()]
    batch, rows = max((each * rows, rows) for each, rows in batches)
    return Sizes(verb, result[verb], batch, groups if verb == "aggregate" else m, n, rows, k)


def shorten_batches(run: Run, sizes: Sizes) -> None:
    """Where the result leaves less than a batch takes, batch the rows in half of what it leaves, if that is up to us.

    Args:
        run: A run at its first checkpoint, before its first batch.
        sizes: Its sizes.
    """
    room = run.settings.memory - sizes.result
    for source in run.sources():
        each = source.wiring.row_bytes
        if each and each <= room < each * max(source.rows.sizes):
            rows = max(1, room // 2 // each)
            source.rows.resize(min(rows, source.rows.sizes[0]), rows)


def query_budget(run: Run, verb: str, k: int = 10, groups: int = 0) -> int:
    """Bytes for one tile of held queries: half of the memory, or what the rest of the run leaves of it.

    Args:
        run: A run at its first checkpoint.
        verb: One of ``VERBS``.
        k: List length of ``top_k``.
        groups: Groups of ``aggregate``.

    Returns:
        The bytes; a tile holds at least one batch, or one group.
    """
    memory = run.settings.memory
    return max(0, min(memory // 2, memory - sizes_of(run, verb, k, groups).least))


def refuse_too_large(run: Run, verb: str, k: int = 10, groups: int = 0) -> None:
    """Refuse a run that cannot fit, before it computes or holds anything.

    Args:
        run: A run at its first checkpoint, before its first batch; its batches may be shortened.
        verb: One of ``VERBS``.
        k: List length of ``top_k``.
        groups: Groups of ``aggregate``.

    Raises:
        MemoryLimitError: It holds more than ``memory`` whatever the tiles; the message says what would fit, and at what cost.
    """
    memory = run.settings.memory
    shorten_batches(run, sizes_of(run, verb, k, groups))
    sizes = sizes_of(run, verb, k, groups)
    if sizes.least <= memory:
        return
    what = (
        f"{sizes.told} take {size_text(sizes.result)}"
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
    room = (memory - sizes.batch) // 2  # the other half holds gradients
    if sizes.verb == "influence":
        lists = sizes_of(run, "top_k").least
        if lists <= memory:
            ways.append(
                (
                    1.1,
                    f"top_k(k=10) in place of influence: {size_text(lists)} for lists and a batch, about the same time",
                )
            )
    if sizes.verb == "top_k" and 0 < sizes.result // sizes.k <= room:
        ways.append((1.0, f"k={room // (sizes.result // sizes.k)}: shorter lists, no more time"))
    if sizes.verb in ("influence", "aggregate") and room > 0:
        parts = math.ceil(sizes.result / room)
        if 1 < parts <= sizes.columns:
            each, what = sizes.columns // parts, "queries" if sizes.verb == "influence" else "groups"
            told = (
                f"{each:,} {what} at a time, each saved: {parts} passes over the train rows in place of one"
            )
            ways.append((float(parts), told))
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
