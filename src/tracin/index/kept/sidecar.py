"""What the user wants to know of each row beside its gradients: columns in a Parquet file, and filters on them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tracin.errors import IndexFolderError, MissingExtraError, OptionError
from tracin.index.kept.manifest import Segment
from tracin.index.kept.storage import Storage

__all__ = ["ROW", "columns_of", "same_table", "selected_rows", "table_bytes"]

# The column of row ids, which every sidecar has.
ROW = "row"


def _arrow(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as cause:
        raise MissingExtraError("an index's columns need pyarrow: pip install 'tracin[index]'") from cause


def table_bytes(columns: Mapping[str, Any], segment: Segment) -> bytes:
    """The sidecar of a segment.

    Args:
        columns: One value per row: lists, arrays or tensors of numbers, texts, booleans.
        segment: Its rows.

    Returns:
        A Parquet file.

    Raises:
        OptionError: A column has another length, a name of ours, or values that Parquet cannot hold.
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    arrays = {ROW: arrow.array(range(segment.start, segment.stop), arrow.int64())}
    for name, values in columns.items():
        if name == ROW or not isinstance(name, str) or not name:
            raise OptionError(
                f"columns: {name!r} cannot be a column's name. {ROW!r} holds the row ids already."
            )
        values = values.tolist() if isinstance(values, Tensor) else values
        if len(values) != segment.rows:
            raise OptionError(
                f"columns: {name!r} has {len(values)} values for {segment.rows} rows. Give one for each."
            )
        try:
            arrays[name] = arrow.array(values)
        except (arrow.ArrowException, TypeError, ValueError) as cause:
            raise OptionError(
                f"columns: {name!r} cannot be kept ({cause}). Give numbers, texts or booleans of one type."
            ) from cause
    out = io.BytesIO()
    parquet.write_table(arrow.table(arrays), out)
    return out.getvalue()


def columns_of(storage: Storage, segments: Sequence[Segment], names: Sequence[str] | None = None) -> Any:
    """The sidecars of all segments as one table.

    Args:
        storage: The index's folder.
        segments: Its segments.
        names: Columns; all unless given.

    Returns:
        A ``pyarrow.Table``, with the column ``row``.

    Raises:
        OptionError: There is no such column.
        IndexFolderError: A sidecar is missing or damaged.
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    known = [name for name in segments[0].columns if all(name in s.columns for s in segments)]
    wanted = known if names is None else [name for name in names if name != ROW]
    for name in wanted:
        if name not in known:
            have = ", ".join(known) or "none: build it with columns="
            raise OptionError(f"the index has no column {name!r}. It has {have}.")
    if not wanted:
        return arrow.table({ROW: arrow.array(range(segments[-1].stop), arrow.int64())})
    tables = []
    for segment in segments:
        try:
            content = io.BytesIO(storage.read(segment.sidecar))
            table = parquet.read_table(content, columns=[ROW, *wanted])
        except (arrow.ArrowException, OSError) as cause:
            raise IndexFolderError(
                f"{storage.where}/{segment.sidecar} is damaged ({cause}). Restore it, or build the index again."
            ) from cause
        if table.num_rows != segment.rows:
            raise IndexFolderError(
                f"{storage.where}/{segment.sidecar} has {table.num_rows} rows for {segment.rows}. Restore it, or build the index "
                "again."
            )
        tables.append(table)
    return arrow.concat_tables(tables, promote_options="permissive")


def same_table(storage: Storage, segment: Segment, content: bytes) -> bool:
    """Whether a segment's sidecar holds the same values as another one.

    Args:
        storage: The index's folder.
        segment: The segment.
        content: The other sidecar, as ``table_bytes`` makes it.

    Returns:
        Whether columns, types and values agree, in any order of the columns.
    """
    other = _arrow("pyarrow.parquet").read_table(io.BytesIO(content))
    mine = columns_of(storage, [segment], segment.columns)
    return bool(mine.select(sorted(mine.column_names)).equals(other.select(sorted(other.column_names))))


def selected_rows(storage: Storage, segments: Sequence[Segment], where: Any) -> Tensor:
    """The rows that a filter keeps, bool [n].

    Args:
        storage: The index's folder.
        segments: Its segments.
        where: ``{"label": 3, "split": ["a", "b"]}``: every column has the value, or one of the values; or an expression of
            ``pyarrow.compute``, such as ``pc.field("length") > 100``.

    Returns:
        Which rows are kept.

    Raises:
        OptionError: There is no such column, a value is of another type, or no row is left.
    """
    n = segments[-1].stop
    arrow, compute = _arrow("pyarrow"), _arrow("pyarrow.compute")
    if isinstance(where, Mapping):
        table = columns_of(storage, segments, list(where))
        expression = None
        for name, value in where.items():
            values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
            part = compute.field(name).isin(values)
            expression = part if expression is None else expression & part
    elif isinstance(where, compute.Expression):
        table, expression = columns_of(storage, segments), where
    else:
        raise OptionError(
            f"where is a {type(where).__name__}. Give {{'column': value}} or an expression of pyarrow.compute."
        )
    try:
        kept = table if expression is None else table.filter(expression)
    except arrow.ArrowException as cause:
        raise OptionError(
            f"where cannot be applied: {cause}. Columns: {', '.join(table.column_names)}."
        ) from cause
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.from_numpy(kept.column(ROW).to_numpy().copy())] = True
    if not bool(mask.any()):
        raise OptionError(f"where leaves no row of {n}. Columns: {', '.join(table.column_names)}.")
    return mask
