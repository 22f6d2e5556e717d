"""One typical model per layer type with a rule. A rule added to the registry needs an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradients.common import build, normal, seeded


class Around(nn.Module):
    """The layer with a module before and after it, as it stands in a model: δ is not constant, x has a gradient."""

    def __init__(self, before: nn.Module, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.layer(self.before(x))))


def words(n: int, seed: int) -> Tensor:
    index = torch.randint(0, 5, (n, 4), generator=seeded(seed))
    index[:, 0] = 2  # every row has the padding word
    return index


def numbers(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: normal(n, *shape, seed=seed)


@dataclass(frozen=True)
class Layer:
    """A model whose module ``layer`` is of the type, and a maker of its input."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensor]

    def model(self, dtype: torch.dtype, seed: int = 3) -> nn.Module:
        return build(self.make, dtype, seed)

    def rows(self, n: int, seed: int, dtype: torch.dtype) -> tuple[Tensor]:
        x = self.inputs(n, seed)
        return (x.to(dtype) if x.is_floating_point() else x,)


def _convolution(dims: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = getattr(nn, f"Conv{dims}d")(4, 2, 3, padding=1, stride=2, groups=2)
        return Around(nn.Identity(), layer, nn.Flatten())

    return make


def _transposed(dims: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = getattr(nn, f"ConvTranspose{dims}d")(2, 4, 3, padding=1, stride=2, output_padding=1, groups=2)
        return Around(nn.Identity(), layer, nn.Flatten())

    return make


def _normalised(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Around(nn.Identity(), layer(), nn.Flatten())


LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(lambda: Around(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)), numbers(5, 3)),
    nn.Conv1d: Layer(_convolution(1), numbers(4, 6)),
    nn.Conv2d: Layer(_convolution(2), numbers(4, 5, 4)),
    nn.Conv3d: Layer(_convolution(3), numbers(4, 3, 4, 3)),
    nn.ConvTranspose1d: Layer(_transposed(1), numbers(2, 4)),
    nn.ConvTranspose2d: Layer(_transposed(2), numbers(2, 3, 2)),
    nn.ConvTranspose3d: Layer(_transposed(3), numbers(2, 2, 3, 2)),
    nn.Embedding: Layer(lambda: Around(nn.Identity(), nn.Embedding(5, 5), nn.Linear(5, 2)), words),
    nn.LayerNorm: Layer(_normalised(lambda: nn.LayerNorm(4)), numbers(3, 4)),
    nn.RMSNorm: Layer(_normalised(lambda: nn.RMSNorm(4)), numbers(3, 4)),
    nn.GroupNorm: Layer(_normalised(lambda: nn.GroupNorm(2, 4)), numbers(4, 3)),
    nn.BatchNorm1d: Layer(_normalised(lambda: nn.BatchNorm1d(4)), numbers(4, 3)),
    nn.BatchNorm2d: Layer(_normalised(lambda: nn.BatchNorm2d(4)), numbers(4, 3, 2)),
    nn.BatchNorm3d: Layer(_normalised(lambda: nn.BatchNorm3d(4)), numbers(4, 2, 2, 2)),
}

# Other models that the same rules must keep on the fast route: padding modes, more axes, calls by keyword, ...
TYPICAL: dict[str, Layer] = {
    "linear without a bias": Layer(lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh()), numbers(3)),
    "linear over two token axes": Layer(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()), numbers(2, 3, 3)),
    "linear first in the model": Layer(lambda: nn.Linear(3, 4), numbers(3)),
    "linear after flatten": Layer(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), numbers(2, 3)),
    "linear over rows and tokens flattened": Layer(
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2), nn.Tanh(), nn.Unflatten(0, (-1, 4))), numbers(4, 3)
    ),
    "linear before an in-place activation": Layer(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), numbers(3)
    ),
    "conv padding same": Layer(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), numbers(2, 5, 5)),
    "conv padding valid": Layer(lambda: nn.Conv1d(2, 3, 3, padding="valid"), numbers(2, 6)),
    **{
        f"conv padding mode {mode}": Layer(
            lambda mode=mode: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), numbers(2, 5, 4)
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "conv depthwise": Layer(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), numbers(4, 4, 4)),
    "conv one by one": Layer(lambda: nn.Conv2d(4, 3, 1, bias=False), numbers(4, 3, 3)),
    "conv with a remainder": Layer(lambda: nn.Conv2d(2, 3, 2, stride=3), numbers(2, 7, 6)),
    "transposed conv with dilation": Layer(lambda: nn.ConvTranspose2d(2, 3, 2, dilation=2), numbers(2, 3, 3)),
    "embedding with a padding word": Layer(
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Linear(3, 2)), words
    ),
    "layer norm over two axes": Layer(lambda: nn.LayerNorm((3, 4)), numbers(2, 3, 4)),
    "layer norm of one vector": Layer(lambda: nn.LayerNorm(4, bias=False), numbers(4)),
    "batch norm of vectors": Layer(lambda: nn.BatchNorm1d(4), numbers(4)),
    "small convolutional network": Layer(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(), nn.Linear(4, 3),
        ),
        numbers(1, 8, 8),
    ),
}  # fmt: skip


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Σ sin(out) + 0.1 out² of each row."""
    flat = model(batch[0]).flatten(1)
    return (flat.sin() + 0.1 * flat.square()).sum(1)
