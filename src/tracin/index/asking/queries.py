r"""Features of queries, for the products with an index: the same projection, at the same checkpoints.

a_c(z') = w_c · P g_c(z')        [c, m, d]; under ``normalize`` w_c / ‖g_c(z')‖ in place of w_c
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tracin.errors import IndexFolderError, OptionError
from tracin.gradients.projection import Projection
from tracin.index.kept.manifest import Manifest
from tracin.index.kept.shards import Unit
from tracin.index.making.tracing import Tracer, choices_of, loss_name, tracing
from tracin.methods.altering import altered
from tracin.methods.tracin_cp import TracInCP
from tracin.scoring.aggregate import Groups
from tracin.shapes import Float

__all__ = ["query_features", "rates", "refuse_another_method", "summed_features", "weighted"]


def query_features(method: TracInCP, manifest: Manifest, queries: Any, where: str) -> Float[Tensor, "c m d"]:
    """The features of the queries at every checkpoint, without any rate.

    Args:
        method: The model and its checkpoints.
        manifest: The index's manifest.
        queries: The query rows.
        where: The index's folder, for messages.

    Returns:
        Features; under ``normalize`` of gradients of unit length.

    Raises:
        IndexFolderError: The index is of another model, loss or trajectory.
    """
    with _opened(method, manifest, queries, where) as tracer:
        out = torch.zeros(len(manifest.checkpoints), tracer.rows, manifest.size)
        for unit, values in _features(tracer, manifest, normalize=method.settings.normalize):
            out[unit.checkpoint, unit.start : unit.stop] = values
    return out


def summed_features(
    method: TracInCP, manifest: Manifest, queries: Any, labels: Tensor | None, where: str
) -> tuple[Float[Tensor, "c g d"], Groups]:
    """The sums of the queries' features by group, in memory that does not grow with the queries.

    Args:
        method: The model and its checkpoints.
        manifest: The index's manifest.
        queries: The query rows.
        labels: The group of each; None: all are one group.
        where: The index's folder, for messages.

    Returns:
        Sums, and the groups.

    Raises:
        IndexFolderError: The index is of another model, loss or trajectory.
        OptionError: There are more or fewer labels than queries.
    """
    with _opened(method, manifest, queries, where) as tracer:
        groups = Groups.of(labels, tracer.rows)
        out = torch.zeros(len(manifest.checkpoints), len(groups), manifest.size)
        for unit, values in _features(tracer, manifest, normalize=method.settings.normalize):
            out[unit.checkpoint].index_add_(0, groups.member[unit.start : unit.stop], values)
    return out, groups


@contextmanager
def _opened(method: TracInCP, manifest: Manifest, queries: Any, where: str) -> Iterator[Tracer]:
    """The queries under their own loss, where the index is of this model."""
    task = replace(method.task, loss=method.task.query_loss or method.task.loss, query_loss=None)
    with tracing(altered(method, task=task), queries, Projection(**manifest.projection)) as tracer:
        _refuse_another_model(tracer, manifest, where)
        tracer.prepare(manifest)
        yield tracer


def _features(
    tracer: Tracer, manifest: Manifest, *, normalize: bool
) -> Iterator[tuple[Unit, Float[Tensor, "r d"]]]:
    """Features of consecutive queries at each checkpoint."""
    for checkpoint in range(len(manifest.checkpoints)):
        for start in range(0, tracer.rows, manifest.shard_rows):
            unit = Unit(checkpoint, start, min(start + manifest.shard_rows, tracer.rows))
            shard = tracer.shard(unit, 0, manifest)
            if normalize:
                lengths = shard.norms.sum(1).sqrt()
                yield unit, shard.features * torch.where(lengths > 0, 1.0 / lengths, 0.0)[:, None]
            else:
                yield unit, shard.features


def _refuse_another_model(tracer: Tracer, manifest: Manifest, where: str) -> None:
    """The loss may be another: queries can have one of their own."""
    now = replace(tracer.manifest(choices_of(manifest)), loss=manifest.loss, batch_rows=manifest.batch_rows)
    differences = manifest.differences(now)
    if differences:
        raise IndexFolderError(
            f"{where} is the index of another model: {'; '.join(differences)}. Give the method that it was built with."
        )


def refuse_another_method(method: TracInCP, manifest: Manifest, where: str) -> None:
    """Compare what is known of a method before any checkpoint is read; queries alone may have another loss.

    Args:
        method: The method that asks.
        manifest: The index's manifest.
        where: The index's folder, for messages.

    Raises:
        IndexFolderError: The index is of another model, training loss or list of checkpoints.
    """
    described = method.trajectory.describe()
    known = [
        {name: value for name, value in facts.items() if name != "digest"} for facts in manifest.checkpoints
    ]
    now = replace(manifest, model=type(method.task.model).__name__, loss=loss_name(method.task))
    differences = replace(manifest, checkpoints=known).differences(replace(now, checkpoints=described))
    if differences:
        raise IndexFolderError(
            f"{where} is the index of another model: {'; '.join(differences)}. Give the method that it was built with; only "
            "query_loss may be another."
        )


def rates(method: TracInCP, manifest: Manifest) -> list[dict[str, float]]:
    """The weight of each parameter at each checkpoint.

    Args:
        method: The checkpoints and the weighting.
        manifest: The parameters.

    Returns:
        name → weight, for each checkpoint.

    Raises:
        OptionError: ``normalize`` with several rates at one checkpoint.
    """
    found = [
        checkpoint.rates(method.settings.weighting, list(manifest.parameters))
        for checkpoint in method.trajectory
    ]
    if method.settings.normalize and any(len(set(some.values())) > 1 for some in found):
        raise OptionError(
            "normalize=True needs one learning rate per checkpoint. Use weighting='uniform', or normalize=False."
        )
    return found


def weighted(
    features: Float[Tensor, "c m d"], rates: Sequence[dict[str, float]], manifest: Manifest
) -> Float[Tensor, "c m d"]:
    """The queries' features times the weights of their parameters.

    Args:
        features: Unweighted.
        rates: Weights by parameter, for each checkpoint.
        manifest: How many features each parameter has.

    Returns:
        Weighted features.
    """
    sizes = torch.tensor(list(manifest.features.values()))
    scale = torch.stack(
        [torch.tensor([some[name] for name in manifest.features]).repeat_interleave(sizes) for some in rates]
    )
    return features * scale[:, None, :]
