"""TracIn step by step: a ledger beside a training loop (Pruthi et al. 2020)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tracin.checksums import same_checksums
from tracin.data import open_rows
from tracin.errors import DataError, LoopError, OptionError, ResultError
from tracin.methods.online.queries import Asked, Queries
from tracin.methods.online.records import Book, StepReport, read_ledger, write_ledger
from tracin.methods.online.step import OpenStep, row_ids
from tracin.methods.online.updates import Update, require_optimizer
from tracin.methods.online.watch import listen, refuse_other_parameters, tell_change
from tracin.methods.provenance import versions
from tracin.methods.settings import require_task
from tracin.options import whole_number
from tracin.results import Scores
from tracin.scoring.memory import parse_memory
from tracin.tasks import Task

__all__ = ["OnlineTracIn"]


class OnlineTracIn:
    r"""The influence of every training row on some queries, added up step by step while a model trains.

    At step t the optimizer moves the parameters from :math:`w_t` to :math:`w_{t+1}` with a batch of b rows, and
    :math:`g_i` is row i's term of the gradient it uses (under a mean loss it carries the 1/b). For a query z'

    .. math::
        f_{i} = \eta_t \, \langle \nabla \ell(w_t, z'), g_i \rangle \qquad \text{(first order)}

    .. math::
        f_{i} + \frac{1}{b} \left( L(w_t, z') - L(w_{t+1}, z') - \sum_j f_j \right) \qquad \text{(ideal)}

    are added to the entry of row i. The ideal scores of a query sum to :math:`L(w_0, z') - L(w_T, z')` when every step is
    recorded and nothing else changes the model; with one row per step they are TracInIdeal. Positive: a proponent, training
    on the row lowered the loss (Pruthi et al. 2020, arXiv 2002.08484, §3.1 and §3.2).

    :math:`g_i` is read from the backward passes that training runs anyway, in its own mode: dropout masks and batch
    statistics are those of training. Queries run in eval mode on the state in which the step began. Training is
    bit-identical to training without the ledger.

    Args:
        task: Model and losses. The loop trains ``task.model`` with any loss; queries are explained under
            ``task.query_loss``, or ``task.loss``.
        optimizer: The optimizer of the loop.
        queries: Query rows: a tuple or dict of tensors, a map-style dataset, or a ``DataLoader`` in order. Read once.
        n_train: Rows of the training set.
        every: Record one step of this many. Scores are then sums over the recorded steps.
        update: ``"gradient"``: :math:`\eta_t g`. ``"momentum"``: :math:`\eta_t \frac{1-\tau}{1-\mu} g`, what g will have
            moved in the end (dampening τ, which SGD leaves out of a parameter's first step). ``"adam"``:
            :math:`\eta_t \frac{1-\beta_1}{1-\beta_1^t} g / (\sqrt{\hat v} + \epsilon)`. What a step did besides is in
            ``report().carried``.
        batch_size: Queries per batch, where the data does not batch itself.
        collate: Makes a batch of a list of a dataset's query rows.
        memory: Bound on the ledger's two tables, 16 bytes for each row and query, and the queries' gradients, which are
            held during a step.

    Raises:
        OptionError: An argument of another type, ``update`` describes another optimizer, or the tables exceed ``memory``.
        ModelError: A parameter cannot be followed from inside the model.

    Warns:
        AdaptiveOptimizerWarning: ``update="gradient"`` with an optimizer other than SGD.
        IncompleteLedgerWarning: With every step recorded, the queries' losses changed between two of them.

    Example:
        >>> import tracin
        >>> model = torch.nn.Linear(2, 3)
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 3
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> online = tracin.OnlineTracIn(task, optimizer, (x[:2], y[:2]), n_train=8)
        >>> for ids in torch.arange(8).split(4):
        ...     with online.step(ids):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
        ...         optimizer.step()
        >>> online.scores("first_order")
        Scores(2 queries × 8 train rows, float64, OnlineTracIn)
        >>> bool(torch.allclose(online.scores("ideal").values.sum(1), online.report().change.sum(0)))
        True
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        queries: Any,
        n_train: int,
        every: int = 1,
        update: Update | str = "gradient",
        *,
        batch_size: int = 256,
        collate: Callable[[list], Any] | None = None,
        memory: str | int = "2GiB",
    ) -> None:
        self._task = require_task(task, "OnlineTracIn")
        self.n_train = whole_number(n_train, "OnlineTracIn: n_train", 1)
        self.every, self.update = whole_number(every, "OnlineTracIn: every", 1), str(update)
        selection = task.select()
        self._traced = selection.traced
        self._optimizer = require_optimizer(optimizer, update, self._traced)
        rows = open_rows(queries, name="queries", batch_size=batch_size, collate=collate)
        allowed = parse_memory(memory)
        self._book = Book(self.n_train, len(rows), allowed)
        self._queries = Queries(task, selection, rows, memory=allowed - self._book.nbytes)
        self._seen = 0
        self._next: Asked | None = None
        self._open: OpenStep | None = None
        self._told, self._last = False, None
        self._handles = listen(self, optimizer)

    @property
    def steps(self) -> int:
        """Optimizer steps seen so far, recorded or not."""
        return self._seen

    @contextmanager
    def step(self, ids: Any) -> Iterator[None]:
        """One optimizer step: every micro-batch's forward and backward pass, then ``optimizer.step()``.

        Hooks lie on the model inside the block alone. A step that a gradient scaler skips is not recorded.

        Args:
            ids: [b], the positions of the step's rows in the training set, in forward order over all micro-batches.

        Yields:
            Nothing.

        Raises:
            DataError: Ids that are not whole numbers from 0 to ``n_train``, or not one per row that ran.
            LoopError: The block takes no step, or two; or a gradient holds something that no row brought.
            NotFiniteError: A row's share is NaN or infinite.
        """
        if not self._handles:
            raise LoopError("OnlineTracIn.step: the ledger is closed. Make a new one, or load it.")
        if self._open is not None:
            raise LoopError(
                "OnlineTracIn.step: a step is open already. One with block holds all micro-batches of a step."
            )
        rows = row_ids(ids, self.n_train)
        opened = OpenStep(self._seen, rows, self._task, self._traced, self._queries, self._optimizer)
        self._open = opened
        try:
            if self._seen % self.every == 0:
                opened.record(self._asked(len(rows)))
            yield
            opened.check_taken()
        finally:
            self._open = None
            opened.close()

    def scores(self, kind: str = "first_order") -> Scores:
        """The ledger so far.

        Args:
            kind: ``"first_order"`` or ``"ideal"``.

        Returns:
            ``values`` [q, n_train] in float64.

        Raises:
            OptionError: Another kind.
        """
        if kind not in {"first_order", "ideal"}:
            raise OptionError(f"scores: kind is {kind!r}. Choose 'first_order' or 'ideal'.")
        ledger = self._book.first_order if kind == "first_order" else self._book.ideal
        return Scores(
            values=ledger.mT.contiguous(),
            train_ids=torch.arange(self.n_train),
            query_ids=torch.arange(len(self._queries)),
            provenance=self._provenance(kind),
        )

    def report(self) -> StepReport:
        """What each recorded step did to the queries: own term, what was carried over, measured change.

        Returns:
            One row per recorded step.
        """
        return self._book.report()

    def save(self, path: str | Path) -> None:
        """Write the ledger as one safetensors file, atomically.

        Args:
            path: The file; a missing folder is made.

        Raises:
            LoopError: A step is open.
        """
        if self._open is not None:
            raise LoopError("OnlineTracIn.save: a step is open. Save after the with block.")
        numbers, known = self._queries.checksums()
        tensors = {
            "first_order": self._book.first_order,
            "ideal": self._book.ideal,
            "queries": numbers,
            "checked": known,
            **vars(self.report()),
        }
        write_ledger(
            path,
            tensors,
            {
                "n_train": self.n_train,
                "every": self.every,
                "update": self.update,
                "seen": self._seen,
                "parameters": list(self._traced),
            },
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        task: Task,
        optimizer: torch.optim.Optimizer,
        queries: Any,
        *,
        batch_size: int = 256,
        collate: Callable[[list], Any] | None = None,
        memory: str | int = "2GiB",
    ) -> OnlineTracIn:
        """Go on with a saved ledger. The model and the optimizer are those of the moment of saving, brought back by the caller.

        Args:
            path: What ``save`` wrote.
            task: Model and losses.
            optimizer: The optimizer of the loop.
            queries: The same queries.
            batch_size: Queries per batch.
            collate: Makes a batch of a list of a dataset's query rows.
            memory: Bound on the ledger's tables and the queries' gradients.

        Returns:
            The ledger.

        Raises:
            ResultError: The file is damaged, or of other parameters.
            DataError: The queries are others.

        Warns:
            UserWarning: The queries hold no tensor with a row per example, so that others of the same number would pass.
        """
        tensors, settings = read_ledger(path)
        online = cls(
            task,
            optimizer,
            queries,
            settings["n_train"],
            settings["every"],
            settings["update"],
            batch_size=batch_size,
            collate=collate,
            memory=memory,
        )
        try:
            online._restore(path, tensors, settings)
        except BaseException:
            online.close()
            raise
        return online

    def _restore(self, path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        if settings["parameters"] != list(self._traced):
            raise ResultError(
                f"{path} traced {len(settings['parameters'])} parameters ({', '.join(settings['parameters'][:3])}, …), and "
                "they are not this task's."
            )
        (mine, known), theirs = self._queries.checksums(), tensors["queries"]
        same = mine.shape == theirs.shape and torch.equal(known, tensors["checked"])
        if not same or not bool(same_checksums(mine, theirs).all()):
            raise DataError(
                f"{path} was kept for other queries ({len(theirs)} of them). Give the same rows, in the same order."
            )
        if not bool(known.all()):
            warnings.warn(
                f"{path}: {int((~known).sum())} of {len(known)} queries hold no tensor with a row per example, so it cannot be "
                "checked that they are those of the ledger. Make sure of it, or let their batches hold such a tensor.",
                UserWarning,
                stacklevel=3,
            )
        self._book.restore(path, tensors)
        self._seen = int(settings["seen"])

    def close(self) -> None:
        """Stop listening to the optimizer. The scores stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._next = None

    def __enter__(self) -> OnlineTracIn:  # noqa: PYI034  beartype knows no Self here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _asked(self, rows: int) -> Asked:
        """The queries at the present weights: from the end of the step before, if nothing changed since."""
        refuse_other_parameters(self._task, self._traced, self._optimizer)
        if self._next is not None and self._next.state == self._queries.state():
            return self._next
        self._next = None
        asked = self._queries.gradients(rows)
        if self._last is not None and self.every == 1 and not self._told:
            self._told = tell_change(self._task.model, *self._last, asked.losses, asked.state)
        return asked

    def _before_step(self, _: Any, args: Any, kwargs: Any) -> None:
        opened = self._open
        if opened is None:
            raise LoopError(
                "optimizer.step() outside of online.step(ids): the ledger does not know which rows it was for. Put the step into "
                "the with block (each ledger of an optimizer has its own), or call online.close() when the ledger is done."
            )
        opened.depth += 1
        if opened.depth == 1:  # deeper: a subclass whose step calls its parent's
            opened.begins(args, kwargs)

    def _after_step(self, *_: Any) -> None:
        opened = self._open
        if opened is None:
            return
        opened.depth -= 1
        if opened.depth or opened.skipped:
            return
        opened.done = True
        results = opened.results(self.update)
        if results is not None and opened.asked is not None:
            shares, carried = results
            before = opened.asked.losses
            opened.release()
            change = before - self._losses_after(len(opened.ids))
            self._book.add(
                opened.ids, shares, step=self._seen, factor=opened.factor, carried=carried, change=change
            )
        self._seen += 1

    def _losses_after(self, rows: int) -> Tensor:
        """The queries' losses at the new weights; with every step recorded, their gradients for the next one too."""
        if self.every > 1:
            return self._queries.losses()
        self._next = None
        self._next = self._queries.gradients(rows)
        self._last = (self._next.losses, self._next.state)
        return self._next.losses

    def _provenance(self, kind: str) -> dict[str, Any]:
        task = self._task
        loss = task.query_loss or task.loss
        return {
            "method": "OnlineTracIn",
            "verb": kind,
            "task": {
                "model": type(task.model).__name__,
                "loss": getattr(loss, "__name__", type(loss).__name__),
                "parameters": list(task.globs),
            },
            "optimizer": type(self._optimizer).__name__,
            "update": self.update,
            "every": self.every,
            "steps": self._seen,
            "recorded": len(self._book),
            "scale": "sum over recorded steps of each row's share of the fall of the query's loss",
            "routes": {name: self._queries.training.route(name) for name in self._traced},
            "versions": versions(),
        }
