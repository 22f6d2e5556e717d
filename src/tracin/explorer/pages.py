"""What the page reads, as plain JSON objects: the same for a live study, a kept folder and a static report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tracin import __version__
from tracin.audit import Audit
from tracin.errors import OptionError
from tracin.explorer.asking import SuspectFilter, TestFilter
from tracin.explorer.faces import Face, Faces
from tracin.explorer.numbers import number

__all__ = ["LISTED", "Answers", "Content", "Side", "Source"]

LISTED = 50
"""The most proponents and opponents of an explanation."""

HELD_SUSPECTS = 2_000
"""Suspects whose cards are held, for the pages that are made anew after each decision."""

_ALTS = {"train": "training row", "test": "test row", "upload": "upload"}


@dataclass(frozen=True, eq=False)
class Side:
    """What is known of the rows of one side.

    Args:
        rows: How many there are.
        labels: Class numbers, int64, or targets, float64 [n].
        predicted: The classes that the last checkpoint predicts, or the mean prediction of the checkpoints [n].
        confidence: Their probability [n].
        losses: The loss at the last checkpoint [n].
    """

    rows: int
    labels: Tensor | None = None
    predicted: Tensor | None = None
    confidence: Tensor | None = None
    losses: Tensor | None = None

    @cached_property
    def wrong(self) -> Tensor | None:
        """Which rows are predicted wrongly [n]; None for a task without classes."""
        if self.labels is None or self.predicted is None or self.labels.is_floating_point():
            return None
        return self.labels != self.predicted


@dataclass(frozen=True, eq=False)
class Content:
    """What the pages are made of.

    Args:
        title: The name of the study.
        names: A name per class, no two alike; None for a task without classes.
        train: The training rows.
        test: The test rows.
        checkpoints: ``{name, step, learning_rate}`` of each.
        audit: The audit of the training rows.
        trust: The page of that name.
        faces: What the rows look like.
    """

    title: str
    names: tuple[str, ...] | None
    train: Side
    test: Side
    checkpoints: tuple[Mapping[str, Any], ...]
    audit: Audit
    trust: Mapping[str, Any]
    faces: Faces

    def side(self, name: str) -> Side:
        """The rows of a side.

        Args:
            name: ``"train"`` or ``"test"``.

        Returns:
            They.

        Raises:
            OptionError: There is no such side.
        """
        if name not in {"train", "test"}:
            raise OptionError(f"there is no side {name!r}: choose train or test.")
        return self.train if name == "train" else self.test

    def label_text(self, label: Any) -> str | None:
        """A class by its name, a target as a number in words; None where there is none."""
        if label is None:
            return None
        if self.names is not None and float(label).is_integer() and 0 <= int(label) < len(self.names):
            return self.names[int(label)]
        return f"{label:.4g}" if isinstance(label, float) else str(label)

    def face(self, side: str, row: int) -> dict[str, Any]:
        """What is shown of a row, as the page reads it."""
        return _face(self.faces.of(side, row), side, row)

    def card(self, side: str, row: int, score: float | None = None) -> dict[str, Any]:
        """A row as a card.

        Args:
            side: ``"train"`` or ``"test"``.
            row: Its position.
            score: What it counts towards the row that the card stands beside.

        Returns:
            ``{side, row, face, label, predicted, score, confidence}``.
        """
        known = self.side(side)
        return {
            "side": side,
            "row": row,
            "face": self.face(side, row),
            "label": self.label_text(_at(known.labels, row)),
            "predicted": self.label_text(_at(known.predicted, row)),
            "score": number(score),
            "confidence": number(_at(known.confidence, row)),
        }


def exports_of(audit: Audit) -> list[str]:
    """The formats that an audit can be written in here: some need classes, and Parquet needs pyarrow."""
    classes = audit.classes is not None and audit.given_labels is not None
    able = {
        "csv": True,
        "parquet": find_spec("pyarrow") is not None,
        "json": True,
        "cleanlab": classes and audit.predicted_labels is not None,
        "label-studio": classes and audit.suggested_labels is not None,
    }
    return [name for name, good in able.items() if good]


def _target(suggested: Any) -> float | None:
    """The suggested target as it is, where ``suggested`` has it in four digits."""
    return None if suggested is None or not math.isfinite(suggested) else float(suggested)


def _at(values: Tensor | None, row: int) -> Any:
    return None if values is None else values[row].item()


def _face(face: Face, side: str, row: int | str) -> dict[str, Any]:
    return face.told(f"face/{side}/{row}.png?v={face.tag}", f"{_ALTS[side]} {row}")


@runtime_checkable
class Answers(Protocol):
    """Who explains rows: a live study computes, a kept folder looks up."""

    @property
    def live(self) -> bool:
        """Whether anything new can be explained."""
        ...

    @property
    def upload(self) -> str | None:
        """What can be uploaded: ``image``, ``text``, ``table`` or nothing."""
        ...

    @property
    def why_no_upload(self) -> str:
        """Why nothing can, in a sentence."""
        ...

    def explain(self, side: str, row: int | str, target: str) -> Future[dict[str, Any]]:
        """``{query, targets}`` with lists of up to ``LISTED`` rows."""
        ...

    def take(self, kind: str, body: bytes) -> Future[str]:
        """The name of an uploaded row, to explain it by."""
        ...

    def uploaded(self, name: str) -> Face | None:
        """The face of an upload that is still held."""
        ...

    def close(self) -> None:
        """End what is being computed."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Everything that the pages read.

    Args:
        content: The rows, the audit, the study.
        answers: Who explains.
    """

    content: Content
    answers: Answers
    _suspects: dict[int, dict[str, Any]] = field(default_factory=dict)

    def study(self) -> dict[str, Any]:
        """``GET /api/study``."""
        content, answers = self.content, self.answers
        told = {
            "title": content.title,
            "classes": None if content.names is None else list(content.names),
            "train": content.train.rows,
            "test": content.test.rows,
            "live": answers.live,
            "upload": answers.upload,
            "checkpoints": [dict(checkpoint) for checkpoint in content.checkpoints],
            "version": __version__,
            "labels": content.audit.given_labels is not None,
            "exports": exports_of(content.audit),
        }
        return told if answers.upload is not None else {**told, "why_no_upload": answers.why_no_upload}

    def tests(self, asked: TestFilter) -> dict[str, Any]:
        """``GET /api/test``: the test rows that pass a filter, in an order, a page of them."""
        rows = self._chosen(asked)
        page = rows[asked.offset : asked.offset + asked.limit]
        return {"total": len(rows), "items": [self.test(row) for row in page]}

    def test(self, row: int) -> dict[str, Any]:
        """One test row of the list.

        Args:
            row: Its position.

        Returns:
            Its card, with its loss and whether it is predicted rightly.
        """
        known = self.content.test
        wrong = _at(known.wrong, row)
        return {
            **self.content.card("test", row),
            "loss": number(_at(known.losses, row)),
            "correct": None if wrong is None else not wrong,
        }

    def _chosen(self, asked: TestFilter) -> list[int]:
        known, content = self.content.test, self.content
        good = torch.ones(known.rows, dtype=torch.bool)
        if asked.show != "all" and known.wrong is not None:
            good &= known.wrong if asked.show == "wrong" else ~known.wrong
        for name, values in (("label", known.labels), ("predicted", known.predicted)):
            wanted = getattr(asked, name)
            if wanted is not None:
                good &= _is_class(content, values, wanted, known.rows)
        if known.confidence is not None:
            good &= (known.confidence >= asked.least) & (known.confidence <= asked.most)
        order = torch.arange(known.rows)
        by = {"confidence": known.confidence, "loss": known.losses}.get(asked.order)
        if by is not None:
            order = torch.argsort(by, descending=asked.down, stable=True)
        elif asked.down:
            order = order.flip(0)
        rows = order[good[order]].tolist()
        return [row for row in rows if self._matches(row, asked.search)] if asked.search else rows

    def _matches(self, row: int, search: str) -> bool:
        """A row by its number, the names of its classes, or its words."""
        texts = self._texts
        return all(word in texts[row] for word in search.casefold().split())

    @cached_property
    def _texts(self) -> list[str]:
        """What a search of the test rows looks through; pictures have no words, and are not made for it."""
        content, known = self.content, self.content.test
        pictures = known.rows == 0 or content.faces.of("test", 0).kind == "image"
        return [
            " ".join(
                (
                    str(row),
                    content.label_text(_at(known.labels, row)) or "",
                    content.label_text(_at(known.predicted, row)) or "",
                    "" if pictures else content.faces.of("test", row).words,
                )
            ).casefold()
            for row in range(known.rows)
        ]

    def suspects(self, asked: SuspectFilter, decided: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """``GET /api/suspects``: rows by suspicion, with evidence and decisions.

        Args:
            asked: Which rows.
            decided: The decision of each row that has one.

        Returns:
            ``{total, items, progress}``.
        """
        content, audit = self.content, self.content.audit
        good = audit.is_issue.clone() if asked.show == "flagged" else torch.ones(len(audit), dtype=torch.bool)
        if asked.show in {"decided", "undecided"}:
            mask = torch.zeros(len(audit), dtype=torch.bool)
            mask[torch.tensor(sorted(decided), dtype=torch.int64)] = True
            good &= mask if asked.show == "decided" else (audit.is_issue & ~mask)
        for wanted, values in ((asked.given, audit.given_labels), (asked.suggested, audit.suggested_labels)):
            if wanted is not None:
                good &= _is_class(content, values, wanted, len(audit))
        order = audit.order
        rows = order[good[order]].tolist()
        page = rows[asked.offset : asked.offset + asked.limit]
        return {
            "total": len(rows),
            "items": [self.suspect(row, decided.get(row)) for row in page],
            "progress": self.progress(decided),
        }

    def progress(self, decided: Mapping[int, Mapping[str, Any]]) -> dict[str, int]:
        """How far the decisions are."""
        flagged = self.content.audit.is_issue
        actions = [decision["action"] for decision in decided.values()]
        return {
            "decided": len(actions),
            "flagged": int(flagged.sum()),
            "settled": int(flagged[list(decided)].sum()),
            "kept": actions.count("keep"),
            "relabelled": actions.count("relabel"),
            "removed": actions.count("remove"),
        }

    def suspect(self, row: int, decision: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One row of the audit."""
        held = self._suspects.get(row)
        if held is None:
            if len(self._suspects) >= HELD_SUSPECTS:
                self._suspects.clear()
            held = self._suspects[row] = self._undecided(row)
        return {**held, "decision": None if decision is None else dict(decision)}

    def _undecided(self, row: int) -> dict[str, Any]:
        content, audit = self.content, self.content.audit
        return {
            "row": row,
            "rank": int(audit.rank[row]),
            "given": content.label_text(_at(audit.given_labels, row)),
            "suggested": content.label_text(_at(audit.suggested_labels, row)),
            "target": None if content.names is not None else _target(_at(audit.suggested_labels, row)),
            "score": number(float(audit.score[row])),
            "flagged": bool(audit.is_issue[row]),
            "signals": {name: number(float(values[row])) for name, values in audit.signals.items()},
            "face": content.face("train", row),
            "evidence": self._evidence(row),
        }

    def _evidence(self, row: int) -> dict[str, Any]:
        content, audit = self.content, self.content.audit
        found = None if audit.evidence is None else audit.evidence.of(row)
        proponents, opponents = ((), ()) if found is None else found
        twins = () if audit.duplicates is None else audit.duplicates.of(row)
        return {
            "proponents": [content.card("train", other, score) for other, score in proponents],
            "opponents": [content.card("train", other, score) for other, score in opponents],
            "duplicates": [content.card("train", other) for other in twins],
            "looked": found is not None,
        }

    def trust(self) -> dict[str, Any]:
        """``GET /api/trust``."""
        return dict(self.content.trust)

    def face(self, side: str, row: str) -> Face | None:
        """The face of a row by the words of its address; None where there is none."""
        if side == "upload":
            return self.answers.uploaded(row)
        if side not in {"train", "test"} or not (row.isascii() and row.isdigit() and len(row) < 16):
            return None
        position = int(row)
        return self.content.faces.of(side, position) if position < self.content.side(side).rows else None


def _is_class(content: Content, values: Tensor | None, wanted: str, rows: int) -> Tensor:
    if values is None or content.names is None:
        return torch.zeros(rows, dtype=torch.bool)
    if wanted not in content.names:
        raise OptionError(f"{wanted!r} is no class. Choose one of {', '.join(content.names[:20])}.")
    return values == content.names.index(wanted)
