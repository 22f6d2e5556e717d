"""The sections of the report, each from its data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracin.plots import Explanation, detection_curve, png, trajectory_figure
from tracin.plots.canvas import Figure, digits
from tracin.plots.pictures import plain
from tracin.plots.theme import ThemeName
from tracin.report.cards import card_grid, query_card
from tracin.report.data import Check, Fact, ReportData
from tracin.report.markup import Markup, data_uri, join, pairs, tag

__all__ = ["check_section", "curve_section", "explanations", "facts", "made", "suspects_section"]

_OPEN_ROWS = 12
_SMALL = 1e-3
_TRIM = 0.2
_NARROW = "(max-width: 700px)"
_DARK = "(prefers-color-scheme: dark)"


def facts(data: ReportData) -> Markup | None:
    """The numbers to see first: those of the check and the curve, then the given ones."""
    told: list[Fact] = []
    if data.check is not None:
        told.append(Fact("Parameters traced", f"{100 * data.check.coverage:.4g} %", "of the model"))
        error = digits(data.check.max_relative_error)
        told.append(Fact("Largest error", error, "relative, against autograd"))
    for name, curve in list(data.curves.items())[:1]:
        told += [
            Fact(
                f"Flips found at {100 * share:.3g} %",
                f"{100 * curve.found_at(share):.0f} %",
                f"{curve.count_at(share):,} of {curve.planted_rows:,}, by {name}",
            )
            for share in data.shares
        ]
    told += data.facts
    if not told:
        return None
    return tag("dl", *(fact_tile(fact) for fact in told), class_="facts")


def fact_tile(fact: Fact) -> Markup:
    note = tag("small", fact.note) if fact.note else None
    return tag("div", tag("dt", fact.name), tag("dd", fact.value, note))


def check_section(check: Check) -> Markup:
    """Coverage and the check against autograd."""
    told = (
        f"{100 * check.coverage:.4g} % of the model's parameters were traced. The gradients of single rows were "
        f"compared with autograd's, one row at a time: the largest relative error is "
        f"{digits(check.max_relative_error)}."
    )
    return tag(
        "section",
        tag("h2", "Coverage and the check against autograd"),
        tag("p", told),
        *(tag("p", note, class_="quiet") for note in check.notes),
        table(check.table) if check.table else None,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Rows with the same keys; folded when there are many."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {name for name in names if all(is_number(row.get(name)) for row in rows)}
    classes = {name: "number" if name in numeric else None for name in names}
    head = tag("tr", *(tag("th", name, class_=classes[name]) for name in names))
    body = (
        tag("tr", *(tag("td", cell(row.get(name)), class_=classes[name]) for name in names)) for row in rows
    )
    whole = tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")
    if len(rows) <= _OPEN_ROWS:
        return whole
    return tag("details", tag("summary", f"All {len(rows)} parameters"), whole)


def cell(value: Any) -> str:
    """A table's entry: small numbers as powers of ten, anything else plain."""
    return digits(value) if isinstance(value, float) and 0.0 < abs(value) < _SMALL else plain(value)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def suspects_section(data: ReportData) -> Markup:
    """The rows to look at first."""
    cards = data.suspects
    planted = [card.planted for card in cards]
    told = data.suspects_told
    if all(flag is not None for flag in planted):
        told += f" {sum(map(bool, planted))} of these {len(cards)} carry a label that was planted wrong."
    return tag(
        "section",
        tag("h2", "Suspects"),
        tag("p", told),
        card_grid(cards, place="training row", sign=False),
    )


def curve_section(data: ReportData) -> Markup:
    """The detection curve, with what it finds."""
    name, curve = next(iter(data.curves.items()))
    found = ", ".join(
        f"the first {100 * share:.3g} % of the rows hold {100 * curve.found_at(share):.0f} %"
        for share in data.shares
    )
    told = f"Of {curve.planted_rows:,} planted flips, ranked by {name}: {found}."

    def draw(theme: ThemeName, narrow: bool) -> Figure:
        return detection_curve(data.curves, shares=data.shares, width=3.9 if narrow else 6.6, theme=theme)

    alt = f"Detection curve: {found}; area under the ROC curve {curve.auroc:.3f}"
    return tag("section", tag("h2", "Detection curve"), tag("p", told), chart(draw, alt=alt, width=660))


def chart(draw: Callable[[ThemeName, bool], Figure], *, alt: str, width: int) -> Markup:
    """A figure for light and dark, wide and narrow screens."""
    both = f"{_NARROW} and {_DARK}"
    sources: list[tuple[str, ThemeName, bool]] = [
        (both, "dark", True),
        (_NARROW, "light", True),
        (_DARK, "dark", False),
    ]
    return tag(
        "div",
        tag(
            "picture",
            *(
                tag("source", media=media, srcset=picture(draw, theme, narrow))
                for media, theme, narrow in sources
            ),
            tag("img", src=picture(draw, "light", False), alt=alt, width=width),
        ),
        class_="chart",
    )


def picture(draw: Callable[[ThemeName, bool], Figure], theme: ThemeName, narrow: bool) -> str:
    return data_uri(png(draw(theme, narrow), trim=_TRIM))


def explanations(data: ReportData) -> Markup:
    """Each prediction with what taught it and what spoke against it."""
    told = join(
        [
            tag("strong", "Proponents", class_="proponent"),
            " are the training rows that lowered the loss, ",
            tag("strong", "opponents", class_="opponent"),
            " those that raised it.",
        ]
    )
    return tag(
        "section", tag("h2", "Predictions"), tag("p", told), *(explained(each) for each in data.explanations)
    )


def explained(explanation: Explanation) -> Markup:
    query = explanation.query
    heading = "A test row" if query.row is None else f"Test row {query.row}"
    sides = [
        ("Proponents", "proponent", "lowered the loss", explanation.proponents),
        ("Opponents", "opponent", "raised it", explanation.opponents),
    ]
    shown = [
        tag(
            "section",
            tag("h4", tag("b", name, class_=kind), tag("span", meaning)),
            card_grid(cards, place="training row", extra=" five"),
        )
        for name, kind, meaning, cards in sides
        if cards
    ]
    return tag(
        "article",
        tag("h3", heading),
        tag("div", tag("div", query_card(explanation)), tag("div", *shown), class_="sides"),
        trajectory(explanation),
        class_="explained",
    )


def trajectory(explanation: Explanation) -> Markup | None:
    path = explanation.path
    if path is None:
        return None

    def draw(theme: ThemeName, narrow: bool) -> Figure:
        return trajectory_figure(explanation, narrow=narrow, theme=theme)

    losses = ", ".join(
        f"{digits(loss)} at step {step}" for step, loss in zip(path.steps, path.losses.tolist(), strict=True)
    )
    return chart(draw, alt=f"The loss along training: {losses}", width=1056)


def made(provenance: Mapping[str, Any]) -> Markup:
    """How the numbers were made."""
    told = {key: as_text(value) for key, value in provenance.items()}
    return tag("section", tag("h2", "How this was made"), pairs(told, class_="made"))


def as_text(value: Any) -> str:
    if isinstance(value, str | int | float) or value is None:
        return plain(value)
    return json.dumps(value, ensure_ascii=False, default=str)
