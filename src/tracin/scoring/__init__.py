"""Passes over the data: scores, streaming top-k, self-influence, the check and the plan before the run."""
