"""Which route each parameter takes: row axes by probing, uses by counting, and nothing taken on trust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from gradients.common import (
    assert_exact,
    build,
    gradients_of,
    normal,
    route,
    source_of,
    traced,
    wave,
    wired,
)
from tracin.errors import UserCodeError
from tracin.gradients.layout import Layout
from tracin.gradients.rules import RULES
from tracin.gradients.sites import RuleSite, Wiring


def wiring_of(make: Callable[[], nn.Module], *rows: Tensor, loss: Any = wave) -> tuple[Any, Wiring]:
    source = wired(source_of(build(make), rows, loss))
    assert source.wiring is not None
    return source, source.wiring


class TimeFirst(nn.Module):
    """Rows on axis 1 of what the layers see."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.transpose(0, 1))[0]).transpose(0, 1)


@pytest.mark.parametrize("steps", [2, 3, 4, 5], ids=lambda steps: f"{steps} steps")
def test_the_row_axis_is_never_guessed_from_a_length(steps: int) -> None:
    """The probe runs three and four rows: with three or four steps, both axes have the length of the rows."""
    source, wiring = wiring_of(TimeFirst, normal(steps, steps, 3, seed=1))
    (layout,) = wiring.locals["rnn"].layouts
    assert layout.inputs == (Layout(1),), f"rows stand on axis 1 of {steps} × rows × 3"
    assert layout.outputs[0] == Layout(1)
    (linear,) = wiring.rules["out"].layouts
    assert linear.inputs == linear.outputs == (Layout(1),)
    assert not wiring.by_row
    assert_exact(source)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_rows_are_repeated_for_the_probe(n: int) -> None:
    source, wiring = wiring_of(TimeFirst, normal(n, 3, 3, seed=1))
    assert wiring.locals["rnn"].layouts[0].inputs == (Layout(1),)
    assert_exact(source)


class Windows(nn.Module):
    """Each row cut into entries that stand on the row axis, side by side or one after another."""

    def __init__(self, row_major: bool) -> None:
        super().__init__()
        self.layer, self.row_major = nn.Linear(3, 2), row_major

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        flat = x.reshape(n * t, 3) if self.row_major else x.transpose(0, 1).reshape(t * n, 3)
        out = torch.tanh(self.layer(flat))
        return out.view(n, t, 2) if self.row_major else out.view(t, n, 2).transpose(0, 1)


@pytest.mark.parametrize("row_major", [True, False])
@pytest.mark.parametrize("t", [2, 3])
def test_several_entries_per_row(row_major: bool, t: int) -> None:
    source, wiring = wiring_of(lambda: Windows(row_major), normal(5, t, 3, seed=1))
    (layout,) = wiring.rules["layer"].layouts
    assert layout.outputs == (Layout(0, t, row_major),)
    assert layout.inputs == (Layout(0, t, row_major),)
    assert_exact(source)


class Reordered(nn.Module):
    """The layer sees the rows in an order of its own, and gives them back in theirs."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.order = nn.Linear(3, 2), order

    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        return torch.tanh(self.layer(x[order]))[order.argsort()]


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sorted": lambda x: x[:, 0].argsort(),
    "reversed": lambda x: torch.arange(len(x)).flip(0),
    "rolled": lambda x: torch.arange(len(x)).roll(1),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("already", [True, False], ids=["in order already", "out of order"])
def test_rows_that_a_layer_sees_in_another_order(name: str, already: bool) -> None:
    """Rows sorted before the probe look untouched; only the same rows in reverse show the sorting."""
    x = normal(6, 3, seed=1)
    if already:
        x = x[x[:, 0].argsort()]
    source, wiring = wiring_of(lambda: Reordered(ORDERS[name]), x)
    assert "layer" not in wiring.rules, f"{name}: the layer's rows are not the batch's, yet its rule is used"
    assert "layer.weight" in wiring.reasons
    assert_exact(source)


def test_the_reverse_run_is_what_catches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case above can fail: without the comparison in reverse, sorted rows pass for rows in order."""
    monkeypatch.setattr("tracin.gradients.probe._turns_with_the_rows", lambda *_: True)
    x = normal(6, 3, seed=1)
    _, wiring = wiring_of(lambda: Reordered(ORDERS["sorted"]), x[x[:, 0].argsort()])
    assert "layer" in wiring.rules


class Uses(nn.Module):
    """A weight of two layers, a layer called twice, a weight used functionally, an idle one."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.tied, self.twin = (nn.Linear(3, 3) for _ in range(4))
        self.twin.weight = self.tied.weight
        self.outside, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(self.once(x)))))
        x = torch.tanh(self.twin(torch.tanh(self.tied(x))))
        return self.outside(x) @ self.outside.weight


def test_uses_are_counted_in_the_graph() -> None:
    source, wiring = wiring_of(Uses, normal(5, 3, seed=1))
    names = {name: wiring.uses.get(name) for name in traced(source)}
    assert names == {
        "once.weight": (1, 1),
        "once.bias": (1, 1),
        "twice.weight": (2, 2),
        "twice.bias": (2, 2),
        "tied.weight": (2, 2),
        "tied.bias": (1, 1),
        "twin.bias": (1, 1),
        "outside.weight": (2, 1),  # one call of the module around both uses
        "outside.bias": (1, 1),
        "idle.weight": None,
        "idle.bias": None,
    }
    assert set(wiring.unused) == {"idle.weight", "idle.bias"}
    assert route(source, "idle.weight") == "unused"
    assert wiring.route("outside.weight") == "vmap Uses"
    assert all(wiring.route(name) == "rule Linear" for name in ("once.weight", "twice.bias", "tied.weight"))
    assert_exact(source)


class Switched(nn.Module):
    """Whether a layer is used, and how often, depends on a row's first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.always(x))
        if bool((x[:, 0] > 50).any()):
            out = torch.where((x[:, :1] > 50), torch.tanh(self.sometimes(self.sometimes(out))), out)
        return out


def test_an_unused_parameter_that_is_used_in_a_later_batch() -> None:
    x = normal(7, 3, seed=1)
    x[4, 0] = 60.0  # the probe runs rows 0, 3 and 6
    source = wired(source_of(build(Switched), (x,)))
    assert source.wiring is not None
    assert set(source.wiring.unused) == {"sometimes.weight", "sometimes.bias"}
    assert_exact(source)
    assert len(source.irregular["sometimes.weight"]) == 7


def test_a_layer_called_more_often_in_a_later_batch() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.tanh(self.layer(x))
            return torch.where(x[:, :1] > 50, self.layer(out), out) if bool((x[:, 0] > 50).any()) else out

    x = normal(7, 3, seed=1)
    x[4, 0] = 60.0
    source = wired(source_of(build(Repeated), (x,)))
    assert route(source, "layer.weight") == "rule Linear"
    assert_exact(source)


class Adapted(nn.Module):
    """A frozen layer with a low-rank change B A, where B starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.A, self.B = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


def adapted_states() -> list[dict[str, Tensor]]:
    first, second = (build(Adapted, seed=seed).state_dict() for seed in (1, 2))
    first["B.weight"] = torch.zeros_like(first["B.weight"])
    return [first, second]


def adapted_method(batch_size: int = 3) -> tracin.TracInCP:
    rates = [0.3, 0.07]
    checkpoints = [
        tracin.Checkpoint(s, learning_rate=r) for s, r in zip(adapted_states(), rates, strict=True)
    ]
    task = tracin.Task(build(Adapted), wave)
    return tracin.TracInCP(
        task, tracin.Trajectory(checkpoints), batch_size=batch_size, device="cpu", progress=False
    )


def adapted_truth(train: Any, queries: Any) -> Tensor:
    sides = [
        oracle.trajectory_gradients(build(Adapted), wave, rows, adapted_states()) for rows in (train, queries)
    ]
    return oracle.scores(*sides, [0.3, 0.07])


def test_a_gradient_of_zero_proves_nothing() -> None:
    model = build(Adapted)
    model.load_state_dict(adapted_states()[0])
    source = wired(source_of(model, (normal(5, 3, seed=1),)))
    assert source.wiring is not None
    assert source.wiring.pending == {"A.weight"}
    assert route(source, "A.weight") == "rule Linear", (
        "pending: on its route, and compared where it is not zero"
    )
    assert_exact(source)


@pytest.mark.parametrize("verb", ["influence", "top_k", "self_influence"])
def test_a_pending_parameter_is_compared_at_the_second_checkpoint(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that is wrong for A cannot be caught at the first checkpoint, where A's gradient is zero."""
    sound = RULES[nn.Linear]

    def wrong(layer: nn.Linear, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Any:
        found = sound.compute(layer, x, d, wanted)
        weights = d.new_full((len(d),), 1.001)
        return {
            k: block.weighted(weights) if layer.out_features == 2 else block for k, block in found.items()
        }

    monkeypatch.setitem(RULES, nn.Linear, replace(sound, compute=wrong))
    train, queries = (normal(7, 3, seed=1),), (normal(4, 3, seed=2),)
    truth = adapted_truth(train, queries)
    method = adapted_method()
    if verb == "self_influence":
        truth = adapted_truth(train, train).diagonal()
        found = method.self_influence(train)
        values = found.values
    elif verb == "top_k":
        found = method.top_k(train, queries, k=7)
        values = torch.empty(4, 7, dtype=torch.float64).scatter_(
            1, found.proponents.ids, found.proponents.values
        )
    else:
        found = method.influence(train, queries)
        values = found.values
    assert found.provenance["coverage"].get("by row") == 6, f"A stayed on {found.provenance['coverage']}"
    oracle.assert_close(values, truth, 1e-10, f"{verb} with a wrong rule for a parameter that was pending")


def test_a_sound_pending_parameter_keeps_its_route() -> None:
    train, queries = (normal(7, 3, seed=1),), (normal(4, 3, seed=2),)
    found = adapted_method().influence(train, queries)
    assert found.provenance["coverage"] == {"rule Linear": 14, "frozen": 16}
    oracle.assert_close(found.values, adapted_truth(train, queries), 1e-10)


def test_a_tied_weight_is_one_parameter() -> None:
    """Its cross terms count: the gradient is the sum over both layers before any product."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(6, 4)
            self.out = nn.Linear(4, 6, bias=False)
            self.out.weight = self.words.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.out(torch.tanh(self.words(index).mean(1)))

    index = torch.randint(0, 6, (5, 3), generator=torch.Generator().manual_seed(1))
    source, wiring = wiring_of(Tied, index)
    assert set(wiring.rules) == {"words", "out"}
    assert wiring.uses["words.weight"] == (2, 2)
    assert_exact(source)
    _, found = gradients_of(source)
    assert list(found.blocks) == [("words.weight",)]


def test_only_what_is_traced_is_recorded() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.free = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.free(torch.tanh(self.frozen(x)))

    source, wiring = wiring_of(Half, normal(5, 3, seed=1))
    assert set(wiring.sites()) == {"free"}
    site = wiring.rules["free"]
    assert isinstance(site, RuleSite)
    assert site.roles == {"weight": "free.weight", "bias": "free.bias"}
    assert_exact(source)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_model_that_cannot_run_three_rows_is_named(limit: int) -> None:
    class Few(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > limit:
                raise ValueError("fewer rows, please")
            return super().forward(x)

    source = source_of(build(lambda: Few(3, 2)), (normal(5, 3, seed=1),))
    with pytest.raises(UserCodeError, match=r"rows 0, 2, 4.*fewer rows, please") as caught:
        wired(source)
    assert isinstance(caught.value.__cause__, ValueError)
