r"""How far an index's scores are from exact ones, measured on some rows; and the first candidates scored exactly.

The projection is random, and the features may be kept in float16. Both are measured together:

    relative error = ‖ŝ − s‖ / ‖s‖,    rank correlation: Spearman's, the mean over queries

over a few rows and queries, s from full gradients, ŝ from the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor

from tracin.data import rows_of
from tracin.methods.altering import altered
from tracin.methods.tracin_cp import TracInCP
from tracin.scoring.top_k import Lists
from tracin.shapes import Float, Int

__all__ = ["Estimate", "compared", "exact", "reranked", "sample"]

SAMPLE_ROWS, SAMPLE_QUERIES = 64, 16


@dataclass(frozen=True)
class Estimate:
    """Errors of an index on a sample.

    Attributes:
        rows: Train rows in it.
        queries: Queries in it.
        relative_error: ‖ŝ − s‖ / ‖s‖; NaN where all exact scores are 0.
        rank_correlation: Spearman's, the mean over queries; NaN where no query has two different scores.
    """

    rows: int
    queries: int
    relative_error: float
    rank_correlation: float

    def __str__(self) -> str:
        error, correlation = self.relative_error, self.rank_correlation
        told = [
            "all exact scores are 0, and the error has no scale"
            if isnan(error)
            else f"relative error {error:.3f}",
            "too few different scores for a rank correlation"
            if isnan(correlation)
            else f"rank correlation {correlation:.3f}",
        ]
        return f"against exact scores of {self.rows} rows and {self.queries} queries: {', '.join(told)}"

    def as_json(self) -> dict[str, Any]:
        """For a result's provenance; None in place of NaN."""
        return {
            name: None if isinstance(value, float) and isnan(value) else value
            for name, value in asdict(self).items()
        }


def sample(kept: Int[Tensor, " n"], seed: int = 0) -> Int[Tensor, " s"]:
    """Some of the rows, without repetition, in order; the same ones every time.

    Args:
        kept: Ids to choose from.
        seed: Which choice.

    Returns:
        At most 64 ids.
    """
    generator = torch.Generator().manual_seed(seed)
    return kept[torch.randperm(len(kept), generator=generator)[:SAMPLE_ROWS].sort().values]


def exact(method: TracInCP, train: Any, ids: Sequence[int], queries: Any) -> Float[Tensor, "m s"]:
    """Exact scores of some train rows.

    Args:
        method: The method behind an index.
        train: All train rows.
        ids: Which of them.
        queries: The queries.

    Returns:
        Scores [m, s].
    """
    alone = altered(method, projection=None, progress=False)
    return alone.influence(rows_of(train, ids), queries).values


def compared(found: Float[Tensor, "m s"], truth: Float[Tensor, "m s"]) -> Estimate:
    """Scores of an index beside exact ones.

    Args:
        found: From the index.
        truth: From full gradients.

    Returns:
        Their distance.

    Example:
        >>> print(compared(torch.tensor([[1.0, 2.0, 3.5]]), torch.tensor([[1.0, 2.0, 3.0]])))
        against exact scores of 3 rows and 1 queries: relative error 0.134, rank correlation 1.000
    """
    found, truth = found.double(), truth.double()
    size = torch.linalg.vector_norm(truth)
    error = float(torch.linalg.vector_norm(found - truth) / size) if float(size) else float("nan")
    m, s = found.shape
    correlation = _correlation(_ranks(found), _ranks(truth)) if s > 1 else float("nan")
    return Estimate(s, m, error, correlation)


def _ranks(values: Tensor) -> Tensor:
    """Ranks within each row; equal values share their mean rank."""
    less = (values[:, None, :] < values[:, :, None]).sum(2)
    equal = (values[:, None, :] == values[:, :, None]).sum(2)
    return less + (equal - 1) / 2.0


def _correlation(mine: Tensor, theirs: Tensor) -> float:
    mine, theirs = mine - mine.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(mine, dim=1) * torch.linalg.vector_norm(theirs, dim=1)
    return float(((mine * theirs).sum(1) / lengths)[lengths > 0].mean())


def reranked(
    lists: Lists, k: int, rows: Int[Tensor, " s"], truth: Float[Tensor, "m s"], *, largest: bool
) -> Lists:
    """The k strongest of each query's candidates by their exact scores.

    Args:
        lists: The candidates of each query.
        k: List length.
        rows: Ids of all candidates of all queries, increasing.
        truth: Their exact scores.
        largest: Proponents, or opponents.

    Returns:
        Lists of k, by exact score, ties by lower id.
    """
    ids = lists.ids.sort(1).values
    values = truth.gather(1, torch.searchsorted(rows, ids))
    order = torch.sort(values, dim=1, descending=largest, stable=True).indices[:, :k]
    return Lists(values.gather(1, order), ids.gather(1, order))
