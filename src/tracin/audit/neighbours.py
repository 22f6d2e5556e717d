"""What the rows that look alike are called: votes of the nearest neighbours, and near-duplicates with different labels.

Axis letters: n rows · r rows of a tile · d features · k neighbours · C classes · s checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracin.audit.parts import Duplicates
from tracin.shapes import Float, Int

__all__ = ["NEIGHBOURS", "REFERENCE", "Neighbourhood", "duplicates_of", "unit"]

NEIGHBOURS = 20
REFERENCE = 20_000
"""The most rows among which neighbours are sought; of more rows so many are drawn."""

_TILE_BYTES = 64 << 20
# Cosines that differ by less are equal up to rounding.
_TIE = 1e-12
# Rows beyond the k nearest that are looked at for ties.
_SPARE = 12


def unit(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Features of length 1, float64; features that are all zero stay so.

    Args:
        features: One vector per row.

    Returns:
        Scaled by the largest entry first, so that neither tiny nor huge features leave the range of float64.
    """
    tiny = torch.finfo(torch.float64).tiny
    values = features.detach().double()
    values = values / values.abs().amax(1, keepdim=True).clamp_min(tiny)
    return values / values.norm(dim=1, keepdim=True).clamp_min(tiny)


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """The rows as the last layer sees them at some checkpoints, and their given classes.

    Args:
        features: One vector of length 1 per row and checkpoint, s tensors [n, d].
        labels: The given classes [n].
        classes: The number of classes.
        reference: The rows among which neighbours are sought, ascending.
        k: Neighbours.
    """

    features: Sequence[Float[Tensor, "n d"]]
    labels: Int[Tensor, " n"]
    classes: int
    reference: Int[Tensor, " m"]
    k: int

    @classmethod
    def of(cls, features: Sequence[Tensor], labels: Tensor, classes: int) -> Neighbourhood:
        """The neighbourhood of all rows; of very many rows a sample stands for all."""
        n = len(labels)
        reference = torch.arange(n)
        if n > REFERENCE:
            drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))
            reference = drawn[:REFERENCE].sort().values
        k = min(NEIGHBOURS, len(reference) - 1)
        return cls([unit(part) for part in features], labels, classes, reference, k)

    def votes(self, rows: Int[Tensor, " r"]) -> Float[Tensor, "r C"]:
        """The share of each row's k nearest neighbours that are called each class, the mean over the checkpoints.

        Nearness is the cosine of the features, and the row itself does not count. Where several rows are equally near and
        not all of them are among the k, they share the places that are left, so that the order of the rows does not matter.

        Args:
            rows: Which rows.

        Returns:
            Shares that add up to 1, float64.
        """
        total = torch.zeros(len(rows), self.classes, dtype=torch.float64)
        size = max(1, _TILE_BYTES // (8 * len(self.reference)))
        for features in self.features:
            known = features[self.reference]
            for at in torch.arange(len(rows)).split(size):
                total[at] += self._votes(features, known, rows[at])
        return total / len(self.features)

    def _votes(self, features: Tensor, known: Tensor, rows: Tensor) -> Tensor:
        cosines = features[rows] @ known.mT
        places = torch.searchsorted(self.reference, rows).clamp(max=len(self.reference) - 1)
        itself = (self.reference[places] == rows).nonzero().flatten()
        cosines[itself, places[itself]] = -torch.inf
        # Only where more rows are tied than _SPARE is the whole line of cosines looked through.
        count = min(self.k + _SPARE, cosines.shape[1])
        near, places = cosines.topk(count, dim=1)
        last = near[:, self.k - 1 : self.k]
        if count < cosines.shape[1] and bool((near[:, -1:] >= last - _TIE).any()):
            near, places = cosines, torch.arange(cosines.shape[1]).expand_as(cosines)
        nearer, tied = near > last + _TIE, (near - last).abs() <= _TIE
        left = (self.k - nearer.sum(1)).double() / tied.sum(1)
        at, slot = (nearer | tied).nonzero().unbind(1)
        other = places[at, slot]
        weights = torch.where(nearer[at, slot], 1.0, left[at])
        votes = torch.zeros(len(rows), self.classes, dtype=torch.float64)
        votes.index_put_((at, self.labels[self.reference[other]]), weights, accumulate=True)
        return votes / self.k


def duplicates_of(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], threshold: float, limit: int = 100_000
) -> Duplicates:
    """All pairs of rows with different labels whose features have a cosine of ``threshold`` or more.

    Args:
        features: One vector per row; a row of zeros has no duplicates.
        labels: The given class of each row.
        threshold: From 0 to 1.
        limit: The most pairs to keep; the nearest ones.

    Returns:
        The pairs.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0]])
        >>> duplicates_of(features, torch.tensor([0, 0, 1, 0]), 0.99).rows
        tensor([[0, 2],
                [2, 3]])
    """
    directions = unit(features)
    n = len(labels)
    pairs, cosines = [torch.empty(0, 2, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)]
    for rows in torch.arange(n).split(max(1, _TILE_BYTES // (8 * n))):
        first = int(rows[0])
        near = directions[rows] @ directions[first:].mT
        # Rounding must not lose a pair of equal rows at a threshold of 1.
        found = (near >= threshold - _TIE) & (labels[rows][:, None] != labels[first:][None])
        at, other = torch.triu(found, diagonal=1).nonzero().unbind(1)
        pairs.append(torch.stack([at + first, other + first], 1))
        cosines.append(near[at, other])
        if sum(map(len, pairs)) > 2 * limit:
            pairs, cosines = _nearest(pairs, cosines, limit)
    pairs, cosines = _nearest(pairs, cosines, limit)
    return Duplicates(pairs[0], cosines[0].clamp(max=1.0), threshold)


def _nearest(pairs: list[Tensor], cosines: list[Tensor], limit: int) -> tuple[list[Tensor], list[Tensor]]:
    both, values = torch.cat(pairs), torch.cat(cosines)
    kept = torch.argsort(values, descending=True, stable=True)[:limit].sort().values
    return [both[kept]], [values[kept]]
