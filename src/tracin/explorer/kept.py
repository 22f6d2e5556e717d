"""A folder that holds the pages: written by ``serve --out``, read without running anything that it names.

``audit/audit.safetensors`` is the audit, ``explorer/study.json`` names and facts, ``explorer/rows.safetensors`` labels,
predictions and losses, ``explorer/faces.safetensors`` pictures and texts as bytes, and ``explorer/explained.json`` the
explanations. A folder with an audit alone is shown without the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracin.audit import Audit
from tracin.audit.names import unique_names
from tracin.errors import OptionError, ResultError
from tracin.explorer.entries import json_of
from tracin.explorer.explaining import shortened
from tracin.explorer.faces import ABSENT, KINDS, Face
from tracin.explorer.intact import check_explained, check_face, check_study, check_values
from tracin.explorer.live import LiveAnswers
from tracin.explorer.pages import Content, Side, Source
from tracin.explorer.trusting import audit_trust
from tracin.files import read_tensors, write_tensors, write_text

__all__ = ["KeptAnswers", "KeptFaces", "first_tests", "keep", "kept_source"]

FORMAT, VERSION = "tracin.explorer", 1
AUDIT, PAGES = "audit", "explorer"
ROOM = 256 << 20
"""Bytes of faces that a folder holds; the most suspect and the explained rows come first."""
LISTED = 10
"""Proponents and opponents of a kept explanation."""

_VALUES = ("labels", "predicted", "confidence", "losses")
_SIDES = ("train", "test")


def keep(folder: str | Path, source: Source, *, explained: int = 20, room: int = ROOM) -> None:
    """Write what the pages show into a folder.

    Args:
        folder: Made if it is missing; files of the same names are replaced.
        source: A live study.
        explained: How many test rows, wrong and confident predictions first, and how many suspects to explain for it.
        room: The most bytes of faces.

    Raises:
        OptionError: The source is not live, so that nothing can be explained.
        ResultError: The folder cannot be written.
    """
    folder, content, answers = Path(folder), source.content, source.answers
    if not isinstance(answers, LiveAnswers):
        raise OptionError("keep: the source is a kept folder. Copy the folder.")
    rows = {
        "test": first_tests(content)[:explained],
        "train": content.audit.order[:explained].tolist(),
    }
    found: dict[str, Any] = {}
    for side, chosen in rows.items():
        for row, told in answers.explain_many(side, chosen).items():
            found[f"{side}/{row}"] = shortened(told, LISTED)
    content.audit.save(folder / AUDIT)
    pages = folder / PAGES
    told = {
        "format": FORMAT,
        "version": VERSION,
        "title": content.title,
        "names": content.names,
        "rows": {side: content.side(side).rows for side in _SIDES},
        "checkpoints": content.checkpoints,
        "trust": content.trust,
    }
    try:
        write_text(pages / "explained.json", json.dumps(found, ensure_ascii=False, allow_nan=False))
        write_tensors(pages / "rows.safetensors", _tensors(content), {"format": FORMAT}, ResultError)
        faces = _face_tensors(content, _rows_shown(content, found), room)
        write_tensors(pages / "faces.safetensors", faces, {"format": FORMAT}, ResultError)
        write_text(
            pages / "study.json", json.dumps(told, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        )
    except OSError as error:
        raise ResultError(
            f"cannot write {pages}: {error}. Choose a folder that you may write to and that has room."
        ) from error


def first_tests(content: Content) -> list[int]:
    """Test rows, the wrong predictions first, of these the most confident.

    Args:
        content: What is known of them.

    Returns:
        Row ids.
    """
    known = content.test
    key = torch.zeros(known.rows, dtype=torch.float64) if known.losses is None else known.losses.double()
    if known.wrong is not None and known.confidence is not None:
        key = known.confidence + 2.0 * known.wrong.double()
    return torch.argsort(key, descending=True, stable=True).tolist()


def _tensors(content: Content) -> dict[str, Tensor]:
    return {
        f"{side}.{name}": values
        for side in _SIDES
        for name in _VALUES
        if (values := getattr(content.side(side), name)) is not None
    }


def _rows_shown(content: Content, found: Mapping[str, Any]) -> list[tuple[str, int]]:
    """All rows, those that are looked at first in front."""
    first: list[tuple[str, int]] = []
    for told in found.values():
        first.append((told["query"]["side"], told["query"]["row"]))
        for target in told["targets"]:
            first += [("train", card["row"]) for name in ("proponents", "opponents") for card in target[name]]
    audit = content.audit
    order = audit.order.tolist()
    for row in order[: int(audit.is_issue.sum())]:
        first.append(("train", row))
        evidence = None if audit.evidence is None else audit.evidence.of(row)
        for pairs in evidence or ():
            first += [("train", other) for other, _ in pairs]
    tests = [("test", row) for row in range(content.test.rows)]
    return list(dict.fromkeys([*first, *tests, *(("train", row) for row in order)]))


def _face_tensors(content: Content, rows: Iterable[tuple[str, int]], room: int) -> dict[str, Tensor]:
    """Bytes one after the other, with where each face ends, and of which kind it is."""
    parts: list[bytes] = []
    places: dict[str, list[tuple[int, int, int, int]]] = {side: [] for side in _SIDES}
    at = 0
    for side, row in rows:
        face = content.faces.of(side, row)
        if at + len(face.data) > room:
            break
        kind = KINDS.index(face.kind) + len(KINDS) * face.pixels
        places[side].append((row, at, at + len(face.data), kind))
        parts.append(face.data)
        at += len(face.data)
    joined = np.frombuffer(b"".join(parts), dtype=np.uint8)
    tensors = {"bytes": torch.from_numpy(joined.copy())}
    for side, listed in places.items():
        tensors[f"{side}.places"] = torch.tensor(sorted(listed), dtype=torch.int64).reshape(-1, 4)
    return tensors


class KeptFaces:
    """Faces from a folder.

    Args:
        tensors: What ``_face_tensors`` made.
        rows: How many rows each side has.

    Raises:
        ResultError: They do not fit together.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
        if tensors["bytes"].dtype != torch.uint8 or tensors["bytes"].ndim != 1:
            raise ResultError("the faces are no bytes: keep the folder again.")
        self._bytes = tensors["bytes"].numpy()
        self._places: dict[str, dict[int, tuple[int, int, int]]] = {}
        for side in _SIDES:
            if tensors[f"{side}.places"].dtype != torch.int64:
                raise ResultError(
                    f"the places of the {side} faces are no whole numbers: keep the folder again."
                )
            listed = tensors[f"{side}.places"].tolist()
            for row, start, end, kind in listed:
                good = 0 <= row < rows[side] and 0 <= start <= end <= len(self._bytes)
                if not good or not 0 <= kind < 2 * len(KINDS):
                    raise ResultError(f"the face of {side} row {row} does not fit: keep the folder again.")
            self._places[side] = {row: (start, end, kind) for row, start, end, kind in listed}
            for row in self._places[side]:
                check_face(self.of(side, row), f"{side} row {row}")

    def of(self, side: str, row: int) -> Face:
        """See ``Faces``.

        Args:
            side: ``"train"`` or ``"test"``.
            row: The row's position.

        Returns:
            The face, or ``ABSENT``.
        """
        place = self._places[side].get(row)
        if place is None:
            return ABSENT
        start, end, kind = place
        return Face(KINDS[kind % len(KINDS)], self._bytes[start:end].tobytes(), kind >= len(KINDS))


class _NoFaces:
    """Where only an audit was kept."""

    def of(self, side: str, row: int) -> Face:
        return Face("text", f"{side} row {row}".encode())


@dataclass(frozen=True, eq=False)
class KeptAnswers:
    """The explanations of a folder.

    Args:
        found: By side and row, such as ``test/17``.
    """

    found: Mapping[str, Any]
    live: bool = False
    upload: str | None = None
    why_no_upload: str = "a kept folder explains nothing new: serve the study file."

    def explain(self, side: str, row: int | str, target: str) -> Future[dict[str, Any]]:
        """See ``Answers``.

        Args:
            side: ``"train"`` or ``"test"``.
            row: The row's position.
            target: ``predicted`` for all targets that were kept, or one of them by kind or class.

        Returns:
            The explanation.

        Raises:
            OptionError: It was not kept.
        """
        told = self.found.get(f"{side}/{row}")
        if told is None:
            raise OptionError(
                f"{side} row {row} was not explained for this folder. Serve the study file to explain it."
            )
        targets = told["targets"]
        if target != "predicted":
            targets = [each for each in targets if target in {each["kind"], each["name"]}]
            if not targets:
                raise OptionError(f"{side} row {row} was explained for other targets. Serve the study file.")
        future: Future[dict[str, Any]] = Future()
        future.set_result({**told, "targets": targets})
        return future

    def take(self, kind: str, body: bytes) -> Future[str]:
        """See ``Answers``.

        Args:
            kind: Not read.
            body: Not read.

        Raises:
            OptionError: Always.
        """
        del kind, body
        raise OptionError(f"no uploads here: {self.why_no_upload}")

    def uploaded(self, name: str) -> Face | None:
        """None: a folder has no uploads."""
        del name

    def close(self) -> None:
        """Nothing is being computed."""


def kept_source(folder: str | Path) -> Source:
    """The pages of a folder.

    Args:
        folder: What ``keep`` wrote, or a folder with an audit.

    Returns:
        The source.

    Raises:
        ResultError: There is none, or it is damaged.
    """
    folder = Path(folder)
    if not (folder / AUDIT).is_dir():
        raise ResultError(
            f"{folder} holds no audit. Make one: tracin serve FILE.py --out FOLDER, or tracin audit FILE.py --out FOLDER."
        )
    audit = Audit.load(folder / AUDIT)
    pages = folder / PAGES
    if not (pages / "study.json").exists():
        return _audit_alone(folder, audit)
    told = _read_json(pages / "study.json")
    rows, _ = read_tensors(pages / "rows.safetensors", ResultError)
    faces, _ = read_tensors(pages / "faces.safetensors", ResultError)
    try:
        return _source(told, rows, faces, _read_json(pages / "explained.json"), audit)
    except ResultError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ResultError(f"{pages} is damaged ({error!r}): keep the folder again.") from error


def _source(
    told: Any, rows: Mapping[str, Tensor], faces: Mapping[str, Tensor], found: Mapping[str, Any], audit: Audit
) -> Source:
    if told["format"] != FORMAT or told["version"] != VERSION:
        raise ResultError("the folder was kept by another version of tracin: keep it again.")
    check_study(told, audit)
    counts = {side: told["rows"][side] for side in _SIDES}
    check_explained(found, counts)
    for name, values in rows.items():
        if tuple(values.shape) != (counts[name.partition(".")[0]],):
            raise ResultError(
                f"{name} has {list(values.shape)} values for other rows: keep the folder again."
            )
        check_values(name, values)
    if counts["train"] != len(audit):
        raise ResultError(
            f"the audit is of {len(audit)} rows, and the pages of {counts['train']}: keep the folder again."
        )
    sides = {
        side: Side(counts[side], **{name: rows.get(f"{side}.{name}") for name in _VALUES}) for side in _SIDES
    }
    names = told["names"]
    content = Content(
        title=told["title"],
        names=None if names is None else tuple(names),
        train=sides["train"],
        test=sides["test"],
        checkpoints=tuple(dict(checkpoint) for checkpoint in told["checkpoints"]),
        audit=audit,
        trust=dict(told["trust"]),
        faces=KeptFaces(faces, counts),
    )
    return Source(content, KeptAnswers(found))


def _audit_alone(folder: Path, audit: Audit) -> Source:
    names = None
    if audit.classes is not None:
        names = unique_names([str(audit.label_name(number)) for number in range(audit.classes)])
    predicted = audit.predicted_labels if audit.predicted_labels is not None else audit.suggested_labels
    content = Content(
        title=folder.name,
        names=names,
        train=Side(len(audit), audit.given_labels, predicted),
        test=Side(0),
        checkpoints=(),
        audit=audit,
        trust={
            **audit_trust(audit),
            "notes": [*audit.notes, "this folder holds an audit alone: no pictures, texts or explanations."],
        },
        faces=_NoFaces(),
    )
    return Source(content, KeptAnswers({}))


def _read_json(path: Path) -> Any:
    try:
        found = json_of(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read ({error}): keep the folder again.") from error
    if not isinstance(found, dict):
        raise ResultError(f"{path} holds no JSON object: keep the folder again.")
    return found
