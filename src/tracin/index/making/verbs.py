"""Building an index and adding rows to it: open, compare with what is there, and hand out what is missing."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tracin.errors import IndexFolderError, OptionError
from tracin.index.kept.contents import Contents, missing
from tracin.index.kept.manifest import read_manifest, read_segments
from tracin.index.kept.storage import Storage
from tracin.index.making.building import Begun, Building, Rows, apart, begin, begin_segment
from tracin.index.making.executors import Executor
from tracin.index.making.tracing import Choices, choices_of, tracing
from tracin.progress import progress

__all__ = ["append", "build"]

Columns = Mapping[str, Any] | None


def build(storage: Storage, rows: Rows, choices: Choices, columns: Columns, executor: Executor) -> None:
    """Make an index of all rows, or what is missing of it.

    Args:
        storage: The folder.
        rows: What is traced.
        choices: Projection, dtype, rows per shard.
        columns: What else to keep of each row.
        executor: Who makes the shards.
    """
    with rows.opened() as (method, train), tracing(method, train, choices.projection) as tracer:
        show = method.settings.progress
        manifest = begin(storage, tracer.manifest(choices))
        segment = begin_segment(storage, tracer, 0, columns)
        begun = Begun(manifest, tuple(read_segments(storage)), segment.start, tracer.rows)
    _finish(storage, rows, begun, executor, show)


def append(contents: Contents, rows: Rows, columns: Columns, executor: Executor) -> None:
    """Add rows behind those of an index, or make what is missing of those that were added last.

    Args:
        contents: The index.
        rows: The method that it was built with, and the new rows.
        columns: The same columns as those of the other rows.
        executor: Who makes the shards.

    Raises:
        OptionError: The columns are others.
    """
    storage = contents.storage
    if set(columns or ()) != set(contents.columns):
        have = ", ".join(sorted(contents.columns)) or "none"
        raise OptionError(f"append: the index has the columns {have}. Give the same.")
    choices = choices_of(contents.manifest)
    with rows.opened() as (method, train), tracing(method, train, choices.projection) as tracer:
        show = method.settings.progress
        now = replace(tracer.manifest(choices), batch_rows=contents.manifest.batch_rows)
        manifest = begin(storage, now)
        last = contents.segments[-1]
        again = last.start > 0 and (last.rows, last.fingerprint) == (tracer.rows, tracer.fingerprint())
        segment = begin_segment(storage, tracer, last.start if again else last.stop, columns)
        begun = Begun(manifest, tuple(read_segments(storage)), segment.start, tracer.rows)
    _finish(storage, rows, begun, executor, show)


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
