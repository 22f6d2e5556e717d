"""A case wired to tracin, and what the judge says about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import oracle
import tracin
from cases import BY_NAME, Case
from tracin.errors import LossError, ModelError

N, M = 7, 4  # batches of 3: two whole ones and a short one; and as many rows as some sequences have steps
PLAIN = [0.3, 0.07]


@dataclass(frozen=True)
class Truth:
    """What the judge says about one case."""

    scores: Tensor  # [m, n]
    own: Tensor  # [n]
    cosines: Tensor  # [m, n], with the plain rates


@cache
def truth(name: str, dtype: torch.dtype = torch.float64) -> Truth:
    """In float64 each row alone; in float32 each row in the graph of the whole batch."""
    case = BY_NAME[name]
    how = oracle.gradients_alone if dtype == torch.float64 else oracle.gradients_in_graph
    sides = [
        oracle.trajectory_gradients(case.model(dtype), loss, rows, case.states(dtype), case.names(), how)
        for loss, rows in (
            (case.loss, case.rows(N, seed=1, dtype=dtype)),
            (case.query_loss or case.loss, case.rows(M, seed=2, dtype=dtype)),
        )
    ]
    return Truth(
        scores=oracle.scores(*sides, case.rates()),
        own=oracle.self_influence(sides[0], case.rates()),
        cosines=oracle.normalized_scores(*sides, PLAIN),
    )


@dataclass
class Run:
    """A case wired to tracin, and the rows it is asked about."""

    case: Case
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.model = self.case.model(self.dtype)
        next(self.model.children(), self.model).eval()  # modes that differ must come back as they were
        self.train = self.case.rows(N, seed=1, dtype=self.dtype)
        self.queries = self.case.rows(M, seed=2, dtype=self.dtype)

    def method(self, rates: Any = None, **options: Any) -> tracin.TracInCP:
        case = self.case
        task = tracin.Task(self.model, case.loss, query_loss=case.query_loss, parameters=case.parameters)
        trajectory = tracin.Trajectory(
            [
                tracin.Checkpoint(state, learning_rate=rate)
                for state, rate in zip(case.states(self.dtype), rates or case.rates(), strict=True)
            ]
        )
        return tracin.TracInCP(task, trajectory, device="cpu", progress=False, **options)

    def ask(self, verb: str, *data: Any, rates: Any = None, k: int | None = None, **options: Any) -> Any:
        """The verb's result, or None where the case may refuse and did; the model and the data untouched."""
        extra = {} if k is None else {"k": k}
        refusals = (LossError, ModelError) if self.case.may_refuse else ()
        with oracle.untouched(self.model, self.train, self.queries):
            try:
                return getattr(self.method(rates, **options), verb)(*data, **extra)
            except refusals:
                return None
