"""Files that are whole or absent: atomic writes, tables and tensors on disk whose errors name the file."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tracin.errors import TracinError

__all__ = [
    "atomic_path",
    "csv_cell",
    "path_of",
    "probe_folder",
    "read_layout",
    "read_tensors",
    "require_file",
    "write_csv",
    "write_tensors",
    "write_text",
]

PARTIAL = ".partial-"
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Write ``path`` whole or not at all.

    Yields a temporary name in the same folder, with the same suffix. When the block ends well, what was
    written there is flushed to the disk and takes the place of ``path`` in one move; when it raises (Ctrl-C
    too), the temporary file is removed and an older ``path`` stays as it was. A missing folder is made. What is there
    and no regular file, such as a device or a pipe, is refused with an ``OSError``: the move would put a file in its place.

    Args:
        path: The file to write.

    Yields:
        Where to write meanwhile.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     target = Path(folder) / "table.csv"
        ...     with atomic_path(target) as partial:
        ...         _ = partial.write_text("train,score")
        ...         there_meanwhile = target.exists()
        ...     there_meanwhile, target.read_text()
        (False, 'train,score')
    """
    path = Path(path)
    _refuse_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}{path.suffix}")
    try:
        partial.touch()
        mode = stat.S_IMODE(
            partial.stat().st_mode
        )  # what the user's umask allows; safetensors would make it 0600
        partial.unlink()
        yield partial
        partial.chmod(mode)
        _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        _flush(path.parent)


def _refuse_special(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # nothing is there, or making its folder will say why not
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder: give the name of a file", str(path))
    if not stat.S_ISREG(mode):
        raise FileExistsError(
            errno.EEXIST,
            "it is a device, a pipe or a socket, and a file would take its place: give another name",
            str(path),
        )


def path_of(value: Any, name: str, error: type[TracinError]) -> Path:
    """A path that the user gave.

    Args:
        value: Text, or a path.
        name: What it is called in the message.
        error: The type to raise where it is something else.

    Returns:
        The path.
    """
    if not isinstance(value, str | os.PathLike):
        raise error(f"{name} is a {type(value).__name__}: give a path as text.")
    path = Path(value)
    if "\0" in str(path):
        raise error(f"{name} is {str(path)!r}: a path holds no null character. Leave it out.")
    return path


def probe_folder(folder: Path) -> None:
    """Make a folder and a file in it, and take the file away: an ``OSError`` now rather than after the work."""
    probe = folder / f".probe-{secrets.token_hex(8)}"
    folder.mkdir(parents=True, exist_ok=True)
    probe.touch()
    probe.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet runs as a formula.

    A text that begins with =, +, −, @, a tab or a carriage return gets an apostrophe before it, and so does such a text
    behind apostrophes, so that taking one away gives the text back. Numbers stay as they are.

    Args:
        value: A text, a number, or a tuple, whose entries are separated by spaces.

    Returns:
        What to write.

    Example:
        >>> csv_cell("=1+1"), csv_cell("'=1+1"), csv_cell("'tis"), csv_cell(-1.5), csv_cell((3, 12))
        ("'=1+1", "''=1+1", "'tis", -1.5, '3 12')
    """
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def write_csv(file: io.TextIOBase, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as CSV; what is None is empty.

    Args:
        file: Opened with ``newline=""``.
        rows: Column → value, the same columns in each.
    """
    writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
    writer.writeheader()
    for row in rows:
        writer.writerow({name: csv_cell(value) for name, value in row.items()})


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], error: type[TracinError]
) -> None:
    """Write tensors as one safetensors file, atomically.

    Args:
        path: The file to write.
        tensors: Dense tensors on any device. Those that share memory are written one by one.
        metadata: Strings kept in the file's header.
        error: The type to raise.

    What cannot be written raises ``error``, which names the file and the mend.
    """
    try:
        with atomic_path(path) as partial:
            save_file(_separate(tensors), partial, metadata=dict(metadata))
    except (OSError, SafetensorError) as cause:
        raise error(
            f"cannot write {path}: {cause}. Choose a folder that you may write to and that has room."
        ) from cause


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors asks."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def read_tensors(path: str | Path, error: type[TracinError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file through a memory map.

    Args:
        path: The file to read.
        error: The type to raise where the file is missing, empty, truncated or of another format; the message names it.

    Returns:
        The tensors on the CPU, and the strings of the header.
    """
    with _opened(path, error) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_layout(
    path: str | Path, error: type[TracinError]
) -> tuple[list[tuple[str, str, list[int]]], dict[str, str]]:
    """Read the header of a safetensors file: names, dtypes and shapes, and no tensor.

    Args:
        path: The file to read.
        error: The type to raise where the file is missing, empty, truncated or of another format; the message names it.

    Returns:
        ``(name, dtype, shape)`` by name, and the strings of the header.
    """
    with _opened(path, error) as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        layout = [(name, str(part.get_dtype()), list(part.get_shape())) for name, part in slices.items()]
        return layout, file.metadata() or {}


@contextmanager
def _opened(path: str | Path, error: type[TracinError]) -> Iterator[safe_open]:
    require_file(path, error)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as cause:
        raise error(
            f"{path} cannot be read as safetensors ({cause}): it is damaged, cut short or of another format. "
            "Write it again, or take it from a backup."
        ) from cause


def require_file(path: str | Path, error: type[TracinError]) -> None:
    """Refuse what is not a file with something in it.

    Args:
        path: The file to look at.
        error: The type to raise where it is missing, a folder, empty, or in a folder that may not be entered.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise error(f"{path} does not exist. Check the path; relative paths start at {Path.cwd()}.")
        if path.is_dir():
            raise error(f"{path} is a folder, not a file. Give the file, or read the folder as a Trajectory.")
        if path.stat().st_size == 0:
            raise error(f"{path} is empty: writing it was interrupted. Write it again.")
    except OSError as cause:
        raise error(
            f"{path} cannot be read: {cause}. Check its permissions and those of its folder."
        ) from cause
