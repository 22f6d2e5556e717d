"""The training rows that speak for and against given labels, and those that oppose a validation set.

Axis letters: n train rows · m rows with evidence · k evidence rows of each sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracin.audit.parts import NONE, Evidence
from tracin.data import open_rows, rows_of
from tracin.index.index import Index
from tracin.methods import TracInCP
from tracin.methods.altering import with_training_loss
from tracin.results import Ranking
from tracin.shapes import Float, Int

__all__ = ["AGREEMENT", "Found", "agreement_of", "evidence_of", "opposition_of"]

AGREEMENT = 25
"""How many proponents the agreement is taken over: of the very strongest nearly all have the given label."""


@dataclass(frozen=True, eq=False)
class Found:
    """Evidence, and the longer lists of proponents that the agreement is read from.

    Args:
        evidence: The strongest rows.
        proponents: The 25 strongest proponents of each row [m, a], −1 where there are fewer.
    """

    evidence: Evidence
    proponents: Int[Tensor, "m a"]


def evidence_of(method: TracInCP, index: Index | None, train: Any, rows: Sequence[int], k: int) -> Found:
    r"""The k strongest proponents and opponents of some training rows among all others.

    With the training loss on both sides, :math:`\operatorname{score}(z, z_i)`: a proponent is a row whose step lowers the
    loss of row i with its given label, an opponent one whose step raises it.

    Args:
        method: Task, checkpoints and settings.
        index: An index of the rows, to ask in place of the gradients.
        train: The rows.
        rows: Positions of the rows that are asked about.
        k: How many of each sign to keep; fewer where fewer rows have it.

    Returns:
        The evidence.
    """
    own = torch.as_tensor(list(rows), dtype=torch.int64)
    asked, method = rows_of(train, own.tolist()), with_training_loss(method)
    n = len(open_rows(train, name="train", batch_size=1)) if index is None else len(index)
    length = min(max(k, AGREEMENT), n - 1)
    if index is None:
        found = method.top_k(train, asked, k=length + 1)
    else:
        found = index.asking(method).top_k(asked, k=length + 1, estimate=False)
    proponents, lowered = _others(found.proponents, own, 1)
    opponents, raised = _others(found.opponents, own, -1)
    kept = [part[:, :k] for part in (proponents, lowered, opponents, raised)]
    return Found(Evidence(own, *kept), proponents[:, :AGREEMENT])


def agreement_of(found: Found, labels: Int[Tensor, " n"]) -> Float[Tensor, " m"]:
    """How far the proponents of a row carry its label: the share of its 25 strongest that do.

    The very strongest proponents of a row have its label, right or wrong: a step towards a class lowers the loss of all rows
    that are called so. For a wrong label rows of other classes come behind them.

    Args:
        found: What ``evidence_of`` found.
        labels: The given class of every training row.

    Returns:
        From 0 to 1, float64; NaN for a row without proponents.
    """
    there = found.proponents != NONE
    same = labels[found.proponents.clamp_min(0)] == labels[found.evidence.rows][:, None]
    return (same & there).sum(1).double() / there.sum(1).double()


def _others(lists: Ranking, own: Int[Tensor, " m"], sign: int) -> tuple[Tensor, Tensor]:
    """Lists one shorter, without the row itself and without rows of the other sign."""
    k = lists.ids.shape[1] - 1
    good = (lists.ids != own[:, None]) & (lists.values * sign > 0)
    # What is to be dropped goes behind the rest; the rest keeps its order.
    order = torch.argsort((~good).int(), dim=1, stable=True)[:, :k]
    kept = good.gather(1, order)
    ids = lists.ids.gather(1, order).where(kept, NONE)
    return ids, lists.values.gather(1, order).where(kept, 0.0)


def opposition_of(method: TracInCP, index: Index | None, train: Any, validation: Any) -> Float[Tensor, " n"]:
    """How far each training row opposes a whole validation set: its influence on the mean validation loss, turned around.

    Args:
        method: Task, checkpoints and settings.
        index: An index of the rows, to ask in place of the gradients.
        train: The rows.
        validation: Validation rows, under ``task.query_loss`` where it is given.

    Returns:
        Above 0 where training on the row raised the validation loss, float64.
    """
    found = method.aggregate(train, validation) if index is None else index.aggregate(validation)
    return -found.values[0].double()
