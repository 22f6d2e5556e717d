"""The file of a log of decisions: a regular file that this process may write, and nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tracin.errors import ResultError
from tracin.files import probe_folder

__all__ = ["FORMAT", "check_place", "flush_folder", "no_log", "opened", "unwritable"]

FORMAT = "tracin.decisions"


def check_place(path: Path) -> None:
    """Refuse a place where no log can be, before the work whose decisions it is to hold.

    Args:
        path: The file; nothing is made there but its folder.

    Raises:
        ResultError: It cannot be written, or is something else than a log.
    """
    try:
        if not os.path.lexists(path):
            probe_folder(path.parent)
            return
        handle = opened(path, make=False)
    except OSError as error:
        raise ResultError(unwritable(path, error)) from error
    with os.fdopen(handle, "rb") as file:
        begin = file.read(1 << 16)
    if b"\n" in begin and FORMAT.encode() not in begin.partition(b"\n")[0]:
        raise ResultError(no_log(path))


def opened(path: Path, *, make: bool) -> int:
    """Open a regular file for reading and writing.

    Args:
        path: The file.
        make: Whether to make it if it is missing.

    Returns:
        Its handle.

    Raises:
        OSError: It is a link, no regular file, or cannot be opened.
    """
    # A link in a stranger's folder must not lead to a file of the user's, and a pipe must not be waited for.
    more = (
        getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_BINARY", 0)
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_CLOEXEC", 0)
    )
    handle = os.open(path, os.O_RDWR | more | (os.O_CREAT if make else 0), 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is no regular file")
    return handle


def unwritable(path: Path, error: OSError) -> str:
    """What is told where the file cannot be written."""
    return f"cannot write {path}: {error}. Choose a folder that you may write to and that has room."


def no_log(path: Path) -> str:
    """What is told where the file is something else."""
    return f"{path} is no log of decisions. Name another file with --decisions."


def flush_folder(folder: Path) -> None:
    """See to the disk that the folder names its files."""
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
