"""What lies in the folder of an index: its manifest, its segments of rows, and which shards are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracin.errors import IndexFolderError
from tracin.index.kept.manifest import Manifest, Segment, read_manifest, read_segments
from tracin.index.kept.shards import Unit, read_shard, units
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
        """Names of shards that are missing or damaged, after reading all of them.

        Args:
            show: Show how far that is.

        Returns:
            File names.
        """
        names, wanted = self.storage.names(), self.units()
        found = _damaged(self.storage, self.manifest, wanted, show=show)
        return [unit.name for unit in wanted if unit.name not in names or unit in found]

    def require_whole(self) -> None:
        """Refuse an index of which something was not built yet.

        Raises:
            IndexFolderError: A shard is not there.
        """
        names, wanted = self.storage.names(), self.units()
        gone = [unit for unit in wanted if unit.name not in names]
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
