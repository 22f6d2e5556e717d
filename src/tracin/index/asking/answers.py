"""Answers of an index: the queries' features, a scan, and how far it is from exact scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tracin.data import open_rows, rows_of
from tracin.errors import MemoryLimitError, OptionError
from tracin.index.asking.estimate import SAMPLE_QUERIES, Estimate, compared, exact, reranked, sample
from tracin.index.asking.queries import (
    query_features,
    rates,
    refuse_another_method,
    summed_features,
    weighted,
)
from tracin.index.asking.scan import Scanning, Tile, merged, norm_tiles, ranges, tiles
from tracin.index.kept.contents import Contents
from tracin.index.kept.sidecar import selected_rows
from tracin.index.making.comparing import refuse_other_length, refuse_other_rows
from tracin.index.making.executors import Executor
from tracin.methods.answers import groups_record, top_k_result
from tracin.methods.grouping import group_labels
from tracin.methods.provenance import versions
from tracin.methods.tracin_cp import TracInCP
from tracin.options import whole_number
from tracin.results import Scores, SelfInfluence, TopK
from tracin.scoring.aggregate import check_reduction
from tracin.scoring.top_k import Lists, check_k
from tracin.shapes import Bool, Float

__all__ = ["Asked", "aggregate", "influence", "self_influence", "top_k"]


@dataclass(frozen=True)
class Asked:
    """A question's surroundings.

    Attributes:
        contents: The index, whole.
        method: The method that it was built with.
        train: The train rows, where they are at hand.
        where: The filter as it was given.
        mask: The rows that it keeps, bool [n]; None: all.
    """

    contents: Contents
    method: TracInCP
    train: Any
    where: Any
    mask: Bool[Tensor, " n"] | None

    @classmethod
    def of(cls, contents: Contents, method: TracInCP, train: Any, where: Any) -> Asked:
        """Check that the index is whole, and apply the filter."""
        contents.require_whole()
        refuse_another_method(method, contents.manifest, contents.storage.where)
        mask = None if where is None else selected_rows(contents.storage, contents.segments, where)
        return cls(contents, method, train, where, mask)

    @property
    def rows(self) -> Tensor:
        """Ids of the rows that are kept."""
        ids = torch.arange(self.contents.rows)
        return ids if self.mask is None else ids[self.mask]

    def features(self, queries: Any) -> Float[Tensor, "c m d"]:
        """The queries' features, weighted."""
        return self.weighted(
            query_features(self.method, self.contents.manifest, queries, self.contents.storage.where)
        )

    def weighted(self, features: Float[Tensor, "c m d"]) -> Float[Tensor, "c m d"]:
        """Features times the weights of their parameters."""
        return weighted(features, rates(self.method, self.contents.manifest), self.contents.manifest)

    def tiles(self, queries: Tensor, mask: Tensor | None) -> Iterator[Tile]:
        """Scores by row range."""
        c = self.contents
        wanted = ranges(c.manifest, c.segments)
        return tiles(c.storage, c.manifest, wanted, queries, mask, self.method.settings.normalize)

    def exact(self, rows: list[int], queries: Any) -> Float[Tensor, "m s"]:
        """Exact scores of some train rows, which are compared with those that the index was made of."""
        c, settings = self.contents, self.method.settings
        source = open_rows(self.train, name="train", batch_size=settings.batch_size, collate=settings.collate)
        refuse_other_length(c.storage, c.segments, len(source))
        refuse_other_rows(c.storage, c.manifest, c.segments, source, rows)
        return exact(self.method, self.train, rows, queries)

    def record(self, verb: str, found: Estimate | None = None) -> dict[str, Any]:
        """The provenance of an answer."""
        manifest, settings = self.contents.manifest, self.method.settings
        return {
            "method": "Index",
            "verb": verb,
            "index": manifest.digest,
            "rows": self.contents.rows,
            "projection": manifest.projection,
            "projection_error": None if found is None else found.as_json(),
            "dtype": manifest.dtype,
            "checkpoints": manifest.checkpoints,
            "weighting": settings.weighting,
            "normalize": settings.normalize,
            "where": None if self.where is None else str(self.where),
            "seed": manifest.projection["seed"],
            "scale": "sum over checkpoints of rate × product of projected gradients",
            "versions": versions(),
        }


def top_k(asked: Asked, queries: Any, k: int, *, rerank: int, estimate: bool, executor: Executor) -> TopK:
    """See ``Index.top_k``."""
    n = len(asked.rows)
    check_k(k, n)
    if rerank:
        whole_number(rerank, "rerank", k, n, why=", from k to the number of rows")
        if asked.train is None:
            raise OptionError("rerank needs the train rows: Index.open(folder, method, train).")
    features = asked.features(queries)
    high, low = _strongest(asked, features, max(k, rerank), executor)
    if rerank:
        rows = torch.cat([high.ids, low.ids], 1).unique()
        truth = asked.exact(rows.tolist(), queries)
        high = reranked(high, k, rows, truth, largest=True)
        low = reranked(low, k, rows, truth, largest=False)
    found = _estimated(asked, queries, features) if estimate else None
    record = {**asked.record("top_k", found), "k": k, "rerank": rerank}
    result = top_k_result(high, low, record, n, mend=None)
    return replace(result, notes=(*result.notes, _note(found, asked.train is not None, estimate)))


def _strongest(asked: Asked, features: Tensor, k: int, executor: Executor) -> tuple[Lists, Lists]:
    c = asked.contents
    pieces = ranges(c.manifest, c.segments)
    found: dict[int, tuple[Lists, Lists] | None] = {}
    normalize = asked.method.settings.normalize
    work = Scanning(c.storage, c.manifest, features, k, asked.mask, normalize)
    executor.run(work, pieces, found.__setitem__)
    return merged([lists for at in range(len(pieces)) if (lists := found[at]) is not None], k)


def _estimated(asked: Asked, queries: Any, features: Tensor) -> Estimate | None:
    """The error on a few rows and queries, where the train rows are at hand."""
    if asked.train is None:
        return None
    rows = sample(asked.rows)
    chosen = torch.zeros(asked.contents.rows, dtype=torch.bool)
    chosen[rows] = True
    few = range(min(features.shape[1], SAMPLE_QUERIES))
    found = torch.cat([tile.values for tile in asked.tiles(features[:, : len(few)], chosen)], 1)
    try:
        truth = asked.exact(rows.tolist(), rows_of(queries, few))
    except MemoryLimitError:  # the answer itself fits
        return None
    return compared(found, truth)


def _note(found: Estimate | None, at_hand: bool, asked_for: bool) -> str:
    if found is not None:
        return f"the index is an approximation; {found}."
    if asked_for and at_hand:
        return "the error of the index was not measured: a batch of exact scores does not fit memory=."
    if asked_for:
        return (
            "the error of the index was not measured: give the train rows, Index.open(folder, method, train)."
        )
    return "the error of the index was not measured."


def influence(asked: Asked, queries: Any, *, estimate: bool) -> Scores:
    """See ``Index.influence``."""
    features = asked.features(queries)
    found = _estimated(asked, queries, features) if estimate else None
    return _scores(asked, features, torch.arange(features.shape[1]), asked.record("influence", found))


def aggregate(asked: Asked, validation: Any, by: Any, reduction: str) -> Scores:
    """See ``Index.aggregate``."""
    check_reduction(reduction)
    method = asked.method
    last = method.trajectory[len(method.trajectory) - 1]
    labels = group_labels(method.task, last, method.settings, validation, by)
    contents = asked.contents
    sums, groups = summed_features(method, contents.manifest, validation, labels, contents.storage.where)
    sums /= groups.divisors(range(len(groups)), reduction, sums)[None, :, None]
    record = asked.record("aggregate") | groups_record(groups, by, reduction)
    return _scores(asked, asked.weighted(sums), groups.labels, record)


def _scores(asked: Asked, features: Tensor, ids: Tensor, record: dict[str, Any]) -> Scores:
    values = torch.cat([tile.values for tile in asked.tiles(features, asked.mask)], 1)
    return Scores(values=values, train_ids=asked.rows, query_ids=ids, provenance=record)


def self_influence(asked: Asked) -> SelfInfluence:
    """See ``Index.self_influence``."""
    contents = asked.contents
    if asked.method.settings.normalize:
        raise OptionError(
            "self_influence with normalize=True is the same number for every row. Use normalize=False."
        )
    weights = rates(asked.method, contents.manifest)
    values = torch.zeros(contents.rows)
    for unit, norms in norm_tiles(contents.storage, contents.manifest, contents.segments):
        own = torch.tensor([weights[unit.checkpoint][group[0]] for group in contents.manifest.groups])
        values[unit.start : unit.stop] += norms @ own
    rows = asked.rows
    return SelfInfluence(values=values[rows], train_ids=rows, provenance=asked.record("self_influence"))
