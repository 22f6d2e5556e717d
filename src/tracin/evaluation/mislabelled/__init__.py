"""The study of mislabelled data: flips planted on purpose, and how fast each method finds them."""

from tracin.evaluation.mislabelled.data import StudyData, own_data, read_data
from tracin.evaluation.mislabelled.design import Design
from tracin.evaluation.mislabelled.registry import METHODS, Context, Method, named
from tracin.evaluation.mislabelled.result import StudyResult
from tracin.evaluation.mislabelled.runner import run_study

__all__ = [
    "METHODS",
    "Context",
    "Design",
    "Method",
    "StudyData",
    "StudyResult",
    "named",
    "own_data",
    "read_data",
    "run_study",
]
