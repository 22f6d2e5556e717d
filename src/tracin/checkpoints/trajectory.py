"""The checkpoints of one run, in order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsFloat, overload

from torch import Tensor

from tracin.checkpoints.checkpoint import Checkpoint
from tracin.checkpoints.record import Record, read_record
from tracin.checkpoints.selection import Advice, advise
from tracin.errors import CheckpointError, OptionError, RateError
from tracin.files import require_file

__all__ = ["Trajectory", "natural_key"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
Rate = SupportsFloat | Mapping[str, SupportsFloat] | None


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key that reads numbers as numbers.

    Args:
        name: A file name.

    Returns:
        A tuple that compares with those of other names.

    Example:
        >>> sorted(["ckpt-10.pt", "ckpt-2.pt", "ckpt-1.pt"], key=natural_key)
        ['ckpt-1.pt', 'ckpt-2.pt', 'ckpt-10.pt']
    """
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if at % 2 else part.casefold() for at, part in enumerate(parts))


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory(Sequence[Checkpoint]):
    r"""The checkpoints :math:`\theta_1, \theta_2, \ldots` of a training run, over which TracIn sums. A sequence.

    Args:
        checkpoints: In the order of training.
        advice: Why these were kept, where ``select(losses=...)`` chose them.

    Raises:
        CheckpointError: There is none, or one of them is not a ``Checkpoint``.

    Example:
        >>> import torch
        >>> states = [{"weight": torch.zeros(1)}, {"weight": torch.ones(1)}]
        >>> trajectory = Trajectory([Checkpoint(s, learning_rate=0.1, step=i) for i, s in enumerate(states)])
        >>> trajectory
        Trajectory(2 checkpoints, steps 0 to 1)
        >>> trajectory[-1].name
        'checkpoint at step 1'
    """

    checkpoints: Sequence[Checkpoint]
    advice: Advice | None = None

    def __post_init__(self) -> None:
        checkpoints = tuple(self.checkpoints)
        if not checkpoints:
            raise CheckpointError(
                "Trajectory: there are no checkpoints. Give at least one Checkpoint(state, …)."
            )
        for at, checkpoint in enumerate(checkpoints):
            if not isinstance(checkpoint, Checkpoint):
                raise CheckpointError(
                    f"Trajectory: number {at} is a {type(checkpoint).__name__}, not a Checkpoint. "
                    "Wrap it, Checkpoint(state, learning_rate=…), or use Trajectory.from_files for paths."
                )
        object.__setattr__(self, "checkpoints", checkpoints)

    @overload
    def __getitem__(self, index: int) -> Checkpoint: ...
    @overload
    def __getitem__(self, index: slice) -> Trajectory: ...
    def __getitem__(self, index: int | slice) -> Checkpoint | Trajectory:
        if isinstance(index, slice):
            return Trajectory(self.checkpoints[index])
        return self.checkpoints[index]

    @property
    def steps(self) -> list[int]:
        """The step of each checkpoint, or its place from 1 on where a step is unknown."""
        steps = [checkpoint.step for checkpoint in self.checkpoints if checkpoint.step is not None]
        return steps if len(steps) == len(self.checkpoints) else list(range(1, len(self.checkpoints) + 1))

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __repr__(self) -> str:
        count = f"{len(self)} checkpoint{'s' if len(self) > 1 else ''}"
        steps = [checkpoint.step for checkpoint in self if checkpoint.step is not None]
        if len(steps) < len(self):
            return f"Trajectory({count})"
        return f"Trajectory({count}, steps {steps[0]} to {steps[-1]})"

    @classmethod
    def from_folder(cls, folder: str | Path, key: str | None = None) -> Trajectory:
        """The checkpoints in a folder: by recorded step, else in the natural order of their names.

        Files ending in ``.safetensors``, ``.pt``, ``.pth`` or ``.ckpt`` count. Those that ``CheckpointRecorder``
        wrote bring their rates; others have none, which only ``weighting="uniform"`` does without.

        Args:
            folder: The folder.
            key: Where the state is inside a ``torch.save`` file, when it is not found by itself.

        Returns:
            The trajectory.

        Raises:
            CheckpointError: The folder is missing or holds no checkpoint; a record lacks its tensors or is damaged;
                two files have one step or one place in the order.
        """
        folder = Path(folder)
        paths, jsons = _list(folder)
        if not paths:
            endings = ", ".join(SUFFIXES)
            raise CheckpointError(f"{folder} holds no checkpoint: no file ends in {endings}. Check the path.")
        records = {path: read_record(path) if path.suffix == ".safetensors" else None for path in paths}
        for path in jsons:
            # A JSON file beside a checkpoint was read above; one without may be a record that lost its tensors.
            if path.with_suffix(".safetensors") not in records and path.name.startswith("step-"):
                read_record(path)
        paths.sort(key=lambda path: natural_key(path.name))
        _refuse_equal(
            folder, [(natural_key(path.stem), path.name) for path in paths], "the same place in the order"
        )
        steps = [(record.step, path) for path, record in records.items() if record]
        _refuse_equal(folder, [(step, path.name) for step, path in steps], "the same recorded step")
        if len(steps) == len(paths):
            paths = [path for _, path in sorted(steps)]
        elif [path for _, path in sorted(steps)] != [path for path in paths if records[path]]:
            raise CheckpointError(
                f"{folder}: some files have a record and some have none, and the order of their names is not that of "
                "the recorded steps. Put them into two folders, or give the order with Trajectory.from_files."
            )
        return cls([_recorded(path, records[path], key) for path in paths])

    @classmethod
    def from_files(
        cls,
        paths: Iterable[str | Path],
        learning_rates: Rate | Iterable[Rate],
        key: str | None = None,
    ) -> Trajectory:
        """The checkpoints in the files given, in that order.

        Args:
            paths: Safetensors files, or what ``torch.save`` wrote: a state, or a dict that holds one as
                ``state_dict``, ``model_state_dict`` or ``model``. Prefixes of wrappers are removed.
            learning_rates: One per file, each a number or ``{parameter: number}``; one for all of them; or
                None, which only ``weighting="uniform"`` does without.
            key: Where the state is inside a ``torch.save`` file, when it is not found by itself.

        Returns:
            The trajectory.

        Raises:
            CheckpointError: There is no path, or a file is missing or empty.
            RateError: There are not as many rates as files.
        """
        if isinstance(paths, str | Path):
            raise CheckpointError(f"Trajectory.from_files: paths is one path, {paths}. Give a list of paths.")
        files = [Path(path) for path in paths]
        for file in files:
            require_file(file, CheckpointError)
        given: Any = learning_rates
        many = isinstance(given, Iterable) and not isinstance(given, Mapping)
        rates: list[Any] = list(given) if many else [given] * len(files)
        if len(rates) != len(files):
            raise RateError(
                f"Trajectory.from_files: {len(files)} files and {len(rates)} learning rates. Give one rate per file."
            )
        return cls(
            [Checkpoint(file, learning_rate=rate, key=key) for file, rate in zip(files, rates, strict=True)]
        )

    def select(
        self,
        keep: slice | Iterable[int] | Callable[[Checkpoint], bool] | None = None,
        *,
        losses: Tensor | Sequence[float] | None = None,
    ) -> Trajectory:
        """A thinner trajectory, whose sums of rates still cover the whole run up to its last checkpoint.

        A checkpoint that is left out hands its ``learning_rate_sum`` to the next one kept, so that
        ``weighting="integrated"`` counts every step; where one of the sums is unknown, so is the total. A slice,
        ``trajectory[1:]``, leaves out the steps too.

        Args:
            keep: Positions, a slice of them, or a function that says whether to keep a checkpoint.
            losses: Instead: the mean loss at each checkpoint [c], or of each row [c, n]. Kept is the part of the run in
                which it falls, without the first fluctuations and the flat tail; ``advice`` of the result says why.

        Returns:
            The checkpoints kept, in their order.

        Raises:
            OptionError: A position that does not exist, not as many losses as checkpoints, or both arguments or none.

        Example:
            >>> import torch
            >>> sums = (0.5, 0.25, 0.125)
            >>> trajectory = Trajectory([Checkpoint({"w": torch.ones(1)}, learning_rate_sum=s) for s in sums])
            >>> [checkpoint.learning_rate_sum for checkpoint in trajectory.select([0, 2])]
            [0.5, 0.375]
            >>> trajectory.select(losses=[0.9, 0.3, 0.299]).advice.kept
            (0, 1)
        """
        if (keep is None) == (losses is None):
            raise OptionError(
                "Trajectory.select: give positions to keep, or losses= to go by, one of the two."
            )
        advice = None if losses is None else advise(losses)
        if advice is not None and len(advice.losses) != len(self):
            raise OptionError(
                f"Trajectory.select: losses of {len(advice.losses)} checkpoints for a trajectory of {len(self)}. Give the mean "
                "loss at each of them [c], such as evaluate(task, trajectory, train).losses."
            )
        positions = self._positions(keep) if advice is None else set(advice.kept)
        kept, skipped = [], []
        for at, checkpoint in enumerate(self):
            skipped.append(checkpoint.learning_rate_sum)
            if at in positions:
                kept.append(replace(checkpoint, learning_rate_sum=_total(skipped)))
                skipped = []
        return Trajectory(kept, advice)

    def _positions(self, keep: Any) -> set[int]:
        if callable(keep):
            return {at for at, checkpoint in enumerate(self) if keep(checkpoint)}
        if isinstance(keep, slice):
            return set(range(len(self))[keep])
        wanted = list(keep)
        outside = [at for at in wanted if not -len(self) <= at < len(self)]
        if outside:
            raise OptionError(f"Trajectory.select: no position {outside[0]} among {len(self)} checkpoints.")
        return {at % len(self) for at in wanted}

    def describe(self) -> list[dict[str, Any]]:
        """What the checkpoints are, as JSON holds it.

        Returns:
            For each: name, step, learning_rate, learning_rate_sum, optimizer.
        """
        fields = ("name", "step", "learning_rate", "learning_rate_sum", "optimizer")
        return [{field: getattr(checkpoint, field) for field in fields} for checkpoint in self]

    def fingerprint(self) -> str:
        """A hash of names, steps and rates, the same in every process.

        Returns:
            16 hexadecimal digits.
        """
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]


def _list(folder: Path) -> tuple[list[Path], list[Path]]:
    try:
        files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except OSError as cause:
        raise CheckpointError(f"{folder} cannot be read as a folder: {cause}. Check the path.") from cause
    paths = [path for path in files if path.suffix in SUFFIXES]
    return paths, [path for path in files if path.suffix == ".json"]


def _refuse_equal(folder: Path, places: Iterable[tuple[Any, str]], what: str) -> None:
    seen: dict[Any, str] = {}
    for place, name in places:
        if place in seen:
            raise CheckpointError(
                f"{folder}: {seen[place]} and {name} have {what}. Remove one, or use Trajectory.from_files."
            )
        seen[place] = name


def _recorded(path: Path, record: Record | None, key: str | None) -> Checkpoint:
    if record is None:
        return Checkpoint(path, key=None if path.suffix == ".safetensors" else key)
    return Checkpoint(
        path,
        learning_rate=record.rates("learning_rate"),
        step=record.step,
        learning_rate_sum=record.rates("learning_rate_sum"),
        optimizer=record.optimizer,
    )


def _total(sums: Sequence[Any]) -> Any:
    """The sum of rates that may each be one number or one per parameter; unknown where one of them is."""
    if len(sums) == 1:
        return sums[0]
    known = [rate for rate in sums if rate is not None]
    if len(known) < len(sums):
        return None
    numbers = sum(rate for rate in known if not isinstance(rate, Mapping))
    tables = [rate for rate in known if isinstance(rate, Mapping)]
    if not tables:
        return numbers
    shared = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: numbers + sum(table[name] for table in tables) for name in shared}
