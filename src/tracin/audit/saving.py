"""An audit in a folder: one safetensors file with JSON in its header, whole or absent, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracin.audit.parts import Calibration, Cutoff, Duplicates, Evidence, Findings
from tracin.errors import OptionError, ResultError
from tracin.files import path_of
from tracin.results.saving import Form, check_provenance, check_tensors, read_content, write_content

__all__ = ["FILE", "load", "save"]

FILE = "audit.safetensors"
FORM = Form("tracin.audit", 1, "audit", sealed=True)
_LABELS = ("given_labels", "suggested_labels", "predicted_labels", "labels")
_EVIDENCE = ("rows", "proponents", "proponent_scores", "opponents", "opponent_scores")


def save(findings: Findings, folder: str | Path) -> Path:
    """See ``Audit.save``."""
    path = path_of(folder, "Audit.save: folder", OptionError) / FILE
    tensors: dict[str, Tensor] = {"score": findings.score, "is_issue": findings.is_issue}
    tensors |= {f"signals.{name}": values for name, values in findings.signals.items()}
    for name in _LABELS:
        values = getattr(findings, name)
        if values is not None:
            tensors[name] = values
    if findings.evidence is not None:
        tensors |= {f"evidence.{name}": getattr(findings.evidence, name) for name in _EVIDENCE}
    if findings.duplicates is not None:
        tensors |= {
            "duplicates.rows": findings.duplicates.rows,
            "duplicates.cosines": findings.duplicates.cosines,
        }
    content = {
        "tensors": sorted(tensors),
        "signals": list(findings.signals),
        "classes": findings.classes,
        "class_names": findings.class_names,
        "notes": list(findings.notes),
        "provenance": check_provenance(findings.provenance),
        "cutoff": asdict(findings.cutoff),
        "calibration": None if findings.calibration is None else asdict(findings.calibration),
        "threshold": None if findings.duplicates is None else findings.duplicates.threshold,
    }
    write_content(path, tensors, _plain(content), FORM)
    return path


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back: the digest is of what will be read."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def load(folder: str | Path) -> dict[str, Any]:
    """The fields of the audit that ``save`` wrote.

    Args:
        folder: The folder, or the file in it.

    Returns:
        What ``Findings`` takes.

    Raises:
        OptionError: The folder is no path.
        ResultError: There is none, or it is damaged or of another version.
    """
    path = path_of(folder, "Audit.load: folder", OptionError)
    path = path / FILE if path.is_dir() or path.suffix != ".safetensors" else path
    tensors, content = read_content(path, FORM, "Audit")
    try:
        check_tensors(path, FORM, tensors, content, content["tensors"])
        return _fields(tensors, content)
    except (KeyError, TypeError, AttributeError) as cause:
        raise ResultError(f"{path} is damaged ({cause!r}): save the audit again.") from cause


def _fields(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> dict[str, Any]:
    evidence = {name: tensors[f"evidence.{name}"] for name in _EVIDENCE if f"evidence.{name}" in tensors}
    duplicates = None
    if content["threshold"] is not None:
        duplicates = Duplicates(
            tensors["duplicates.rows"], tensors["duplicates.cosines"], float(content["threshold"])
        )
    told = content["calibration"]
    return {
        "score": tensors["score"],
        "is_issue": tensors["is_issue"].to(torch.bool),
        "signals": {name: tensors[f"signals.{name}"] for name in content["signals"]},
        "cutoff": Cutoff(**content["cutoff"]),
        **{name: tensors.get(name) for name in _LABELS},
        "classes": content["classes"],
        "class_names": content["class_names"],
        "evidence": Evidence(**evidence) if evidence else None,
        "duplicates": duplicates,
        "calibration": None if told is None else _calibration(told),
        "notes": tuple(content["notes"]),
        "provenance": content["provenance"],
    }


def _calibration(told: Mapping[str, Any]) -> Calibration:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in told.items()
    }
    return Calibration(**fields)
