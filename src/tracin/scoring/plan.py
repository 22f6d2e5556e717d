"""What a run will cost, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

from tracin.scoring.memory import size_text
from tracin.scoring.routes import Route

__all__ = ["Plan", "Route"]


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
