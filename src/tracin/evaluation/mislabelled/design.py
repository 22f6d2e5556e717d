"""What a study of mislabelled data does: data, model, flips, schedules, methods, seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from tracin.errors import OptionError, ResultError

__all__ = ["DATA", "FLIPS", "MODELS", "SCHEDULES", "SHARES", "CellKey", "Design", "own_file"]

DATA = ("digits", "fashion-mnist", "mnist", "cifar10")
MODELS = ("mlp", "cnn", "resnet")
FLIPS = ("random", "hardest")
SCHEDULES = ("constant", "step", "cosine", "onecycle")
SHARES = (0.1, 0.2, 0.3)
"""The shares of the rows inspected at which tables read the curves."""

OWN = "own"
"""The model and the schedule of a study file."""
_EPOCHS = {"mlp": 12, "cnn": 12, "resnet": 8}


@dataclass(frozen=True, order=True)
class CellKey:
    """One training run of a study: which flips, which schedule, which seed."""

    flips: str
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        """For file names and messages: ``random-cosine-0``."""
        return f"{self.flips}-{self.schedule}-{self.seed}"


@dataclass(frozen=True)
class Design:
    """A study: every choice that its numbers depend on, as JSON keeps it.

    Args:
        data: ``digits``, ``fashion-mnist``, ``mnist``, ``cifar10``, or the path of a study file that ends in ``.py``.
        model: ``mlp``, ``cnn`` or ``resnet``; None: ``cnn``. A study file brings its own.
        flips: ``random``: another class drawn uniformly; ``hardest``: the strongest wrong class of a model trained
            on clean labels.
        fraction: The share of the training labels that is flipped, between 0 and 1.
        schedules: ``constant``, ``step`` (a tenth after half, a hundredth after three quarters of the steps),
            ``cosine`` (to 0), ``onecycle``. None: ``constant`` and ``cosine``. A study file brings its own.
        methods: Names of methods.
        seeds: How many seeds, from 0 on: flips, initial weights, order of the rows.
        rows: How many training rows; None: 10,000, or all where there are fewer.
        epochs: Passes of the training over the rows; None: 12 for mlp and cnn, 8 for resnet, three times that on digits.
        checkpoints: How many checkpoints, evenly over the steps.
        rate: The learning rate; the highest one of a schedule.
        batch: Rows of a training step.
        repair: The shares of inspected rows after which labels are corrected and the model is trained again.
        data_folder: Where the data lies.

    Raises:
        OptionError: A value out of range, or an unknown name.

    Example:
        >>> design = Design(data="digits", methods=("tracin", "loss"), seeds=1, epochs=3)
        >>> [key.name for key in design.cells]
        ['random-constant-0', 'random-cosine-0']
        >>> Design.from_json(design.to_json()) == design
        True
    """

    data: str
    methods: tuple[str, ...]
    model: str | None = None
    flips: tuple[str, ...] = ("random",)
    fraction: float = 0.1
    schedules: tuple[str, ...] | None = None
    seeds: int = 3
    rows: int | None = None
    epochs: int | None = None
    checkpoints: int = 8
    rate: float = 0.05
    batch: int = 64
    repair: tuple[float, ...] = ()
    data_folder: str | None = None

    def __post_init__(self) -> None:
        if own_file(self.data):
            for name in ("model", "epochs", "schedules"):
                value = getattr(self, name)
                if value not in (None, (OWN,), OWN):
                    told = ", ".join(value) if isinstance(value, tuple) else value
                    raise OptionError(
                        f"{name}={told} does not apply to {self.data}: its fit() trains its own way."
                    )
            self._set(model=OWN, schedules=(OWN,))
        else:
            _known("data", (self.data,), DATA, " or a study file that ends in .py")
            self._set(model=self.model or "cnn", schedules=self.schedules or ("constant", "cosine"))
            _known("model", (self.trained,), MODELS)
            _known("schedules", self.schedules or (), SCHEDULES)
            suited = _EPOCHS[self.trained] * (
                3 if self.data == "digits" else 1
            )  # so few rows make short epochs
            self._set(epochs=suited if self.epochs is None else self.epochs)
        _known("flips", self.flips, FLIPS)
        for name in ("flips", "schedules", "methods", "repair"):
            self._set(**{name: tuple(dict.fromkeys(getattr(self, name)))})
        self._refuse_out_of_range()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _refuse_out_of_range(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise OptionError(f"fraction={self.fraction}: give the share of labels to flip, between 0 and 1.")
        if not (self.rate > 0.0 and self.rate < float("inf")):
            raise OptionError(f"rate={self.rate}: give a learning rate above 0.")
        for name in ("seeds", "rows", "epochs", "checkpoints", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: give a whole number from 1 on.")
        if self.batch < 2:
            raise OptionError("batch=1: give at least 2, since batch normalisation needs two rows.")
        for share in self.repair:
            if not 0.0 < share <= 1.0:
                raise OptionError(f"repair={share}: give shares of the rows, above 0, up to 1.")

    @property
    def trained(self) -> str:
        """The model's kind; ``own`` for that of a study file."""
        return self.model or OWN

    @property
    def cells(self) -> list[CellKey]:
        """The training runs, seed by seed, so that a study that is cut short has whole seeds."""
        return [
            CellKey(flips, schedule, seed)
            for seed in range(self.seeds)
            for flips in self.flips
            for schedule in self.schedules or ()
        ]

    def basis(self, digest: str, file: str | None = None) -> dict[str, Any]:
        """What the numbers of one cell depend on, besides its key.

        Args:
            digest: Of the data.
            file: Digest of the study file, whose model and ``fit`` are part of it; None for built-in data.

        Returns:
            Names and values, as JSON has them.
        """
        names = ("data", "model", "fraction", "epochs", "checkpoints", "rate", "batch")
        basis = {name: getattr(self, name) for name in names}
        if self.trained == OWN:
            basis = {"data": self.data, "model": OWN, "fraction": self.fraction, "file": file}
        return {**basis, "digest": digest}

    def to_json(self) -> dict[str, Any]:
        """The design as JSON keeps it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Design:
        """The design of a JSON file.

        Args:
            values: What ``to_json`` gave.

        Returns:
            The design.

        Raises:
            ResultError: Something is missing, unknown or of another type.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            odd = sorted(set(values) ^ names)
            raise ResultError(
                f"the study's design has other entries than this version writes: {', '.join(odd)}."
            )
        try:
            given: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in values.items()
            }
            return cls(**given)
        except TypeError as error:
            raise ResultError(f"the study's design cannot be read: {error}.") from error

    def placed(self, data_folder: str | None) -> Design:
        """The same design with the data somewhere else."""
        return self if data_folder is None else replace(self, data_folder=data_folder)


def own_file(data: str) -> bool:
    """Whether the data is a study file."""
    return data.endswith(".py")


def _known(argument: str, given: Sequence[str], known: Sequence[str], more: str = "") -> None:
    if not given:
        raise OptionError(f"{argument} is empty: give one or several of {', '.join(known)}.")
    for name in given:
        if name not in known:
            raise OptionError(f"{argument}={name!r} is not known. Give {', '.join(known)}{more}.")


def digest_of(*parts: bytes) -> str:
    """A short digest of some bytes."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]
