"""How well the rows' sum must agree with the optimizer's gradient: where it cancels, and along random directions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tracin
from tracin.errors import LoopError
from tracin.gradients.blocks import Block, Dense, Outer, Rows, Sum
from tracin.methods.online.segment import Segment
from tracin.methods.online.sums import DIRECTIONS, _drawn, captured

EPS = torch.finfo(torch.float32).eps


def net() -> nn.Sequential:
    """Batch norm takes the mean off δ of the convolutions, and the pixels are far from 0: 784 summands a row cancel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        second = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def sound() -> nn.Sequential:
    """The same along one axis, with one channel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Conv1d(1, 1, 3, padding=1), nn.BatchNorm1d(1), nn.ReLU()]
        return nn.Sequential(*first, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(4, 3))


def train(noise: float, layer: int, name: str, model: nn.Sequential | None = None) -> None:
    """One step whose gradient of a parameter is off by so many epsilons of what was added up to it."""
    size_of, generator = (28, 28) if model is None else (784,), torch.Generator().manual_seed(1)
    model = net() if model is None else model
    x = 1 + 0.1 * torch.rand(8, 1, *size_of, generator=generator)
    y = torch.randint(0, 3, (8,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["x"] = inputs[0].detach()
        output.register_hook(lambda delta: seen.update(d=delta))

    with tracin.OnlineTracIn(task, optimizer, (x[:2], y[:2]), 8) as online, online.step(torch.arange(8)):
        handle = model[layer].register_forward_hook(keep)
        F.cross_entropy(model(x), y).backward()
        handle.remove()
        gradient = model[layer].get_parameter(name).grad
        assert gradient is not None
        # ‖Σ_t |δ_t| |a_t|‖, entry by entry, by autograd of a convolution of absolute values.
        weight = torch.zeros_like(model[layer].weight, requires_grad=True)
        kind = type(model[layer])
        apply = {nn.Conv2d: F.conv2d, nn.Conv1d: F.conv1d, nn.Linear: F.linear}[kind]
        out = apply(seen["x"].abs(), weight, **({} if kind is nn.Linear else {"padding": 1}))
        (size,) = torch.autograd.grad((out * seen["d"].abs()).sum(), [weight])
        direction = torch.randn(gradient.shape, generator=generator)
        gradient += noise * EPS * size.norm() * direction / direction.norm()
        optimizer.step()


@pytest.mark.parametrize("layer", [0, 3])
def test_rounding_within_rows_is_no_residue(layer: int) -> None:
    train(30, layer, "weight")


def test_nor_where_a_row_is_one_channel_long() -> None:
    train(30, 0, "weight", sound())
    with pytest.raises(LoopError, match=r"gradient of 0\.weight is off by"):
        train(3e4, 0, "weight", sound())


@pytest.mark.parametrize("layer", [0, 3])
def test_what_is_no_rounding_is_one(layer: int) -> None:
    with pytest.raises(LoopError, match=rf"gradient of {layer}\.weight is off by"):
        train(3e4, layer, "weight")


def test_a_layer_used_once_in_a_row_has_no_such_room() -> None:
    with pytest.raises(LoopError, match=r"gradient of 8\.weight is off by"):
        train(3000, 8, "weight")


OUT, IN = 40, 60


def factors() -> dict[str, Block]:
    """Gradients of a weight [OUT, IN] of nine rows, as each kind of block has them."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    outer = Outer(drawn(9, 4, IN), drawn(9, 4, OUT))
    rows = Rows(torch.randint(0, OUT, (9, 5), generator=generator), drawn(9, 5, IN), OUT)
    dense = Dense(drawn(9, OUT * IN))
    return {
        "outer": outer,
        "rows": rows,
        "dense beside outer": Sum((outer, dense)),
        "tied": Sum((outer, rows)),
    }


@pytest.mark.parametrize("kind", factors())
def test_a_sum_along_directions_is_that_of_the_sum(kind: str) -> None:
    block = factors()[kind]
    weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.float64))
    first, second = (
        Segment(rows=n, blocks={("w",): [part]}) for n, part in ((5, block.rows(0, 5)), (4, block.rows(5, 9)))
    )
    found = captured([first, second], {"w": weight}, ["w"])
    assert found.totals["w"].shape == (DIRECTIONS * OUT,)
    oracle.assert_close(found.totals["w"], found.seen("w", block.total()), 1e-12, kind)


def test_a_bias_beside_it_is_added_up_itself() -> None:
    block = factors()["outer"]
    assert isinstance(block, Outer)
    block = Outer(block.a, block.d, bias=0.5)
    traced = {"w": nn.Parameter(torch.zeros(OUT, IN).double()), "b": nn.Parameter(torch.zeros(OUT).double())}
    found = captured([Segment(rows=9, blocks={("w", "b"): [block]})], traced, ["w", "b"])
    weight, bias = block.total().split([OUT * IN, OUT])
    oracle.assert_close(found.totals["w"], found.seen("w", weight), 1e-12, "weight")
    oracle.assert_close(found.totals["b"], bias, 1e-12, "bias")


def test_directions_keep_the_norm_in_the_mean() -> None:
    """V Rᵀ has the norm of R up to chance, for a residue in one entry and for one in all."""
    for at in range(40):
        v = _drawn(1000 + at, torch.float64, torch.device("cpu"))
        one, all_ = v[:, 7], v @ torch.ones(v.shape[1], dtype=v.dtype) / v.shape[1] ** 0.5
        for seen in (one, all_):
            assert 0.1 < float(seen.norm()) < 3


def wide() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(30, 50), nn.Flatten(), nn.Linear(200, 60), nn.ReLU(), nn.Linear(60, 3)
        )


def train_wide(change: Callable[[nn.Sequential], None]) -> None:
    """One step of a network whose sums are compared along directions, with its gradients changed before it."""
    model, generator = wide(), torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 30, (8, 4), generator=generator), torch.randint(0, 3, (8,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    task = tracin.Task(model, tracin.losses.cross_entropy)
    with tracin.OnlineTracIn(task, optimizer, (x[:2], y[:2]), 8) as online, online.step(torch.arange(8)):
        F.cross_entropy(model(x), y).backward()
        change(model)
        optimizer.step()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_one_factor_is_found_along_directions() -> None:
    def clip(model: nn.Sequential) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    train_wide(clip)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
@pytest.mark.parametrize("place", ["one entry", "one row", "everywhere", "its own direction"])
def test_a_residue_is_seen_along_directions(name: str, place: str) -> None:
    """Ten times the tolerance, wherever it lies, and of another factor than the rest."""

    def disturb(model: nn.Sequential) -> None:
        gradient = gradients(model)[name]
        residue = torch.zeros_like(gradient)
        if place == "one entry":
            residue[3, 5] = 1.0
        elif place == "one row":
            residue[2] = 1.0
        else:
            residue = torch.ones_like(gradient) if place == "everywhere" else gradient.clone()
        total = torch.stack([g.norm() for g in gradients(model).values()]).norm()
        gradient += 1e-2 * total * residue / residue.norm()

    with pytest.raises(LoopError, match=rf"gradient of {name.replace('.', '[.]')} is off by"):
        train_wide(disturb)
