"""Building an index: a list of units, each made once, by any number of writers.

The manifest and the segment are created first, or compared with those that are there. What is missing, cut short or
damaged is then made; what is whole stays. So the same command, run again, goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from tracin.errors import IndexFolderError
from tracin.gradients.projection import Projection
from tracin.index.kept.manifest import MANIFEST, Manifest, Segment, read_manifest, read_segments
from tracin.index.kept.shards import Unit, encoded, first_row, units
from tracin.index.kept.sidecar import (
    refuse_other_types,
    same_table,
    sidecar_digest,
    sidecar_whole,
    sliced,
    table_bytes,
)
from tracin.index.kept.storage import Storage
from tracin.index.making.comparing import known_checksums
from tracin.index.making.tracing import Tracer, tracing
from tracin.methods.tracin_cp import TracInCP

__all__ = ["Begun", "Building", "InMemory", "Rows", "apart", "begin", "begin_segment", "spans"]


@dataclass(frozen=True)
class Begun:
    """An index that has its manifest, and the rows of the data at hand among its segments.

    Attributes:
        manifest: The configuration.
        segments: All rows of the index.
        offset: The id of the first row of the data at hand.
        rows: Rows of the data at hand.
    """

    manifest: Manifest
    segments: tuple[Segment, ...]
    offset: int
    rows: int

    def units(self) -> list[Unit]:
        """The pieces of work that the data at hand is enough for."""
        stop = self.offset + self.rows
        return [
            unit
            for unit in units(self.manifest, self.segments)
            if self.offset <= unit.start and unit.stop <= stop
        ]


def begin(storage: Storage, manifest: Manifest) -> Manifest:
    """Write the manifest, or compare it with the one that is there.

    Args:
        storage: The index's folder.
        manifest: What this build would write.

    Returns:
        The manifest in the folder.

    Raises:
        IndexFolderError: The folder holds another index; the differences are named.
    """
    # A whole index is only read, so that it may lie where nothing can be written.
    if not storage.has(MANIFEST) and storage.create(MANIFEST, manifest.to_bytes()):
        return manifest
    there = read_manifest(storage)
    differences = there.differences(manifest)
    if differences:
        raise IndexFolderError(
            f"{storage.where} holds an index that was built otherwise: {'; '.join(differences)}. Build with the same choices, or "
            "into another folder."
        )
    return there


def spans(storage: Storage, segments: Sequence[Segment], n: int) -> list[range]:
    """The segments of n rows from the first row of an index on.

    Args:
        storage: The index's folder.
        segments: Its segments.
        n: Rows at hand.

    Returns:
        Rows of each segment; all n where there is at most one segment.

    Raises:
        IndexFolderError: The rows end within a segment, or behind the last one.
    """
    if len(segments) <= 1:
        return [range(n)]
    covered = [range(one.start, one.stop) for one in segments if one.stop <= n]
    if not covered or covered[-1].stop != n:
        told = " + ".join(str(one.rows) for one in segments)
        raise IndexFolderError(
            f"{storage.where} was begun with {segments[-1].stop} rows ({told}), and {n} are given. Give the same rows: all, or "
            "those of the first segments; new ones are added by index append."
        )
    return covered


def begin_segment(
    storage: Storage, tracer: Tracer, start: int, columns: Mapping[str, Any] | None, rows: range | None = None
) -> Segment:
    """Enter rows from id ``start`` on, or compare them with those that are there.

    Args:
        storage: The index's folder.
        tracer: The opened rows.
        start: The id of the first row that is entered.
        columns: The sidecar's columns, one value for each row at hand.
        rows: Which of the rows at hand; all unless given.

    Returns:
        The segment.

    Raises:
        IndexFolderError: Other rows were entered there.
        OptionError: A column has another length, or another type than in the rows before.
    """
    rows = range(tracer.rows) if rows is None else rows
    own = sliced(columns, rows, tracer.rows) or {}
    there, before = _entered(storage, start)
    if there is not None and set(there.columns) == set(own):
        own = {name: own[name] for name in there.columns}
    segment = Segment(start, len(rows), tracer.fingerprint(rows), tuple(own))
    table = table_bytes(own, segment) if own else None
    if table is not None:
        segment = replace(segment, sidecar_digest=sidecar_digest(table))
    if there is None:
        if table is not None:
            refuse_other_types(storage, before, table)
            storage.write(segment.sidecar, table)
        if storage.create(segment.name, segment.to_bytes()):
            return segment
        there, _ = _entered(storage, start)
    if there is None:
        raise IndexFolderError(
            f"{storage.where}/{segment.name} was removed meanwhile. Run the command again."
        )
    told = _difference(storage, there, segment)
    if told is None:
        return _with_sidecar(storage, there, table)
    if not _has_shards(storage, start):
        if table is not None:
            refuse_other_types(storage, before, table)
        _replace(storage, there, segment, table)
        return segment
    raise IndexFolderError(told)


def _entered(storage: Storage, start: int) -> tuple[Segment | None, list[Segment]]:
    """The segment that begins there, and those before."""
    found = read_segments(storage)
    there = next((one for one in found if one.start == start), None)
    return there, [one for one in found if one.start < start]


def _difference(storage: Storage, there: Segment, segment: Segment) -> str | None:
    """What is wrong with rows that should be those of a segment; None: nothing."""
    if there.rows != segment.rows:
        return (
            f"{storage.where} was begun with {there.rows} rows, and {segment.rows} are given. Give the same rows; new ones are "
            "added by index append."
        )
    if there.fingerprint != segment.fingerprint:
        return (
            f"{storage.where} was begun with other rows: their content has changed. Give the same rows, or build into another "
            "folder."
        )
    if segment.columns and set(there.columns) != set(segment.columns):
        return (
            f"{storage.where} was begun with the columns {', '.join(there.columns) or 'none'}, and {', '.join(segment.columns)} "
            "are given. Give the same columns."
        )
    return None


def _with_sidecar(storage: Storage, there: Segment, table: bytes | None) -> Segment:
    """Compare the columns; a damaged file of them is made anew."""
    if table is None:
        return there
    told = "Give the same values, or build into another folder."
    if not sidecar_whole(storage, there):
        if sidecar_digest(table) != there.sidecar_digest:
            raise IndexFolderError(
                f"{storage.where}/{there.sidecar} is damaged, and the columns that are given are not those that were kept. {told}"
            )
        storage.write(there.sidecar, table)
    elif not same_table(storage, there, table):
        raise IndexFolderError(f"{storage.where} was begun with other values in its columns. {told}")
    return there


def _has_shards(storage: Storage, start: int) -> bool:
    """Whether there is a shard of a row from this one on: what was begun, and may not be replaced."""
    starts = [first_row(name) for name in storage.names()]
    return any(one is not None and one >= start for one in starts)


def _replace(storage: Storage, there: Segment, segment: Segment, table: bytes | None) -> None:
    """Enter other rows in place of some that have no shard, such as those of a build that failed at once."""
    later = [one.name for one in read_segments(storage) if one.start > there.start]
    if later:
        raise IndexFolderError(
            f"{storage.where}/{there.name} holds other rows, and {later[0]} comes behind it. Remove the segments from the last "
            "one on, or build into another folder."
        )
    if table is not None:
        storage.write(segment.sidecar, table)
    storage.write(segment.name, segment.to_bytes())
    if table is None and there.columns:
        storage.remove(there.sidecar)


@runtime_checkable
class Rows(Protocol):
    """The method and the rows of an index, for the process that makes shards."""

    def opened(self) -> AbstractContextManager[tuple[TracInCP, Any]]:
        """Bring them, for as long as the block lasts."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A method and rows that this process has; another one gets them as a copy.

    Attributes:
        method: Task, checkpoints, settings.
        train: The rows.
    """

    method: TracInCP
    train: Any

    @contextmanager
    def opened(self) -> Iterator[tuple[TracInCP, Any]]:
        """Bring them.

        Yields:
            The method and the rows.
        """
        yield self.method, self.train


@dataclass(frozen=True)
class Building:
    """The work of making shards.

    Attributes:
        storage: The index's folder.
        begun: The index.
        rows: What is traced.
    """

    storage: Storage
    begun: Begun
    rows: Rows

    @contextmanager
    def opened(self) -> Iterator[Callable[[Unit], None]]:
        """Open the model and the rows, and check a batch.

        Yields:
            What makes the shard of a unit, unless another writer has made it meanwhile.
        """
        projection = Projection(**self.begun.manifest.projection)
        with (
            self.rows.opened() as (method, train),
            tracing(method, train, projection) as tracer,
        ):
            tracer.prepare(self.begun.manifest)
            yield partial(_make, self.storage, self.begun, tracer)


def _make(storage: Storage, begun: Begun, tracer: Tracer, unit: Unit) -> None:
    if storage.has(unit.name):
        return
    known = known_checksums(storage, begun.manifest, unit)
    shard = tracer.shard(unit, begun.offset, begun.manifest, known)
    storage.write(unit.name, encoded(shard, unit, begun.manifest))


def apart(wanted: Sequence[Unit], seed: int) -> list[Unit]:
    """The units from another beginning on, for a writer that is not the only one.

    Args:
        wanted: The units in order.
        seed: Which beginning.

    Returns:
        All of them.
    """
    at = seed % max(len(wanted), 1)
    return [*wanted[at:], *wanted[:at]]
