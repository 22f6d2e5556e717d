"""One thread that computes, and the answers it gave last: a model is locked while it is scored."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tracin.errors import OptionError

__all__ = ["BusyError", "Worker"]


class BusyError(OptionError):
    """More was asked than can be computed soon."""


class Worker:
    """Computes one thing after another; who asks for the same thing gets the same future.

    Args:
        held: How many answers are kept.
        waiting: How many may be waited for at a time.
    """

    def __init__(self, held: int = 128, waiting: int = 64) -> None:
        self._held, self._waiting = held, waiting
        self._answers: OrderedDict[Hashable, Future[Any]] = OrderedDict()
        self._pending = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "tracin explorer")

    def ask(self, key: Hashable, work: Callable[[], Any]) -> Future[Any]:
        """The answer to a question, computed once.

        Args:
            key: The question; None: what is computed is not to be kept.
            work: Computes it.

        Returns:
            Its future. One that failed is not kept.

        Raises:
            BusyError: Too many questions wait.
        """
        with self._lock:
            if key is not None and key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
            if self._pending >= self._waiting:
                raise BusyError(f"{self._pending} explanations wait already. Try again in a moment.")
            future = self._pool.submit(work)
            self._pending += 1
            if key is not None:
                self._answers[key] = future
                while len(self._answers) > self._held:
                    self._answers.popitem(last=False)
        future.add_done_callback(lambda done: self._finished(key, done))
        return future

    def _finished(self, key: Hashable, future: Future[Any]) -> None:
        failed = future.cancelled() or future.exception() is not None
        with self._lock:
            self._pending -= 1
            if failed and self._answers.get(key) is future:
                del self._answers[key]

    def close(self) -> None:
        """Cancel what waits, and let what is in work come to its end."""
        self._pool.shutdown(wait=True, cancel_futures=True)
