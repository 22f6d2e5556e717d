r"""Features of queries, for the products with an index: the same projection, at the same checkpoints.

a_c(z') = w_c · P g_c(z')        [c, m, d]; under ``normalize`` w_c / ‖g_c(z')‖ in place of w_c
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tracin.errors import IndexFolderError, OptionError
from tracin.gradients.projection import Projection
from tracin.index.kept.manifest import Manifest
from tracin.index.kept.shards import Unit
from tracin.index.making.tracing import Tracer, choices_of, tracing
from tracin.methods.tracin_cp import TracInCP
from tracin.shapes import Float

__all__ = ["query_features", "rates", "weighted"]


def query_features(
    method: TracInCP, manifest: Manifest, queries: Any, groups: Tensor | Literal["all"] | None, where: str
) -> Float[Tensor, "c m d"]:
    """The features of the queries at every checkpoint, without any rate, or their means by group.

    Args:
        method: The model and its checkpoints.
        manifest: The index's manifest.
        queries: The query rows.
        groups: The group of each query, 0 to g - 1, for means [c, g, d]; ``"all"``: one group; None: every query by itself.
        where: The index's folder, for messages.

    Returns:
        Features; under ``normalize`` of gradients of unit length.

    Raises:
        IndexFolderError: The index is of another model, loss or trajectory.
        OptionError: ``groups`` has another length than the queries.
    """
    task = replace(method.task, loss=method.task.query_loss or method.task.loss, query_loss=None)
    asking = TracInCP(
        task,
        method.trajectory,
        **{
            name: getattr(method.settings, name)
            for name in ("weighting", "normalize", "batch_size", "collate", "device", "memory")
        },
        progress=False,
    )
    with tracing(asking, queries, Projection(**manifest.projection)) as tracer:
        _refuse_another_model(tracer, manifest, where)
        m = tracer.rows
        groups = torch.zeros(m, dtype=torch.int64) if isinstance(groups, str) else groups
        if groups is not None and len(groups) != m:
            raise OptionError(f"by has {len(groups)} entries for {m} rows. Give the group of each row.")
        tracer.prepare(manifest)
        size = m if groups is None else int(groups.max()) + 1
        out = torch.zeros(len(manifest.checkpoints), size, manifest.size)
        for checkpoint in range(len(manifest.checkpoints)):
            for start in range(0, m, manifest.shard_rows):
                stop = min(start + manifest.shard_rows, m)
                shard = tracer.shard(Unit(checkpoint, start, stop), 0, manifest)
                values = shard.features
                if method.settings.normalize:
                    lengths = shard.norms.sum(1).sqrt()
                    values = values * torch.where(lengths > 0, 1.0 / lengths, 0.0)[:, None]
                if groups is None:
                    out[checkpoint, start:stop] = values
                else:
                    out[checkpoint].index_add_(0, groups[start:stop], values)
        if groups is not None:
            out /= groups.bincount(minlength=size)[None, :, None]
    return out


def _refuse_another_model(tracer: Tracer, manifest: Manifest, where: str) -> None:
    """The loss may be another: queries can have one of their own."""
    now = replace(tracer.manifest(choices_of(manifest)), loss=manifest.loss, batch_rows=manifest.batch_rows)
    differences = manifest.differences(now)
    if differences:
        raise IndexFolderError(
            f"{where} is the index of another model: {'; '.join(differences)}. Give the method that it was built with."
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
