"""``tracin index``: build, append, query, info, verify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracin.cli import index_options as options
from tracin.cli.cards import Known, known_of
from tracin.cli.options import Settings
from tracin.cli.output import Folder
from tracin.cli.printing import heading, say, table
from tracin.data import open_rows, rows_of
from tracin.errors import OptionError
from tracin.explain import evaluate_rows
from tracin.gradients.projection import Projection
from tracin.index.index import FEATURES, Index
from tracin.index.kept.contents import contents_of
from tracin.index.kept.places import storage_of
from tracin.index.making import verbs
from tracin.index.making.executors import Executor, Here, Processes
from tracin.index.making.on_ray import Ray
from tracin.index.making.tracing import Choices
from tracin.methods import TracInCP
from tracin.options import whole_number
from tracin.results import TopK
from tracin.study import Study, study_file

__all__ = ["append", "build", "info", "query", "verify"]


@dataclass(frozen=True)
class FromFile:
    """The method and the rows of a study file, which every worker opens for itself.

    Attributes:
        file: The study file.
        settings: How to run.
    """

    file: Path
    settings: Settings

    @contextmanager
    def opened(self) -> Iterator[tuple[TracInCP, Any]]:
        """Run the file.

        Yields:
            The method, and the training rows.
        """
        with study_file(self.file) as study:
            yield self.settings.method(study), study.train


def _length(data: Any, method: TracInCP) -> int:
    return len(open_rows(data, name="train", batch_size=method.settings.batch_size))


def _executor(who: options.Workers) -> Executor:
    whole_number(who.workers, "--workers", 1)
    if who.ray:
        return Ray(cpus=who.cpus, gpus=who.gpus)
    return Here() if who.workers == 1 else Processes(who.workers)


def build(command: options.Build) -> int:
    """Build an index, or what is missing of it."""
    size = FEATURES if command.size is None else command.size
    choices = Choices(
        Projection(size, command.seed, command.kind),
        command.dtype,
        whole_number(command.shard_rows, "--shard-rows", 1),
    )
    executor, storage = _executor(command.who), storage_of(command.out)
    columns = _labels(command.file, command.settings) if command.labels else None
    verbs.build(storage, FromFile(command.file, command.settings), choices, columns, executor)
    return info(options.Inside(command.out))


def _labels(file: Path, settings: Settings) -> dict[str, Sequence[int]]:
    """The labels of the training rows."""
    with study_file(file) as study:
        method = settings.method(study)
        rows = range(_length(study.train, method))
        found = evaluate_rows(method, study.train, rows, name="train", trajectory=method.trajectory[-1:])
        if found.labels is None:
            raise OptionError(
                "--labels: the task does not tell labels. Use a ready-made loss, or Task(outputs=...)."
            )
        return {"label": found.labels.tolist()}


def append(command: options.Append) -> int:
    """Add the rows that the study has gained."""
    contents = contents_of(storage_of(command.out))
    with study_file(command.file) as study:
        n = _length(study.train, command.settings.method(study))
    first = contents.rows
    going_on = n == first and len(contents.segments) > 1
    if n <= first and not going_on:
        raise OptionError(
            f"append: the study has {n} training rows, and the index {first}. There is nothing to add."
        )
    others = [name for name in contents.columns if name != "label"]
    if others:
        raise OptionError(
            f"append: the index has the columns {', '.join(others)}. Add rows from Python: Index.open(folder, "
            "method).append(rows, columns=...)."
        )
    columns = _labels(command.file, command.settings) if contents.columns and not going_on else None
    verbs.grow(contents, FromFile(command.file, command.settings), columns, _executor(command.who))
    return info(options.Inside(command.out))


def query(command: options.Query) -> int:
    """Ask an index about test rows."""
    folder = Folder(command.output.out, command.output.format)
    with study_file(command.file) as study:
        method = command.settings.method(study, normalize=command.normalize)
        index = Index.open(command.index, method, study.train)
        asked = list(dict.fromkeys(command.query))
        _refuse_outside(asked, len(open_rows(study.test, name="test", batch_size="auto")))
        rows = rows_of(study.test, asked)
        found = index.top_k(rows, command.top, where=_where(command.where), rerank=command.rerank)
        facts = known_of(method, study.train, _listed(found))
        records = _records(study, asked, found, facts)
        _tell(records, found)
        if folder:
            folder.table("answers", records)
            found.save(folder.path("top_k.safetensors"))
    folder.tell()
    return 0


def _refuse_outside(rows: Sequence[int], n: int) -> None:
    for row in rows:
        if not 0 <= row < n:
            raise OptionError(f"--query {row}: there are {n} test rows, 0 to {n - 1}.")


def _where(given: Sequence[str]) -> dict[str, list[Any]] | None:
    """``label=3`` as ``{"label": [3]}``; what reads as a number is one."""
    wanted: dict[str, list[Any]] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise OptionError(f"--where {text}: give COLUMN=VALUE, such as label=3.")
        wanted.setdefault(name, []).append(_value(value))
    return wanted or None


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _listed(found: TopK) -> list[int]:
    return [row for side in (found.proponents, found.opponents) for ids in side.ids.tolist() for row in ids]


def _records(
    study: Study, asked: Sequence[int], found: TopK, facts: dict[int, Known]
) -> list[dict[str, Any]]:
    records = []
    for sign, side in (("proponent", found.proponents), ("opponent", found.opponents)):
        for at, (ids, values) in enumerate(zip(side.ids.tolist(), side.values.tolist(), strict=True)):
            for rank, (row, score) in enumerate(zip(ids, values, strict=True), start=1):
                if score > 0 if sign == "opponent" else score < 0:
                    break  # fewer rows than were asked for have this sign
                label = facts[row].label
                records.append(
                    {
                        "query": asked[at],
                        "sign": sign,
                        "rank": rank,
                        "train": row,
                        "score": score,
                        "label": None if label is None else study.class_name(label),
                    }
                )
    return sorted(records, key=lambda record: list(asked).index(record["query"]))


def _tell(records: Sequence[dict[str, Any]], found: TopK) -> None:
    for row in dict.fromkeys(record["query"] for record in records):
        heading(f"Test row {row}")
        for sign in ("proponent", "opponent"):
            lines = [r for r in records if r["query"] == row and r["sign"] == sign]
            shown = [{key: r[key] for key in ("rank", "train", "score", "label")} for r in lines]
            if shown:
                table(shown, f"{sign.capitalize()}s")
            else:
                say(f"{sign.capitalize()}s: none; no row has a score of this sign.")
    say()
    for note in found.notes:
        say(note[0].upper() + note[1:])


def info(command: options.Inside) -> int:
    """Tell what is inside an index."""
    found = Index.open(command.folder).info()
    manifest, whole = found.manifest, "whole" if found.whole else "not whole"
    heading(f"{command.folder}: {found.rows:,} rows × {len(manifest.checkpoints)} checkpoints, {whole}")
    projection = manifest.projection
    table(
        [
            {
                "": "model",
                " ": f"{manifest.model}, {len(manifest.parameters)} parameters, loss {manifest.loss}",
            },
            {"": "features", " ": f"{manifest.size:,} per row and checkpoint, {manifest.dtype}"},
            {
                "": "projection",
                " ": f"{projection['kind']}, size {projection['size']}, seed {projection['seed']}",
            },
            {"": "shards", " ": f"{found.shards} of {found.wanted}, {manifest.shard_rows:,} rows each"},
            {"": "bytes", " ": f"{found.nbytes / 2**20:,.1f} MiB"},
            {"": "columns", " ": ", ".join(found.columns) or "none"},
            {"": "made with", " ": ", ".join(f"{key} {value}" for key, value in manifest.made_with.items())},
        ]
    )
    return 0


def verify(command: options.Check) -> int:
    """Read everything again."""
    broken = Index.open(command.folder).verify()
    if not broken:
        say(f"{command.folder}: every file is there and is what was written.")
        return 0
    say(
        f"{command.folder}: {len(broken)} files are missing or damaged. index build, with the same options and all rows, makes "
        "shards and columns anew:"
    )
    table([{"file": name} for name in broken])
    return 1
