"""An explanation as the page reads it: cards of proponents and opponents, and the loss along the trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.errors import OptionError
from tracin.explain import Attribution, explain, target_words
from tracin.explorer.numbers import number
from tracin.explorer.pages import LISTED, Content
from tracin.methods import TracInCP
from tracin.methods.altering import altered, with_training_loss

__all__ = ["checkpoints_of", "explained", "quiet", "shortened", "told"]

CardOf = Callable[[int, float], dict[str, Any]]


def checkpoints_of(trajectory: Trajectory) -> tuple[dict[str, Any], ...]:
    """``{name, step, learning_rate}`` of each checkpoint; the step is its place from 1 on where steps are unknown."""
    return tuple(
        {"name": checkpoint.name, "step": step, "learning_rate": number(checkpoint.learning_rate)}
        for checkpoint, step in zip(trajectory, trajectory.steps, strict=True)
    )


def explained(
    method: TracInCP,
    content: Content,
    train: Any,
    queries: Any,
    rows: Sequence[int],
    *,
    target: str,
    side: str,
) -> list[Attribution]:
    """The attributions of some rows.

    Args:
        method: How to trace.
        content: The class names.
        train: The training rows.
        queries: The rows that ``rows`` counts in.
        rows: Which.
        target: ``predicted``, ``label`` or a class by name.
        side: Of which side the rows are: a training row's own loss is the training loss.

    Returns:
        For each row one attribution, or two for a wrong prediction.

    Raises:
        OptionError: An unknown class, or a class where the task has none.
    """
    if side == "train":
        method = with_training_loss(method)
    if content.names is None:
        if target not in {"predicted", "label"}:
            raise OptionError(
                f"target {target[:40]!r} needs classes, and the task has none. Leave target out."
            )
        return explain(method, train, queries, rows)
    asked: str | int = target
    if target not in {"predicted", "label"}:
        if target not in content.names:
            known = ", ".join(content.names[:20])
            raise OptionError(
                f"target {target[:40]!r} is no class: give predicted, label, or one of {known}."
            )
        asked = content.names.index(target)
    return explain(method, train, queries, rows, target=asked)


def quiet(method: TracInCP) -> TracInCP:
    """The same method without a progress bar."""
    return altered(method, progress=False)


def told(
    content: Content, attribution: Attribution, card: CardOf, *, without: int | None = None
) -> dict[str, Any]:
    """One target of an explanation.

    Args:
        content: Names and checkpoints.
        attribution: What was found.
        card: Makes the card of a training row with its score.
        without: A training row that is left out of the lists, because it is the one explained.

    Returns:
        ``{kind, name, words, proponents, opponents, path, own}``; ``own`` is the score of the row left out.
    """
    scores = attribution.scores
    k = min(LISTED + (without is not None), len(scores))
    lists = attribution.top_k(k)
    parts = attribution.contributions.double()
    target = attribution.target
    return {
        "kind": target.kind,
        "name": content.label_text(target.number),
        "words": target_words(target, lambda number: str(content.label_text(number))),
        "proponents": _cards(lists.proponents.ids[0], lists.proponents.values[0], card, 1, without),
        "opponents": _cards(lists.opponents.ids[0], lists.opponents.values[0], card, -1, without),
        "own": None if without is None else number(float(scores[without])),
        "path": {
            "steps": [checkpoint["step"] for checkpoint in content.checkpoints],
            "checkpoints": [checkpoint["name"] for checkpoint in content.checkpoints],
            "losses": _numbers(attribution.losses),
            "lowered": _numbers(parts.clamp(min=0.0).sum(1)),
            "raised": _numbers(parts.clamp(max=0.0).sum(1)),
        },
    }


def _numbers(values: Tensor) -> list[float | None]:
    return [number(value) for value in values.tolist()]


def _cards(ids: Tensor, values: Tensor, card: CardOf, sign: int, without: int | None) -> list[dict[str, Any]]:
    """Only rows whose score has the sign: with few training rows the lists would meet in the middle."""
    pairs: Sequence[tuple[int, float]] = list(zip(ids.tolist(), values.tolist(), strict=True))
    kept = [(row, value) for row, value in pairs if row != without and value * sign > 0]
    return [card(row, value) for row, value in kept[:LISTED]]


def shortened(found: Mapping[str, Any], k: int) -> dict[str, Any]:
    """An explanation with lists of k rows.

    Args:
        found: ``{query, targets}``.
        k: How many proponents and opponents.

    Returns:
        The same with shorter lists.
    """
    targets = [
        {**target, "proponents": target["proponents"][:k], "opponents": target["opponents"][:k]}
        for target in found["targets"]
    ]
    return {**found, "targets": targets}
