"""Cards as HTML: the same rows, signs and words as in the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tracin.plots import Card, Explanation
from tracin.plots.canvas import digits, signed
from tracin.plots.pictures import Shown, png_bytes
from tracin.report.markup import Markup, data_uri, pairs, tag

__all__ = ["card_grid", "face", "query_card"]

_LONGEST_TEXT = 600
_PIXELS = 96


def card_grid(cards: Sequence[Card], *, place: str, sign: bool = True, extra: str = "") -> Markup:
    """Cards side by side, as many as fit.

    Args:
        cards: In order.
        place: What a row is called, such as ``training row``, for readers who can't see the pictures.
        sign: Whether the scores have a side; self-influence has none.
        extra: A further class of the grid.

    Returns:
        The grid.
    """
    largest = max((abs(card.score or 0.0) for card in cards), default=0.0)
    kind = "" if all(isinstance(card.shown, np.ndarray) for card in cards) else " texts"
    return tag(
        "div",
        *(card_figure(card, largest=largest, place=place, sign=sign) for card in cards),
        class_=f"cards{kind or extra}",
    )


def card_figure(card: Card, *, largest: float, place: str, sign: bool) -> Markup:
    label = None if card.label is None else tag("div", f"label {card.label}")
    flip = None
    if card.planted is not None:
        words = f"planted, was {card.true_label}" if card.planted else "not planted"
        flip = tag("div", words, class_="flip" if card.planted else "quiet")
    return tag(
        "figure",
        face(card, place=place),
        bar(card, largest, sign=sign),
        tag("figcaption", score_line(card, sign=sign), label, flip),
        class_="card",
    )


def bar(card: Card, largest: float, *, sign: bool) -> Markup | None:
    if card.score is None:
        return None
    share = min(1.0, abs(card.score) / largest) if largest > 0.0 else 0.0
    return tag("div", tag("i", style=f"width:{100 * share:.1f}%"), class_=f"bar {side(card.score, sign)}")


def side(score: float, sign: bool) -> str:
    """The class that gives a score its colour."""
    if not sign:
        return "size"
    return "proponent" if score > 0.0 else "opponent" if score < 0.0 else "neutral"


def score_line(card: Card, *, sign: bool) -> Markup:
    score = None
    if card.score is not None:
        text = signed(card.score) if sign else digits(card.score)
        score = tag("span", text, class_=f"score {side(card.score, sign)}")
    row = None if card.row is None else tag("span", f"row {card.row}", class_="row")
    return tag("div", score, row, class_="first")


def face(card: Card, *, place: str) -> Markup:
    """What is shown of a row: a picture, a text or a table."""
    shown: Shown = card.shown
    if isinstance(shown, np.ndarray):
        height, width = shown.shape[:2]
        said = [f"{place} {card.row}" if card.row is not None else place]
        said += [f"label {card.label}"] if card.label is not None else []
        picture = tag(
            "img",
            src=data_uri(png_bytes(shown)),
            alt=", ".join(said),
            width=width,
            height=height,
            class_="pixels" if max(height, width) <= _PIXELS else None,
        )
        return tag("div", picture, class_="face")
    if isinstance(shown, Mapping):
        table = {key: shortened(value) for key, value in shown.items()}
        return tag("div", pairs(table), class_="face words")
    return tag("div", shortened(shown), class_="face words")


def shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT].rstrip() + "…"


def query_card(explanation: Explanation) -> Markup:
    """The row explained, with what the model and the label say."""
    query = explanation.query
    judged = {None: "", True: " (right)", False: " (wrong)"}[query.correct]
    said = [
        None if query.predicted is None else tag("strong", f"predicted {query.predicted}"),
        None if query.label is None else tag("div", f"label {query.label}{judged}"),
        None
        if explanation.target is None
        else tag("div", f"Explained: the loss of {explanation.target}", class_="quiet"),
    ]
    kind = "" if isinstance(query.shown, np.ndarray) else " texts"
    return tag("figure", face(query, place="test row"), tag("figcaption", *said), class_=f"card query{kind}")
