"""Files under ``--out``: refused before the work where they could not be written, whole or absent after it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from tracin.cli.printing import say
from tracin.errors import MissingExtraError, OptionError, ResultError
from tracin.files import atomic_path, probe_folder, write_csv

__all__ = ["Folder"]

Records = Sequence[Mapping[str, Any]]


class Folder:
    """Where a command writes; without ``out`` it writes nothing.

    Args:
        out: The folder, or None.
        formats: csv, parquet, json.
        figures: Whether pictures will be drawn.

    Raises:
        OptionError: The folder cannot be written to.
        MissingExtraError: A format or the figures need a package that is not installed.
    """

    def __init__(self, out: Path | None, formats: Sequence[str] = (), *, figures: bool = False) -> None:
        self.out, self.formats = out, tuple(dict.fromkeys(formats))
        self.written: list[str] = []
        if out is None:
            return
        if "parquet" in self.formats:
            _require(
                "pyarrow", "--format parquet needs pyarrow: pip install 'tracin[eval]', or use csv or json"
            )
        if figures:
            _require("matplotlib", "the figures need matplotlib: pip install 'tracin[plot]'")
        _probe(out)

    def __bool__(self) -> bool:
        return self.out is not None

    def path(self, name: str) -> Path:
        """The place of a file that is about to be written."""
        assert self.out is not None
        self.written.append(name)
        return self.out / name

    def table(self, name: str, rows: Records) -> None:
        """Write a table in each format.

        Args:
            name: The file's name without ending.
            rows: Column → value, the same columns in each.
        """
        if self.out is None:
            return
        write = {"csv": _write_csv, "json": _write_json, "parquet": _write_parquet}
        for kind in self.formats:
            with self.file(f"{name}.{kind}") as path:
                write[kind](path, rows)

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """Write a file whole or not at all.

        Args:
            name: Its name.

        Yields:
            Where to write meanwhile.

        Raises:
            ResultError: It cannot be written.
        """
        path = self.path(name)
        try:
            with atomic_path(path) as partial:
                yield partial
        except OSError as error:
            raise ResultError(f"cannot write {path}: {error}. Choose a folder with room for it.") from error

    def tell(self) -> None:
        """Say what was written."""
        if self.out is not None:
            say()
            say(f"Written to {self.out}: {', '.join(self.written)}")


def _require(module: str, message: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise MissingExtraError(message) from error


def _probe(folder: Path) -> None:
    try:
        probe_folder(folder)
    except OSError as error:
        raise OptionError(
            f"--out {folder} cannot be written to ({error.strerror}). Choose a folder that you may write to."
        ) from error


def _write_csv(path: Path, rows: Records) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write_csv(file, rows)


def _write_json(path: Path, rows: Records) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _write_parquet(path: Path, rows: Records) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
