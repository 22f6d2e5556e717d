"""What a study found, as JSON keeps it, and its table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tracin.errors import ResultError
from tracin.evaluation.detection import DetectionCurve
from tracin.evaluation.mislabelled.design import SHARES, CellKey, Design
from tracin.evaluation.mislabelled.measure import Measured

__all__ = ["GRID", "RANDOM_ORDER", "Cell", "Found", "Repaired", "StudyResult", "found_of"]

GRID = tuple(step / 200 for step in range(201))
"""The shares of the rows inspected at which a curve is kept."""

RANDOM_ORDER = "random order"
FORMAT = 1


@dataclass(frozen=True)
class Found:
    """What one method found in one cell.

    Args:
        seconds: Wall-clock time of the method alone.
        cpu_seconds: Processor time of all its threads; unlike the other it does not grow where others use the machine.
        peak_bytes: Its peak memory above what the process held; None where it could not be measured.
        auroc: The chance that a flipped row is more suspect than a clean one.
        average_precision: Of the ranking.
        curve: The share of the flips found at each share of ``GRID``.
        not_run: Why the method did not run; then the numbers are None and the curve is empty.
    """

    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    auroc: float | None = None
    average_precision: float | None = None
    curve: tuple[float, ...] = ()
    not_run: str | None = None

    def at(self, share: float) -> float | None:
        """The share of the flips found after this share of the rows."""
        return self.curve[round(share * (len(GRID) - 1))] if self.curve else None


def found_of(scores: Tensor, planted: Tensor, taken: Measured) -> Found:
    """Judge the suspicion scores of one method.

    Args:
        scores: One per row [n], higher is more suspect.
        planted: Which rows were flipped [n].
        taken: How long they took, and how much memory.

    Returns:
        The numbers.
    """
    curve = DetectionCurve(scores, planted)
    points = tuple(round(curve.found_at(share), 6) for share in GRID)
    spent = (taken.seconds, taken.cpu_seconds, taken.peak_bytes)
    return Found(*spent, curve.auroc, curve.average_precision, points)


@dataclass(frozen=True)
class Repaired:
    """A model trained again after the labels of the first rows of a method's order were corrected.

    Args:
        order: The method, or ``random order``.
        share: The share of the rows inspected.
        corrected: How many labels were wrong among them.
        accuracy: The share of test rows predicted right afterwards.
    """

    order: str
    share: float
    corrected: int
    accuracy: float


@dataclass
class Cell:
    """One training run with its flips, and what every method found.

    Args:
        flips: The kind.
        schedule: Of the rate.
        seed: Of flips, weights and order.
        basis: What the numbers depend on besides.
        weights: A digest of the last checkpoint.
        rows: Training rows.
        planted: How many of them were flipped.
        accuracy: On the test rows, after training on the flipped labels.
        train_seconds: How long that training took.
        checkpoints: Step, rate and sum of rates of each.
        found: By method.
        clean_accuracy: After training on the true labels; None where no repair was asked for.
        repaired: What repairs gave.
        retrained: Accuracy by digest of the labels, so that equal labels are trained on once.
    """

    flips: str
    schedule: str
    seed: int
    basis: dict[str, Any]
    weights: str
    rows: int
    planted: int
    accuracy: float
    train_seconds: float
    checkpoints: list[dict[str, Any]]
    found: dict[str, Found] = field(default_factory=dict)
    clean_accuracy: float | None = None
    repaired: list[Repaired] = field(default_factory=list)
    retrained: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> CellKey:
        """Which cell of the study."""
        return CellKey(self.flips, self.schedule, self.seed)

    def to_json(self) -> dict[str, Any]:
        """The cell as JSON keeps it."""
        return json.loads(json.dumps(asdict(self), allow_nan=False))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cell:
        """The cell of a JSON file.

        Args:
            values: What ``to_json`` gave.

        Returns:
            The cell.

        Raises:
            ResultError: Something is missing, unknown or of another type.
        """
        try:
            found = {name: _found(each) for name, each in values["found"].items()}
            repaired = [Repaired(**each) for each in values["repaired"]]
            return cls(**{**values, "found": found, "repaired": repaired})
        except (KeyError, TypeError, AttributeError) as error:
            raise ResultError(
                f"a cell of the study cannot be read: {type(error).__name__} {error}. Remove the file; it is made again."
            ) from error


def _found(values: Mapping[str, Any]) -> Found:
    return Found(**{**values, "curve": tuple(values["curve"])})


@dataclass(frozen=True)
class StudyResult:
    """A whole study: its design, where it ran, and its cells.

    Args:
        design: What was done.
        made_with: Versions, threads, processor.
        cells: One per training run.

    Example:
        >>> import torch
        >>> design = Design(data="digits", methods=("loss",), seeds=1)
        >>> found = found_of(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]), Measured(1.0))
        >>> cell = Cell("random", "cosine", 0, {}, "", 3, 1, 0.9, 2.0, [], {"loss": found})
        >>> StudyResult(design, {}, [cell]).table()[0]["auroc"]
        1.0
    """

    design: Design
    made_with: dict[str, Any]
    cells: list[Cell]

    def groups(self) -> dict[tuple[str, str], list[Cell]]:
        """The cells of each kind of flips under each schedule, seed by seed."""
        found: dict[tuple[str, str], list[Cell]] = {}
        for flips in self.design.flips:
            for schedule in self.design.schedules or ():
                cells = [cell for cell in self.cells if (cell.flips, cell.schedule) == (flips, schedule)]
                if cells:
                    found[flips, schedule] = cells
        return found

    def methods_run(self) -> list[str]:
        """The methods that gave scores in some cell, in the order asked for."""
        return [
            name
            for name in self.design.methods
            if any(name in cell.found and cell.found[name].not_run is None for cell in self.cells)
        ]

    def table(self) -> list[dict[str, Any]]:
        """One record per flips, schedule and method: means over the seeds, and standard deviations (``_sd``).

        Returns:
            Records with the same keys; numbers of a method that did not run are None, and ``not_run`` says why.
        """
        return [
            _record(flips, schedule, name, [cell.found[name] for cell in cells if name in cell.found])
            for (flips, schedule), cells in self.groups().items()
            for name in self.design.methods
        ]

    def seed_table(self) -> list[dict[str, Any]]:
        """One record per cell and method."""
        return [
            {
                "flips": cell.flips,
                "schedule": cell.schedule,
                "seed": cell.seed,
                "method": name,
                **_numbers(cell.found[name]),
                "test_accuracy": cell.accuracy,
                "train_seconds": cell.train_seconds,
                "not_run": cell.found[name].not_run,
            }
            for cell in self.cells
            for name in self.design.methods
            if name in cell.found
        ]

    def repair_table(self) -> list[dict[str, Any]]:
        """One record per flips, schedule, order of inspection and share: accuracy after the repair, over the seeds."""
        rows = []
        for (flips, schedule), cells in self.groups().items():
            repaired = [each for cell in cells for each in cell.repaired]
            for order in (RANDOM_ORDER, *self.design.methods):
                for share in sorted(self.design.repair):
                    hits = [each for each in repaired if each.order == order and each.share == share]
                    accuracies = [each.accuracy for each in hits]
                    if not hits:
                        continue
                    rows.append(
                        {
                            "flips": flips,
                            "schedule": schedule,
                            "order": order,
                            "inspected": share,
                            "seeds": len(hits),
                            "corrected": statistics.fmean(each.corrected for each in hits),
                            "accuracy": statistics.fmean(accuracies),
                            "accuracy_sd": _spread(accuracies),
                            "accuracy_before": statistics.fmean(cell.accuracy for cell in cells),
                            "accuracy_clean": _mean([cell.clean_accuracy for cell in cells]),
                        }
                    )
        return rows

    def to_json(self) -> dict[str, Any]:
        """The study as JSON keeps it: enough to draw it, and to run it again."""
        return {
            "format": FORMAT,
            "study": "mislabelled",
            "design": self.design.to_json(),
            "made_with": self.made_with,
            "inspected": list(GRID),
            "cells": [cell.to_json() for cell in self.cells],
        }

    @classmethod
    def load(cls, path: str | Path) -> StudyResult:
        """Read the JSON of a study.

        Args:
            path: The file.

        Returns:
            The study.

        Raises:
            ResultError: It cannot be read, or is something else.
        """
        values = read_json(Path(path))
        if values.get("study") != "mislabelled" or values.get("format") != FORMAT:
            raise ResultError(
                f"{path} is no study of mislabelled data in a format that this version reads ({FORMAT})."
            )
        try:
            cells = [Cell.from_json(cell) for cell in values["cells"]]
            return cls(Design.from_json(values["design"]), dict(values["made_with"]), cells)
        except KeyError as error:
            raise ResultError(f"{path} lacks {error}: it was written by something else.") from error


def read_json(path: Path, mend: str = "Give the study.json of a study.") -> dict[str, Any]:
    """A JSON object from a file; what to do about a file that holds none is said by ``mend``."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} cannot be read: {error}. Check the path.") from error
    except json.JSONDecodeError as error:
        raise ResultError(f"{path} is no JSON: {error}. {mend}") from error
    if not isinstance(values, dict):
        raise ResultError(f"{path} holds a {type(values).__name__}. {mend}")
    return values


def _numbers(found: Found) -> dict[str, float | None]:
    shares = {f"found_at_{round(100 * share)}": found.at(share) for share in SHARES}
    numbers = {"auroc": found.auroc, "average_precision": found.average_precision, **shares}
    return {
        **numbers,
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
        "peak_bytes": found.peak_bytes,
    }


def _record(flips: str, schedule: str, name: str, found: Sequence[Found]) -> dict[str, Any]:
    ran = [_numbers(each) for each in found if each.not_run is None]
    record: dict[str, Any] = {"flips": flips, "schedule": schedule, "method": name, "seeds": len(ran)}
    for key in _numbers(Found()):
        values = [value for numbers in ran if (value := numbers[key]) is not None]
        record[key] = statistics.fmean(values) if values else None
        record[f"{key}_sd"] = _spread(values) if values else None
    record["not_run"] = next((each.not_run for each in found if each.not_run is not None), None)
    return record


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Sequence[Any]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
