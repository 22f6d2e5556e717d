"""Where an index lies, from what the user gives: a local path, or a URL of an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tracin.errors import OptionError
from tracin.index.kept.remote import RemoteFolder
from tracin.index.kept.storage import LocalFolder, Storage

__all__ = ["storage_of"]


def storage_of(folder: Any) -> Storage:
    """The folder of an index.

    Args:
        folder: A path, or a URL such as ``s3://bucket/index`` or ``memory://index``, which fsspec opens.

    Returns:
        The storage.

    Raises:
        OptionError: It is neither, or a URL of no folder.
        MissingExtraError: It is a URL, and fsspec is not installed.
    """
    if isinstance(folder, str) and "://" in folder:
        if not folder.partition("://")[2].strip("/"):
            raise OptionError(f"folder is {folder!r}, which names no bucket or folder: 's3://bucket/index'.")
        return RemoteFolder(folder)
    if isinstance(folder, str | Path) and str(folder):
        return LocalFolder(folder)
    raise OptionError(f"folder is {folder!r}. Give a path, or a URL such as 's3://bucket/index'.")
