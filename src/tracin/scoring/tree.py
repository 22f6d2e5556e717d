"""A model's modules, parameters and buffers, in one walk instead of one for each question."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Tree", "tree_of"]


@dataclass(frozen=True)
class Tree:
    """Modules, parameters and buffers, each once, in the order of ``named_modules`` and ``parameters``."""

    modules: tuple[tuple[str, nn.Module], ...]
    parameters: tuple[nn.Parameter, ...]
    buffers: tuple[Tensor, ...]


def tree_of(model: nn.Module) -> Tree:
    """Walk a model.

    Args:
        model: The model.

    Returns:
        What it is made of.

    Example:
        >>> tree = tree_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        >>> [name for name, _ in tree.modules], len(tree.parameters)
        (['', '0', '1'], 2)
    """
    modules: dict[nn.Module, str] = {}
    parameters: dict[int, nn.Parameter] = {}
    buffers: dict[int, Tensor] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in modules:
            continue
        modules[module] = name
        for parameter in module._parameters.values():
            if parameter is not None:
                parameters.setdefault(id(parameter), parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                buffers.setdefault(id(buffer), buffer)
        prefix = f"{name}." if name else ""
        children = [(prefix + own, child) for own, child in module._modules.items() if child is not None]
        stack.extend(reversed(children))
    named = tuple((name, module) for module, name in modules.items())
    return Tree(named, tuple(parameters.values()), tuple(buffers.values()))
