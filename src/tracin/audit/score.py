r"""One number from the signals, chosen once for all data, and the rule of the flag.

With the rank :math:`r_s(i) = (\text{mean place of row } i \text{ by suspicion } s - \tfrac12) / n`, which lies strictly between
0 and 1, and D the rows in doubt:

.. math::
    \operatorname{score}_i = \tfrac12 \, [i \in D] + \tfrac12 \cdot \frac{1}{|S|} \sum_{s \in S} r_s(i)

For classes S is the mean loss over the checkpoints, the share of neighbours with another label, and the doubt; D is where the
doubt exceeds 1/3. Without classes S is the mean loss; D is where it is far above those of the other rows. So a score from 0.5 on
means that the rule flags the row, the score does not fall when a suspicion rises, equal rows have equal scores, and their order
does not matter.

The combination was chosen on Fashion-MNIST (3,000 rows, a CNN and an MLP, two schedules, random and hardest flips, 12 epochs;
the MLP also after 60, when it knows most wrong labels by heart). Self-influence is not in it: it lowered it there. AUM in place
of the loss does as well after 12 epochs and worse after 60: margins grow as labels are learnt by heart, so that the last
checkpoints outweigh the early ones, which had not learnt the wrong labels; the losses of the last ones are near 0.

Axis letter: n rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tracin.audit.parts import FLAGGED, Cutoff
from tracin.audit.signals import Seen
from tracin.shapes import Bool, Float

__all__ = [
    "DOUBT",
    "flagged_by_doubt",
    "flagged_by_size",
    "rank_share",
    "score_of",
    "suspicions_of",
]

DOUBT = 1 / 3
"""How far another class must be preferred to the given one."""

_FAR = 3.0


def rank_share(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The place of each row in ascending order as a share of all, equal values at their mean place.

    Args:
        values: One finite number per row.

    Returns:
        Strictly between 0 and 1, float64.

    Example:
        >>> rank_share(torch.tensor([1.0, 5.0, 5.0, 9.0]))
        tensor([0.1250, 0.5000, 0.5000, 0.8750], dtype=torch.float64)
    """
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0).double()
    return (ends - sizes / 2)[group] / len(values)


def score_of(suspicions: Mapping[str, Tensor], flagged: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The score of the module's formula.

    Args:
        suspicions: Suspicions by name, the higher the more suspect [n].
        flagged: The rows in doubt.

    Returns:
        From 0 to 1; from 0.5 on where flagged.
    """
    shares = torch.stack([rank_share(values.double()) for values in suspicions.values()])
    return (flagged.double() + shares.mean(0)) / 2


def suspicions_of(seen: Seen) -> dict[str, Tensor]:
    """The signals that the score is made of, turned so that higher is more suspect.

    Args:
        seen: What forward passes tell.

    Returns:
        Suspicions by name.
    """
    found = {"mean_loss": seen.mean_loss}
    if seen.doubt is not None:
        found["doubt"] = seen.doubt
    if seen.neighbour_agreement is not None:
        found["neighbour_agreement"] = -seen.neighbour_agreement
    return found


def flagged_by_doubt(doubt: Float[Tensor, " n"], neighbours: bool) -> tuple[Bool[Tensor, " n"], Cutoff]:
    """The rows that the model, averaged over its checkpoints, and the neighbours would call something else.

    Args:
        doubt: From −1 to 1.
        neighbours: Whether neighbours were asked.

    Returns:
        The rows in doubt, and the rule.
    """
    who = "the predictions averaged over the checkpoints"
    who += " and the labels of the most similar rows together prefer" if neighbours else " prefer"
    why = (
        f"A row is flagged where {who} another class to the given one by more than a third (of a scale on which 1 is "
        "unanimous); such rows have scores from 0.5 on. How many of the flagged labels are wrong was not measured: calibrate "
        "does it."
    )
    return doubt > DOUBT, Cutoff(FLAGGED, why)


def flagged_by_size(sizes: Float[Tensor, " n"], what: str) -> tuple[Bool[Tensor, " n"], Cutoff]:
    """The rows far above the others: above the third quartile by more than three times the distance of the quartiles (Tukey).

    Args:
        sizes: Residuals without sign, or losses.
        what: Their name, in the plural.

    Returns:
        The rows, and the rule.
    """
    low, high = torch.quantile(sizes.double(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    limit = float(high + _FAR * (high - low))
    why = (
        f"A row is flagged where its value among the {what} exceeds {limit:.4g}, the third quartile plus three times the "
        "distance of the quartiles; such rows have scores from 0.5 on. How many of the flagged targets are wrong was not "
        "measured."
    )
    return sizes > limit, Cutoff(FLAGGED, why)
