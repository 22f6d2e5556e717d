"""How well the rows' sum must agree with the optimizer's gradient, where what is added up cancels within a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tracin
from tracin.errors import LoopError

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
