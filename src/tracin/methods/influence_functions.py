"""Influence functions: the effect of leaving a training row out, by the curvature at one checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from tracin.checkpoints import Checkpoint, Trajectory
from tracin.checksums import row_checksums
from tracin.curvature import lissa, preconditioned
from tracin.curvature.cost import cost
from tracin.curvature.operators import CurvatureRows
from tracin.curvature.solvers import (
    COPIES,
    CURVATURES,
    SOLVERS,
    CurvatureOptions,
    Prepared,
    prepare,
    refuse_zero_damping,
)
from tracin.curvature.vectors import Vectors
from tracin.data import BatchSize, RowSource, open_rows
from tracin.errors import OptionError
from tracin.gradients.engine import Source
from tracin.gradients.sites import LossModule
from tracin.methods.answers import scores_result, self_influence_result, top_k_result
from tracin.methods.provenance import provenance
from tracin.methods.settings import checked_settings, require_task
from tracin.methods.within import allowed_rows
from tracin.results import Scores, SelfInfluence, TopK
from tracin.scoring import top_k
from tracin.scoring.plan import Plan
from tracin.scoring.planning import plan
from tracin.scoring.run import Run, opened
from tracin.scoring.verification import Verification, verify
from tracin.tasks import Task

__all__ = ["InfluenceFunctions"]

CurvatureName = Literal["gauss_newton", "hessian"]
SolverName = Literal["exact", "cg", "lissa", "ekfac"]
# Steps that a plan counts: how many there are shows only as they are taken.
PLANNED = {"cg": 100, "lissa": 4096}


@dataclass(frozen=True)
class _Ready:
    """A run at its checkpoint with the curvature's rows."""

    run: Run
    rows: CurvatureRows


class InfluenceFunctions:
    r"""Influence of training rows on predictions through the curvature of the training loss.

    .. math::
        \operatorname{score}(z, z') =
        \langle \nabla \ell(\theta, z), (C + \lambda I)^{-1} \nabla \ell(\theta, z') \rangle

    C is the curvature at θ of the *mean* loss over the train set: its Gauss-Newton matrix or its Hessian. At an optimum of the
    mean loss plus λ/2 ‖θ‖², leaving z out of n rows raises ℓ(z') by about score / n. Positive: z is a proponent. Sources: Koh &
    Liang 2017, *Understanding black-box predictions via influence functions*, §2–3; Bae et al. 2022, *If influence functions
    are the answer, then what is the question?* (for Gauss-Newton); Grosse et al. 2023 (EKFAC).

    Gauss-Newton splits the loss at the model's output, so the loss must call the model once and reach the parameters through its
    output alone. A model should return logits: behind a log_softmax the loss is linear in the output, which is refused.

    Args:
        task: Model and per-example loss.
        checkpoint: Where to take gradients and curvature, most often the last.
        curvature: ``"gauss_newton"`` (positive semidefinite, away from an optimum too) or ``"hessian"``.
        solver: ``"exact"``: a matrix and Cholesky, some thousand parameters. ``"cg"``: conjugate gradients, exact to
            ``tolerance``. ``"lissa"``: a stochastic series. ``"ekfac"``: layer by layer in an eigenbasis, approximate, the
            one for large models.
        damping: λ. Training with weight decay λ: give that. None: a tenth of C's mean eigenvalue; for the Hessian at least
            −2 λ_min; for lissa at least a thousandth of the largest eigenvalue of a batch. Provenance says which. 0 is taken
            where C is known to be positive definite: by ``"exact"``, and for the Hessian.
        curvature_data: Rows that C is the mean over; the train set given to the verb unless given.
        tolerance: For cg and lissa, ‖(C + λI)x − g‖ / ‖g‖: 1e-10 for a float64 model and 1e-4 otherwise; 0.05 for lissa.
        iterations: For cg (1000) and lissa (10 000), the most steps.
        scale: For lissa, an upper bound of the eigenvalues; found by power iteration unless given.
        samples: For ekfac, random columns per row in place of one column per class, each a backward pass: mixtures R ε of the
            columns of H = R Rᵀ, ε random signs, which keep the expectation. No labels are drawn.
        seed: Of lissa's batches, ekfac's samples and the estimates of trace and λ_min. Provenance has it where it was read.
        batch_size: As for ``TracInCP``, as the following.
        collate: Makes a batch of a list of a dataset's rows.
        device: Where to run.
        memory: Bound on the curvature and, again, on held gradients.
        progress: Show how far a run is, on standard error.

    Raises:
        OptionError: An unknown curvature or solver, a value out of range, or an option that the solver does not read.

    Example:
        >>> import tracin
        >>> model = torch.nn.Linear(2, 3)
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> method = tracin.InfluenceFunctions(task, tracin.Checkpoint(model.state_dict()), damping=0.01)
        >>> rows = (torch.randn(8, 2), torch.arange(8) % 3)
        >>> method.influence(rows, (rows[0][:2], rows[1][:2])).values.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        task: Task,
        checkpoint: Checkpoint,
        *,
        curvature: CurvatureName | str = "gauss_newton",
        solver: SolverName | str = "exact",
        damping: float | None = None,
        curvature_data: Any | None = None,
        tolerance: float | None = None,
        iterations: int | None = None,
        scale: float | None = None,
        samples: int | None = None,
        seed: int = 0,
        batch_size: BatchSize = "auto",
        collate: Callable[[list], Any] | None = None,
        device: str | torch.device = "auto",
        memory: str | int = "2GiB",
        progress: bool = True,
    ) -> None:
        if not isinstance(checkpoint, Checkpoint):
            raise OptionError(
                f"InfluenceFunctions: checkpoint is a {type(checkpoint).__name__}. Give one tracin.Checkpoint, such as "
                "trajectory[-1]."
            )
        self.task, self.checkpoint = require_task(task, "InfluenceFunctions"), checkpoint
        self.curvature_data = curvature_data
        self.settings = checked_settings(
            "InfluenceFunctions",
            batch_size=batch_size,
            collate=collate,
            device=device,
            memory=memory,
            progress=progress,
        )
        self.options = CurvatureOptions(
            curvature, solver, damping, tolerance, iterations, scale, samples, seed, self.settings.memory
        )
        _check(self.options)

    def influence(self, train: Any, queries: Any) -> Scores:
        """Scores of every train row for every query.

        Args:
            train: Train rows.
            queries: Query rows, under ``task.query_loss`` where it is given.

        Returns:
            ``values`` [q, n] on the CPU, in the parameters' dtype, at least float32.

        Raises:
            CheckpointError: The checkpoint does not fit the model.
            ConvergenceError: cg, lissa or the estimate of λ_min stopped short; the message names the knob.
            DataError: Rows that are empty, out of order, or change between passes.
            LossError: The loss is not a vector with one number per row.
            ModelError: The model or the loss has no such curvature, or no factors for ekfac.
            NotFiniteError: A loss, a gradient or the curvature is NaN or infinite; the message names the row.
            OptionError: A damping that is too small, or a curvature that does not fit the memory.
            UserCodeError: From an exception inside the model, the loss or the dataset.
        """
        with self._opened(train, queries) as ready:
            prepared = self._prepared(ready)
            values = preconditioned.influence(ready.run, prepared, ready.rows.vectors)
            return scores_result(values, self._provenance(ready, "influence", prepared))

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
            CheckpointError: The checkpoint does not fit the model.
            ConvergenceError: cg, lissa or the estimate of λ_min stopped short; the message names the knob.
            DataError: Rows that are empty, out of order, or change between passes.
            LossError: The loss is not a vector with one number per row.
            ModelError: The model or the loss has no such curvature, or no factors for ekfac.
            NotFiniteError: A loss, a gradient or the curvature is NaN or infinite; the message names the row.
            OptionError: A damping that is too small, or a curvature that does not fit the memory; ``k`` or ``within`` out of
                range.
            UserCodeError: From an exception inside the model, the loss or the dataset.
        """
        allowed = allowed_rows(self.task, self.checkpoint, self.settings, train, queries, k, within)
        with self._opened(train, queries) as ready:
            top_k.check_k(k, len(ready.run.train.rows))
            prepared = self._prepared(ready)
            held = preconditioned.solved_queries(ready.run, prepared, ready.rows.vectors)
            high, low = top_k.top_k(ready.run, k, allowed, ([tile] for tile in held))
            record = {**self._provenance(ready, "top_k", prepared), "k": k, "within": within}
            return top_k_result(high, low, record, len(ready.run.train.rows))

    def self_influence(self, train: Any) -> SelfInfluence:
        """score(z, z) of every train row: about n times the rise of its own loss if it is left out.

        Args:
            train: Train rows.

        Returns:
            ``values`` [n].

        Raises:
            CheckpointError: The checkpoint does not fit the model.
            ConvergenceError: cg, lissa or the estimate of λ_min stopped short; the message names the knob.
            DataError: Rows that are empty, out of order, or change between passes.
            LossError: The loss is not a vector with one number per row.
            ModelError: The model or the loss has no such curvature, or no factors for ekfac.
            NotFiniteError: A loss, a gradient or the curvature is NaN or infinite; the message names the row.
            OptionError: A damping that is too small, or a curvature that does not fit the memory.
            UserCodeError: From an exception inside the model, the loss or the dataset.
        """
        with self._opened(train) as ready:
            prepared = self._prepared(ready)
            values = preconditioned.self_influence(ready.run, prepared, ready.rows.vectors)
            record = self._provenance(ready, "self_influence", prepared)
            return self_influence_result(values, record)

    def verify(self, train: Any, *, rows: int = 8, seed: int = 0) -> Verification:
        """Exactness of the gradients on this model and data, as for ``TracInCP``; the solution is told in provenance.

        Args:
            train: Train rows.
            rows: Rows to compare.
            seed: Which rows.

        Returns:
            Errors and coverage.

        Raises:
            CheckpointError: The checkpoint does not fit the model.
            DataError: Rows that are empty or out of order.
            LossError: The loss is not a vector with one number per row.
            NotFiniteError: A loss or a gradient is NaN or infinite.
            OptionError: ``rows`` is not a positive whole number.
            UserCodeError: From an exception inside the model, the loss or the dataset.
        """
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise OptionError(f"verify: rows is {rows!r}. Give a whole number, at least 1.")
        with self._opened(train) as ready:
            return verify(ready.run, rows, seed)

    def plan(self, train: Any, queries: Any) -> Plan:
        """Memory, time and passes of ``influence(train, queries)``, from one batch of each side.

        The steps of cg and lissa depend on the damping; the plan counts 100 for cg and 4096 for lissa. What finds λ_min and
        lissa's scale is counted at its most.

        Args:
            train: Train rows.
            queries: Query rows.

        Returns:
            The plan.

        Raises:
            CheckpointError: The checkpoint does not fit the model.
            DataError: Rows that are empty or out of order.
            LossError: The loss is not a vector with one number per row.
            ModelError: The model or the loss has no such curvature, or no factors for ekfac.
            NotFiniteError: A loss or a gradient is NaN or infinite.
            OptionError: A curvature that does not fit the memory.
            UserCodeError: From an exception inside the model, the loss or the dataset.
        """
        with self._opened(train, queries) as ready:
            return _with_curvature(plan(ready.run), ready, self.options)

    @contextmanager
    def _opened(self, train: Any, queries: Any | None = None) -> Iterator[_Ready]:
        """A run at the checkpoint, and the rows that the curvature is the mean over."""
        with opened(self.task, Trajectory([self.checkpoint]), self.settings, train, queries) as run:
            vectors = Vectors(run.selection.traced)
            source = run.train
            if self.curvature_data is not None:
                opening = {"batch_size": self.settings.batch_size, "collate": self.settings.collate}
                rows = open_rows(self.curvature_data, name="curvature_data", **opening)
                root = LossModule(self.task.model, self.task.loss).eval()
                source = Source(root, self.task.loss, rows, run.loaded.device)
            run.load(0)
            if source is not run.train:
                source.where, source.found = f"curvature_data, {run.where}", run.train.wiring
            yield _Ready(run, CurvatureRows(source, vectors, partial(run.batches, source)))

    def _prepared(self, ready: _Ready) -> Prepared:
        return prepare(ready.rows, ready.run.train.wiring, self.options)

    def _provenance(self, ready: _Ready, verb: str, prepared: Prepared) -> dict[str, Any]:
        n = len(ready.rows)
        scale = (
            f"gradient product through (C + damping I)^-1, C the curvature of the mean loss over {n} rows: leaving a row out of "
            "the n train rows raises the query's loss by about score / n"
        )
        return {
            **provenance(ready.run, method="InfluenceFunctions", verb=verb, scale=scale),
            "curvature": self.options.curvature,
            "solver": self.options.solver,
            "curvature_data": "train" if self.curvature_data is None else "given",
            "curvature_rows": n,
            **({} if self.curvature_data is None else {"curvature_digest": _digest(ready.rows.source.rows)}),
            **prepared.record(),
        }


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(options: CurvatureOptions) -> None:
    """Refuse what cannot be, and options that the solver would not read."""
    for name, known in (("curvature", CURVATURES), ("solver", SOLVERS)):
        if getattr(options, name) not in known:
            raise OptionError(
                f"InfluenceFunctions: {name} is {getattr(options, name)!r}. Choose one of {', '.join(known)}."
            )
    if options.solver == "ekfac" and options.curvature == "hessian":
        raise OptionError(
            "solver='ekfac' approximates Gauss-Newton, not the Hessian. Use curvature='gauss_newton', or another solver."
        )
    readers = {
        "tolerance": ("cg", "lissa"),
        "iterations": ("cg", "lissa"),
        "scale": ("lissa",),
        "samples": ("ekfac",),
    }
    for name, solvers in readers.items():
        value = getattr(options, name)
        if value is None:
            continue
        if options.solver not in solvers:
            raise OptionError(
                f"InfluenceFunctions: {name} is read by solver={' or '.join(map(repr, solvers))}, not by {options.solver!r}."
            )
        whole = name in {"iterations", "samples"}
        if not (_whole(value) if whole else _finite(value)) or value <= 0:
            raise OptionError(
                f"InfluenceFunctions: {name} is {value!r}. Give a positive {'whole ' if whole else ''}number."
            )
    if options.damping is not None and not (_finite(options.damping) and options.damping >= 0):
        raise OptionError(
            f"InfluenceFunctions: damping is {options.damping!r}. Give a number that is not negative."
        )
    if not _whole(options.seed):
        raise OptionError(f"InfluenceFunctions: seed is {options.seed!r}. Give a whole number.")
    refuse_zero_damping(options)


def _digest(rows: RowSource) -> str | None:
    """Of the rows' checksums, to know the data again, whatever the batches; None where they hold no tensors."""
    found = hashlib.sha256()
    for batch in rows.batches():
        sums = row_checksums(batch, double=True)
        if sums is None:
            return None
        found.update("".join(f"{value:.9e};" for value in sums.tolist()).encode())
    return found.hexdigest()[:16]


def _with_curvature(base: Plan, ready: _Ready, options: CurvatureOptions) -> Plan:
    """Add what the curvature costs: to make it ready, and to solve with it."""
    run, vectors, n, m = ready.run, ready.rows.vectors, len(ready.rows), len(ready.run.asked.rows)
    made = cost(ready.rows, run.train.wiring, options)
    at_once = preconditioned.rows_at_once(run, COPIES[options.solver], vectors)
    tiles = preconditioned.tiles_of(run.asked.rows.sizes, at_once)
    # Passes of one tile's solution, and the products of one vector that they are.
    solving = {"cg": PLANNED["cg"] + 1.0, "lissa": PLANNED["lissa"] / max(1, n // lissa.ROWS)}.get(
        options.solver, 0.0
    )
    held = min(m, at_once) * vectors.size * (8 * COPIES[options.solver] + run.dtype.itemsize)
    return replace(
        base,
        peak_bytes=base.peak_bytes + made.nbytes + held,
        seconds=base.seconds * tiles / base.passes + made.seconds + m * solving * made.product,
        passes=tiles + made.passes + tiles * math.ceil(solving),
    )
