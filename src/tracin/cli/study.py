"""Studies with a known answer: labels made wrong on purpose, and how fast each method finds them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any

from tracin.cli import options
from tracin.cli.output import Folder
from tracin.cli.printing import clean, heading, number, percent, say, table
from tracin.errors import DataError, NotFiniteError, OptionError, ResultError
from tracin.evaluation.mislabelled import (
    Design,
    StudyData,
    StudyResult,
    named,
    own_data,
    read_data,
    run_study,
)
from tracin.evaluation.mislabelled.design import SHARES, own_file
from tracin.plots import png, repair_figure, study_figure, svg
from tracin.study import study_file

__all__ = ["run"]

Record = Mapping[str, Any]
_SAME = 5e-4
_BESIDE_REPLAY = {"what", "replay", "out", "data_folder", "device", "memory", "quiet", "format", "debug"}
_RENAMED = {"schedules": "schedule", "repair": "repair-shares"}
_ARGUMENT = re.compile(
    rf"\b({'|'.join([*(each.name for each in fields(Design)), 'device'])})=|\bdata_folder\b"
)


def run(command: options.StudyRun) -> int:
    """Run a study.

    Args:
        command: The options.

    Returns:
        0; 1 where a replay gives other numbers, or not the same ones.

    Raises:
        ResultError: No method could run.
    """
    with _as_options():
        return _run(command)


@contextmanager
def _as_options() -> Iterator[None]:
    """Say ``--repair-shares 2.0`` where a message of the library says ``repair=2.0``."""
    try:
        yield
    except (DataError, NotFiniteError, OptionError) as error:
        error.args = (_ARGUMENT.sub(_option, str(error)),)
        raise


def _option(found: re.Match[str]) -> str:
    name = found[1] or found[0]
    flag = f"--{_RENAMED.get(name, name).replace('_', '-')}"
    return f"{flag} " if found[1] else flag


def _run(command: options.StudyRun) -> int:
    if command.replay is not None:
        _refuse_beside_replay(command)
    before = None if command.replay is None else StudyResult.load(command.replay)
    design = _design(command) if before is None else _placed(before.design, command)
    folder = Folder(command.out, command.format, figures=True)
    with ExitStack() as stack:
        data = _data(design, stack)
        result = run_study(
            design,
            data,
            command.out,
            device=command.device,
            memory=command.memory,
            tell=None if command.quiet else _tell,
        )
    _save(folder, result)
    _show(result)
    folder.tell()
    if not result.methods_run():
        raise ResultError("no method of the study ran; the table says why for each.")
    return 0 if before is None else _compare(before, result)


def _tell(line: str) -> None:
    print(clean(line), file=sys.stderr, flush=True)


def _refuse_beside_replay(command: options.StudyRun) -> None:
    given = [
        f"--{each.name.replace('_', '-')}"
        for each in fields(command)
        if each.name not in _BESIDE_REPLAY and getattr(command, each.name) != each.default
    ]
    if given:
        raise OptionError(
            f"{', '.join(given)} beside --replay: a replay runs the study of its file. Leave out either."
        )


def _design(command: options.StudyRun) -> Design:
    return Design(
        data=command.data,
        model=command.model,
        flips=command.flips,
        fraction=command.fraction,
        schedules=command.schedule,
        methods=named(command.methods),
        seeds=command.seeds,
        rows=command.rows,
        epochs=command.epochs,
        checkpoints=command.checkpoints,
        rate=command.rate,
        batch=command.batch,
        repair=command.repair_shares if command.repair else (),
        data_folder=None if command.data_folder is None else str(command.data_folder),
    )


def _placed(design: Design, command: options.StudyRun) -> Design:
    named(design.methods)
    return design if command.data_folder is None else replace(design, data_folder=str(command.data_folder))


def _data(design: Design, stack: ExitStack) -> StudyData:
    if not own_file(design.data):
        return read_data(design)
    study = stack.enter_context(study_file(design.data))
    return own_data(design, study.task, study.train, study.test, study.fit, study.class_names)


def _save(folder: Folder, result: StudyResult) -> None:
    with folder.file("study.json") as path:
        path.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    rows = result.table()
    folder.table("table", rows)
    folder.table("seeds", result.seed_table())
    with folder.file("table.md") as path:
        path.write_text(_markdown(_told(result, rows)), encoding="utf-8")
    drawn: dict[str, Callable[[StudyResult], Any]] = {"study": study_figure} if result.methods_run() else {}
    repaired = result.repair_table()
    if repaired:
        drawn["repair"] = repair_figure
        folder.table("repair", repaired)
        with folder.file("repair.md") as path:
            path.write_text(_markdown(_told_repair(repaired)), encoding="utf-8")
    for name, draw in drawn.items():
        figure = draw(result)
        for end, write in (("png", png), ("svg", svg)):
            with folder.file(f"{name}.{end}") as path:
                path.write_bytes(write(figure))


def _show(result: StudyResult) -> None:
    for flips, schedule in result.groups():
        rows = [row for row in result.table() if (row["flips"], row["schedule"]) == (flips, schedule)]
        under = "" if schedule == "own" else f" under a {schedule} schedule"
        heading(f"{flips} flips{under}: {_seeds(result)}")
        ran = [row for row in rows if row["seeds"]]
        table(_told(result, ran, short=True))
        for row in rows:
            if row["not_run"] is not None:
                say(f"{row['method']}: not run{_some(result, row)}: {row['not_run']}")
    repaired = result.repair_table()
    if repaired:
        heading(
            "Test accuracy after the labels of the rows inspected first are corrected and the model is trained again"
        )
        table(_told_repair(repaired))


def _seeds(result: StudyResult) -> str:
    return (
        f"mean ± standard deviation of {result.design.seeds} seeds" if result.design.seeds > 1 else "one seed"
    )


def _told(result: StudyResult, rows: Sequence[Record], *, short: bool = False) -> list[dict[str, str]]:
    """The table as it is read: numbers with their spread, and why a method did not run."""
    told = []
    for row in rows:
        brief = {**row, **{f"{name}_sd": None for name in row if short and name != "auroc"}}
        found = "at" if short else "found at"
        numbers = {
            "AUROC": _with_spread(brief, "auroc", "{:.3f}".format),
            "average precision": _with_spread(brief, "average_precision", "{:.3f}".format),
            **{
                f"{found} {percent(share)}": _with_spread(
                    brief, f"found_at_{round(100 * share)}", _percent_one
                )
                for share in SHARES
            },
            "seconds": "" if row["seconds"] is None else number(row["seconds"]),
            "peak memory": "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        }
        note = "" if row["not_run"] is None else f"not run{_some(result, row)}: {row['not_run']}"
        first = (
            {"method": row["method"]}
            if short
            else {name: row[name] for name in ("flips", "schedule", "method")}
        )
        told.append({**first, **numbers, "note": note})
    notes = any(row["note"] for row in told) and not short
    return told if notes else [{name: row[name] for name in row if name != "note"} for row in told]


def _some(result: StudyResult, row: Record) -> str:
    """With how many seeds a method ran that failed with others."""
    return (
        f" with {result.design.seeds - row['seeds']} of {result.design.seeds} seeds" if row["seeds"] else ""
    )


def _percent_one(share: float) -> str:
    return f"{100 * share:.1f} %"


def _with_spread(row: Record, name: str, text: Callable[[float], str]) -> str:
    if row[name] is None:
        return ""
    spread = row[f"{name}_sd"]
    return text(row[name]) if spread is None else f"{text(row[name]).removesuffix(' %')} ± {text(spread)}"


def _told_repair(rows: Sequence[Record]) -> list[dict[str, str]]:
    """One row per flips, schedule and order; the shares are columns."""
    told: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = (row["flips"], row["schedule"], row["order"])
        start = {"flips": key[0], "schedule": key[1], "order": key[2]}
        mine = told.setdefault(key, start | {"nothing": _percent_one(row["accuracy_before"])})
        mine[percent(row["inspected"])] = _with_spread(row, "accuracy", _percent_one)
        mine["all true"] = _percent_one(row["accuracy_clean"])
    return [
        {**{k: v for k, v in row.items() if k != "all true"}, "all true": row["all true"]}
        for row in told.values()
    ]


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    names = list(rows[0])
    words = ("flips", "schedule", "method", "order", "note")
    lines = [names, [":--" if name in words else "--:" for name in names]]
    lines += [[row[name].replace("|", "\\|") for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _compare(before: StudyResult, after: StudyResult) -> int:
    """How far a replay is from the study before; seconds and memory may differ."""
    old, new = _numbers_of(before), _numbers_of(after)
    both = [key for key in old if key in new]
    faults = _other_basis(before, after)
    for mine, other, side in ((old, new, "study before"), (new, old, "replay")):
        alone = dict.fromkeys(subject for subject, place in mine if (subject, place) not in other)
        if alone:
            faults.append(f"Only in the {side}: numbers of {', '.join(alone)}.")
    if not both:
        faults.append("No number is in both studies.")
    apart = {key: abs(old[key] - new[key]) for key in both}
    worst = max(apart, key=apart.__getitem__, default=None)
    if worst is not None and apart[worst] > _SAME:
        faults.append(
            f"The replay differs from the study before by up to {apart[worst]:.3g} ({' of '.join(reversed(worst))})."
        )
    say()
    if worst is not None and not faults:
        say(
            f"The replay gives the numbers of the study before; the largest difference is {apart[worst]:.2g}, of "
            f"{len(both):,} numbers."
        )
        return 0
    say(f"{' '.join(faults)} It was made with {_told_made(before)}; this one with {_told_made(after)}.")
    return 1


def _numbers_of(result: StudyResult) -> dict[tuple[str, str], float]:
    """Every number of a study that a replay must give again, by the method and the place in the tables."""
    names = ("auroc", "average_precision", *(f"found_at_{round(100 * share)}" for share in SHARES))
    found: dict[tuple[str, str], float | None] = {}
    for row in result.seed_table():
        place = f"{row['flips']} flips, {row['schedule']}, seed {row['seed']}"
        found |= {(row["method"], f"{place}, {name}"): row[name] for name in names}
    for row in result.repair_table():
        place = f"{row['flips']} flips, {row['schedule']}, {percent(row['inspected'])} inspected"
        for name in ("seeds", "accuracy", "accuracy_before", "accuracy_clean", "corrected"):
            found[f"the repair by {row['order']}", f"{place}, {name}"] = row[name]
    return {key: value for key, value in found.items() if value is not None}


def _other_basis(before: StudyResult, after: StudyResult) -> list[str]:
    """What the same training runs of two studies depend on, where it differs: the data, or the study file."""
    mine = {cell.key: cell.basis for cell in before.cells}
    pairs = [(mine[cell.key], cell.basis) for cell in after.cells if cell.key in mine]
    odd = sorted({name for one, two in pairs for name in one | two if one.get(name) != two.get(name)})
    words = {"digest": "rows", "file": "study file"}
    told = ", ".join(words.get(name, name) for name in odd)
    return [f"The replay ran on another basis than the study before: {told}."] if odd else []


def _told_made(result: StudyResult) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.made_with.items())
