"""Trace a prediction back to the training examples that taught it."""

from tracin import audit, errors
from tracin.checkpoints import Checkpoint, CheckpointRecorder, Trajectory
from tracin.gradients.projection import Projection
from tracin.index.index import Index
from tracin.methods import InfluenceFunctions, OnlineTracIn, RepresenterPoints, TracInCP
from tracin.results import Scores, SelfInfluence, TopK
from tracin.study import Study
from tracin.tasks import Task, losses

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointRecorder",
    "Index",
    "InfluenceFunctions",
    "OnlineTracIn",
    "Projection",
    "RepresenterPoints",
    "Scores",
    "SelfInfluence",
    "Study",
    "Task",
    "TopK",
    "TracInCP",
    "Trajectory",
    "audit",
    "errors",
    "losses",
]
