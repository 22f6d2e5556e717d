r"""Scores of queries over a finished index: shard by shard, exact over what the index holds.

    score(z, z') = Σ_c Σ_p w_cp ⟨P g_cp(z), P g_cp(z')⟩

The rates w are multiplied onto the queries' features. Row ranges are the outer loop and checkpoints the inner one, so that
the lists are exact over the sum; memory holds the queries' features, one shard, and one tile of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tracin.index.kept.manifest import Manifest, Segment
from tracin.index.kept.shards import Unit, read_features, read_norms, units
from tracin.index.kept.storage import Storage
from tracin.scoring.top_k import Lists, Strongest
from tracin.shapes import Bool, Float, Int

__all__ = ["Scanning", "Tile", "merged", "norm_tiles", "ranges", "tiles"]


@dataclass(frozen=True)
class Tile:
    """Scores [m, r] of some rows, by id."""

    rows: Int[Tensor, " r"]
    values: Float[Tensor, "m r"]


def ranges(manifest: Manifest, segments: Sequence[Segment]) -> list[Unit]:
    """The row ranges of the shards, as the units of the first checkpoint.

    Args:
        manifest: The index's manifest.
        segments: Its rows.

    Returns:
        Units in the order of their rows.
    """
    return [unit for unit in units(manifest, segments) if unit.checkpoint == 0]


def tiles(
    storage: Storage,
    manifest: Manifest,
    wanted: Sequence[Unit],
    queries: Float[Tensor, "c m d"],
    mask: Bool[Tensor, " n"] | None = None,
    normalize: bool = False,
) -> Iterator[Tile]:
    """Scores by row range, summed over the checkpoints.

    Args:
        storage: The index's folder.
        manifest: Its manifest.
        wanted: Row ranges.
        queries: The queries' features, weighted.
        mask: Rows to score; all unless given.
        normalize: Divide by the norms of the rows' full gradients.

    Yields:
        Tiles of the rows that are wanted.
    """
    for unit in wanted:
        kept = torch.arange(unit.start, unit.stop)
        chosen = None if mask is None else mask[unit.start : unit.stop]
        if chosen is not None:
            if not bool(chosen.any()):
                continue
            kept = kept[chosen]
        values = queries.new_zeros(queries.shape[1], len(kept))
        for checkpoint in range(len(manifest.checkpoints)):
            place = replace(unit, checkpoint=checkpoint)
            features = read_features(storage, place, manifest)
            features = features if chosen is None else features[chosen]
            if not normalize:
                values.addmm_(queries[checkpoint], features.mT)
            else:
                norms = read_norms(storage, place, manifest).sum(1).sqrt()
                norms = norms if chosen is None else norms[chosen]
                part = queries[checkpoint] @ features.mT
                values += part * torch.where(norms > 0, 1.0 / norms, 0.0)
        yield Tile(kept, values)


def norm_tiles(
    storage: Storage, manifest: Manifest, segments: Sequence[Segment]
) -> Iterator[tuple[Unit, Tensor]]:
    """Squared norms of every shard, without its features.

    Args:
        storage: The index's folder.
        manifest: Its manifest.
        segments: Its rows.

    Yields:
        Units and their squared norms [r, G].
    """
    for unit in units(manifest, segments):
        yield unit, read_norms(storage, unit, manifest)


@dataclass(frozen=True)
class Scanning:
    """The work of finding each query's lists among the rows of a shard.

    Attributes:
        storage: The index's folder.
        manifest: Its manifest.
        queries: The queries' features, weighted.
        k: List length.
        mask: Rows that may stand in the lists; all unless given.
        normalize: Cosines.
    """

    storage: Storage
    manifest: Manifest
    queries: Tensor
    k: int
    mask: Tensor | None
    normalize: bool

    @contextmanager
    def opened(self) -> Iterator[Callable[[Unit], tuple[Lists, Lists] | None]]:
        """Nothing is kept open.

        Yields:
            What finds the lists in a row range; None where the mask leaves no row of it.
        """
        yield self._lists

    def _lists(self, unit: Unit) -> tuple[Lists, Lists] | None:
        found = list(tiles(self.storage, self.manifest, [unit], self.queries, self.mask, self.normalize))
        if not found:
            return None
        lists = Strongest(self.k, slice(0, self.queries.shape[1]), None)
        for tile in found:
            lists.add(tile.values, tile.rows)
        return lists.lists()


def merged(parts: Sequence[tuple[Lists, Lists]], k: int) -> tuple[Lists, Lists]:
    """The lists of several scans over different rows as those of one.

    Args:
        parts: Lists over rows of increasing ids.
        k: List length.

    Returns:
        Proponents and opponents, as one scan would have found them.
    """
    high, low = parts[0]
    low = Lists(-low.values, low.ids)
    for up, down in parts[1:]:
        high, low = _joined(high, up, k), _joined(low, Lists(-down.values, down.ids), k)
    return high, Lists(-low.values, low.ids)


def _joined(first: Lists, second: Lists, k: int) -> Lists:
    """Of the first's ids all are lower."""
    values, ids = torch.cat([first.values, second.values], 1), torch.cat([first.ids, second.ids], 1)
    order = torch.sort(values, dim=1, descending=True, stable=True).indices[:, :k]
    return Lists(values.gather(1, order), ids.gather(1, order))
