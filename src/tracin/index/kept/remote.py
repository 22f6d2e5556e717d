"""An index in an object store, through fsspec: each file is put whole, and read by byte ranges.

Object stores show a file when it is complete, and replace it at once; so nothing half written is ever seen, and there is
nothing to sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tracin.errors import IndexFolderError, MissingExtraError, OptionError

__all__ = ["RemoteFolder"]


class RemoteFolder:
    """A folder that fsspec opens.

    Args:
        url: Protocol and path, such as ``s3://bucket/index``.

    Raises:
        OptionError: fsspec does not know the protocol, or cannot reach the place.
        MissingExtraError: fsspec, or what it needs for the protocol, is not installed.
    """

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self._open()

    def _open(self) -> None:
        try:
            fsspec = import_module("fsspec")
        except ImportError as cause:
            raise MissingExtraError("an index at a URL needs fsspec: pip install 'tracin[index]'") from cause
        try:
            self._files, path = fsspec.core.url_to_fs(self.where)
        except ImportError as cause:
            raise MissingExtraError(f"{self.where} needs another package: {cause}") from cause
        except Exception as cause:  # every protocol raises what it likes
            raise OptionError(f"{self.where} cannot be opened: {cause}. Check the URL.") from cause
        self._path = str(path).rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"where": self.where}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.where = state["where"]
        self._open()

    def names(self) -> set[str]:
        with self._told("list"):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path, detail=False)
            except FileNotFoundError:
                return set()
            return {str(path).rstrip("/").rpartition("/")[2] for path in found}

    def has(self, name: str) -> bool:
        with self._told("read", name):
            self._files.invalidate_cache()
            return bool(self._files.exists(f"{self._path}/{name}"))

    def size(self, name: str) -> int:
        with self._told("read", name):
            return int(self._files.info(f"{self._path}/{name}")["size"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        with self._told("read", name):
            return memoryview(self._files.cat_file(f"{self._path}/{name}", start=start, end=stop))

    def write(self, name: str, content: bytes) -> None:
        with self._told("write", name):
            self._files.makedirs(self._path, exist_ok=True)
            self._files.pipe_file(f"{self._path}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        if self.has(name):
            return False
        self.write(name, content)
        return True

    def remove(self, name: str) -> None:
        with self._told("remove", name):
            self._files.rm_file(f"{self._path}/{name}")

    def sweep(self) -> list[str]:
        return []

    @contextmanager
    def _told(self, doing: str, name: str = "") -> Iterator[None]:
        path = f"{self.where}/{name}" if name else self.where
        try:
            yield
        except FileNotFoundError as cause:
            raise IndexFolderError(
                f"{path} is not there: the index was moved or a file was removed."
            ) from cause
        except Exception as cause:  # every store raises what it likes
            raise IndexFolderError(
                f"cannot {doing} {path}: {cause}. Check the place and your rights to it."
            ) from cause
