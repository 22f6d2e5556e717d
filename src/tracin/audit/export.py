"""An audit in the formats of other tools: CSV, Parquet, JSON, a cleanlab-style table, Label Studio tasks."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracin.audit.decisions import Decision, checked
from tracin.audit.parts import Findings
from tracin.audit.table import records
from tracin.errors import MissingExtraError, OptionError, ResultError
from tracin.files import atomic_path, path_of, write_csv

__all__ = ["FORMATS", "cleanlab_records", "export", "format_of", "label_studio_tasks", "table_records"]

FORMATS = ("csv", "parquet", "json", "cleanlab", "label-studio")
_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".json": "json"}
Record = dict[str, Any]


def format_of(path: str | Path, format: str | None) -> str:  # noqa: A002  as pandas and pyarrow call it
    """The format to write.

    Args:
        path: The file.
        format: What the user asked for; None: by the file's suffix.

    Returns:
        One of ``FORMATS``.

    Raises:
        OptionError: There is no such format, or the suffix tells none.
    """
    if format is None:
        suffix = Path(path).suffix.lower()
        if suffix not in _SUFFIXES:
            raise OptionError(
                f"export: {Path(path).name} ends in {suffix or 'nothing'}: give format=, one of {', '.join(FORMATS)}."
            )
        return _SUFFIXES[suffix]
    if format not in FORMATS:
        raise OptionError(f"export: format is {format!r}. Choose one of {', '.join(FORMATS)}.")
    return format


def export(
    findings: Findings,
    path: str | Path,
    format: str | None,  # noqa: A002
    decisions: Any,
) -> Path:
    """See ``Audit.export``."""
    path = path_of(path, "export: path", OptionError)
    kind = format_of(path, format)
    decided = None if decisions is None else {one.row: one for one in checked(findings, decisions)}
    if kind == "label-studio":
        content = _json(label_studio_tasks(findings, decided))
    elif kind == "cleanlab":
        content = _csv(cleanlab_records(findings))
    else:
        rows = table_records(findings, decided)
        if kind == "parquet":
            _write_parquet(path, rows)
            return path
        content = _csv(rows) if kind == "csv" else _json(rows)
    _write(path, content)
    return path


def table_records(findings: Findings, decided: Mapping[int, Decision] | None) -> list[Record]:
    """The table, with the decisions where they are given.

    Args:
        findings: The audit.
        decided: Decisions by row, labels as numbers; None: no columns for them.

    Returns:
        A record per row; ``decision`` is None where none was made, ``decided_label`` the label after it, None where the row
        is removed.
    """
    rows = records(findings)
    if decided is None:
        return rows
    for record in rows:
        decision = decided.get(record["row"])
        record["decision"] = None if decision is None else decision.action
        label = record.get("given_label")
        if decision is not None and decision.action == "remove":
            label = None
        elif decision is not None and decision.label is not None:
            label = findings.label_name(float(decision.label))
        record["decided_label"] = label
    return rows


def cleanlab_records(findings: Findings) -> list[Record]:
    """The columns of cleanlab's ``Datalab.get_issues("label")``: its score is low where a label is suspect.

    Args:
        findings: The audit of a classification.

    Returns:
        A record per row, in their order.

    Raises:
        OptionError: The task has no classes.
    """
    if findings.given_labels is None or findings.predicted_labels is None:
        raise OptionError("export: a cleanlab-style table needs classes. Choose csv, parquet or json.")
    columns = zip(
        findings.is_issue.tolist(),
        (1.0 - findings.score).tolist(),
        findings.given_labels.tolist(),
        findings.predicted_labels.tolist(),
        strict=True,
    )
    return [
        {
            "is_label_issue": flag,
            "label_score": score,
            "given_label": findings.label_name(given),
            "predicted_label": findings.label_name(predicted),
        }
        for flag, score, given, predicted in columns
    ]


def label_studio_tasks(findings: Findings, decided: Mapping[int, Decision] | None) -> list[Record]:
    """Tasks for Label Studio's import: the suggestion is a prediction, a decision that keeps or changes a label an annotation.

    The flagged rows and those that are decided, most suspect first. ``data.row`` is the training row: put pictures or texts
    in by it. The project's configuration needs ``<Choices name="label" toName="row">``.

    Args:
        findings: The audit of a classification.
        decided: Decisions by row, labels as numbers.

    Returns:
        Tasks.

    Raises:
        OptionError: The task has no classes.
    """
    if findings.given_labels is None or findings.suggested_labels is None or findings.classes is None:
        raise OptionError("export: Label Studio tasks need classes. Choose csv, parquet or json.")
    decided = decided or {}
    wanted = [row for row in findings.order.tolist() if bool(findings.is_issue[row]) or row in decided]
    tasks = []
    for record in records(findings, wanted):
        row = record["row"]
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
        task: Record = {
            "data": data,
            "predictions": [
                {
                    "model_version": "tracin",
                    "score": record["score"],
                    "result": [_choice(record["suggested_label"])],
                }
            ],
        }
        decision = decided.get(row)
        if decision is not None:
            data["decision"] = decision.action
            label = (
                record["given_label"]
                if decision.label is None
                else findings.label_name(float(decision.label))
            )
            # A removed row has no right choice: Label Studio keeps such an annotation as cancelled.
            removed = decision.action == "remove"
            task["annotations"] = [{"was_cancelled": removed, "result": [] if removed else [_choice(label)]}]
        tasks.append(task)
    return tasks


def _choice(label: Any) -> Record:
    return {"from_name": "label", "to_name": "row", "type": "choices", "value": {"choices": [str(label)]}}


def _csv(rows: list[Record]) -> str:
    text = io.StringIO(newline="")
    write_csv(text, rows)
    return text.getvalue()


def _json(rows: list[Record]) -> str:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _write_parquet(path: Path, rows: list[Record]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as cause:
        raise MissingExtraError(
            "export: parquet needs pyarrow: pip install 'tracin[eval]', or choose csv or json."
        ) from cause
    table = pyarrow.Table.from_pylist(
        [{name: list(v) if isinstance(v, tuple) else v for name, v in row.items()} for row in rows]
    )
    try:
        with atomic_path(path) as partial:
            pyarrow.parquet.write_table(table, partial)
    except OSError as cause:
        raise _unwritable(path, cause) from cause


def _write(path: Path, content: str) -> None:
    try:
        with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            file.write(content)
    except OSError as cause:
        raise _unwritable(path, cause) from cause


def _unwritable(path: Path, cause: OSError) -> ResultError:
    return ResultError(
        f"cannot write {path}: {cause}. Choose a folder that you may write to and that has room."
    )
