"""Building an index and adding rows to it: open, compare with what is there, and hand out what is missing."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tracin.errors import DataError, IndexFolderError, OptionError
from tracin.index.kept.contents import Contents, missing
from tracin.index.kept.manifest import Manifest, Segment, read_manifest, read_segments
from tracin.index.kept.sidecar import sliced
from tracin.index.kept.storage import Storage
from tracin.index.making.building import Begun, Building, Rows, apart, begin, begin_segment, spans
from tracin.index.making.comparing import refuse_other_rows
from tracin.index.making.executors import Executor
from tracin.index.making.tracing import Choices, Tracer, choices_of, tracing
from tracin.progress import progress

__all__ = ["append", "build", "grow"]

Columns = Mapping[str, Any] | None


def build(storage: Storage, rows: Rows, choices: Choices, columns: Columns, executor: Executor) -> None:
    """Make an index of all rows, or what is missing of it: of all segments whose rows are given.

    Args:
        storage: The folder.
        rows: What is traced.
        choices: Projection, dtype, rows per shard.
        columns: What else to keep of each row.
        executor: Who makes the shards.
    """
    with rows.opened() as (method, train), tracing(method, train, choices.projection) as tracer:
        show = method.settings.progress
        sliced(columns, range(tracer.rows), tracer.rows)  # before anything is written
        manifest = begin(storage, tracer.manifest(choices))
        for span in spans(storage, read_segments(storage), tracer.rows):
            begin_segment(storage, tracer, span.start, columns, span)
        begun = Begun(manifest, tuple(read_segments(storage)), 0, tracer.rows)
        _refuse_others(storage, begun, tracer)
    _finish(storage, rows, begun, executor, show)


def append(
    contents: Contents, rows: Rows, columns: Columns, executor: Executor, start: int | None = None
) -> None:
    """Add rows behind those of an index, or make what is missing of a segment that holds these rows.

    Args:
        contents: The index.
        rows: The method that it was built with, and the new rows.
        columns: The same columns as those of the other rows.
        executor: Who makes the shards.
        start: How many rows come before them; found unless given: a segment of the same rows is gone on with, else the rows
            are new.

    Raises:
        OptionError: The columns are others, or no segment begins at ``start``.
    """
    storage = contents.storage
    _refuse_other_columns(contents, columns)
    with _grown(contents, rows) as (tracer, manifest, show):
        segments = read_segments(storage)
        place = _place(segments, tracer, start)
        segment = begin_segment(storage, tracer, place, columns)
        begun = Begun(manifest, tuple(read_segments(storage)), segment.start, tracer.rows)
        if place < segments[-1].stop:
            _refuse_others(storage, begun, tracer, every=start is None)
    _finish(storage, rows, begun, executor, show)


def grow(contents: Contents, rows: Rows, columns: Columns, executor: Executor) -> None:
    """Add what data has gained behind the rows of an index, and make all that is missing of the index.

    Args:
        contents: The index.
        rows: The method that it was built with, and all rows: those of the index, and the new ones behind them.
        columns: The same columns as those of the other rows, one value for each of all rows; read only for the new ones.
        executor: Who makes the shards.

    Raises:
        OptionError: The columns are others, or there are fewer rows than in the index.
    """
    storage = contents.storage
    with _grown(contents, rows) as (tracer, manifest, show):
        segments, n = read_segments(storage), tracer.rows
        have = segments[-1].stop
        if n < have:
            raise OptionError(f"append: {n} rows are given, and the index has {have}. Give them all.")
        for one in segments:
            begin_segment(storage, tracer, one.start, None, range(one.start, one.stop))
        refuse_other_rows(storage, manifest, segments, tracer.source, range(have))
        if n > have:
            _refuse_other_columns(contents, columns)
            begin_segment(storage, tracer, have, columns, range(have, n))
        begun = Begun(manifest, tuple(read_segments(storage)), 0, n)
    _finish(storage, rows, begun, executor, show)


@contextmanager
def _grown(contents: Contents, rows: Rows) -> Iterator[tuple[Tracer, Manifest, bool]]:
    """The rows opened, by a method that is the index's."""
    choices = choices_of(contents.manifest)
    with rows.opened() as (method, train), tracing(method, train, choices.projection) as tracer:
        yield tracer, begin(contents.storage, tracer.manifest(choices)), method.settings.progress


def _refuse_other_columns(contents: Contents, columns: Columns) -> None:
    if set(columns or ()) != set(contents.columns):
        have = ", ".join(sorted(contents.columns)) or "none"
        raise OptionError(f"append: the index has the columns {have}. Give the same.")


def _place(segments: Sequence[Segment], tracer: Tracer, start: int | None) -> int:
    """The id of the first row that is appended: that of a segment of the same rows, or the one after the last."""
    stop = segments[-1].stop
    if start is None:
        own = (tracer.rows, tracer.fingerprint(range(tracer.rows)))
        same = [one.start for one in segments if own[1] is not None and (one.rows, one.fingerprint) == own]
        return same[-1] if same else stop
    starts = [one.start for one in segments]
    if isinstance(start, bool) or not isinstance(start, int) or start not in (*starts, stop):
        raise OptionError(
            f"append: start is {start!r}. Give the number of rows before the new ones, {stop}, to add them; or the first row of "
            f"a segment, to go on with it: {', '.join(map(str, starts))}."
        )
    return start


def _refuse_others(storage: Storage, begun: Begun, tracer: Tracer, *, every: bool = False) -> None:
    """Compare the rows at hand with the shards that are there: all of them where that is cheap or ``every`` is set."""
    if every or not tracer.source.decodes:
        own = range(begun.offset, begun.offset + begun.rows)
        try:
            refuse_other_rows(storage, begun.manifest, begun.segments, tracer.source, own, begun.offset)
        except DataError as cause:
            if not every:
                raise
            raise DataError(
                f"{cause} They look like rows {own.start} to {own.stop - 1} of the index: give start={begun.segments[-1].stop} "
                "to add them as new ones."
            ) from cause


def _finish(storage: Storage, rows: Rows, begun: Begun, executor: Executor, show: bool) -> None:
    """Make what is missing of the rows at hand."""
    others = storage.sweep()
    wanted = missing(storage, begun.manifest, begun.units(), show=show)
    if others:
        wanted = apart(wanted, secrets.randbits(32))
    if wanted:
        total = sum(unit.rows for unit in wanted)
        with progress("index", total, show=show) as bar:
            work = Building(storage, begun, rows)
            executor.run(work, wanted, lambda at, _: bar.advance(wanted[at].rows))
    if read_manifest(storage).digest != begun.manifest.digest:
        raise IndexFolderError(
            f"{storage.where}: another build replaced the manifest. Build into a folder of its own."
        )
