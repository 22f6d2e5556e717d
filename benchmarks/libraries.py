"""The libraries that others use, each set up as its own documentation has it, for the same scores on the same files.

Every function returns a closure that computes scores [q, n] = Σ_c η_c ⟨g_c(z), g_c(z')⟩. Where a library cannot be asked
for that sum, what it lacks is done outside it (the learning rates), never what it would do itself. Importing and
wrapping happen before the closure is returned, so that no library is charged for them.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from peers import Call, rates
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from workloads import Rows, Workload

__all__ = ["LIBRARIES", "captum", "captum_exact", "dattri", "dattri_llm", "kronfluence"]

Run = Callable[[], Tensor]


class Loader:
    """Loads a checkpoint into a model and remembers the rate of the last one."""

    def __init__(self, workload: Workload) -> None:
        self.rates = {str(c.path): rate for c, rate in zip(workload.trajectory, rates(workload), strict=True)}
        self.rate = 1.0

    def __call__(self, model: nn.Module, path: str) -> float:
        load_model(model, path)
        self.rate = self.rates[str(path)]
        return self.rate

    def returning_model(self, model: nn.Module, path: str) -> nn.Module:
        self(model, path)
        return model.eval()


class Outputs:
    """The workload's loss on (outputs, targets), as captum calls it: per row, or summed for its fast mode."""

    def __init__(self, workload: Workload, reduction: str) -> None:
        self.loss, self.reduction = workload.case.loss, reduction

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self.loss(lambda _: outputs, (None, targets))
        return losses.sum() if self.reduction == "sum" else losses


def paths_of(workload: Workload) -> list[str]:
    return [str(checkpoint.path) for checkpoint in workload.trajectory]


def _captum(workload: Workload, train: Rows, queries: Rows, *, fast: bool) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        influence = importlib.import_module("captum.influence")

    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = influence.TracInCP(
                copy.deepcopy(workload.model),
                TensorDataset(*train),
                paths_of(workload),
                checkpoints_load_func=Loader(workload),
                loss_fn=Outputs(workload, "sum" if fast else "none"),
                batch_size=workload.case.batch,
                sample_wise_grads_per_batch=fast,
            )
            return method.influence(queries).detach()

    return run


def captum(workload: Workload) -> Run:
    """TracInCP in its per-sample mode, on all rows."""
    return _captum(workload, workload.train, workload.queries, fast=True)


def captum_exact(workload: Workload, rows: Sequence[int], queries: Sequence[int]) -> Run:
    """TracInCP's slow exact path, on a few rows: for its error alone."""
    few = [
        tuple(leaf[list(at)] for leaf in side)
        for side, at in ((workload.train, rows), (workload.queries, queries))
    ]
    return _captum(workload, few[0], few[1], fast=False)


def dattri(workload: Workload) -> Run:
    """``TracInAttributor`` without its projection; all queries are one batch, since it makes them anew for each train batch."""
    algorithm = importlib.import_module("dattri.algorithm.tracin")
    tasks = importlib.import_module("dattri.task")
    case, model = workload.case, workload.model

    def loss(parameters: dict[str, Tensor], row: Rows) -> Tensor:
        return case.loss(Call(model, parameters), tuple(leaf[None] for leaf in row))[0]

    def run() -> Tensor:
        task = tasks.AttributionTask(
            loss, model, paths_of(workload), checkpoints_load_func=Loader(workload).returning_model
        )
        method = algorithm.TracInAttributor(task, torch.tensor(rates(workload)), normalized_grad=False)
        method.projector_kwargs = None  # the argument None means its default: a projection to 512 numbers
        loaders = (
            DataLoader(TensorDataset(*workload.train), case.batch),
            DataLoader(TensorDataset(*workload.queries), len(workload.queries[0])),
        )
        with redirect_stderr(io.StringIO()):
            return method.attribute(*loaders).mT

    return run


class Numbered(Dataset):
    """Rows with their numbers: dattri-llm knows a row by a hash of its content, and two rows may be equal."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"x": self.rows[0][at], "y": self.rows[1][at], "row": torch.tensor(at)}


def dattri_llm(workload: Workload) -> Run:
    """``TracInAttributor``, factorized hooks on every layer that takes them, the learning rates in the train loss."""
    library = importlib.import_module("dattri_llm")
    importlib.import_module("transformers")
    case = workload.case

    def run() -> Tensor:
        loader = Loader(workload)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return case.loss(model, (batch["x"], batch["y"])).sum()

        task = library.AttributionTask(
            loss_func=lambda model, batch: loader.rate * loss(model, batch),
            model=workload.model,
            checkpoints=paths_of(workload),
            target_func=loss,
            checkpoints_load_func=loader.returning_model,
        )
        with tempfile.TemporaryDirectory() as folder:
            arguments = library.AttributionArguments(
                output_dir=folder,
                per_device_train_batch_size=case.batch,
                per_device_eval_batch_size=case.batch,
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            score = library.TracInAttributor(arguments, task=task).attribute(
                Numbered(workload.train),
                Numbered(workload.queries),
                hook_config=library.HookManagerConfig(linear_io=library.REGISTER_ALL),
            )
        _, matrix = score.agnostic_matrix()
        return matrix.mT

    return run


def kronfluence(workload: Workload) -> Run:
    """Pairwise products without curvature, one analyzer per checkpoint, all queries held at once."""
    analysis = importlib.import_module("kronfluence.analyzer")
    arguments = importlib.import_module("kronfluence.arguments")
    tasks = importlib.import_module("kronfluence.task")
    logging.getLogger("kronfluence").setLevel(logging.ERROR)
    case = workload.case

    class Products(tasks.Task):
        def compute_train_loss(self, batch: Rows, model: nn.Module, sample: bool = False) -> Tensor:
            del sample
            return case.loss(model, batch).sum()

        def compute_measurement(self, batch: Rows, model: nn.Module) -> Tensor:
            return case.loss(model, batch).sum()

    def one(path: Path, rate: float, folder: str) -> Tensor:
        model, task = copy.deepcopy(workload.model), Products()
        load_model(model, path)
        analyzer = analysis.Analyzer(
            "products", analysis.prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder,
            log_level=logging.ERROR,
        )  # fmt: skip
        train, queries = TensorDataset(*workload.train), TensorDataset(*workload.queries)
        analyzer.fit_all_factors("none", train, factor_args=arguments.FactorArguments(strategy="identity"))
        batch = min(case.batch, len(queries))
        steps = -(-len(queries) // batch)
        analyzer.compute_pairwise_scores(
            "scores", "none", queries, train, batch, case.batch,
            score_args=arguments.ScoreArguments(query_gradient_accumulation_steps=steps),
        )  # fmt: skip
        return rate * analyzer.load_pairwise_scores("scores")["all_modules"]

    def run() -> Tensor:
        total: Any = 0
        for checkpoint, rate in zip(workload.trajectory, rates(workload), strict=True):
            with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
                total = total + one(checkpoint.path, rate, folder)
        return total

    return run


LIBRARIES = {
    "captum": captum,
    "dattri": dattri,
    "dattri_llm": dattri_llm,
    "kronfluence": kronfluence,
}
