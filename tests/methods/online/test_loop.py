"""Beside a loop: training is bit-identical, thinning, saving and going on, precision, and what a scaler does."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin
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
    query_gradients,
    query_losses,
    replay,
    row_terms,
    rows,
    sgd,
    two_groups,
)
from methods.online.test_models import ConvNet, Recurrent, build
from tracin.errors import IncompleteLedgerWarning, ResultError
from tracin.methods.online.records import read_ledger

PICTURES = (2, 4, 4)


def trained(model: nn.Module, loop: Loop, data: Any, online: Any = None) -> dict[str, Any]:
    """Everything that a run leaves behind."""
    torch.manual_seed(5)
    holder: list[torch.optim.Optimizer] = []
    loop.run(model, data, online, after=lambda _, optimizer: holder.append(optimizer))
    state = holder[-1].state_dict()["state"]
    found = oracle.snapshot(model)
    own = {key: value for key, value in found.items() if not key.startswith(("tensor", "grad of"))}
    own |= {name: oracle._bits(value) for name, value in model.state_dict().items()}
    own |= {f"grad {name}": oracle._bits(p.grad) for name, p in model.named_parameters()}
    own |= {
        f"state {at} {key}": oracle._bits(torch.as_tensor(value))
        for at, entries in state.items()
        for key, value in entries.items()
        if value is not None
    }
    return own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_training_is_bit_identical(dtype: torch.dtype, kind: str) -> None:
    make = {
        "sgd": sgd(0.2),
        "momentum": sgd(0.1, momentum=0.9, weight_decay=0.01),
        "adam": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    }[kind]
    update = {"sgd": "gradient"}.get(kind, kind)
    loop = Loop(make, batches(5), gamma=0.9, micro=2, clip=1.0)
    data, queries = rows(N, 1, dtype, PICTURES), rows(Q, 2, dtype, PICTURES)
    with torch.random.fork_rng():
        plain = trained(build(ConvNet).to(dtype), loop, data)
        model = build(ConvNet).to(dtype)
        beside = trained(model, loop, data, ledger(model, queries, update=update))
    assert oracle.differences(plain, beside) == []


def test_training_a_module_under_vmap_is_bit_identical() -> None:
    loop, data, queries = Loop(sgd()), rows(N, 1, shape=(3, 4)), rows(Q, 2, shape=(3, 4))
    with torch.random.fork_rng():
        plain = trained(build(Recurrent), loop, data)
        model = build(Recurrent)
        beside = trained(model, loop, data, ledger(model, queries))
    assert oracle.differences(plain, beside) == []


def interrupted(online: tracin.OnlineTracIn, model: nn.Module, x: Tensor) -> None:
    with online.step([0, 1]):
        model(x[:2])
        raise KeyboardInterrupt


def test_nothing_is_left_on_the_model() -> None:
    model, data, queries = net(), rows(N, 1), rows(Q, 2)
    optimizer = sgd()(model)
    with oracle.untouched(model, queries, data):
        with ledger(model, queries)(optimizer) as online, pytest.raises(KeyboardInterrupt):
            interrupted(online, model, data[0])
        assert online.steps == 0
    optimizer.step()  # closed: no one listens


@pytest.mark.parametrize("every", [2, 3])
def test_every_thins(every: int) -> None:
    loop, data, queries = Loop(two_groups(), batches(7), gamma=0.9), rows(N, 1), rows(Q, 2)
    truth = replay(net(), loop, data, queries, gradient_form, every)
    model = net()
    online = loop.run(model, data, ledger(model, queries, every=every))
    oracle.assert_close(online.scores("first_order").values, truth.first_order, 1e-10)
    oracle.assert_close(online.scores("ideal").values, truth.ideal, 1e-10)
    assert online.report().steps.tolist() == list(range(0, 7, every))
    assert online.steps == 7
    assert len(online.report()) == len(truth.own)


FORMS = {
    "gradient": (two_groups(), gradient_form),
    "momentum": (sgd(0.1, momentum=0.9), momentum_form),
    "adam": (two_groups(torch.optim.AdamW), adam_form),
}


@pytest.mark.parametrize("update", FORMS)
def test_saved_and_gone_on_with(update: str, tmp_path: Path) -> None:
    make, form = FORMS[update]
    loop, data, queries = Loop(make, batches(6), micro=2), rows(N, 1), rows(Q, 2)
    truth = replay(net(), loop, data, queries, form)
    model = net()
    task, optimizer = tracin.Task(model, tracin.losses.cross_entropy), make(model)
    first = tracin.OnlineTracIn(task, optimizer, queries, N, update=update)
    loop.run(model, data, lambda _: first, optimizer=optimizer, steps=loop.steps[:3])
    first.save(tmp_path / "runs" / "ledger.safetensors")
    first.close()
    resumed = copy.deepcopy(model)
    again = make(resumed)
    again.load_state_dict(optimizer.state_dict())
    task = tracin.Task(resumed, tracin.losses.cross_entropy)
    online = tracin.OnlineTracIn.load(tmp_path / "runs" / "ledger.safetensors", task, again, queries)
    for kind in ("first_order", "ideal"):
        assert torch.equal(online.scores(kind).values, first.scores(kind).values)
    loop.run(resumed, data, lambda _: online, optimizer=again, steps=loop.steps[3:])
    oracle.assert_close(online.scores("first_order").values, truth.first_order, 1e-10)
    oracle.assert_close(online.scores("ideal").values, truth.ideal, 1e-10)
    oracle.assert_close(
        online.report().carried, truth.carried, 1e-10, "carried", float(truth.own.abs().max())
    )
    assert online.report().steps.tolist() == list(range(6))


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    model, queries = net(), rows(Q, 2)
    task, optimizer = tracin.Task(model, tracin.losses.cross_entropy), sgd()(net())
    online = tracin.OnlineTracIn(task, sgd()(model), queries, N)
    path = tmp_path / "ledger.safetensors"
    online.save(path)
    online.scores().save(tmp_path / "scores.safetensors")
    optimizer = sgd()(model)
    load = tracin.OnlineTracIn.load
    with pytest.raises(ResultError, match=r"scores\.safetensors is no saved ledger"):
        load(tmp_path / "scores.safetensors", task, optimizer, queries)
    with pytest.raises(ResultError, match=r"missing\.safetensors does not exist"):
        load(tmp_path / "missing.safetensors", task, optimizer, queries)
    with pytest.raises(tracin.errors.DataError, match="other queries"):
        load(path, task, optimizer, rows(Q, 9))
    with pytest.raises(ResultError, match="not this task's"):
        load(path, tracin.Task(model, task.loss, parameters="0.*"), optimizer, queries)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ResultError, match="damaged"):
        load(path, task, optimizer, queries)
    optimizer.step()  # a refused ledger does not listen


def test_a_flipped_byte_is_refused_wherever_it_is(tmp_path: Path) -> None:
    model, queries = net(), rows(Q, 2)
    task, path = tracin.Task(model, tracin.losses.cross_entropy), tmp_path / "ledger.safetensors"
    Loop(sgd()).run(model, rows(N, 1), ledger(model, queries)).save(path)
    whole = path.read_bytes()
    seen = whole.index(b'seen\\": 6') + len(b'seen\\": ')
    for at in [seen, *range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ResultError, match=r"ledger\.safetensors"):
            read_ledger(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        ResultError, match=r"is damaged: its numbers are not those that were saved. Save the ledger"
    ):
        tracin.OnlineTracIn.load(path, task, sgd()(model), queries)


class Words(nn.Module):
    """Reads lists of words, which hold no tensor to tell them by."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, words: list[str]) -> Tensor:
        return self.net(torch.stack([rows(1, len(word))[0][0] for word in words]))


def first_class(model: nn.Module, words: Any) -> Tensor:
    return model([str(word) for word in words]).logsumexp(1)


def test_queries_that_cannot_be_told_apart_warn(tmp_path: Path) -> None:
    model, path = Words(), tmp_path / "ledger.safetensors"
    task = tracin.Task(model, first_class)
    words, others = ["a", "bcd", "ef"], torch.arange(3)

    def load(queries: Any) -> Any:
        return tracin.OnlineTracIn.load(path, task, sgd()(model), queries, collate=collate)

    def collate(found: list) -> Any:
        return found if isinstance(found[0], str) else torch.stack(found)

    tracin.OnlineTracIn(task, sgd()(model), words, N, collate=collate).save(path)
    with pytest.warns(UserWarning, match="3 of 3 queries hold no tensor with a row per example"):
        load(["x", "yz", "abc"])
    with pytest.raises(tracin.errors.DataError, match="other queries"):
        load(list(others))


@pytest.mark.parametrize("case", ["plain", "batch norm"])
def test_complete_in_float32(case: str) -> None:
    shape, make = ((4,), net) if case == "plain" else (PICTURES, lambda: build(ConvNet))
    data, queries = rows(N, 1, torch.float32, shape), rows(Q, 2, torch.float32, shape)
    with torch.random.fork_rng():
        model = make().float()
        start = query_losses(model, queries).double()
        loop = Loop(sgd(0.5), batches(30), gamma=0.97)
        online = loop.run(model, data, ledger(model, queries))
    total = start - query_losses(model, queries).double()
    moved = online.report().change.abs().sum(0)
    assert bool(((online.scores("ideal").values.sum(1) - total).abs() <= 1e-5 * moved).all())
    assert online.scores("ideal").values.dtype == torch.float64


def test_first_order_in_float32_is_that_of_float64() -> None:
    loop = Loop(two_groups(), batches(10), micro=2, clip=0.5)
    truth = replay(net(), loop, rows(N, 1), rows(Q, 2))
    model = net(torch.float32)
    online = loop.run(model, rows(N, 1, torch.float32), ledger(model, rows(Q, 2, torch.float32)))
    oracle.assert_close(online.scores().values, truth.first_order, 1e-4)


def test_one_row_per_step_is_the_measured_change() -> None:
    """TracInIdeal itself: every row gets the change of the step that it made."""
    steps = [torch.tensor([at]) for at in range(N)]
    model, queries = net(), rows(Q, 2)
    seen = [query_losses(model, queries)]
    loop = Loop(sgd(), steps)
    online = loop.run(
        model, rows(N, 1), ledger(model, queries), after=lambda *_: seen.append(query_losses(model, queries))
    )
    changes = torch.stack([a - b for a, b in pairwise(seen)], 1)
    oracle.assert_close(online.scores("ideal").values, changes, 1e-10)


def test_weights_changed_between_steps_are_seen() -> None:
    """The queries' gradients kept from the step before are not used after somebody moved the weights."""
    loop, data, queries = Loop(sgd(), batches(4)), rows(N, 1), rows(Q, 2)

    def shrink(model: nn.Module) -> Any:
        def after(at: int, _: Any) -> None:
            for parameter in model.parameters():
                parameter.data.mul_(0.9)  # a change that leaves no trace in the version counter

        return after

    twin, model = net(), net()
    terms = torch.zeros(Q, N, dtype=torch.float64)

    def read(at: int, optimizer: Any) -> None:
        g = query_gradients(twin, queries)
        for row, term in zip(
            loop.steps[at].tolist(), row_terms(twin, loop, data, loop.steps[at]), strict=True
        ):
            terms[:, row] += 0.3 * g @ term

    loop.run(twin, data, before=read, after=shrink(twin))
    with pytest.warns(IncompleteLedgerWarning, match=r"0\.weight changed between two steps") as told:
        online = loop.run(model, data, ledger(model, queries), after=shrink(model))
    assert len(told) == 1
    oracle.assert_close(online.scores().values, terms, 1e-10)


def test_gradient_scaler() -> None:
    """A scaler's factor is found; a step that it skips is not recorded, and training goes on."""
    model, data, queries = net(torch.float32), rows(N, 1, torch.float32), rows(Q, 2, torch.float32)
    optimizer = sgd()(model)
    online = ledger(model, queries)(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = copy.deepcopy(model.state_dict())
    for at, ids in enumerate(batches(3)):
        with online.step(ids):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data[0][ids]), data[1][ids])
            scaler.scale(loss * (float("inf") if at == 0 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert at or all(
            torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
        )
    assert online.steps == len(online.report()) == 2
    loop = Loop(sgd(), batches(3)[1:])
    truth = replay(net(), loop, rows(N, 1), rows(Q, 2))
    oracle.assert_close(online.scores().values, truth.first_order, 1e-4)


def test_query_loss_and_collate() -> None:
    """Queries under a loss of their own, from a dataset."""

    class Margins(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return Q

        def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
            x, y = rows(Q, 2)
            return x[at], y[at]

    def margin(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return -logits.gather(1, batch[1][:, None])[:, 0].square()

    model, data = net(), rows(N, 1)
    task = tracin.Task(model, tracin.losses.cross_entropy, query_loss=margin)
    optimizer = sgd()(model)
    x, y = rows(Q, 2)
    start = margin(model, (x, y)).detach()
    with tracin.OnlineTracIn(task, optimizer, Margins(), N, batch_size=3) as online:
        Loop(sgd()).run(model, data, lambda _: online, optimizer=optimizer)
    total = start - margin(model, (x, y)).detach()
    assert float((online.scores("ideal").values.sum(1) - total).abs().max()) < 1e-10


def test_provenance_and_scores_are_plain_results(tmp_path: Path) -> None:
    model = net()
    online = Loop(sgd()).run(model, rows(N, 1), ledger(model, rows(Q, 2)))
    scores = online.scores("ideal")
    assert scores.provenance["method"] == "OnlineTracIn"
    assert (scores.provenance["recorded"], scores.provenance["every"]) == (6, 1)
    assert json.dumps(dict(scores.provenance))
    scores.save(tmp_path / "scores.safetensors")
    assert torch.equal(tracin.Scores.load(tmp_path / "scores.safetensors").values, scores.values)
    assert scores.train_ids.tolist() == list(range(N))


def test_the_judge_sees_a_planted_error() -> None:
    loop, data, queries = Loop(sgd()), rows(N, 1), rows(Q, 2)
    truth = replay(net(), loop, data, queries)
    wrong = replay(net(), loop, data, queries, lambda model, optimizer, rates: rates / 5)
    with pytest.raises(AssertionError, match=r"best overall factor 0\.2"):
        oracle.assert_close(wrong.first_order, truth.first_order, 1e-10)


@pytest.mark.parametrize("make", [net, lambda: build(ConvNet), lambda: build(Recurrent)])
def test_a_step_leaves_no_tensors_to_the_collector(make: Callable[[], nn.Module]) -> None:
    """Gradients of whole steps would pile up until Python looks for circles."""
    model, loop = make(), Loop(sgd(0.05))
    shape = {nn.Sequential: (4,), ConvNet: PICTURES}.get(type(model), (5, 4))
    data, optimizer = rows(N, 1, shape=shape), loop.make(model)
    online = ledger(model, rows(Q, 2, shape=shape))(optimizer)
    loop.run(model, data, lambda _: online, optimizer=optimizer)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        loop.run(model, data, lambda _: online, optimizer=optimizer)
        gc.collect()
        left = [tuple(thing.shape) for thing in gc.garbage if isinstance(thing, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        online.close()
    assert left == []
