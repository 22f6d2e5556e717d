"""A sheet of paper measured in inches from its top left corner, on which figures are laid out.

Every text is measured before it is drawn, so that nothing overlaps whatever the labels are. Text is
plain text: a dollar sign is a dollar sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tracin.errors import MissingExtraError
from tracin.plots.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

__all__ = ["Axes", "Canvas", "Figure", "digits", "fit", "png", "signed", "svg", "text_width", "wrap"]

LINE = 1.4
"""Distance between the lines of a paragraph, in units of the font size."""

POINTS = 72.0
_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
)
_LONGEST_TEXT = 2000

Align = Literal["left", "center", "right"]


def load_matplotlib() -> Any:
    """matplotlib, which the figures need.

    Returns:
        The module.

    Raises:
        MissingExtraError: It isn't installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("figures need matplotlib: pip install 'tracin[plot]'") from error
    return matplotlib


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults with plain text, whatever the caller's settings; they come back after."""
    load_matplotlib()
    import matplotlib.style

    settings = {"font.family": list(families()), "text.parse_math": False, "text.usetex": False}
    with matplotlib.style.context(["default", settings]):
        yield


@cache
def families() -> tuple[str, ...]:
    """The fonts to draw with: the one that comes with matplotlib, then those installed for other scripts."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return tuple(family for family in _FAMILIES if family in installed)


@cache
def glyphs() -> frozenset[int]:
    """The characters that the fonts can draw."""
    from matplotlib import font_manager

    found: set[int] = set()
    for family in families():
        font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=[family])))
        found.update(font.get_charmap())
    return frozenset(found)


def printable(text: str) -> str:
    """One line of characters that can be drawn; any other becomes a box."""
    known = glyphs()
    return "".join(char if ord(char) in known else "□" for char in " ".join(text[:_LONGEST_TEXT].split()))


@cache
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """The width of a line of text in inches, as it will be drawn."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    text = printable(text)
    if not text:
        return 0.0
    font = FontProperties(family=list(families()), size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / POINTS


def fit(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text on one line of this width, its end cut off behind an ellipsis if need be."""
    text = printable(text)
    if text_width(text, size, weight) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if text_width(text[:middle].rstrip() + "…", size, weight) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "…"


def wrap(text: str, width: float, size: float, lines: int) -> list[str]:
    """The text on at most so many lines of this width; what doesn't fit ends in an ellipsis."""
    words = printable(text).split(" ")
    wrapped: list[str] = []
    line = ""
    while words and len(wrapped) < lines:
        word = words.pop(0)
        longer = f"{line} {word}" if line else word
        if text_width(longer, size) <= width:
            line = longer
        elif line:
            wrapped.append(line)
            line, words = "", [word, *words]
        else:
            cut = max(
                1, next(n for n in range(len(word), 0, -1) if n == 1 or text_width(word[:n], size) <= width)
            )
            wrapped.append(word[:cut])
            words = [word[cut:], *words] if word[cut:] else words
    if len(wrapped) < lines:
        return [*wrapped, line] if line else wrapped
    if line or words:
        wrapped[-1] = fit(" ".join([wrapped[-1], line, *words]), width, size)
    return wrapped


def signed(value: float) -> str:
    """A score with its sign in three digits and a true minus.

    Args:
        value: The score.

    Returns:
        Its text.

    Example:
        >>> signed(0.012345), signed(-12.0), signed(1e-9), signed(0.0)
        ('+0.0123', '−12.0', '+1.00e−9', '0')
    """
    return "0" if value == 0.0 else ("+" if value > 0 else "") + digits(value)


def digits(value: float) -> str:
    """A number in three digits, trailing zeros kept so that a column of them lines up."""
    mantissa, _, power = f"{value:#.3g}".partition("e")
    text = mantissa.removesuffix(".") + (f"e{int(power)}" if power else "")
    return text.replace("-", "−")


class Canvas:
    """A ``Figure`` to lay out in inches; y grows downwards."""

    def __init__(self, width: float, height: float, theme: Theme) -> None:
        load_matplotlib()
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as NewFigure

        self.width, self.height, self.theme = width, height, theme
        self.figure: Figure = NewFigure(figsize=(width, height), facecolor=theme.paper)
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose frame is this rectangle."""
        across, down = self.width, self.height
        frame = self.figure.add_axes((x / across, 1.0 - (y + height) / down, width / across, height / down))
        frame.set_facecolor(self.theme.paper)
        return frame

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 8.0,
        colour: str | None = None,
        weight: str = "normal",
        align: Align = "left",
        width: float | None = None,
    ) -> None:
        """One line whose baseline is at y, cut to the width if one is given."""
        line = printable(text) if width is None else fit(text, width, size, weight)
        self.figure.text(
            x / self.width,
            1.0 - y / self.height,
            line,
            fontsize=size,
            color=colour or self.theme.ink,
            fontweight=weight,
            ha=align,
            va="baseline",
            parse_math=False,
        )

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str = "none", edge: str = "none"
    ) -> None:
        """A rectangle."""
        from matplotlib.patches import Rectangle

        corner = (x / self.width, 1.0 - (y + height) / self.height)
        look = {"facecolor": fill, "edgecolor": edge, "linewidth": 0.7}
        size = (width / self.width, height / self.height)
        self.figure.add_artist(Rectangle(corner, *size, transform=self.figure.transFigure, **look))

    def line(
        self,
        x: float,
        y: float,
        length: float,
        *,
        colour: str | None = None,
        thick: float = 0.7,
        dashes: Any = "-",
    ) -> None:
        """A horizontal line."""
        from matplotlib.lines import Line2D

        ends = [x / self.width, (x + length) / self.width]
        look = {"color": colour or self.theme.hair, "linewidth": thick, "linestyle": dashes}
        line = Line2D(ends, [1.0 - y / self.height] * 2, transform=self.figure.transFigure, **look)
        self.figure.add_artist(line)

    def picture(self, x: float, y: float, width: float, height: float, pixels: np.ndarray) -> None:
        """A picture as large as the rectangle allows, centred, with a hairline around it."""
        tall, wide = pixels.shape[:2]
        scale = min(width / wide, height / tall)
        across, down = wide * scale, tall * scale
        left, top = x + (width - across) / 2, y + (height - down) / 2
        frame = self.axes(left, top, across, down)
        smooth = "nearest" if max(tall, wide) <= 96 else "antialiased"
        frame.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation=smooth)
        frame.set_axis_off()
        self.box(left, top, across, down, edge=self.theme.hair)


def png(figure: Figure, *, dpi: int = 160, trim: float = 0.0) -> bytes:
    """The figure as a PNG file.

    Args:
        figure: Any matplotlib figure.
        dpi: Pixels per inch.
        trim: Inches cut off each side, for a page that has margins of its own.

    Returns:
        The bytes of the file. The same figure gives the same bytes.
    """
    from matplotlib.transforms import Bbox

    width, height = figure.get_size_inches()
    frame = Bbox.from_extents(trim, trim, width - trim, height - trim)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches=frame, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, its texts as outlines.

    Args:
        figure: Any matplotlib figure.

    Returns:
        The bytes of the file. The same figure gives the same bytes.
    """
    matplotlib = load_matplotlib()
    buffer = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "tracin", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
