"""The work on a Ray cluster: stateless tasks, retried when a worker or a node is lost.

The index's folder must be one that every node sees: a mounted folder or an object store. A worker opens the model once
and keeps it between tasks. Every node needs tracin and what the model needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tracin.errors import MissingExtraError, TracinError
from tracin.index.making.executors import Done, Packed, Work, pack, perform

__all__ = ["Ray"]


class Ray:
    """On the Ray cluster that this process is connected to; ``ray.init`` is called where it is not.

    Args:
        cpus: CPUs of a worker.
        gpus: GPUs of a worker, which can be a fraction.
        retries: How often a task is tried again when its worker or node is lost.
        ahead: Tasks that are handed out at a time, for each CPU of the cluster.

    Raises:
        MissingExtraError: ray is not installed.
    """

    def __init__(self, *, cpus: float = 1.0, gpus: float = 0.0, retries: int = 20, ahead: int = 4) -> None:
        try:
            self._ray = import_module("ray")
        except ImportError as cause:
            raise MissingExtraError("Ray() needs ray: pip install 'tracin[ray]'") from cause
        self.cpus, self.gpus, self.retries, self.ahead = cpus, gpus, retries, ahead

    def run(self, work: Work, pieces: Sequence[Any], done: Done) -> None:
        """Do the pieces on the cluster.

        Args:
            work: What to do.
            pieces: With what.
            done: Told of each.

        Raises:
            TracinError: What a piece raised.
        """
        ray = self._ray
        if not ray.is_initialized():
            ray.init()
        packed = ray.put(pack(work))
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries)(_perform)
        waiting = list(enumerate(pieces))[::-1]
        most = max(1, self.ahead * int(ray.cluster_resources().get("CPU", 1) / max(self.cpus, 1)))
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    at, piece = waiting.pop()
                    running[task.remote(packed, piece)] = at
                ready, _ = ray.wait(list(running))
                for reference in ready:
                    done(running.pop(reference), self._got(reference))
        finally:
            for reference in running:
                ray.cancel(reference)

    def _got(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if hasattr(error, "cause") else None
            if isinstance(cause, TracinError):
                raise cause from error
            raise


def _perform(packed: Packed, piece: Any) -> Any:
    return perform(packed, piece)
