"""Who does the work: this process, several, or a cluster. All work from one list, and no piece waits for another.

A worker opens what it needs for itself, once, and does each piece as any other process would; so the result is the same
whoever does it. What a worker that dies had in hand is done by another.
"""

from __future__ import annotations

import multiprocessing
import pickle
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch

from tracin.errors import IndexFolderError, OptionError

__all__ = ["Executor", "Here", "Packed", "Processes", "Work", "pack", "perform"]

ROUNDS = 3

# Told of a piece's number in the list, and of its result.
Done = Callable[[int, Any], None]


@runtime_checkable
class Work(Protocol):
    """What is to be done with each piece of a list."""

    def opened(self) -> AbstractContextManager[Callable[[Any], Any]]:
        """Open what is needed; inside, a function of a piece."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Does all pieces of some work."""

    def run(self, work: Work, pieces: Sequence[Any], done: Done) -> None:
        """Do every piece at least once; ``done`` is told of each once, in any order."""
        ...


class Here:
    """In this process."""

    def run(self, work: Work, pieces: Sequence[Any], done: Done) -> None:
        """Do the pieces in order.

        Args:
            work: What to do.
            pieces: With what.
            done: Told of each.
        """
        with work.opened() as function:
            for at, piece in enumerate(pieces):
                done(at, function(piece))


class Packed:
    """Work on its way to another process, which opens it once.

    Args:
        content: The work, pickled.
        threads: Threads of torch where it comes from: numbers can depend on them.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        self.key, self.content, self.threads = uuid.uuid4().hex, content, threads


def pack(work: Work) -> Packed:
    """Work as bytes for another process.

    Args:
        work: The work.

    Returns:
        A pickle, by cloudpickle where it is installed, which can also pack functions of the main program.

    Raises:
        OptionError: Something in it cannot be packed.
    """
    try:
        dumps = import_module("cloudpickle").dumps
    except ImportError:
        dumps = pickle.dumps
    try:
        return Packed(dumps(work), torch.get_num_threads())
    except Exception as cause:  # what cannot be pickled raises what it likes
        raise OptionError(
            f"the model, the loss or the rows cannot be sent to another process ({cause}). Define them at the top level of a "
            "module, install cloudpickle, or use workers=1."
        ) from cause


class _Opened:
    """The work that this process has open: the last one it was given."""

    def __init__(self) -> None:
        self.key, self.function, self.stack = "", None, ExitStack()

    def of(self, packed: Packed) -> Any:
        if self.key != packed.key:
            self.stack.close()
            self.key = ""
            work: Work = pickle.loads(packed.content)  # noqa: S301 - packed by the process that asked
            torch.set_num_threads(packed.threads)
            self.stack = ExitStack()
            self.function = self.stack.enter_context(work.opened())
            self.key = packed.key
        return self.function


_opened = _Opened()


def perform(packed: Packed, piece: Any) -> Any:
    """Do one piece in this process; the work stays open for the next one.

    Args:
        packed: The work.
        piece: The piece.

    Returns:
        Its result.
    """
    return _opened.of(packed)(piece)


_given: list[Packed] = []


def _keep(packed: Packed) -> None:
    """Take the work; it is opened by the first piece, whose errors reach the process that asked."""
    _given[:] = [packed]


def _perform_given(piece: Any) -> Any:
    return perform(_given[0], piece)


class Processes:
    """In several processes of this machine.

    Args:
        workers: How many.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, work: Work, pieces: Sequence[Any], done: Done) -> None:
        """Do the pieces. A worker that is killed takes its pool with it: what is left goes to a new one.

        Args:
            work: What to do.
            pieces: With what.
            done: Told of each.

        Raises:
            IndexFolderError: The workers were killed again and again.
        """
        packed = pack(work)
        left = dict(enumerate(pieces))
        for _ in range(ROUNDS):
            try:
                self._round(packed, left, done)
            except BrokenProcessPool:
                continue
            return
        raise IndexFolderError(
            f"worker processes ended {ROUNDS} times before their work: killed for want of memory, or a main program without "
            "`if __name__ == '__main__':`. Use fewer workers; what is finished is kept, and the same command goes on."
        )

    def _round(self, packed: Packed, left: dict[int, Any], done: Done) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            self.workers, mp_context=context, initializer=_keep, initargs=(packed,)
        ) as pool:
            futures: dict[Future[Any], int] = {
                pool.submit(_perform_given, piece): at for at, piece in left.items()
            }
            try:
                for future in as_completed(futures):
                    at = futures[future]
                    result = future.result()
                    del left[at]
                    done(at, result)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
