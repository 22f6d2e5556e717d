"""The check on the first batch: what it compares, what it demotes, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradients.common import (
    build,
    by_parameter,
    gradients_of,
    judged,
    keys_of,
    normal,
    route,
    source_of,
    traced,
    wave,
    wired,
)
from tracin.data import Batch
from tracin.errors import DataError, LossError
from tracin.gradients import reference
from tracin.gradients.blocks import Block, Dense
from tracin.gradients.check import checked_gradients
from tracin.gradients.engine import BatchGradients, Source


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def ready(n: int = 5, dtype: torch.dtype = torch.float64, loss: Any = wave, batch_size: int = 100) -> Source:
    return wired(source_of(build(net, dtype), (normal(n, 3, seed=1, dtype=dtype),), loss, batch_size))


def first_batch(source: Source) -> Batch:
    return next(iter(source.rows.batches()))


def check(source: Source, first: bool = True, batch: Batch | None = None) -> BatchGradients:
    batch = batch or first_batch(source)
    return checked_gradients(source, keys_of(source), batch, batch.value, traced(source), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_sound_gradients_pass(n: int, dtype: torch.dtype) -> None:
    source = ready(n, dtype)
    found = check(source)
    assert not found.losses.requires_grad, "the graph is let go after the check"
    assert source.wiring is not None
    assert not source.wiring.by_row, source.wiring.reasons
    assert not source.wiring.pending
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in by_parameter(found, traced(source)).items():
        torch.testing.assert_close(value, judged(source)[name], rtol=limit, atol=limit)


@pytest.mark.parametrize("wrong", [False, True], ids=["sound", "wrong"])
def test_a_sum_that_autograd_rounds_is_judged_row_by_row(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 autograd's own sum over a batch can be off, as that of a convolution's bias whose pixels cancel."""
    source = ready()
    if wrong:
        broken(source, "0", times(1 + 1e-6))

    summed = reference.summed

    def rounded(*args: Any) -> dict[str, Tensor]:
        found = summed(*args)
        return {name: value * (1 + 1e-5) if name == "0.bias" else value for name, value in found.items()}

    monkeypatch.setattr(reference, "summed", rounded)
    check(source)
    assert set(source.wiring.by_row) == ({"0.weight", "0.bias"} if wrong else set()), source.wiring.reasons


def broken(source: Source, site: str, change: Callable[[Tensor], Tensor]) -> None:
    """The route of one site made wrong after the wiring."""
    assert source.wiring is not None
    here = source.wiring.rules[site]

    def wrong(*args: Any) -> dict[tuple[str, ...], Block]:
        found = {}
        for roles, block in here.rule.compute(*args).items():
            splits = tuple(here.module.get_parameter(role).numel() for role in roles)
            found[roles] = Dense(change(block.materialise().clone()), splits)
        return found

    changed = replace(here, rule=replace(here.rule, compute=wrong))
    source.found = replace(source.wiring, rules={**source.wiring.rules, site: changed})


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda values: values * factor


def _set(values: Tensor, at: Any, value: Tensor | float) -> Tensor:
    values[at] = value
    return values


BOTH = {"0.weight", "0.bias"}
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "all by 1e-6": (times(1 + 1e-6), BOTH),
    "one row by a thousandth": (lambda v: _set(v, 2, v[2] * 1.001), BOTH),
    "one entry of one row": (lambda v: _set(v, (3, 5), v[3, 5] + 1e-3), {"0.weight"}),
    "one entry of the bias": (lambda v: _set(v, (1, 13), v[1, 13] + 1e-3), {"0.bias"}),
    "one row twice": (lambda v: _set(v, 1, v[0]), BOTH),
    "the other sign": (times(-1), BOTH),
    "nothing": (times(0), BOTH),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_sum_over_the_batch_sees_every_row(name: str) -> None:
    change, expected = CHANGES[name]
    source = ready()
    broken(source, "0", change)
    found = check(source)
    assert source.wiring is not None
    assert set(source.wiring.by_row) == expected, f"{name}: {source.wiring.reasons}"
    for parameter, value in by_parameter(found, traced(source)).items():
        torch.testing.assert_close(value, judged(source)[parameter], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_weights_of_the_check_are_divided_out(n: int) -> None:
    """The batch that was checked gives bit for bit what the same batch gives unchecked."""
    source = ready(n, torch.float32)
    checked = by_parameter(check(source), traced(source))
    _, plain = gradients_of(source)
    for name, value in by_parameter(plain, traced(source)).items():
        assert torch.equal(checked[name], value), f"{name}: the check left its weights in the gradients"


def test_what_fails_goes_row_by_row_and_the_rest_stays(caplog: pytest.LogCaptureFixture) -> None:
    source = ready()
    broken(source, "0", times(1.001))
    with caplog.at_level(logging.WARNING, "tracin"):
        found = check(source)
    assert {name: route(source, name) for name in traced(source)} == {
        "0.weight": "by row",
        "0.bias": "by row",
        "2.weight": "rule Linear",
        "2.bias": "rule Linear",
    }
    assert source.wiring is not None
    assert "off by 1.0e-03" in source.wiring.reasons["0.weight"]
    assert "0.weight, 0.bias went to the row-by-row route (train)" in caplog.text
    for name, value in by_parameter(found, traced(source)).items():
        torch.testing.assert_close(value, judged(source)[name], rtol=1e-10, atol=1e-12)


def test_a_later_batch_is_not_checked_again() -> None:
    source = ready(batch_size=3, n=7)
    check(source)
    broken(source, "0", times(1.001))
    second = list(source.rows.batches())[1]
    check(source, first=False, batch=second)
    assert route(source, "0.weight") == "rule Linear", "only the first batch pays for the check"


def test_a_parameter_that_waits_is_checked_in_the_first_batch_that_can() -> None:
    """Rows 0 to 2 and the probe's rows have zero loss: nothing could be compared before the second batch."""
    x = torch.cat([normal(6, 3, seed=1), torch.zeros(6, 1, dtype=torch.float64)], 1)
    x[4:, 3] = 1.0
    probe = source_of(build(net), (x,), lambda m, b: wave(m, (b[0][:, :3],)) * b[0][:, 3], batch_size=2)

    class Firsts:
        """The source's rows, with the probe kept to rows of zero loss."""

        def __init__(self) -> None:
            self.name, self.sizes, self.batches = "train", probe.rows.sizes, probe.rows.batches
            self.take = probe.rows.take

        def __len__(self) -> int:
            return 3

    full, probe.rows = probe.rows, Firsts()
    source = wired(probe)
    source.rows = full
    assert source.wiring is not None
    assert source.wiring.pending == set(traced(source))
    broken(source, "0", times(1.001))
    first, second, third = source.rows.batches()
    check(source, first=True, batch=first)
    assert source.wiring.pending == set(traced(source))
    check(source, first=False, batch=second)
    assert route(source, "0.weight") == "rule Linear"
    check(source, first=False, batch=third)
    assert route(source, "0.weight") == "by row", "the first batch with a gradient must be compared"
    assert route(source, "2.weight") == "rule Linear"
    assert not source.wiring.pending


class Later:
    """A loss that mixes rows only after the wiring, so that the check on the first batch is the one to see it."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        self.mix, self.on = mix, False

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = wave(model, batch)
        return self.mix(losses) if self.on else losses


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda losses: losses - losses.mean(),
    "divided by the batch": lambda losses: losses / len(losses),
    "softmax over rows": lambda losses: losses.softmax(0),
    "cumulative": lambda losses: losses.cumsum(0),
    "rolled": lambda losses: losses.roll(1),
    "turned around": lambda losses: losses.flip(0),
}
mixing = pytest.mark.parametrize("name", MIXING)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@dtypes
@mixing
def test_a_loss_that_mixes_rows_is_refused_on_the_first_batch(name: str, dtype: torch.dtype) -> None:
    loss = Later(MIXING[name])
    source = ready(dtype=dtype, loss=loss)
    loss.on = True
    with pytest.raises(LossError, match=r"the loss of row \d+ is .*mixes rows"):
        check(source)


@dtypes
@mixing
def test_a_loss_that_mixes_rows_is_refused_by_the_wiring(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(LossError, match=r"the loss of row \d+ is .*mixes rows"):
        ready(dtype=dtype, loss=lambda model, batch: MIXING[name](wave(model, batch)))


def test_a_batch_of_one_row_is_compared_with_the_row_doubled() -> None:
    """Alone is what it is already; beside itself, a division by the batch size shows."""
    loss = Later(MIXING["divided by the batch"])
    source = ready(n=1, loss=loss)
    check(source)
    loss.on = True
    with pytest.raises(LossError, match="mixes rows"):
        check(source)


def test_a_batch_of_two_rows_is_not_compared_with_another_batch_of_two() -> None:
    loss = Later(MIXING["divided by the batch"])
    source = ready(n=2, loss=loss)
    loss.on = True
    with pytest.raises(LossError, match="mixes rows"):
        check(source)


def test_rounding_is_no_mixing() -> None:
    """Float32 losses that differ in the last bits between batches, as products of other shapes do."""
    loss = Later(lambda losses: losses * (1 + 1e-7 * len(losses)) + 1e-6 * losses.mean())
    source = ready(dtype=torch.float32, loss=loss)
    loss.on = True
    check(source)


def test_one_far_row_does_not_hide_a_small_one() -> None:
    """Row 0 is a thousand times smaller than the largest, and a tenth of it is another row's."""
    loss = Later(lambda losses: torch.cat([1e-3 * losses[:1] + 1e-4 * losses[1:2], losses[1:]]))
    source = ready(loss=loss)
    loss.on = True
    with pytest.raises(LossError, match="row 0"):
        check(source)


class Augmented(Dataset):
    """Another picture whenever it is read, once it is turned on."""

    def __init__(self) -> None:
        self.generator, self.on = torch.Generator().manual_seed(0), False
        self.x = normal(5, 3, seed=1)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, at: int) -> tuple[Tensor]:
        noise = torch.randn(3, generator=self.generator, dtype=torch.float64)
        return (self.x[at] + 0.01 * noise * self.on,)


def test_a_dataset_that_gives_another_row_when_asked_again_is_refused() -> None:
    data = Augmented()
    source = wired(source_of(build(net), data))
    check(source)
    data.on = True
    with pytest.raises(
        DataError, match=r"train: row \d came back different when it was read again.*augmentation"
    ):
        check(source)
