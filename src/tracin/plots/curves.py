"""The detection curve as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tracin.errors import DataError
from tracin.evaluation import DetectionCurve
from tracin.evaluation.mislabelled.result import RANDOM_ORDER
from tracin.plots.canvas import Axes, Canvas, Figure, style, text_width
from tracin.plots.theme import Theme, ThemeName, theme_named

__all__ = ["PERFECT", "detection_curve", "plain_axes", "reference_looks"]

_DASHES = ("-", (0, (5, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1, 1)))
_ROW = 0.21
_MARGIN, _LEFT, _RIGHT, _TOP = 0.3, 0.72, 0.44, 0.8
_TICK_ROOM = 0.07
PERFECT = "perfect order"


def detection_curve(
    curves: DetectionCurve | Mapping[str, DetectionCurve],
    *,
    shares: Sequence[float] = (0.1, 0.2),
    title: str = "Planted flips found",
    width: float = 6.0,
    theme: ThemeName = "light",
) -> Figure:
    """The share of planted flips found against the share of data inspected, beside a perfect and a random order.

    A table below names the lines and gives, for each, what is found at each of ``shares``, and its AUROC.

    Args:
        curves: One curve, or several by name; the first is drawn strongest.
        shares: The shares of data at which the table reads the curves.
        title: A heading over the figure.
        width: In inches, at least 3.
        theme: ``light`` or ``dark``.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: No curve.
        OptionError: A share outside [0, 1], or an unknown theme.
        MissingExtraError: matplotlib isn't installed.

    Example:
        >>> curve = DetectionCurve([0.9, 0.1, 0.8, 0.2, 0.3], [True, False, False, True, False])
        >>> detection_curve(curve, shares=(0.2,)).savefig("curve.png")  # doctest: +SKIP
    """
    if isinstance(curves, DetectionCurve):
        curves = {"self-influence": curves}
    if not curves:
        raise DataError("a detection figure needs at least one curve")
    width = max(width, 3.0)
    height = min((width - _LEFT - _RIGHT) * 0.72, 3.9)
    table = _TOP + height + 0.75
    with style():
        canvas = Canvas(width, table + (len(curves) + 2) * _ROW + _MARGIN, theme_named(theme))
        first = next(iter(curves.values()))
        told = f"{first.planted_rows:,} of {first.rows:,} rows carry a planted label"
        canvas.text(_MARGIN, 0.42, title, size=12.0, weight="bold", width=width - 2 * _MARGIN)
        canvas.text(_MARGIN, 0.6, told, size=8.5, colour=canvas.theme.muted, width=width - 2 * _MARGIN)
        lines = entries(curves, shares, canvas.theme)
        draw_lines(canvas.axes(_LEFT, _TOP, width - _LEFT - _RIGHT, height), lines, shares, canvas.theme)
        draw_table(canvas, table, lines, shares)
    return canvas.figure


@dataclass(frozen=True)
class Entry:
    """A line of the figure: its points, its look, and its row of the table."""

    name: str
    points: tuple[Tensor, Tensor]
    look: dict[str, Any]
    found: tuple[float, ...]
    auroc: float
    strong: bool = False
    reference: bool = False


def entries(curves: Mapping[str, DetectionCurve], shares: Sequence[float], theme: Theme) -> list[Entry]:
    """The curves, then the perfect and the random order."""
    lines = [
        Entry(
            name,
            (curve.inspected, curve.found),
            line_style(number, theme),
            tuple(curve.found_at(share) for share in shares),
            curve.auroc,
            strong=number == 0,
        )
        for number, (name, curve) in enumerate(curves.items())
    ]
    first = next(iter(curves.values()))
    best = DetectionCurve(first.flags.double(), first.flags)
    looks = reference_looks(theme)
    return [
        *lines,
        Entry(
            PERFECT,
            (best.inspected, best.found),
            looks[PERFECT],
            tuple(best.found_at(share) for share in shares),
            1.0,
            reference=True,
        ),
        Entry(
            RANDOM_ORDER,
            (best.inspected, best.inspected),
            looks[RANDOM_ORDER],
            tuple(shares),
            0.5,
            reference=True,
        ),
    ]


def reference_looks(theme: Theme) -> dict[str, dict[str, Any]]:
    """The looks of the perfect and the random order."""
    thin = {"color": theme.muted, "linewidth": 1.0}
    return {PERFECT: thin | {"linestyle": (0, (5, 3))}, RANDOM_ORDER: thin | {"linestyle": (0, (1, 2))}}


def plain_axes(axes: Axes, theme: Theme) -> None:
    """Axes of shares: quiet ticks, hair lines of a grid behind, no frame but the line below."""
    axes.tick_params(colors=theme.muted, labelsize=8, length=0, pad=5)
    axes.grid(axis="y", color=theme.hair, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)


def inspected_label(axes: Axes, theme: Theme) -> None:
    """The label of the shares inspected."""
    axes.set_xlabel("training rows inspected, in %", color=theme.muted, fontsize=8.5, labelpad=5)


def line_style(number: int, theme: Theme) -> dict[str, Any]:
    return {
        "color": theme.series[number % len(theme.series)],
        "linestyle": _DASHES[(number + number // len(theme.series)) % len(_DASHES)],
        "linewidth": 2.2 if number == 0 else 1.4,
    }


def draw_lines(axes: Axes, lines: Sequence[Entry], shares: Sequence[float], theme: Theme) -> None:
    for share in shares:
        axes.axvline(share, color=theme.hair, linewidth=0.7, zorder=0)
    for line in reversed(lines):
        axes.plot(*(values.numpy() for values in line.points), zorder=3 if line.strong else 2, **line.look)
    dots = {"markersize": 6.5, "markeredgecolor": theme.paper, "zorder": 4, "clip_on": False}
    axes.plot(shares, lines[0].found, "o", color=theme.series[0], **dots)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    ticks = apart([0.0, 0.5, 1.0], shares)
    axes.set_xticks(ticks, [f"{100 * tick:.3g}" for tick in ticks])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    inspected_label(axes, theme)
    plain_axes(axes, theme)


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def apart(ticks: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """The wanted ticks, then the others, without those whose labels would touch one already there."""
    kept: list[float] = []
    for tick in [*sorted(wanted), *ticks]:
        if all(abs(tick - other) >= _TICK_ROOM for other in kept):
            kept.append(tick)
    return sorted(kept)


def draw_table(canvas: Canvas, y: float, lines: Sequence[Entry], shares: Sequence[float]) -> None:
    """Names of the lines, what each finds, and its AUROC."""
    theme, width = canvas.theme, canvas.width
    heads = [*(f"at {percent(share)}" for share in shares), "AUROC"]
    step = max(text_width(head, 8.0) for head in heads) + 0.16
    ends = [width - _RIGHT - step * (len(heads) - 1 - number) for number in range(len(heads))]
    for head, end in zip(heads, ends, strict=True):
        canvas.text(end, y, head, size=8.0, colour=theme.muted, align="right")
    for number, line in enumerate(lines):
        baseline = y + (number + 1) * _ROW
        canvas.line(_MARGIN, baseline - 0.04, 0.3, **swatch(line.look))
        weight = "bold" if line.strong else "normal"
        colour = theme.muted if line.reference else theme.ink
        canvas.text(
            _LEFT, baseline, line.name, size=8.5, weight=weight, colour=colour, width=ends[0] - step - _LEFT
        )
        for cell, end in zip([*map(percent_found, line.found), f"{line.auroc:.3f}"], ends, strict=True):
            canvas.text(end, baseline, cell, size=8.5, weight=weight, colour=colour, align="right")


def percent_found(share: float) -> str:
    return f"{100 * share:.0f} %"


def swatch(look: dict[str, Any]) -> dict[str, Any]:
    return {"colour": look["color"], "thick": look["linewidth"], "dashes": look["linestyle"]}
