"""Building an index: a list of units, each made once, by any number of writers.

The manifest and the segment are created first, or compared with those that are there. What is missing, cut short or
damaged is then made; what is whole stays. So the same command, run again, goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tracin.errors import IndexFolderError
from tracin.gradients.projection import Projection
from tracin.index.kept.manifest import MANIFEST, Manifest, Segment, read_manifest, read_segments
from tracin.index.kept.shards import Unit, encoded, read_checksums, units
from tracin.index.kept.sidecar import same_table, table_bytes
from tracin.index.kept.storage import Storage
from tracin.index.making.tracing import Tracer, tracing
from tracin.methods.tracin_cp import TracInCP

__all__ = ["Begun", "Building", "InMemory", "Rows", "apart", "begin", "begin_segment"]


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
    if storage.create(MANIFEST, manifest.to_bytes()):
        return manifest
    there = read_manifest(storage)
    differences = there.differences(manifest)
    if differences:
        raise IndexFolderError(
            f"{storage.where} holds an index that was built otherwise: {'; '.join(differences)}. Build with the same choices, or "
            "into another folder."
        )
    return there


def begin_segment(storage: Storage, tracer: Tracer, start: int, columns: Mapping[str, Any] | None) -> Segment:
    """Enter the rows at hand from id ``start`` on, or compare them with those that are there.

    Args:
        storage: The index's folder.
        tracer: The opened rows.
        start: The id of the first one.
        columns: The sidecar's columns, one value per row.

    Returns:
        The segment.

    Raises:
        IndexFolderError: Other rows were entered there.
        OptionError: A column has another length.
    """
    names = tuple(columns or ())
    segment = Segment(start, tracer.rows, tracer.fingerprint(), names)
    table = table_bytes(columns, segment) if columns else None
    if table is not None and not storage.has(segment.name):
        storage.write(segment.sidecar, table)
    if storage.create(segment.name, segment.to_bytes()):
        return segment
    there = next(found for found in read_segments(storage) if found.start == start)
    if there.rows != segment.rows:
        raise IndexFolderError(
            f"{storage.where} was begun with {there.rows} rows, and {segment.rows} are given. Give the same rows; new ones are "
            "added by index append."
        )
    if there.fingerprint != segment.fingerprint:
        raise IndexFolderError(
            f"{storage.where} was begun with other rows: their content has changed. Give the same rows, or build into another "
            "folder."
        )
    if columns and set(there.columns) != set(names):
        raise IndexFolderError(
            f"{storage.where} was begun with the columns {', '.join(there.columns) or 'none'}, and {', '.join(names)} are given. "
            "Give the same columns."
        )
    if table is not None and not same_table(storage, there, table):
        raise IndexFolderError(
            f"{storage.where} was begun with other values in its columns. Give the same values, or build into another folder."
        )
    return there


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
    known = _known_checksums(storage, begun.manifest, unit)
    shard = tracer.shard(unit, begun.offset, begun.manifest, known)
    storage.write(unit.name, encoded(shard, unit, begun.manifest))


def _known_checksums(storage: Storage, manifest: Manifest, unit: Unit) -> Tensor | None:
    """The checksums of the same rows in the shard of the first checkpoint, where it is there and whole."""
    first = Unit(0, unit.start, unit.stop)
    if unit.checkpoint == 0 or not storage.has(first.name):
        return None
    try:
        return read_checksums(storage, first, manifest)
    except IndexFolderError:
        return None


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
