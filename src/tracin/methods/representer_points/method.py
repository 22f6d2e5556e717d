"""Representer points: a prediction as a sum over the training rows, through the last layer (Yeh et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracin.checkpoints import Checkpoint, Trajectory
from tracin.data import BatchSize, open_rows
from tracin.errors import OptionError
from tracin.gradients.agreement import accumulation_dtype
from tracin.methods.answers import scores_result, self_influence_result, top_k_result
from tracin.methods.provenance import versions
from tracin.methods.representer_points.head_rows import HeadReader, Refit, refit_head, with_constant
from tracin.methods.settings import checked_settings, require_task
from tracin.methods.within import check_within, rows_within
from tracin.results import Scores, SelfInfluence, TopK
from tracin.scoring.guard import LoadedModel, guarded
from tracin.scoring.head import find_head, refuse_no_classes
from tracin.scoring.top_k import Strongest
from tracin.shapes import Float
from tracin.tasks import Task

__all__ = ["RepresenterPoints"]

OWNER = "RepresenterPoints"
Target = str | int


@dataclass(frozen=True, eq=False)
class _Asked:
    features: Tensor
    targets: Tensor
    labels: Tensor


class RepresenterPoints:
    r"""Influence of training rows on a logit, as the theorem of representer points splits it.

    The last linear layer is fitted anew on the features f (its input, with a constant 1 appended for the bias):

    .. math::
        \Theta = \arg\min_\Theta \; \frac1n \sum_i \ell_i(\Theta f_i) + \lambda \lVert \Theta \rVert^2 ,
        \qquad
        \alpha_i = -\frac{1}{2 \lambda n} \frac{\partial \ell_i}{\partial u_i} , \qquad
        \operatorname{score}(z_i, z'; y) = \alpha_{i, y} \, f_i^\top f'

    where :math:`u_i = \Theta f_i`. At the minimum the scores add up to the logit of class y:
    :math:`\sum_i \operatorname{score}(z_i, z'; y) = \Theta_y f'` (Yeh, Kim, Yen and Ravikumar 2018, arXiv 1811.09720, theorem
    3.1). Positive: a proponent, the row raises the logit of the target. Unit: that of a logit.

    What is explained is the refitted head, not the model's own; ``provenance`` tells how far they agree. The loss must depend
    on the model only through what it returns, and the head's output must be that, alone or in a tuple or dict: this is
    checked. ``query_loss`` and ``parameters`` of the task are not read.

    Args:
        task: Model, loss and ``outputs``, which the ready-made classification losses bring.
        checkpoint: The weights of the body, and where the head starts from.
        head: The name of the last ``Linear``, whose output is the logits; None finds it.
        l2: λ, in loss per squared weight. Small: close to the model, and few rows carry most; large: the reverse.
        tolerance: The fit is stationary when its gradient is this share of 2λ‖Θ‖; else it is an error.
        batch_size: Rows per batch where the data does not batch itself.
        collate: Makes a batch of a list of a dataset's rows.
        device: ``"auto"``: where the model lies, or the GPU if it lies on the CPU and there is one.
        memory: Bound on the features, on the batches kept for the loss, and on a tile of scores.
        progress: Show how far a run is, on standard error.

    Raises:
        OptionError: The head is not there or not ``Linear`` (those that are get named), ``l2`` is not positive, the task has
            no classes, or another value is out of range.

    Example:
        >>> import tracin
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> method = tracin.RepresenterPoints(task, tracin.Checkpoint(model.state_dict()), l2=0.01, progress=False)
        >>> rows = (torch.randn(30, 2).double(), torch.arange(30) % 3)
        >>> scores = method.influence(rows, (rows[0][:2], rows[1][:2]))
        >>> scores.values.shape, scores.provenance["head"], scores.provenance["residual"] < 1e-10
        (torch.Size([2, 30]), '2', True)
    """

    def __init__(
        self,
        task: Task,
        checkpoint: Checkpoint,
        *,
        head: str | None = None,
        l2: float = 0.003,
        tolerance: float = 1e-10,
        batch_size: BatchSize = "auto",
        collate: Callable[[list], Any] | None = None,
        device: str | torch.device = "auto",
        memory: str | int = "2GiB",
        progress: bool = True,
    ) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise OptionError(
                f"{OWNER}: checkpoint is a {type(checkpoint).__name__}. Give one tracin.Checkpoint, such as trajectory[-1]."
            )
        self.task, self.checkpoint = require_task(task, OWNER), checkpoint
        self.l2, self.tolerance = _positive("l2", l2), _positive("tolerance", tolerance)
        refuse_no_classes(task, OWNER)
        self.head = find_head(task.model, head, OWNER)[0]
        self.settings = checked_settings(
            OWNER, batch_size=batch_size, collate=collate, device=device, memory=memory, progress=progress
        )

    def influence(self, train: Any, queries: Any, *, target: Target = "label") -> Scores:
        """Scores of every train row for the logit of every query's target.

        Args:
            train: Train rows.
            queries: Query rows.
            target: ``"label"``: the query's own label; ``"predicted"``: the class that the model predicts; or a class number.

        Returns:
            ``values`` [q, n] on the CPU, in the parameters' dtype, at least float32.

        Raises:
            OptionError: ``target`` is no class, or the features exceed ``memory``.
            ModelError: The head is not the last layer, or its output does not reach the loss as it is.
            LossError: The loss is not a function of the head's output alone, or mixes rows.
            DataError: A row changes when it is read again, or has a label without a logit.
            CheckpointError: The checkpoint is damaged, or of another model.
            NotFiniteError: A feature or logit is NaN or infinite; the row is named.
            ConvergenceError: The fit is not stationary to ``tolerance``.
            UserCodeError: The model, the loss or the dataset fails.
        """
        with self._opened() as loaded:
            refit, asked = self._refit(loaded, train), self._ask(loaded, queries, target)
            n, q = len(refit.alpha), len(asked.features)
            values = torch.empty(q, n, dtype=self._dtype)
            for some in torch.arange(q).split(self._tile(n)):
                values[some] = _scores(refit, asked, some, slice(None)).to("cpu", self._dtype)
            record = {**self.provenance(refit, train=n, verb="influence"), "target": target}
        return scores_result(values, record)

    def top_k(
        self,
        train: Any,
        queries: Any,
        k: int = 10,
        *,
        target: Target = "label",
        within: Literal["label"] | int | None = None,
    ) -> TopK:
        """The k strongest proponents and opponents of every query, without the matrix of all scores.

        Args:
            train: Train rows.
            queries: Query rows.
            k: List length.
            target: As for ``influence``.
            within: ``"label"``: only train rows of the query's label; a class number: only rows of that class.

        Returns:
            Proponents and opponents, signs kept, ties by lower id.

        Raises:
            OptionError: k is out of range, or a class has fewer than k rows; and what ``influence`` refuses.
        """
        check_within(within)
        with self._opened() as loaded:
            refit, asked = self._refit(loaded, train), self._ask(loaded, queries, target)
            n, q = len(refit.alpha), len(asked.features)
            strongest = Strongest(k, slice(0, q), rows_within(asked.labels, refit.labels, k, within))
            for rows in torch.arange(n).split(self._tile(q)):
                strongest.add(_scores(refit, asked, torch.arange(q), rows).to("cpu", self._dtype), rows)
            record = {
                **self.provenance(refit, train=n, verb="top_k"),
                "target": target,
                "k": k,
                "within": within,
            }
        return top_k_result(*strongest.lists(), record, n)

    def self_influence(self, train: Any) -> SelfInfluence:
        r""":math:`|\alpha_{i, y_i}| \, f_i^\top f_i`: how much a row holds up the logit of its own label.

        α is the slope of the row's loss at its label, large where the refitted head still gets the row wrong: wrong labels
        come first. This is the score of the row for itself, with the sign dropped.

        Args:
            train: Train rows.

        Returns:
            ``values`` [n].

        Raises:
            ConvergenceError: The fit is not stationary to ``tolerance``; and what ``influence`` refuses of the train rows.
        """
        with self._opened() as loaded:
            refit = self._refit(loaded, train)
            alpha = refit.alpha.gather(1, refit.labels[:, None])[:, 0].abs()
            values = (alpha * refit.features.square().sum(1)).to("cpu", self._dtype)
            record = self.provenance(refit, train=len(values), verb="self_influence")
        return self_influence_result(values, record)

    def refit(self, train: Any) -> Refit:
        """The head fitted anew, with what each train row holds of it.

        Args:
            train: Train rows.

        Returns:
            The refit, on the CPU, in float64.

        Raises:
            ConvergenceError: The fit is not stationary to ``tolerance``; and what ``influence`` refuses of the train rows.
        """
        with self._opened() as loaded:
            found = self._refit(loaded, train)
        return replace(
            found,
            weight=found.weight.cpu(),
            alpha=found.alpha.cpu(),
            features=found.features.cpu(),
            labels=found.labels.cpu(),
        )

    def provenance(self, refit: Refit, *, train: int, verb: str) -> dict[str, Any]:
        """What a result of this method was made from.

        Args:
            refit: The refitted head.
            train: Train rows.
            verb: What was computed.

        Returns:
            A JSON-able record; ``gradient_norm`` and ``residual`` say how stationary the fit is.
        """
        trajectory, task = Trajectory([self.checkpoint]), self.task
        return {
            "method": OWNER,
            "verb": verb,
            "task": {
                "model": type(task.model).__name__,
                "loss": getattr(task.loss, "__name__", type(task.loss).__name__),
            },
            "checkpoints": trajectory.describe(),
            "trajectory": trajectory.fingerprint(),
            "head": self.head,
            "l2": self.l2,
            "tolerance": self.tolerance,
            "gradient_norm": refit.gradient_norm,
            "residual": refit.residual,
            "steps": refit.steps,
            "agreement": refit.agreement,
            "correlation": refit.correlation,
            "train_rows": train,
            "dtype": str(self._dtype).removeprefix("torch."),
            "seed": None,
            "scale": "logits of the refitted head; the scores of a query add up to the logit of its target",
            "versions": versions(),
        }

    @property
    def _dtype(self) -> torch.dtype:
        return accumulation_dtype(self._layer.weight.dtype)

    @property
    def _layer(self) -> nn.Linear:
        return find_head(self.task.model, self.head, OWNER)[1]

    def _tile(self, beside: int) -> int:
        return max(1, self.settings.memory // 16 // (8 * beside))

    @contextmanager
    def _opened(self) -> Iterator[LoadedModel]:
        with guarded(self.task.model, self.settings.device) as loaded:
            loaded.load(self.checkpoint)
            yield loaded

    def _ask(self, loaded: LoadedModel, queries: Any, target: Target) -> _Asked:
        pairs = self._reader(loaded, queries, "queries").batches()
        seen = [rows for _, rows in pairs]
        logits, labels = torch.cat([rows.logits for rows in seen]), torch.cat([rows.labels for rows in seen])
        features = with_constant(torch.cat([rows.features for rows in seen]), self._layer)
        if target == "label":
            return _Asked(features, labels, labels)
        if target == "predicted":
            return _Asked(features, logits.argmax(1), labels)
        if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < logits.shape[1]:
            raise OptionError(
                f"{OWNER}: target is {target!r}. Give 'label', 'predicted' or a class from 0 to {logits.shape[1] - 1}."
            )
        return _Asked(features, torch.full_like(labels, target), labels)

    def _refit(self, loaded: LoadedModel, train: Any) -> Refit:
        return refit_head(self._reader(loaded, train, "train"), l2=self.l2, tolerance=self.tolerance)

    def _reader(self, loaded: LoadedModel, data: Any, name: str) -> HeadReader:
        return HeadReader(
            task=self.task,
            name=self.head,
            layer=self._layer,
            rows=open_rows(
                data, name=name, batch_size=self.settings.batch_size, collate=self.settings.collate
            ),
            device=loaded.device,
            where=f"{name}, {self.checkpoint.name}",
            memory=self.settings.memory,
            show=self.settings.progress,
        )


def _positive(name: str, value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if not good:
        raise OptionError(f"{OWNER}: {name} is {value!r}. Give a positive number, such as 0.003.")
    return float(value)


def _scores(refit: Refit, asked: _Asked, queries: Tensor, rows: Tensor | slice) -> Float[Tensor, "q n"]:
    """α_{i,y} f_iᵀ f′ for some queries and train rows, in float64."""
    queries = queries.to(asked.targets.device)
    alpha = refit.alpha[rows].mT[asked.targets[queries]]
    return alpha * (asked.features[queries] @ refit.features[rows].mT)
