"""What the tape holds of a forward pass, and that nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
from gradients.common import build, normal
from tracin.gradients.capture import Tape, recording


def net() -> nn.Sequential:
    model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)))
    assert isinstance(model, nn.Sequential)
    return model


def sites(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name}


copying = pytest.mark.parametrize(
    "copied", [frozenset(), frozenset({"0", "1", "2"})], ids=["views", "copies"]
)


@copying
def test_a_call_holds_inputs_edges_and_shapes(copied: frozenset[str]) -> None:
    model, x = net(), normal(5, 3, seed=1)
    with recording(sites(model), copied) as tape:
        out = model(x)
    assert sorted(tape.calls) == ["0", "1", "2"]
    (call,) = tape.calls["0"]
    assert call.site == "0"
    assert torch.equal(call.args[0], x)
    assert not call.args[0].requires_grad
    assert not tape.calls["2"][0].args[0].requires_grad, (
        "inputs are detached: the tape keeps no graph of its own"
    )
    assert call.shapes == (torch.Size([5, 4]),)
    assert call.positions == (0,)
    (delta,) = torch.autograd.grad(out.sum(), call.edges)
    expected = (out.new_ones(5, 2) @ model[2].weight) * (F.linear(x, model[0].weight, model[0].bias) > 0)
    torch.testing.assert_close(delta, expected.detach())


def test_an_activation_in_place_does_not_move_the_edge() -> None:
    """The edge is the linear layer's own output, not what the activation made of it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1, inplace=True)).double()
    with recording({"0": model[0]}) as tape:
        out = model(normal(5, 3, seed=1))
    (delta,) = torch.autograd.grad(out.sum(), tape.calls["0"][0].edges)
    assert set(delta.unique().tolist()) == {0.1, 1.0}, "δ before the activation has its slopes in it"


@copying
def test_inputs_changed_in_place_are_noticed_or_copied(copied: frozenset[str]) -> None:
    model, x = net(), normal(5, 3, seed=1)
    before = x.clone()
    with recording(sites(model), copied) as tape:
        model(x)
        x.mul_(2)
    (call,) = tape.calls["0"]
    assert call.intact() == bool(copied), (
        "an input that changed later is not what the layer read, unless it was copied"
    )
    assert torch.equal(call.args[0], before if copied else x)
    assert tape.calls["2"][0].intact()


class Careless(nn.Module):
    """Changes its own input before it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) * self.weight


def test_a_module_that_writes_into_its_input_is_recorded_from_before() -> None:
    module = Careless()
    with recording({"": module}, frozenset({""})) as tape:
        module(torch.ones(2, 3))
    assert torch.equal(tape.calls[""][0].args[0], torch.ones(2, 3))


def test_calls_without_a_gradient_are_no_uses() -> None:
    model, x = net(), normal(5, 3, seed=1)
    with recording(sites(model)) as tape:
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        model[0](x)
    assert {site: len(calls) for site, calls in tape.calls.items()} == {"0": 1}
    frozen = net().requires_grad_(False)
    with recording(sites(frozen)) as tape:
        frozen(x)
    assert not tape.calls


@copying
def test_several_calls_in_order_and_by_keyword(copied: frozenset[str]) -> None:
    layer = nn.Linear(3, 4)
    with recording({"0": layer}, copied) as tape:
        layer(torch.zeros(2, 3))
        layer(input=torch.ones(5, 3))
    first, second = tape.calls["0"]
    assert (first.shapes[0][0], second.shapes[0][0]) == (2, 5)
    assert torch.equal(second.kwargs["input"], torch.ones(5, 3))
    assert second.args == ()


class Inside(nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        return x * self.weight if depth == 0 else self(x + 1, depth - 1)


def test_a_module_that_calls_itself_keeps_inputs_apart() -> None:
    module = Inside()
    with recording({"": module}, frozenset({""})) as tape:
        module(torch.zeros(2, 3))
    assert [float(call.args[0][0, 0]) for call in tape.calls[""]] == [2.0, 1.0, 0.0], (
        "the innermost returns first"
    )


def test_only_outputs_with_a_gradient_are_marked() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> dict[str, object]:
            out = self.layer(x)
            return {"index": out.argmax(1), "name": "several", "out": out, "rest": [out.detach(), out.sum()]}

    module = Several()
    with recording({"": module}) as tape:
        module(torch.zeros(2, 3))
    (call,) = tape.calls[""]
    assert call.shapes == (torch.Size([2, 4]), torch.Size([]))
    assert call.positions == (2, 4), "positions among the leaves: index 0, name 1, out 2, rest 3 and 4"


@copying
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_no_hook_stays(copied: frozenset[str], error: type[BaseException] | None) -> None:
    model = net()
    ending = nullcontext() if error is None else pytest.raises(error)
    with oracle.untouched(model), ending, recording(sites(model), copied) as tape:
        model(normal(5, 3, seed=1))
        if error is not None:
            raise error
    assert tape.closed
    model(normal(5, 3, seed=2))
    assert len(tape.calls["0"]) == 1, "a call after the block is not recorded"


@copying
def test_an_error_in_the_model_leaves_no_hook(copied: frozenset[str]) -> None:
    model = net()
    refused = pytest.raises(RuntimeError, match="shapes cannot be multiplied")
    with oracle.untouched(model), refused, recording(sites(model), copied):
        model(normal(5, 7, seed=1))
    with recording(sites(model), copied) as tape:
        model(normal(5, 3, seed=1))
    assert torch.equal(tape.calls["0"][0].args[0], normal(5, 3, seed=1)), (
        "inputs of the call that failed are gone"
    )


def test_a_hook_that_outlives_the_block_records_nothing() -> None:
    """A compiler or a copied module may hold on to the hooks: the closed tape ignores them."""
    model, x = net(), normal(5, 3, seed=1)
    held: list[Callable] = []
    with recording(sites(model), frozenset({"0"})) as tape:
        held += [*model[0]._forward_pre_hooks.values(), *model[0]._forward_hooks.values()]
    assert len(held) == 2
    held[0](model[0], (x,), {})
    held[1](model[0], (x,), {}, model[0](x))
    assert not tape.calls


def test_the_users_hooks_see_what_they_saw_before() -> None:
    """A user's hook that changes the output: the edge is the module's own output, before it."""
    layer = nn.Linear(3, 4)
    handle = layer.register_forward_hook(lambda module, args, output: 3 * output)
    with recording({"0": layer}) as tape:
        out = layer(torch.ones(2, 3))
    (delta,) = torch.autograd.grad(out.sum(), tape.calls["0"][0].edges)
    assert torch.equal(delta, torch.full((2, 4), 3.0))
    assert list(layer._forward_hooks) == [handle.id]


def test_a_tape_starts_open_and_empty() -> None:
    assert Tape() == Tape(calls={}, closed=False)
