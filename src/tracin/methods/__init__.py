"""Methods that trace predictions to training rows; each reads like its paper."""

from tracin.methods.influence_functions import InfluenceFunctions
from tracin.methods.online import OnlineTracIn
from tracin.methods.representer_points import RepresenterPoints
from tracin.methods.tracin_cp import TracInCP

__all__ = ["InfluenceFunctions", "OnlineTracIn", "RepresenterPoints", "TracInCP"]
