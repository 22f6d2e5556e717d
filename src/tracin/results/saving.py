"""What the results share: their checks, and one safetensors file with JSON in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracin.errors import MissingExtraError, ResultError
from tracin.files import read_tensors, write_tensors

__all__ = [
    "FORM",
    "Form",
    "assign",
    "build",
    "check_ids",
    "check_provenance",
    "check_tensors",
    "check_values",
    "count",
    "describe",
    "digest",
    "dtype_name",
    "import_pandas",
    "read",
    "read_content",
    "write",
    "write_content",
]

HEADER = "tracin"  # the key in the file's header


@dataclass(frozen=True)
class Form:
    """A kind of file with JSON in its header.

    Args:
        name: Its name in the header.
        version: The version that is written, and the only one that is read.
        noun: What a file holds, in messages.
        sealed: Whether the digest covers what the header says besides the tensors.
    """

    name: str
    version: int
    noun: str
    sealed: bool = False


FORM = Form("tracin.result", 1, "result")


def assign(result: object, **fields: object) -> None:
    """Set fields of a frozen dataclass while it is being made."""
    for name, value in fields.items():
        object.__setattr__(result, name, value)


def check_values(values: Any, ndim: int, name: str, shape: str) -> Tensor:
    """Scores on the CPU, or a ``ResultError`` that calls them ``name``."""
    if not isinstance(values, Tensor) or values.ndim != ndim:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ResultError(f"{name} is {found}, not a tensor {shape}.")
    if values.dtype not in {torch.float32, torch.float64}:
        raise ResultError(
            f"{name} is {dtype_name(values)}; scores are kept as float32 or float64: convert it first."
        )
    return values.detach().cpu()


def check_ids(ids: Any, shape: tuple[int, ...], name: str, what: str) -> Tensor:
    """Row ids as int64 on the CPU, or a ``ResultError`` that calls them ``name``."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        found = dtype_name(ids) if isinstance(ids, Tensor) else type(ids).__name__
        raise ResultError(f"{name} is {found}, not a tensor of int64 row ids.")
    if tuple(ids.shape) != shape:
        raise ResultError(f"{name} is {list(ids.shape)}, not {list(shape)}: one id per {what}.")
    return ids.detach().to("cpu", torch.int64)


def check_provenance(provenance: Any) -> dict[str, Any]:
    """An own copy of the provenance, as it will be read back."""
    if not isinstance(provenance, Mapping):
        raise ResultError(
            f"provenance is a {type(provenance).__name__}, not a mapping of names to JSON values."
        )
    copy = {}
    for name, value in provenance.items():
        try:
            copy[str(name)] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as cause:
            message = f"provenance[{name!r}] is no JSON value ({cause}): give text, numbers or lists."
            raise ResultError(message) from cause
    return copy


def dtype_name(tensor: Tensor) -> str:
    """``float32``, without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")


def count(number: int, what: str) -> str:
    """``1 query``, ``2 queries``."""
    plural = "queries" if what == "query" else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def describe(result: Any, size: str, values: Tensor) -> str:
    """The short form of a result, for its ``repr``."""
    method = result.provenance.get("method")
    parts = [size, dtype_name(values), *([str(method)] if method else [])]
    return f"{type(result).__name__}({', '.join(parts)})"


def write(path: str | Path, result: Any, tensors: dict[str, Tensor], **extra: Any) -> None:
    """Save the tensors, and with them in the header the type, the provenance and ``extra``."""
    content = {"type": type(result).__name__, "provenance": result.provenance, **extra}
    write_content(path, tensors, content, FORM)


def write_content(
    path: str | Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any], form: Form
) -> None:
    """Save tensors, and JSON in the header, atomically."""
    told = {
        "format": form.name,
        "version": form.version,
        **content,
        "digest": digest(tensors, content if form.sealed else None),
    }
    # One key, because safetensors writes several in an order that changes from run to run.
    write_tensors(path, tensors, {HEADER: json.dumps(told)}, error=ResultError)


def digest(tensors: Mapping[str, Tensor], content: Mapping[str, Any] | None = None) -> str:
    """A hash of names, dtypes, shapes and bytes, and of JSON values where they are given."""
    found = hashlib.sha256()
    if content is not None:
        found.update(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read(path: str | Path, cls: type, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors called ``names``, and what else the constructor takes."""
    tensors, content = read_content(path, FORM, cls.__name__)
    kind = content.get("type")
    if kind != cls.__name__:
        raise ResultError(f"{path} holds a {kind}, not a {cls.__name__}: read it with {kind}.load.")
    check_tensors(path, FORM, tensors, content, names)
    return tensors, {name: content[name] for name in ("provenance", "notes") if name in content}


def read_content(path: str | Path, form: Form, owner: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_content`` wrote, before its digest is looked at.

    Args:
        path: The file.
        form: What it must be.
        owner: The class whose ``save`` writes such files.

    Returns:
        The tensors and the header.

    Raises:
        ResultError: The file is damaged, of another form, or of another version.
    """
    tensors, header = read_tensors(path, error=ResultError)
    try:
        content = json.loads(header.get(HEADER, "null"))
    except ValueError as cause:
        raise ResultError(f"{path} has a damaged header ({cause}): save the {form.noun} again.") from cause
    if not isinstance(content, dict) or content.get("format") != form.name:
        raise ResultError(f"{path} is no saved {form.noun} of tracin: give a file that {owner}.save wrote.")
    version = content.get("version")
    if version != form.version:
        newer = isinstance(version, int) and version > form.version
        raise ResultError(
            f"{path} is of format {version}, and this tracin reads {form.version}: "
            + ("upgrade it." if newer else f"save the {form.noun} again.")
        )
    return tensors, content


def check_tensors(
    path: str | Path,
    form: Form,
    tensors: Mapping[str, Tensor],
    content: Mapping[str, Any],
    names: Sequence[str],
) -> None:
    """Refuse a file whose tensors, or, where it is sealed, whose header are not those that were saved.

    Args:
        path: The file.
        form: What it is.
        tensors: Its tensors.
        content: Its header.
        names: The tensors that it must hold.

    Raises:
        ResultError: Others are there, or the digest is another.
    """
    if sorted(tensors) != sorted(names):
        raise ResultError(
            f"{path} holds the tensors {sorted(tensors)}, not {sorted(names)}: save the {form.noun} again."
        )
    told = {name: value for name, value in content.items() if name not in {"format", "version", "digest"}}
    if content.get("digest") != digest(tensors, told if form.sealed else None):
        raise ResultError(
            f"{path} is damaged: its numbers are not those that were saved. Save the {form.noun} again."
        )


def build(path: str | Path, cls: type, tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """Make the result that was read, or say which file is damaged."""
    try:
        return cls(**tensors, **fields)
    except ResultError as cause:
        raise ResultError(f"{path} is damaged: {cause} Save the result again.") from cause


def import_pandas() -> Any:
    """pandas, or the error that says how to get it."""
    try:
        return import_module("pandas")
    except ImportError as cause:
        raise MissingExtraError("to_pandas needs pandas: pip install 'tracin[eval]'") from cause
