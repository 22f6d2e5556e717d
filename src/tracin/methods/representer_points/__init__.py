"""Representer points: the last layer re-fitted, and each training row's part in a logit."""

from tracin.methods.representer_points.method import RepresenterPoints

__all__ = ["RepresenterPoints"]
