"""What the user wants to know of each row beside its gradients: columns in a Parquet file, and filters on them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tracin.errors import IndexFolderError, MissingExtraError, OptionError
from tracin.index.kept.manifest import Segment
from tracin.index.kept.storage import Storage

__all__ = [
    "ROW",
    "columns_of",
    "refuse_other_types",
    "same_table",
    "selected_rows",
    "sidecar_digest",
    "sidecar_whole",
    "sliced",
    "table_bytes",
]

# The column of row ids, which every sidecar has.
ROW = "row"


def _arrow(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as cause:
        raise MissingExtraError("an index's columns need pyarrow: pip install 'tracin[index]'") from cause


def sliced(columns: Mapping[str, Any] | None, rows: range, n: int) -> dict[str, Any] | None:
    """The columns of some of the rows at hand.

    Args:
        columns: One value for each of the n rows, by name.
        rows: Consecutive rows.
        n: All rows at hand.

    Returns:
        One value for each of ``rows``; None where there are no columns.

    Raises:
        OptionError: A column has another length or is no sequence, or a name is not free.
    """
    if not columns:
        return None
    if not isinstance(columns, Mapping):
        raise OptionError(f"columns is a {type(columns).__name__}. Give a dict: name → one value per row.")
    found = {}
    for name, values in columns.items():
        if name == ROW or not isinstance(name, str) or not name:
            raise OptionError(
                f"columns: {name!r} cannot be a column's name. {ROW!r} holds the row ids already."
            )
        values = values.tolist() if isinstance(values, Tensor) else values
        if isinstance(values, str | bytes | Mapping) or not (
            hasattr(values, "__len__") and hasattr(values, "__getitem__")
        ):
            raise OptionError(
                f"columns: {name!r} is a {type(values).__name__}. Give a list, an array or a tensor with one value per row."
            )
        if len(values) != n:
            raise OptionError(f"columns: {name!r} has {len(values)} values for {n} rows. Give one for each.")
        found[name] = values[rows.start : rows.stop]
    return found


def sidecar_digest(content: bytes | memoryview) -> str:
    """A hash of a sidecar's file, which the segment's record holds."""
    return hashlib.sha256(content).hexdigest()[:32]


def sidecar_whole(storage: Storage, segment: Segment) -> bool:
    """Whether the file of a segment's columns is there and is what was written; also where it has none.

    Args:
        storage: The index's folder.
        segment: The segment.

    Returns:
        Whether nothing is missing or changed.
    """
    if not segment.columns:
        return True
    if not storage.has(segment.sidecar):
        return False
    return sidecar_digest(storage.read(segment.sidecar)) == segment.sidecar_digest


def refuse_other_types(storage: Storage, segments: Sequence[Segment], content: bytes) -> None:
    """Refuse a sidecar that cannot stand in one table with those that are there.

    Args:
        storage: The index's folder.
        segments: The segments that are there.
        content: The new sidecar, as ``table_bytes`` makes it.

    Raises:
        OptionError: A column is of another type; it is named.
    """
    if not segments or not segments[0].columns:
        return
    arrow = _arrow("pyarrow")
    new = _arrow("pyarrow.parquet").read_table(io.BytesIO(content))
    old = columns_of(storage, segments)
    for name in old.column_names:
        try:
            arrow.concat_tables([old.select([name]), new.select([name])], promote_options="permissive")
        except arrow.ArrowException as cause:
            raise OptionError(
                f"columns: {name!r} is {new.schema.field(name).type}, and {old.schema.field(name).type} in the rows before. "
                "Give values of the same type."
            ) from cause


def table_bytes(columns: Mapping[str, Any], segment: Segment) -> bytes:
    """The sidecar of a segment.

    Args:
        columns: One value per row, as ``sliced`` gives them: numbers, texts, booleans.
        segment: Its rows.

    Returns:
        A Parquet file.

    Raises:
        OptionError: A column has values that Parquet cannot hold, or that are no single values.
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = _arrow("pyarrow"), _arrow("pyarrow.parquet")
    arrays = {ROW: arrow.array(range(segment.start, segment.stop), arrow.int64())}
    for name, values in columns.items():
        try:
            arrays[name] = values if isinstance(values, arrow.ChunkedArray) else arrow.array(values)
        except (arrow.ArrowException, TypeError, ValueError, OverflowError) as cause:
            raise OptionError(
                f"columns: {name!r} cannot be kept ({cause}). Give numbers, texts or booleans of one type."
            ) from cause
        if arrow.types.is_nested(arrays[name].type):
            raise OptionError(
                f"columns: {name!r} has lists as values. Give one number, text or boolean for each row."
            )
    out = io.BytesIO()
    try:
        parquet.write_table(arrow.table(arrays), out)
    except arrow.ArrowException as cause:
        raise OptionError(
            f"columns cannot be kept ({cause}). Give numbers, texts or booleans of one type."
        ) from cause
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
        content = storage.read(segment.sidecar)
        if sidecar_digest(content) != segment.sidecar_digest:
            raise IndexFolderError(
                f"{storage.where}/{segment.sidecar} is damaged: it is not what was written. Run index build again with the same "
                "columns: it makes this file anew."
            )
        try:
            table = parquet.read_table(io.BytesIO(content), columns=[ROW, *wanted])
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


def _is_in(name: str, value: Any) -> Any:
    """An expression: the column has the value, or one of the values."""
    arrow, compute = _arrow("pyarrow"), _arrow("pyarrow.compute")
    value = _plain(value)
    values = list(value) if isinstance(value, list | tuple | set | frozenset | range) else [value]
    values = [_plain(one) for one in values]
    try:
        return compute.field(name).isin(arrow.array(values))
    except (arrow.ArrowException, TypeError, ValueError, OverflowError) as cause:
        raise OptionError(
            f"where: {name!r} cannot be compared with {str(value)[:60]} ({cause}). Give a number, a text or a boolean, or a list "
            "of them."
        ) from cause


def _plain(value: Any) -> Any:
    """Tensors, and arrays and numbers of NumPy, as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value


def selected_rows(storage: Storage, segments: Sequence[Segment], where: Any) -> Tensor:
    """The rows that a filter keeps, bool [n].

    Args:
        storage: The index's folder.
        segments: Its segments.
        where: ``{"label": 3, "split": ["a", "b"]}``: every column has the value, or one of the values (a list, a set, a range,
            an array or a tensor); or an expression of
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
            part = _is_in(name, value)
            expression = part if expression is None else expression & part
    elif isinstance(where, compute.Expression):
        table, expression = columns_of(storage, segments), where
    else:
        raise OptionError(
            f"where is a {type(where).__name__}. Give {{'column': value}} or an expression of pyarrow.compute."
        )
    try:
        kept = table if expression is None else table.filter(expression)
    except (arrow.ArrowException, TypeError, ValueError, OverflowError) as cause:
        raise OptionError(
            f"where cannot be applied: {cause}. Columns: {', '.join(table.column_names)}."
        ) from cause
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.from_numpy(kept.column(ROW).to_numpy().copy())] = True
    if not bool(mask.any()):
        raise OptionError(f"where leaves no row of {n}. Columns: {', '.join(table.column_names)}.")
    return mask
