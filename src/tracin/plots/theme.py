"""The colours of figures and report, light and dark: one source for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tracin.errors import OptionError

__all__ = ["DARK", "LIGHT", "Theme", "ThemeName", "theme_named"]

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """Colours by role.

    The two signs stay apart for every kind of colour blindness: Okabe and Ito's blue and vermilion, shifted
    until both reach a contrast of 4.5 on the paper.
    """

    paper: str
    raised: str
    ink: str
    muted: str
    hair: str
    proponent: str
    opponent: str
    series: tuple[str, ...]

    def sign(self, score: float) -> str:
        """The colour of a score: proponent, opponent, or muted at zero."""
        if score == 0.0:
            return self.muted
        return self.proponent if score > 0.0 else self.opponent


LIGHT = Theme(
    paper="#ffffff",
    raised="#f5f6f8",
    ink="#1b2027",
    muted="#626b76",
    hair="#d4d9df",
    proponent="#0069ad",
    opponent="#bd4b00",
    series=("#1b2027", "#00845f", "#a8518a", "#8a6d00"),
)
DARK = Theme(
    paper="#14181d",
    raised="#1d2229",
    ink="#e7ebf0",
    muted="#98a2ae",
    hair="#363e48",
    proponent="#62b5f0",
    opponent="#ff9b57",
    series=("#e7ebf0", "#3cc39a", "#e29ac8", "#d8bd4a"),
)


def theme_named(name: str) -> Theme:
    """The theme of this name.

    Args:
        name: ``light`` or ``dark``.

    Returns:
        Its colours.

    Raises:
        OptionError: Any other name.
    """
    themes = {"light": LIGHT, "dark": DARK}
    if name not in themes:
        raise OptionError(f"theme is 'light' or 'dark', got {name!r}")
    return themes[name]
