"""Results as lines and tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tracin.cli.printing import heading, number, say, table
from tracin.explain import Attribution, target_words
from tracin.plots import Card, Explanation
from tracin.plots.pictures import plain
from tracin.results import SelfInfluence
from tracin.scoring.verification import Verification
from tracin.study import Study

__all__ = ["as_text", "tell_attribution", "tell_coverage", "tell_suspects", "tell_verification"]

_LONGEST_TEXT = 400
_ROUTES_NOT_TRACED = ("frozen", "excluded", "unused")


def tell_coverage(own: SelfInfluence) -> None:
    """How many parameters a run traced, by which route."""
    routes = dict(own.provenance["coverage"])
    traced = sum(entries for route, entries in routes.items() if route not in _ROUTES_NOT_TRACED)
    told = ", ".join(f"{entries:,} {route}" for route, entries in routes.items())
    say(f"{traced:,} of {sum(routes.values()):,} parameters traced ({told}), checked against autograd.")


def tell_suspects(study: Study, records: Sequence[Mapping[str, Any]], top: int) -> None:
    """The first suspects, with what is shown of them where that is words."""
    heads = {
        "rank": "rank",
        "train": "row",
        "label": "label",
        "predicted": "predicted",
        "loss": "loss",
        "mean_loss": "mean loss",
        "self_influence": "self-influence",
        "planted": "planted",
        "shown": "shown",
    }
    rows = []
    for record in records[:top]:
        named = {
            **record,
            **{name: record.get(f"{name}_name", record.get(name)) for name in ("label", "predicted")},
        }
        if "planted" in record:
            named["planted"] = "yes" if record["planted"] else ""
        named["shown"] = as_text(Card(study.shown("train", record["train"])))
        rows.append({head: named.get(name) for name, head in heads.items()})
    heading(f"Suspects: the {len(rows)} most self-influential of {len(records):,} training rows")
    table(rows)


def tell_verification(found: Verification, records: Sequence[Mapping[str, Any]]) -> None:
    """The verdict and each parameter's route."""
    say(str(found))
    table([{**record, "traced": "yes" if record["traced"] else "no"} for record in records])


def tell_attribution(study: Study, attribution: Attribution, shown: Explanation, *, first: bool) -> None:
    """One target of a query: its loss, and the two lists."""
    query, target = shown.query, attribution.target
    wrong = attribution.label is not None and attribution.predicted != attribution.label
    if first:
        said = f"predicted {query.predicted}, label {query.label} ({'wrong' if wrong else 'right'})"
        heading(f"Test row {attribution.query}" + (f": {said}" if attribution.label is not None else ""))
        text = as_text(query)
        if text:
            say(text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…")
    losses = attribution.losses.tolist()
    along = f"from {number(losses[0])} to {number(losses[-1])} over {len(losses)} checkpoints"
    if not first:
        say()
    say(
        f"The loss of {target_words(target, study.class_name)}: "
        + (along if len(losses) > 1 else number(losses[0]))
    )
    paired = wrong and target.kind in ("predicted", "label")
    taught = (
        f"What taught {query.predicted}, the wrong class" if paired and target.kind == "predicted" else None
    )
    opposed = f"What opposed {query.label}, the right class" if paired and target.kind == "label" else None
    table(_lines(shown.proponents), taught or "Proponents: training on them lowered this loss")
    table(_lines(shown.opponents), opposed or "Opponents: training on them raised it")


def _lines(cards: Sequence[Card]) -> list[dict[str, Any]]:
    return [
        {
            "row": card.row,
            "score": card.score,
            "label": card.label,
            "predicted": card.predicted,
            "planted": f"was {card.true_label}" if card.planted else None,
            "shown": as_text(card),
        }
        for card in cards
    ]


def as_text(card: Card) -> str | None:
    """What is shown of a row, if it is words."""
    if isinstance(card.shown, str):
        return card.shown
    if isinstance(card.shown, Mapping):
        return ", ".join(f"{key} {plain(value)}" for key, value in card.shown.items())
    return None
