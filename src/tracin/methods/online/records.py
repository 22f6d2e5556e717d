"""What each recorded step did to the queries, and a ledger as one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracin.errors import OptionError, ResultError
from tracin.results import saving
from tracin.shapes import Float, Int

__all__ = ["Book", "StepReport", "read_ledger", "write_ledger"]

FORM = saving.Form("tracin.online", 2, "ledger", sealed=True)
LINES = ("steps", "factors", "own", "carried", "change")
TENSORS = ("first_order", "ideal", "queries", "checked", *LINES)


@dataclass(frozen=True)
class StepReport:
    """The recorded steps, one row each; s recorded steps, q queries, all in units of the query loss.

    To first order a step lowers the loss of a query by ``own + carried``; it lowered it by ``change``.

    Args:
        steps: Number of the step within the run, from 0.
        factors: The common factor between the optimizer's gradient and the rows' sum.
        own: Σ_i of the rows' first-order shares.
        carried: The rest of the movement: what earlier rows left in momentum, weight decay, and, under
            ``update="momentum"``, minus what this step's rows have yet to do.
        change: The measured fall of the loss, L(w_t) − L(w_{t+1}).
    """

    steps: Int[Tensor, " s"]
    factors: Float[Tensor, " s"]
    own: Float[Tensor, "s q"]
    carried: Float[Tensor, "s q"]
    change: Float[Tensor, "s q"]

    def __len__(self) -> int:
        return len(self.steps)


def write_ledger(path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write a ledger as one safetensors file, atomically.

    Args:
        path: The file.
        tensors: ``TENSORS`` by name.
        settings: What else the ledger is, as JSON would hold it.
    """
    saving.write_content(path, tensors, settings, FORM)


def read_ledger(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_ledger`` wrote.

    Args:
        path: The file.

    Returns:
        The tensors and the settings.

    Raises:
        ResultError: The file is damaged, or no ledger.
    """
    tensors, content = saving.read_content(path, FORM, "OnlineTracIn")
    saving.check_tensors(path, FORM, tensors, content, TENSORS)
    return {name: tensor.clone() for name, tensor in tensors.items()}, content


class Book:
    """The ledger's numbers: two tables [n, q] of rows against queries, and a line per recorded step.

    Args:
        n: Training rows.
        q: Queries.
        memory: Bytes that the tables may take.

    Raises:
        OptionError: They take more.
    """

    def __init__(self, n: int, q: int, memory: int) -> None:
        self.nbytes = 2 * 8 * n * q
        if self.nbytes > memory:
            raise OptionError(
                f"OnlineTracIn: the two float64 tables of {n} train rows × {q} queries take {self.nbytes:,} bytes, and memory= "
                f"allows {memory:,}. Give fewer queries, or raise memory."
            )
        self.first_order = torch.zeros(n, q, dtype=torch.float64)
        self.ideal = torch.zeros(n, q, dtype=torch.float64)
        self._lines: dict[str, list[Any]] = {name: [] for name in LINES}

    def __len__(self) -> int:
        return len(self._lines["steps"])

    def add(
        self, ids: Tensor, shares: Tensor, *, step: int, factor: float, carried: Tensor, change: Tensor
    ) -> None:
        """Enter a step.

        Args:
            ids: [b], the rows; those that come twice add up.
            shares: [b, q], their first-order parts.
            step: Its number.
            factor: The common factor.
            carried: [q], the rest of the movement.
            change: [q], the measured fall of the losses.
        """
        own = shares.sum(0)
        self.first_order.index_add_(0, ids, shares)
        self.ideal.index_add_(0, ids, shares + (change - own) / len(shares))
        for name, value in zip(LINES, (step, factor, own, carried, change), strict=True):
            self._lines[name].append(value)

    def report(self) -> StepReport:
        """The lines as tensors."""
        q = self.ideal.shape[1]
        wide = {
            name: torch.stack(self._lines[name])
            if self._lines[name]
            else torch.zeros(0, q, dtype=torch.float64)
            for name in LINES[2:]
        }
        return StepReport(
            steps=torch.tensor(self._lines["steps"], dtype=torch.int64),
            factors=torch.tensor(self._lines["factors"], dtype=torch.float64),
            **wide,
        )

    def restore(self, path: str | Path, tensors: Mapping[str, Tensor]) -> None:
        """Go on from tensors that were saved.

        Args:
            path: Where they come from, for the message.
            tensors: By name.

        Raises:
            ResultError: One of them has another shape or dtype.
        """
        (n, q), s = self.ideal.shape, len(tensors["steps"])
        shapes = {"first_order": (n, q), "ideal": (n, q), "factors": (s,)}
        shapes |= dict.fromkeys(LINES[2:], (s, q))
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape or tensors[name].dtype != torch.float64:
                raise ResultError(f"{path}: {name} is damaged. Save the ledger again.")
        self.first_order, self.ideal = tensors["first_order"], tensors["ideal"]
        self._lines = {
            name: tensors[name].tolist() if name in LINES[:2] else list(tensors[name]) for name in LINES
        }
