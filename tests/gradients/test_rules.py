"""Each layer type with a rule stays on the fast route, and subclasses keep it only where they compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradients.common import assert_exact, build, normal, source_of, traced, wired
from gradients.layers import LAYERS, TYPICAL, Layer, loss
from tracin.gradients import pictures, rules
from tracin.gradients.rules import RULES, rule_for

FLOAT64 = torch.float64
EVERY: dict[str, Layer] = {**{cls.__name__: case for cls, case in LAYERS.items()}, **TYPICAL}


def test_every_rule_has_a_case() -> None:
    assert set(LAYERS) == set(RULES), "give each rule a model in layers.py, and each model a rule"
    for cls, rule in RULES.items():
        assert rule.layer is cls
        assert isinstance(LAYERS[cls].model(FLOAT64).get_submodule("layer"), cls)


@pytest.mark.parametrize("name", EVERY)
def test_stays_on_the_fast_route_and_is_exact(name: str) -> None:
    case = EVERY[name]
    source = wired(source_of(case.model(FLOAT64), case.rows(6, 1, FLOAT64), loss))
    assert source.wiring is not None
    routes = {parameter: source.wiring.route(parameter) for parameter in traced(source)}
    off = {parameter: route for parameter, route in routes.items() if not route.startswith("rule")}
    assert not off, f"{name}: {off}, because {source.wiring.reasons}"
    assert not source.wiring.reasons
    assert_exact(source)
    assert not source.irregular, f"{name}: {dict(source.irregular)} rows went one by one"


@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_the_route_names_the_layer(cls: type[nn.Module]) -> None:
    case = LAYERS[cls]
    source = wired(source_of(case.model(FLOAT64), case.rows(6, 1, FLOAT64), loss))
    assert source.wiring is not None
    assert source.wiring.route("layer.weight") == f"rule {cls.__name__}"


HALVES = [
    (cls, role)
    for cls, case in LAYERS.items()
    for role in ("weight", "bias")
    if len(dict(case.model(FLOAT64).named_parameters())) > 1
    and hasattr(case.model(FLOAT64).get_submodule("layer"), role)
]


@pytest.mark.parametrize(
    ("cls", "role"), HALVES, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_one_of_weight_and_bias_frozen(cls: type[nn.Module], role: str) -> None:
    """The rule is asked for one role alone."""
    model = LAYERS[cls].model(FLOAT64)
    model.get_parameter(f"layer.{role}").requires_grad_(False)
    source = wired(source_of(model, LAYERS[cls].rows(6, 1, FLOAT64), loss))
    assert f"layer.{role}" not in traced(source)
    assert_exact(source)


class Named(nn.Linear):
    """A subclass that computes as its base does."""

    def extra(self) -> None:
        """Nothing."""


class Doubled(nn.Linear):
    """A subclass that computes in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    """Another way in: the method that the convolution's forward relies on."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight / weight.norm(), bias)


def test_a_subclass_keeps_the_rule_where_it_computes_the_same() -> None:
    assert rule_for(Named(2, 3)) is RULES[nn.Linear]
    assert rule_for(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 3)) is RULES[nn.Linear]
    assert rule_for(Doubled(2, 3)) is None
    assert rule_for(Standardised(1, 2, 3)) is None
    assert rule_for(nn.Bilinear(2, 3, 4)) is None
    assert rule_for(nn.Linear(2, 3)) is RULES[nn.Linear]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Sequential(nn.Flatten(), Doubled(32, 3)), "1.weight"),
        (lambda: nn.Sequential(Standardised(2, 3, 3), nn.Flatten()), "0.weight"),
    ],
    ids=["forward", "_conv_forward"],
)
def test_a_subclass_that_computes_otherwise_is_exact_off_the_rule(make: object, name: str) -> None:
    case = Layer(
        make, lambda n, seed: torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
    )  # type: ignore[arg-type]
    source = wired(source_of(case.model(FLOAT64), case.rows(5, 1, FLOAT64), loss))
    assert source.wiring is not None
    assert source.wiring.route(name).startswith("vmap")
    assert "has no rule" in source.wiring.reasons[name]
    assert_exact(source)


def test_a_method_put_on_one_layer_is_noticed() -> None:
    """``layer.forward = ...`` hides behind the class's own method; the comparison with autograd sees it."""
    model = build(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    layer = model[0]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.square(), layer.bias)
    source = wired(
        source_of(
            model, (torch.randn(5, 3, dtype=FLOAT64, generator=torch.Generator().manual_seed(1)),), loss
        )
    )
    assert source.wiring is not None
    assert not source.wiring.route("0.weight").startswith("rule")
    assert_exact(source)


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.BatchNorm2d, nn.Conv2d])
def test_weight_and_bias_are_read_in_one_go(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """What both parameters need is computed once, and each still comes as a block of its own."""
    model = LAYERS[cls].model(FLOAT64)
    source = wired(source_of(model, LAYERS[cls].rows(6, 1, FLOAT64), loss))
    (name, site), *_ = [(n, s) for n, s in source.wiring.rules.items() if isinstance(s.module, cls)]
    asked: list[frozenset[str]] = []

    def compute(layer: nn.Module, x: Tensor, d: Tensor, wanted: frozenset[str]) -> object:
        asked.append(wanted)
        return site.rule.compute(layer, x, d, wanted)

    monkeypatch.setitem(source.wiring.rules, name, replace(site, rule=replace(site.rule, compute=compute)))
    assert_exact(source)
    assert asked == [frozenset({"weight", "bias"})]


def test_a_convolution_that_is_called_twice_stays_on_the_fast_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its uses are added up in the order in which they come, which is not that of the weight."""
    monkeypatch.setattr(pictures, "kernel_first", lambda *_: True)
    common = nn.Conv2d(2, 2, 3, padding=1)
    model = build(lambda: nn.Sequential(common, nn.Tanh(), common, nn.Flatten(), nn.Linear(50, 3)), FLOAT64)
    source = wired(source_of(model, (normal(6, 2, 5, 5, seed=1), torch.arange(6) % 3), loss))
    assert source.wiring.route("0.weight").startswith("rule")
    assert_exact(source)


@pytest.mark.parametrize("cached", [1, 40, 1 << 18], ids=["row by row", "some tiles", "one tile"])
@pytest.mark.parametrize("k", [1, 2])
def test_batch_norm_where_channels_lie_side_by_side(
    cached: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums of δ x̂ and δ over pixels, by a route of their own, in tiles of rows."""
    monkeypatch.setattr(rules, "CACHED", cached)
    x, d = (normal(5, k, 3, 4, 2, seed=seed) for seed in (1, 2))
    mean, variance = normal(3, seed=3), normal(3, seed=4).square() + 0.1
    normalised = (x - mean[:, None, None]) / (variance + 1e-3).sqrt()[:, None, None]
    truth = (normalised * d).sum((1, 3, 4)), d.sum((1, 3, 4))
    turned = [leaf.movedim(2, -1).contiguous().movedim(-1, 2) for leaf in (x, d)]
    assert turned[0].stride(2) == 1
    for leaves in ((x, d), turned, (turned[0], d)):
        for found, expected in zip(rules.batch_norm_terms(*leaves, mean, variance, 1e-3), truth, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
