"""Decisions on rows, in a log that only grows: one JSON line each, on the disk before it is acknowledged.

The first line says which rows the log is of. Several processes may write to one log: each takes a file lock, reads what the
others added, and then adds its own line. A line that a killed process left unfinished was never acknowledged, and is cut
off when the log is opened or written next.

A decision on a row replaces the one before; undoing brings that one back.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tracin.audit import Audit
from tracin.audit import Decision as Chosen
from tracin.errors import OptionError, ResultError
from tracin.explorer.entries import ACTIONS, UNDO, Decision, Labels, entry_of, json_of, rows_digest
from tracin.explorer.logfile import FORMAT, flush_folder, no_log, opened, unwritable

try:
    import fcntl
except ImportError:  # Windows: the log is then for one process at a time
    fcntl = None

__all__ = ["ACTIONS", "ConflictError", "Decision", "DecisionLog", "OtherLogError"]

VERSION = 1


class ConflictError(OptionError):
    """The row was decided anew since the page showed it.

    Args:
        row: The row.
        now: Its decision, if it has one.
    """

    def __init__(self, row: int, now: Decision | None) -> None:
        told = "was undone" if now is None else f"is now {now.action!r}"
        super().__init__(
            f"row {row} was decided in another tab: the decision {told}. Look at it, and decide again."
        )
        self.row, self.now = row, now


class OtherLogError(OptionError):
    """What was posted is for another log than the one that is served.

    Args:
        log: The ``identity`` of the one that is served.
    """

    def __init__(self, log: str) -> None:
        super().__init__(
            "another study is served here now: the decision was made in the page of an earlier one, and is not taken. Load the "
            "page anew, and decide there."
        )
        self.log = log


class DecisionLog:
    """The log of one file.

    Args:
        path: The file. Made, with its folder, if it is missing.
        audit: The audit of the rows.
        names: A name per class, as the pages show them; those of the audit unless given.

    Raises:
        ResultError: It cannot be written, is of other rows or classes, or is damaged.
    """

    def __init__(self, path: str | Path, audit: Audit, names: tuple[str, ...] | None = None) -> None:
        self.path, self._rows, self._n = Path(path), rows_digest(audit), len(audit)
        self.labels = Labels.of(audit, names)
        self.identity = ""
        self._mine = threading.RLock()
        self._entries: list[Decision] = []
        self._by_id: dict[str, Decision] = {}
        self._stacks: dict[int, list[Decision]] = {}
        self._read_to = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = opened(self.path, make=True)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            with self._locked():
                self._read()
                if self._read_to == 0:
                    self._check_torn_head()
                    self._add({**self._head, "id": secrets.token_hex(8)})
                    flush_folder(self.path.parent)
                    self._read()
                elif self.stale:
                    os.ftruncate(self._file, self._read_to)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Close the file."""
        with self._mine:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    @property
    def seq(self) -> int:
        """The last entry's place, of those that were read."""
        return len(self._entries)

    def refresh(self) -> int:
        """Read what other processes added.

        Returns:
            The last entry's place.
        """
        with self._mine:
            if self.stale:
                with self._locked():
                    self._read()
            return self.seq

    @property
    def stale(self) -> bool:
        """Whether the file is not as it was when it was read last."""
        return os.fstat(self._file).st_size != self._read_to

    def decided(self) -> dict[int, Decision]:
        """The decision of each row that has one."""
        with self._mine:
            return {row: stack[-1] for row, stack in self._stacks.items() if stack}

    def chosen(self) -> dict[int, Chosen]:
        """The same as ``Audit.apply`` and ``Audit.export`` take them."""
        return {row: Chosen(row, one.action, one.label) for row, one in sorted(self.decided().items())}

    def changes(self, since: int) -> dict[str, Any]:
        """What happened after an entry.

        Args:
            since: An entry's place; 0: from the beginning.

        Returns:
            ``{seq, changes}``: the rows that later entries are on, each with its decision or None.
        """
        with self._mine:
            self.refresh()
            rows = dict.fromkeys(entry.row for entry in self._entries[since:])
            return {"seq": self.seq, "changes": [{"row": row, "decision": self._told(row)} for row in rows]}

    def _told(self, row: int) -> dict[str, Any] | None:
        now = self._now(row)
        return None if now is None else now.told()

    def _now(self, row: int) -> Decision | None:
        stack = self._stacks.get(row)
        return stack[-1] if stack else None

    def decide(
        self, name: str, row: int, action: str, label: str | float | None, seen: int | None
    ) -> Decision:
        """Add a decision; when this returns, it is on the disk.

        Args:
            name: What the client calls it: the same name again gives the same answer.
            row: The row.
            action: ``keep``, ``relabel`` or ``remove``.
            label: With ``relabel``: the class or target.
            seen: The place of the decision that the client knows of this row, None for none.

        Returns:
            The entry.

        Raises:
            ConflictError: The row has another decision by now.
            OptionError: The name was given to something else.
            ResultError: It could not be written.
        """
        with self._mine, self._locked():
            self._read()
            before = self._by_id.get(name)
            if before is not None:
                if (before.row, before.action, before.label) != (row, action, label):
                    raise OptionError(f"the id {name!r} was given to another decision. Make a new one.")
                return before
            now = self._now(row)
            if (None if now is None else now.seq) != seen:
                raise ConflictError(row, now)
            return self._append(Decision(self.seq + 1, name, _time(), row, action, label))

    def undo(self, name: str, seq: int) -> tuple[Decision, Decision | None]:
        """Take a decision back, which brings back the one before.

        Args:
            name: As for ``decide``.
            seq: The place of the decision; it must be the one that counts now.

        Returns:
            The entry, and the row's decision now.

        Raises:
            ConflictError: The row has another decision by now.
            OptionError: There is no such decision, or the name was given to something else.
            ResultError: It could not be written.
        """
        with self._mine, self._locked():
            self._read()
            before = self._by_id.get(name)
            if before is not None:
                if before.undoes != seq:
                    raise OptionError(f"the id {name!r} was given to another decision. Make a new one.")
                return before, self._now(before.row)
            if not 1 <= seq <= self.seq or self._entries[seq - 1].action == UNDO:
                raise OptionError(f"there is no decision {seq}.")
            row = self._entries[seq - 1].row
            now = self._now(row)
            if now is None or now.seq != seq:
                raise ConflictError(row, now)
            entry = self._append(Decision(self.seq + 1, name, _time(), row, UNDO, undoes=seq))
            return entry, self._now(row)

    def _append(self, entry: Decision) -> Decision:
        self._add({key: value for key, value in asdict(entry).items() if value is not None})
        self._read()
        return self._entries[-1]

    def _add(self, record: Mapping[str, Any]) -> None:
        """Write a line behind the whole ones, and see it to the disk."""
        line = _line(record)
        try:
            os.ftruncate(self._file, self._read_to)
            os.lseek(self._file, self._read_to, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._read_to)
            raise self._unwritable(error) from error

    def _read(self) -> None:
        """Take in the whole lines that were added."""
        size = os.fstat(self._file).st_size
        if size < self._read_to:
            raise ResultError(f"{self.path} became shorter while it was in use. Start tracin serve again.")
        os.lseek(self._file, self._read_to, os.SEEK_SET)
        added = b""
        while len(added) < size - self._read_to:
            part = os.read(self._file, size - self._read_to - len(added))
            if not part:
                break
            added += part
        *lines, _ = added.split(b"\n")
        for line in lines:
            self._take(line + b"\n")

    def _take(self, line: bytes) -> None:
        try:
            record = json_of(line)
            if self._read_to == 0:
                self._check_head(record)
            else:
                self._count(entry_of(record, self._n, self.labels))
        except ResultError:
            raise
        except ValueError as error:
            if self._read_to == 0:
                raise ResultError(no_log(self.path)) from error
            raise ResultError(
                f"{self.path}: line {self.seq + 2} is no decision ({str(error).rstrip('.')}). Take the file from a backup, or "
                "cut it off before this line."
            ) from error
        self._read_to += len(line)

    @property
    def _head(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "rows": self._rows, "classes": self.labels.tag}

    def _check_torn_head(self) -> None:
        """Without a whole line a file is empty, or the beginning of a log; anything else is somebody's file."""
        os.lseek(self._file, 0, os.SEEK_SET)
        there = os.read(self._file, 1 << 16)
        begin = _line(self._head).rstrip(b"}\n")
        whole = len(_line({**self._head, "id": "0" * 16}))
        if not begin.startswith(there) and not (there.startswith(begin) and len(there) < whole):
            raise ResultError(no_log(self.path))

    def _check_head(self, record: Any) -> None:
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ResultError(no_log(self.path))
        if record.get("version") != VERSION:
            raise ResultError(
                f"{self.path} was written by another version of tracin. Name another file with --decisions."
            )
        for name, told in (
            ("rows", "training rows: their number or their labels differ"),
            ("classes", "classes: their names or their order differ"),
        ):
            if record.get(name) != self._head[name]:
                raise ResultError(
                    f"{self.path} holds decisions on other {told}. Name another file with --decisions."
                )
        identity = record.get("id")
        if not isinstance(identity, str) or not identity:
            raise ResultError(
                f"{self.path}: line 1 has no id of the log. Take the file from a backup, or name another with --decisions."
            )
        self.identity = identity

    def _count(self, entry: Decision) -> None:
        if entry.seq != self.seq + 1:
            raise ValueError(f"entry {entry.seq} follows {self.seq}")
        if entry.id in self._by_id:
            raise ValueError(f"the id {entry.id[:40]!r} was given to an earlier entry")
        stack = self._stacks.setdefault(entry.row, [])
        if entry.action == UNDO:
            if not stack or stack[-1].seq != entry.undoes:
                raise ValueError(f"entry {entry.undoes} is not the last one on row {entry.row}")
            stack.pop()
        else:
            stack.append(entry)
        self._entries.append(entry)
        self._by_id[entry.id] = entry

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time."""
        if self._file < 0:
            raise ResultError(f"{self.path} is closed.")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            self._check_place()
            yield
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _check_place(self) -> None:
        mine = os.fstat(self._file)
        try:
            there = self.path.stat()
        except OSError as error:
            raise self._unwritable(error) from error
        if not os.path.samestat(mine, there):
            raise ResultError(f"{self.path} was replaced while it was in use. Start tracin serve again.")

    def _unwritable(self, error: OSError) -> ResultError:
        return ResultError(unwritable(self.path, error))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
