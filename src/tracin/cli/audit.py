"""``tracin audit``: the suspects of a study, printed and kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracin.audit import Audit, calibrate, find_label_issues
from tracin.cli import options
from tracin.cli.cards import Known, Rows
from tracin.cli.commands import precision_of, refuse_below_one, save_report
from tracin.cli.output import Folder
from tracin.cli.printing import heading, percent, say, table
from tracin.cli.telling import as_text, tell_coverage
from tracin.errors import OptionError
from tracin.index.index import Index
from tracin.methods import TracInCP
from tracin.options import whole_number
from tracin.plots import Card
from tracin.report import Fact, ReportData
from tracin.results import SelfInfluence
from tracin.study import Study, study_file

__all__ = ["KEPT", "run", "suspects_of"]

KEPT = "audit"
"""The folder under ``--out`` that holds the audit itself."""

_PAIRS = 5
_FILES = {"cleanlab": "cleanlab.csv", "label-studio": "label-studio.json"}


def run(command: options.Audit) -> int:
    """Rank the training rows by how suspect their labels are."""
    refuse_below_one("--top", command.top)
    whole_number(command.evidence, "--evidence", 0)
    _refuse_unused(command)
    folder = Folder(command.output.out, command.output.format)
    with study_file(command.file) as study:
        method = command.settings.method(study)
        asked = method if command.index is None else Index.open(command.index, method, study.train)
        own = asked.self_influence(study.train) if isinstance(asked, TracInCP) else asked.self_influence()
        found = _audited(command, study, method, asked, own)
        if "coverage" in own.provenance:
            tell_coverage(own)
        _tell(command, study, found)
        if folder:
            _keep(folder, command, study, found, own)
    folder.tell()
    return 0


def _refuse_unused(command: options.Audit) -> None:
    """What would be read by nothing is a mistake."""
    precision_of(command.calibrate, command.precision)
    if command.export and command.output.out is None:
        raise OptionError(
            f"--export {' '.join(command.export)} writes into the folder of --out: add --out FOLDER, or leave it out."
        )


def _audited(
    command: options.Audit, study: Study, method: TracInCP, asked: TracInCP | Index, own: SelfInfluence
) -> Audit:
    found = find_label_issues(
        asked,
        study.train,
        class_names=study.class_names,
        validation=study.test if command.opposing else None,
        evidence=command.evidence,
        duplicates=command.duplicates,
        self_influence=own,
    )
    if not command.calibrate:
        return found
    precision = precision_of(command.calibrate, command.precision)
    return found.calibrated(calibrate(study, precision=precision, method=method))


def _tell(command: options.Audit, study: Study, found: Audit) -> None:
    """The first suspects, the cut-off and the notes."""
    rows = found.order[: command.top].tolist()
    heading(f"Suspects: the first {len(rows):,} of {len(found):,} training rows")
    table([_line(study, record) for record in found.records(rows)])
    say()
    flagged = int(found.is_issue.sum())
    say(f"{flagged:,} rows are flagged ({percent(flagged / len(found))}). {found.cutoff.why}")
    if found.duplicates is not None and len(found.duplicates.rows):
        pairs = found.duplicates.rows.tolist()
        shown = ", ".join(f"{one} and {other}" for one, other in pairs[:_PAIRS])
        more = ", …" if len(pairs) > _PAIRS else ""
        say(f"Near-duplicates with different labels, {len(pairs):,} pairs: {shown}{more}.")
    if command.opposing:
        worst = found.opposing(command.top).tolist()
        heading(f"Rows that oppose the test rows as a whole, the first {len(worst):,}")
        opposed = found.signals["opposes_validation"]
        table([{"row": row, "opposes": float(opposed[row])} for row in worst])
    for note in found.notes:
        say(f"Note: {note}")


def _line(study: Study, record: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "rank": "rank",
        "row": "row",
        "given": "given_label",
        "suggested": "suggested_label",
        "predicted": None,
        "score": "score",
        "margin": "aum",
        "residual": "residual",
        "mean loss": "mean_loss",
        "self-infl. rank": "self_influence_rank",
    }
    told = {head: None if name is None else record.get(name) for head, name in names.items()}
    if "residual" in record:
        told |= {"predicted": told["suggested"], "suggested": None}
    told["flag"] = "yes" if record["is_issue"] else ""
    told["shown"] = as_text(Card(study.shown("train", record["row"])))
    return told


def suspects_of(study: Study, found: Audit) -> list[dict[str, Any]]:
    """All training rows by suspicion, with their classes by number and by name.

    Args:
        study: The study.
        found: Its audit.

    Returns:
        One record per row.
    """
    labels = {
        "label": found.given_labels,
        "predicted": found.predicted_labels,
        "suggested": found.suggested_labels,
    }
    listed = {
        name: values.tolist() for name, values in labels.items() if values is not None and found.classes
    }
    records = []
    for record in found.records(found.order.tolist()):
        row = record["row"]
        told = {
            "rank": record["rank"],
            "train": row,
            **{name: values[row] for name, values in listed.items()},
        }
        if study.class_names is not None:
            told |= {f"{name}_name": str(found.label_name(values[row])) for name, values in listed.items()}
        for name in ("score", "is_issue", "loss", "mean_loss", "residual", "margin", "aum", "self_influence"):
            if name in record:
                told[name] = record[name]
        records.append(told)
    return records


def _keep(folder: Folder, command: options.Audit, study: Study, found: Audit, own: SelfInfluence) -> None:
    """The files under ``--out``."""
    records = suspects_of(study, found)
    folder.table("suspects", records)
    for kind in folder.formats:
        found.export(folder.path(f"audit.{kind}"), kind)
    for kind in command.export:
        found.export(folder.path(_FILES[kind]), kind)
    own.save(folder.path("self_influence.safetensors"))
    found.save(folder.path(KEPT))
    if found.calibration is not None:
        curve = found.calibration
        columns = {
            "score": curve.thresholds,
            "precision": curve.precision,
            "found": curve.found,
            "flagged": curve.flagged,
            "planted_precision": curve.planted_precision,
        }
        values = zip(*columns.values(), strict=True)
        folder.table("calibration", [dict(zip(columns, each, strict=True)) for each in values])
    facts = {
        record["train"]: Known(record.get("label"), record.get("predicted"))
        for record in records[: command.top]
    }
    rows = Rows(study, "train", facts)
    cards = tuple(rows.card(record["train"], record["score"]) for record in records[: command.top])
    save_report(folder, _report(command, found, cards, own))


def _report(command: options.Audit, found: Audit, cards: tuple[Card, ...], own: SelfInfluence) -> ReportData:
    flagged = int(found.is_issue.sum())
    return ReportData(
        title=f"Audit of {command.file.name}",
        summary=f"The {len(cards)} most suspect of {len(found):,} training rows: look at their labels first.",
        facts=(
            Fact("Training rows", f"{len(found):,}"),
            Fact("Flagged", f"{flagged:,}", percent(flagged / len(found))),
            Fact("Checkpoints", str(len(own.provenance["checkpoints"]))),
        ),
        suspects=cards,
        suspects_told="The training rows whose labels to look at first, by their score from 0 to 1.",
        notes=(found.cutoff.why, *found.notes),
        provenance=dict(own.provenance),
    )
