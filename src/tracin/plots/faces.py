"""Cards on a canvas: picture, text or table, with the captions below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tracin.plots.canvas import LINE, POINTS, Canvas, digits, fit, signed, text_width, wrap
from tracin.plots.cards import Card
from tracin.plots.pictures import Shown

__all__ = ["GAP", "caption_height", "card_size", "draw_card", "draw_face", "flip_line"]

GAP = 0.14
"""Space between two cards, in inches."""

PICTURE = (1.1, 1.1)
TEXT = (2.2, 1.1)
_PADDING = 0.07
_SIZE = 7.5
_SMALL = 7.0


def card_size(cards: Sequence[Card]) -> tuple[float, float]:
    """Width and height of the cards' faces in inches: square for pictures, wider when one holds text."""
    return PICTURE if all(isinstance(card.shown, np.ndarray) for card in cards) else TEXT


def caption_height(cards: Sequence[Card]) -> float:
    """The height of the captions below the cards' faces, in inches."""
    return 0.68 if any(card.planted is not None for card in cards) else 0.54


def draw_face(canvas: Canvas, x: float, y: float, width: float, height: float, face: Shown) -> None:
    """The picture, text or table of a row within a rectangle."""
    if isinstance(face, np.ndarray):
        canvas.picture(x, y, width, height, face)
        return
    theme = canvas.theme
    canvas.box(x, y, width, height, fill=theme.raised, edge=theme.hair)
    room = width - 2 * _PADDING
    step = _SIZE * LINE / POINTS
    count = max(1, int((height - 2 * _PADDING - _SIZE / POINTS) / step) + 1)
    lines = table_lines(face, room, count) if isinstance(face, Mapping) else wrap(face, room, _SIZE, count)
    for number, line in enumerate(lines):
        canvas.text(x + _PADDING, y + _PADDING + _SIZE / POINTS + number * step, line, size=_SIZE)


def table_lines(table: Mapping[str, str], width: float, count: int) -> list[str]:
    lines = [fit(f"{key}: {value}", width, _SIZE) for key, value in table.items()]
    if len(lines) <= count:
        return lines
    return [*lines[: count - 1], f"… {len(lines) - count + 1} more"]


def flip_line(card: Card, width: float) -> str:
    """Whether the label was planted and what it was, as fully as the width allows."""
    if not card.planted:
        return "not planted"
    fullest = [f"planted flip, was {card.true_label}", f"planted, was {card.true_label}"]
    fitting = (text for text in fullest if text_width(text, _SMALL, "bold") <= width)
    return next(fitting, f"was {card.true_label}")


def draw_card(
    canvas: Canvas,
    x: float,
    y: float,
    width: float,
    height: float,
    card: Card,
    *,
    largest: float,
    sign: bool = True,
) -> None:
    """A card: face, a bar as long as the score is large, the score, the given label, the row.

    With ``sign=False`` the score is a size without a side, such as the self-influence.
    """
    theme = canvas.theme
    draw_face(canvas, x, y, width, height, card.shown)
    foot = y + height
    if card.score is not None:
        colour = theme.sign(card.score) if sign else theme.ink
        length = width * min(1.0, abs(card.score) / largest) if largest > 0.0 else 0.0
        canvas.box(x, foot + 0.05, width, 0.035, fill=theme.raised)
        canvas.box(x, foot + 0.05, length, 0.035, fill=colour)
        score = signed(card.score) if sign else digits(card.score)
        canvas.text(x, foot + 0.24, score, size=9.0, weight="bold", colour=colour, width=width)
        if card.row is not None:
            room = max(width - text_width(score, 9.0, "bold") - 0.08, 0.0)
            place = f"row {card.row}" if text_width(f"row {card.row}", _SMALL) <= room else f"{card.row}"
            canvas.text(
                x + width, foot + 0.24, place, size=_SMALL, colour=theme.muted, align="right", width=room
            )
    if card.label is not None:
        canvas.text(x, foot + 0.40, f"label {card.label}", size=8.0, width=width)
    if card.planted is not None:
        colour, weight = (theme.ink, "bold") if card.planted else (theme.muted, "normal")
        canvas.text(
            x, foot + 0.54, flip_line(card, width), size=_SMALL, colour=colour, weight=weight, width=width
        )
