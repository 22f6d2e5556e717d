"""TracInCP: influence as gradient products summed over checkpoints (Pruthi et al. 2020)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from tracin.checkpoints import Trajectory
from tracin.data import BatchSize
from tracin.errors import AdaptiveOptimizerWarning, OptionError
from tracin.gradients.projection import Projection
from tracin.methods.answers import aggregate_result, scores_result, self_influence_result, top_k_result
from tracin.methods.grouping import group_labels
from tracin.methods.provenance import provenance
from tracin.methods.settings import check_verb, checked_settings, require_task
from tracin.methods.within import allowed_rows
from tracin.options import whole_number
from tracin.results import Scores, SelfInfluence, TopK
from tracin.scoring import aggregate, passes, top_k
from tracin.scoring.plan import Plan
from tracin.scoring.planning import plan
from tracin.scoring.run import Run, opened
from tracin.scoring.verification import Verification, verify
from tracin.tasks import Task

__all__ = ["TracInCP"]

Weighting = Literal["learning_rate", "uniform", "integrated"]
Precision = Literal["float32", "bfloat16"]
MEND = "normalize=True compares directions instead of lengths."


class TracInCP:
    r"""Influence of training rows on predictions, traced through checkpoints.

    .. math::
        \operatorname{score}(z, z') = \sum_c \eta_c \,
        \langle \nabla_\theta \ell(\theta_c, z), \nabla_\theta \ell(\theta_c, z') \rangle

    Positive: z is a proponent, training on it lowers the loss at z'. Negative: an opponent. The unit is that of the
    loss: η times a squared gradient is the first-order change of ℓ(z') by one SGD step on z (Pruthi et al. 2020,
    arXiv 2002.08484, §3.2). Train, query: a map-style dataset (batched by ``batch_size``, made by ``collate``), a
    ``DataLoader`` in order (its own batches), or a tuple or dict of tensors; ids are positions.

    Args:
        task: Model and per-example loss.
        trajectory: The checkpoints, in training order.
        weighting: ``"learning_rate"``: the rate of the last step before each checkpoint; ``"integrated"``: the sum of the
            rates since the checkpoint before; ``"uniform"``: 1.
        normalize: Cosines instead of products, so that rows with large gradients do not fill every list.
        projection: Products of a few random features in place of products of gradients: their number, or a
            ``tracin.Projection``. Scores are then unbiased estimates; under ``normalize`` cosines of features.
        batch_size: Rows per batch where the data does not batch itself; ``"auto"`` goes by what the model's forward pass
            keeps for each row. Results do not depend on it.
        collate: Makes a batch of a list of a dataset's rows.
        device: ``"auto"``: where the model lies, or the GPU if it lies on the CPU and there is one.
        memory: Bound on held gradients and tiles; more means fewer passes.
        precision: ``"float32"``: the forward and backward pass run as the model is; ``"bfloat16"``: under autocast, faster
            and less exact. Products, norms and scores are float32 or better in either case.
        progress: Show how far a run is, on standard error.

    Raises:
        OptionError: An unknown weighting, device or precision, or a value out of range.

    Warns:
        AdaptiveOptimizerWarning: The checkpoints were recorded from another optimizer than SGD.

    Example:
        >>> import tracin
        >>> model = torch.nn.Linear(2, 3)
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> checkpoint = tracin.Checkpoint(model.state_dict(), learning_rate=0.1)
        >>> method = tracin.TracInCP(task, tracin.Trajectory([checkpoint]))
        >>> rows = (torch.randn(8, 2), torch.arange(8) % 3)
        >>> method.influence(rows, (rows[0][:2], rows[1][:2])).values.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        task: Task,
        trajectory: Trajectory,
        *,
        weighting: Weighting | str = "learning_rate",
        normalize: bool = False,
        projection: Projection | int | None = None,
        batch_size: BatchSize = "auto",
        collate: Callable[[list], Any] | None = None,
        device: str | torch.device = "auto",
        memory: str | int = "2GiB",
        precision: Precision | str = "float32",
        progress: bool = True,
    ) -> None:
        if not isinstance(trajectory, Trajectory):
            raise OptionError(
                f"TracInCP: trajectory is a {type(trajectory).__name__}. Give tracin.Trajectory([checkpoint, ...])."
            )
        self.task, self.trajectory = require_task(task, "TracInCP"), trajectory
        self.settings = checked_settings(
            "TracInCP",
            weighting=weighting,
            normalize=normalize,
            projection=projection,
            batch_size=batch_size,
            collate=collate,
            device=device,
            memory=memory,
            precision=precision,
            progress=progress,
        )
        adaptive = sorted({c.optimizer for c in trajectory if c.optimizer and c.optimizer != "SGD"})
        if adaptive:
            warnings.warn(
                f"the checkpoints were recorded from {', '.join(adaptive)}: TracIn assumes plain SGD steps, so scores follow "
                "gradients, not this optimizer's updates.",
                AdaptiveOptimizerWarning,
                stacklevel=2,
            )

    def influence(self, train: Any, queries: Any) -> Scores:
        """Scores of every train row for every query.

        Args:
            train: Train rows.
            queries: Query rows, under ``task.query_loss`` where it is given.

        Returns:
            ``values`` [q, n] on the CPU, in the parameters' dtype, at least float32.

        Raises:
            OptionError: ``normalize`` with several rates in one checkpoint.
            DataError: The rows: order, length, a change between passes.
            LossError: The loss breaks its contract, or mixes rows.
            ModelError: The model mixes rows, or a checkpoint leaves nothing to trace.
            CheckpointError: A checkpoint is damaged, or of another model.
            RateError: A rate that the weighting reads is missing, negative or not finite.
            NotFiniteError: A loss or gradient is NaN or infinite; the row and parameter are named.
            UserCodeError: The model, the loss or the dataset fails.
        """
        with opened(self.task, self.trajectory, self.settings, train, queries) as run:
            values = passes.influence(run)
            return scores_result(values, self.provenance(run, "influence"))

    def top_k(
        self, train: Any, queries: Any, k: int = 10, *, within: Literal["label"] | int | None = None
    ) -> TopK:
        """The k strongest proponents and opponents of every query, without the matrix of all scores.

        Args:
            train: Train rows.
            queries: Query rows.
            k: List length.
            within: ``"label"``: only train rows of the query's label; a class number: only rows of that class.

        Returns:
            Proponents and opponents, signs kept, ties by lower id.

        Raises:
            OptionError: k is out of range, or a class has fewer than k rows; and what ``influence`` refuses.
        """
        last = self.trajectory[len(self.trajectory) - 1]
        allowed = allowed_rows(self.task, last, self.settings, train, queries, k, within)
        mend = None if self.settings.normalize else MEND
        with opened(self.task, self.trajectory, self.settings, train, queries) as run:
            high, low = top_k.top_k(run, k, allowed)
            record = {**self.provenance(run, "top_k"), "k": k, "within": within}
            return top_k_result(high, low, record, len(run.train.rows), mend=mend)

    def aggregate(
        self,
        train: Any,
        validation: Any,
        *,
        by: Any = None,
        reduction: str = "mean",
    ) -> Scores:
        """Scores of every train row for a whole validation set, or for each group of it.

        The validation rows' gradients are summed before they are multiplied: the result is the mean of the rows of
        ``influence(train, validation)``, for the price of one query for each group and in memory that does not grow with the
        validation set.

        Args:
            train: Train rows.
            validation: Rows under ``task.query_loss`` where it is given.
            by: The group of each validation row, whole numbers; ``"label"``: its label; None: all rows are one group.
            reduction: ``"mean"``: the influence on a group's mean loss; ``"sum"``: on its sum.

        Returns:
            ``values`` [groups, n]; ``query_ids`` are the groups in ascending order, 0 where ``by`` is None. Under
            ``normalize`` means of cosines.

        Raises:
            OptionError: ``by`` is no list of whole numbers, one for each row, or the task has no labels; an unknown
                ``reduction``; and what ``influence`` refuses.
        """
        aggregate.check_reduction(reduction)
        labels = self._group_labels(validation, by)
        with opened(self.task, self.trajectory, self.settings, train, validation) as run:
            groups = aggregate.Groups.of(labels, len(run.asked.rows))
            values = aggregate.aggregate(run, groups, reduction)
            return aggregate_result(values, groups, self.provenance(run, "aggregate"), by, reduction)

    def self_influence(self, train: Any) -> SelfInfluence:
        """score(z, z) of every train row: high for rows that the model must learn by heart, mislabelled ones first.

        Args:
            train: Train rows.

        Returns:
            ``values`` [n].

        Raises:
            OptionError: Under ``normalize``, where every row has the same; and what ``influence`` refuses.
        """
        with opened(self.task, self.trajectory, self.settings, train) as run:
            values = passes.self_influence(run)
            return self_influence_result(values, self.provenance(run, "self_influence"))

    def verify(self, train: Any, *, rows: int = 8, seed: int = 0) -> Verification:
        """Exactness on this model and data: random rows at every checkpoint against one-at-a-time autograd.

        Args:
            train: Train rows.
            rows: Rows to compare.
            seed: Which rows.

        Returns:
            Errors and coverage.

        Raises:
            OptionError: ``rows`` is not a positive whole number; and what ``influence`` refuses.
        """
        rows = whole_number(rows, "verify: rows", 1)
        with opened(self.task, self.trajectory, self.settings, train) as run:
            return verify(run, rows, seed)

    def plan(
        self,
        train: Any,
        queries: Any | None = None,
        *,
        verb: Literal["influence", "top_k", "self_influence", "aggregate"] | None = None,
        k: int = 10,
        by: Any = None,
    ) -> Plan:
        """Memory, time, passes and routes of a run, from one batch of each side, before it.

        Args:
            train: Train rows.
            queries: Query rows; none for ``self_influence``.
            verb: What to plan: ``"influence"`` with queries and ``"self_influence"`` without, unless given.
            k: List length of ``"top_k"``.
            by: The groups of ``"aggregate"``, as it takes them.

        Returns:
            The plan. A run that does not fit ``memory`` is told in ``ways``, not refused.

        Raises:
            OptionError: ``verb`` and queries, or ``by``, do not go together; as for the verb, with what else it refuses on
                the first batches.
        """
        chosen = check_verb(verb, queries)
        if by is not None and chosen != "aggregate":
            raise OptionError(f"plan: by is for verb='aggregate', and this plans {chosen}. Leave it out.")
        asked = queries if chosen != "self_influence" else None
        labels = None if by is None else self._group_labels(queries, by)
        with opened(self.task, self.trajectory, self.settings, train, asked) as run:
            if chosen != "aggregate":
                return plan(run, chosen, k)
            return plan(run, chosen, groups=aggregate.Groups.of(labels, len(run.asked.rows)))

    def _group_labels(self, validation: Any, by: Any) -> Tensor | None:
        last = self.trajectory[len(self.trajectory) - 1]
        return group_labels(self.task, last, self.settings, validation, by)

    def provenance(self, run: Run, verb: str) -> dict[str, Any]:
        """What a result of this method was made from.

        Args:
            run: The run, after its last checkpoint.
            verb: What it computed.

        Returns:
            A JSON-able record.
        """
        scale = "sum over checkpoints of rate × gradient product, losses as the task returns them per row"
        projection = self.settings.projection
        seed = None if projection is None else projection.seed
        record = provenance(run, method="TracInCP", verb=verb, scale=scale, seed=seed)
        return record | {"projection": None if projection is None else asdict(projection)}
