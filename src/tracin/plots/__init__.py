"""Figures of what tracin finds: matplotlib ``Figure`` objects, without pyplot and without a display.

Blue is a proponent (training on it lowers the loss), orange an opponent, in every figure and in the report.
matplotlib comes with ``pip install 'tracin[plot]'`` and is imported when the first figure is drawn.
"""

from tracin.plots.canvas import png, svg
from tracin.plots.cards import Card, Explanation, Gallery, LossPath
from tracin.plots.curves import detection_curve
from tracin.plots.sheets import picture_sheet, suspect_sheet
from tracin.plots.study import repair_figure, study_figure
from tracin.plots.trajectory import trajectory_figure

__all__ = [
    "Card",
    "Explanation",
    "Gallery",
    "LossPath",
    "detection_curve",
    "picture_sheet",
    "png",
    "repair_figure",
    "study_figure",
    "suspect_sheet",
    "svg",
    "trajectory_figure",
]
