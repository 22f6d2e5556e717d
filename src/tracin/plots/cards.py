"""What the figures and the report draw: a row as a card, a prediction with its proponents and opponents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracin.errors import DataError, OptionError
from tracin.plots.pictures import as_shown, plain
from tracin.results import Scores, TopK

__all__ = ["Card", "Explanation", "Gallery", "LossPath"]


@dataclass(frozen=True, eq=False)
class Card:
    """One row as it is drawn: a picture, a text or a table, with what is known of it.

    Args:
        shown: A picture array, a text or a mapping; made ready by ``as_shown``.
        row: The row's position in its data.
        label: The label the row was given.
        true_label: The label before flips were planted, where that is known.
        predicted: What the model says.
        correct: Whether the model's class is the label's; None where that isn't asked, as in regression.
        score: A score towards the query (positive: proponent), or the self-influence.

    Raises:
        DataError: An array that is no picture.

    Example:
        >>> Card("a fine film", row=12, label="positive", true_label="negative").planted
        True
    """

    shown: Any
    row: int | None = None
    label: str | None = None
    true_label: str | None = None
    predicted: str | None = None
    correct: bool | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shown", as_shown(self.shown))

    @property
    def planted(self) -> bool | None:
        """Whether the given label was planted; None where the true label isn't known."""
        return None if self.true_label is None else self.true_label != self.label


@dataclass(frozen=True, eq=False)
class Gallery:
    """How the rows of a data set become cards.

    Args:
        shown: Position of a row → what is shown of it (picture array, text or mapping).
        labels: The given label of each row [n]: class numbers or numbers, if there are any.
        class_names: The name of each class; without it a label is shown as its number.
        true_labels: The labels before flips were planted [n].
        predicted: The model's prediction for each row [n].

    Raises:
        OptionError: A row outside the data.

    Example:
        >>> gallery = Gallery(["ham", "spam"].__getitem__, labels=[0, 1], class_names=["fine", "junk"])
        >>> gallery.card(1, score=0.25).label
        'junk'
    """

    shown: Callable[[int], Any]
    labels: Sequence[Any] | Tensor | np.ndarray | None = None
    class_names: Sequence[str] | None = None
    true_labels: Sequence[Any] | Tensor | np.ndarray | None = None
    predicted: Sequence[Any] | Tensor | np.ndarray | None = None

    def card(self, row: int, score: float | None = None) -> Card:
        """The card of the row at this position."""
        return Card(
            self.shown(row),
            row=row,
            label=self._name(self.labels, row),
            true_label=self._name(self.true_labels, row),
            predicted=self._name(self.predicted, row),
            correct=self._correct(row),
            score=score,
        )

    def name(self, label: Any) -> str:
        """The class name of a label, or the label itself."""
        value = label.item() if isinstance(label, Tensor | np.generic) else label
        if self.class_names is not None and not isinstance(value, str) and value == int(value):
            return (
                str(self.class_names[int(value)]) if 0 <= value < len(self.class_names) else str(int(value))
            )
        return plain(value)

    def _correct(self, row: int) -> bool | None:
        if self.labels is None or self.predicted is None:
            return None
        label, said = self.labels[row], self.predicted[row]
        label = label.item() if isinstance(label, Tensor | np.generic) else label
        if isinstance(label, float) and self.class_names is None:
            return None
        return bool(said == label)

    def _name(self, labels: Sequence[Any] | Tensor | np.ndarray | None, row: int) -> str | None:
        if labels is None:
            return None
        if not 0 <= row < len(labels):
            raise OptionError(f"row {row} is outside the labels, which have {len(labels)} rows")
        return self.name(labels[row])


@dataclass(frozen=True, eq=False)
class LossPath:
    """The loss of one query along the trajectory, and what each training row contributed at each checkpoint.

    Args:
        steps: The step of each checkpoint [c].
        losses: The query's loss at each checkpoint [c].
        contributions: The score at each checkpoint alone [c, n]; they add up to the score over all.
        train_ids: The training rows of the columns [n].

    Raises:
        DataError: Lengths that differ, or no checkpoint.
    """

    steps: tuple[int, ...]
    losses: Tensor
    contributions: Tensor
    train_ids: Tensor

    def __post_init__(self) -> None:
        shapes = (len(self.steps), len(self.train_ids))
        if not self.steps:
            raise DataError("a loss path needs at least one checkpoint")
        if self.losses.shape != shapes[:1] or self.contributions.shape != shapes:
            raise DataError(
                f"{shapes[0]} steps and {shapes[1]} training rows, but losses of shape "
                f"{tuple(self.losses.shape)} and contributions of shape {tuple(self.contributions.shape)}"
            )

    @classmethod
    def from_scores(
        cls, scores: Sequence[Scores], losses: Tensor, *, query: int, steps: Sequence[int]
    ) -> LossPath:
        """From the scores of each checkpoint alone.

        Args:
            scores: One ``Scores`` per checkpoint, over the same rows.
            losses: The query's loss at each checkpoint [c].
            query: The query's row, one of ``scores[0].query_ids``.
            steps: The step of each checkpoint [c].

        Returns:
            The path of this query.

        Raises:
            OptionError: A query that was not scored.
            DataError: Lengths that differ, or no checkpoint.
        """
        if not scores:
            raise DataError("a loss path needs the scores of at least one checkpoint")
        rows = [each.values[position_of(query, each.query_ids)] for each in scores]
        return cls(
            steps=tuple(steps),
            losses=losses.detach().cpu().double(),
            contributions=torch.stack([row.double() for row in rows]),
            train_ids=scores[0].train_ids,
        )

    @property
    def raised(self) -> Tensor:
        """The opponents' contributions at each checkpoint, added up [c]: zero or below."""
        return self.contributions.clamp(max=0.0).sum(1)

    @property
    def lowered(self) -> Tensor:
        """The proponents' contributions at each checkpoint, added up [c]: zero or above."""
        return self.contributions.clamp(min=0.0).sum(1)

    def of(self, row: int) -> Tensor:
        """The contributions of one training row at each checkpoint.

        Args:
            row: One of ``train_ids``.

        Returns:
            One number per checkpoint [c].

        Raises:
            OptionError: A training row that was not scored.
        """
        return self.contributions[:, position_of(row, self.train_ids)]


@dataclass(frozen=True, eq=False)
class Explanation:
    """A prediction with the training rows that taught it and those that spoke against it.

    Args:
        query: The row explained.
        proponents: The rows with the largest scores, largest first.
        opponents: The rows with the smallest scores, smallest first.
        target: Whose loss is explained, in words, such as ``"the predicted class, 8"``.
        path: The loss along the trajectory, for ``trajectory_figure``.
    """

    query: Card
    proponents: tuple[Card, ...]
    opponents: tuple[Card, ...]
    target: str | None = None
    path: LossPath | None = None

    @classmethod
    def from_top_k(
        cls,
        top: TopK,
        query: int,
        *,
        train: Gallery,
        queries: Gallery,
        count: int | None = None,
        target: str | None = None,
        path: LossPath | None = None,
    ) -> Explanation:
        """The explanation of one query of a ``TopK``.

        Args:
            top: Proponents and opponents of each query.
            query: The query's row, one of ``top.query_ids``.
            train: How training rows become cards.
            queries: How queries become cards.
            count: How many of each to keep; by default all.
            target: Whose loss is explained, in words.
            path: The loss along the trajectory.

        Returns:
            The cards, in the order of ``top``.

        Raises:
            OptionError: A query that isn't in ``top``.
        """
        position = position_of(query, top.query_ids)
        sides = [
            tuple(
                train.card(int(row), float(score))
                for row, score in zip(side.ids[position][:count], side.values[position][:count], strict=True)
            )
            for side in (top.proponents, top.opponents)
        ]
        return cls(queries.card(query), sides[0], sides[1], target, path)


def position_of(row: int, ids: Tensor) -> int:
    places = (ids == row).nonzero()
    if len(places) == 0:
        raise OptionError(f"row {row} is not among the {len(ids)} rows of this result")
    return int(places[0])
