"""What a case is, how its rows and checkpoints are made, and the losses that most cases share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[[int, torch.Generator], Tensor]  # rows, generator -> [n, ...]


def normal(*shape: int) -> Maker:
    """Rows of normal numbers."""
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def integers(low: int, high: int, *shape: int) -> Maker:
    """Rows of whole numbers in [low, high)."""
    return lambda n, generator: torch.randint(low, high, (n, *shape), generator=generator)


def bits(*shape: int) -> Maker:
    """Rows of zeros and ones, as floats."""
    return lambda n, generator: torch.randint(0, 2, (n, *shape), generator=generator).double()


def wave(model: nn.Module, batch: Any) -> Tensor:
    """Σ sin(out) + 0.1 out² of each row: smooth, and its slope differs from entry to entry."""
    return wave_of(model(*batch))


def wave_of(out: Tensor) -> Tensor:
    """The same for an output [n, ...] that is already there."""
    flat = out.reshape(len(out), -1)
    return (flat.sin() + 0.1 * flat.square()).sum(dim=1)


@dataclass(frozen=True)
class Case:
    """A model, a maker of rows, a loss per row; ``may_refuse``: an error of ours is as good as an exact score."""

    name: str
    build: Callable[[], nn.Module]
    data: Sequence[Maker] | Mapping[str, Maker]
    loss: Callable[[Any, Any], Tensor] = wave
    query_loss: Callable[[Any, Any], Tensor] | None = None
    parameters: str | tuple[str, ...] = "*"
    traced: Callable[[str], bool] = lambda name: True
    may_refuse: bool = False
    tolerance32: float = 1e-5

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A fresh model, the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return self.build().to(dtype)

    def rows(self, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Any:
        """A batch of n rows, the same at every call."""
        generator = torch.Generator().manual_seed(seed)

        def make(maker: Maker) -> Tensor:
            made = maker(n, generator)
            return made.to(dtype) if made.is_floating_point() else made

        if isinstance(self.data, Mapping):
            return {key: make(maker) for key, maker in self.data.items()}
        return tuple(make(maker) for maker in self.data)

    def states(self, dtype: torch.dtype = torch.float64, count: int = 2) -> list[dict[str, Tensor]]:
        """Checkpoints: the fresh model with noise on every parameter, and running statistics of a used model."""
        found = []
        for index in range(count):
            model, generator = self.model(dtype), torch.Generator().manual_seed(100 + index)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(0.2 * noise.to(dtype))
                for name, buffer in model.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.copy_(torch.randn(buffer.shape, generator=generator))
                    elif name.endswith("running_var"):
                        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            found.append({key: value.detach().clone() for key, value in model.state_dict().items()})
        return found

    def names(self) -> list[str]:
        """The parameters that must be traced."""
        named = self.model().named_parameters()
        return [name for name, parameter in named if parameter.requires_grad and self.traced(name)]

    def rates(self) -> list[float | dict[str, float]]:
        """One rate for the first checkpoint, one per parameter for the second; none is 1."""
        return [0.3, {name: (0.05, 0.11, 0.02)[index % 3] for index, name in enumerate(self.names())}]
