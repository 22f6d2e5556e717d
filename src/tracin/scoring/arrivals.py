"""A batch's numbers on their way to the CPU, and the look for NaN and infinities among them.

On the CPU each batch is looked at and handed on at once. On an accelerator the copy goes to pinned memory and the device is
not waited for: a batch is handed on when ``DEPTH`` more have been sent, so that the device always has work queued. What the
CPU would have to ask the device on the way (is every loss finite?) travels with the numbers. A batch that is not finite is
computed again with every look taken at once, which names row, parameter and checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tracin.data import Batch
from tracin.gradients.blocks import Block, Rows, Sum
from tracin.gradients.engine import BatchGradients, Source
from tracin.scoring.run import refuse_products

__all__ = ["DEPTH", "Arrivals", "at_once"]

# Batches that may be under way.
DEPTH = 4


@dataclass(frozen=True)
class _Sent:
    """One batch under way: its numbers, what else must be finite, and the event after the copies."""

    batch: Batch
    part: Tensor
    marks: Tensor
    done: Any


class Arrivals:
    """Takes batches' numbers from the device, in order.

    Args:
        source: Whose batches they are; its own looks at the numbers are left out from the second batch on.
        where: The checkpoint and data source, for messages.
        keep: ``keep(batch, part)`` gets the numbers on the CPU.
        again: ``again(batch, value)`` computes a batch once more and refuses what is not finite.
    """

    def __init__(
        self,
        source: Source,
        where: str,
        keep: Callable[[Batch, Tensor], None],
        again: Callable[[Batch, Any], Tensor],
    ) -> None:
        self._source, self._where, self._keep, self._again = source, where, keep, again
        self._at_once = at_once(source.device)
        self._sent: deque[_Sent] = deque()

    def __enter__(self) -> Arrivals:  # noqa: PYI034 (the annotations are executed in the tests, where Self is not known)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.deferred = False
        if kind is None:
            self.settle()

    def send(self, batch: Batch, part: Tensor, found: BatchGradients) -> None:
        """Send a batch's numbers.

        Args:
            batch: The batch.
            part: Numbers [n, ...] on the device.
            found: The gradients they were made from.

        Raises:
            NotFiniteError: A number of this batch, or of one sent before, is NaN or infinite.
        """
        if self._at_once:
            refuse_products(part, found, batch, self._where)
            self._keep(batch, part)
            return
        marks = _marks(found, part)
        self._sent.append(_Sent(batch, _to_pinned(part), _to_pinned(marks), _event(part)))
        # From here on nothing in the batch's own path asks the device.
        self._source.deferred = True
        while len(self._sent) > DEPTH:
            self._receive()

    def settle(self) -> None:
        """Wait for what is under way.

        Raises:
            NotFiniteError: A number is NaN or infinite.
        """
        while self._sent:
            self._receive()

    def _receive(self) -> None:
        sent = self._sent.popleft()
        if sent.done is not None:
            sent.done.synchronize()
        part = sent.part
        if not (bool(torch.isfinite(sent.marks).all()) and bool(torch.isfinite(part.sum()))):
            deferred, self._source.deferred = self._source.deferred, False
            try:
                part = self._again(sent.batch, self._source.take(sent.batch.rows)).cpu()
            finally:
                self._source.deferred = deferred
        self._keep(sent.batch, part)


def at_once(device: torch.device) -> bool:
    """Whether numbers are looked at as they come: nothing is waited for on the CPU."""
    return device.type == "cpu"


def _marks(found: BatchGradients, like: Tensor) -> Tensor:
    """Numbers that are finite where the losses are, and δ of embeddings, whose products skip what does not match."""
    sums = [found.losses.detach().sum()]
    sums += [table.d.sum() for block in found.blocks.values() for table in _tables(block)]
    return torch.stack([value.to(like.dtype) for value in sums])


def _tables(block: Block) -> list[Rows]:
    parts = block.parts if isinstance(block, Sum) else (block,)
    return [part for part in parts if isinstance(part, Rows)]


def _to_pinned(values: Tensor) -> Tensor:
    if values.device.type != "cuda":
        return values.to("cpu")
    out = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return out.copy_(values.detach(), non_blocking=True)


def _event(values: Tensor) -> Any:
    """An event after the copies on the device's current stream."""
    if values.device.type != "cuda":
        return None
    with torch.cuda.device(values.device):
        event = torch.cuda.Event(blocking=True)
        event.record()
    return event
