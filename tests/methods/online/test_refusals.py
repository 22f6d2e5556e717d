"""What a ledger cannot follow is an error that names it and says the mend, before the optimizer moves anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tracin
from methods.online.common import N, Q, ledger, net, rows, sgd, two_groups
from tracin.errors import (
    AdaptiveOptimizerWarning,
    DataError,
    LoopError,
    ModelError,
    NotFiniteError,
    OptionError,
)

IDS = torch.tensor([3, 1, 4])


class Bench:
    """A model, its optimizer and a ledger, ready for one step."""

    def __init__(self, make: Any = None, **options: Any) -> None:
        self.model, self.data, self.queries = net(), rows(N, 1), rows(Q, 2)
        self.optimizer = (make or sgd())(self.model)
        self.online = ledger(self.model, self.queries, **options)(self.optimizer)

    def backward(self, ids: Tensor = IDS, extra: Tensor | float = 0.0) -> None:
        loss = F.cross_entropy(self.model(self.data[0][ids]), self.data[1][ids])
        (loss + extra).backward()

    def unmoved(self) -> bool:
        return all(
            torch.equal(a, b) for a, b in zip(net().parameters(), self.model.parameters(), strict=True)
        )


def stepped(bench: Bench, steps: int = 1) -> None:
    with bench.online.step(IDS):
        bench.backward()
        for _ in range(steps):
            bench.optimizer.step()


def outside(bench: Bench) -> None:
    bench.backward()
    bench.optimizer.step()


def backward_outside(bench: Bench) -> None:
    bench.backward()
    with bench.online.step(IDS):
        bench.optimizer.step()


def backward_partly_outside(bench: Bench) -> None:
    bench.backward(torch.tensor([5, 6]))
    with bench.online.step(IDS):
        bench.backward()
        bench.optimizer.step()


def forward_outside(bench: Bench) -> None:
    loss = F.cross_entropy(bench.model(bench.data[0][IDS]), bench.data[1][IDS])
    with bench.online.step(IDS):
        loss.backward()
        bench.optimizer.step()


def no_backward(bench: Bench) -> None:
    with bench.online.step(IDS):
        bench.model(bench.data[0][IDS])
        bench.optimizer.step()


def no_step(bench: Bench) -> None:
    with bench.online.step(IDS):
        bench.backward()


def nested(bench: Bench) -> None:
    with bench.online.step(IDS), bench.online.step(IDS):
        pass


def closure(bench: Bench) -> None:
    def again() -> Tensor:
        return F.cross_entropy(bench.model(bench.data[0]), bench.data[1])

    with bench.online.step(IDS):
        bench.backward()
        bench.optimizer.step(again)


def penalty(bench: Bench) -> None:
    with bench.online.step(IDS):
        bench.backward(extra=0.1 * bench.model[2].weight.square().sum())
        bench.optimizer.step()


def clipped_by_value(bench: Bench) -> None:
    with bench.online.step(IDS):
        bench.backward()
        torch.nn.utils.clip_grad_value_(bench.model.parameters(), 0.01)
        bench.optimizer.step()


def clipped_by_group(bench: Bench) -> None:
    with bench.online.step(IDS):
        bench.backward()
        torch.nn.utils.clip_grad_norm_(bench.model[0].parameters(), 0.01)
        bench.optimizer.step()


def moved_before(bench: Bench) -> None:
    with bench.online.step(IDS):
        bench.backward()
        with torch.no_grad():
            bench.model[0].bias.add_(1.0)
        bench.optimizer.step()


def backward_twice(bench: Bench) -> None:
    with bench.online.step(IDS):
        losses = F.cross_entropy(bench.model(bench.data[0][IDS]), bench.data[1][IDS], reduction="none")
        losses[:2].sum().backward(retain_graph=True)
        losses[2:].sum().backward()
        bench.optimizer.step()


def too_few_ids(bench: Bench) -> None:
    with bench.online.step(IDS[:2]):
        bench.backward()
        bench.optimizer.step()


def one_micro_batch_missing(bench: Bench) -> None:
    with bench.online.step([1, 2, 3]):
        bench.backward(torch.tensor([1, 2]))
        bench.optimizer.step()


def after_close(bench: Bench) -> None:
    bench.online.close()
    with bench.online.step(IDS):
        pass


LOOPS: dict[str, tuple[Callable[[Bench], None], type[Exception], str]] = {
    "a step outside": (outside, LoopError, r"outside of online\.step\(ids\).*online\.close\(\)"),
    "backward outside": (backward_outside, LoopError, "no differentiable forward pass"),
    "a backward too many": (backward_partly_outside, LoopError, r"2\.bias.*outside the with block|off by"),
    "forward outside": (forward_outside, LoopError, "no differentiable forward pass"),
    "no backward": (no_backward, LoopError, "no backward pass reached Sequential"),
    "no step": (no_step, LoopError, r"ended without optimizer\.step\(\)"),
    "nested": (nested, LoopError, "open already"),
    "closure": (closure, LoopError, r"optimizer\.step\(closure\)"),
    "penalty": (penalty, LoopError, r"gradient of 2\.weight is off by .*penalty"),
    "clipping by value": (clipped_by_value, LoopError, r"off by .*clipping by value"),
    "clipping per group": (
        clipped_by_group,
        LoopError,
        r"gradient of .* is off by .*2 parameters in all.*per group",
    ),
    "moved before": (moved_before, LoopError, "changed inside the with block"),
    "two passes": (backward_twice, LoopError, "two backward passes"),
    "too few ids": (too_few_ids, DataError, "2 ids for 3 rows in 1 micro-batches"),
    "a missing micro-batch": (one_micro_batch_missing, DataError, "3 ids for 2 rows"),
    "closed": (after_close, LoopError, "the ledger is closed"),
}


@pytest.mark.parametrize("case", LOOPS)
def test_a_loop_that_cannot_be_followed(case: str) -> None:
    run, kind, message = LOOPS[case]
    bench = Bench()
    with pytest.raises(kind, match=message):
        run(bench)
    if case != "moved before":
        assert bench.unmoved()
    assert bench.online.steps == 0
    assert not bench.online.scores("ideal").values.any()


def test_two_steps_in_one_block() -> None:
    bench = Bench()
    with pytest.raises(LoopError, match="two optimizer steps"):
        stepped(bench, steps=2)
    assert bench.online.steps == 1


def test_the_next_step_goes_on_after_an_error() -> None:
    bench = Bench()
    with pytest.raises(LoopError):
        penalty(bench)
    with bench.online.step(IDS):
        bench.optimizer.zero_grad()
        bench.backward()
        bench.optimizer.step()
    assert bench.online.steps == 1
    assert bench.online.scores().values[:, IDS].all()


IDS_REFUSED: dict[str, tuple[Any, str]] = {
    "none": (None, "NoneType"),
    "empty": ([], r"shape \[0\]"),
    "scalar": (3, r"shape \[\]"),
    "matrix": (torch.zeros(2, 2, dtype=torch.int64), r"shape \[2, 2\]"),
    "floats": ([1.0, 2.0], "float32"),
    "mask": (torch.ones(3, dtype=torch.bool), "bool"),
    "negative": ([0, -1], "id -1 is out of range"),
    "too large": (np.array([0, N]), f"id {N} is out of range.*n_train={N}"),
    "text": (["a", "b"], "list"),
}


@pytest.mark.parametrize("case", IDS_REFUSED)
def test_ids(case: str) -> None:
    ids, message = IDS_REFUSED[case]
    bench = Bench()
    with pytest.raises(DataError, match=message), bench.online.step(ids):
        pass


def test_numpy_and_list_ids() -> None:
    bench = Bench()
    for ids in (np.array([3, 1, 4]), [3, 1, 4], (3, 1, 4)):
        with bench.online.step(ids):
            bench.optimizer.zero_grad()
            bench.backward()
            bench.optimizer.step()
    assert bench.online.steps == 3


def test_ids_are_needed_at_steps_left_out_too() -> None:
    bench = Bench(every=2)
    for _ in range(2):
        with bench.online.step(IDS):
            bench.optimizer.zero_grad()
            bench.backward()
            bench.optimizer.step()
    with pytest.raises(DataError, match="out of range"), bench.online.step([N]):
        pass
    with pytest.raises(LoopError, match=r"outside of online\.step"):
        outside(bench)


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters())


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "update": ({"update": "sgd"}, "Choose one of gradient, momentum, adam"),
    "momentum of adam": ({"make": adam, "update": "momentum"}, "describes SGD, and the optimizer is Adam"),
    "adam of sgd": ({"update": "adam"}, "describes Adam and AdamW, and the optimizer is SGD"),
    "adam of rmsprop": ({"make": rmsprop, "update": "adam"}, "optimizer is RMSprop"),
    "maximize": ({"make": sgd(maximize=True)}, "negative"),
    "momentum 1": ({"make": sgd(momentum=1.0), "update": "momentum"}, "no eventual effect"),
    "other parameters": ({"make": lambda _: sgd()(net())}, "none of the traced parameters"),
    "every": ({"every": 0}, "every is 0"),
    "every true": ({"every": True}, "every is True"),
    "n_train": ({"n": 0}, "n_train is 0"),
    "tables": (
        {"memory": 831},
        r"tables of 13 train rows × 4 queries take 832 bytes, and memory= allows 831\.",
    ),
    "gradients": ({"memory": 900}, r"4 queries take more than the 68 bytes that memory= leaves"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(OptionError, match=message), Bench(**options).online.step(IDS):
        pass


def test_kinds_of_scores() -> None:
    model = net()
    task = tracin.Task(model, tracin.losses.cross_entropy)
    online = tracin.OnlineTracIn(task, sgd()(model), rows(Q, 2), N)
    with pytest.raises(OptionError, match="'first_order' or 'ideal'"):
        online.scores("first")


def test_an_adaptive_optimizer_warns() -> None:
    with pytest.warns(AdaptiveOptimizerWarning, match=r"update='adam'.*carried"):
        Bench(adam)


def test_rows_that_mix_are_refused_and_model_keeps_its_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    with pytest.raises(ModelError, match="without running statistics"):
        ledger(model, rows(Q, 2))(sgd()(model))
    assert model[1].training


def test_a_collate_that_sorts_queries_is_refused() -> None:
    def by_size(found: list) -> Any:
        found = sorted(found, key=lambda row: float(row[0].sum()))
        return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])

    model = net()
    with pytest.raises(DataError, match="queries: the collate function does not keep the rows of a batch"):
        ledger(model, list(zip(*rows(Q, 2), strict=True)), collate=by_size)(sgd()(model))


def test_an_infinite_gradient_is_named() -> None:
    bench = Bench(two_groups())
    with torch.no_grad():
        bench.data[0][4, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"row 4 for .*weight.*step 0"):
        stepped(bench)


def test_a_query_that_is_not_finite_is_named() -> None:
    model = net()
    x, y = rows(Q, 2)
    x[2] = float("inf")
    with pytest.raises(NotFiniteError, match="loss of row 2"):
        ledger(model, (x, y))(sgd()(model))
