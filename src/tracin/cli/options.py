"""What the commands take, as tyro reads it: one dataclass per command, its docstrings are the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro  # noqa: TID253  loaded with the command, not with the library

from tracin.data import BatchSize
from tracin.evaluation.mislabelled import Design
from tracin.evaluation.mislabelled.design import SHARES
from tracin.methods import TracInCP
from tracin.study import Study

__all__ = ["Audit", "Demo", "Explain", "Output", "Plan", "Settings", "StudyFile", "StudyRun", "Verify"]

Format = Literal["csv", "parquet", "json"]
Flip = Literal["random", "hardest"]
StudyFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py")]


@dataclass(frozen=True)
class Settings:
    """How to run."""

    weighting: Literal["learning_rate", "integrated", "uniform"] = "learning_rate"
    """What weighs a checkpoint: the rate of the last step before it, the sum of the rates since the checkpoint
    before, or 1."""

    batch_size: BatchSize = "auto"
    """Rows per batch, where the data does not batch itself. auto: what suits the model."""

    device: str = "auto"
    """Where to run, such as cpu or cuda:0. auto: where the model lies, or the GPU if there is one."""

    memory: str = "2GiB"
    """Bound on gradients held at a time. More means fewer passes."""

    quiet: bool = False
    """Show no progress."""

    debug: bool = False
    """Show the whole traceback of an error."""

    def method(self, study: Study, normalize: bool = False) -> TracInCP:
        """TracInCP with these settings."""
        return TracInCP(
            study.task,
            study.trajectory,
            weighting=self.weighting,
            normalize=normalize,
            batch_size=self.batch_size,
            device=self.device,
            memory=self.memory,
            progress=not self.quiet,
        )


@dataclass(frozen=True)
class Output:
    """What to write."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder to write into. Made if it is missing; files of the same names are replaced."""

    format: tuple[Format, ...] = ("csv",)
    """How to write tables; one or several of csv, parquet and json."""


@dataclass(frozen=True)
class Demo:
    """Trace handwritten digits, one label in ten made wrong on purpose.

    Trains a small network with checkpoints, checks the scores against autograd, looks for the wrong labels and
    explains three predictions. Writes report.html, pictures and tables. Takes less than a minute.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("demo")
    """Folder to write into. Made if it is missing; files of the same names are replaced."""

    format: tuple[Format, ...] = ("csv",)
    """How to write tables; one or several of csv, parquet and json."""

    seed: int = 0
    """Which split, which wrong labels, which initial weights."""

    epochs: int = 10
    """Passes of the training over its rows."""

    quiet: bool = False
    """Show no progress."""

    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True)
class Audit:
    """Find wrong labels: rank the training rows by how suspect their labels are, with a suggestion and the evidence.

    Prints the first suspects. With --out writes all rows as a table (audit), the rows by suspicion (suspects), the
    self-influence with where it comes from (self_influence.safetensors), the audit as tracin.audit.Audit.load reads it
    (audit/audit.safetensors), and report.html.
    """

    file: StudyFile
    """A Python file that defines study() -> tracin.Study."""

    top: int = 20
    """How many suspects to print and to show in the report."""

    evidence: int = 5
    """How many proponents and opponents to list for each suspect; 0 for none."""

    calibrate: bool = False
    """Make labels wrong on purpose, train anew by the study's fit, and choose the cut-off by what is found. Takes as long as
    a training."""

    precision: float | None = None
    """With --calibrate: the share of flagged rows that is to be wrong; 0.9 unless given."""

    index: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Read self-influence and evidence from this index of the training rows instead of computing them."""

    opposing: bool = False
    """Also look for training rows that oppose the test rows as a whole."""

    duplicates: bool = True
    """Look for near-duplicates with different labels."""

    export: tuple[Literal["cleanlab", "label-studio"], ...] = ()
    """With --out: also write cleanlab.csv or label-studio.json, one or both."""

    output: tyro.conf.OmitArgPrefixes[Output] = field(default_factory=Output)
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)


@dataclass(frozen=True)
class Explain:
    """Explain predictions: the training rows that taught one, and those that spoke against it.

    With --out writes the table, a picture sheet, the loss along training with each checkpoint's contribution,
    and report.html.
    """

    file: StudyFile
    """A Python file that defines study() -> tracin.Study."""

    query: Annotated[tuple[int, ...], tyro.conf.arg(metavar="ROW [ROW ...]")]
    """Positions of the test rows to explain."""

    target: Annotated[str | None, tyro.conf.arg(metavar="predicted|label|CLASS")] = None
    """Whose loss to explain: the predicted class, the label, or a class by name or number. For a wrong prediction,
    predicted also explains the label: what opposed the right class. By default predicted, or label where the task
    has no classes."""

    top: int = 5
    """How many proponents and opponents to list."""

    normalize: bool = False
    """Compare directions of gradients instead of products, so that rows with long gradients do not lead every list."""

    output: tyro.conf.OmitArgPrefixes[Output] = field(default_factory=Output)
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)


@dataclass(frozen=True)
class Verify:
    """Check exactness on this model: gradients of random rows against autograd, one row at a time.

    Prints the largest error and how each parameter was traced. Exits with 1 where the two differ.
    """

    file: StudyFile
    """A Python file that defines study() -> tracin.Study."""

    rows: int = 8
    """How many training rows to compare, at every checkpoint."""

    seed: int = 0
    """Which rows."""

    output: tyro.conf.OmitArgPrefixes[Output] = field(default_factory=Output)
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)


@dataclass(frozen=True)
class Plan:
    """Tell memory, time, passes and routes of tracing the test rows to the training rows, before any run."""

    file: StudyFile
    """A Python file that defines study() -> tracin.Study."""

    verb: Literal["influence", "top_k", "self_influence", "aggregate"] = "influence"
    """What to plan: all scores, the strongest of each test row, each training row against itself, or against the test rows'
    mean."""

    k: int = 10
    """With --verb top_k: how many of each sign."""

    queries: int | None = None
    """Plan for this many test rows instead of all."""

    output: tyro.conf.OmitArgPrefixes[Output] = field(default_factory=Output)
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)


@dataclass(frozen=True)
class StudyRun:
    """Judge methods on a known answer: labels made wrong on purpose, and how fast each method finds them.

    Plants flips, trains by plain SGD with checkpoints, runs every method on the same checkpoints, and writes a figure
    (study.png, study.svg), a table (table.csv, table.md) and study.json, which --replay runs again. Each training run
    is kept under FOLDER/cells as it goes on: a study that was cut short goes on with the same command.
    """

    what: Annotated[Literal["mislabelled"], tyro.conf.Positional, tyro.conf.arg(metavar="mislabelled")]
    """Which study."""

    data: Annotated[str, tyro.conf.arg(metavar="digits|fashion-mnist|mnist|cifar10|FILE.py")] = "digits"
    """What to train on: digits come with scikit-learn, the others are read from files. A FILE.py defines
    study() -> tracin.Study with tuples (inputs, labels) as train and test, and with fit."""

    data_folder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the files of fashion-mnist, mnist or cifar10 lie. Not needed for fashion-mnist where the Debian package
    dataset-fashion-mnist is installed, nor for cifar10 where datasets may download it."""

    model: Literal["mlp", "cnn", "resnet"] | None = None
    """Which model; cnn if nothing is said. Not for a FILE.py, which brings its own."""

    flips: tuple[Flip, ...] = cast("tuple[Flip, ...]", Design.flips)
    """Which wrong labels: any other class (random), or the strongest wrong class of a model trained on clean labels
    (hardest); one or both."""

    fraction: float = Design.fraction
    """The share of labels made wrong, between 0 and 1."""

    schedule: tuple[Literal["constant", "step", "cosine", "onecycle"], ...] | None = None
    """Schedules of the learning rate, compared in one table; constant and cosine if nothing is said. Not for a FILE.py."""

    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD [METHOD ...]")] = ()
    """Which methods; all if nothing is said. An unknown name tells the known ones."""

    seeds: int = Design.seeds
    """How many seeds: flips, first weights and the order of the rows differ."""

    rows: int | None = None
    """How many training rows; 10,000 if nothing is said, or all where there are fewer."""

    epochs: int | None = None
    """Passes over the rows; what suits the model if nothing is said. Not for a FILE.py."""

    checkpoints: int = Design.checkpoints
    """How many checkpoints, evenly over the training."""

    rate: float = Design.rate
    """The learning rate; the highest one of a schedule."""

    batch: int = Design.batch
    """Rows of a training step."""

    repair: bool = False
    """Also correct the wrong labels among the rows inspected first, train again, and compare the test accuracy
    (repair.png, repair.svg, repair.csv, repair.md). Takes a training per method and share."""

    repair_shares: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SHARE [SHARE ...]")] = SHARES
    """The shares of rows inspected before a repair."""

    replay: Annotated[Path | None, tyro.conf.arg(metavar="STUDY.json")] = None
    """Run the study of such a file again, and compare the numbers. Besides, only --out, --data-folder, --device,
    --memory, --format, --quiet and --debug may be given."""

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("study")
    """Folder to write into. Made if it is missing; files of the same names are replaced."""

    format: tuple[Format, ...] = ("csv",)
    """How to write tables besides Markdown; one or several of csv, parquet and json."""

    device: str = "auto"
    """Where to run, such as cpu or cuda:0. auto: the GPU if there is one."""

    memory: str = "2GiB"
    """Bound on gradients that a method holds at a time."""

    quiet: bool = False
    """Do not tell how far the study is."""

    debug: bool = False
    """Show the whole traceback of an error."""
