"""First order against the brute-force sum over recorded steps, and completeness of the ideal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import oracle
from methods.online.common import (
    Loop,
    N,
    Q,
    adam_form,
    batches,
    gradient_form,
    ledger,
    momentum_form,
    net,
    replay,
    rows,
    sgd,
    two_groups,
)

Adam, AdamW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
CASES: dict[str, tuple[Loop, str, Any]] = {
    "plain": (Loop(sgd()), "gradient", gradient_form),
    "sum of losses": (Loop(sgd(0.05), reduction="sum"), "gradient", gradient_form),
    "schedule": (Loop(sgd(0.4), gamma=0.7), "gradient", gradient_form),
    "groups": (Loop(two_groups(), gamma=0.8), "gradient", gradient_form),
    "clipping": (Loop(two_groups(), clip=0.05), "gradient", gradient_form),
    "accumulation": (Loop(two_groups(), micro=3), "gradient", gradient_form),
    "loss scale": (Loop(sgd(), loss_scale=1024.0, micro=2, clip=0.3), "gradient", gradient_form),
    "one row": (Loop(sgd(), steps=batches(7, b=1)), "gradient", gradient_form),
    "gradient of momentum": (Loop(sgd(momentum=0.9, weight_decay=0.01)), "gradient", gradient_form),
    "momentum": (Loop(two_groups(momentum=0.8), gamma=0.9, clip=0.2), "momentum", momentum_form),
    "dampening": (Loop(two_groups(momentum=0.8, dampening=0.3)), "momentum", momentum_form),
    "nesterov": (Loop(sgd(momentum=0.7, nesterov=True, weight_decay=0.02)), "momentum", momentum_form),
    "no momentum": (Loop(sgd(weight_decay=0.02)), "momentum", momentum_form),
    "adam": (Loop(two_groups(Adam, betas=(0.8, 0.95)), gamma=0.9, micro=2), "adam", adam_form),
    "adam decay": (Loop(two_groups(Adam, weight_decay=0.1), clip=0.1), "adam", adam_form),
    "amsgrad": (Loop(two_groups(Adam, amsgrad=True)), "adam", adam_form),
    "adamw": (Loop(two_groups(AdamW, weight_decay=0.1, eps=1e-4)), "adam", adam_form),
}


@pytest.mark.parametrize("case", CASES)
def test_first_order_is_the_sum_over_steps(case: str) -> None:
    loop, update, form = CASES[case]
    data, queries = rows(N, 1), rows(Q, 2)
    truth = replay(net(), loop, data, queries, form)
    model = net()
    online = loop.run(model, data, ledger(model, queries, update=update))
    oracle.assert_close(online.scores("first_order").values, truth.first_order, 1e-10, case)
    oracle.assert_close(online.scores("ideal").values, truth.ideal, 1e-10, case)
    report = online.report()
    largest = float(truth.own.abs().max())
    for name in ("own", "carried", "change"):
        oracle.assert_close(getattr(report, name), getattr(truth, name), 1e-10, f"{case}: {name}", largest)
    # Completeness.
    total = truth.losses[0] - truth.losses[-1]
    assert float((online.scores("ideal").values.sum(1) - total).abs().max()) < 1e-10
