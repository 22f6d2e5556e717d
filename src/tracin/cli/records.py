"""Results as rows of a table: the files under ``--out`` hold these, and the terminal shows a part of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tracin.cli.cards import Known, known
from tracin.explain import Attribution, Lesson
from tracin.methods import TracInCP
from tracin.plots import Explanation
from tracin.results import SelfInfluence
from tracin.scoring.plan import Plan
from tracin.scoring.verification import Verification
from tracin.study import Study

__all__ = [
    "contribution_records",
    "influence_records",
    "parameter_records",
    "route_records",
    "suspect_records",
]

Record = dict[str, Any]


def _classes(study: Study, fact: Known) -> Record:
    """Label and prediction as numbers, and as names where the classes have some."""
    if fact.label is None or fact.predicted is None:
        return {}
    record: Record = {"label": fact.label, "predicted": fact.predicted}
    if study.class_names is not None:
        record["label_name"] = study.class_name(fact.label)
        record["predicted_name"] = study.class_name(fact.predicted)
    return record


def suspect_records(
    study: Study, own: SelfInfluence, lesson: Lesson, planted: Tensor | None = None
) -> list[Record]:
    """All training rows, the most self-influential first.

    Args:
        study: The study.
        own: Self-influence of every training row.
        lesson: Losses along the trajectory, predictions of the last checkpoint.
        planted: Which labels were planted [n], where that is known.

    Returns:
        One record per row.
    """
    order = own.ranking().tolist()
    facts = known(range(len(order)), lesson.labels, lesson.predicted)
    last, mean, scores = lesson.losses[-1].tolist(), lesson.losses.mean(0).tolist(), own.values.tolist()
    flags = {} if planted is None else {row: {"planted": flag} for row, flag in enumerate(planted.tolist())}
    return [
        {
            "rank": rank,
            "train": row,
            **_classes(study, facts[row]),
            "loss": last[row],
            "mean_loss": mean[row],
            "self_influence": scores[row],
            **flags.get(row, {}),
        }
        for rank, row in enumerate(order, start=1)
    ]


def influence_records(
    study: Study, attribution: Attribution, shown: Explanation, facts: dict[int, Known]
) -> list[Record]:
    """The proponents, then the opponents, of one target of one query."""
    target = attribution.target
    asked: Record = {"query": attribution.query, "target": target.kind}
    if target.number is not None:
        asked["target_class"] = target.number
    sides = (("proponent", shown.proponents), ("opponent", shown.opponents))
    return [
        {
            **asked,
            "sign": sign,
            "rank": rank,
            "train": card.row,
            "score": card.score,
            **_classes(study, facts[card.row or 0]),
        }
        for sign, cards in sides
        for rank, card in enumerate(cards, start=1)
    ]


def contribution_records(method: TracInCP, attribution: Attribution, shown: Explanation) -> list[Record]:
    """The loss at each checkpoint, and the scores of all training rows there."""
    assert shown.path is not None
    sums = zip(
        attribution.losses.tolist(), shown.path.lowered.tolist(), shown.path.raised.tolist(), strict=True
    )
    steps = method.trajectory.steps
    return [
        {
            "query": attribution.query,
            "target": attribution.target.kind,
            "checkpoint": checkpoint.name,
            "step": step,
            "loss": loss,
            "proponents": lowered,
            "opponents": raised,
            "sum": lowered + raised,
        }
        for checkpoint, step, (loss, lowered, raised) in zip(method.trajectory, steps, sums, strict=True)
    ]


def parameter_records(found: Verification) -> list[Record]:
    """Each parameter with its route and its largest error."""
    return [
        {
            "parameter": row.parameter,
            "shape": "×".join(map(str, row.shape)) or "scalar",
            "entries": row.entries,
            "traced": row.traced,
            "route": row.route,
            "error": found.errors.get(row.parameter),
            "reason": row.reason or None,
        }
        for row in found.coverage.table
    ]


def route_records(planned: Plan) -> list[Record]:
    """Each block of parameters with its route and the memory that a query takes."""
    return [
        {
            "parameters": ", ".join(route.parameters),
            "route": route.route,
            "queries_held": route.queries_held,
            "bytes_per_query": route.bytes_per_query,
            "reason": route.reason or None,
        }
        for route in planned.routes
    ]
