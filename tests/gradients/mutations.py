"""Wrong rules, made from right ones: what a mistake in a rule would look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tracin.gradients.blocks import Block, Dense, Outer

Compute = Callable[[Any, Tensor, Tensor, frozenset[str]], Mapping[tuple[str, ...], Block]]
Change = Callable[[Any, tuple[str, ...], Block], Block]


def _each(change: Change) -> Callable[[Compute], Compute]:
    """A mutation that changes every block that the rule makes."""

    def mutate(compute: Compute) -> Compute:
        def wrong(
            layer: Any, x: Tensor, d: Tensor, wanted: frozenset[str]
        ) -> Mapping[tuple[str, ...], Block]:
            return {
                roles: change(layer, roles, block) for roles, block in compute(layer, x, d, wanted).items()
            }

        return wrong

    return mutate


def _times(factor: float) -> Change:
    return lambda layer, roles, block: block.weighted(
        torch.full((len(block),), factor, dtype=block.rows(0, 1).materialise().dtype)
    )


def _without(role: str) -> Change:
    def change(layer: Any, roles: tuple[str, ...], block: Block) -> Block:
        if roles == ("weight", "bias"):
            assert isinstance(block, Outer)
            return replace(block, bias=0.0) if role == "bias" else replace(block, a=torch.zeros_like(block.a))
        return _times(0.0)(layer, roles, block) if role in roles else block

    return change


def _exchanged(layer: Any, roles: tuple[str, ...], block: Block) -> Block:
    """a and δ exchanged: the first two axes of the weight; of a vector, its entries in reverse."""
    if isinstance(block, Outer):
        return replace(block, a=block.d, d=block.a)
    shape = getattr(layer, roles[0]).shape
    values = block.materialise().view(-1, *shape)
    if len(shape) == 1:
        return Dense(values.flip(1))
    assert shape[0] == shape[1], (
        "the layer under test has as many inputs as outputs, so that the shapes allow it"
    )
    return Dense(values.transpose(1, 2).flatten(1))


def _rolled(layer: Any, roles: tuple[str, ...], block: Block) -> Block:
    """Each row's gradient given to the row after it: the sum over the batch stays right."""
    return Dense(
        block.materialise().roll(1, 0), (layer.weight.numel(), layer.bias.numel()) if len(roles) > 1 else None
    )


def _of_the_first(layer: Any, roles: tuple[str, ...], block: Block) -> Block:
    """Only the first position of each row's weight gradient counts: a flattened token axis forgotten."""
    if isinstance(block, Outer):
        return replace(block, a=block.a[:, :1], d=block.d[:, :1])
    return block


def _groups_ignored(compute: Compute) -> Compute:
    """Every group reads the channels of the first group."""

    def wrong(layer: Any, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Mapping[tuple[str, ...], Block]:
        transposed = isinstance(layer, _ConvTransposeNd)
        over = d if transposed else x
        first = over[:, :, : over.shape[2] // layer.groups]
        over = torch.cat([first] * layer.groups, 2)
        found = compute(layer, x if transposed else over, over if transposed else d, wanted & {"weight"})
        return {**compute(layer, x, d, wanted - {"weight"}), **found}

    return wrong


def _padding_ignored(compute: Compute) -> Compute:
    """The padding stands behind the picture alone, so that every window starts too far."""

    def wrong(layer: Any, x: Tensor, d: Tensor, wanted: frozenset[str]) -> Mapping[tuple[str, ...], Block]:
        transposed = isinstance(layer, _ConvTransposeNd)
        over = d if transposed else x
        sides = [side for pad in reversed(layer.padding) for side in (-pad, pad)]
        shifted = F.pad(over.flatten(0, 1), sides).view_as(over)
        found = compute(
            layer, x if transposed else shifted, shifted if transposed else d, wanted & {"weight"}
        )
        return {**compute(layer, x, d, wanted - {"weight"}), **found}

    return wrong


MUTATIONS: dict[str, Callable[[Compute], Compute]] = {
    "times 1.001": _each(_times(1 + 1e-3)),
    "bias dropped": _each(_without("bias")),
    "weight dropped": _each(_without("weight")),
    "axes swapped": _each(_exchanged),
    "rows rolled": _each(_rolled),
    "groups ignored": _groups_ignored,
    "padding ignored": _padding_ignored,
    "first token alone": _each(_of_the_first),
}


def mutations_of(layer: nn.Module) -> list[str]:
    """The mutations that make a rule of this layer wrong."""
    names = ["times 1.001", "weight dropped", "axes swapped", "rows rolled"]
    if getattr(layer, "bias", None) is not None:
        names.append("bias dropped")
    if isinstance(layer, _ConvNd):
        names += ["groups ignored", "padding ignored"]
    if isinstance(layer, nn.Linear):
        names.append("first token alone")
    return names
