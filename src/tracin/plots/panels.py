"""Panels of lines in a grid, flips down and schedules across, over one table that names the lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracin.evaluation.mislabelled import METHODS
from tracin.evaluation.mislabelled.registry import FAMILIES
from tracin.plots.canvas import Axes, Canvas, Figure, fit, style, text_width
from tracin.plots.curves import PERFECT, inspected_label, plain_axes, reference_looks, swatch
from tracin.plots.theme import Theme

__all__ = ["CLEAN", "SHARES", "Line", "Panel", "Sheet", "draw", "firsts"]

_MARGIN, _ROW = 0.3, 0.2
_TOP = 0.95
_AXES_LEFT, _GAP = 0.92, 0.3
_PANEL, _PANEL_HEIGHT, _ALONE = 3.9, 2.75, 5.2
_BELOW = 0.86
_NAME = 1.95
_TOLD = 1.2
SHARES = (0.0, 1.02)
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (5, 1.4, 1, 1.4)),
    (0, (1.2, 1.2)),
    (0, (5, 1.2, 1, 1.2, 1, 1.2)),
    (0, (9, 1.6)),
)
CLEAN = "all labels true"


@dataclass(frozen=True)
class Line:
    """A line of a panel: its mean over the seeds and its spread at each x; its numbers for the table.

    Args:
        name: Of the method.
        x: Shares of the rows inspected.
        mean: One value for each x.
        spread: Half the height of the band for each x.
        cells: The numbers of the table, by column.
        reference: Whether it is no method.
    """

    name: str
    x: Sequence[float]
    mean: Sequence[float]
    spread: Sequence[float] = ()
    cells: Sequence[float | None] = ()
    reference: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes: the flips and the schedule it is for, and its lines."""

    flips: str
    schedule: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Sheet:
    """A figure: panels in a grid, flips down and schedules across, over one table of all lines."""

    title: str
    told: str
    panels: Sequence[Panel]
    heads: Sequence[str]
    texts: Sequence[Callable[[float], str]]
    y_label: str
    note: str = ""
    y_limits: tuple[float, float] = SHARES
    x_limits: tuple[float, float] = (0.0, 1.0)


def looks(names: Sequence[str], theme: Theme) -> dict[str, dict[str, Any]]:
    """The look of each line: the family's colour, a dash of its own, the first of a family stronger."""
    colours = dict(zip(FAMILIES, theme.series, strict=True))
    found = reference_looks(theme)
    found[CLEAN] = found[PERFECT]  # the best that can be, as the perfect order is
    for name in names:
        family = METHODS[name].family
        number = [each for each in names if METHODS[each].family == family].index(name)
        width = (2.4 if family == FAMILIES[0] else 1.8) if number == 0 else 1.2
        dashes = _DASHES[number % len(_DASHES)]
        found[name] = {"color": colours[family], "linestyle": dashes, "linewidth": width}
    return found


def draw(sheet: Sheet, names: Sequence[str], theme: Theme) -> Figure:
    """Lay the panels and the table out."""
    schedules = list(dict.fromkeys(panel.schedule for panel in sheet.panels))
    flips = list(dict.fromkeys(panel.flips for panel in sheet.panels))
    panel_width = _ALONE if len(schedules) == 1 else _PANEL
    column = 0.14 + max(text_width("100.0 %", 8.5, "bold"), *(text_width(head, 8.0) for head in sheet.heads))
    table_width = 2 * _MARGIN + _NAME + len(sheet.panels) * (len(sheet.heads) * column + 0.18)
    grid_width = _AXES_LEFT + len(schedules) * (panel_width + _GAP) + _MARGIN - _GAP + 0.12
    width = max(table_width, grid_width)
    stretch = (width - grid_width) / len(schedules)
    panel_width += stretch
    block = _PANEL_HEIGHT + _BELOW
    lines = _table_names(sheet)
    table = _TOP + len(flips) * block - 0.12
    height = table + (len(lines) + 2) * _ROW + (0.24 if sheet.note else 0.0) + _MARGIN
    look = looks(names, theme)
    with style():
        canvas = Canvas(width, height, theme)
        canvas.text(_MARGIN, 0.42, sheet.title, size=12.0, weight="bold", width=width - 2 * _MARGIN)
        canvas.text(_MARGIN, 0.61, sheet.told, size=8.5, colour=theme.muted, width=width - 2 * _MARGIN)
        for panel in sheet.panels:
            across, down = schedules.index(panel.schedule), flips.index(panel.flips)
            x = _AXES_LEFT + across * (panel_width + _GAP)
            y = _TOP + down * block
            heading = _heading(panel)
            canvas.text(x, y - 0.06, fit(heading, panel_width, 9.0, "bold"), size=9.0, weight="bold")
            axes = canvas.axes(x, y, panel_width, _PANEL_HEIGHT)
            draw_panel(axes, panel, look, firsts(names))
            finish_axes(axes, sheet, theme, first=across == 0, last=down == len(flips) - 1)
        draw_table(canvas, table, sheet, lines, look, column)
    return canvas.figure


def _heading(panel: Panel) -> str:
    flips = f"{panel.flips} flips"
    return flips if panel.schedule == "own" else f"{flips}, {panel.schedule} schedule"


def draw_panel(
    axes: Axes, panel: Panel, look: Mapping[str, dict[str, Any]], with_band: Sequence[str]
) -> None:
    """The lines of a panel, the first one on top, each family's first with its band."""
    for order, line in enumerate(reversed(panel.lines)):
        style_of = look[line.name]
        axes.plot(line.x, line.mean, zorder=2 + 0.01 * order, solid_capstyle="round", **style_of)
        if any(line.spread) and line.name in with_band:
            low = [mean - spread for mean, spread in zip(line.mean, line.spread, strict=True)]
            high = [mean + spread for mean, spread in zip(line.mean, line.spread, strict=True)]
            axes.fill_between(line.x, low, high, color=style_of["color"], alpha=0.13, linewidth=0, zorder=1.5)


def finish_axes(axes: Axes, sheet: Sheet, theme: Theme, *, first: bool, last: bool) -> None:
    """Limits, ticks and labels, as the other curves have them."""
    axes.set_xlim(*sheet.x_limits)
    wide = sheet.x_limits[1] > 0.6
    ticks = [0.0, 0.1, 0.2, 0.3, 0.5, 1.0] if wide else [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    ticks = [tick for tick in ticks if tick <= sheet.x_limits[1] + 1e-9]
    axes.set_xticks(ticks, [f"{100 * tick:.3g}" for tick in ticks])
    low, high = sheet.y_limits
    axes.set_ylim(low, high)
    if (low, high) == SHARES:
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    marks = [tick for tick in axes.get_yticks() if low - 1e-9 <= tick <= high + 1e-9]
    digits = 0 if all(math.isclose(100 * tick, round(100 * tick), abs_tol=1e-6) for tick in marks) else 1
    axes.set_yticks(marks, [f"{100 * tick:.{digits}f} %" if first else "" for tick in marks])
    if last:
        inspected_label(axes, theme)
    if first:
        axes.set_ylabel(sheet.y_label, color=theme.muted, fontsize=8.5, labelpad=4)
    plain_axes(axes, theme)
    axes.grid(axis="x", color=theme.hair, linewidth=0.5)


def _table_names(sheet: Sheet) -> list[Line]:
    """The lines of the table: each name once, references last."""
    found: dict[str, Line] = {}
    for panel in sheet.panels:
        for line in panel.lines:
            found.setdefault(line.name, line)
    return sorted(found.values(), key=lambda line: line.reference)


def draw_table(
    canvas: Canvas,
    y: float,
    sheet: Sheet,
    lines: Sequence[Line],
    look: Mapping[str, dict[str, Any]],
    column: float,
) -> None:
    """A row per line: its look, its name, and its numbers in every panel."""
    theme, width = canvas.theme, canvas.width
    group = len(sheet.heads) * column
    starts = [
        width - _MARGIN - (len(sheet.panels) - at) * (group + 0.18) + 0.18 for at in range(len(sheet.panels))
    ]
    for panel, start in zip(sheet.panels, starts, strict=True):
        heading = fit(_heading(panel).replace(" schedule", "").replace(" flips", ""), group, 8.0, "bold")
        canvas.text(start + group, y, heading, size=8.0, weight="bold", align="right")
        canvas.line(start + 0.1, y + 0.07, group - 0.1)
        for at, head in enumerate(sheet.heads):
            canvas.text(
                start + (at + 1) * column, y + _ROW + 0.02, head, size=8.0, colour=theme.muted, align="right"
            )
    for number, line in enumerate(lines):
        baseline = y + (number + 2) * _ROW + 0.04
        canvas.line(_MARGIN, baseline - 0.04, 0.34, **swatch(look[line.name]))
        colour = theme.muted if line.reference else theme.ink
        canvas.text(_MARGIN + 0.42, baseline, line.name, size=8.5, colour=colour, width=_NAME - 0.45)
        room = starts[0] - _MARGIN - _NAME - 0.1
        if room > _TOLD and line.name in METHODS:
            canvas.text(
                _MARGIN + _NAME, baseline, METHODS[line.name].told, size=8.0, colour=theme.muted, width=room
            )
        for panel, start in zip(sheet.panels, starts, strict=True):
            for at, (text, best) in enumerate(_row(panel, line, sheet.texts)):
                weight = "bold" if best else "normal"
                end = start + (at + 1) * column
                canvas.text(end, baseline, text, size=8.5, weight=weight, colour=colour, align="right")
    if sheet.note:
        at = y + (len(lines) + 2) * _ROW + 0.1
        canvas.text(_MARGIN, at, sheet.note, size=8.0, colour=theme.muted, width=width - 2 * _MARGIN)


def _row(panel: Panel, line: Line, texts: Sequence[Callable[[float], str]]) -> list[tuple[str, bool]]:
    """A line's numbers in a panel, as text, and whether each is the best there."""
    mine = next((each for each in panel.lines if each.name == line.name), None)
    row = []
    for at, told in enumerate(texts):
        value = None if mine is None else mine.cells[at]
        rivals = [each.cells[at] for each in panel.lines if not each.reference]
        best = max((rival for rival in rivals if rival is not None), default=None)
        text = "–" if value is None else told(value)
        row.append((text, best is not None and not line.reference and text == told(best)))
    return row


def firsts(names: Sequence[str]) -> list[str]:
    """The first method of each family, which is drawn stronger and with its band."""
    return [next(name for name in names if METHODS[name].family == family) for family in _families(names)]


def _families(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(METHODS[name].family for name in names))
