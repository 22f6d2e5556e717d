"""Tables and lines on the terminal. Text from data or files is printed as it is: no markup, no control characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

__all__ = ["clean", "heading", "number", "percent", "say", "table"]

_PIPE_WIDTH = 110
_LONGEST = 60


def clean(text: str) -> str:
    r"""One line of text; a character that would control the terminal becomes ``�``.

    Args:
        text: Any text.

    Returns:
        Printable text.

    Example:
        >>> clean("boot\x1b[2J")
        'boot�[2J'
    """
    return "".join(char if char.isprintable() else " " if char.isspace() else "�" for char in text)


def number(value: float) -> str:
    """A score or loss to three digits, whole thousands in full, with a true minus sign."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−")


def percent(share: float) -> str:
    """A share as ``88 %``."""
    return f"{100 * share:.0f} %"


def _console() -> Any:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    console.on_broken_pipe = _reader_gone  # rich's own would exit with 1
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def _reader_gone() -> None:
    raise BrokenPipeError


@cache
def _style(name: str) -> Any:
    from rich.style import Style

    return Style.parse(name)


def say(text: str = "") -> None:
    """A line of text, wrapped at words."""
    from rich.text import Text

    _console().print(Text(clean(text)))


def heading(text: str) -> None:
    """A line that begins a part."""
    from rich.text import Text

    console = _console()
    console.print()
    console.print(Text(clean(text), style=_style("bold")))


def table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Rows with the same keys; numbers to the right. A column that is empty in every row is left out.

    Args:
        rows: Column name → value.
        title: A line above.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        numeric = all(isinstance(row[name], int | float | None) for row in rows)
        shown.add_column(Text(clean(name)), justify="right" if numeric else "left", overflow="ellipsis")
    for row in rows:
        shown.add_row(*(Text(_cell(row[name])) for name in names))
    console = _console()
    console.print()
    if title:
        console.print(Text(clean(title)))
    console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    text = clean(str(value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
