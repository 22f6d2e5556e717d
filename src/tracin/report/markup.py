"""HTML that is escaped unless it was made here."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Iterable, Mapping

__all__ = ["Markup", "data_uri", "join", "pairs", "tag"]

_VOID = frozenset({"img", "meta", "source", "link", "br"})


class Markup(str):
    """A string that is HTML already. Every other string is text, and is escaped when it enters a tag."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """Text as HTML; a control character, which no page may hold, becomes ``�``."""
    if isinstance(value, Markup):
        return value
    shown = "".join(char if char.isprintable() or char.isspace() else "�" for char in str(value))
    return Markup(html.escape(shown, quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other; text is escaped, None is nothing."""
    return Markup("".join(escaped(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: The element's name.
        children: Markup, or text to escape; None is left out.
        attributes: Their values are escaped, None is left out; ``class_`` is ``class``, and an
            underscore inside a name is a hyphen.

    Returns:
        The element as markup.

    Example:
        >>> print(tag("b", "<script>", class_="label"))
        <b class="label">&lt;script&gt;</b>
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def pairs(entries: Mapping[str, str], **attributes: object) -> Markup:
    """Keys and values as a list of terms."""
    return tag(
        "dl", *(join([tag("dt", key), tag("dd", value)]) for key, value in entries.items()), **attributes
    )


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """The bytes as an address that holds them."""
    return f"data:{kind};base64,{b64encode(content).decode('ascii')}"
