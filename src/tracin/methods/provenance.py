"""What a result was made from: enough to know it again, and to run it again."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from tracin.scoring.coverage import coverage_of
from tracin.scoring.run import Run

__all__ = ["provenance", "versions"]


def provenance(run: Run, *, method: str, verb: str, scale: str, seed: int | None = None) -> dict[str, Any]:
    """The record of a run.

    Args:
        run: The run, after its last checkpoint.
        method: The method's public name.
        verb: What it computed.
        scale: The unit of the numbers, in words.
        seed: The seed, where something was drawn.

    Returns:
        A JSON-able record; a method adds its own settings to it.
    """
    task, settings = run.task, run.settings
    return {
        "method": method,
        "verb": verb,
        "task": {
            "model": type(task.model).__name__,
            "loss": getattr(task.loss, "__name__", type(task.loss).__name__),
            "query_loss": getattr(task.query_loss, "__name__", None),
            "parameters": list(task.globs),
        },
        "checkpoints": run.trajectory.describe(),
        "trajectory": run.trajectory.fingerprint(),
        "weighting": settings.weighting,
        "normalize": settings.normalize,
        "dtype": str(run.dtype).removeprefix("torch."),
        "precision": settings.precision,
        "device": str(run.loaded.device),
        "seed": seed,
        "scale": scale,
        "coverage": coverage_of(run.selection, run.train.wiring, run.train.irregular).by_route(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of what computes the numbers."""
    return {
        "tracin": _installed(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@cache
def _installed() -> str:
    """Read from disk, once."""
    return version("tracin")
