"""Runs a study cell by cell; what is finished is kept, and the same call goes on where it was cut short."""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.errors import (
    DataError,
    LossError,
    MissingExtraError,
    ModelError,
    OptionError,
    RateError,
    ResultError,
    TracinError,
)
from tracin.evaluation.flips import Flips, flip_count
from tracin.evaluation.mislabelled.clock import Clock, span
from tracin.evaluation.mislabelled.data import Rows, StudyData
from tracin.evaluation.mislabelled.design import CellKey, Design, digest_of
from tracin.evaluation.mislabelled.measure import measured
from tracin.evaluation.mislabelled.planting import Planter
from tracin.evaluation.mislabelled.registry import METHODS, Context, named
from tracin.evaluation.mislabelled.repair import repair
from tracin.evaluation.mislabelled.result import Cell, Found, StudyResult, found_of, read_json
from tracin.evaluation.mislabelled.training import Trainer
from tracin.files import read_tensors, write_tensors, write_text
from tracin.methods.provenance import versions

__all__ = ["run_study"]

Tell = Callable[[str], None]
_REFUSALS = (DataError, LossError, MissingExtraError, ModelError, OptionError, RateError)
_EPOCHS = 10  # for the time left, where a study file trains its own way


def run_study(
    design: Design,
    data: StudyData,
    folder: Path,
    *,
    device: str = "auto",
    memory: str = "2GiB",
    tell: Tell | None = None,
) -> StudyResult:
    """Plant flips, train, run every method on the same checkpoints, and judge what each ranks first.

    Methods run one after the other. Those that read the same pass, such as the three weightings, share it, and each is
    charged for it; one that reads the last checkpoint alone, for that checkpoint's part of it. After each method
    the cell is written to ``folder/cells``; called again with the same folder, the study goes on from there. A method
    that refuses, or lacks a package, is kept with its reason and tried again by the next call; so is one that fails with
    another error of tracin, whose kind is then named. Any other exception is a mistake in the code, and ends the study.

    Args:
        design: What to do.
        data: The rows, of ``read_data`` or ``own_data``.
        folder: Where the cells are kept.
        device: ``auto``, or where to train and to run the methods.
        memory: Bound on gradients held by a method.
        tell: Takes a line about each thing done.

    Returns:
        The study.

    Raises:
        OptionError: The folder has cells of another study.
    """
    named(design.methods)
    return _Runner(design, data, folder, device, memory, tell or (lambda _: None)).run()


class _Runner:
    def __init__(
        self, design: Design, data: StudyData, folder: Path, device: str, memory: str, tell: Tell
    ) -> None:
        self.design, self.data, self.tell = design, data, tell
        self.device, self.memory = device, memory
        self.cells = folder / "cells"
        self.basis = design.basis(data.digest, data.file)
        self.trainer = Trainer(design, data, device)
        self.planter = Planter(design, data, self.trainer, self.cells)
        self.training = float(design.epochs or _EPOCHS)

    def run(self) -> StudyResult:
        kept = {key: self._kept(key) for key in self.design.cells}
        todo = [key for key in self.design.cells if self._missing(kept[key])]
        self.clock = Clock(
            math.fsum(self._passes(kept[key]) for key in todo), self.trainer.seconds_per_pass()
        )
        self._tell_plan(kept, todo)
        done = []
        for number, key in enumerate(self.design.cells, start=1):
            cell = kept[key]
            if key in todo:
                cell = self._cell(key, cell)
                self.tell(f"{number} of {len(self.design.cells)} training runs done{self.clock.told()}")
            assert cell is not None
            done.append(cell)
        return StudyResult(self.design, made_with(self.trainer.device), done)

    def _path(self, key: CellKey, end: str = ".json") -> Path:
        return self.cells / f"{key.name}{end}"

    def _kept(self, key: CellKey) -> Cell | None:
        path = self._path(key)
        if not path.exists():
            return None
        cell = Cell.from_json(read_json(path, "Remove it: the study makes it again."))
        if cell.basis != self.basis:
            odd = [name for name in self.basis if cell.basis.get(name) != self.basis[name]]
            told = ", ".join(f"{name} was {cell.basis.get(name)} and is {self.basis[name]}" for name in odd)
            raise OptionError(
                f"{path} is of another study: {told}. Choose another folder, or remove the file."
            )
        return cell

    def _save(self, cell: Cell) -> None:
        write_text(self._path(cell.key), json.dumps(cell.to_json(), indent=1) + "\n")

    def _missing(self, cell: Cell | None) -> bool:
        if cell is None:
            return True
        found = [cell.found.get(name) for name in self.design.methods]
        ran = [
            name for name in self.design.methods if name in cell.found and cell.found[name].not_run is None
        ]
        repaired = {(each.order, each.share) for each in cell.repaired}
        wanted = {(name, share) for name in ran for share in self.design.repair}
        return any(each is None or each.not_run is not None for each in found) or not wanted <= repaired

    def _passes(self, cell: Cell | None) -> float:
        """About how many passes over the rows a cell still takes."""
        open_ = [name for name in self.design.methods if cell is None or name not in cell.found]
        work = sum(self._cost(name) for name in open_)
        repaired = 0 if cell is None else len(cell.repaired)
        repairs = (
            len(self.design.repair) * (len(self.design.methods) + 1) - repaired if self.design.repair else 0
        )
        return work + self.training * (1 + max(repairs, 0))

    def _cost(self, name: str) -> float:
        """About how many passes over the rows a method takes."""
        return METHODS[name].cost.passes(self.design.checkpoints, self.design.epochs or _EPOCHS)

    def _tell_plan(self, kept: dict[CellKey, Cell | None], todo: list[CellKey]) -> None:
        n = len(self.data.train[1])
        planted = flip_count(n, self.design.fraction)
        self.tell(
            f"{self.data.name}: {n:,} training rows, {planted:,} of them to be flipped; {len(self.data.test[1]):,} test rows."
        )
        there = len(kept) - len(todo)
        more = f", {there} of them there already" if there else ""
        self.tell(
            f"{len(kept)} training runs{more}, {len(self.design.methods)} methods on each{self.clock.told()}."
        )

    def _cell(self, key: CellKey, cell: Cell | None) -> Cell:
        flips = self.planter.flips(key.flips, key.seed)
        rows = (self.data.train[0], flips.labels)
        if cell is not None:
            self._scores(key, cell)  # a damaged file is told before anything is trained
        cell, trajectory = self._trained(key, cell, rows, flips)
        self.tell(
            f"{key.flips} flips, {key.schedule} schedule, seed {key.seed}: trained in {span(cell.train_seconds)}, "
            f"{100 * cell.accuracy:.1f} % of the test rows right{self.clock.told()}"
        )
        context, scores = self._context(key, rows, trajectory), self._scores(key, cell)
        for name in self.design.methods:
            if name in scores:
                continue
            cell.found[name], values = self._method(name, context, flips.mask)
            if values is not None:
                scores[name] = values
                known = {**scores, "labels": flips.labels, "true_labels": self.data.train[1]}
                write_tensors(self._path(key, ".safetensors"), known, {}, error=ResultError)
            self._save(cell)
            self.clock.did(self._cost(name))
            self.tell(f"  {told(name, cell.found[name])}{self.clock.told()}")
        if self.design.repair:
            for line in repair(cell, scores, flips, self.data.train[1], self.trainer, self.design):
                self._save(cell)
                self.clock.did(self.training)
                self.tell(f"  {line}{self.clock.told()}")
        self._discard(key)
        return cell

    def _scores(self, key: CellKey, cell: Cell) -> dict[str, Tensor]:
        path = self._path(key, ".safetensors")
        if not path.exists() or not cell.found:
            return {}
        try:
            kept, _ = read_tensors(path, ResultError)
        except ResultError as error:
            raise ResultError(
                f"{error} Or remove {path} and {self._path(key)}: the study makes them again."
            ) from error
        return {
            name: kept[name] for name, found in cell.found.items() if found.not_run is None and name in kept
        }

    def _context(self, key: CellKey, rows: Rows, trajectory: Trajectory) -> Context:
        return Context(
            task=self.trainer.task(key.seed),
            trajectory=trajectory,
            train=rows,
            classes=self.data.classes,
            seed=key.seed,
            fit=partial(self.trainer.last, schedule=key.schedule),
            device=self.device,
            memory=self.memory,
        )

    def _trained(self, key: CellKey, cell: Cell | None, rows: Rows, flips: Flips) -> tuple[Cell, Trajectory]:
        """The checkpoints of a cell: those in its folder where the training was finished, else trained anew."""
        folder, unfinished = self._path(key, ""), self._path(key, ".training")
        if cell is not None and self.data.own is None and folder.is_dir():
            self.clock.skip(self.training)
            return cell, Trajectory.from_folder(folder)
        for old in (folder, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        start = time.perf_counter()
        trajectory = self.trainer.train(rows, unfinished, schedule=key.schedule, seed=key.seed)
        seconds = time.perf_counter() - start
        if self.data.own is None:
            unfinished.rename(folder)
            trajectory = Trajectory.from_folder(folder)
        fresh = self._fresh(key, trajectory, flips, seconds)
        self.clock.did(self.training)
        if cell is not None and cell.weights == fresh.weights:
            return cell, trajectory
        if cell is not None:
            self.tell(
                "  other weights than when this run was first trained (another processor or number of threads): all its "
                "methods run again"
            )
        self._save(fresh)
        return fresh, trajectory

    def _fresh(self, key: CellKey, trajectory: Trajectory, flips: Flips, seconds: float) -> Cell:
        rates = ("step", "learning_rate", "learning_rate_sum")
        state = trajectory[-1].load()
        weights = (state[name].detach().cpu().contiguous() for name in sorted(state))
        return Cell(
            flips=key.flips,
            schedule=key.schedule,
            seed=key.seed,
            basis=self.basis,
            weights=digest_of(*(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in weights)),
            rows=len(flips.mask),
            planted=int(flips.mask.sum()),
            accuracy=self.trainer.accuracy(trajectory),
            train_seconds=seconds,
            checkpoints=[{name: described[name] for name in rates} for described in trajectory.describe()],
        )

    def _method(self, name: str, context: Context, planted: Tensor) -> tuple[Found, Tensor | None]:
        method = METHODS[name]
        try:
            if method.reads is not None:
                context.read(method.reads)
            with measured() as taken:
                scores = method.score(context).detach().cpu().double()
        except TracinError as error:
            return Found(not_run=_reason(error)), None
        if method.reads is not None:
            share = 1 / len(context.trajectory) if method.last_alone else 1.0
            taken = taken.after(context.shared[method.reads][1], share)
        return found_of(scores, planted, taken), scores

    def _discard(self, key: CellKey) -> None:
        folder, unfinished = self._path(key, ""), self._path(key, ".training")
        if folder.is_dir():
            folder.rename(unfinished)  # in one move, so that a folder of this name is always whole
        shutil.rmtree(unfinished, ignore_errors=True)


def _reason(error: TracinError) -> str:
    """Why a method did not run; an error that is no refusal is named, so that nobody takes it for one."""
    told = " ".join(str(error).split())
    return told if isinstance(error, _REFUSALS) else f"{type(error).__name__}: {told}"


def made_with(device: torch.device) -> dict[str, Any]:
    """Where a study ran."""
    return {
        **versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def told(name: str, found: Found) -> str:
    """A line about what a method found."""
    if found.not_run is not None:
        return f"{name}: not run: {found.not_run}"
    assert found.auroc is not None
    assert found.seconds is not None
    share = found.at(0.2) or 0.0
    return f"{name}: AUROC {found.auroc:.3f}, {100 * share:.0f} % found at 20 %, {found.seconds:.1f} s"
