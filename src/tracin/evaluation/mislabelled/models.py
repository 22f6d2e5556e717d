"""The models of the built-in data: plain modules, made for the shape of the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tracin.errors import OptionError

__all__ = ["build"]


def build(kind: str, shape: Sequence[int], classes: int, seed: int) -> nn.Sequential:
    """A model with freshly drawn weights; the global random state stays as it was.

    Args:
        kind: ``mlp``: 256 and 64 hidden units; ``cnn``: two convolutions (16, 32), each halved by a maximum, and 64
            hidden units; ``resnet``: three residual blocks (16, 32, 64 channels) with batch normalisation.
        shape: Of a picture: channels, height, width.
        classes: The number of classes.
        seed: Of the weights.

    Returns:
        The model; its last module is the linear head.

    Raises:
        OptionError: An unknown kind.

    Example:
        >>> build("cnn", (1, 8, 8), 10, seed=0)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    kinds = {"mlp": _mlp, "cnn": _cnn, "resnet": _resnet}
    if kind not in kinds:
        raise OptionError(f"model is {kind!r}: give {', '.join(kinds)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kinds[kind](tuple(shape), classes)


def _mlp(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def _cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


class _Block(nn.Module):
    """relu(F(x) + skip(x)), F two convolutions, each with batch normalisation (He et al. 2016)."""

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        skip = nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.skip = skip if wide != out or stride != 1 else nn.Identity()
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x) + self.skip(x))


def _resnet(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _Block(16, 16, 1),
        _Block(16, 32, 2),
        _Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
