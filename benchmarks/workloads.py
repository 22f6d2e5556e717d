"""What is measured: a model, its loss, real rows and a recorded trajectory of each."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from models import GPT, Recurrent, ResNet, cnn, mlp
from torch import Tensor, nn

import tracin

__all__ = [
    "CASES",
    "FIRST",
    "NAMES",
    "Case",
    "Workload",
    "batches",
    "build",
    "case_of",
    "made",
    "mean_loss",
    "opened",
]

Rows = tuple[Tensor, Tensor]

FASHION = Path("/usr/share/datasets/fashion-mnist")
MISSING = (
    "Fashion-MNIST is not at {folder}. Install Debian's package (apt-get install dataset-fashion-mnist), or "
    "give the folder of the four idx files with --data. No other data stands in for it."
)


@dataclass(frozen=True)
class Case:
    """A model and the sizes of its run, before any data is read."""

    title: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Rows], Tensor]
    rows: int
    queries: int
    batch: int
    checkpoints: int
    rate: float
    pictures: bool
    length: int = 64
    methods: tuple[str, ...] = ()
    patience: float = 8.0

    def runs(self, method: str) -> bool:
        """Whether this workload measures the method: all of them, unless it names some."""
        return not self.methods or method in self.methods


@dataclass(frozen=True)
class Workload:
    """Everything that the methods are given: the same model, rows and files for each."""

    name: str
    case: Case
    model: nn.Module
    train: Rows
    queries: Rows
    trajectory: tracin.Trajectory

    @property
    def row_passes(self) -> int:
        """Rows × checkpoints that one plain pass reads."""
        return (len(self.train[0]) + len(self.queries[0])) * len(self.trajectory)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def token_loss(model: nn.Module, batch: Rows) -> Tensor:
    """Cross-entropy of the next token, summed over each row's tokens."""
    inputs, targets = batch
    logits = model(inputs)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).sum(1)


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over classes or the next token, as a training loop has it."""
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


VOCABULARY, LENGTH = 1000, 64
GPT_SHAPE = partial(GPT, vocabulary=VOCABULARY, length=LENGTH, width=128, layers=4, heads=4)
GPT_WIDE = partial(GPT, vocabulary=VOCABULARY, length=128, width=256, layers=4, heads=4)
ENTROPY = tracin.losses.cross_entropy
CASES = {
    "mlp": Case("MLP 784-256-64-10", mlp, ENTROPY, 2000, 100, 100, 3, 0.1, True),
    "cnn": Case("CNN, two conv and two linear layers", cnn, ENTROPY, 2000, 100, 100, 3, 0.1, True),
    "resnet": Case("ResNet with BatchNorm in eval", ResNet, ENTROPY, 2000, 100, 100, 3, 0.05, True),
    "gpt": Case("GPT-2 shape, 64 tokens, tied", GPT_SHAPE, token_loss, 256, 16, 16, 3, 0.002, False),
    "mlp-large": Case("MLP, more rows", mlp, ENTROPY, 5000, 200, 100, 3, 0.1, True),
    "cnn-large": Case("CNN, more rows", cnn, ENTROPY, 5000, 200, 100, 3, 0.1, True),
    "resnet-large": Case(
        "ResNet, more rows",
        ResNet,
        ENTROPY,
        5000,
        200,
        100,
        3,
        0.05,
        True,
        methods=("influence", "self_influence"),
    ),
    "gpt-wide": Case(
        "GPT-2 shape, 4 × 256, 128 tokens, tied",
        GPT_WIDE,
        token_loss,
        256,
        16,
        16,
        3,
        0.002,
        False,
        128,
        ("influence", "vmap", "captum", "dattri", "dattri_llm", "kronfluence"),
        20.0,
    ),
    "lstm": Case(
        "LSTM language model, 64 tokens",
        partial(Recurrent, VOCABULARY),
        token_loss,
        256,
        16,
        16,
        3,
        0.1,
        False,
        methods=("influence", "top_k", "self_influence", "vmap"),
    ),
}
NAMES = tuple(CASES)
FIRST = NAMES[:4]


def case_of(text: str) -> Case:
    """``"cnn"``, or with other sizes: ``"cnn:rows=500,checkpoints=1"``, ``"mlp:width=1024"``, ``"gpt:length=32"``."""
    name, _, rest = text.partition(":")
    changes = {key: int(value) for key, _, value in (item.partition("=") for item in rest.split(",") if item)}
    case, width = CASES[name], changes.pop("width", None)
    if "length" in changes or (width and not case.pictures):
        shape = {"length": changes.get("length", case.length), "width": width or 128}
        changes["model"] = partial(GPT, vocabulary=VOCABULARY, layers=4, heads=4, **shape)
    elif width:  # of the MLP alone
        changes["model"] = partial(mlp, width)
    return replace(case, **changes)


def read_idx(path: Path, dims: int) -> Tensor:
    """An idx file of unsigned bytes: a magic number, the sizes, the values."""
    with gzip.open(path) as file:
        raw = file.read()
    sizes = [int.from_bytes(raw[4 * (1 + axis) : 4 * (2 + axis)], "big") for axis in range(dims)]
    return torch.frombuffer(bytearray(raw[4 * (1 + dims) :]), dtype=torch.uint8).view(sizes)


def fashion(folder: Path, split: str, n: int) -> Rows:
    """The first n pictures of a split, [n, 1, 28, 28], with mean 0.286 and deviation 0.353 taken out."""
    images, labels = folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"
    if not (images.is_file() and labels.is_file()):
        raise SystemExit(MISSING.format(folder=folder))
    pictures = read_idx(images, 3)[:n, None].float() / 255
    return (pictures - 0.286) / 0.353, read_idx(labels, 1)[:n].long()


def random_tokens(n: int, length: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, VOCABULARY, (n, length + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def batches(rows: Rows, size: int) -> list[Rows]:
    """The rows in order, ``size`` at a time, as views."""
    return list(zip(*(tensor.split(size) for tensor in rows), strict=True))


def train(case: Case, model: nn.Module, rows: Rows, folder: Path) -> tracin.Trajectory:
    """One epoch of plain SGD per checkpoint, recorded as a user would."""
    optimizer = torch.optim.SGD(model.parameters(), lr=case.rate)
    model.train()
    with tracin.CheckpointRecorder(folder, model, optimizer) as recorder:
        for epoch in range(case.checkpoints):
            for batch in batches(rows, case.batch):
                optimizer.zero_grad()
                case.loss(model, batch).mean().backward()
                optimizer.step()
            recorder.save(step=epoch + 1)
            optimizer.param_groups[0]["lr"] *= 0.7
        return recorder.trajectory()


def rows_of(case: Case, data: Path) -> tuple[Rows, Rows]:
    """Train rows and queries."""
    if case.pictures:
        return fashion(data, "train", case.rows), fashion(data, "t10k", case.queries)
    return random_tokens(case.rows, case.length, 1), random_tokens(case.queries, case.length, 2)


def made(name: str, case: Case, folder: Path, data: Path = FASHION) -> Workload:
    """Read the rows, train the model, and save its checkpoints in ``folder``."""
    rows, queries = rows_of(case, data)
    torch.manual_seed(0)
    model = case.model()
    trajectory = train(case, model, rows, folder)
    model.zero_grad()
    return Workload(name, case, model.eval(), rows, queries, trajectory)


def opened(name: str, case: Case, folder: Path, data: Path = FASHION) -> Workload:
    """The workload whose checkpoints ``made`` left in ``folder``."""
    rows, queries = rows_of(case, data)
    torch.manual_seed(0)
    return Workload(name, case, case.model().eval(), rows, queries, tracin.Trajectory.from_folder(folder))


def build(name: str, folder: Path, data: Path = FASHION) -> Workload:
    """Read the rows, train the model, and save its checkpoints.

    Args:
        name: One of ``NAMES``.
        folder: Where the checkpoints go.
        data: Folder of Fashion-MNIST's idx files.

    Returns:
        The workload, its model in eval mode.
    """
    return made(name, CASES[name], folder, data)
