"""Every train row against itself.

Axis letter: n train rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracin.results.saving import (
    assign,
    build,
    check_ids,
    check_provenance,
    check_values,
    count,
    describe,
    import_pandas,
    read,
    write,
)
from tracin.shapes import Float, Int

if TYPE_CHECKING:
    from pandas import DataFrame
else:
    DataFrame = Any

__all__ = ["SelfInfluence"]


@dataclass(frozen=True, eq=False, repr=False)
class SelfInfluence:
    r"""The influence of every train row on its own loss, ``score(z, z)``.

    It is large where the model had to learn a row by heart: a wrong label, a rare or an odd row.

    Args:
        values: [n], float32 or float64.
        train_ids: [n], the positions of the train rows in the training set.
        provenance: What made these numbers, as JSON would hold it.

    Raises:
        ResultError: The shapes do not agree, or the provenance is not JSON.

    Example:
        >>> own = SelfInfluence(values=torch.tensor([0.1, 3.0, 0.1]), train_ids=torch.tensor([5, 6, 7]))
        >>> own.ranking()
        tensor([6, 5, 7])
        >>> own.to_pandas()
           train  score  rank
        0      5    0.1     2
        1      6    3.0     1
        2      7    0.1     3
    """

    values: Float[Tensor, " n"]
    train_ids: Int[Tensor, " n"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = check_values(self.values, 1, "SelfInfluence.values", "[n]")
        assign(
            self,
            values=values,
            train_ids=check_ids(self.train_ids, tuple(values.shape), "SelfInfluence.train_ids", "train row"),
            provenance=check_provenance(self.provenance),
        )

    def __repr__(self) -> str:
        return describe(self, count(len(self.values), "train row"), self.values)

    def ranking(self) -> Int[Tensor, " n"]:
        """The train ids by descending value, ties by lower id.

        Returns:
            [n]: the suspects first.
        """
        return self.train_ids[self._order()]

    def _order(self) -> Tensor:
        by_id = torch.argsort(self.train_ids, stable=True)
        return by_id[torch.argsort(self.values[by_id], descending=True, stable=True)]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Args:
            path: The file; a missing folder is made.
        """
        write(path, self, {"values": self.values, "train_ids": self.train_ids})

    @classmethod
    def load(cls, path: str | Path) -> SelfInfluence:
        """Read what ``save`` wrote, bit for bit.

        Args:
            path: The file.

        Returns:
            The self-influence.
        """
        tensors, fields = read(path, cls, ("values", "train_ids"))
        return build(path, cls, tensors, fields)

    def to_pandas(self) -> DataFrame:
        """As a table: ``train``, ``score``, ``rank`` (from 1), in the order of the rows.

        Returns:
            A ``pandas.DataFrame``.
        """
        rank = torch.empty(len(self.values), dtype=torch.int64)
        rank[self._order()] = torch.arange(1, len(self.values) + 1)
        columns = {"train": self.train_ids, "score": self.values, "rank": rank}
        return import_pandas().DataFrame({name: column.clone().numpy() for name, column in columns.items()})
