"""The queries of a ledger: their losses and gradients in eval mode, while a training loop holds the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracin.checksums import Passes, row_checksums
from tracin.data import Batch, RowSource, to_device
from tracin.errors import LossError, ModelError, OptionError, UserCodeError
from tracin.gradients.blocks import Block, Dense, Outer, Rows, Sum
from tracin.gradients.check import checked_gradients
from tracin.gradients.engine import Keys, Source
from tracin.gradients.products import concatenate, held
from tracin.gradients.sites import LossModule, Wiring
from tracin.gradients.wiring import wire
from tracin.methods.online.order import RowOrder
from tracin.methods.online.shares import Weighted
from tracin.methods.online.sums import each_norm
from tracin.methods.online.tape import paused
from tracin.scoring.guard import guarded
from tracin.scoring.tree import tree_of
from tracin.tasks import Selection, Task

__all__ = ["MEND", "Asked", "Queries", "along", "flat", "scaled", "versions"]

Blocks = dict[tuple[str, ...], Block]

# What can be done about a gradient that is not finite.
MEND = "lower the learning rate"


@dataclass(frozen=True)
class Asked:
    """Losses [q] in float64 and gradients of all queries at one state of the model, and which state it was."""

    losses: Tensor
    blocks: Blocks
    state: tuple[Any, ...]


class Queries:
    """Query rows, read once and kept; the routes of their gradients and those of a training step.

    Args:
        task: Model and losses.
        selection: The traced parameters.
        rows: Query rows.
        memory: Bytes that the gradients held may take.

    Raises:
        DataError: The collate function reorders rows, or a row changes when it is read again.
        OptionError: The gradients do not fit into ``memory``.
        ModelError: A parameter cannot be followed from inside the model.
    """

    def __init__(
        self,
        task: Task,
        selection: Selection,
        rows: RowSource,
        *,
        memory: int,
    ) -> None:
        self.model, self.traced, self._memory = task.model, selection.traced, memory
        self.device = next(iter(self.traced.values())).device
        self.batches: list[Batch] = []
        passes = Passes()
        for batch in rows.batches():
            passes.check(rows, batch)
            self.batches.append(Batch(batch.rows, to_device(batch.value, self.device, copy=True)))
        loss = task.query_loss or task.loss
        self._source = Source(LossModule(task.model, loss), loss, rows, self.device, "queries", mend=MEND)
        self._first = True
        with self.guarded():
            self._source.found = self._wire(self._source)
            self.training, self.order = self._training_routes(task)
        self._refuse_unreachable()
        self.keys = Keys.of(self.training, self._source.wiring)

    def __len__(self) -> int:
        return sum(batch.size for batch in self.batches)

    def checksums(self) -> tuple[Tensor, Tensor]:
        """One number per query, the same for the same query.

        Returns:
            The numbers, float64 [q], and which queries have one, bool [q]: where no tensor has a row per example there is none.
        """
        numbers = torch.zeros(len(self), dtype=torch.float64)
        known = torch.zeros(len(self), dtype=torch.bool)
        for batch in self.batches:
            found = row_checksums(batch, double=True)
            if found is not None:
                rows = slice(batch.start, batch.start + batch.size)
                numbers[rows], known[rows] = found, True
        return numbers, known

    def state(self) -> tuple[Any, ...]:
        """What changes when a parameter or buffer does: places and versions, those of parameters first, and norms."""
        tree = tree_of(self.model)
        tensors = (*tree.parameters, *tree.buffers)
        floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        with torch.no_grad():
            norms = each_norm(floats)
            if len({norm.dtype for norm in norms}) > 1:
                norms = [norm.double() for norm in norms]
        return versions(tree.parameters), versions(tree.buffers), tuple(torch.stack(norms).tolist())

    def gradients(self, train_rows: int) -> Asked:
        """Losses and gradients of all queries at the model's present weights.

        Args:
            train_rows: Rows of the step that they will be multiplied with, which decides how they are held.

        Returns:
            The gradients.

        Raises:
            OptionError: They do not fit into memory.
        """
        state = self.state()
        losses, parts, used = [], [], 0
        with self.guarded():
            for batch in self.batches:
                value = to_device(batch.value, self.device, copy=True)
                found = checked_gradients(
                    self._source, self.keys, batch, value, self.traced, self._first and not parts
                )
                blocks = {names: held(block, train_rows) for names, block in found.blocks.items()}
                losses.append(found.losses)
                parts.append(blocks)
                used += sum(block.nbytes for block in blocks.values())
                if used > self._memory:
                    raise OptionError(
                        f"OnlineTracIn: the gradients of {len(self)} queries take more than the {self._memory:,} bytes that "
                        "memory= leaves beside the ledger's tables. Give fewer queries, trace fewer parameters "
                        "(Task(parameters=...)), or raise memory."
                    )
        self._first = False
        return Asked(torch.cat(losses).double().cpu(), _joined(parts, self.batches), state)

    def losses(self) -> Tensor:
        """The losses of all queries at the model's present weights, float64 [q]."""
        with self.guarded():
            parts = [
                self._source.run(to_device(batch.value, self.device, copy=True), batch.rows).detach()
                for batch in self.batches
            ]
        return torch.cat(parts).double().cpu()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """The model in eval mode, given back bit-identical.

        Yields:
            Nothing.
        """
        with paused(), guarded(self.model, self.device):
            self._source.root.training = False
            yield

    def _wire(self, source: Source, inside: bool = False) -> Wiring:
        n = len(source.rows)
        rows = sorted({0, n // 2, n - 1})
        return wire(source.root, self.traced, source.run, source.take, rows, inside=inside)

    def _training_routes(self, task: Task) -> tuple[Wiring, RowOrder]:
        """Routes that lie inside the model, and what its calls do with the rows."""
        source = Source(
            LossModule(task.model, task.loss), task.loss, self._source.rows, self.device, "queries", mend=MEND
        )
        try:
            wiring = self._wire(source, inside=True)
        except (UserCodeError, LossError):
            if task.query_loss is None:
                raise
            # The training loss cannot read the queries; the model's own layout is the same under the query loss.
            source = self._source
            wiring = self._wire(source, inside=True)
        rows = [int(row) for row in self.batches[0].rows]
        run = partial(_run, source)
        return wiring, RowOrder.seen(task.model, wiring.sites(), wiring.plain_rows, run, rows)

    def _refuse_unreachable(self) -> None:
        for name in self.training.by_row:
            raise ModelError(
                f"OnlineTracIn cannot follow {name} from inside the model ({self.training.reasons.get(name, 'no route')}): a "
                "training step shows the model's calls, not the loss. Leave it out with Task(parameters=...), or use TracInCP."
            )
        for name in self.training.unused:
            if name not in self._source.wiring.unused:
                raise ModelError(
                    f"{name} is used by the query loss and not by the training loss on these queries: its shares cannot be read."
                )


def _run(source: Source, rows: list[int]) -> Tensor:
    return source.run(source.take(rows), rows)


def versions(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Places and version counters of tensors."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def _joined(parts: Sequence[Blocks], batches: Sequence[Batch]) -> Blocks:
    """Gradients of consecutive batches as one block each; a batch that does not use a parameter has zeros."""
    if len(parts) == 1:
        return parts[0]
    out: Blocks = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        some = next(part[key] for part in parts if key in part)
        pieces = [
            part[key] if key in part else _zeros_like(some, batch.size)
            for part, batch in zip(parts, batches, strict=True)
        ]
        out[key] = concatenate(pieces)
    return out


def _zeros_like(block: Block, n: int) -> Block:
    some = block.rows(0, 1).materialise()
    return Dense(some.new_zeros(n, some.shape[1]))


def scaled(block: Block, sizes: Mapping[str, int], factors: Mapping[str, float | Tensor]) -> Weighted | None:
    """Query gradients times the own term's factors; None where no parameter of the block is moved.

    Args:
        block: The gradients.
        sizes: The parameters that it holds, and how many numbers each has.
        factors: Numbers, or tensors of the parameters' shapes; absent where the optimizer does not move the parameter.

    Returns:
        The block, multiplied out where a factor is a tensor, and the number that all its parameters have in common.
    """
    found = [factors.get(name, 0.0) for name in sizes]
    if all(isinstance(factor, float) for factor in found):
        rates = [float(factor) for factor in found]
        if len(set(rates)) == 1:
            return Weighted(block, rates[0]) if rates[0] else None
        if isinstance(block, Dense):
            block = Dense(block.values, tuple(sizes.values()))
        return Weighted(block.scaled(rates))
    values = block.materialise()
    flat = [
        factor.reshape(-1).to(values.dtype)
        if isinstance(factor, Tensor)
        else values.new_full((size,), factor)
        for factor, size in zip(found, sizes.values(), strict=True)
    ]
    return Weighted(Dense(values * torch.cat(flat)))


def along(block: Block, direction: Tensor) -> Tensor:
    r"""Each example's gradient times one direction, :math:`\langle g_m, v \rangle`, without multiplying g out.

    Args:
        block: m examples.
        direction: v [p].

    Returns:
        The products [m].
    """
    if isinstance(block, Sum):
        return torch.stack([along(part, direction) for part in block.parts]).sum(0)
    if isinstance(block, Outer):
        (_, _, i), o = block.a.shape, block.d.shape[2]
        weight, bias = direction[: o * i].view(o, i), direction[o * i :]
        total = ((block.d @ weight) * block.a).sum((1, 2))
        return total if block.bias is None else total + block.bias * (block.d @ bias).sum(1)
    if isinstance(block, Rows):
        return (direction.view(block.length, -1)[block.index] * block.d).sum((1, 2))
    return block.materialise() @ direction


def flat(parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> Tensor:
    """Some parameters, flat and side by side, as a copy."""
    return torch.cat([parameters[name].detach().reshape(-1) for name in names]).clone()
