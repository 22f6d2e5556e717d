"""Every train row against every query.

Axis letters: n train rows · q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

__all__ = ["Scores"]


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    r"""The influence of every train row on every query, ``values[j, i] = score(train i, query j)``.

    Positive: a proponent, training on it lowers the query's loss. Negative: an opponent.

    Args:
        values: [q, n], float32 or float64.
        train_ids: [n], the positions of the train rows in the training set.
        query_ids: [q], the positions of the queries.
        provenance: What made these numbers, as JSON would hold it.

    Raises:
        ResultError: The shapes do not agree, or the provenance is not JSON.

    Example:
        >>> import torch
        >>> scores = Scores(
        ...     values=torch.tensor([[0.5, -1.0, 2.0]]),
        ...     train_ids=torch.arange(3),
        ...     query_ids=torch.tensor([17]),
        ...     provenance={"method": "TracInCP"},
        ... )
        >>> scores
        Scores(1 query × 3 train rows, float32, TracInCP)
        >>> scores.to_pandas()
        train    0    1    2
        query
        17     0.5 -1.0  2.0
    """

    values: Float[Tensor, "q n"]
    train_ids: Int[Tensor, " n"]
    query_ids: Int[Tensor, " q"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = check_values(self.values, 2, "Scores.values", "[q, n]")
        assign(
            self,
            values=values,
            train_ids=check_ids(self.train_ids, (values.shape[1],), "Scores.train_ids", "train row"),
            query_ids=check_ids(self.query_ids, (values.shape[0],), "Scores.query_ids", "query"),
            provenance=check_provenance(self.provenance),
        )

    def __repr__(self) -> str:
        queries, rows = self.values.shape
        size = f"{count(queries, 'query')} × {count(rows, 'train row')}"
        return describe(self, size, self.values)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Args:
            path: The file; a missing folder is made.

        What cannot be written raises ``ResultError``.
        """
        tensors = {"values": self.values, "train_ids": self.train_ids, "query_ids": self.query_ids}
        write(path, self, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what ``save`` wrote, bit for bit.

        Args:
            path: The file.

        Returns:
            The scores.
        """
        tensors, fields = read(path, cls, ("values", "train_ids", "query_ids"))
        return build(path, cls, tensors, fields)

    def to_pandas(self) -> DataFrame:
        """As a table [q, n]: a row per query id, a column per train id.

        Returns:
            A ``pandas.DataFrame`` with its own copy of the values.
        """
        pd = import_pandas()
        return pd.DataFrame(
            self.values.numpy(),
            index=pd.Index(self.query_ids.numpy(), name="query", copy=True),
            columns=pd.Index(self.train_ids.numpy(), name="train", copy=True),
            copy=True,
        )
