"""Exactness on the user's own model: random rows of every checkpoint against autograd, one example at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tracin.checksums import row_checksums
from tracin.data import Batch, to_device
from tracin.gradients.agreement import tolerance
from tracin.gradients.check import checked_gradients, refuse_mixing, row_errors
from tracin.progress import progress
from tracin.scoring.coverage import Coverage, coverage_of
from tracin.scoring.run import Run

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found.

    Attributes:
        max_relative_error: The largest ‖Δ‖ / ‖reference‖ over parameters, rows and checkpoints.
        errors: The largest error of each traced parameter.
        tolerance: What counts as exact for the arithmetic.
        rows: Positions of the rows compared.
        checkpoints: Number of checkpoints.
        coverage: Which parameters were traced, by which route.
        precision: The arithmetic of the gradients. Under ``"bfloat16"`` the errors are against autograd without autocast, so
            they contain all rounding of the forward and backward pass.
    """

    max_relative_error: float
    errors: dict[str, float]
    tolerance: float
    rows: tuple[int, ...]
    checkpoints: int
    coverage: Coverage
    precision: str = "float32"

    @property
    def exact(self) -> bool:
        """Whether every parameter agrees within the tolerance, which is that of bfloat16 where this is the precision."""
        return self.max_relative_error <= self.tolerance

    def __str__(self) -> str:
        low = self.precision != "float32"
        word = f"right to {self.precision}" if low else "exact"
        verdict = word if self.exact else f"NOT {word}"
        judge = "autograd without autocast" if low else "autograd"
        return (
            f"{verdict}: largest relative error {self.max_relative_error:.1e} against {judge} "
            f"({len(self.rows)} rows × {self.checkpoints} checkpoints; up to {self.tolerance:.0e} counts as {word}). "
            f"{self.coverage}"
        )


def verify(run: Run, rows: int = 8, seed: int = 0) -> Verification:
    """Compare per-example gradients with autograd on random rows at every checkpoint.

    Args:
        run: A run over the train rows.
        rows: Rows to compare (all, if there are fewer).
        seed: Which rows.

    Returns:
        The verification.
    """
    n = len(run.train.rows)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    chosen = sorted(order[: max(rows, 1)].tolist())
    worst: dict[str, float] = dict.fromkeys(run.selection.traced, 0.0)
    with progress("verify", len(run.trajectory) * len(chosen), show=run.settings.progress) as bar:
        for index in range(len(run.trajectory)):
            run.load(index)
            if index == 0:
                # The always-on check first: the routes judged are those that scores are made by.
                first, value = next(run.batches(run.train))
                run.gradients(run.train, first, value)
            size = max(run.train.rows.sizes)
            for at in range(0, len(chosen), size):
                some = chosen[at : at + size]
                for name, error in _compare(run, some).items():
                    worst[name] = max(worst[name], error)
            bar.advance(len(chosen))
    return Verification(
        max_relative_error=max(worst.values(), default=0.0),
        errors=worst,
        tolerance=tolerance(run.train.dtype),
        rows=tuple(chosen),
        checkpoints=len(run.trajectory),
        coverage=coverage_of(run.selection, run.train.wiring, run.train.irregular),
        precision=run.settings.precision,
    )


def _compare(run: Run, rows: list[int]) -> dict[str, float]:
    """Errors of a batch of these rows at the loaded checkpoint, by parameter."""
    batch = Batch(rows, run.train.rows.take(rows))
    seen = row_checksums(batch, double=True)
    value = to_device(batch.value, run.loaded.device)
    found = checked_gradients(run.train, run.keys, batch, value, run.selection.traced, False, keep_graph=True)
    refuse_mixing(run.train, batch, found.losses, seen)
    judge, dtype = found, run.train.dtype
    if run.train.root.cast is not None:
        with run.train.root.as_it_is():
            losses = run.train.run(run.train.take(rows), rows)
        judge, dtype = replace(found, losses=losses), run.dtype
    return row_errors(judge, run.selection.traced, list(range(len(rows))), dtype)
