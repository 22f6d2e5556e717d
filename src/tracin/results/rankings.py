"""The strongest train rows of each query.

Axis letters: q queries · k length of a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracin.errors import ResultError
from tracin.results.saving import (
    assign,
    build,
    check_ids,
    check_provenance,
    check_values,
    count,
    describe,
    dtype_name,
    import_pandas,
    read,
    write,
)
from tracin.shapes import Float, Int

if TYPE_CHECKING:
    from pandas import DataFrame
else:
    DataFrame = Any

__all__ = ["Ranking", "TopK"]


@dataclass(frozen=True, eq=False, repr=False)
class Ranking:
    """A ranked list of train rows for each query.

    Args:
        ids: [q, k], train ids, the strongest first; ties by lower id.
        values: [q, k], their scores, signs kept.

    Raises:
        ResultError: The shapes do not agree.
    """

    ids: Int[Tensor, "q k"]
    values: Float[Tensor, "q k"]

    def __post_init__(self) -> None:
        values = check_values(self.values, 2, "Ranking.values", "[q, k]")
        assign(self, values=values, ids=check_ids(self.ids, tuple(values.shape), "Ranking.ids", "value"))

    def __repr__(self) -> str:
        queries, k = self.values.shape
        return f"Ranking({count(queries, 'query')} × {k}, {dtype_name(self.values)})"


@dataclass(frozen=True, eq=False, repr=False)
class TopK:
    """The k strongest proponents and opponents of each query.

    Args:
        proponents: The k largest scores of each query, the largest first.
        opponents: The k smallest, the smallest first.
        query_ids: [q].
        provenance: What made these numbers, as JSON would hold it.
        notes: Sentences to read with the lists, such as that a few rows fill all of them.

    Raises:
        ResultError: The shapes do not agree, or the provenance is not JSON.

    Example:
        >>> top = TopK(
        ...     proponents=Ranking(torch.tensor([[2, 0]]), torch.tensor([[2.0, 0.5]])),
        ...     opponents=Ranking(torch.tensor([[1, 0]]), torch.tensor([[-1.0, 0.5]])),
        ...     query_ids=torch.tensor([17]),
        ... )
        >>> top
        TopK(1 query, k=2, float32)
        >>> top.to_pandas()
           query  rank       sign  train  score
        0     17     1  proponent      2    2.0
        1     17     2  proponent      0    0.5
        2     17     1   opponent      1   -1.0
        3     17     2   opponent      0    0.5
    """

    proponents: Ranking
    opponents: Ranking
    query_ids: Int[Tensor, " q"]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, ranking in (("proponents", self.proponents), ("opponents", self.opponents)):
            if not isinstance(ranking, Ranking):
                raise ResultError(f"TopK.{name} is a {type(ranking).__name__}, not a Ranking(ids, values).")
        shape, other = tuple(self.proponents.values.shape), tuple(self.opponents.values.shape)
        if shape != other:
            raise ResultError(
                f"TopK: proponents are {list(shape)} and opponents {list(other)}; both are [q, k]."
            )
        assign(
            self,
            query_ids=check_ids(self.query_ids, shape[:1], "TopK.query_ids", "query"),
            provenance=check_provenance(self.provenance),
            notes=tuple(self.notes),
        )

    def __repr__(self) -> str:
        queries, k = self.proponents.values.shape
        return describe(self, f"{count(queries, 'query')}, k={k}", self.proponents.values)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically.

        Args:
            path: The file; a missing folder is made.
        """
        tensors = {
            "proponents.ids": self.proponents.ids,
            "proponents.values": self.proponents.values,
            "opponents.ids": self.opponents.ids,
            "opponents.values": self.opponents.values,
            "query_ids": self.query_ids,
        }
        write(path, self, tensors, notes=list(self.notes))

    @classmethod
    def load(cls, path: str | Path) -> TopK:
        """Read what ``save`` wrote, bit for bit.

        Args:
            path: The file.

        Returns:
            The lists.
        """
        names = ("proponents.ids", "proponents.values", "opponents.ids", "opponents.values", "query_ids")
        tensors, fields = read(path, cls, names)
        rankings = {
            side: build(
                path, Ranking, {"ids": tensors[f"{side}.ids"], "values": tensors[f"{side}.values"]}, {}
            )
            for side in ("proponents", "opponents")
        }
        return build(path, cls, {**rankings, "query_ids": tensors["query_ids"]}, fields)

    def to_pandas(self) -> DataFrame:
        """As a tidy table: ``query``, ``rank`` (from 1), ``sign``, ``train``, ``score``.

        Returns:
            A ``pandas.DataFrame``; for each query its proponents, then its opponents.
        """
        queries, k = self.proponents.values.shape
        ids = torch.cat([self.proponents.ids, self.opponents.ids], dim=1)
        values = torch.cat([self.proponents.values, self.opponents.values], dim=1)
        return import_pandas().DataFrame(
            {
                "query": self.query_ids.repeat_interleave(2 * k).numpy(),
                "rank": torch.arange(1, k + 1).repeat(2 * queries).numpy(),
                "sign": (["proponent"] * k + ["opponent"] * k) * queries,
                "train": ids.flatten().numpy(),
                "score": values.flatten().numpy(),
            }
        )
