"""Picture sheets: a prediction with its proponents and opponents, and the suspects of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracin.errors import DataError, OptionError
from tracin.plots.canvas import Canvas, Figure, fit, style, text_width, wrap
from tracin.plots.cards import Card, Explanation
from tracin.plots.faces import GAP, caption_height, card_size, draw_card, draw_face
from tracin.plots.theme import ThemeName, theme_named

__all__ = ["picture_sheet", "suspect_sheet"]

_MARGIN = 0.3
_QUERY = 1.7
_GUTTER = 0.4
_HEADING = 0.36
_BETWEEN = 0.16


@dataclass(frozen=True)
class Grid:
    """Cards in rows and columns, in inches."""

    width: float
    height: float
    columns: int
    caption: float

    def size(self, count: int) -> tuple[float, float]:
        """Width and height that so many cards take."""
        lines = -(-count // self.columns)
        across = self.columns * (self.width + GAP) - GAP
        return across, lines * (self.height + self.caption)

    def place(self, number: int) -> tuple[float, float]:
        """The corner of a card, from the grid's corner."""
        line, column = divmod(number, self.columns)
        return column * (self.width + GAP), line * (self.height + self.caption)


def picture_sheet(
    explanation: Explanation,
    *,
    columns: int | None = None,
    title: str | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """A prediction on the left, its proponents and opponents as cards on the right.

    Each card has a bar as long as its score is large, the score, the given label (and the true one, where a
    flip was planted) and the training row.

    Args:
        explanation: The query and its cards.
        columns: Cards side by side; by default five pictures or three texts.
        title: A heading over the sheet.
        theme: ``light`` or ``dark``.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: An explanation without proponents and opponents.
        OptionError: ``columns`` below 1, or an unknown theme.
        MissingExtraError: matplotlib isn't installed.

    Example:
        >>> import numpy as np
        >>> query = Card(np.eye(8), row=17, label="8", predicted="3")
        >>> rows = tuple(Card(np.eye(8), row=i, label="3", score=0.5 - i) for i in range(2))
        >>> figure = picture_sheet(Explanation(query, proponents=rows[:1], opponents=rows[1:]))
        >>> figure.savefig("sheet.png")  # doctest: +SKIP
    """
    cards = [*explanation.proponents, *explanation.opponents]
    if not cards:
        raise DataError("an explanation needs proponents or opponents to show")
    largest = max(abs(card.score or 0.0) for card in cards)
    longest = max(len(explanation.proponents), len(explanation.opponents))
    grid = grid_of(cards, columns, longest, pictures=5, texts=3)
    sides = [
        ("Proponents", "training on them lowered this loss", 1.0, explanation.proponents),
        ("Opponents", "training on them raised it", -1.0, explanation.opponents),
    ]
    sides = [side for side in sides if side[3]]
    top = _MARGIN + (0.4 if title else 0.0)
    left = _MARGIN + _QUERY + _GUTTER
    height = top + max(sum(_HEADING + grid.size(len(side[3]))[1] + _BETWEEN for side in sides), _QUERY + 1.3)
    with style():
        canvas = Canvas(left + grid.size(1)[0] + _MARGIN, height, theme_named(theme))
        if title:
            canvas.text(
                _MARGIN, _MARGIN + 0.1, title, size=13.0, weight="bold", width=canvas.width - 2 * _MARGIN
            )
        draw_query(canvas, _MARGIN, top, explanation)
        for heading, meaning, direction, side in sides:
            draw_heading(canvas, left, top, heading, meaning, canvas.theme.sign(direction), grid.size(1)[0])
            for number, card in enumerate(side):
                x, y = grid.place(number)
                draw_card(
                    canvas, left + x, top + _HEADING + y, grid.width, grid.height, card, largest=largest
                )
            top += _HEADING + grid.size(len(side))[1] + _BETWEEN
    return canvas.figure


def suspect_sheet(
    suspects: Sequence[Card],
    *,
    columns: int | None = None,
    title: str | None = None,
    theme: ThemeName = "light",
) -> Figure:
    """The most self-influential rows as cards, most suspect first: score, given label, planted or not.

    Args:
        suspects: The cards, in the order to look at them.
        columns: Cards side by side; by default eight pictures or four texts.
        title: A heading over the sheet.
        theme: ``light`` or ``dark``.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No suspects.
        OptionError: ``columns`` below 1, or an unknown theme.
        MissingExtraError: matplotlib isn't installed.
    """
    if not suspects:
        raise DataError("a sheet of suspects needs at least one card")
    largest = max(abs(card.score or 0.0) for card in suspects)
    grid = grid_of(suspects, columns, len(suspects), pictures=8, texts=4)
    top = _MARGIN + (0.4 if title else 0.0)
    across, down = grid.size(len(suspects))
    with style():
        canvas = Canvas(across + 2 * _MARGIN, top + down + 0.1, theme_named(theme))
        if title:
            canvas.text(_MARGIN, _MARGIN + 0.1, title, size=13.0, weight="bold", width=across)
        for number, card in enumerate(suspects):
            x, y = grid.place(number)
            draw_card(
                canvas, _MARGIN + x, top + y, grid.width, grid.height, card, largest=largest, sign=False
            )
    return canvas.figure


def grid_of(cards: Sequence[Card], columns: int | None, longest: int, *, pictures: int, texts: int) -> Grid:
    width, height = card_size(cards)
    if columns is None:
        columns = pictures if width == height else texts
    if columns < 1:
        raise OptionError(f"columns must be at least 1, got {columns}")
    return Grid(width, height, min(columns, longest), caption_height(cards))


def draw_query(canvas: Canvas, x: float, y: float, explanation: Explanation) -> None:
    """The row explained: its face, what the model says and what its label says."""
    query, theme = explanation.query, canvas.theme
    draw_face(canvas, x, y, _QUERY, _QUERY, query.shown)
    baseline = y + _QUERY + 0.26
    for number, (text, strong) in enumerate(query_lines(explanation)):
        colour = theme.ink if strong else theme.muted
        size, weight = (10.0, "bold") if number == 0 else (8.5, "normal")
        for line in [fit(text, _QUERY, size, weight)] if number == 0 else wrap(text, _QUERY, size, 2):
            canvas.text(x, baseline, line, size=size, colour=colour, weight=weight)
            baseline += 0.19


def query_lines(explanation: Explanation) -> list[tuple[str, bool]]:
    """What is said of the query, as lines of text and whether they are in full ink."""
    query = explanation.query
    lines = []
    if query.predicted is not None:
        lines.append((f"predicted {query.predicted}", True))
    if query.label is not None:
        judged = {None: "", True: " (right)", False: " (wrong)"}[query.correct]
        lines.append((f"label {query.label}{judged}", True))
    if query.row is not None:
        lines.append((f"test row {query.row}", False))
    if explanation.target is not None:
        lines.append((f"loss of {explanation.target}", False))
    return lines


def draw_heading(
    canvas: Canvas, x: float, y: float, heading: str, meaning: str, colour: str, width: float
) -> None:
    canvas.text(x, y + 0.12, heading, size=11.0, weight="bold", colour=colour)
    across = text_width(heading, 11.0, "bold") + 0.1
    canvas.text(
        x + across, y + 0.12, meaning, size=8.5, colour=canvas.theme.muted, width=max(width - across, 0.1)
    )
    canvas.line(x, y + 0.22, width)
