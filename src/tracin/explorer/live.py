"""A study whose predictions are explained as they are asked for."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from tracin.audit import Audit, Calibration, calibrate, find_label_issues
from tracin.audit.names import unique_names
from tracin.audit.signals import targets_of
from tracin.checkpoints import Trajectory
from tracin.data import open_rows, rows_of
from tracin.errors import OptionError
from tracin.explain import evaluate_rows
from tracin.explorer.explaining import checkpoints_of, explained, quiet, told
from tracin.explorer.faces import Face, LiveFaces
from tracin.explorer.pages import Content, Side, Source
from tracin.explorer.trusting import trust_of
from tracin.explorer.uploads import Reading, reading_of
from tracin.explorer.working import Worker
from tracin.methods import TracInCP
from tracin.scoring.evaluation import evaluate
from tracin.study import Study

__all__ = ["Clock", "LiveAnswers", "live_source", "side_of"]

HELD_UPLOADS = 32


@dataclass(frozen=True)
class Clock:
    """The seconds of the stages of the preparation, told as they begin."""

    tell: Callable[[str], None] = field(default=lambda _: None)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage.

        Args:
            name: What is done in it.

        Yields:
            Nothing.
        """
        self.tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def side_of(method: TracInCP, data: Any, name: Literal["train", "queries"]) -> Side:
    """Labels, predictions and losses of all rows: of classes at the last checkpoint, of targets the mean prediction.

    Args:
        method: Task, trajectory and settings.
        data: The rows.
        name: Which loss.

    Returns:
        What is known of them.
    """
    settings = method.settings
    found = evaluate(
        method.task,
        Trajectory([method.trajectory[-1]]),
        data,
        name=name,
        batch_size=settings.batch_size,
        collate=settings.collate,
        device=settings.device,
    )
    n = found.losses.shape[1]
    if found.logits is None:
        pair = targets_of(method, data)
        labels, predicted = (None, None) if pair is None else pair
        return Side(n, labels, predicted, losses=found.losses[0].double())
    likely = found.logits[0].double().softmax(1)
    confidence, predicted = likely.max(1)
    return Side(n, found.labels, predicted, confidence.clamp(max=1.0), found.losses[0].double())


def live_source(
    study: Study,
    method: TracInCP,
    *,
    title: str,
    audit: Audit | None = None,
    evidence: int = 5,
    calibrated: bool | Calibration = False,
    precision: float = 0.9,
    checked_rows: int = 8,
    clock: Clock | None = None,
) -> Source:
    """Prepare a study: predict all rows once, audit the training rows, check the gradients.

    Args:
        study: The study.
        method: How it is traced.
        title: What to call it.
        audit: Of the training rows, where it was made before; made here otherwise.
        evidence: Proponents and opponents of each suspect.
        calibrated: Whether to plant wrong labels and train anew by ``study.fit``, for the cut-off; or what that found.
        precision: With ``calibrated``: the share of flagged rows that is to be wrong.
        checked_rows: Rows compared with autograd.
        clock: What measures and tells the stages.

    Returns:
        The source of the pages.
    """
    clock = Clock() if clock is None else clock
    _check_rows(study, method)
    with clock.stage("predictions"):
        train, test = side_of(method, study.train, "train"), side_of(method, study.test, "queries")
    if audit is None:
        with clock.stage("audit"):
            audit = find_label_issues(method, study.train, class_names=study.class_names, evidence=evidence)
    if calibrated is not False:
        with clock.stage("calibration"):
            found = calibrate(study, precision=precision, method=method) if calibrated is True else calibrated
            audit = audit.calibrated(found)
    with clock.stage("check against autograd"):
        verification = method.verify(study.train, rows=checked_rows)
    with clock.stage("plan"):
        plan = method.plan(study.train, rows_of(study.test, [0]))
    content = Content(
        title=title,
        names=_names(study, audit),
        train=train,
        test=test,
        checkpoints=checkpoints_of(method.trajectory),
        audit=audit,
        trust=trust_of(audit, verification, clock.seconds, plan),
        faces=LiveFaces(study),
    )
    return Source(content, LiveAnswers(study, method, content))


def _check_rows(study: Study, method: TracInCP) -> None:
    """Refuse test rows that are none, by the name that the study gives them."""
    settings = method.settings
    rows = open_rows(study.test, name="test", batch_size=settings.batch_size, collate=settings.collate)
    rows.close()


def _names(study: Study, audit: Audit) -> tuple[str, ...] | None:
    if audit.classes is None:
        return None
    return unique_names([study.class_name(number) for number in range(audit.classes)])


class LiveAnswers:
    """Explains the rows of a study, and uploads.

    Args:
        study: The study.
        method: How it is traced.
        content: What is known of its rows.
    """

    live = True

    def __init__(self, study: Study, method: TracInCP, content: Content) -> None:
        self._study, self._method, self._content = study, quiet(method), content
        self._worker = Worker()
        self._uploads: OrderedDict[str, tuple[Any, Face]] = OrderedDict()
        self._lock = threading.Lock()
        found = reading_of(study, content)
        self._reading: Reading | None = found if isinstance(found, Reading) else None
        self.upload: str | None = None if self._reading is None else self._reading.kind
        self.why_no_upload = "" if isinstance(found, Reading) else found

    def explain(self, side: str, row: int | str, target: str) -> Future[dict[str, Any]]:
        """See ``Answers``.

        Args:
            side: ``train``, ``test`` or ``upload``.
            row: A position, or the name of an upload.
            target: ``predicted``, ``label`` or a class by name.

        Returns:
            The explanation.

        Raises:
            OptionError: There is no such row, or the upload is no longer held.
        """
        if side == "upload":
            with self._lock:
                held = self._uploads.get(str(row))
            if held is None:
                raise OptionError(
                    f"there is no upload {str(row)[:40]}: only the last {HELD_UPLOADS} are held. Send it again."
                )
            return self._worker.ask((side, row), lambda: self._explained_upload(str(row), *held))
        n = self._content.side(side).rows
        if not isinstance(row, int) or not 0 <= row < n:
            raise OptionError(f"{side} row {row} does not exist: the {n:,} rows count from 0 to {n - 1:,}.")
        position = row
        return self._worker.ask(
            (side, row, target), lambda: self._explained(side, [position], target)[position]
        )

    def explain_many(self, side: str, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The explanations of several rows in one pass, for their predicted classes.

        Args:
            side: ``train`` or ``test``.
            rows: Positions.

        Returns:
            ``{query, targets}`` by row.
        """
        if not rows:
            return {}
        return self._worker.ask(None, lambda: self._explained(side, rows, "predicted")).result()

    def _explained(self, side: str, rows: Sequence[int], target: str) -> dict[int, dict[str, Any]]:
        content = self._content
        queries = self._study.train if side == "train" else self._study.test
        found = explained(self._method, content, self._study.train, queries, rows, target=target, side=side)
        answers: dict[int, dict[str, Any]] = {}
        for each in found:
            row = each.query
            answer = answers.setdefault(row, {"query": content.card(side, row), "targets": []})
            without = row if side == "train" else None
            answer["targets"].append(told(content, each, self._card, without=without))
        return answers

    def _card(self, row: int, score: float) -> dict[str, Any]:
        return self._content.card("train", row, score)

    def _explained_upload(self, name: str, inputs: Any, face: Face) -> dict[str, Any]:
        """For the predicted class, which also stands in for the label that an upload has not."""
        assert self._reading is not None
        content, method = self._content, self._method
        last = method.trajectory[-1:]
        first = evaluate_rows(method, self._reading.rows(inputs, 0), [0], name="queries", trajectory=last)
        assert first.logits is not None
        confidence, predicted = first.logits[0, 0].double().softmax(0).max(0)
        said = int(predicted)
        rows = self._reading.rows(inputs, said)
        found = explained(method, content, self._study.train, rows, [0], target="predicted", side="upload")
        return {
            "query": {
                "side": "upload",
                "row": name,
                "face": face.told(f"face/upload/{name}.png", "the uploaded picture"),
                "label": None,
                "predicted": content.label_text(said),
                "score": None,
                "confidence": min(1.0, float(confidence)),
            },
            "targets": [told(content, each, self._card) for each in found if each.target.kind == "predicted"],
        }

    def take(self, kind: str, body: bytes) -> Future[str]:
        """See ``Answers``; what is sent is read in the thread that computes.

        Args:
            kind: ``image``, ``text`` or ``table``.
            body: The file.

        Returns:
            The name of the upload.

        Raises:
            OptionError: The study takes no uploads, or of another kind.
        """
        if self._reading is None:
            raise OptionError(f"this study takes no uploads: {self.why_no_upload}")
        if kind != self._reading.kind:
            raise OptionError(f"this study takes uploads of the kind {self._reading.kind}, not {kind}.")
        reading = self._reading
        return self._worker.ask(None, lambda: self._taken(reading, body))

    def _taken(self, reading: Reading, body: bytes) -> str:
        inputs, face = reading.read(body)
        name = secrets.token_hex(8)
        with self._lock:
            self._uploads[name] = (inputs, face)
            while len(self._uploads) > HELD_UPLOADS:
                self._uploads.popitem(last=False)
        return name

    def uploaded(self, name: str) -> Face | None:
        """See ``Answers``."""
        with self._lock:
            held = self._uploads.get(name)
        return None if held is None else held[1]

    def close(self) -> None:
        """See ``Answers``."""
        self._worker.close()
