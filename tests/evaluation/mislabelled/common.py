"""A small study, and its numbers without what differs from run to run."""

from __future__ import annotations

from tracin.evaluation.mislabelled import Design

SMALL = {
    "data": "digits",
    "rows": 240,
    "epochs": 2,
    "checkpoints": 3,
    "seeds": 1,
    "rate": 0.1,
    "model": "mlp",
}


def design(*methods, **changes):
    return Design(**{**SMALL, "methods": methods or ("tracin", "loss"), **changes})


def numbers(result):
    drop = ("seconds", "cpu_seconds", "peak_bytes", "train_seconds")
    return [{name: row[name] for name in row if name not in drop} for row in result.seed_table()]
