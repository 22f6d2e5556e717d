"""Are the rows at hand those that an index was made of? Every shard holds a checksum of each of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from tracin.checksums import row_checksums, same_checksums
from tracin.data import Batch, RowSource
from tracin.errors import DataError, IndexFolderError
from tracin.index.kept.manifest import Manifest, Segment
from tracin.index.kept.shards import Unit, read_checksums, units
from tracin.index.kept.storage import Storage

__all__ = ["known_checksums", "refuse_other_length", "refuse_other_rows"]


def refuse_other_length(storage: Storage, segments: Sequence[Segment], n: int) -> None:
    """Refuse train rows of another number than an index has.

    Args:
        storage: The index's folder.
        segments: Its rows.
        n: Rows at hand.

    Raises:
        DataError: They are more or fewer.
    """
    have = segments[-1].stop if segments else 0
    if n != have:
        raise DataError(
            f"train has {n} rows, and the index {storage.where} {have}. Give the rows that it was made of, in the same order; "
            "new ones are added by append."
        )


def refuse_other_rows(
    storage: Storage,
    manifest: Manifest,
    segments: Sequence[Segment],
    source: RowSource,
    wanted: Sequence[int],
    offset: int = 0,
) -> None:
    """Compare the content of rows with that of which an index was made; shards that are not whole tell nothing.

    Args:
        storage: The index's folder.
        manifest: Its manifest.
        segments: Its rows.
        source: The data.
        wanted: Ids of rows of the index, increasing.
        offset: The id of the data's first row.

    Raises:
        DataError: A row is another one; it is named.
    """
    for unit, rows in _by_unit(manifest, segments, wanted):
        kept = known_checksums(storage, manifest, unit)
        if kept is None:
            continue
        for at in range(0, len(rows), manifest.batch_rows):
            _compare(storage, manifest, source, (unit, kept), rows[at : at + manifest.batch_rows], offset)


def known_checksums(storage: Storage, manifest: Manifest, unit: Unit) -> Tensor | None:
    """The checksums of a unit's rows, from the first shard of these rows that is there and whole.

    Args:
        storage: The index's folder.
        manifest: Its manifest.
        unit: The rows, at any checkpoint.

    Returns:
        One number per row; None where no shard tells.
    """
    for checkpoint in range(len(manifest.checkpoints)):
        place = replace(unit, checkpoint=checkpoint)
        if storage.has(place.name):
            with suppress(IndexFolderError):
                return read_checksums(storage, place, manifest)
    return None


def _by_unit(
    manifest: Manifest, segments: Sequence[Segment], wanted: Sequence[int]
) -> Iterator[tuple[Unit, list[int]]]:
    pieces = iter([unit for unit in units(manifest, segments) if unit.checkpoint == 0])
    unit = next(pieces, None)

    def piece(row: int) -> Unit:
        nonlocal unit
        while unit is not None and row >= unit.stop:
            unit = next(pieces, None)
        if unit is None:
            raise IndexError(row)
        return unit

    for found, rows in groupby(wanted, piece):
        yield found, list(rows)


def _compare(
    storage: Storage,
    manifest: Manifest,
    source: RowSource,
    kept: tuple[Unit, Tensor],
    rows: Sequence[int],
    offset: int,
) -> None:
    unit, sums = kept
    found = _sums(source, rows, offset)
    if found is None:
        return
    same = same_checksums(found, sums[[row - unit.start for row in rows]])
    for row in (row for row, good in zip(rows, same.tolist(), strict=True) if not good):
        # What a collate function pads depends on the batch: only the batch of the build decides.
        start = row - (row - unit.start) % manifest.batch_rows
        batch = range(start, min(start + manifest.batch_rows, unit.stop))
        if batch.start >= offset and batch.stop - offset <= len(source):
            again = _sums(source, batch, offset)
            if again is not None and bool(same_checksums(again[row - start], sums[row - unit.start]).all()):
                continue
        raise DataError(
            f"{source.name}: row {row - offset} is not the row that the index {storage.where} was made of. Give the same rows "
            "in the same order, or build an index of these."
        )


def _sums(source: RowSource, rows: Sequence[int], offset: int) -> Tensor | None:
    places = [row - offset for row in rows]
    return row_checksums(Batch(places, source.take(places)), double=True)
