"""The floor, the judge, and what anyone writes with torch alone, on the workload's own rows and checkpoint files.

Every function returns scores [q, n] of the same definition, Σ_c η_c ⟨g_c(z), g_c(z')⟩, but for ``plain_pass``, which
is the work that any gradient method has to do, and ``reference``, the judge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from workloads import Rows, Workload, batches

__all__ = ["Call", "in_float32", "plain_pass", "rates", "reference", "vmap_scores"]


def rates(workload: Workload) -> list[float]:
    return [float(checkpoint.learning_rate) for checkpoint in workload.trajectory]


def plain_pass(workload: Workload) -> None:
    """Load each checkpoint, then forward and backward with the parameters' gradients over train and query rows."""
    parameters = list(workload.model.parameters())
    for checkpoint in workload.trajectory:
        plain_load(workload.model, checkpoint.path)
        for rows in (workload.queries, workload.train):
            for batch in batches(rows, workload.case.batch):
                plain_backward(plain_forward(workload, batch), parameters)


def plain_load(model: nn.Module, path: Path) -> None:
    load_model(model, path)


def plain_forward(workload: Workload, batch: Rows) -> Tensor:
    return workload.case.loss(workload.model, batch).sum()


def plain_backward(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    torch.autograd.grad(loss, parameters)


def vmap_scores(workload: Workload) -> Tensor:
    """``vmap(grad)`` over rows, gradients multiplied out and flattened, one matrix product per batch."""
    case, total = workload.case, 0
    model = workload.model

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], row: Rows) -> Tensor:
        one = tuple(leaf[None] for leaf in row)
        wrapped = Call(model, {**parameters, **buffers})
        return case.loss(wrapped, one)[0]

    per_row = vmap(grad(loss), in_dims=(None, None, 0))
    for checkpoint, rate in zip(workload.trajectory, rates(workload), strict=True):
        load_model(model, checkpoint.path)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def gradients(rows: Rows, parameters: Any = parameters, buffers: Any = buffers) -> Tensor:
            parts = [_flat(per_row(parameters, buffers, batch)) for batch in batches(rows, case.batch)]
            return torch.cat(parts)

        queries = gradients(workload.queries)
        scores = [queries @ gradients(batch).mT for batch in batches(workload.train, case.batch)]
        total = total + rate * torch.cat(scores, 1)
    return total


class Call:
    """The model with other parameters, called as the loss calls a model."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.model, self.state = model, state

    def __call__(self, *args: Any) -> Tensor:
        return functional_call(self.model, self.state, args)


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)


def reference(workload: Workload, rows: Sequence[int], queries: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Autograd in float64, one row at a time: scores [len(queries), len(rows)] and the rows' self-influence."""
    model = copy.deepcopy(workload.model).double()

    def gradients(side: Rows, positions: Sequence[int]) -> Tensor:
        found = [tuple(_wide(leaf[at : at + 1]) for leaf in side) for at in positions]
        return torch.stack([_by_autograd(workload, model, row)[0] for row in found])

    return _scores(workload, model, gradients, rows, queries)


def in_float32(workload: Workload, rows: Sequence[int], queries: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same by autograd in the model's own precision, all rows in one batch: what rounding alone makes of it."""
    model = copy.deepcopy(workload.model)

    def gradients(side: Rows, positions: Sequence[int]) -> Tensor:
        return _by_autograd(workload, model, tuple(leaf[list(positions)] for leaf in side))

    return _scores(workload, model, gradients, rows, queries)


def _wide(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def _by_autograd(workload: Workload, model: nn.Module, batch: Rows) -> Tensor:
    """Each row's gradient of its own loss, [n, p] in float64."""
    losses, parameters = workload.case.loss(model, batch), list(model.parameters())
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in found]).double()


def _scores(
    workload: Workload,
    model: nn.Module,
    gradients: Callable[[Rows, Sequence[int]], Tensor],
    rows: Sequence[int],
    queries: Sequence[int],
) -> tuple[Tensor, Tensor]:
    scores = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    own = torch.zeros(len(rows), dtype=torch.float64)
    for checkpoint, rate in zip(workload.trajectory, rates(workload), strict=True):
        load_model(workload.model, checkpoint.path)
        model.load_state_dict(workload.model.state_dict())
        learned = gradients(workload.train, rows)
        scores += rate * gradients(workload.queries, queries) @ learned.mT
        own += rate * learned.square().sum(1)
    return scores, own
