"""Decoded batches that stay in memory for the checkpoints after, within a share of the memory allowed."""

from __future__ import annotations

from tracin.data import Batch, value_bytes

__all__ = ["ALL_QUERIES", "ALL_ROWS", "PARAMETERS", "Kept"]

# Shares of the memory allowed, as divisors: all decoded train rows, all decoded queries, and the parameters of all
# checkpoints.
ALL_ROWS, ALL_QUERIES, PARAMETERS = 4, 16, 8


class Kept:
    """The decoded batches of a source, for the passes after; given up as a whole if they outgrow the limit.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._batches: dict[range, Batch] = {}

    def expected(self, needed: int) -> int:
        """Bytes that are held at the most where all batches need so many: they are given up when they outgrow the limit."""
        return min(needed, self._limit)

    def offer(self, batch: Batch) -> bool:
        """Keep a batch, if its size can be told and all fit.

        Args:
            batch: A batch of consecutive rows.

        Returns:
            Whether it is kept.
        """
        place = range(batch.start, batch.start + batch.size)
        if self._limit and place not in self._batches:
            size = value_bytes(batch.value)
            self._used += size or 0
            self._batches[place] = batch
            if self._used > self._limit or size is None:
                self.give_up()
        return place in self._batches

    def give_up(self) -> None:
        """Forget all, and keep nothing from here on."""
        self._limit = 0
        self._batches.clear()

    def holds(self, batch: Batch) -> bool:
        """Whether this batch is kept, so that its content must not be written into."""
        return range(batch.start, batch.start + batch.size) in self._batches

    def all_of(self, places: list[range]) -> list[Batch] | None:
        """These batches, or None unless all are kept."""
        found = [self._batches[place] for place in places if place in self._batches]
        return found if len(found) == len(places) else None
