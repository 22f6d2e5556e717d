"""The loss of a prediction along the training run, and the examples that moved it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tracin.errors import DataError, OptionError
from tracin.plots.canvas import Axes, Canvas, Figure, style, text_width
from tracin.plots.cards import Card, Explanation, LossPath
from tracin.plots.faces import GAP, caption_height, card_size, draw_card, draw_face
from tracin.plots.sheets import draw_heading, query_lines
from tracin.plots.theme import Theme, ThemeName, theme_named

__all__ = ["trajectory_figure"]

_MARGIN = 0.3
_AXIS = 0.5
_CHART = 5.0
_GUTTER = 0.45
_QUERY = 0.66
_HEAD = 1.22
_CHARTS = 4.6
_TITLE = 0.24
_BETWEEN = 0.4
_FOOT = 0.5
_SPARK = 0.26
_HEADING = 0.24
_NARROWEST_STEP = 1 / 30


def trajectory_figure(
    explanation: Explanation,
    *,
    count: int | None = None,
    narrow: bool = False,
    theme: ThemeName = "light",
) -> Figure:
    """The loss of a prediction at each checkpoint, what lowered and raised it there, and the rows that did.

    Above, the loss. Below, at each checkpoint, the scores of all training rows added up: proponents
    upwards, opponents downwards, and a tick at their sum: the fall of the loss that TracIn expects around that
    checkpoint, up to one factor for all checkpoints (Pruthi et al. 2020, section 3). Beside it the strongest
    proponents and opponents; the bars under a row are its own scores at the same checkpoints, on one scale.

    Args:
        explanation: With its ``path``.
        count: Proponents and opponents shown, at most; by default three pictures or two texts of each.
        narrow: Put the rows below the charts instead of beside them, for a phone or a column.
        theme: ``light`` or ``dark``.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: An explanation without a path.
        OptionError: ``count`` below 1, or an unknown theme.
        MissingExtraError: matplotlib isn't installed.
    """
    path = explanation.path
    if path is None:
        raise DataError("the explanation has no path: give it LossPath.from_scores(...) to draw a trajectory")
    if count is not None and count < 1:
        raise OptionError(f"count must be at least 1, got {count}")
    if count is None:
        face = card_size([*explanation.proponents, *explanation.opponents])
        count = 3 if face[0] == face[1] else 2
    sides = [explanation.proponents[:count], explanation.opponents[:count]]
    cards = [*sides[0], *sides[1]]
    block = Block(cards, count, narrow=narrow)
    rows = sum(block.height(len(side)) for side in sides)
    across = max(3.3, block.width) if narrow else _CHART
    down = _CHARTS if narrow else min(max(_CHARTS, rows), 1.3 * _CHARTS)
    width = 2 * _MARGIN + across + (_GUTTER + block.width if cards and not narrow else 0.0)
    with style():
        canvas = Canvas(
            width, _HEAD + (down + rows + 0.35 if narrow else max(down, rows) + 0.2), theme_named(theme)
        )
        draw_head(canvas, explanation)
        draw_charts(canvas, _MARGIN, _HEAD, across, down, path)
        corner = (_MARGIN, _HEAD + down + 0.15) if narrow else (_MARGIN + across + _GUTTER, _HEAD)
        draw_sides(canvas, corner, block, sides, path)
    return canvas.figure


class Block:
    """The measures of the cards of one sign, in inches."""

    def __init__(self, cards: Sequence[Card], count: int, *, narrow: bool) -> None:
        self.face = card_size(cards)
        pictures = self.face[0] == self.face[1]
        self.columns = min(count, 3 if pictures else (1 if narrow else 2))
        self.width = self.columns * (self.face[0] + GAP) - GAP
        self.caption = caption_height(cards)
        self.card = self.face[1] + self.caption + _SPARK + 0.12

    def height(self, count: int) -> float:
        """The height of so many cards under their heading."""
        return _HEADING + -(-count // self.columns) * self.card if count else 0.0


def draw_head(canvas: Canvas, explanation: Explanation) -> None:
    """The row explained and what is said of it, across the top."""
    across, down = card_size([explanation.query])
    across, down = across * _QUERY / down, _QUERY
    draw_face(canvas, _MARGIN, 0.22, across, down, explanation.query.shown)
    x = _MARGIN + across + 0.18
    room = canvas.width - x - _MARGIN
    canvas.text(x, 0.4, "The loss along training", size=12.0, weight="bold", width=room)
    for number, line in enumerate(packed([text for text, _ in query_lines(explanation)], room)[:3]):
        canvas.text(x, 0.6 + number * 0.16, line, size=8.5, colour=canvas.theme.muted, width=room)


def packed(parts: Sequence[str], width: float) -> list[str]:
    """The parts side by side on as few lines of this width as they need, none broken."""
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]} · {part}" if lines else part
        if lines and text_width(joined, 8.5) <= width:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines


def draw_charts(canvas: Canvas, x: float, y: float, width: float, height: float, path: LossPath) -> None:
    """The loss, and below it the contributions, over the same checkpoints."""
    theme = canvas.theme
    places, even = places_of(path.steps)
    overhang = text_width(f"{path.steps[-1]:,}", 8.0) / 2 - 0.1
    inner = width - _AXIS - max(0.0, overhang)
    free = height - 2 * _TITLE - _BETWEEN - _FOOT
    canvas.text(x, y, "loss", size=9.0, weight="bold", colour=theme.ink)
    loss = canvas.axes(x + _AXIS, y + _TITLE - 0.1, inner, free * 0.56)
    y += _TITLE + free * 0.56 + _BETWEEN
    canvas.text(x, y, "contribution of the training rows", size=9.0, weight="bold", colour=theme.ink)
    draw_key(canvas, x, y + 0.17)
    bars = canvas.axes(x + _AXIS, y + _TITLE + 0.1, inner, free * 0.44 - 0.1)
    draw_loss(loss, places, path.losses, theme)
    draw_bars(bars, places, path, theme)
    for axes in (loss, bars):
        plain_axes(axes, theme)
        axes.set_xlim(*limits(places))
    shown = spaced(path.steps, places, inner)
    loss.set_xticks([places[number] for number in shown], [])
    bars.set_xticks([places[number] for number in shown], [f"{path.steps[number]:,}" for number in shown])
    said = "step of the checkpoint" + (" (evenly spaced)" if even else "")
    bars.set_xlabel(said, color=theme.muted, fontsize=8.5, labelpad=4)


def places_of(steps: Sequence[int]) -> tuple[list[float], bool]:
    """Where the checkpoints stand, and whether their own steps lie too unevenly to show."""
    gaps = [after - before for before, after in pairwise(steps)]
    if not gaps:
        return [0.0], False
    if min(gaps) < _NARROWEST_STEP * (steps[-1] - steps[0]) or min(gaps) <= 0:
        return [float(number) for number in range(len(steps))], True
    return [float(step) for step in steps], False


def limits(places: Sequence[float]) -> tuple[float, float]:
    room = 0.6 * gap_of(places)
    return places[0] - room, places[-1] + room


def gap_of(places: Sequence[float]) -> float:
    return min((after - before for before, after in pairwise(places)), default=1.0)


def spaced(steps: Sequence[int], places: Sequence[float], width: float) -> list[int]:
    """The checkpoints whose labels stand side by side without touching."""
    low, high = limits(places)
    scale = width / (high - low)
    shown: list[int] = []
    for number in [len(steps) - 1, *range(len(steps) - 1)]:
        across = text_width(f"{steps[number]:,}", 8.0) + 0.1
        if all(abs(places[number] - places[other]) * scale >= across for other in shown):
            shown.append(number)
    return sorted(shown)


def draw_loss(axes: Axes, places: Sequence[float], losses: Tensor, theme: Theme) -> None:
    values = losses.tolist()
    axes.plot(
        places,
        values,
        "o-",
        color=theme.ink,
        linewidth=1.8,
        markersize=5,
        markeredgecolor=theme.paper,
        clip_on=False,
    )
    top = max(*values, 0.0)
    bottom = min(*values, 0.0)
    axes.set_ylim(bottom, top + 0.14 * (top - bottom or 1.0))
    axes.axhline(0.0, color=theme.muted, linewidth=0.8, zorder=1)
    box = {"boxstyle": "square,pad=0.1", "facecolor": theme.paper, "edgecolor": "none"}
    look = {"color": theme.ink, "fontsize": 8, "annotation_clip": False, "bbox": box}
    for number, beside in {0: 1, len(values) - 1: len(values) - 2}.items():
        value = values[number]
        below = len(values) > 1 and values[beside] > value
        across, align = (-4, "left") if number == 0 else (4, "right")
        side = {"xytext": (across, -7 if below else 7), "va": "top" if below else "bottom", "ha": align}
        axes.annotate(f"{value:.3g}", (places[number], value), textcoords="offset points", **side, **look)


def draw_bars(axes: Axes, places: Sequence[float], path: LossPath, theme: Theme) -> None:
    """Proponents up, opponents down, a tick at the sum."""
    thick = 0.62 * gap_of(places)
    lowered, raised = path.lowered, path.raised
    axes.bar(places, lowered.tolist(), thick, color=theme.proponent)
    axes.bar(places, raised.tolist(), thick, color=theme.opponent)
    axes.axhline(0.0, color=theme.muted, linewidth=0.8)
    half = 0.5 * gap_of(places)
    sums = (lowered + raised).tolist()
    axes.hlines(
        sums, [x - half for x in places], [x + half for x in places], color=theme.paper, linewidth=3.6
    )
    axes.hlines(sums, [x - half for x in places], [x + half for x in places], color=theme.ink, linewidth=1.8)
    if not bool(torch.any(path.contributions)):
        axes.set_ylim(-1.0, 1.0)


def draw_key(canvas: Canvas, x: float, y: float) -> None:
    """What the bars mean, in their own colours."""
    theme = canvas.theme
    parts = [("▲ proponents", theme.proponent), ("▼ opponents", theme.opponent), ("– sum", theme.ink)]
    for text, colour in parts:
        canvas.text(x, y, text, size=8.0, colour=colour, weight="bold")
        x += text_width(text, 8.0, "bold") + 0.16


def plain_axes(axes: Axes, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_ylim()
    ticks = [
        tick
        for tick in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= tick <= high
    ]
    axes.set_yticks(ticks, [f"{tick:.4g}".replace("-", "−") for tick in ticks])
    axes.tick_params(colors=theme.muted, labelsize=8, length=0, pad=5)
    axes.grid(axis="y", color=theme.hair, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def draw_sides(
    canvas: Canvas, corner: tuple[float, float], block: Block, sides: Sequence[Sequence[Card]], path: LossPath
) -> None:
    """The strongest rows of either sign, each over its own contributions."""
    x, y = corner
    cards = [card for side in sides for card in side]
    largest = max((abs(card.score or 0.0) for card in cards), default=0.0)
    shown = [path.of(card.row) for card in cards if card.row is not None]
    names = [("Proponents", "lowered the loss", 1.0), ("Opponents", "raised it", -1.0)]
    for (heading, meaning, direction), side in zip(names, sides, strict=True):
        if not side:
            continue
        draw_heading(canvas, x, y - 0.12, heading, meaning, canvas.theme.sign(direction), block.width)
        for number, card in enumerate(side):
            line, column = divmod(number, block.columns)
            left = x + column * (block.face[0] + GAP)
            top = y + _HEADING + line * block.card
            draw_card(canvas, left, top, *block.face, card, largest=largest)
            if card.row is not None:
                foot = top + block.face[1] + block.caption - 0.04
                values = path.of(card.row)
                draw_spark(canvas, left, foot, block.face[0], values, spark_range(values, shown))
        y += block.height(len(side)) + 0.1


def spark_range(values: Tensor, shown: Sequence[Tensor]) -> tuple[float, float]:
    """The range of one row's small bars: equally long for all, on one side of zero where that will do."""
    largest = max(float(each.abs().max()) for each in shown) or 1.0
    if any(bool((each > 0).any() and (each < 0).any()) for each in shown):
        return -largest, largest
    pad = 0.03 * largest
    return (-largest, pad) if bool((values < 0).any()) else (-pad, largest)


def draw_spark(
    canvas: Canvas, x: float, y: float, width: float, values: Tensor, reach: tuple[float, float]
) -> None:
    """One row's contributions at each checkpoint, as small bars on the scale of all rows."""
    theme = canvas.theme
    axes = canvas.axes(x, y, width, _SPARK)
    axes.bar(range(len(values)), values.tolist(), 0.7, color=[theme.sign(float(value)) for value in values])
    axes.axhline(0.0, color=theme.muted, linewidth=0.6)
    axes.set(xlim=(-0.6, len(values) - 0.4), ylim=reach)
    axes.set_axis_off()
