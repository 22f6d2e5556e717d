r"""Does slot i of every layer belong to row i while the model trains? The probe saw the model in eval mode alone.

A model may sort, shuffle or pick rows in training mode, and put them back before it returns: the sum over the rows is the
same, and every share lies with another row. The graph of the training pass shows the operations that can move rows; where
they are not those of the probe, or their indices do not name every row in order, autograd decides. With a random
cotangent v on the outputs and a random number :math:`r_i` for each row, slot i of every layer must satisfy

.. math::
    \delta_i(r v) = r_i \, \delta_i(v)

which fails as soon as another row's output reaches slot i. Batch statistics join rows on purpose and leave them in their
places: a batch norm's backward pass is replaced by the identity here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from tracin.errors import LoopError
from tracin.gradients.agreement import accumulation_dtype, coarsest
from tracin.gradients.capture import Tape, recording
from tracin.gradients.graph import MOVERS, Graph
from tracin.gradients.layout import Layout, candidates, to_rows
from tracin.gradients.movement import Mover, in_place, movers_of

__all__ = ["Place", "RowOrder", "output_place"]

# How far δ(r v) may be from r δ(v), as a share of δ(v): rounding, and that of TF32 where the GPU uses it.
APART = {torch.float64: 1e-8, torch.float32: 5e-3}

# Operations that look up where a row goes: each batch may say otherwise.
LOOKED_UP = frozenset(
    f"{name}Backward{version}"
    for name in (
        *("Gather", "Index", "IndexAdd", "IndexCopy", "IndexPut", "IndexSelect", "MaskedScatter"),
        *("MaskedSelect", "Put", "Scatter", "ScatterAdd", "ScatterReduce", "SegmentReduce"),
        *("Sort", "Take", "Topk"),
    )
    for version in (0, 1)
)

# Operations that rearrange a tensor's entries where reshaping meets transposing.
SHAPERS = frozenset(
    f"{name}Backward{version}"
    for name in (
        *("AsStrided", "Permute", "ReshapeAlias", "T", "Transpose", "Unfold", "UnsafeView", "View"),
        *("Diagonal", "Repeat", "RepeatInterleave", "Tril", "Triu"),
    )
    for version in (0, 1)
)

SETTINGS = ("dim", "dims", "shifts", "start", "end", "step", "index")


@dataclass(frozen=True)
class Place:
    """A tensor in the graph and where its rows stand; ``name`` is its layer or parameter, for messages."""

    name: str
    edge: GradientEdge
    layout: Layout


@dataclass(frozen=True)
class Passage:
    """One call of the model on the queries: operations that can move rows or reshape, and the layouts of its outputs."""

    movers: tuple[Mover, ...]
    shapers: tuple[str, ...]
    outputs: tuple[Layout | None, ...]


@dataclass(frozen=True)
class RowOrder:
    """What is known of a model's rows: its calls in one evaluation of the loss, as the queries showed them.

    ``calls`` is 0 where the loss calls the model's parts; there is one passage then, over all layers. ``verified`` holds
    the operations for which autograd has decided.
    """

    passages: tuple[Passage, ...]
    calls: int
    plain_rows: bool
    verified: set[tuple[Any, ...]] = field(default_factory=set)

    @classmethod
    def seen(
        cls,
        model: nn.Module,
        sites: Mapping[str, nn.Module],
        plain_rows: bool,
        run: Callable[[list[int]], object],
        rows: Sequence[int],
    ) -> RowOrder:
        """Look at a few rows in two batch sizes. The model must be guarded.

        Args:
            model: The model.
            sites: Its layers that are recorded.
            plain_rows: Whether every tensor of a batch has one entry per row.
            run: Evaluates the loss on rows.
            rows: The rows that there are.

        Returns:
            What they showed.
        """
        few = [rows[at % len(rows)] for at in range(3)]
        tapes = []
        for some in (few, [*few, few[0]]):
            with recording({"": model, **sites}) as tape:
                run(some)
            tapes.append(tape)
        own = tapes[0].calls.get("", [])
        calls = len(own)
        if not calls:
            graphs = [_walk(_edges(tape, sites)) for tape in tapes]
            return cls((Passage(movers_of(*graphs), _shapers(graphs[0]), ()),), 0, plain_rows)
        twins = tapes[1].calls.get("", [])
        if len(twins) != calls:
            return cls((), calls, plain_rows)
        passages = []
        for call, twin in zip(own, twins, strict=True):
            pairs = zip(call.shapes, twin.shapes, strict=False)
            found = [candidates(shape, other, 3, 4) for shape, other in pairs]
            layouts = tuple(layout[0] if layout else None for layout in found)
            graph = _walk(call.edges)
            passages.append(Passage(movers_of(graph, _walk(twin.edges)), _shapers(graph), layouts))
        return cls(tuple(passages), calls, plain_rows)

    def doubtful(self, at: int, edges: Sequence[GradientEdge]) -> Graph | None:
        """The graph of a training pass, if it has operations that may move rows and were not seen to keep them.

        Args:
            at: Number of the call within its evaluation of the loss.
            edges: The call's outputs, or all layers' where the loss calls the model's parts.

        Returns:
            The graph, or None where every row is in its place.
        """
        graph = _walk(edges)
        known = self.passages[at] if at < len(self.passages) else None
        seen = known is not None and self.plain_rows and known.shapers == _shapers(graph)
        if known is not None and seen and in_place(known.movers, graph):
            return None
        looked_up = any(type(node).__name__ in LOOKED_UP for node in graph.movers)
        return None if _kind(graph) in self.verified and not looked_up else graph

    def verify(
        self, graph: Graph, starts: Sequence[Place], layers: Sequence[Place], n: int, dtype: torch.dtype
    ) -> None:
        """Let autograd decide. Called while the graph holds its tensors.

        Args:
            graph: What ``doubtful`` found.
            starts: The model's outputs that have rows.
            layers: The layers' outputs.
            n: Rows.
            dtype: The least precise dtype of the arithmetic so far; what this graph passes on may be less precise.

        Raises:
            LoopError: A row's output reaches another row's slot of a layer; or it cannot be decided.
        """
        if n < 2:
            return
        operations = {*(type(node).__name__ for node in graph.movers), *_shapers(graph)}
        names = ", ".join(sorted(name.rstrip("01").removesuffix("Backward") for name in operations))
        if not starts:
            raise LoopError(
                f"the model uses other operations in training than on the queries ({names}), and none of its outputs has a row "
                "axis, so it cannot be checked that rows keep their places. Let it return one entry per row while training."
            )
        within = [place for place in layers if place.edge.node in graph.nodes]
        wrong = _moved(starts, within, graph, n, coarsest([dtype, *_dtypes(graph)]))
        if wrong is not None:
            raise LoopError(
                f"in training, row i of the model's output does not come from slot i of {wrong} alone: the model moves or mixes "
                f"rows between its layers ({names}), and the shares would go to other rows. Keep the rows in their order inside "
                "the model; reorder them before it, with their ids."
            )
        self.verified.add(_kind(graph))

    def layouts(self, at: int, outputs: int) -> tuple[Layout | None, ...]:
        """The layouts of the outputs of a call, as far as the queries showed them."""
        known = self.passages[at].outputs if at < len(self.passages) else ()
        return known if len(known) == outputs else (None,) * outputs


def output_place(edge: GradientEdge, layout: Layout | None, n: int) -> Place | None:
    """Where the rows of a model's output stand; None where it has no row axis.

    Args:
        edge: The output.
        layout: What the queries showed, if anything.
        n: Rows.

    Returns:
        The place.
    """
    shape = edge.node._input_metadata[edge.output_nr].shape
    if layout is not None and layout.axis < len(shape) and shape[layout.axis] % n == 0:
        return Place("the model", edge, replace(layout, per_row=shape[layout.axis] // n))
    if len(shape) and shape[0] == n:
        return Place("the model", edge, Layout(0))
    return None


def _edges(tape: Tape, sites: Collection[str]) -> list[GradientEdge]:
    return [edge for site in sites for call in tape.calls.get(site, []) for edge in call.edges]


def _walk(edges: Sequence[GradientEdge]) -> Graph:
    """The nodes below some tensors, and those that can move rows in an order that depends on the structure alone."""
    nodes: set[Any] = set()
    movers: list[Any] = []
    stack = [edge.node for edge in reversed(edges)]
    while stack:
        node: Any = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        if type(node).__name__ in MOVERS:
            movers.append(node)
        stack.extend(below for below, _ in node.next_functions if below is not None and below not in nodes)
    return Graph({}, {}, nodes, set(), movers)


def _kind(graph: Graph) -> tuple[Any, ...]:
    """The operations that can move rows, with their settings as far as they are numbers."""
    moving = ((type(node).__name__, *map(partial(_setting, node), SETTINGS)) for node in graph.movers)
    return (*moving, *_shapers(graph))


def _shapers(graph: Graph) -> tuple[str, ...]:
    """Operations that reshape, and those of the user's own; how often, since a graph's nodes have no order here."""
    names = (type(node).__name__ for node in graph.nodes if _own(node) or type(node).__name__ in SHAPERS)
    return tuple(sorted(names))


def _dtypes(graph: Graph) -> set[torch.dtype]:
    """In what precision gradients pass through a graph."""
    return {meta.dtype for node in graph.nodes for meta in node._input_metadata}


def _own(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _setting(node: Any, name: str) -> Any:
    value = getattr(node, f"_saved_{name}", None)
    return value if isinstance(value, int | tuple) else None


def _moved(
    starts: Sequence[Place], layers: Sequence[Place], graph: Graph, n: int, dtype: torch.dtype
) -> str | None:
    """The name of a layer in which another row's output reaches a row's slot; None if there is none."""
    source = torch.Generator().manual_seed(n)
    signs = torch.randint(0, 2, (n,), generator=source) * 2.0 - 1.0
    weights = (0.5 + torch.rand(n, generator=source)) * signs
    plain, weighted = [], []
    for start in starts:
        meta = start.edge.node._input_metadata[start.edge.output_nr]
        seed = torch.randn(tuple(meta.shape), generator=source).to(meta.device, meta.dtype)
        plain.append(seed)
        weighted.append(seed * _along(weights, start.layout, len(meta.shape), n).to(seed))
    edges = [place.edge for place in starts]
    asked = [place.edge for place in layers]
    with ExitStack() as stack:
        for node in graph.nodes:
            if "BatchNorm" in type(node).__name__:
                stack.callback(node.register_hook(_straight).remove)
        try:
            once = torch.autograd.grad(edges, asked, plain, retain_graph=True, allow_unused=True)
            again = torch.autograd.grad(edges, asked, weighted, retain_graph=True, allow_unused=True)
        # A part of the graph that runs backward once only, such as a reentrant checkpoint.
        except RuntimeError as error:
            raise LoopError(
                "the model uses other operations in training than on the queries, and it cannot be checked that rows keep their "
                f"places: {str(error).splitlines()[0][:160]}"
            ) from error
    for place, first, second in zip(layers, once, again, strict=True):
        if first is not None and second is not None and _differ(place, first, second, weights, n, dtype):
            return place.name or "the model"
    return None


def _along(weights: Tensor, layout: Layout, dims: int, n: int) -> Tensor:
    """A number per row, broadcast to a tensor of this layout."""
    rows = torch.arange(n)
    each = (
        rows.repeat_interleave(layout.per_row) if layout.row_major else rows.repeat(layout.per_row)
    )  # the row of each entry
    shape = [1] * dims
    shape[layout.axis] = -1
    return weights[each].view(shape)


def _straight(inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Let a gradient pass a batch norm as it is."""
    return (outputs[0], *inputs[1:]) if inputs[0] is not None else tuple(inputs)


def _differ(place: Place, once: Tensor, again: Tensor, weights: Tensor, n: int, dtype: torch.dtype) -> bool:
    dtype = coarsest([dtype, once.dtype])
    wide = accumulation_dtype(dtype)
    first, second = (to_rows(delta, place.layout, n).flatten(1).to(wide) for delta in (once, again))
    norms = first.norm(dim=1)
    rest = (second - weights.to(first)[:, None] * first).norm(dim=1)
    return bool((rest > APART.get(dtype, 0.1) * (norms + norms.square().mean().sqrt())).any())
