"""The judge is tested: every rule is made wrong in turn, and every time it is caught and the scores stay exact.

Twice: while the wiring looks for a route, and by the check on the first batch alone, when the rule goes wrong later.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import tracin
from gradients.common import keys_of, source_of, traced, wired
from gradients.layers import LAYERS, loss
from gradients.mutations import MUTATIONS, mutations_of
from tracin.gradients.check import checked_gradients
from tracin.gradients.engine import Source
from tracin.gradients.rules import RULES
from tracin.gradients.sites import Wiring
from tracin.scoring import run as run_module

SHARED = "shared by the rows"
N, M = 7, 3  # batches of 4: a whole one and a short one
RATES: list[Any] = [0.3, 0.07]

ALL = [
    (cls, name)
    for cls, case in LAYERS.items()
    for name in mutations_of(case.model(torch.float64).get_submodule("layer"))
]


def mutations(pairs: list[tuple[type[nn.Module], str]]) -> Any:
    return pytest.mark.parametrize(
        ("cls", "mutation"), pairs, ids=lambda value: value if isinstance(value, str) else value.__name__
    )


every_mutation = mutations(ALL)
# Whole gradients given to other rows keep the sum over the batch: the wiring and ``verify`` compare single rows.
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def test_every_rule_is_mutated() -> None:
    listed = {
        cls for cls, case in LAYERS.items() if mutations_of(case.model(torch.float64).get_submodule("layer"))
    }
    assert listed == set(RULES), "a rule without a mutation is a rule that nobody judges"
    named = {
        n for case in LAYERS.values() for n in mutations_of(case.model(torch.float64).get_submodule("layer"))
    }
    assert named == set(MUTATIONS)


def method(cls: type[nn.Module], dtype: torch.dtype = torch.float64) -> tracin.TracInCP:
    case = LAYERS[cls]
    states = [case.model(dtype, seed).state_dict() for seed in (11, 12)]
    trajectory = tracin.Trajectory(
        [tracin.Checkpoint(state, learning_rate=rate) for state, rate in zip(states, RATES, strict=True)]
    )
    task = tracin.Task(case.model(dtype), loss)
    return tracin.TracInCP(task, trajectory, batch_size=4, device="cpu", progress=False)


@cache
def truth(cls: type[nn.Module]) -> Tensor:
    case, dtype = LAYERS[cls], torch.float64
    states = [case.model(dtype, seed).state_dict() for seed in (11, 12)]
    sides = [
        oracle.trajectory_gradients(case.model(dtype), loss, case.rows(n, seed, dtype), states)
        for n, seed in ((N, 1), (M, 2))
    ]
    return oracle.scores(*sides, RATES)


def made_wrong(mutation: str, layer: nn.Module) -> set[str]:
    """Roles of the layer that a mutation makes wrong."""
    if mutation in {"weight dropped", "groups ignored", "padding ignored", "first token alone"}:
        return {"weight"}
    if mutation == "bias dropped":
        return {"bias"}
    if mutation == "axes swapped" and layer.weight.dim() > 1:  # type: ignore[operator, union-attr]
        return {"weight"}
    return {name for name, parameter in layer.named_parameters() if parameter is not None}


@every_mutation
def test_the_wiring_catches_it(cls: type[nn.Module], mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[cls]
    monkeypatch.setitem(RULES, cls, replace(rule, compute=MUTATIONS[mutation](rule.compute)))
    traced_by = method(cls)
    rows, queries = (LAYERS[cls].rows(n, seed, torch.float64) for n, seed in ((N, 1), (M, 2)))
    verified = traced_by.verify(rows)
    table = {row.parameter: row for row in verified.coverage.table}
    for role in made_wrong(mutation, traced_by.task.model.get_submodule("layer")):
        row = table[f"layer.{role}"]
        assert row.route != f"rule {cls.__name__}", (
            f"{role} is still traced by a rule that is wrong: {mutation}"
        )
        assert row.traced
        assert "off by" in row.reason, f"{role}: the reason {row.reason!r} does not tell the error"
    assert verified.exact, f"{mutation}: {verified}"
    oracle.assert_close(traced_by.influence(rows, queries).values, truth(cls), 1e-10, f"scores, {mutation}")


def broken(wiring: Wiring, cls: type[nn.Module], mutation: str) -> Wiring:
    """A sound wiring with the layer's rule gone wrong."""
    site = wiring.rules["layer"]
    wrong = replace(site, rule=replace(site.rule, compute=MUTATIONS[mutation](site.rule.compute)))
    return replace(wiring, rules={**wiring.rules, "layer": wrong})


@cache
def sound(cls: type[nn.Module], dtype: torch.dtype) -> Source:
    """A source with its routes found by sound rules."""
    case = LAYERS[cls]
    source = wired(source_of(case.model(dtype), case.rows(N, 1, dtype), loss))
    assert source.wiring is not None
    assert source.wiring.route("layer.weight").startswith("rule")
    return source


@cache
def sound_method(cls: type[nn.Module]) -> tuple[tracin.TracInCP, Any, Wiring]:
    """A method over a model whose routes were found by sound rules, and verified."""
    traced_by, rows, found = method(cls), LAYERS[cls].rows(N, 1, torch.float64), []
    with pytest.MonkeyPatch.context() as patch:
        wire = run_module.wire
        patch.setattr(run_module, "wire", lambda *args: found.append(wire(*args)) or found[0])
        assert traced_by.verify(rows).exact, "before the rule went wrong"
    return traced_by, rows, found[0]


@dtypes
@every_mutation
def test_the_first_batch_catches_it(
    cls: type[nn.Module], mutation: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """A rule may be right for the probe's rows and wrong for others."""
    source = replace(sound(cls, dtype))
    assert source.wiring is not None
    keys, parameters = keys_of(source), traced(source)
    source.found = broken(source.wiring, cls, mutation)
    batch = next(iter(source.rows.batches()))
    with caplog.at_level(logging.WARNING, "tracin"):
        found = checked_gradients(source, keys, batch, batch.value, parameters, first=True)
    wrong = [
        name for name in parameters if name.startswith("layer.") and source.wiring.route(name) == "by row"
    ]
    assert wrong, f"{cls.__name__}, {mutation}, {dtype}: not caught; routes {source.wiring.reasons}"
    for name in wrong:
        assert "off by" in source.wiring.reasons[name]
        assert name in caplog.text, "a parameter that leaves its route is named"
    losses = loss(source.root.model, batch.value)
    values = {}
    for names, block in found.blocks.items():
        sizes = [parameters[name].numel() for name in names]
        values |= dict(zip(names, block.materialise().split(sizes, 1), strict=True))
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    for row in range(N):
        grads = torch.autograd.grad(losses[row], list(parameters.values()), retain_graph=True)
        largest = max(float(g.abs().max()) for g in grads)
        for name, gradient in zip(parameters, grads, strict=True):
            worst = float((values[name][row] - gradient.reshape(-1)).abs().max())
            assert worst <= limit * largest, (
                f"row {row} of {name} is off by {worst / largest:.1e} after the check"
            )


@every_mutation
def test_verify_names_the_parameter(
    cls: type[nn.Module], mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``verify`` runs the always-on check: what went wrong after the wiring is named, and the rest is exact."""
    traced_by, rows, wiring = sound_method(cls)
    monkeypatch.setattr(run_module, "wire", lambda *_: broken(wiring, cls, mutation))
    verified = traced_by.verify(rows)
    named = [row for row in verified.coverage.table if row.reason.startswith("off by")]
    assert named, f"{cls.__name__}, {mutation}: verify says {verified}"
    assert all(row.parameter.startswith("layer.") and row.route == "by row" for row in named)
    assert verified.exact, "the slow route is not exact"


@every_mutation
def test_rows_of_verify_see_it_alone(
    cls: type[nn.Module], mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the always-on check turned off, the random rows of ``verify`` notice the rule that went wrong."""
    traced_by, rows, wiring = sound_method(cls)
    monkeypatch.setattr(run_module, "wire", lambda *_: broken(wiring, cls, mutation))
    monkeypatch.setattr(run_module.Run, "gradients", lambda *_: None)
    verified = traced_by.verify(rows)
    assert not verified.exact, f"{cls.__name__}, {mutation}: verify says {verified}"
    assert str(verified).startswith("NOT exact")
    worst = max(verified.errors, key=lambda name: verified.errors[name])
    assert worst.startswith("layer."), f"verify blames {worst}, not the layer whose rule is wrong"
