"""One run of a verb: the guarded model, its data sources and wirings, and checkpoints loaded one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.checksums import Passes, SteadyTake
from tracin.data import Batch, BatchSize, RowSource, open_rows, to_device
from tracin.errors import LossError, NotFiniteError, OptionError, UserCodeError
from tracin.gradients.agreement import accumulation_dtype
from tracin.gradients.blocks import Block
from tracin.gradients.check import checked_gradients
from tracin.gradients.engine import BatchGradients, Keys, Source, name_not_finite
from tracin.gradients.features import Projector
from tracin.gradients.precision import cast_of
from tracin.gradients.products import dot
from tracin.gradients.projection import Projection
from tracin.gradients.sites import LossModule
from tracin.gradients.wiring import wire
from tracin.scoring import kept
from tracin.scoring.arithmetic import require_arithmetic
from tracin.scoring.batching import MOST_DECODED, MOST_ROWS, batch_rows
from tracin.scoring.guard import LoadedModel, guarded
from tracin.tasks import Selection, Task

__all__ = ["WEIGHTINGS", "Run", "Settings", "opened", "products"]

WEIGHTINGS = ("learning_rate", "integrated", "uniform")


@dataclass(frozen=True)
class Settings:
    """How a method is run; see ``TracInCP`` for the meaning of each."""

    weighting: str = "learning_rate"
    normalize: bool = False
    batch_size: BatchSize = "auto"
    collate: Callable[[list], Any] | None = None
    device: str | torch.device = "auto"
    memory: int = 2 << 30
    progress: bool = True
    projection: Projection | None = None
    precision: str = "float32"


@dataclass
class Run:
    """The state of one run. Gradients come from ``gradients``; what is summed is up to the verb."""

    task: Task
    trajectory: Trajectory
    settings: Settings
    loaded: LoadedModel
    selection: Selection
    train: Source
    queries: Source | None
    keys: Keys = field(default_factory=lambda: Keys(frozenset()))
    rates: dict[str, float] = field(default_factory=dict)
    where: str = ""
    index: int = 0
    projector: Projector | None = None
    passes: Passes = field(default_factory=Passes)
    row_bytes: int | None = 0
    decoded: dict[str, kept.Kept] = field(default_factory=dict)
    resident: bool = False
    _checked: set[str] = field(default_factory=set)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scores: the parameters', at least float32."""
        return accumulation_dtype(next(iter(self.selection.traced.values())).dtype)

    @property
    def size(self) -> int:
        """Numbers in one example's gradient, or in its features under a projection."""
        if self.projector is not None:
            return sum(self.projector.sizes.values())
        return sum(parameter.numel() for parameter in self.selection.traced.values())

    @property
    def asked(self) -> Source:
        """The queries, for verbs that have them."""
        if self.queries is None:
            raise RuntimeError("this run has no queries")
        return self.queries

    def sources(self) -> list[Source]:
        """Train, and queries where there are any."""
        return [self.train] if self.queries is None else [self.train, self.queries]

    def load(self, index: int) -> None:
        """Go to a checkpoint: weights, rates, and, the first time, the wiring."""
        checkpoint = self.trajectory[index]
        self.rates = checkpoint.rates(self.settings.weighting, list(self.selection.traced))
        if self.settings.normalize and len(set(self.rates.values())) > 1:
            raise OptionError(
                f"normalize=True needs one learning rate per checkpoint; {checkpoint.name} has several. Use "
                "weighting='uniform', or normalize=False."
            )
        self.loaded.load(checkpoint, index if self.resident else None)
        self.where, self.index = checkpoint.name, index
        for source in self.sources():
            source.where = f"{source.rows.name}, {checkpoint.name}"
        if any(source.found is None for source in self.sources()):
            self._wire_all()
            self.keys = Keys.of(*(s.wiring for s in self.sources() if s.found is not None))

    def go(self, index: int) -> None:
        """Go to a checkpoint, unless it is loaded already."""
        if not self.where or self.index != index:
            self.load(index)

    def stay_resident(self) -> None:
        """Before the first is loaded: keep all checkpoints' tensors, where they fit their share of the memory."""
        need = len(self.trajectory) * self.loaded.nbytes()
        self.resident = len(self.trajectory) > 1 and need <= self.settings.memory // kept.PARAMETERS

    def keep_rows(self) -> None:
        """Keep the batches that the user's code makes from here on, where all of them fit their share of the memory."""
        for source, share in zip(self.sources(), (kept.ALL_ROWS, kept.ALL_QUERIES), strict=False):
            if source.rows.decodes:
                self.decoded[source.rows.name] = kept.Kept(self.settings.memory // share)

    def forget_rows(self, source: Source) -> None:
        """Keep no batches of a source."""
        self.decoded.pop(source.rows.name, None)

    def _wire_all(self) -> None:
        """Wire every source; queries under the training loss take the train rows' wiring, which their first batch checks."""
        self._wire(self.train)
        if self.queries is not None:
            if self.queries.loss is self.train.loss:
                self.queries.found = self.train.wiring
            else:
                self._wire(self.queries)

        scores = 0 if self.queries is None else len(self.queries.rows) * self.dtype.itemsize
        for source in self.sources():
            wiring = source.wiring
            if wiring.row_bytes:
                first, rest = batch_rows(
                    wiring.row_bytes,
                    self.settings.memory,
                    queries=scores * self.size if source is self.train else 0,
                    tensor=wiring.row_tensor,
                    scores=max(1, scores),
                    most=MOST_DECODED if source.rows.decodes else MOST_ROWS,
                )
                source.rows.resize(first, rest)

    def _wire(self, source: Source) -> None:
        n = len(source.rows)
        rows = sorted({0, n // 2, n - 1})
        take = SteadyTake(source.rows, source.device)
        try:
            source.found = wire(source.root, self.selection.traced, source.run, take, rows)
            if source is self.train:
                self.row_bytes = take.row_bytes
        except LossError:
            first = next(iter(source.rows.batches()))  # the user's own batch says more than the probe's
            source.run(to_device(first.value, source.device), first.rows)
            raise
        except UserCodeError:
            for row in rows:
                source.run(source.take([row, row]), [row, row])
            raise

    def batches(
        self, source: Source, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Batch, Any]]:
        """Pass over a source's whole batches from row ``start`` to ``stop``; data that changes is refused.

        Args:
            source: Train rows or queries.
            start: Where a batch begins.
            stop: Where a batch ends; the end of the data unless given.

        Yields:
            Each batch, and its value on the device.
        """
        held = self.decoded.get(source.rows.name)
        for batch in self.read(source, start=start, stop=stop):
            again = held is not None and held.holds(batch)
            yield batch, to_device(batch.value, self.loaded.device, copy=again)

    def read(self, source: Source, *, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The same batches as the user's code makes them, or as they were kept, which must not be written into."""
        held = self.decoded.get(source.rows.name)
        whole = held.all_of(source.rows.spans(start, stop)) if held is not None else None
        if whole is not None:
            yield from whole
            return
        for batch in source.rows.batches(start, stop):
            self.check_unchanged(source, batch)
            if held is not None:
                held.offer(batch)
            yield batch

    def check_unchanged(self, source: Source, batch: Batch) -> None:
        """Compare a batch with that of the pass before; slices of tensors in memory are the same."""
        if source.rows.decodes:
            self.passes.check(source.rows, batch)

    def gradients(self, source: Source, batch: Batch, value: Any) -> BatchGradients:
        """A batch's per-example gradients; the first batch of each source is checked against autograd."""
        first = source.rows.name not in self._checked
        self._checked.add(source.rows.name)
        inherited = first and source is self.queries and source.found is self.train.found
        spare = to_device(value, source.device, copy=True) if inherited else None
        found = checked_gradients(source, self.keys, batch, value, self.selection.traced, first)
        if inherited and source.irregular:
            # The queries are not shaped like the train rows: they get a wiring of their own.
            source.irregular.clear()
            self._wire(source)
            self.keys = Keys.of(*(s.wiring for s in self.sources() if s.found is not None))
            return checked_gradients(source, self.keys, batch, spare, self.selection.traced, first)
        return found

    def rates_of(self, names: tuple[str, ...]) -> tuple[float, ...]:
        """The weights w_c of a block's parameters at this checkpoint."""
        return tuple(self.rates[name] for name in names)


def products(
    train: Mapping[tuple[str, ...], Block],
    queries: Mapping[tuple[str, ...], Block],
    n: int,
    m: int,
    like: Tensor,
) -> Tensor:
    """Σ over parameters of the inner products of two batches of gradients, [n, m].

    Args:
        train: Blocks of n train rows.
        queries: Blocks of m queries.
        n: Train rows.
        m: Queries.
        like: A tensor on the device, of the scores' dtype.

    Returns:
        The products.
    """
    total = like.new_zeros(n, m)
    for names, block in train.items():
        if names in queries:
            total += dot(block, queries[names])
        else:
            # The queries do not use these parameters: nothing to add, but a NaN in them must not pass unseen.
            total += 0.0 * block.squared_norm()[:, None]
    return total


def refuse_products(values: Tensor, found: BatchGradients, batch: Batch, where: str) -> None:
    """Name the row and parameter behind a product that is not finite.

    Args:
        values: Products [n, ...].
        found: The batch's gradients.
        batch: Its rows.
        where: The checkpoint.

    Raises:
        NotFiniteError: A product is NaN or infinite.
    """
    if bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all()):
        return
    name_not_finite(found.blocks, batch, where)
    row = batch.rows[int((~torch.isfinite(values)).reshape(batch.size, -1).any(1).nonzero()[0])]
    raise NotFiniteError(
        f"the products of row {row}'s gradient overflow {values.dtype} ({where}). Use a float64 model."
    )


@contextmanager
def opened(
    task: Task, trajectory: Trajectory, settings: Settings, train: Any, queries: Any | None = None
) -> Iterator[Run]:
    """Open the data, guard the model, and hand out the run.

    Args:
        task: Model and losses.
        trajectory: The checkpoints.
        settings: How to run.
        train: Train rows.
        queries: Query rows, for verbs that have them.

    Yields:
        The run, before any checkpoint is loaded.
    """
    selection = task.select()
    shapes = {name: parameter.shape for name, parameter in selection.traced.items()}
    projector = Projector(settings.projection, shapes) if settings.projection else None
    for checkpoint in trajectory:
        checkpoint.rates(settings.weighting, list(selection.traced))
    opening = {"batch_size": settings.batch_size, "collate": settings.collate}
    sides: list[tuple[RowSource, Any]] = [(open_rows(train, name="train", **opening), task.loss)]
    if queries is not None:
        sides.append((open_rows(queries, name="queries", **opening), task.query_loss or task.loss))
    with guarded(task.model, settings.device) as loaded:
        dtypes = frozenset(parameter.dtype for parameter in selection.traced.values())
        require_arithmetic(loaded.device, settings.precision, dtypes, settings.normalize)
        dtype = cast_of(settings.precision)
        cast = None if dtype is None else (loaded.device.type, dtype)
        sources = [
            Source(LossModule(task.model, loss, cast), loss, rows, loaded.device) for rows, loss in sides
        ]
        for source in sources:
            source.root.eval()
            source.rows.pinned = loaded.device.type == "cuda"
            source.rows.rereads = True
        run = Run(
            task,
            trajectory,
            settings,
            loaded,
            selection,
            sources[0],
            sources[1] if queries is not None else None,
            projector=projector,
        )
        if len(trajectory) > 1:
            run.keep_rows()
        try:
            yield run
        finally:
            for source in sources:
                source.rows.close()
