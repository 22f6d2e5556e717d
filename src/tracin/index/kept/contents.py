"""What lies in the folder of an index: its manifest, its segments of rows, and which shards are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracin.errors import IndexFolderError
from tracin.index.kept.manifest import Manifest, Segment, read_manifest, read_segments, segment_name
from tracin.index.kept.shards import Unit, first_row, read_shard, units
from tracin.index.kept.sidecar import sidecar_whole
from tracin.index.kept.storage import Storage
from tracin.progress import progress

__all__ = ["Contents", "Info", "contents_of", "missing"]


@dataclass(frozen=True)
class Info:
    """What is inside an index.

    Attributes:
        manifest: The configuration.
        rows: Rows.
        shards: Shards that are there.
        wanted: Shards of the whole index.
        nbytes: Bytes of all files.
        columns: The sidecar's columns.
    """

    manifest: Manifest
    rows: int
    shards: int
    wanted: int
    nbytes: int
    columns: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every shard is there."""
        return self.shards == self.wanted > 0


@dataclass(frozen=True)
class Contents:
    """An index on disk.

    Attributes:
        storage: Its folder.
        manifest: Its configuration.
        segments: Its rows.
    """

    storage: Storage
    manifest: Manifest
    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        """How many rows it has, or will have when it is whole."""
        return self.segments[-1].stop if self.segments else 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The sidecar's columns."""
        return self.segments[0].columns if self.segments else ()

    def units(self) -> list[Unit]:
        """All shards, checkpoint by checkpoint."""
        return units(self.manifest, self.segments)

    def info(self) -> Info:
        """Counts and bytes."""
        names, wanted = self.storage.names(), self.units()
        return Info(
            manifest=self.manifest,
            rows=self.rows,
            shards=sum(unit.name in names for unit in wanted),
            wanted=len(wanted),
            nbytes=sum(self.storage.size(name) for name in names),
            columns=self.columns,
        )

    def broken(self, *, show: bool) -> list[str]:
        """Names of files that are missing or damaged, after reading all of them.

        Args:
            show: Show how far that is.

        Returns:
            File names: shards, columns, and the segment of rows of which there is nothing but shards.
        """
        names, wanted = self.storage.names(), self.units()
        found = set(_damaged(self.storage, self.manifest, wanted, show=show))
        shards = [unit.name for unit in wanted if unit.name not in names or unit in found]
        columns = [one.sidecar for one in self.segments if not sidecar_whole(self.storage, one)]
        gone = self._lost_segment(names)
        return [*([] if gone is None else [gone]), *columns, *shards]

    def _lost_segment(self, names: set[str]) -> str | None:
        """The segment that is not there: the first, or that of shards behind the last row."""
        if not self.segments:
            return segment_name(0)
        starts = [start for name in names if (start := first_row(name)) is not None]
        if not any(start >= self.rows for start in starts):
            return None
        # Another process may have appended rows since this one looked.
        stop = read_segments(self.storage)[-1].stop
        behind = [start for start in starts if start >= stop]
        return segment_name(stop) if behind else None

    def require_whole(self) -> None:
        """Refuse an index of which something was not built yet.

        Raises:
            IndexFolderError: A shard is not there.
        """
        names, wanted = self.storage.names(), self.units()
        gone = [unit for unit in wanted if unit.name not in names]
        lost = self._lost_segment(names)
        if wanted and lost is not None:
            raise IndexFolderError(
                f"{self.storage.where} is not whole: there are shards of rows whose segment is missing. Restore {lost}, or "
                "append these rows again."
            )
        if gone or not wanted:
            told = "it has no rows"
            if gone:
                told = f"{len(gone)} of {len(wanted)} shards are missing, {gone[0].name} first"
            raise IndexFolderError(
                f"{self.storage.where} is not whole: {told}. Run index build again with the same command: it goes on where it "
                "stopped."
            )


def contents_of(storage: Storage) -> Contents:
    """Read manifest and segments.

    Args:
        storage: The folder.

    Returns:
        The index.

    Raises:
        IndexFolderError: There is none, or it is damaged, or of another version.
    """
    return Contents(storage, read_manifest(storage), tuple(read_segments(storage)))


def _damaged(storage: Storage, manifest: Manifest, wanted: Sequence[Unit], *, show: bool) -> list[Unit]:
    """Of the units whose shards are there, those whose shards are not whole.

    Args:
        storage: The index's folder.
        manifest: Its manifest.
        wanted: The units.
        show: Show how far the check is.

    Returns:
        The units, in order.
    """
    names = storage.names()
    there = [unit for unit in wanted if unit.name in names]
    broken = []
    with progress("check shards", sum(unit.rows for unit in there), show=show and bool(there)) as bar:
        for unit in there:
            try:
                read_shard(storage, unit, manifest)
            except IndexFolderError:
                broken.append(unit)
            bar.advance(unit.rows)
    return broken


def missing(storage: Storage, manifest: Manifest, wanted: Sequence[Unit], *, show: bool) -> list[Unit]:
    """The units whose shards must be made; a damaged one is removed first, so that a listing says what is whole.

    Args:
        storage: The index's folder.
        manifest: Its manifest.
        wanted: The units.
        show: Show how far the check is.

    Returns:
        What must be made, in order.
    """
    for unit in _damaged(storage, manifest, wanted, show=show):
        storage.remove(unit.name)
    names = storage.names()
    return [unit for unit in wanted if unit.name not in names]
