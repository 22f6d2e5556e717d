"""What happens to a ledger from outside: parameters frozen and unfrozen, other optimizers, other ledgers, its own end."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin
from methods.online.common import Loop, N, Q, batches, ledger, net, query_losses, replay, rows, sgd
from methods.online.test_models import Recurrent, build
from tracin.errors import IncompleteLedgerWarning, LoopError, NotFiniteError

IDS = torch.tensor([3, 1, 4])


def backward(model: nn.Module, data: tuple[Tensor, Tensor], ids: Tensor = IDS) -> None:
    model.zero_grad()
    F.cross_entropy(model(data[0][ids]), data[1][ids]).backward()


def one_step(
    online: tracin.OnlineTracIn, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any
) -> None:
    with online.step(IDS):
        backward(model, data)
        optimizer.step()


def test_a_parameter_unfrozen_later_is_named() -> None:
    model, data = net(), rows(N, 1)
    model[0].requires_grad_(False)
    optimizer = sgd()(model)
    online = ledger(model, rows(Q, 2))(optimizer)
    one_step(online, model, optimizer, data)
    model[0].requires_grad_(True)
    before = model[0].weight.clone()
    with pytest.raises(
        LoopError, match=r"0\.weight has a gradient, and the ledger does not trace it.*make a new one"
    ):
        one_step(online, model, optimizer, data)
    assert torch.equal(before, model[0].weight)
    online.close()
    one_step(ledger(model, rows(Q, 2))(optimizer), model, optimizer, data)


def test_a_layer_replaced_later_is_named() -> None:
    model, data = net(), rows(N, 1)
    optimizer = sgd()(model)
    online = ledger(model, rows(Q, 2))(optimizer)
    model[2] = nn.Linear(6, 3).double()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    with pytest.raises(LoopError, match=r"2\.weight .*replaced"):
        one_step(online, model, optimizer, data)


def test_parameters_that_the_optimizer_does_not_move_may_be_unfrozen() -> None:
    model, data = net(), rows(N, 1)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    online = ledger(model, rows(Q, 2))(optimizer)
    model[0].requires_grad_(True)
    one_step(online, model, optimizer, data)
    assert online.steps == 1


@pytest.mark.parametrize("inside", [False, True])
def test_a_parameter_frozen_later_is_named(inside: bool) -> None:
    model, data = net(), rows(N, 1)
    optimizer = sgd()(model)
    online = ledger(model, rows(Q, 2))(optimizer)
    one_step(online, model, optimizer, data)

    def freeze(*_: Any) -> None:
        model[0].requires_grad_(False)

    if inside:
        model.register_forward_pre_hook(freeze)
    else:
        freeze()
    with pytest.raises(LoopError, match=r"0\.weight was frozen after the ledger was made"):
        one_step(online, model, optimizer, data)


def both_step(
    online: tracin.OnlineTracIn,
    model: nn.Module,
    first: torch.optim.Optimizer,
    second: torch.optim.Optimizer,
    data: Any,
) -> None:
    with online.step(IDS):
        backward(model, data)
        first.step()
        second.step()


def two_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model[at].parameters(), lr=0.2) for at in (0, 2)]


def in_turns(
    model: nn.Module, ledgers: list[Any], optimizers: list[torch.optim.Optimizer], steps: int
) -> None:
    """Blocks of each ledger; a step without a block where there is None."""
    data = rows(N, 1)
    for _ in range(steps):
        for online, optimizer in zip(ledgers, optimizers, strict=True):
            if online is None:
                backward(model, data)
                optimizer.step()
            else:
                one_step(online, model, optimizer, data)


def test_another_optimizer_outside_of_the_steps_is_told_once() -> None:
    model = net()
    optimizers = two_optimizers(model)
    online = ledger(model, rows(Q, 2))(optimizers[0])
    with pytest.warns(
        IncompleteLedgerWarning, match=r"2\.weight changed between.*into one optimizer"
    ) as told:
        in_turns(model, [online, None], optimizers, 4)
    assert len(told) == 1


def test_ledgers_of_two_optimizers_in_turns_add_up() -> None:
    model, queries = net(), rows(Q, 2)
    optimizers = two_optimizers(model)
    ledgers = [ledger(model, queries)(optimizer) for optimizer in optimizers]
    start = query_losses(model, queries)
    with pytest.warns(IncompleteLedgerWarning) as told:
        in_turns(model, ledgers, optimizers, 3)
    assert len(told) == 2
    total = ledgers[0].scores("ideal").values.sum(1) + ledgers[1].scores("ideal").values.sum(1)
    oracle.assert_close(total, start - query_losses(model, queries), 1e-10)


def test_another_optimizer_in_the_block_is_refused() -> None:
    model, data = net(), rows(N, 1)
    mine, other = two_optimizers(model)
    online = ledger(model, rows(Q, 2))(mine)
    with pytest.raises(LoopError, match=r"changed inside the with block before.*another optimizer"):
        both_step(online, model, other, mine, data)


def test_thinned_ledgers_expect_changes_between_their_steps() -> None:
    model = net()
    online = Loop(sgd(), batches(5)).run(model, rows(N, 1), ledger(model, rows(Q, 2), every=2))
    assert len(online.report()) == 3


def test_running_statistics_of_a_pass_between_steps_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    data, optimizer = rows(N, 1), sgd()(model)
    online = ledger(model, rows(Q, 2))(optimizer)
    for _ in range(2):
        one_step(online, model, optimizer, data)  # the passes inside are its own
    model(data[0])
    with pytest.warns(IncompleteLedgerWarning, match=r"1\.running_(mean|var) changed"):
        one_step(online, model, optimizer, data)


@pytest.mark.parametrize("make", [net, lambda: build(Recurrent)], ids=["layers", "module under vmap"])
def test_two_ledgers_of_one_optimizer(make: Any) -> None:
    shape = (4,) if isinstance(make(), nn.Sequential) else (3, 4)
    loop, data = Loop(sgd(), batches(4)), rows(N, 1, shape=shape)
    queries = [rows(Q, 2, shape=shape), rows(Q, 5, shape=shape)]
    truths = [replay(make(), loop, data, some) for some in queries]
    model = make()
    optimizer = sgd()(model)
    first, second = (ledger(model, some)(optimizer) for some in queries)
    for ids in loop.steps:
        with first.step(ids), second.step(ids):
            optimizer.zero_grad()
            loop.loss(model, data, ids, len(ids)).backward()
            optimizer.step()
    for online, truth in zip((first, second), truths, strict=True):
        oracle.assert_close(online.scores().values, truth.first_order, 1e-10)
        oracle.assert_close(online.scores("ideal").values, truth.ideal, 1e-10)


def test_one_of_two_ledgers_is_not_asked() -> None:
    model, data = net(), rows(N, 1)
    optimizer = sgd()(model)
    first, second = (ledger(model, rows(Q, 2))(optimizer) for _ in range(2))
    with pytest.raises(LoopError, match="each ledger of an optimizer has its own"):
        one_step(first, model, optimizer, data)
    second.close()
    one_step(first, model, optimizer, data)


def test_a_ledger_that_nobody_holds_lets_the_optimizer_go() -> None:
    model, data = net(), rows(N, 1)
    optimizer = sgd()(model)
    online = ledger(model, rows(Q, 2))(optimizer)
    one_step(online, model, optimizer, data)
    gone = weakref.ref(online)
    del online
    gc.collect()
    assert gone() is None
    backward(model, data)
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_messages_about_numbers_speak_of_training() -> None:
    model, data = net(), rows(N, 1)
    optimizer = sgd()(model)
    online = ledger(model, rows(Q, 2))(optimizer)
    data[0][4, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"row 4 .*step 0.*or lower the learning rate\.$"):
        one_step(online, model, optimizer, data)
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    with pytest.raises(
        NotFiniteError, match=r"loss of row 0 is nan \(queries\).*or lower the learning rate\.$"
    ):
        one_step(online, model, optimizer, rows(N, 1))


def test_adam_without_epsilon_where_a_gradient_is_zero() -> None:
    model, (x, y) = net(), rows(N, 1)
    x[:, 2] = 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.0)
    online = ledger(model, rows(Q, 2), update="adam")(optimizer)
    with pytest.raises(NotFiniteError, match=r"step of 0\.weight divides by .*eps above 0"):
        one_step(online, model, optimizer, (x, y))
