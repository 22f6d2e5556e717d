"""One optimizer step in work: what was recorded, what must be known before the parameters move, and the rows' shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tracin.data import Batch
from tracin.errors import DataError, LoopError, NotFiniteError
from tracin.gradients.agreement import accumulation_dtype, coarsest
from tracin.gradients.engine import name_not_finite
from tracin.methods.online.queries import MEND, Asked, Queries, along, flat, scaled, versions
from tracin.methods.online.shares import row_products
from tracin.methods.online.sums import Captured, captured, common_factor
from tracin.methods.online.tape import StepTape
from tracin.methods.online.updates import GroupStep, group_steps, is_plain, own_factors
from tracin.methods.online.watch import refuse_other_parameters
from tracin.scoring.arithmetic import Digits, digits, exact_products
from tracin.tasks import Task

__all__ = ["OpenStep", "row_ids"]


@dataclass
class OpenStep:
    """A step inside its ``with`` block; ``tape`` and ``asked`` are absent where the step is not recorded."""

    number: int
    ids: Tensor
    task: Task
    traced: Mapping[str, nn.Parameter]
    queries: Queries
    optimizer: torch.optim.Optimizer
    tape: StepTape | None = None
    asked: Asked | None = None
    depth: int = 0
    done: bool = False
    skipped: bool = False
    found: Captured | None = None
    factor: float = 1.0
    settings: dict[str, GroupStep] = field(default_factory=dict)
    before: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    def record(self, asked: Asked) -> None:
        """Watch the model from here on.

        Args:
            asked: The queries at the state in which the step begins.
        """
        queries = self.queries
        self.asked = asked
        self.tape = StepTape(queries.model, self.traced, queries.training, queries.keys, queries.order)
        self.tape.open()

    def close(self) -> None:
        """Take the hooks off the model."""
        if self.tape is not None:
            self.tape.close()

    def release(self) -> None:
        """Let go of all gradients, before those of the queries at the new weights are made."""
        self.close()
        self.tape = self.asked = self.found = None
        self.before = {}

    def begins(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The optimizer is about to step.

        Args:
            args: What ``optimizer.step`` was called with, the optimizer first.
            kwargs: The same by keyword.

        Raises:
            LoopError: A second step in the block, or one with a closure.
        """
        if self.done:
            raise LoopError("two optimizer steps in one with block. Open online.step(ids) for each.")
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise LoopError(
                "optimizer.step(closure) runs the model inside the step. Compute the gradients before it."
            )
        cancelled = getattr(
            self.optimizer, "found_inf", None
        )  # set by a gradient scaler for fused optimizers
        self.skipped = cancelled is not None and float(cancelled) > 0
        if self.tape is not None and self.asked is not None and not self.skipped:
            kept = digits(self.queries.device)  # of training, before our own products take all of them
            with exact_products(self.queries.device):
                self._read(self.tape, self.asked, kept)

    def _read(self, tape: StepTape, asked: Asked, kept: Digits) -> None:
        """Everything that must be known before the parameters move."""
        tape.close()
        refuse_other_parameters(self.task, self.traced, self.optimizer)
        model, segments = self.queries.model, tape.segments()
        if not segments:
            what = "backward pass reached" if tape.calls else "differentiable forward pass ran through"
            raise LoopError(
                f"no {what} {type(model).__name__} inside the with block. Run forward and backward of every micro-batch inside, "
                "through task.model itself and without its compiled copy."
            )
        if self.queries.training.locals:
            with self.queries.guarded():
                tape.finish()
        self.settings = group_steps(self.optimizer, self.traced)
        unused = self.queries.training.unused
        self.found = captured(segments, self.traced, [name for name in self.settings if name not in unused])
        if self.found.rows != len(self.ids):
            raise DataError(
                f"{len(self.ids)} ids for {self.found.rows} rows in {len(segments)} micro-batches. Give one id per row, in the "
                "order in which the rows went through the model."
            )
        if asked.state[0] != versions(list(model.parameters())):
            raise LoopError(
                "a parameter was changed inside the with block before optimizer.step(), perhaps by another optimizer. Put all "
                "parameters into one optimizer's groups."
            )
        try:
            self.factor = common_factor(self.found, self.traced, self._dtypes(tape.dtype, kept))
        except NotFiniteError:
            self._name_row(self.found)
            raise
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer divides by it inside its step
        if scale is not None:
            self.factor /= float(scale)
        if not is_plain(self.optimizer):
            self.before = {names: flat(self.traced, names) for names in asked.blocks}

    def results(self, update: str) -> tuple[Tensor, Tensor] | None:
        """The rows' shares and what was carried over, once the optimizer has stepped.

        Args:
            update: The form of the own term.

        Returns:
            First-order shares [b, q] and the rest of the movement [q], in float64; None where the step is not recorded.
        """
        if self.found is None or self.asked is None:
            return None
        with exact_products(self.queries.device):
            return self._products(self.found, self.asked, update)

    def _products(self, found: Captured, asked: Asked, update: str) -> tuple[Tensor, Tensor]:
        factors = own_factors(self.optimizer, update, self.settings)
        _refuse_infinite(factors, self.number)
        sizes = {name: parameter.numel() for name, parameter in self.traced.items()}
        weighted = {
            names: scaled(block, {name: sizes[name] for name in names}, factors)
            for names, block in asked.blocks.items()
        }
        queries = {names: found for names, found in weighted.items() if found is not None}
        some = next(iter(self.traced.values()))
        like = torch.empty(len(self.queries), dtype=accumulation_dtype(some.dtype), device=some.device)
        shares = self.factor * row_products(found.segments, queries, like)
        own = shares.sum(0)
        if not math.isfinite(float(own.sum())):
            self._refuse(found, asked, shares)
        if not self.before:
            return shares, torch.zeros_like(own)
        moved = torch.zeros_like(own)
        for names, block in asked.blocks.items():
            step = flat(self.traced, names) - self.before[names]
            moved -= along(block, step.to(like.dtype)).double().cpu()
        return shares, moved - own

    def _dtypes(self, seen: torch.dtype, kept: Digits) -> dict[str, torch.dtype]:
        """The least precise dtype of each parameter's arithmetic in training: δ's, and what torch's switches leave of float32."""
        if kept.full:
            return dict.fromkeys(self.traced, seen)
        owners: dict[int, set[type]] = {}
        for layer in self.queries.model.modules():
            for parameter in layer.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(type(layer))
        out = {}
        for name, parameter in self.traced.items():
            kinds = owners[id(parameter)]
            if any(issubclass(kind, nn.RNNBase) for kind in kinds):
                rounded = kept.recurrent
            elif parameter.dim() > 1 and not kinds <= {nn.Embedding, nn.EmbeddingBag}:  # sums, no products
                rounded = kept.convolution if parameter.dim() > 2 else kept.matmul
            else:
                rounded = parameter.dtype
            out[name] = coarsest([seen, rounded]) if parameter.dtype == torch.float32 else seen
        return out

    def _refuse(self, found: Captured, asked: Asked, shares: Tensor) -> None:
        name_not_finite(asked.blocks, Batch(range(len(asked.losses)), None), "queries", MEND)
        self._name_row(found)
        row = int(self.ids[int((~torch.isfinite(shares)).any(1).nonzero()[0])])
        raise NotFiniteError(
            f"the products of row {row}'s gradient overflow (step {self.number}). Use a float64 model."
        )

    def _name_row(self, found: Captured) -> None:
        """Raise the error that names a row and parameter whose gradient is not finite, if there is one."""
        start = 0
        for segment in found.segments:
            rows = self.ids[start : start + (segment.rows or 0)].tolist()
            start += len(rows)
            for names, blocks in segment.blocks.items():
                for block in blocks:
                    name_not_finite({names: block}, Batch(rows, None), f"train, step {self.number}", MEND)

    def check_taken(self) -> None:
        """Refuse a block that took no step, unless a gradient scaler skipped it: then a gradient is not finite.

        Raises:
            LoopError: No step was taken.
        """
        if self.done or self.skipped:
            return
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters):
            raise LoopError(
                "the with block ended without optimizer.step(). Take the step inside, after forward and backward."
            )


def _refuse_infinite(factors: Mapping[str, float | Tensor], number: int) -> None:
    for name, factor in factors.items():
        finite = (
            math.isfinite(factor) if not isinstance(factor, Tensor) else bool(torch.isfinite(factor).all())
        )
        if not finite:
            raise NotFiniteError(
                f"the step of {name} divides by √v̂ + ε, which is 0 or not finite where its gradients were (step {number}). "
                "Give Adam an eps above 0, and look for gradients that are not finite."
            )


def row_ids(ids: Any, n_train: int) -> Tensor:
    """Ids [b] as int64 on the CPU.

    Args:
        ids: What the user gave.
        n_train: Rows of the training set.

    Returns:
        A copy.

    Raises:
        DataError: They are no whole numbers from 0 to ``n_train``.
    """
    try:
        found = torch.as_tensor(ids).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"ids is a {type(ids).__name__}. Give the positions of the step's rows, [b]."
        ) from error
    if found.dim() != 1 or len(found) == 0:
        raise DataError(f"ids has the shape {list(found.shape)}. Give one position per row of the step, [b].")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise DataError(f"ids is {found.dtype}. Give whole numbers, the positions in the training set.")
    found = found.to(torch.int64, copy=True)
    lowest, highest = (int(end) for end in found.aminmax())
    if lowest < 0 or highest >= n_train:
        wrong = (found < 0) | (found >= n_train)
        raise DataError(
            f"id {int(found[wrong][0])} is out of range: the training set has n_train={n_train} rows, 0 to {n_train - 1}."
        )
    return found
