"""Gradients of the rows of one shard: the model, the data and the projection, opened once per process.

Every shard is cut into the same batches wherever it is made, and every process first checks the same batch against
autograd. So a shard's bytes do not depend on which process makes it, on what was made before, or on interruptions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tracin.checksums import row_checksums, same_checksums
from tracin.data import Batch, RowSource, rows_per_batch, to_device
from tracin.errors import DataError, IndexFolderError
from tracin.gradients.blocks import Block
from tracin.gradients.engine import BatchGradients
from tracin.gradients.features import Projector
from tracin.gradients.projection import Projection
from tracin.index.kept.manifest import Manifest
from tracin.index.kept.shards import Shard, Unit
from tracin.methods.provenance import versions
from tracin.methods.tracin_cp import TracInCP
from tracin.scoring.run import Run, opened, refuse_products
from tracin.tasks import Task

__all__ = ["Choices", "Tracer", "choices_of", "loss_name", "tracing"]

# Rows whose content tells one training set from another.
FINGERPRINT_ROWS = 64


@dataclass(frozen=True)
class Choices:
    """What the user decides about an index."""

    projection: Projection
    dtype: str
    shard_rows: int


def loss_name(task: Task) -> str:
    """What a manifest calls the training loss."""
    return getattr(task.loss, "__name__", type(task.loss).__name__)


def choices_of(manifest: Manifest) -> Choices:
    """What was decided when an index was built.

    Args:
        manifest: Its manifest.

    Returns:
        Projection, dtype and rows per shard.
    """
    return Choices(Projection(**manifest.projection), manifest.dtype, manifest.shard_rows)


@contextmanager
def tracing(method: TracInCP, train: Any, projection: Projection) -> Iterator[Tracer]:
    """Open the model and the rows.

    Args:
        method: Task, checkpoints and settings.
        train: The rows.
        projection: Onto which features.

    Yields:
        What makes shards.
    """
    settings = replace(method.settings, projection=projection, progress=False, normalize=False)
    with opened(method.task, method.trajectory, settings, train) as run:
        yield Tracer(run)


class Tracer:
    """Makes shards, and says what they are made from.

    Args:
        run: A run under the projection.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._loaded: int | None = None
        self._digests: dict[int, str] = {}
        self._seen: dict[tuple[int, int], Tensor] = {}
        run.load(0)
        self._loaded = 0
        self._groups: list[frozenset[str]] | None = None

    @property
    def _projector(self) -> Projector:
        if self._run.projector is None:
            raise RuntimeError("an index needs a projection")
        return self._run.projector

    @property
    def rows(self) -> int:
        """Rows of the data."""
        return len(self._run.train.rows)

    def manifest(self, choices: Choices) -> Manifest:
        """The configuration of an index of this model and these checkpoints; every checkpoint is read once for it.

        Args:
            choices: Projection, dtype and rows per shard.

        Returns:
            The manifest.
        """
        run = self._run
        described = run.trajectory.describe()
        digests = [self._digest(index) for index in range(len(run.trajectory))]
        names = list(run.selection.traced)
        return Manifest(
            model=type(run.task.model).__name__,
            loss=loss_name(run.task),
            parameters={name: list(run.selection.traced[name].shape) for name in names},
            checkpoints=[
                {**facts, "digest": digest} for facts, digest in zip(described, digests, strict=True)
            ],
            projection=asdict(choices.projection),
            features=self._projector.sizes,
            groups=_groups(names, described),
            dtype=choices.dtype,
            precision=run.settings.precision,
            shard_rows=choices.shard_rows,
            batch_rows=self._batch_rows(),
            made_with={
                **versions(),
                "threads": torch.get_num_threads(),
                "device": str(run.loaded.device),
            },
        )

    def _batch_rows(self) -> int:
        asked = self._run.settings.batch_size
        return max(self._run.train.rows.sizes) if asked == "auto" else rows_per_batch(asked)

    def _load(self, index: int) -> None:
        if self._loaded != index:
            self._run.load(index)
            self._loaded = index

    def _digest(self, index: int) -> str:
        """A hash of the model's state at a checkpoint."""
        if index not in self._digests:
            self._load(index)
            found = hashlib.sha256()
            for name, value in self._run.task.model.state_dict().items():
                value = value.detach().cpu().contiguous()
                found.update(f"{name} {value.dtype} {list(value.shape)};".encode())
                found.update(value.reshape(-1).view(torch.uint8).numpy().data)
            self._digests[index] = found.hexdigest()[:32]
        return self._digests[index]

    def prepare(self, manifest: Manifest) -> None:
        """Check the first batch against autograd, the same one in every process, before any shard is made.

        Args:
            manifest: The index's manifest.
        """
        if self._groups is not None:
            return
        self._groups = [frozenset(group) for group in manifest.groups]
        self._load(0)
        for batch in self._batches(range(min(manifest.batch_rows, self.rows)), manifest.batch_rows):
            self._gradients(batch)

    @property
    def source(self) -> RowSource:
        """The data."""
        return self._run.train.rows

    def fingerprint(self, rows: range) -> str | None:
        """A hash of the number of rows and of some rows' content, the first and the last among them.

        Args:
            rows: Consecutive rows of the data.

        Returns:
            The hash, or None where no tensor has a row per example.
        """
        n = len(rows)
        spread = torch.linspace(0, n - 1, min(n, FINGERPRINT_ROWS)).round().long()
        places = (rows.start + spread).tolist()
        sums = row_checksums(Batch(places, self._run.train.rows.take(places)), double=True)
        if sums is None:
            return None
        return hashlib.sha256(f"{n};".encode() + sums.numpy().tobytes()).hexdigest()[:32]

    def shard(self, unit: Unit, offset: int, manifest: Manifest, known: Tensor | None = None) -> Shard:
        """The projected gradients of a unit's rows.

        Args:
            unit: Which checkpoint and rows of the index.
            offset: The index's id of the first row of this data.
            manifest: The index's manifest.
            known: The rows' checksums, where another shard of the same rows holds them.

        Returns:
            The shard.

        Raises:
            DataError: The rows are not those that were read at another checkpoint.
            IndexFolderError: The checkpoint is not the one of the manifest.
            NotFiniteError: A gradient is NaN or infinite.
        """
        self._load(unit.checkpoint)
        if self._digest(unit.checkpoint) != manifest.checkpoints[unit.checkpoint]["digest"]:
            raise IndexFolderError(
                f"{self._run.where} is not the checkpoint that the index was begun with. Restore it, or build another index."
            )
        features, norms, checksums = [], [], []
        rows = range(unit.start - offset, unit.stop - offset)
        for batch in self._batches(rows, manifest.batch_rows):
            checksums.append(row_checksums(batch, double=True))
            found = self._gradients(batch)
            features.append(self._features(found, batch, unit.checkpoint))
            norms.append(self._norms(found, batch))
        whole = [part for part in checksums if part is not None]
        sums = torch.cat(whole) if len(whole) == len(checksums) else None
        self._refuse_changed(unit, rows, sums, known)
        return Shard(torch.cat(features).cpu(), torch.cat(norms).cpu(), sums)

    def _batches(self, rows: range, size: int) -> Iterator[Batch]:
        for start in range(rows.start, rows.stop, size):
            some = range(start, min(start + size, rows.stop))
            yield Batch(some, self._run.train.rows.take(some))

    def _gradients(self, batch: Batch) -> BatchGradients:
        value = to_device(batch.value, self._run.loaded.device)
        return self._run.gradients(self._run.train, batch, value)

    def _features(self, found: BatchGradients, batch: Batch, checkpoint: int) -> Tensor:
        values = self._projector.features(found.blocks, batch.size, checkpoint)
        refuse_products(values, found, batch, f"train, {self._run.where}")
        return values.to(torch.float32)

    def _norms(self, found: BatchGradients, batch: Batch) -> Tensor:
        if self._groups is None:
            raise RuntimeError("shards are made after prepare")
        columns = [_squared_norm(found.blocks, group, batch.size, self._run) for group in self._groups]
        norms = torch.stack(columns, 1)
        refuse_products(norms, found, batch, f"train, {self._run.where}")
        return norms.to(torch.float32)

    def _refuse_changed(self, unit: Unit, rows: range, sums: Tensor | None, known: Tensor | None) -> None:
        if sums is None:
            return
        seen = self._seen.setdefault((unit.start, unit.stop), sums if known is None else known)
        changed = ~same_checksums(seen, sums)
        if bool(changed.any()):
            row = rows[int(changed.nonzero()[0])]
            raise DataError(
                f"train: row {row} is not what it was at another checkpoint of this index. Turn off augmentation, shuffling "
                "and other randomness in the dataset, or build a new index for the new data."
            )


def _squared_norm(blocks: Any, group: frozenset[str], n: int, run: Run) -> Tensor:
    """Σ over the parameters of a group of ‖g_p‖²."""
    total = torch.zeros(n, dtype=run.dtype, device=run.loaded.device)
    for names, block in blocks.items():
        total += _part(block, names, group, total)
    return total


def _part(block: Block, names: Sequence[str], group: frozenset[str], like: Tensor) -> Tensor:
    inside = [name in group for name in names]
    if not any(inside):
        return torch.zeros_like(like)
    if all(inside):
        return block.squared_norm()
    return block.scaled([float(one) for one in inside]).squared_norm()


def _groups(names: Sequence[str], described: list[dict[str, Any]]) -> list[list[str]]:
    """Parameters that have the same rates at every checkpoint."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        rates = tuple(
            rate.get(name) if isinstance(rate, dict) else rate
            for facts in described
            for rate in (facts["learning_rate"], facts["learning_rate_sum"])
        )
        groups.setdefault(rates, []).append(name)
    return list(groups.values())
