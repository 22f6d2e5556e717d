"""The flips of a study: of each kind and seed the same ones under every schedule and for every method."""

from __future__ import annotations

import json
from pathlib import Path

from tracin.errors import ResultError
from tracin.evaluation.flips import Flips, plant_flips, plant_hardest_flips
from tracin.evaluation.mislabelled.data import StudyData
from tracin.evaluation.mislabelled.design import OWN, Design, digest_of
from tracin.evaluation.mislabelled.training import Trainer
from tracin.files import read_tensors, write_tensors
from tracin.scoring.evaluation import evaluate

__all__ = ["Planter"]

_CLEAN_SCHEDULE = "cosine"


class Planter:
    """Plants flips, and keeps those that take a training.

    Args:
        design: Kinds and fraction.
        data: The rows.
        trainer: Trains on the true labels for ``hardest``, under a cosine schedule, or as a study file does.
        folder: Where to keep flips.
    """

    def __init__(self, design: Design, data: StudyData, trainer: Trainer, folder: Path) -> None:
        self.design, self.data, self.trainer, self.folder = design, data, trainer, folder

    def flips(self, kind: str, seed: int) -> Flips:
        """The flips of a kind.

        Args:
            kind: ``random`` or ``hardest``.
            seed: Which rows, and which wrong class or which model.

        Returns:
            The labels, and which of them are wrong.
        """
        if kind == "random":
            return plant_flips(self.data.train[1], self.design.fraction, classes=self.data.classes, seed=seed)
        path = self.folder / f"flips-{kind}-{seed}.safetensors"
        basis = digest_of(
            json.dumps(self.design.basis(self.data.digest, self.data.file), sort_keys=True).encode()
        )
        if path.exists():
            kept, header = read_tensors(path, ResultError)
            if header.get("basis") == basis:
                return Flips(kept["labels"], kept["mask"])
        found = self._hardest(seed)
        write_tensors(path, found._asdict(), {"basis": basis}, error=ResultError)
        return found

    def _hardest(self, seed: int) -> Flips:
        schedule = OWN if self.data.own is not None else _CLEAN_SCHEDULE
        clean = self.trainer.last(self.data.train, seed, schedule=schedule)
        where = str(self.trainer.device)
        found = evaluate(self.trainer.task(), clean, self.data.train, name="train", device=where)
        assert found.logits is not None
        return plant_hardest_flips(self.data.train[1], found.logits[-1], self.design.fraction, seed=seed)
