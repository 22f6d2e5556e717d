"""What an audit is made of: signals, evidence, the cut-off, and their tables.

Axis letters: n train rows · m rows with evidence · k evidence rows of each sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tracin.audit.names import problem_of, unique_names
from tracin.errors import OptionError, ResultError
from tracin.shapes import Bool, Float, Int

__all__ = [
    "FLAGGED",
    "NONE",
    "Calibration",
    "Cutoff",
    "Duplicates",
    "Evidence",
    "Findings",
    "ranks_of",
    "require_calibration",
]

FLAGGED = 0.5
"""The score from which on the rule flags a row where nothing was calibrated."""

NONE = -1
"""What fills a list of rows that is shorter than its tensor is wide."""


def ranks_of(values: Tensor) -> Int[Tensor, " n"]:
    """The place of every row by descending value, from 1; ties by lower row.

    Args:
        values: One number per row [n]; NaN comes last.

    Returns:
        Places [n].

    Example:
        >>> ranks_of(torch.tensor([0.5, 2.0, 0.5]))
        tensor([2, 1, 3])
    """
    order = torch.argsort(values.nan_to_num(nan=-torch.inf), descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, len(order) + 1)
    return places


@dataclass(frozen=True, eq=False)
class Evidence:
    """The training rows that speak for and against the given labels of some rows; no row is evidence for itself.

    Args:
        rows: Which rows have evidence [m].
        proponents: Row ids [m, k], the strongest first; −1 where there are fewer.
        proponent_scores: Their scores [m, k]; 0 where there is no row.
        opponents: Row ids [m, k], the strongest first.
        opponent_scores: Their scores [m, k], below 0.

    Raises:
        ResultError: The shapes do not agree.
    """

    rows: Int[Tensor, " m"]
    proponents: Int[Tensor, "m k"]
    proponent_scores: Float[Tensor, "m k"]
    opponents: Int[Tensor, "m k"]
    opponent_scores: Float[Tensor, "m k"]

    def __post_init__(self) -> None:
        shape = tuple(self.proponents.shape)
        for name in ("proponents", "proponent_scores", "opponents", "opponent_scores"):
            if tuple(getattr(self, name).shape) != shape or len(shape) != 2 or shape[0] != len(self.rows):
                raise ResultError(
                    f"Evidence.{name} is {list(getattr(self, name).shape)}: give [m, k] for {len(self.rows)} rows."
                )

    @cached_property
    def _place(self) -> dict[int, int]:
        return {row: at for at, row in enumerate(self.rows.tolist())}

    def of(self, row: int) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[int, float], ...]] | None:
        """The evidence on one row.

        Args:
            row: The row's position.

        Returns:
            ``(row, score)`` of its proponents and of its opponents, the strongest first; None where none was looked for.
        """
        at = self._place.get(row)
        if at is None:
            return None
        return (
            _listed(self.proponents[at], self.proponent_scores[at]),
            _listed(self.opponents[at], self.opponent_scores[at]),
        )


def _listed(ids: Tensor, scores: Tensor) -> tuple[tuple[int, float], ...]:
    pairs = zip(ids.tolist(), scores.tolist(), strict=True)
    return tuple((row, score) for row, score in pairs if row != NONE)


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Pairs of rows that the model sees as nearly the same and that carry different labels.

    Args:
        rows: The pairs [p, 2], the lower row first, in ascending order.
        cosines: The cosine of each pair's features [p].
        threshold: The cosine from which on a pair is listed.
    """

    rows: Int[Tensor, "p 2"]
    cosines: Float[Tensor, " p"]
    threshold: float

    @cached_property
    def _partners(self) -> dict[int, list[tuple[float, int]]]:
        found: dict[int, list[tuple[float, int]]] = {}
        for (one, other), cosine in zip(self.rows.tolist(), self.cosines.tolist(), strict=True):
            found.setdefault(one, []).append((-cosine, other))
            found.setdefault(other, []).append((-cosine, one))
        return {row: sorted(partners) for row, partners in found.items()}

    def of(self, row: int) -> tuple[int, ...]:
        """The partners of one row, the nearest first; of equally near ones the lower row.

        Args:
            row: The row's position.

        Returns:
            Row ids.
        """
        return tuple(other for _, other in self._partners.get(row, ()))


@dataclass(frozen=True)
class Cutoff:
    """Where the flag ends.

    Args:
        score: Rows with this score or more are flagged.
        why: The rule, and where it comes from, in a sentence.
        expected_precision: The share of flagged rows that is expected to be wrong, where that was measured.
    """

    score: float
    why: str
    expected_precision: float | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""What a score is worth, from labels that were made wrong on purpose and a training on them.

    With F(t) the share of planted rows whose score is t or more, and U(t) that of the other rows, of which some were wrong
    before:

    .. math::
        \hat\pi = \min_t \frac{U(t)}{F(t)} \qquad \operatorname{precision}(t) = \hat\pi \, \frac{F(t)}{U(t)}

    :math:`\hat\pi` is the share of the given labels that is wrong, if wrong labels look like planted ones and the highest
    scores are those of wrong labels (Blanchard, Lee and Scott 2010); t runs over the thresholds that find half or more.

    Args:
        thresholds: Thresholds t in descending order; ``calibrate`` leaves out those that flag fewer than 10 rows.
        precision: The share of flagged rows that is expected to be wrong among the given labels.
        found: F(t).
        flagged: U(t).
        planted_precision: The share of planted rows among all flagged ones.
        wrong: The share of the given labels that is expected to be wrong.
        fraction: The share of labels made wrong.
        rows: The number of rows.
        seeds: The seeds; with several the counts are added up.
        wanted: The precision that the cut-off is to reach.
    """

    thresholds: tuple[float, ...]
    precision: tuple[float, ...]
    found: tuple[float, ...]
    flagged: tuple[float, ...]
    planted_precision: tuple[float, ...]
    wrong: float
    fraction: float
    rows: int
    seeds: tuple[int, ...]
    wanted: float

    @property
    def place(self) -> int:
        """Where in the lists the cut-off lies: the lowest threshold with the precision wanted, else the lowest.

        Not below ``FLAGGED``: there scores are ranks alone, and say nothing of another share of wrong labels.
        """
        places = [at for at, value in enumerate(self.thresholds) if value >= FLAGGED] or [0]
        return max([at for at in places if self.precision[at] >= self.wanted] or places)

    @property
    def cutoff(self) -> Cutoff:
        """The cut-off, with what is expected of it."""
        at = self.place
        times = f"{len(self.seeds)} times" if len(self.seeds) > 1 else "once"
        why = (
            f"{self.fraction:.0%} of the {self.rows:,} labels were made wrong on purpose, and the model was trained anew "
            f"{times}: {self.found[at]:.0%} of the rows made wrong had a score of {self.thresholds[at]:.3f} or more, and "
            f"{self.flagged[at]:.1%} of the others. If wrong labels are like those made wrong, about {self.wrong:.1%} of the "
            f"given labels are wrong, and {self.precision[at]:.0%} of those flagged."
        )
        if self.precision[at] < self.wanted:
            why += f" No cut-off from {FLAGGED} on reaches the {self.wanted:.0%} that were asked for."
        return Cutoff(self.thresholds[at], why, self.precision[at])


def require_calibration(value: Any, where: str) -> None:
    """Refuse what is no calibration.

    Args:
        value: What the user gave.
        where: Who took it.

    Raises:
        OptionError: It is something else.
    """
    if not isinstance(value, Calibration):
        raise OptionError(
            f"{where}: calibration is a {type(value).__name__}. Give what tracin.audit.calibrate(study) returned."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """The numbers of an audit, one per training row in the order of the rows.

    Args:
        score: How suspect each row is [n], from 0 to 1, float64.
        is_issue: Which rows are flagged [n].
        signals: What the score is made of and what stands beside it, by name [n]; NaN where a row has no value.
        given_labels: The given classes, int64, or targets, float64 [n]; None where the task tells none.
        suggested_labels: The suggested classes or targets [n]; None where there are none.
        predicted_labels: The classes preferred on average over the checkpoints [n], likewise.
        labels: The labels as the training rows have them [n, ...], which ``apply`` gives back; None where they are
            ``given_labels``.
        classes: The number of classes; None for a task without.
        class_names: The name of each class; names that occur twice get the number of their class.
        evidence: Proponents and opponents of some rows.
        duplicates: Near-duplicates with different labels.
        cutoff: Where the flag ends, and why.
        calibration: What planted flips say of the score.
        notes: What is lost or approximate, in sentences.
        provenance: What made these numbers, as JSON would hold it.
    """

    score: Float[Tensor, " n"]
    is_issue: Bool[Tensor, " n"]
    signals: Mapping[str, Tensor]
    cutoff: Cutoff
    given_labels: Tensor | None = None
    suggested_labels: Tensor | None = None
    predicted_labels: Tensor | None = None
    labels: Tensor | None = None
    classes: int | None = None
    class_names: Sequence[str] | None = None
    evidence: Evidence | None = None
    duplicates: Duplicates | None = None
    calibration: Calibration | None = None
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.score)
        named = {
            **self.signals,
            "is_issue": self.is_issue,
            "given_labels": self.given_labels,
            "suggested_labels": self.suggested_labels,
        }
        for name, values in named.items():
            if values is not None and tuple(values.shape) != (n,):
                raise ResultError(f"Audit: {name} is {list(values.shape)}, and there are {n} rows.")
        if not bool(((self.score >= 0) & (self.score <= 1)).all()):
            raise ResultError("Audit: a score is not from 0 to 1.")
        if self.labels is not None and tuple(self.labels.shape[:1]) != (n,):
            raise ResultError(f"Audit: labels is {list(self.labels.shape)}, and there are {n} rows.")
        if self.class_names is not None:
            problem = problem_of(self.class_names)
            if problem is not None:
                raise ResultError(f"Audit: {problem}")
            object.__setattr__(self, "class_names", unique_names(self.class_names))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "signals", dict(self.signals))

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def order(self) -> Int[Tensor, " n"]:
        """The rows by descending score, ties by lower row."""
        return torch.argsort(self.score, descending=True, stable=True)

    @cached_property
    def rank(self) -> Int[Tensor, " n"]:
        """The place of each row in ``order``, from 1."""
        return ranks_of(self.score)

    def label_name(self, label: Any) -> str | int | float:
        """A class by its name, or its number where it has none; a target as it is.

        Args:
            label: A class number or a target.

        Returns:
            How to show it.
        """
        if self.classes is None:
            return float(label)
        number, names = int(label), self.class_names
        return names[number] if names is not None and 0 <= number < len(names) else number
