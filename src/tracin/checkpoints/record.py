"""What the recorder writes beside a checkpoint's tensors: step, rates, groups, ties and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tracin.checkpoints.reading import HEADER
from tracin.errors import CheckpointError
from tracin.files import read_layout, write_text

__all__ = ["Record", "file_name", "layout_fingerprint", "read_record"]

FORMAT = "tracin.checkpoint"
VERSION = 1


def file_name(step: int) -> str:
    """The tensors' file name at a step.

    Args:
        step: The training step.

    Returns:
        A name that sorts by step.

    Example:
        >>> file_name(12)
        'step-00000012.safetensors'
    """
    return f"step-{step:08d}.safetensors"


@dataclass(frozen=True)
class Record:
    """The JSON beside a file of tensors, ``step-00000012.json`` beside ``step-00000012.safetensors``.

    Args:
        file: The name of the tensors' file.
        step: The training step.
        optimizer: The optimizer's class.
        learning_rate: The rate of each parameter group in the last step taken, None before any.
        learning_rate_sum: The sum of each group's rates since the save before, None before any step.
        parameters: parameter → group.
        untrained: The parameters in no group.
        aliases: Tied names → the name that the tensors' file holds.
        fingerprint: Of the names, shapes and dtypes in the tensors' file.
    """

    file: str
    step: int
    optimizer: str
    learning_rate: Sequence[float | None]
    learning_rate_sum: Sequence[float | None]
    parameters: Mapping[str, int]
    untrained: Sequence[str]
    aliases: Mapping[str, str]
    fingerprint: str = ""

    @property
    def digest(self) -> str:
        """Written into the tensors' header too, so that a record from an earlier save is not taken for this one."""
        content = {name: value for name, value in asdict(self).items() if name != "fingerprint"}
        return _digest(content)

    def write(self, path: Path) -> None:
        """Write the JSON beside the tensors, atomically.

        Args:
            path: The tensors' file.

        Raises:
            CheckpointError: It cannot be written.
        """
        path = path.with_suffix(".json")
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "digest": self.digest}
        try:
            write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as cause:
            message = (
                f"cannot write {path}: {cause}. Choose a folder that you may write to and that has room."
            )
            raise CheckpointError(message) from cause

    def rates(self, field: str) -> float | dict[str, float] | None:
        """The rates of ``learning_rate`` or ``learning_rate_sum`` as ``Checkpoint`` takes them.

        Args:
            field: Which of the two.

        Returns:
            One number where it holds for every parameter of the model, else parameter → rate; None before any step.
        """
        groups: Sequence[float | None] = getattr(self, field)
        each = {name: groups[group] for name, group in self.parameters.items()}
        known = {name: rate for name, rate in each.items() if rate is not None}
        if not known:
            return None
        values = set(known.values())
        if len(values) == 1 and len(known) == len(each) and not self.untrained:
            return values.pop()
        return known


def layout_fingerprint(path: Path) -> tuple[str, str]:
    """Fingerprint of the names, shapes and dtypes in a file of tensors, and the digest that its header carries.

    Args:
        path: The tensors' file.

    Returns:
        Both, in hexadecimal digits.

    Raises:
        CheckpointError: The file is damaged.
    """
    layout, header = read_layout(path, error=CheckpointError)
    try:
        return _digest(layout), str(json.loads(header.get(HEADER, "{}")).get("digest", ""))
    except (ValueError, AttributeError) as cause:
        raise CheckpointError(f"{path} has a damaged header ({cause}): {_MEND}") from cause


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_record(path: Path) -> Record | None:
    """Read and check the record beside a file of tensors.

    Args:
        path: The tensors' file, or the record itself.

    Returns:
        The record; None where there is none, or a JSON file that is something else.

    Raises:
        CheckpointError: The record is damaged, newer, or belongs to other tensors; the message names it.
    """
    path = path.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path} cannot be read as JSON ({cause}): {_MEND}") from cause
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        version = content.get("version")
        raise CheckpointError(f"{path} is of format {version}, and this tracin reads {VERSION}: upgrade it.")
    record = _parse(content, path)
    tensors = path.with_suffix(".safetensors")
    if record.file != tensors.name:
        raise CheckpointError(f"{path} is the record of {record.file}, by its own words: {_MEND}")
    if not tensors.is_file():
        raise CheckpointError(f"{path} names the tensors {record.file}, which are not beside it: {_MEND}")
    fingerprint, digest = layout_fingerprint(tensors)
    if (fingerprint, digest) != (record.fingerprint, content.get("digest")):
        raise CheckpointError(
            f"{path} was written for other tensors than {record.file} holds, as after an interrupted save: {_MEND}"
        )
    return record


_MEND = (
    "save the checkpoint again, or delete the record and give the rates to Checkpoint(…, learning_rate=…)."
)


def _parse(content: Mapping[str, Any], path: Path) -> Record:
    try:
        known = {field.name: content[field.name] for field in fields(Record)}
        for field in ("learning_rate", "learning_rate_sum"):
            known[field] = [None if rate is None else 0.0 + rate for rate in known[field]]
        groups = len(known["learning_rate"])
        whole = (
            isinstance(known["step"], int)
            and Path(known["file"]).name == known["file"]
            and len(known["learning_rate_sum"]) == groups
            and all(0 <= group < groups for group in known["parameters"].values())
        )
    except (KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(f"{path} is damaged ({type(cause).__name__}: {cause}): {_MEND}") from cause
    if not whole:
        raise CheckpointError(f"{path} is damaged, its fields contradict each other: {_MEND}")
    return Record(**known)
