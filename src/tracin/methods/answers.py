"""Results of a method, made in one way from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tracin.results import Ranking, Scores, SelfInfluence, TopK
from tracin.scoring.aggregate import Groups
from tracin.scoring.top_k import Lists
from tracin.shapes import Float

__all__ = ["aggregate_result", "groups_record", "scores_result", "self_influence_result", "top_k_result"]

ELSEWHERE = "TracInCP(normalize=True) compares the directions of gradients instead of their lengths."


def scores_result(values: Float[Tensor, "q n"], record: Mapping[str, Any]) -> Scores:
    """Scores of all train rows in order for all queries in order.

    Args:
        values: The scores.
        record: What they were made from.

    Returns:
        The result.
    """
    q, n = values.shape
    return Scores(
        values=values, train_ids=torch.arange(n), query_ids=torch.arange(q), provenance=dict(record)
    )


def aggregate_result(
    values: Float[Tensor, "g n"], groups: Groups, record: Mapping[str, Any], by: Any, reduction: str
) -> Scores:
    """Scores of all train rows in order for all groups in order.

    Args:
        values: The scores.
        groups: The groups of the validation rows.
        record: What they were made from.
        by: What the user gave.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        The result; its query ids are the groups' labels.
    """
    ids = torch.arange(values.shape[1])
    told = {**record, **groups_record(groups, by, reduction)}
    return Scores(values=values, train_ids=ids, query_ids=groups.labels, provenance=told)


def groups_record(groups: Groups, by: Any, reduction: str) -> dict[str, Any]:
    """What a result's provenance says of its groups.

    Args:
        groups: The groups of the validation rows.
        by: What the user gave.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        A JSON-able record.
    """
    return {
        "by": by if by is None or isinstance(by, str) else "given",
        "reduction": reduction,
        "group_sizes": groups.sizes.tolist(),
    }


def self_influence_result(values: Float[Tensor, " n"], record: Mapping[str, Any]) -> SelfInfluence:
    """Self-influence of all train rows in order.

    Args:
        values: The scores.
        record: What they were made from.

    Returns:
        The result.
    """
    return SelfInfluence(values=values, train_ids=torch.arange(len(values)), provenance=dict(record))


def top_k_result(
    high: Lists, low: Lists, record: Mapping[str, Any], n: int, *, mend: str | None = ELSEWHERE
) -> TopK:
    """The lists of all queries in order, with a note when a few rows fill most of them.

    Args:
        high: Proponents.
        low: Opponents, signs kept.
        record: What they were made from.
        n: Train rows.
        mend: What the note advises; None: no note is due.

    Returns:
        The result.
    """
    share, rows = _dominance(high.ids, low.ids, n)
    note = f"the same {rows} rows fill {share:.0%} of all queries' lists. Rows with large gradients dominate; {mend}"
    return TopK(
        proponents=Ranking(ids=high.ids, values=high.values),
        opponents=Ranking(ids=low.ids, values=low.values),
        query_ids=torch.arange(len(high.ids)),
        provenance=dict(record),
        notes=(note,) if mend is not None and share >= 0.8 else (),
    )


def _dominance(high: Tensor, low: Tensor, n: int) -> tuple[float, int]:
    """The share of all entries that the 2k most frequent rows fill, 0 where there is little choice; and 2k."""
    q, k = high.shape
    rows = min(2 * k, n)
    if q < 5 or n < 5 * k:
        return 0.0, rows
    entries = torch.cat([high, low], 1).reshape(-1)
    counts = entries.bincount(minlength=n)
    return float(counts.topk(rows).values.sum()) / len(entries), rows
