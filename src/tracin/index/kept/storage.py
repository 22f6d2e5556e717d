"""Where an index lies: a folder of files, each of them whole or absent.

A file is written to a temporary name, flushed to the disk, and renamed; so a listing of the folder says what is done, and
any number of writers need no lock between them. A writer holds an advisory lock on its temporary file for as long as it
lives: one that nobody holds belongs to a dead writer, and ``sweep`` removes it.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from tracin.errors import IndexFolderError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["PARTIAL", "LocalFolder", "Storage"]

PARTIAL = ".partial-"
# Where files cannot be locked, a temporary file this old is taken for a dead writer's.
ABANDONED_SECONDS = 3600.0


@runtime_checkable
class Storage(Protocol):
    """Files by name. ``where`` is the folder as the user gave it, for messages."""

    where: str

    def names(self) -> set[str]:
        """The finished files."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes ``start`` to ``stop`` of a file, fewer where it ends before."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, in place of an older one."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one of this name; whether it was written."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file."""
        ...

    def sweep(self) -> list[str]:
        """Remove what dead writers left half written; the names of what living writers hold."""
        ...


class LocalFolder:
    """A folder of this machine, or one that is mounted on it.

    Args:
        path: The folder; it is made by the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.where = Path(path), str(path)

    def names(self) -> set[str]:
        with self._told("list"):
            if not self.path.exists():
                return set()
            found = list(os.scandir(self.path))
            return {
                entry.name for entry in found if not entry.name.startswith(PARTIAL) and not entry.is_dir()
            }

    def has(self, name: str) -> bool:
        with self._told("read", name):
            return (self.path / name).is_file()

    def size(self, name: str) -> int:
        with self._told("read", name):
            return (self.path / name).stat().st_size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        with self._told("read", name), Path(self.path / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            stop = size if stop is None else min(stop, size)
            if start >= stop:
                return memoryview(b"")
            # A private mapping: pages are read when they are looked at, and given back with the last view of them.
            page = start - start % mmap.ALLOCATIONGRANULARITY
            found = mmap.mmap(file.fileno(), stop - page, offset=page, access=mmap.ACCESS_COPY)
            return memoryview(found)[start - page :]

    def write(self, name: str, content: bytes) -> None:
        with self._told("write", name), self._partial(name, content) as partial:
            partial.replace(self.path / name)

    def create(self, name: str, content: bytes) -> bool:
        with self._told("write", name), self._partial(name, content) as partial:
            try:
                os.link(partial, self.path / name)
            except FileExistsError:
                return False
            except OSError:  # a filesystem without hard links
                if (self.path / name).exists():
                    return False
                partial.replace(self.path / name)
            return True

    def remove(self, name: str) -> None:
        with self._told("remove", name):
            (self.path / name).unlink(missing_ok=True)

    def sweep(self) -> list[str]:
        with self._told("list"):
            if not self.path.exists():
                return []
            found = [entry.path for entry in os.scandir(self.path) if entry.name.startswith(PARTIAL)]
        return [Path(path).name for path in found if not _removed_if_abandoned(path)]

    @contextmanager
    def _partial(self, name: str, content: bytes) -> Iterator[Path]:
        """A temporary file with this content, on the disk; gone afterwards unless it was renamed."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial, handle = self._locked(Path(name).suffix)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
            yield partial
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            os.close(handle)
        _flush_folder(self.path)

    def _locked(self, suffix: str) -> tuple[Path, int]:
        """A new temporary file whose lock this process holds."""
        while True:
            partial = self.path / f"{PARTIAL}{secrets.token_hex(8)}{suffix}"
            handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if fcntl is None:
                    return partial, handle
                fcntl.flock(handle, fcntl.LOCK_EX)
                if os.fstat(handle).st_nlink:
                    return partial, handle
            except BaseException:
                os.close(handle)
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
            # Another process swept it away before it was locked.
            os.close(handle)

    @contextmanager
    def _told(self, doing: str, name: str = "") -> Iterator[None]:
        path = self.path / name if name else self.path
        try:
            yield
        except FileNotFoundError as cause:
            raise IndexFolderError(
                f"{path} is not there: the index was moved or a file was removed."
            ) from cause
        except OSError as cause:
            if cause.errno in (errno.ENOSPC, errno.EDQUOT):
                mend = "Make room, and run the same command again: what was finished is kept."
            elif cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                mend = "Give yourself the right to it, or choose another folder."
            elif cause.errno == errno.EISDIR:
                mend = "A folder lies where this file belongs: remove it, and run the same command again."
            else:
                mend = "Check the folder and its disk."
            raise IndexFolderError(f"cannot {doing} {path}: {cause.strerror or cause}. {mend}") from cause


def _removed_if_abandoned(path: str) -> bool:
    """Whether a temporary file is gone: finished, removed, or held by no living process and removed here."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if fcntl is None:
            if time.time() - os.fstat(handle).st_mtime < ABANDONED_SECONDS:
                return False
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(path).unlink()
    except OSError:  # its writer lives
        return False
    finally:
        os.close(handle)
    return True


def _flush_folder(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
