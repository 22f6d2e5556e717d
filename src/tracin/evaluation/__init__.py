"""How well a ranking finds what was planted: label flips, detection curves, and the simple scores to beat."""

from tracin.evaluation.baselines import (
    area_under_margin,
    forgetting,
    gradient_norm,
    last_loss,
    margin,
    mean_loss,
)
from tracin.evaluation.detection import DetectionCurve
from tracin.evaluation.flips import Flips, plant_flips, plant_hardest_flips
from tracin.evaluation.neighbours import neighbour_disagreement, neighbour_suspicion
from tracin.evaluation.out_of_fold import out_of_fold, self_confidence

__all__ = [
    "DetectionCurve",
    "Flips",
    "area_under_margin",
    "forgetting",
    "gradient_norm",
    "last_loss",
    "margin",
    "mean_loss",
    "neighbour_disagreement",
    "neighbour_suspicion",
    "out_of_fold",
    "plant_flips",
    "plant_hardest_flips",
    "self_confidence",
]
