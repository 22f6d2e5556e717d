"""``find_label_issues``: one call, one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tracin.audit.evidence import agreement_of, evidence_of, opposition_of
from tracin.audit.labels import labels_of
from tracin.audit.names import problem_of
from tracin.audit.neighbours import duplicates_of
from tracin.audit.parts import Calibration, Cutoff, Duplicates, ranks_of, require_calibration
from tracin.audit.result import Audit
from tracin.audit.score import flagged_by_doubt, flagged_by_size, score_of, suspicions_of
from tracin.audit.signals import Seen, features_of, has_head, see, targets_of
from tracin.data import open_rows
from tracin.errors import DataError, OptionError
from tracin.index.index import Index
from tracin.methods import TracInCP
from tracin.methods.altering import altered
from tracin.options import whole_number
from tracin.results import SelfInfluence

__all__ = ["DUPLICATES", "MOST_ROWS", "SUSPECTS", "find_label_issues"]

SUSPECTS = 100
"""How many rows get evidence at least."""

DUPLICATES = 0.999
"""The cosine from which on two rows are near-duplicates."""

MOST_ROWS = 50_000
"""The most rows among which duplicates are sought unless a threshold is given: every row is compared with every other."""

EvidenceRows = Literal["suspects", "all"] | int


def find_label_issues(
    method: TracInCP | Index,
    train: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    validation: Any = None,
    evidence: int = 5,
    evidence_rows: EvidenceRows = "suspects",
    neighbours: bool = True,
    duplicates: bool | float = True,
    calibration: Calibration | None = None,
    self_influence: SelfInfluence | None = None,
    progress: bool | None = None,
) -> Audit:
    r"""Rank the training rows by how suspect their labels are, with the reasons.

    Costs a forward pass at each checkpoint for loss and margins, the self-influence of all rows, forward passes at three
    checkpoints for the neighbours, and ``top_k`` for the rows that get evidence. Nothing is trained. The score and the flag
    are told in ``tracin.audit.score``.

    Args:
        method: A ``TracInCP``, or an ``Index`` of the rows that was opened with its method.
        train: The training rows; an index that was opened with them brings them.
        class_names: The name of each class, for the table; a name that occurs twice gets the number of its class, such as
            ``"cat (0)"``.
        validation: Rows that training should have helped: adds ``opposes_validation``.
        evidence: How many proponents and opponents to list; 0 for none.
        evidence_rows: Which rows get them: ``"suspects"``: the flagged ones, at least the first 100 by score; ``"all"``; or
            the first so many by score.
        neighbours: Whether the labels of the most similar rows, as the last ``Linear`` sees them, count in the score.
        duplicates: Whether to look for near-duplicates with different labels; a number is the cosine from which on two
            rows are such.
        calibration: What ``calibrate`` measured: it sets the cut-off.
        self_influence: Where it is known already: that of the rows in their order.
        progress: Show how far the run is; as the method has it unless given.

    Returns:
        The audit.

    Raises:
        OptionError: An argument out of range or of another type; an index without method or rows; ``class_names`` of
            another length, or that are no texts; and what the verbs of the method refuse.
        DataError: Fewer than two rows, or labels outside the classes.

    Example:
        >>> import tracin
        >>> model = torch.nn.Linear(4, 3)
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
        >>> method = tracin.TracInCP(task, steps, progress=False)
        >>> rows = (torch.randn(12, 4), torch.arange(12) % 3)
        >>> audit = tracin.audit.find_label_issues(method, rows, class_names=["ant", "bee", "fly"])
        >>> audit.table[["given_label", "score", "aum"]].shape
        (12, 3)
    """
    if calibration is not None:
        require_calibration(calibration, "find_label_issues")
    problem = None if class_names is None else problem_of(class_names)
    if problem is not None:
        raise OptionError(f"find_label_issues: {problem}")
    asked = _Asked.of(method, train, progress)
    k = whole_number(evidence, "find_label_issues: evidence", 0)
    threshold = _threshold(duplicates, asked)
    own = asked.self_influence() if self_influence is None else _checked(self_influence, asked)
    headed = (
        neighbours and asked.method.task.outputs is not None and has_head(asked.method) and asked.rows > 1
    )
    seen = see(asked.method, asked.train, headed)
    judged = _judged(asked, seen, own)
    _check_names(class_names, seen)
    signals = judged.signals
    if validation is not None:
        signals["opposes_validation"] = opposition_of(asked.method, asked.index, asked.train, validation)
    found = None
    chosen = _chosen(judged, k, evidence_rows)
    if chosen:
        given = evidence_of(asked.method, asked.index, asked.train, chosen, k)
        found = given.evidence
        if seen.labels is not None:
            signals["proponent_agreement"] = torch.full((asked.rows,), torch.nan, dtype=torch.float64)
            signals["proponent_agreement"][found.rows] = agreement_of(given, seen.labels)
    audit = Audit(
        score=judged.score,
        is_issue=judged.flagged,
        signals=signals,
        cutoff=judged.cutoff,
        given_labels=judged.given,
        suggested_labels=judged.suggested,
        predicted_labels=seen.predicted,
        labels=labels_of(asked.method, asked.train, judged.given, seen.classes),
        classes=seen.classes,
        class_names=class_names,
        evidence=found,
        duplicates=_duplicates(asked, seen, threshold),
        notes=_notes(asked, seen, judged, headed=headed, wanted=neighbours, duplicates=duplicates),
        provenance={
            **own.provenance,
            "verb": "find_label_issues",
            "self_influence": own.provenance.get("method"),
        },
    )
    return audit if calibration is None else audit.calibrated(calibration)


@dataclass(frozen=True, eq=False)
class _Asked:
    """The method with its rows, and the index where there is one."""

    method: TracInCP
    train: Any
    index: Index | None
    rows: int

    @classmethod
    def of(cls, method: Any, train: Any, progress: bool | None) -> _Asked:
        index = method if isinstance(method, Index) else None
        if index is not None:
            method, train = index.method, index.train if train is None else train
            if method is None or train is None:
                raise OptionError(
                    "find_label_issues: the index was opened without its method or its rows. Use Index.open(folder, method, "
                    "train)."
                )
        if not isinstance(method, TracInCP):
            raise OptionError(
                f"find_label_issues: method is a {type(method).__name__}. Give tracin.TracInCP(task, trajectory), or a "
                "tracin.Index."
            )
        if train is None:
            raise OptionError("find_label_issues needs the training rows: find_label_issues(method, train).")
        if progress is not None:
            method = altered(method, progress=progress)
            index = None if index is None else index.asking(method, train)
        settings = method.settings
        n = len(open_rows(train, name="train", batch_size=settings.batch_size, collate=settings.collate))
        if n < 2:
            raise DataError(
                "train has one row: an audit compares rows with each other, and needs two or more."
            )
        if index is not None and len(index) != n:
            raise OptionError(f"find_label_issues: the index has {len(index)} rows, and train {n}.")
        if index is not None:
            index.check_rows(train)
        return cls(method, train, index, n)

    def self_influence(self) -> SelfInfluence:
        plain = altered(self.method, normalize=False)
        if self.index is None:
            return plain.self_influence(self.train)
        return self.index.asking(plain).self_influence()


def _checked(own: Any, asked: _Asked) -> SelfInfluence:
    if not isinstance(own, SelfInfluence):
        raise OptionError(
            f"find_label_issues: self_influence is a {type(own).__name__}. Give what method.self_influence(train) returned."
        )
    if own.train_ids.tolist() != list(range(asked.rows)):
        raise OptionError(
            f"find_label_issues: self_influence is of {len(own.values)} rows, and not of all {asked.rows} in their order."
        )
    return own


@dataclass(frozen=True, eq=False)
class _Judged:
    """The score with its parts."""

    signals: dict[str, Tensor]
    score: Tensor
    flagged: Tensor
    cutoff: Cutoff
    given: Tensor | None
    suggested: Tensor | None


def _judged(asked: _Asked, seen: Seen, own: SelfInfluence) -> _Judged:
    signals: dict[str, Tensor] = {
        "self_influence": own.values.double(),
        "loss": seen.loss,
        "mean_loss": seen.mean_loss,
    }
    if seen.doubt is not None:
        for name in ("margin", "aum", "neighbour_agreement", "doubt"):
            values = getattr(seen, name)
            if values is not None:
                signals[name] = values
        flagged, cutoff = flagged_by_doubt(seen.doubt, seen.neighbour_agreement is not None)
        score = score_of(suspicions_of(seen), flagged)
        return _Judged(signals, score, flagged, cutoff, seen.labels, seen.suggested)
    pair = targets_of(asked.method, asked.train)
    if pair is None:
        flagged, cutoff = flagged_by_size(seen.mean_loss, "mean losses")
        return _Judged(signals, score_of(suspicions_of(seen), flagged), flagged, cutoff, None, None)
    targets, predicted = pair
    signals["residual"] = targets - predicted
    flagged, cutoff = flagged_by_size(signals["residual"].abs(), "residuals without sign")
    score = score_of({"residual": signals["residual"].abs()}, flagged)
    return _Judged(signals, score, flagged, cutoff, targets, predicted)


def _chosen(judged: _Judged, k: int, wanted: Any) -> list[int]:
    """The rows that get evidence, ascending."""
    if wanted == "suspects":
        count = max(SUSPECTS, int(judged.flagged.sum()))
    elif wanted == "all":
        count = len(judged.score)
    else:
        count = whole_number(wanted, "find_label_issues: evidence_rows", 0, why=", 'suspects' or 'all'")
    if k == 0:
        return []
    return (ranks_of(judged.score) <= count).nonzero().flatten().tolist()


def _threshold(duplicates: Any, asked: _Asked) -> float | None:
    """The cosine of duplicates; None: they are not sought."""
    if isinstance(duplicates, bool):
        return DUPLICATES if duplicates and asked.rows <= MOST_ROWS else None
    if not isinstance(duplicates, float | int) or not 0.0 < duplicates <= 1.0:
        raise OptionError(
            f"find_label_issues: duplicates is {duplicates!r}. Give True, False or a cosine from 0 to 1."
        )
    return float(duplicates)


def _duplicates(asked: _Asked, seen: Seen, threshold: float | None) -> Duplicates | None:
    if threshold is None or seen.labels is None or not has_head(asked.method):
        return None
    (features,), labels = features_of(asked.method, asked.train, [len(asked.method.trajectory) - 1])
    return duplicates_of(features, labels, threshold)


def _check_names(names: Sequence[str] | None, seen: Seen) -> None:
    if names is not None and len(names) != seen.classes:
        there = "no classes" if seen.classes is None else f"{seen.classes} classes"
        raise OptionError(
            f"find_label_issues: class_names has {len(names)} names, and the task has {there}. Give a name for each class."
        )


def _notes(
    asked: _Asked, seen: Seen, judged: _Judged, *, headed: bool, wanted: bool, duplicates: Any
) -> tuple[str, ...]:
    told = []
    if len(asked.method.trajectory) == 1:
        told.append(
            "one checkpoint: loss, margin and self-influence are those of one moment, and a model at the end of its training "
            "may have learnt wrong labels by heart. Checkpoints from along the training find more."
        )
    if asked.index is not None:
        told.append(
            "proponents, opponents and their agreement come from an index of projected gradients: they are estimates. "
            "Self-influence is exact."
        )
    if asked.method.settings.projection is not None and asked.index is None:
        told.append(
            "proponents, opponents and self-influence come from projected gradients: they are estimates."
        )
    if seen.classes is None:
        told.append(
            "the task has no classes: the score is that of residuals."
            if judged.given is not None
            else "the task has no classes, and its targets are not known: the score is that of mean losses, and no target is "
            "suggested. losses.mean_squared_error tells targets, and Task(outputs=...) classes."
        )
    elif wanted and not headed:
        told.append("the model has no Linear layer: neighbours and near-duplicates were not looked for.")
    if duplicates is True and asked.rows > MOST_ROWS:
        told.append(
            f"near-duplicates were not looked for among {asked.rows:,} rows: give duplicates={DUPLICATES} to do so; every row "
            "is compared with every other."
        )
    return tuple(told)
