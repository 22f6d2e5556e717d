r"""Why did the model say this? The training rows behind the loss of a target.

What is explained is a loss of the query z′ at a target class y: :math:`\ell(\theta_c, z') = -\log p_c(y \mid x')` for
the predicted class or a class of choice, and the task's own loss for the label.

Axis letters: c checkpoints · q queries · n train rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tracin.checkpoints import Trajectory
from tracin.data import RowSource, open_rows, rows_per_batch
from tracin.errors import LossError, OptionError
from tracin.methods import TracInCP
from tracin.methods.altering import altered
from tracin.progress import progress
from tracin.results import Ranking, TopK
from tracin.scoring.evaluation import Evaluation, evaluate
from tracin.scoring.passes import hold_queries, score_batch
from tracin.scoring.run import opened
from tracin.shapes import Float, Int
from tracin.tasks import Task

__all__ = [
    "Attribution",
    "Lesson",
    "Target",
    "evaluate_rows",
    "explain",
    "lesson_of",
    "target_words",
]

PREDICTED, LABEL = "predicted", "label"


@dataclass(frozen=True)
class Target:
    """Whose loss is explained.

    Args:
        kind: The predicted class, the label, or a class of choice.
        number: The class, None where the task has no classes.
    """

    kind: Literal["predicted", "label", "class"]
    number: int | None = None


def target_words(target: Target, name: Callable[[int], str]) -> str:
    """Whose loss is explained, in words.

    Args:
        target: The target.
        name: The name of a class.

    Returns:
        Such as ``"the predicted class, cat"``.
    """
    if target.number is None:
        return "its own target"
    told = name(target.number)
    return {
        "predicted": f"the predicted class, {told}",
        "label": f"the label, {told}",
        "class": f"the class {told}",
    }[target.kind]


@dataclass(frozen=True, eq=False)
class Attribution:
    """One target of one query, traced to every training row.

    Args:
        query: The query's position.
        target: Whose loss is explained.
        losses: That loss at each checkpoint [c].
        contributions: The scores at each checkpoint alone [c, n]; their sum is ``TracInCP``'s score.
        label: The query's class, where the task has classes.
        predicted: The class predicted at the last checkpoint, likewise.
        provenance: What made these numbers.
    """

    query: int
    target: Target
    losses: Float[Tensor, " c"]
    contributions: Float[Tensor, "c n"]
    label: int | None
    predicted: int | None
    provenance: Mapping[str, Any]

    @property
    def scores(self) -> Float[Tensor, " n"]:
        """The score of every training row [n], added up in the order of the checkpoints."""
        total = torch.zeros_like(self.contributions[0])
        for part in self.contributions:
            total += part
        return total

    def top_k(self, k: int = 10) -> TopK:
        """The k strongest proponents and opponents.

        Args:
            k: List length.

        Returns:
            The lists of this one query, ties by lower id.

        Raises:
            OptionError: k is below 1 or above the number of training rows.
        """
        scores = self.scores
        if not 1 <= k <= len(scores):
            raise OptionError(f"k is {k}: give 1 to {len(scores)}, the number of train rows.")
        high = torch.argsort(scores, descending=True, stable=True)[:k]
        low = torch.argsort(scores, stable=True)[:k]
        return TopK(
            proponents=Ranking(high[None], scores[high][None]),
            opponents=Ranking(low[None], scores[low][None]),
            query_ids=torch.tensor([self.query]),
            provenance={**self.provenance, "k": k},
        )


def explain(
    method: TracInCP,
    train: Any,
    queries: Any,
    rows: Sequence[int],
    *,
    target: str | int | None = None,
    class_names: Sequence[str] | None = None,
) -> list[Attribution]:
    """Trace predictions back to the training rows.

    Args:
        method: Task, trajectory and settings.
        train: Train rows.
        queries: Query rows.
        rows: Positions of the queries to explain.
        target: ``"predicted"``: the loss of the class predicted at the last checkpoint, and where that is not the
            label, the loss of the label too: what taught the wrong class, and what opposed the right one.
            ``"label"``: the task's own loss. Else a class, by its name or number. By default ``"predicted"``, or
            ``"label"`` where the task has no classes.
        class_names: The names that ``target`` may use.

    Returns:
        For each row one attribution, or two for a wrong prediction.

    Raises:
        OptionError: A row or a class that does not exist, or a class where the task has none.

    Example:
        >>> import tracin
        >>> model = nn.Linear(2, 3)
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> checkpoint = tracin.Checkpoint(model.state_dict(), learning_rate=0.1)
        >>> method = tracin.TracInCP(task, tracin.Trajectory([checkpoint]), progress=False)
        >>> data = (torch.randn(8, 2), torch.arange(8) % 3)
        >>> why = explain(method, data, data, [5], target="label")
        >>> why[0].target, why[0].top_k(k=3).proponents.ids.shape
        (Target(kind='label', number=2), torch.Size([1, 3]))
    """
    source = _open(method, queries, "queries")
    _refuse_outside(source, rows)
    found = evaluate_rows(method, source, rows, name="queries")
    wanted = _targets(found, target, class_names)
    pairs = [(at, each) for at in range(len(rows)) for each in wanted[at]]
    parts: dict[int, tuple[Tensor, Mapping[str, Any]]] = {}
    own = [number for number, (_, each) in enumerate(pairs) if each.kind == LABEL]
    for numbers in (own, [number for number in range(len(pairs)) if number not in own]):
        if numbers:
            chosen = [(rows[pairs[number][0]], pairs[number][1]) for number in numbers]
            values, provenance = _contributions(*_asked(method, source, chosen), train)
            parts |= {number: (values[:, at], provenance) for at, number in enumerate(numbers)}
    return [
        Attribution(
            query=int(rows[at]),
            target=each,
            losses=_loss_of(found, at, each),
            contributions=parts[number][0],
            label=None if found.labels is None else int(found.labels[at]),
            predicted=None if found.logits is None else int(found.predicted()[at]),
            provenance={**parts[number][1], "target": vars(each)},
        )
        for number, (at, each) in enumerate(pairs)
    ]


def evaluate_rows(
    method: TracInCP,
    data: Any,
    rows: Sequence[int],
    *,
    name: Literal["train", "queries"],
    trajectory: Trajectory | None = None,
) -> Evaluation:
    """Losses and predictions of some rows.

    Args:
        method: Task and settings.
        data: The rows that ``rows`` counts in.
        rows: Positions.
        name: Which loss, as for ``evaluate``.
        trajectory: The checkpoints, if not those of the method.

    Returns:
        The evaluation, in the order of ``rows``.
    """
    source = data if isinstance(data, RowSource) else _open(method, data, name)
    size = rows_per_batch(method.settings.batch_size)
    chosen = DataLoader(list(rows), batch_size=size, collate_fn=source.take)  # type: ignore[arg-type]
    return evaluate(
        method.task, trajectory or method.trajectory, chosen, name=name, device=method.settings.device
    )


@dataclass(frozen=True, eq=False)
class Lesson:
    """How far the model learned its training rows.

    Args:
        losses: The loss of each row at each checkpoint [c, n].
        labels: The given classes [n], where the task has classes.
        predicted: The classes predicted at the last checkpoint [n], likewise.
    """

    losses: Float[Tensor, "c n"]
    labels: Int[Tensor, " n"] | None
    predicted: Int[Tensor, " n"] | None


def lesson_of(method: TracInCP, train: Any) -> Lesson:
    """Losses of all training rows along the trajectory, and the predictions of the last checkpoint.

    Args:
        method: Task, trajectory and settings.
        train: Train rows.

    Returns:
        Losses, labels and predictions. Only one checkpoint's logits are held at a time.
    """
    settings = method.settings
    losses: list[Tensor] = []
    last: Evaluation | None = None
    n = len(_open(method, train, "train"))
    with progress("losses", n * len(method.trajectory), show=settings.progress) as bar:
        for checkpoint in method.trajectory:
            last = evaluate(
                method.task,
                Trajectory([checkpoint]),
                train,
                name="train",
                batch_size=settings.batch_size,
                collate=settings.collate,
                device=settings.device,
            )
            losses.append(last.losses)
            bar.advance(n)
    assert last is not None
    predicted = None if last.logits is None else last.predicted()
    return Lesson(torch.cat(losses), last.labels, predicted)


def _open(method: TracInCP, data: Any, name: str) -> RowSource:
    return open_rows(data, name=name, batch_size=method.settings.batch_size, collate=method.settings.collate)


def _refuse_outside(source: RowSource, rows: Sequence[int]) -> None:
    if not rows:
        raise OptionError("no query is named: give the position of at least one row.")
    for row in rows:
        if not 0 <= row < len(source):
            raise OptionError(
                f"query {row} does not exist: the {len(source)} rows count from 0 to {len(source) - 1}."
            )


def _targets(
    found: Evaluation, target: str | int | None, names: Sequence[str] | None
) -> list[tuple[Target, ...]]:
    """The targets of each query."""
    n = found.losses.shape[1]
    if found.logits is None or found.labels is None:
        if target in (None, LABEL):
            return [(Target("label"),)] * n
        raise OptionError(
            f"target {target!r} needs classes, and the task has none: use target 'label' (the loss itself), or give "
            "Task(outputs=lambda model, batch: (logits [n, C], labels [n]))."
        )
    labels, predicted = found.labels.tolist(), found.predicted().tolist()
    if target == LABEL:
        return [(Target("label", label),) for label in labels]
    if target is not None and target != PREDICTED:
        return [(Target("class", _class_number(target, names, found.logits.shape[-1])),)] * n
    return [
        (Target("predicted", said),) if said == label else (Target("predicted", said), Target("label", label))
        for said, label in zip(predicted, labels, strict=True)
    ]


def _class_number(target: str | int, names: Sequence[str] | None, classes: int) -> int:
    """The class of a name, else of a number."""
    if names is not None and target in names:
        number = list(names).index(str(target))
    else:
        try:
            number = int(target)
        except ValueError:
            number = -1
    if 0 <= number < classes:
        return number
    known = f"names ({', '.join(list(names)[:20])}) or numbers" if names else "numbers"
    raise OptionError(
        f"target {target!r} is no class: give 'predicted', 'label' or one of the class {known} 0 to {classes - 1}."
    )


def _loss_of(found: Evaluation, at: int, target: Target) -> Tensor:
    if target.kind == LABEL or found.logits is None or target.number is None:
        return found.losses[:, at]
    return -found.logits[:, at].log_softmax(-1)[:, target.number]


def _asked(
    method: TracInCP, source: RowSource, chosen: Sequence[tuple[int, Target]]
) -> tuple[TracInCP, DataLoader]:
    """The method with the loss to explain, and the queries that this loss takes."""
    positions = [row for row, _ in chosen]
    size = rows_per_batch(method.settings.batch_size)
    if chosen[0][1].kind == LABEL:
        loader = DataLoader(positions, batch_size=size, collate_fn=source.take)  # type: ignore[arg-type]
        return method, loader
    classes = torch.tensor([target.number for _, target in chosen])

    def batch_of(places: list[int]) -> dict[str, Any]:
        return {"rows": source.take([positions[place] for place in places]), "classes": classes[places]}

    loader = DataLoader(range(len(chosen)), batch_size=size, collate_fn=batch_of)  # type: ignore[arg-type]
    task = replace(method.task, query_loss=_class_loss(method.task))
    return altered(method, task=task), loader


def _class_loss(task: Task) -> Callable[[nn.Module, Any], Tensor]:
    """Cross-entropy of the task's logits at the classes that come with the batch."""
    outputs = task.outputs
    assert outputs is not None

    def class_loss(model: nn.Module, batch: Any) -> Tensor:
        logits = outputs(model, batch["rows"])[0]
        if not logits.requires_grad and torch.is_grad_enabled():
            raise LossError(
                "Task(outputs=...) returned logits that no gradient reaches, and a class can only be explained through "
                "them. Leave .detach() and torch.no_grad() out of outputs, or explain target 'label'."
            )
        return F.cross_entropy(logits, batch["classes"], reduction="none")

    return class_loss


def _contributions(
    method: TracInCP, queries: DataLoader, train: Any
) -> tuple[Float[Tensor, "c q n"], Mapping[str, Any]]:
    """Scores at each checkpoint alone, in one run, so that the rows are held to be the same at each."""
    with opened(method.task, method.trajectory, method.settings, train, queries) as run:
        assert run.queries is not None
        n, m, c = len(run.train.rows), len(run.queries.rows), len(run.trajectory)
        values = torch.zeros(c, m, n, dtype=run.dtype)
        with progress("explain", c * (n + m), show=method.settings.progress) as bar:
            for index in range(c):
                run.load(index)
                for tile in hold_queries(run, method.settings.memory // 2, bar):
                    bar.grow(n if tile.start else 0)
                    into = values[index, tile.start : tile.start + tile.size]
                    for batch, value in run.batches(run.train):
                        into[:, batch.start : batch.start + batch.size] = score_batch(
                            run, batch, value, tile
                        ).mT.cpu()
                        bar.advance(batch.size)
        return values, method.provenance(run, "explain")
