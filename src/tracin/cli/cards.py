"""Rows of a study as the cards that plots and report draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.explain import Attribution, evaluate_rows, target_words
from tracin.methods import TracInCP
from tracin.plots import Card, Explanation, LossPath
from tracin.study import Study

__all__ = ["Known", "Rows", "explanation", "known", "known_of"]


@dataclass(frozen=True)
class Known:
    """What is known of a row: its class and the class predicted, where the task has classes."""

    label: int | None = None
    predicted: int | None = None


def known(rows: Sequence[int], labels: Tensor | None, predicted: Tensor | None) -> dict[int, Known]:
    """Label and prediction of rows, by position."""
    if labels is None or predicted is None:
        return {row: Known() for row in rows}
    pairs = zip(rows, labels.tolist(), predicted.tolist(), strict=True)
    return {row: Known(label, predicted) for row, label, predicted in pairs}


def known_of(method: TracInCP, train: object, rows: Sequence[int]) -> dict[int, Known]:
    """Label and prediction at the last checkpoint of some training rows, by position."""
    last = Trajectory([method.trajectory[-1]])
    chosen = list(dict.fromkeys(rows))
    found = evaluate_rows(method, train, chosen, name="train", trajectory=last)
    return known(chosen, found.labels, None if found.logits is None else found.predicted())


@dataclass(frozen=True, eq=False)
class Rows:
    """Makes cards of the rows of one side of a study.

    Args:
        study: The study.
        side: Which rows.
        facts: Label and prediction by position.
        true_labels: The labels before wrong ones were planted.
    """

    study: Study
    side: Literal["train", "test"]
    facts: Mapping[int, Known]
    true_labels: Tensor | None = None

    def card(self, row: int, score: float | None = None) -> Card:
        """The card of a row."""
        fact = self.facts[row]
        true = None if self.true_labels is None else int(self.true_labels[row])
        asked = self.side == "test" and fact.label is not None
        return Card(
            self.study.shown(self.side, row),
            row=row,
            label=self.name(fact.label),
            true_label=self.name(true),
            predicted=self.name(fact.predicted),
            correct=fact.label == fact.predicted if asked else None,
            score=score,
        )

    def name(self, label: int | None) -> str | None:
        """The name of a class."""
        return None if label is None else self.study.class_name(label)


def explanation(attribution: Attribution, method: TracInCP, train: Rows, top: int) -> Explanation:
    """The cards of one target of one query, with its loss along the trajectory."""
    lists = attribution.top_k(top)
    sides = [
        tuple(
            train.card(row, score)
            for row, score in zip(side.ids[0].tolist(), side.values[0].tolist(), strict=True)
        )
        for side in (lists.proponents, lists.opponents)
    ]
    asked = Known(attribution.label, attribution.predicted)
    return Explanation(
        query=Rows(train.study, "test", {attribution.query: asked}).card(attribution.query),
        proponents=sides[0],
        opponents=sides[1],
        target=target_words(attribution.target, train.study.class_name),
        path=LossPath(
            steps=tuple(method.trajectory.steps),
            losses=attribution.losses.double(),
            contributions=attribution.contributions.double(),
            train_ids=lists.proponents.ids.new_tensor(range(attribution.contributions.shape[1])),
        ),
    )
