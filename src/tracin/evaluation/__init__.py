"""How well a ranking finds what was planted: label flips and detection curves."""

from tracin.evaluation.detection import DetectionCurve
from tracin.evaluation.flips import Flips, plant_flips

__all__ = ["DetectionCurve", "Flips", "plant_flips"]
