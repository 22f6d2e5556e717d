"""How much of what was planted a ranking finds, against how much of the data one looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tracin.errors import DataError, NotFiniteError, OptionError
from tracin.shapes import Bool, Float, Int

__all__ = ["DetectionCurve"]


@dataclass(frozen=True, eq=False)
class DetectionCurve:
    """The share of planted rows found against the share of rows inspected, highest score first.

    Rows are inspected by descending score, ties by the lower row, as everywhere in tracin::

        inspected[k] = k / n        found[k] = |{planted rows among the first k}| / |{planted rows}|

    A random order lies on the diagonal; a perfect one climbs to 1 after ``planted / n``
    (Pruthi et al. 2020, section 4.1 and figure 2).

    Args:
        scores: One score per row [n]: the higher, the more suspect, such as ``SelfInfluence.values``.
        planted: Which rows were planted [n], such as ``plant_flips(...).mask``.

    Raises:
        DataError: Lengths that differ, a mask that isn't boolean, none or all rows planted.
        NotFiniteError: A score that is NaN or infinite; the row is named.

    Example:
        >>> curve = DetectionCurve([0.9, 0.1, 0.8, 0.2, 0.3], [True, False, False, True, False])
        >>> curve.found_at(0.2), curve.found_at(1.0)
        (0.5, 1.0)
        >>> round(curve.auroc, 3), round(curve.average_precision, 3)
        (0.667, 0.75)
    """

    scores: Tensor | np.ndarray | Sequence[float]
    planted: Tensor | np.ndarray | Sequence[bool]

    def __post_init__(self) -> None:
        scores = torch.as_tensor(self.scores).detach().cpu().to(torch.float64)
        planted = torch.as_tensor(self.planted).detach().cpu()
        refuse_bad_input(scores, planted)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "planted", planted)

    @property
    def rows(self) -> int:
        """The number of rows n."""
        return len(self.order)

    @property
    def planted_rows(self) -> int:
        """How many rows were planted."""
        return int(self.flags.sum())

    @property
    def values(self) -> Float[Tensor, " n"]:
        """The scores as a float64 vector [n]."""
        return torch.as_tensor(self.scores)

    @property
    def flags(self) -> Bool[Tensor, " n"]:
        """The planted rows as a boolean vector [n]."""
        return torch.as_tensor(self.planted)

    @cached_property
    def order(self) -> Int[Tensor, " n"]:
        """The rows in the order in which they are inspected [n]."""
        return torch.argsort(self.values, descending=True, stable=True)

    @cached_property
    def inspected(self) -> Float[Tensor, " points"]:
        """The share of rows inspected after 0, 1, …, n rows [n + 1]."""
        return torch.arange(self.rows + 1, dtype=torch.float64) / self.rows

    @cached_property
    def found(self) -> Float[Tensor, " points"]:
        """The share of planted rows found after 0, 1, …, n rows [n + 1]."""
        return self._hits.to(torch.float64) / self.planted_rows

    @cached_property
    def perfect(self) -> Float[Tensor, " points"]:
        """The curve of the perfect order [n + 1]."""
        return (torch.arange(self.rows + 1, dtype=torch.float64) / self.planted_rows).clamp(max=1.0)

    @cached_property
    def _hits(self) -> Int[Tensor, " points"]:
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.flags[self.order].cumsum(0)])

    def count_at(self, share: float) -> int:
        """How many planted rows are among the first ``⌊share · n⌋`` rows.

        Args:
            share: The share of rows inspected, from 0 to 1.

        Returns:
            A number of rows.

        Raises:
            OptionError: ``share`` outside [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise OptionError(f"share is the part of the rows inspected, from 0 to 1, got {share}")
        # 0.29 * 100 is 28.999… in floating point, and 29 rows are meant.
        return int(self._hits[int(share * self.rows + 1e-9)])

    def found_at(self, share: float) -> float:
        """The share of the planted rows that are among the first ``⌊share · n⌋`` rows.

        Args:
            share: The share of rows inspected, from 0 to 1.

        Returns:
            From 0 to 1.

        Raises:
            OptionError: ``share`` outside [0, 1].
        """
        return self.count_at(share) / self.planted_rows

    @cached_property
    def auroc(self) -> float:
        """The chance that a planted row scores higher than a clean one, ties counted as one half."""
        _, group, sizes = torch.unique(self.values, return_inverse=True, return_counts=True)
        last = sizes.cumsum(0).to(torch.float64)
        mid_ranks = (last - (sizes - 1) / 2)[group]
        planted, clean = self.planted_rows, self.rows - self.planted_rows
        wins = float(mid_ranks[self.flags].sum()) - planted * (planted + 1) / 2
        return wins / (planted * clean)

    @cached_property
    def average_precision(self) -> float:
        """Σ_k (recall_k − recall_{k−1}) · precision_k over the distinct scores, highest first."""
        values = self.values[self.order]
        ends = torch.cat([(values[1:] != values[:-1]).nonzero().flatten(), torch.tensor([self.rows - 1])]) + 1
        hits = self._hits[ends].to(torch.float64)
        gained = torch.diff(hits, prepend=torch.zeros(1, dtype=torch.float64)) / self.planted_rows
        return float((gained * hits / ends).sum())


def refuse_bad_input(scores: Tensor, planted: Tensor) -> None:
    if scores.ndim != 1 or scores.shape[0] == 0:
        raise DataError(f"scores must hold one number per row, got the shape {tuple(scores.shape)}")
    if planted.dtype != torch.bool:
        raise DataError(f"planted must be a boolean mask of the planted rows, got {planted.dtype}")
    if planted.shape != scores.shape:
        raise DataError(
            f"{scores.shape[0]} scores and a mask of shape {tuple(planted.shape)}: give one flag per row"
        )
    finite = scores.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise NotFiniteError(f"the score of row {row} is {float(scores[row])}; a ranking needs finite scores")
    if not planted.any() or planted.all():
        found = "no row is" if not planted.any() else "every row is"
        raise DataError(f"{found} marked as planted: a detection curve needs planted and clean rows")
