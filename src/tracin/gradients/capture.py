"""What a forward pass did: which modules were called, on what, and where their outputs stand in the graph.

Hooks live inside the ``with`` block alone. A call's outputs are kept as gradient edges, taken right after the
module's own forward, so that a later in-place activation does not move them. A call without a gradient (under
``no_grad``, or with nothing trainable behind it) is not a use and is not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from tracin.gradients.precision import current_cast

__all__ = ["Call", "Tape", "recording", "tensors"]


@dataclass(frozen=True)
class Call:
    """One call of a module: its inputs (detached), and the edges and shapes of its differentiable outputs."""

    site: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edges: tuple[GradientEdge, ...]
    shapes: tuple[torch.Size, ...]
    positions: tuple[int, ...]
    versions: tuple[tuple[Tensor, int], ...]
    cast: torch.dtype | None = None  # what autocast went to around the call

    def intact(self) -> bool:
        """Whether the inputs still hold what the module read (no later in-place change)."""
        return all(tensor._version == version for tensor, version in self.versions)


@dataclass
class Tape:
    """The calls of one forward pass in order, by site."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    closed: bool = False


def _detached(value: Any, copy: bool) -> Any:
    if type(value) is tuple and len(value) == 1 and type(value[0]) is Tensor and not copy:
        return (value[0].detach(),)
    if not value:
        return value

    return pytree.tree_map(_copied if copy else _cut, value)


def _cut(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among a call's inputs, in order."""
    if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
        return [args[0]]
    value = (args, kwargs)
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class _Recorder:
    def __init__(self, tape: Tape, site: str, copy: bool) -> None:
        self.tape, self.site, self.copy = tape, site, copy
        self._before: list[tuple[tuple, dict]] = []

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.tape.closed:
            self._before.append((_detached(args, True), _detached(kwargs, True)))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self.tape.closed:
            return
        if self.copy:
            args, kwargs = self._before.pop()
        leaves = [output] if isinstance(output, Tensor) else pytree.tree_leaves(output)
        marked = [
            (at, leaf) for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not marked:
            return
        versions = (
            () if self.copy else tuple((t, t._version) for t in tensors(args, kwargs) if not t.is_inference())
        )
        call = Call(
            site=self.site,
            args=args if self.copy else _detached(args, False),
            kwargs=kwargs if self.copy else _detached(kwargs, False),
            edges=tuple(get_gradient_edge(leaf) for _, leaf in marked),
            shapes=tuple(leaf.shape for _, leaf in marked),
            positions=tuple(at for at, _ in marked),
            versions=versions,
            cast=current_cast(marked[0][1].device.type),
        )
        self.tape.calls.setdefault(self.site, []).append(call)


@contextmanager
def recording(sites: Mapping[str, nn.Module], copied: frozenset[str] = frozenset()) -> Iterator[Tape]:
    """Record the calls of these modules while the block runs a forward pass.

    Args:
        sites: Modules by site name.
        copied: Sites whose inputs are copied before the call, because the module may change them in place.

    Yields:
        The tape; closed, and without hooks on the modules, when the block ends.
    """
    tape = Tape()
    handles = []
    try:
        for site, module in sites.items():
            recorder = _Recorder(tape, site, site in copied)
            if site in copied:
                handles.append(module.register_forward_pre_hook(recorder.before, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.after, with_kwargs=True, prepend=True))
        yield tape
    finally:
        tape.closed = True
        for handle in handles:
            handle.remove()
