r"""What a training step shows: each row's gradient, read from the backward passes that training runs.

Every micro-batch is one *segment*: one evaluation of the loss, with the calls of the modules that hold parameters. A
hook on the node that made a call's output reads δ when the backward pass comes by, and the call's rule turns input and δ
into the rows' gradients. δ carries whatever the training loss does with its rows: 1/b under a mean, the loss scale, the
masks of dropout on the way.

Under batch statistics a normalised input x̂ mixes the rows; the share of row i in γ's gradient is its own term
:math:`\delta_i \hat x_i`, and the sum over the rows is the gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from tracin.errors import LoopError
from tracin.gradients import shared
from tracin.gradients.agreement import accumulation_dtype, coarsest
from tracin.gradients.blocks import Dense
from tracin.gradients.capture import Call, Tape, recording, tensors
from tracin.gradients.engine import Keys
from tracin.gradients.graph import walk
from tracin.gradients.layout import Layout
from tracin.gradients.local import CallLayout
from tracin.gradients.sites import LocalSite, Wiring, local_estimates, rule_blocks
from tracin.methods.online.order import Place, RowOrder, output_place
from tracin.methods.online.segment import Segment, Use
from tracin.methods.online.training_mode import batch_statistics, refuse_inner_randomness
from tracin.scoring.arithmetic import exact_products

__all__ = ["StepTape", "paused"]


class StepTape:
    """Records every micro-batch of one optimizer step, without a forward or backward pass of its own.

    Args:
        model: The model that trains.
        traced: Its traced parameters.
        wiring: Routes inside the model.
        keys: Which parameters share a block.
        order: What the queries showed of the model's calls and rows.
    """

    def __init__(
        self,
        model: nn.Module,
        traced: Mapping[str, nn.Parameter],
        wiring: Wiring,
        keys: Keys,
        order: RowOrder,
    ) -> None:
        self._model, self._traced, self._wiring, self._keys = model, traced, wiring, keys
        self._order = order
        self._stack = ExitStack()
        self._tape = Tape()
        self._segments: list[Segment] = []
        self.thread = 0
        self._looking = False  # a pass of our own runs through the hooks
        self.dtype = coarsest(p.dtype for p in traced.values())

    def open(self) -> None:
        """Put the hooks on."""
        self.thread = threading.get_ident()
        _OPEN.add(self)
        self._stack.callback(_OPEN.discard, self)
        sites = {**({"": self._model} if self._watches_model else {}), **self._wiring.sites()}
        self._tape = self._stack.enter_context(recording(sites, frozenset(self._wiring.locals)))
        for site, module in sites.items():
            handle = module.register_forward_hook(partial(self._called, site))
            self._stack.callback(handle.remove)

    def close(self) -> None:
        """Take all hooks off."""
        self._stack.close()

    @property
    def _watches_model(self) -> bool:
        return bool(self._order.calls or self._wiring.shared)

    @property
    def calls(self) -> int:
        """Calls recorded so far."""
        return sum(len(calls) for calls in self._tape.calls.values())

    def segments(self) -> list[Segment]:
        """The micro-batches that a backward pass reached, in forward order."""
        return [segment for segment in self._segments if segment.reached]

    def _called(self, site: str, module: nn.Module, _: Any, output: Any) -> None:
        calls = self._tape.calls.get(site, [])
        before = sum(len(segment.uses.get(site, [])) for segment in self._segments)
        if self._tape.closed or len(calls) == before:
            return
        call = calls[-1]
        segment = self._segment_of(site, before)
        if segment is None:
            return
        use = Use(site, before, module.training, [None] * len(call.edges))
        segment.uses.setdefault(site, []).append(use)
        if site in self._wiring.locals:
            refuse_inner_randomness(self._wiring.locals[site])
        if site in self._wiring.rules or site in self._wiring.locals:
            for number, edge in enumerate(call.edges):
                hook = partial(self._read, segment, use, number, edge.output_nr)
                self._stack.callback(edge.node.register_prehook(hook).remove)
        if site == "" and self._wiring.shared:
            self._watch_shared(segment, output)
        if site == "" and self._order.calls:
            self._check_order(segment, call.edges)

    def _segment_of(self, site: str, before: int) -> Segment | None:
        if self._order.calls:
            done = len(self._tape.calls.get("", [])) - (site == "")
            index = done // self._order.calls
        else:
            layouts = self._layouts(site)
            if not layouts:
                return None
            index = before // len(layouts)
        while len(self._segments) <= index:
            self._segments.append(Segment())
        return self._segments[index]

    def _layouts(self, site: str) -> tuple[CallLayout, ...]:
        found = self._wiring.rules.get(site) or self._wiring.locals.get(site)
        return found.layouts if found is not None else ()

    def _check_order(self, segment: Segment, outputs: tuple[GradientEdge, ...]) -> None:
        """Refuse a pass that moves rows, while the graph holds its tensors."""
        at = len(segment.uses.get("", [])) - 1 if outputs else 0
        made = [
            (site, use, self._tape.calls[site][use.at])
            for site in self._wiring.sites()
            for use in segment.uses.get(site, [])
        ]
        graph = self._order.doubtful(at, outputs or [edge for _, _, call in made for edge in call.edges])
        if graph is None:
            return
        n = self._count(segment)
        layers = [
            Place(site, edge, layout)
            for site, use, call in made
            for edge, layout in zip(call.edges, self._layout(segment, use, call, n).outputs, strict=True)
        ]
        known = self._order.layouts(at, len(outputs))
        found = [output_place(edge, layout, n) for edge, layout in zip(outputs, known, strict=True)]
        starts = [place for place in found if place is not None] if outputs else layers
        self._looking = True
        try:
            self._order.verify(graph, starts, [*layers, *segment.places], n, self.dtype)
        finally:
            self._looking = False

    def _read(self, segment: Segment, use: Use, number: int, output: int, gradients: Any) -> None:
        delta = gradients[output]
        if delta is None or self._tape.closed or self._looking:
            return
        if not self._order.calls and not segment.checked:
            segment.checked = True
            self._check_order(segment, ())
        delta = delta.detach()
        self.dtype = coarsest([self.dtype, delta.dtype])
        call = self._tape.calls[use.site][use.at]
        n = self._rows_of(segment)
        if use.site in self._wiring.locals:
            held = use.deltas[number]
            use.deltas[number] = delta.clone() if held is None else held + delta
        site = self._wiring.rules.get(use.site)
        if site is None:
            return
        if use.spent:
            raise LoopError(
                f"two backward passes ran through one forward pass ({use.site}). Add the losses up and call backward once."
            )
        if not call.intact():
            raise LoopError(
                f"the input of {use.site} was changed in place after the layer had read it. Use inplace=False there."
            )
        layout = self._layout(segment, use, call, n)
        norm = site.module
        with exact_products(delta.device):
            if isinstance(norm, _BatchNorm) and (use.training or norm.running_mean is None):
                found = batch_statistics(site, call, layout, delta, n)
            else:
                found = rule_blocks(site, call, layout, delta, n, self._keys.groups(site))
            for names, block in found.items():
                segment.add(names, block)
            if delta.dim() > 2 or len(delta) > n:  # the layer may be used more than once in a row
                segment.measure(site, tensors(call.args, call.kwargs)[0], delta)
        use.spent = True
        # What the blocks do not hold can be freed while the backward pass goes on.
        self._tape.calls[use.site][use.at] = replace(call, args=(), kwargs={}, versions=())

    def _rows_of(self, segment: Segment) -> int:
        """Rows of a micro-batch, which a backward pass has reached."""
        if segment.rows is None:
            segment.rows = self._count(segment)
        return segment.rows

    def _count(self, segment: Segment) -> int:
        """Rows of a micro-batch, from the calls whose rows stand one by one on an axis."""
        found = [
            (call.shapes[number][layout.axis], layout.per_row)
            for site, uses in segment.uses.items()
            for at, use in enumerate(uses)
            for call in [self._tape.calls[site][use.at]]
            for number, layout in enumerate(self._outputs(segment, use, at, len(call.shapes)))
            if layout is not None and number < len(call.shapes) and layout.axis < len(call.shapes[number])
        ]
        whole = {size for size, per_row in found if per_row == 1}
        if len(whole) > 1:
            raise LoopError(
                f"the layers of one forward pass saw {sorted(whole)} rows: the model drops or repeats rows in training, so "
                "they cannot be matched with ids."
            )
        if not found:
            raise LoopError("no layer and no output of the model has an axis for the rows in training.")
        return whole.pop() if whole else found[0][0] // found[0][1]

    def _outputs(self, segment: Segment, use: Use, at: int, count: int) -> tuple[Layout | None, ...]:
        """The layouts of a call's outputs; those of the model itself where no layer inside it is recorded."""
        if self._layouts(use.site):
            return self._probed(segment, use).outputs
        return self._order.layouts(at, count) if not self._wiring.sites() else ()

    def _probed(self, segment: Segment, use: Use) -> CallLayout:
        """The layout that the probe found for this call."""
        layouts, uses = self._layouts(use.site), segment.uses[use.site]
        position = next(at for at, other in enumerate(uses) if other is use)
        if len(uses) == len(layouts):
            return layouts[position]
        if len(set(layouts)) == 1:
            return layouts[0]
        raise LoopError(
            f"{use.site or 'the model'} was called {len(uses)} times in a forward pass and {len(layouts)} times on the queries, "
            "each time with rows elsewhere. Train with the same calls, or leave it out with Task(parameters=...)."
        )

    def _layout(self, segment: Segment, use: Use, call: Call, n: int) -> CallLayout:
        """The probe's layout, with as many entries per row as this micro-batch has."""
        layout = self._probed(segment, use)
        inputs = tensors(call.args, call.kwargs)
        if len(inputs) != len(layout.inputs) or len(call.shapes) != len(layout.outputs):
            raise LoopError(f"{use.site or 'the model'} was called with other inputs than on the queries.")
        return CallLayout(
            tuple(
                None if lay is None else _fitted(use.site, lay, x.shape, n)
                for lay, x in zip(layout.inputs, inputs, strict=True)
            ),
            tuple(
                _fitted(use.site, lay, shape, n)
                for lay, shape in zip(layout.outputs, call.shapes, strict=True)
            ),
        )

    def _watch_shared(self, segment: Segment, output: Any) -> None:
        """Find where shared parameters meet the rows, while the graph holds its tensors, and read δ there."""
        edges = self._tape.calls[""][-1].edges
        graph = walk(_first(output), {name: self._traced[name] for name in self._wiring.shared})
        n = self._count(segment)
        for name, site in self._wiring.shared.items():
            places = shared.meetings(site, graph, n)
            if places is None or not edges:
                raise LoopError(
                    f"{name} met the rows elsewhere in the graph than it did on the queries. "
                    "Leave it out with Task(parameters=...)."
                )
            for place in places:
                segment.places.append(Place(name, place.edge, place.layout))
                hook = partial(self._read_shared, segment, name, graph.leaves[name], place)
                self._stack.callback(place.edge.node.register_prehook(hook).remove)

    def _read_shared(
        self, segment: Segment, name: str, leaf: Any, place: shared.Meeting, gradients: Any
    ) -> None:
        delta = gradients[place.edge.output_nr]
        if delta is None or self._tape.closed or self._looking:
            return
        n = self._rows_of(segment)
        # One place at a time, as the backward pass frees what made the shared tensor when it has passed.
        with exact_products(delta.device):
            values = shared.gradients(leaf, self._traced[name], [place], [delta.detach()], n).detach()
        values = values.reshape(n, -1)
        segment.add((name,), Dense(values.to(accumulation_dtype(values.dtype))))

    def finish(self) -> None:
        """Run the modules under vmap, whose δ is complete now. The model must be in eval mode and guarded."""
        for segment in self.segments():
            for name, site in self._wiring.locals.items():
                uses = segment.uses.get(name, [])
                if any(delta is not None for use in uses for delta in use.deltas):
                    self._finish(segment, site, uses)

    def _finish(self, segment: Segment, site: LocalSite, uses: list[Use]) -> None:
        n = self._rows_of(segment)
        calls = [self._tape.calls[site.site][use.at] for use in uses]
        layouts = tuple(self._layout(segment, use, call, n) for use, call in zip(uses, calls, strict=True))
        try:
            found = local_estimates(
                replace(site, layouts=layouts), calls, [use.deltas for use in uses], n, self._traced
            )
        # The probe ran this module under vmap; on this batch it raises what it likes.
        except Exception as error:
            raise LoopError(
                f"{site.site or 'the model'} ({type(site.module).__name__}) cannot be run row by row on this batch: "
                f"{str(error).splitlines()[0][:160]}. Leave {', '.join(site.names)} out with Task(parameters=...)."
            ) from error
        for parameter, values in found.items():
            segment.add((parameter,), Dense(values))


@contextmanager
def paused() -> Iterator[None]:
    """What runs inside is no training: the tapes that this thread holds open look away.

    Yields:
        Nothing.
    """
    mine = threading.get_ident()
    open_tapes = [tape._tape for tape in _OPEN if tape.thread == mine and not tape._tape.closed]
    for tape in open_tapes:
        tape.closed = True
    try:
        yield
    finally:
        for tape in open_tapes:
            tape.closed = False


# Tapes that watch a model now.
_OPEN: WeakSet[StepTape] = WeakSet()


def _first(output: Any) -> Tensor:
    """The first differentiable tensor of an output."""
    leaves = pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)


def _fitted(site: str, layout: Layout, shape: torch.Size, n: int) -> Layout:
    if layout.fits(shape, n):
        return layout
    size = shape[layout.axis] if layout.axis < len(shape) else 0
    if layout.per_row > 1 and n and size and size % n == 0:
        return replace(layout, per_row=size // n)
    raise LoopError(
        f"{site or 'the model'} saw a tensor {list(shape)} for {n} rows: its rows stand elsewhere than on the queries."
    )
