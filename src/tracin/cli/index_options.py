"""What ``tracin index`` takes: one dataclass per command below it, its docstrings are the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro  # noqa: TID253  loaded with the command, not with the library

from tracin.cli.options import Output, Settings, StudyFile

__all__ = ["Append", "Build", "Check", "IndexCommand", "Inside", "Query"]

Place = Annotated[str, tyro.conf.arg(metavar="FOLDER")]
PositionalPlace = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]


@dataclass(frozen=True)
class Workers:
    """Who makes the shards."""

    workers: int = 1
    """Processes of this machine."""

    ray: bool = False
    """Make the shards on a Ray cluster: the one at RAY_ADDRESS, or one of this machine."""

    cpus: float = 1.0
    """With --ray: CPUs of a worker."""

    gpus: float = 0.0
    """With --ray: GPUs of a worker; a fraction shares one."""


@dataclass(frozen=True)
class Build:
    """Compute the projected gradients of all training rows once, and keep them.

    A build that was interrupted goes on where it stopped when the same command is run again, and several may write
    into one folder.
    """

    file: StudyFile
    """A Python file that defines study() -> tracin.Study."""

    out: Place
    """Where the index lies: a folder, or a URL such as s3://bucket/index."""

    size: int | None = None
    """Features of a row at a checkpoint, 1,024 if nothing is said. More is nearer to exact scores, and larger."""

    seed: int = 0
    """Which random projection."""

    kind: Literal["kronecker", "rank_one"] = "kronecker"
    """Which kind of projection."""

    dtype: Literal["float16", "float32"] = "float16"
    """How features are kept; float16 with a scale per row."""

    shard_rows: int = 4096
    """Rows of a file."""

    labels: bool = False
    """Keep each row's label as the column label, for --where. Takes a forward pass at the last checkpoint."""

    who: tyro.conf.OmitArgPrefixes[Workers] = field(default_factory=Workers)
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)


@dataclass(frozen=True)
class Append:
    """Add the training rows that the study has gained behind those of the index."""

    file: StudyFile
    """The study file; its training rows begin with those of the index."""

    out: Place
    """The index."""

    who: tyro.conf.OmitArgPrefixes[Workers] = field(default_factory=Workers)
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)


@dataclass(frozen=True)
class Check:
    """Read every file of an index again and compare it with its checksums. Exits with 1 where one is missing or damaged."""

    folder: PositionalPlace
    """The index."""

    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True)
class Inside:
    """Tell what is inside an index."""

    folder: PositionalPlace
    """The index."""

    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True)
class Query:
    """The strongest proponents and opponents of test rows, from an index.

    Prints them, and how far the index is from exact scores on a sample of the rows.
    """

    file: StudyFile
    """The study file that the index was built with."""

    index: Place
    """The index."""

    query: Annotated[tuple[int, ...], tyro.conf.arg(metavar="ROW [ROW ...]")]
    """Positions of the test rows."""

    top: int = 10
    """How many of each sign."""

    where: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=VALUE [COLUMN=VALUE ...]")] = ()
    """Only training rows whose columns have these values; a column that is given twice may have either."""

    rerank: int = 0
    """Score so many candidates of each sign with full gradients, and choose among them."""

    normalize: bool = False
    """Compare directions of gradients instead of products."""

    output: tyro.conf.OmitArgPrefixes[Output] = field(default_factory=Output)
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)


IndexCommand = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Append, tyro.conf.subcommand("append")]
    | Annotated[Query, tyro.conf.subcommand("query")]
    | Annotated[Inside, tyro.conf.subcommand("info")]
    | Annotated[Check, tyro.conf.subcommand("verify")]
)
