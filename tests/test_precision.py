"""bfloat16, and models and losses of more than one precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from cases import BY_NAME, wave, wave_of
from cases.table import normal
from judged import PLAIN, M, N, Run, truth


def test_bfloat16_accumulates_in_float32() -> None:
    case = BY_NAME["mlp_relu"]
    run = Run(case, torch.bfloat16)
    found = run.ask("influence", run.train, run.queries, batch_size=16)
    assert found.values.dtype == torch.float32
    oracle.assert_close(found.values, truth(case.name, torch.bfloat16).scores, 2e-2)


class TwoPrecisions(nn.Module):
    """A float32 body under a float64 head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.float()).tanh().double())


def _two_precisions() -> nn.Module:
    model = TwoPrecisions()
    model.head.double()
    return model


class WideNorm(nn.LayerNorm):
    """Computes in float64 and hands on float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double()).float()


def _with_wide_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), WideNorm(4, dtype=torch.float64), nn.Linear(4, 2))


def _wide_loss(model: nn.Module, batch: Any) -> Tensor:
    return wave_of(model(*batch).double())


@pytest.mark.parametrize(
    ("name", "build", "loss"),
    [
        ("float64_loss_of_a_float32_model", BY_NAME["mlp_relu"].build, _wide_loss),
        ("float64_head_on_a_float32_body", _two_precisions, wave),
        ("float64_norm_in_a_float32_model", _with_wide_norm, wave),
    ],
)
def test_more_than_one_precision(name: str, build: Any, loss: Any) -> None:
    """The rows' losses carry float32 noise whatever their dtype: that is no mixing of rows."""

    def fresh() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return build()

    states = [fresh().state_dict()] * 2
    train, queries = (normal(4)(n, torch.Generator().manual_seed(n)).float() for n in (N, M))
    sides = [
        oracle.trajectory_gradients(fresh(), loss, (rows,), states, how=oracle.gradients_in_graph)
        for rows in (train, queries)
    ]
    model = fresh()
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=rate) for state, rate in zip(states, PLAIN, strict=True)]
    )
    method = tracin.TracInCP(
        tracin.Task(model, loss), trajectory, batch_size=16, device="cpu", progress=False
    )
    with oracle.untouched(model):
        found = method.influence((train,), (queries,))
    oracle.assert_close(found.values, oracle.scores(*sides, PLAIN), 1e-5)
