"""Small things to draw, and what a reader of a figure would see of its texts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch
from matplotlib.text import Text

from tracin.evaluation import DetectionCurve
from tracin.plots import Card, Explanation, LossPath

STEPS = (5, 20, 35, 50)


def card(row: int, score: float | None, **known: object) -> Card:
    return Card(np.eye(8) * (row % 7 + 1), row=row, score=score, **{"label": "cat", **known})


def path(steps: tuple[int, ...] = STEPS, rows: int = 30, seed: int = 0) -> LossPath:
    generator = torch.Generator().manual_seed(seed)
    contributions = torch.randn(len(steps), rows, generator=generator)
    losses = torch.linspace(2.5, 0.1, len(steps))
    return LossPath(steps, losses, contributions, torch.arange(rows))


def explanation(count: int = 4, **known: object) -> Explanation:
    proponents = tuple(card(row, 1.5 - 0.3 * row, **known) for row in range(count))
    opponents = tuple(card(10 + row, -1.0 + 0.2 * row, **known) for row in range(count))
    query = Card(np.eye(8), row=17, label="cat", predicted="dog", correct=False)
    return Explanation(query, proponents, opponents, target="the predicted class, dog", path=path())


def curve(seed: int = 0) -> DetectionCurve:
    generator = torch.Generator().manual_seed(seed)
    planted = torch.rand(80, generator=generator) < 0.15
    return DetectionCurve(torch.rand(80, generator=generator) + planted * 0.5, planted)


def texts(figure: object) -> list[str]:
    """Every text of a figure that a reader can see."""
    return [text.get_text() for text, _ in boxes(figure)]


def boxes(figure: object) -> Iterator[tuple[Text, object]]:
    """The visible texts with their boxes in pixels, a hair smaller than drawn."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            yield text, text.get_window_extent(renderer).padded(-1.0)


def collisions(figure: object) -> list[tuple[str, str]]:
    """Pairs of texts that lie over each other, and texts that leave the sheet."""
    sheet = figure.bbox
    placed = list(boxes(figure))
    outside = [
        (text.get_text(), "the edge")
        for text, box in placed
        if box.x0 < sheet.x0 or box.x1 > sheet.x1 or box.y0 < sheet.y0 or box.y1 > sheet.y1
    ]
    over = [
        (one.get_text(), other.get_text())
        for (one, box), (other, beside) in combinations(placed, 2)
        if box.overlaps(beside)
    ]
    return outside + over
