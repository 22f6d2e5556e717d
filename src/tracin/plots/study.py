"""The study of mislabelled data as figures: flips found, and test accuracy after a repair."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tracin.errors import DataError
from tracin.evaluation.mislabelled import StudyResult
from tracin.evaluation.mislabelled.result import GRID, RANDOM_ORDER, Cell
from tracin.plots.canvas import Figure
from tracin.plots.curves import PERFECT
from tracin.plots.panels import CLEAN, Line, Panel, Sheet, draw, firsts
from tracin.plots.theme import ThemeName, theme_named

__all__ = ["repair_figure", "study_figure"]


def study_figure(result: StudyResult, *, title: str | None = None, theme: ThemeName = "light") -> Figure:
    """The share of planted flips found against the share of rows inspected, a panel per flips and schedule.

    Lines are means over the seeds, bands one standard deviation to each side, drawn for the first method of each
    family. The colour tells the family: TracIn; influence functions and other methods with gradients; what forward
    passes give; what needs other models or neighbours. The table below names the lines and gives what is found at 10
    and 20 % and the AUROC, the best of each column in bold.

    Args:
        result: The study.
        title: A heading.
        theme: ``light`` or ``dark``.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: A study in which no method ran.
        OptionError: An unknown theme.
        MissingExtraError: matplotlib isn't installed.
    """
    names = result.methods_run()
    if not names:
        raise DataError("no method of the study ran: there is nothing to draw")
    cell = result.cells[0]
    panels = [
        Panel(flips, schedule, [*_found_lines(names, cells), *_orders(cells[0])])
        for (flips, schedule), cells in result.groups().items()
    ]
    told = f"{cell.planted:,} of {cell.rows:,} training rows carry a planted label. {_seeds(result)}"
    missing = [name for name in result.design.methods if name not in names]
    sheet = Sheet(
        title=title or f"Planted flips found: {_data_name(result)}",
        told=told,
        panels=panels,
        heads=("at 10 %", "at 20 %", "AUROC"),
        texts=(_percent, _percent, lambda value: f"{value:.3f}"),
        y_label="planted flips found",
        x_limits=(0.0, _until(panels)),
        note=f"Not run: {', '.join(missing)}" if missing else "",
    )
    return draw(sheet, names, theme_named(theme))


def repair_figure(result: StudyResult, *, title: str | None = None, theme: ThemeName = "light") -> Figure:
    """Test accuracy against the share of rows inspected, their wrong labels corrected and the model trained again.

    Args:
        result: A study with repairs.
        title: A heading.
        theme: ``light`` or ``dark``.

    Returns:
        A matplotlib figure.

    Raises:
        DataError: A study without repairs.
        OptionError: An unknown theme.
        MissingExtraError: matplotlib isn't installed.
    """
    if not result.repair_table():
        raise DataError("the study has no repairs to draw: give its Design shares, such as repair=(0.1, 0.2)")
    shares = sorted(result.design.repair)
    names = result.methods_run()
    panels = [
        Panel(flips, schedule, _repair_lines(names, cells, shares))
        for (flips, schedule), cells in result.groups().items()
    ]
    sheet = Sheet(
        title=title or f"Accuracy after a repair: {_data_name(result)}",
        told=f"The labels of the rows inspected are corrected, and the model is trained again. {_seeds(result)}",
        panels=panels,
        heads=tuple(f"at {100 * share:.3g} %" for share in shares),
        texts=tuple(_percent_one for _ in shares),
        y_label="test rows predicted right",
        y_limits=_around(panels, names),
        x_limits=(0.0, max(shares)),
    )
    return draw(sheet, names, theme_named(theme))


def _data_name(result: StudyResult) -> str:
    own = result.design.trained == "own"
    return result.design.data if own else f"{result.design.data}, {result.design.trained}"


def _seeds(result: StudyResult) -> str:
    seeds = len({cell.seed for cell in result.cells})
    return f"Mean of {seeds} seeds; bands: ± one standard deviation." if seeds > 1 else "One seed."


def _found_lines(names: Sequence[str], cells: Sequence[Cell]) -> list[Line]:
    lines = []
    for name in names:
        found = [cell.found[name] for cell in cells if name in cell.found and cell.found[name].curve]
        if not found:
            continue
        curves = list(zip(*(each.curve for each in found), strict=True))
        numbers = [
            [each.at(0.1) for each in found],
            [each.at(0.2) for each in found],
            [each.auroc for each in found],
        ]
        means = [statistics.fmean(value for value in column if value is not None) for column in numbers]
        lines.append(Line(name, GRID, [statistics.fmean(point) for point in curves], _spreads(curves), means))
    return lines


def _orders(cell: Cell) -> list[Line]:
    share = cell.planted / cell.rows
    best = [min(x / share, 1.0) for x in GRID]
    at = [min(0.1 / share, 1.0), min(0.2 / share, 1.0), 1.0]
    return [
        Line(PERFECT, GRID, best, cells=at, reference=True),
        Line(RANDOM_ORDER, GRID, GRID, cells=(0.1, 0.2, 0.5), reference=True),
    ]


def _repair_lines(names: Sequence[str], cells: Sequence[Cell], shares: Sequence[float]) -> list[Line]:
    lines = []
    before = [cell.accuracy for cell in cells]
    for name in [*names, RANDOM_ORDER]:
        points = [
            [
                each.accuracy
                for cell in cells
                for each in cell.repaired
                if each.order == name and each.share == share
            ]
            for share in shares
        ]
        if not all(points):
            continue
        means = [statistics.fmean(point) for point in points]
        values = [statistics.fmean(before), *means]
        spreads = _spreads([before, *points])
        lines.append(Line(name, (0.0, *shares), values, spreads, means, reference=name == RANDOM_ORDER))
    known = [cell.clean_accuracy for cell in cells if cell.clean_accuracy is not None]
    if not known:
        return lines
    clean, ends = statistics.fmean(known), (0.0, max(shares))
    return [*lines, Line(CLEAN, ends, (clean, clean), cells=[clean] * len(shares), reference=True)]


def _around(panels: Sequence[Panel], names: Sequence[str]) -> tuple[float, float]:
    """From the lowest to the highest value of all panels, bands that are drawn included, with some room."""
    lines = [line for panel in panels for line in panel.lines]
    bands = [line for line in lines if line.name in firsts(names)]
    low = [value for line in lines for value in line.mean]
    low += [mean - spread for line in bands for mean, spread in zip(line.mean, line.spread, strict=True)]
    high = [value for line in lines for value in line.mean]
    high += [mean + spread for line in bands for mean, spread in zip(line.mean, line.spread, strict=True)]
    room = 0.06 * max(max(high) - min(low), 0.01)
    return max(min(low) - room, 0.0), min(max(high) + room, 1.0)


def _spreads(points: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.stdev(point) if len(point) > 1 else 0.0 for point in points]


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _percent_one(value: float) -> str:
    return f"{100 * value:.1f} %"


def _until(panels: Sequence[Panel]) -> float:
    """The share of rows up to which to draw: where every method has found nearly all, or the whole."""
    lines = [line for panel in panels for line in panel.lines if not line.reference]
    for share in (0.4, 0.6):
        at = GRID.index(share)
        if all(line.mean[at] >= 0.95 for line in lines):
            return share
    return 1.0
