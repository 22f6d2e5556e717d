"""The colours of the pages as a style sheet, from the theme of the figures."""

from __future__ import annotations

from dataclasses import fields

from tracin.plots.theme import DARK, LIGHT, Theme

__all__ = ["theme_css"]


def theme_css() -> str:
    """Custom properties for every colour, in light and dark: ``--paper``, ``--proponent``, …, ``--series-0`` to ``--series-3``.

    Returns:
        A style sheet.

    Example:
        >>> "--paper: #ffffff;" in theme_css()
        True
    """
    return f":root {{ {_properties(LIGHT)} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_properties(DARK)} }} }}\n"


def _properties(theme: Theme) -> str:
    colours = {field.name: getattr(theme, field.name) for field in fields(theme) if field.name != "series"}
    colours |= {f"series-{number}": colour for number, colour in enumerate(theme.series)}
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
