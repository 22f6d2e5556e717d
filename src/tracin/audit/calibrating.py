"""What the score is worth: plant wrong labels, train anew, and see how many of the flagged rows were planted."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tracin.audit.parts import FLAGGED, Calibration
from tracin.audit.relabelling import with_labels
from tracin.audit.score import flagged_by_doubt, score_of, suspicions_of
from tracin.audit.signals import has_head, see
from tracin.checkpoints import Trajectory
from tracin.data import user_code
from tracin.errors import OptionError
from tracin.evaluation import plant_flips
from tracin.explain import lesson_of
from tracin.methods import TracInCP
from tracin.shapes import Bool, Float
from tracin.study import Study

__all__ = ["calibrate", "curve"]

ENOUGH = 0.5
"""The share of planted rows that a threshold must find to tell how many labels are wrong."""

POINTS = 200
"""The most thresholds of a curve."""

FEW = 10
"""A threshold that flags fewer rows is left out: a row more or less would change its precision by a tenth and more."""


def calibrate(
    study: Study,
    *,
    precision: float = 0.9,
    fraction: float = 0.1,
    seeds: Sequence[int] = (0,),
    method: TracInCP | None = None,
    neighbours: bool = True,
) -> Calibration:
    """Estimate how many of the flagged labels are wrong, from labels that are made wrong on purpose.

    For each seed: gives a share of the training rows another class, trains by ``study.fit`` in a folder that is removed
    afterwards, and scores all rows. ``Calibration`` says how the precision follows.

    Args:
        study: With ``fit``, which must train a model of its own; training rows with class numbers.
        precision: The share of wrong labels among the flagged ones that the cut-off is to reach.
        fraction: The share of labels to make wrong.
        seeds: One training for each; also seeds of the flips.
        method: Whose settings to score with; those of ``TracInCP`` unless given.
        neighbours: As for ``find_label_issues``.

    Returns:
        The calibration, for ``find_label_issues(..., calibration=...)`` or ``Audit.calibrated``.

    Raises:
        OptionError: The study has no ``fit``, or no classes; ``precision`` or ``fraction`` outside (0, 1); no seed.
    """
    if not isinstance(study, Study):
        raise OptionError(f"calibrate: study is a {type(study).__name__}. Give a tracin.Study with fit.")
    if study.fit is None:
        raise OptionError("calibrate trains anew: give Study(fit=lambda train, folder, seed: trajectory).")
    if not 0.0 < precision < 1.0:
        raise OptionError(f"calibrate: precision is {precision}: give a share between 0 and 1.")
    if not seeds:
        raise OptionError("calibrate: seeds is empty: give at least one, such as (0,).")
    asked = TracInCP(study.task, study.trajectory) if method is None else method
    labels = lesson_of(_along(asked, asked.trajectory[-1:]), study.train).labels
    if labels is None:
        raise OptionError(
            "calibrate plants wrong classes, and the task has none: give Task(outputs=...), or use a ready-made "
            "classification loss."
        )
    scores, masks = [], []
    for seed in seeds:
        flips = plant_flips(labels, fraction, seed=int(seed))
        scores.append(_scores(study, asked, flips.labels, int(seed), neighbours))
        masks.append(flips.mask)
    return curve(
        torch.cat(scores),
        torch.cat(masks),
        fraction=fraction,
        rows=len(labels),
        seeds=tuple(int(seed) for seed in seeds),
        wanted=precision,
    )


def _along(method: TracInCP, trajectory: Trajectory) -> TracInCP:
    """The same method along other checkpoints; it was warned of their optimizer before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TracInCP(method.task, trajectory, **vars(method.settings))


def _scores(study: Study, method: TracInCP, labels: Tensor, seed: int, neighbours: bool) -> Tensor:
    """The scores of all rows after training on these labels."""
    train = with_labels(study.train, labels)
    assert study.fit is not None
    with tempfile.TemporaryDirectory(prefix="tracin-calibrate-") as folder:
        with user_code("fit", range(len(labels)), "the calibration"):
            trajectory = study.fit(train, Path(folder) / "checkpoints", seed)
        if not isinstance(trajectory, Trajectory):
            raise OptionError(
                f"fit returned a {type(trajectory).__name__}. Return a tracin.Trajectory, such as recorder.trajectory()."
            )
        again = _along(method, trajectory)
        seen = see(again, train, neighbours and has_head(again))
    assert seen.doubt is not None
    flagged, _ = flagged_by_doubt(seen.doubt, neighbours)
    return score_of(suspicions_of(seen), flagged)


def curve(
    scores: Float[Tensor, " n"],
    planted: Bool[Tensor, " n"],
    *,
    fraction: float,
    rows: int,
    seeds: tuple[int, ...],
    wanted: float,
    fewest: int = FEW,
) -> Calibration:
    """Precision and share found by threshold, as ``Calibration`` has them.

    Args:
        scores: The scores of all rows of all trainings.
        planted: Which of them were made wrong.
        fraction: The share made wrong.
        rows: The rows of one training.
        seeds: The seeds.
        wanted: The precision that the cut-off is to reach.
        fewest: Thresholds that flag fewer rows, of all trainings together, are left out, but for the lowest one from
            ``FLAGGED`` on and the lowest of all.

    Returns:
        The calibration; thresholds are scores that occur, at most 200 of them, the denser the higher.

    Example:
        >>> scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2], dtype=torch.float64)
        >>> planted = torch.tensor([True, True, False, False, False])
        >>> found = curve(scores, planted, fraction=0.4, rows=5, seeds=(0,), wanted=0.9, fewest=1)
        >>> found.found, found.wrong, found.planted_precision[:3]
        ((0.5, 1.0, 1.0, 1.0, 1.0), 0.0, (1.0, 1.0, 0.6666666666666666))
    """
    order = torch.argsort(scores, descending=True, stable=True)
    values, hits = scores[order], planted[order].double().cumsum(0)
    # Rows of equal score are flagged together.
    ends = torch.cat([(values[1:] != values[:-1]).nonzero().flatten(), torch.tensor([len(values) - 1])])
    hits, counts = hits[ends], (ends + 1).double()
    found, flagged = hits / hits[-1], (counts - hits) / (len(values) - hits[-1])
    enough = (found >= ENOUGH) & (hits >= min(10.0, float(hits[-1])))
    wrong = float((flagged / found)[enough].min())
    likely = torch.where(flagged > 0, wrong * found / flagged.clamp_min(1e-300), 0.0 if wrong == 0 else 1.0)
    chosen = _told(values[ends], counts, fewest)
    return Calibration(
        thresholds=tuple(values[ends[chosen]].tolist()),
        precision=tuple(likely[chosen].clamp(max=1.0).tolist()),
        found=tuple(found[chosen].tolist()),
        flagged=tuple(flagged[chosen].tolist()),
        planted_precision=tuple((hits / counts)[chosen].tolist()),
        wrong=wrong,
        fraction=fraction,
        rows=rows,
        seeds=seeds,
        wanted=wanted,
    )


def _told(thresholds: Tensor, counts: Tensor, fewest: int) -> Tensor:
    """The places in the curve that are reported."""
    told = counts >= fewest
    told[-1] = True
    flagging = (thresholds >= FLAGGED).nonzero().flatten()
    if len(flagging):
        told[flagging[-1]] = True  # the rule's own cut-off, so that a calibrated one never lies below it
    places = told.nonzero().flatten()
    if len(places) <= POINTS:
        return places
    spread = torch.linspace(0, 1, POINTS, dtype=torch.float64).square() * (len(places) - 1)
    return torch.cat([places[spread.round().long()], flagging[-1:]]).unique()
