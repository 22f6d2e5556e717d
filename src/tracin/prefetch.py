"""The next batches are read while the current one is computed: in one background thread, a few batches ahead.

A dataset is the user's code, so what it meets must be what it would meet in the caller's thread:

- One thread at a time reads rows, in the whole process (``reading``): datasets need not be safe for threads, and train
  rows and queries may come from the same one.
- The thread has the caller's grad mode, inference mode, autocast, default device, CUDA device and stream, and context
  variables. Where other torch modes are active, nothing is read ahead.
- Data whose reading moves a global random state is read in the caller's thread: two threads that draw from one state
  would draw different numbers each time. The first batch is always read there, and shows it.
- What fails in the thread is read once more in the caller's thread, where the user's exception is raised, at its batch;
  what belongs to one thread (an open SQLite connection) works there, and from then on all is read there.

The thread ends with the pass, whether the caller reads all batches, stops early or is interrupted.
"""

from __future__ import annotations

import contextvars
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["AHEAD", "Reader", "global_states", "reading", "same_states"]

# Batches that may lie ready, or be in the making, beside the one that is computed.
AHEAD = 2

Key = TypeVar("Key")
Value = TypeVar("Value")

_LOCK = threading.RLock()


class _Place(threading.local):
    """Where a thread is: how deep in the user's data code, and whether it is one that reads ahead."""

    depth = 0
    reader = False


_HERE = _Place()


@contextmanager
def reading() -> Iterator[None]:
    """The user's data code runs in one thread at a time."""
    with _LOCK:
        _HERE.depth += 1
        try:
            yield
        finally:
            _HERE.depth -= 1


def global_states() -> tuple[Any, ...]:
    """The random states that any code may draw from: torch's on the CPU, Python's and numpy's."""
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None


def same_states(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two looks at the random states."""
    if not torch.equal(mine[0], theirs[0]) or mine[1] != theirs[1]:
        return False
    if mine[2] is None or theirs[2] is None:
        return True  # numpy came in between: its first state is nobody's draw
    return mine[2][2:] == theirs[2][2:] and bool((mine[2][1] == theirs[2][1]).all())


class _Surroundings:
    """The caller's thread-local torch state, to be entered in another thread."""

    def __init__(self) -> None:
        modes = _get_current_function_mode_stack()
        self.portable = not _get_current_dispatch_mode_stack() and all(
            type(mode) is DeviceContext for mode in modes
        )
        self._devices = [mode.device for mode in modes if type(mode) is DeviceContext]
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]
        self._cache = torch.is_autocast_cache_enabled()
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            for device in self._devices:
                stack.enter_context(torch.device(device))
            yield


class Reader(Generic[Key, Value]):
    """Reads what belongs to some keys, in order and ahead of its use.

    Args:
        read: Reads one; the user's code in it runs within ``reading``.
        name: What the thread is called.
    """

    def __init__(self, read: Callable[[Key], Value], name: str) -> None:
        self._read, self._name = read, name
        self._looked = self._inline = False
        self._open: WeakSet[ThreadPoolExecutor] = WeakSet()

    def each(self, keys: Sequence[Key]) -> Generator[Value, None, None]:
        """One pass.

        Args:
            keys: What to read.

        Yields:
            What was read, in order.
        """
        at = 0
        while at < len(keys):
            if self._inline or not self._looked or at + 1 == len(keys) or _HERE.depth:
                yield self._watched(keys[at])
                at += 1
                continue
            with closing(self._ahead(keys[at:])) as values:
                for value in values:
                    yield value
                    at += 1

    def close(self) -> None:
        """End the threads of passes that were left open, such as by an exception whose traceback holds them."""
        for pool in list(self._open):
            _end(pool)

    def _watched(self, key: Key) -> Value:
        """Read in this thread, and note whether a random state moved."""
        if self._inline:
            return self._read(key)
        before = global_states()
        value = self._read(key)
        self._looked, self._inline = True, not same_states(before, global_states())
        return value

    def _ahead(self, keys: Sequence[Key]) -> Generator[Value, None, None]:
        """Read in a thread until the end, or until this data turns out to be better read here."""
        around = _Surroundings()
        if not around.portable:
            self._inline = True
            return
        pool = ThreadPoolExecutor(1, self._name, _mark)
        self._open.add(pool)
        waiting: deque[Future[tuple[Value, bool]]] = deque()
        more = iter(keys)
        try:
            for key in keys:
                self._fill(waiting, pool, around, more)
                try:
                    value, quiet = waiting.popleft().result()
                except Exception:  # noqa: BLE001 (the same is met below, unless it was the thread that failed)
                    self._inline = True
                    _end(pool)
                    value = self._read(key)
                else:
                    self._inline = not quiet
                if self._inline:
                    _end(pool)
                    yield value
                    return
                self._fill(waiting, pool, around, more)
                yield value
        finally:
            _end(pool)

    def _fill(
        self,
        waiting: deque[Future[tuple[Value, bool]]],
        pool: ThreadPoolExecutor,
        around: _Surroundings,
        more: Iterator[Key],
    ) -> None:
        for key in islice(more, AHEAD - len(waiting)):
            waiting.append(pool.submit(contextvars.copy_context().run, self._in_thread, around, key))

    def _in_thread(self, around: _Surroundings, key: Key) -> tuple[Value, bool]:
        with around.entered():
            before = global_states()
            value = self._read(key)
            return value, same_states(before, global_states())


def _mark() -> None:
    _HERE.reader = True


def _end(pool: ThreadPoolExecutor) -> None:
    """Let the thread finish the batch in its hands; wait for it, unless it may be waiting for this thread."""
    pool.shutdown(wait=not (_HERE.reader or _HERE.depth), cancel_futures=True)
