"""The page: head, style and sections in one file."""

from __future__ import annotations

from dataclasses import fields
from importlib import resources
from pathlib import Path

from tracin.files import write_text
from tracin.plots.theme import DARK, LIGHT, Theme
from tracin.report.data import ReportData
from tracin.report.markup import Markup, tag
from tracin.report.sections import check_section, curve_section, explanations, facts, made, suspects_section

__all__ = ["render_report", "write_report"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is loaded and nothing runs, even if something slipped through."""


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the report as one self-contained HTML file, whole or not at all.

    Args:
        data: What to tell.
        path: The file; a missing folder is made.

    Returns:
        The path.

    Raises:
        MissingExtraError: A curve or a trajectory is to be drawn and matplotlib isn't installed.
        OSError: The folder can't be written; an older report stays as it was.
    """
    write_text(path, render_report(data))
    return Path(path)


def render_report(data: ReportData) -> str:
    """The report as HTML.

    Args:
        data: What to tell.

    Returns:
        A whole document. The same data gives the same text.

    Raises:
        MissingExtraError: A curve or a trajectory is to be drawn and matplotlib isn't installed.

    Example:
        >>> "<h1>Digits &amp; co</h1>" in render_report(ReportData("Digits & co"))
        True
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", data.title),
        tag("style", style_sheet()),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", data.title),
            tag("p", data.summary, class_="lead") if data.summary else None,
            facts(data),
        ),
        tag("main", *sections(data)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def sections(data: ReportData) -> list[Markup | None]:
    return [
        check_section(data.check) if data.check is not None else None,
        suspects_section(data) if data.suspects else None,
        curve_section(data) if data.curves else None,
        explanations(data) if data.explanations else None,
        *(tag("p", note, class_="quiet") for note in data.notes),
        made(data.provenance) if data.provenance else None,
    ]


def style_sheet() -> Markup:
    """The style, with the colours of the figures."""
    css = resources.files("tracin.report").joinpath("style.css").read_text(encoding="utf-8")
    return Markup(
        f":root {{ {colours(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {colours(DARK)} }} }}\n"
        f"{css}"
    )


def colours(theme: Theme) -> str:
    named = {field.name: getattr(theme, field.name) for field in fields(theme)}
    return " ".join(f"--{name}: {value};" for name, value in named.items() if isinstance(value, str))
