"""The commands that work on a study file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tracin.cli import options
from tracin.cli.cards import Known, Rows, explanation, known_of
from tracin.cli.output import Folder
from tracin.cli.printing import heading, say, table
from tracin.cli.records import (
    contribution_records,
    influence_records,
    parameter_records,
    route_records,
)
from tracin.cli.telling import tell_attribution, tell_verification
from tracin.data import open_rows, rows_of
from tracin.errors import OptionError
from tracin.explain import Attribution, explain
from tracin.methods import TracInCP
from tracin.plots import Explanation, picture_sheet, png, trajectory_figure
from tracin.report import ReportData, render_report
from tracin.study import Study, study_file

__all__ = [
    "Explained",
    "explain_rows",
    "explained",
    "plan",
    "precision_of",
    "refuse_below_one",
    "save_explained",
    "save_report",
    "verify",
]

PRECISION = 0.9
"""The share of flagged rows that is to be wrong, where --precision says nothing."""


@dataclass(frozen=True, eq=False)
class Explained:
    """One target of one query, ready to print, draw and write."""

    attribution: Attribution
    shown: Explanation
    facts: dict[int, Known]

    @property
    def name(self) -> str:
        """For file names: ``17-predicted``, ``17-class-3``."""
        target = self.attribution.target
        kind = f"class-{target.number}" if target.kind == "class" else target.kind
        return f"{self.attribution.query}-{kind}"


def explained(
    method: TracInCP, study: Study, attributions: list[Attribution], top: int, true_labels: Any = None
) -> list[Explained]:
    """Look up and render the rows that an explanation shows.

    Args:
        method: How the study was traced.
        study: The study.
        attributions: What ``explain`` found.
        top: Rows of each sign.
        true_labels: The labels before wrong ones were planted.

    Returns:
        One for each attribution.
    """
    lists = [each.top_k(top) for each in attributions]
    ids = [
        row for each in lists for side in (each.proponents, each.opponents) for row in side.ids[0].tolist()
    ]
    facts = known_of(method, study.train, ids)
    rows = Rows(study, "train", facts, true_labels)
    return [Explained(each, explanation(each, method, rows, top), facts) for each in attributions]


def explain_rows(command: options.Explain) -> int:
    """Trace predictions to the training rows behind them."""
    refuse_below_one("--top", command.top)
    folder = Folder(command.output.out, command.output.format, figures=True)
    with study_file(command.file) as study:
        method = command.settings.method(study, normalize=command.normalize)
        rows = list(dict.fromkeys(command.query))
        found = explain(
            method, study.train, study.test, rows, target=command.target, class_names=study.class_names
        )
        ready = explained(method, study, found, command.top)
        before = None
        for each in ready:
            tell_attribution(study, each.attribution, each.shown, first=each.attribution.query != before)
            before = each.attribution.query
        if folder:
            save_explained(folder, method, study, ready)
            for each in ready:
                _save_figures(folder, each)
            save_report(
                folder,
                ReportData(
                    title=f"Predictions of {command.file.name}",
                    explanations=tuple(each.shown for each in ready),
                    provenance=dict(ready[0].attribution.provenance),
                ),
            )
    folder.tell()
    return 0


def save_explained(folder: Folder, method: TracInCP, study: Study, ready: list[Explained]) -> None:
    """The tables of explanations."""
    lists = [
        row for each in ready for row in influence_records(study, each.attribution, each.shown, each.facts)
    ]
    paths = [row for each in ready for row in contribution_records(method, each.attribution, each.shown)]
    folder.table("explanations", lists)
    folder.table("trajectory", paths)


def _save_figures(folder: Folder, each: Explained) -> None:
    for name, figure in (
        ("explanation", picture_sheet(each.shown)),
        ("trajectory", trajectory_figure(each.shown)),
    ):
        with folder.file(f"{name}-{each.name}.png") as path:
            path.write_bytes(png(figure))


def save_report(folder: Folder, data: ReportData) -> None:
    """report.html, one self-contained file."""
    with folder.file("report.html") as path:
        path.write_text(render_report(data), encoding="utf-8")


def verify(command: options.Verify) -> int:
    """Compare gradients with autograd's, and tell the coverage."""
    refuse_below_one("--rows", command.rows)
    folder = Folder(command.output.out, command.output.format)
    with study_file(command.file) as study:
        found = command.settings.method(study).verify(study.train, rows=command.rows, seed=command.seed)
    records = parameter_records(found)
    tell_verification(found, records)
    if folder:
        folder.table("parameters", records)
        summary = {
            "exact": found.exact,
            "max_relative_error": found.max_relative_error,
            "tolerance": found.tolerance,
            "coverage": found.coverage.fraction,
            "rows": list(found.rows),
            "checkpoints": found.checkpoints,
        }
        with folder.file("verification.json") as path:
            path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    folder.tell()
    return 0 if found.exact else 1


def plan(command: options.Plan) -> int:
    """Tell what tracing the test rows will cost."""
    refuse_below_one("--k", command.k)
    if command.verb == "self_influence" and command.queries is not None:
        raise OptionError("--queries: self_influence has no test rows. Leave it out.")
    folder = Folder(command.output.out, command.output.format)
    with study_file(command.file) as study:
        method = command.settings.method(study)
        train = len(open_rows(study.train, name="train", batch_size=method.settings.batch_size))
        sizes = f"{train:,} training rows × {len(study.trajectory)} checkpoints"
        if command.verb == "self_influence":
            found = method.plan(study.train, verb=command.verb)
        else:
            queries = study.test if command.queries is None else _first(method, study.test, command.queries)
            asked = len(open_rows(queries, name="test", batch_size=method.settings.batch_size))
            sizes = f"{asked:,} test rows × {sizes}"
            found = method.plan(study.train, queries, verb=command.verb, k=command.k)
    records = route_records(found)
    heading(f"{command.verb}: {sizes}")
    say(str(found))
    table(records)
    if folder:
        folder.table("routes", records)
        summary = {"verb": found.verb, "peak_bytes": found.peak_bytes, "seconds": found.seconds}
        summary |= {"passes": found.passes, "fits": found.fits, "ways": list(found.ways)}
        with folder.file("plan.json") as path:
            path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    folder.tell()
    return 0


def _first(method: TracInCP, test: Any, count: int) -> Any:
    refuse_below_one("--queries", count)
    n = len(open_rows(test, name="test", batch_size=method.settings.batch_size))
    return rows_of(test, range(min(count, n)))


def precision_of(calibrate: bool, precision: float | None) -> float:
    """The precision that a calibrated cut-off is to reach.

    Args:
        calibrate: Whether ``--calibrate`` was given.
        precision: What ``--precision`` gave.

    Returns:
        A share between 0 and 1.

    Raises:
        OptionError: It is no such share, or is given without ``--calibrate``.
    """
    if precision is None:
        return PRECISION
    if not 0.0 < precision < 1.0:
        raise OptionError(f"--precision is {precision}: give a share between 0 and 1.")
    if not calibrate:
        raise OptionError("--precision is for the cut-off of --calibrate: add --calibrate, or leave it out.")
    return precision


def refuse_below_one(name: str, value: int) -> None:
    """Refuse a count of 0 or less."""
    if value < 1:
        raise OptionError(f"{name} is {value}: give a whole number from 1 on.")
