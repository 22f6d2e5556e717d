"""``Index``: the gradients of a training set, computed once and asked many times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracin.data import RowSource, open_rows
from tracin.errors import OptionError
from tracin.gradients.projection import Projection
from tracin.index.asking import answers
from tracin.index.asking.answers import Asked
from tracin.index.kept.contents import Contents, Info, contents_of
from tracin.index.kept.manifest import Manifest
from tracin.index.kept.places import storage_of
from tracin.index.kept.shards import DTYPES
from tracin.index.kept.sidecar import columns_of
from tracin.index.making import verbs
from tracin.index.making.building import InMemory
from tracin.index.making.comparing import refuse_other_length, refuse_other_rows
from tracin.index.making.executors import Executor, Here, Processes
from tracin.index.making.tracing import Choices
from tracin.methods.tracin_cp import TracInCP
from tracin.options import whole_number
from tracin.results import Scores, SelfInfluence, TopK

__all__ = ["FEATURES", "SHARD_ROWS", "Index"]

FEATURES, SHARD_ROWS = 1024, 4096


class Index:
    r"""Projected gradients of a training set in a folder, and the questions that they answer.

    .. math::
        \operatorname{score}(z, z') \approx \sum_c \eta_c \,
        \langle P \nabla_\theta \ell(\theta_c, z), P \nabla_\theta \ell(\theta_c, z') \rangle

    Building costs a pass over the rows at each checkpoint; a question costs the queries' gradients and a scan of the files.
    Rates are applied when a question is asked. Self-influence comes from full norms, and is exact. ``build`` and ``open``
    make an index; the method behind it must be the one that it was built with.

    Example:
        >>> import tempfile, torch, tracin
        >>> model = torch.nn.Linear(4, 3)
        >>> task = tracin.Task(model, tracin.losses.cross_entropy)
        >>> steps = tracin.Trajectory([tracin.Checkpoint(model.state_dict(), learning_rate=0.1)])
        >>> method = tracin.TracInCP(task, steps, progress=False)
        >>> rows = (torch.randn(20, 4), torch.arange(20) % 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = tracin.Index.build(method, rows, folder)
        ...     index.top_k((rows[0][:2], rows[1][:2]), k=3)
        TopK(2 queries, k=3, float32, Index)
    """

    def __init__(self, contents: Contents, method: TracInCP | None = None, train: Any = None) -> None:
        self._contents, self._method, self._train = contents, method, train

    @property
    def method(self) -> TracInCP | None:
        """The method that asks, None where the index was opened without one."""
        return self._method

    @property
    def train(self) -> Any:
        """The train rows, None where they are not at hand."""
        return self._train

    def asking(self, method: TracInCP, train: Any = None) -> Index:
        """The same index, asked by a method with other settings, such as other weights of the checkpoints.

        Args:
            method: Of the model, the loss and the checkpoints that the index was built with.
            train: The train rows, for ``rerank`` and the estimate of the error.

        Returns:
            The index.

        Raises:
            OptionError: ``method`` is no ``TracInCP``.
            DataError: ``train`` are other rows, as for ``open``.
        """
        other = Index(self._contents, _require_method(method), train)
        if train is not None and train is not self._train:
            other._refuse_other_rows(every=False)
        return other

    @property
    def manifest(self) -> Manifest:
        """What it was made from."""
        return self._contents.manifest

    # ---------------------------------------------------------------- making

    @classmethod
    def build(
        cls,
        method: TracInCP,
        train: Any,
        folder: str | Path,
        *,
        projection: Projection | int | None = None,
        dtype: str = "float16",
        shard_rows: int = SHARD_ROWS,
        columns: Mapping[str, Any] | None = None,
        workers: int | Executor = 1,
    ) -> Index:
        """Compute the gradients of all train rows at all checkpoints, and keep them.

        A build that was interrupted goes on where it stopped when it is called again in the same way, and ends in the same
        bytes, whatever ``batch_size`` is then: the rows per batch are those of the first call. With the rows of ``append``
        behind the others it makes what is missing of these too. Several may write into one folder.

        Args:
            method: Task, checkpoints and settings.
            train: The rows, as a method takes them.
            folder: Where the index lies: a path, or a URL that fsspec opens.
            projection: Features of a row at one checkpoint: their number or a ``tracin.Projection``; that of the method, or
                1,024 unless given.
            dtype: ``"float16"``, with a scale per row, or ``"float32"``.
            shard_rows: Rows of a file.
            columns: What else to keep of each row, by name: one value per row.
            workers: Processes, or what makes the shards, such as ``tracin.index.making.on_ray.Ray()``.

        Returns:
            The index.

        Raises:
            OptionError: An argument is out of range.
            IndexFolderError: The folder holds an index of other rows, checkpoints or choices, or cannot be written.
            DataError: A row is not the one that a shard was made of.
        """
        choices = _choices(method, projection, dtype, shard_rows)
        storage = storage_of(folder)
        verbs.build(storage, InMemory(method, train), choices, columns, _executor(workers))
        contents = contents_of(storage)
        n = len(_source(method, train))
        # Of an index that has grown meanwhile these are not all rows.
        return cls(contents, method, train if n == contents.rows else None)

    @classmethod
    def open(cls, folder: str | Path, method: TracInCP | None = None, train: Any = None) -> Index:
        """Open an index.

        Args:
            folder: Where it lies.
            method: The method that it was built with; what asks about queries needs it.
            train: The train rows, for ``rerank`` and the estimate of the error. Their number is compared, and their
                content: all of it where they are tensors, else that of each row that is read for an answer.

        Returns:
            The index.

        Raises:
            IndexFolderError: There is none, or it is damaged.
            DataError: ``train`` has more or fewer rows than the index, or a row of other content.
        """
        if method is not None:
            _require_method(method)
        index = cls(contents_of(storage_of(folder)), method, train)
        if train is not None:
            index._refuse_other_rows(every=False)
        return index

    def check_rows(self, train: Any = None) -> None:
        """Compare all train rows with those that the index was made of: their number, order and content. Reads all of them.

        Args:
            train: The rows; those of ``open`` unless given.

        Raises:
            OptionError: There are none.
            DataError: There are more or fewer, or one is another; it is named.
        """
        train = self._train if train is None else train
        if train is None:
            raise OptionError("check_rows needs the train rows: check_rows(train).")
        Index(self._contents, self._method, train)._refuse_other_rows(every=True)

    def _refuse_other_rows(self, *, every: bool) -> None:
        c, source = self._contents, _source(self._method, self._train)
        refuse_other_length(c.storage, c.segments, len(source))
        if every or not source.decodes:
            refuse_other_rows(c.storage, c.manifest, c.segments, source, range(c.rows))

    def append(
        self,
        rows: Any,
        *,
        columns: Mapping[str, Any] | None = None,
        start: int | None = None,
        workers: int | Executor = 1,
    ) -> Index:
        """Add rows behind those that are there. Called again with the same rows it goes on where it stopped.

        Where a segment of the index holds these very rows already, nothing is added: what is missing of it is made. To add
        equal rows once more, say how many rows come before them: ``append(rows, start=len(index))``.

        Args:
            rows: The new rows alone; their ids go on from the last one.
            columns: The same columns as those of the other rows.
            start: How many rows come before them: ``len(index)`` adds the rows whether or not there are equal ones; the
                first row of a segment goes on with that one. Rows without any tensor cannot be compared: an interrupted
                ``append`` of them goes on with it only.
            workers: As for ``build``.

        Returns:
            The index with the new rows; without train rows for ``rerank``.

        Raises:
            IndexFolderError: The index is of another model, or cannot be written.
            OptionError: The columns are not those of the other rows or of other types, or no segment begins at ``start``.
            DataError: A row is not the one that a shard was made of.
        """
        method = self._asked("append")
        verbs.append(self._contents, InMemory(method, rows), columns, _executor(workers), start)
        return Index(contents_of(self._contents.storage), method)

    def verify(self) -> list[str]:
        """Read every shard again and compare it with its digests.

        Returns:
            The names of files that are missing or damaged: shards and columns, which ``build`` with all rows and columns
            makes anew, and segments.
        """
        return self._contents.broken(show=self._method is not None and self._method.settings.progress)

    def info(self) -> Info:
        """What is inside.

        Returns:
            Rows, shards, bytes, columns and the configuration.
        """
        return self._contents.info()

    def columns(self, names: Sequence[str] | None = None) -> Any:
        """The sidecar's columns.

        Args:
            names: Which; all unless given.

        Returns:
            A ``pyarrow.Table`` with the column ``row`` and these.

        Raises:
            OptionError: There is no such column.
        """
        return columns_of(self._contents.storage, self._contents.segments, names)

    def __len__(self) -> int:
        return self._contents.rows

    # ---------------------------------------------------------------- asking

    def top_k(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Any = None,
        rerank: int = 0,
        estimate: bool = True,
        workers: int | Executor = 1,
    ) -> TopK:
        """The k strongest proponents and opponents of every query.

        Args:
            queries: Query rows.
            k: List length.
            where: Only rows whose columns have these values: ``{"label": 3}``, or an expression of ``pyarrow.compute``.
            rerank: Score so many candidates on each side with full gradients, and choose the k among them.
            estimate: Measure the error on a sample of the train rows, where they are at hand; it is in ``provenance`` and
                among ``notes``.
            workers: As for ``build``: each scans some of the shards, and their lists are merged.

        Returns:
            The lists.

        Raises:
            OptionError: k is larger than the number of rows, a column is not there, or ``rerank`` has no train rows.
            IndexFolderError: The index is not whole, damaged, or of another model or training loss.
            DataError: A train row that is read is not the one that the index was made of.
        """
        asked = self._question("top_k", where)
        executor = _executor(workers)
        return answers.top_k(asked, queries, k, rerank=rerank, estimate=estimate, executor=executor)

    def influence(self, queries: Any, *, where: Any = None, estimate: bool = True) -> Scores:
        """Scores of every row for every query.

        Args:
            queries: Query rows.
            where: As for ``top_k``.
            estimate: As for ``top_k``.

        Returns:
            ``values`` [q, rows that ``where`` keeps].
        """
        return answers.influence(self._question("influence", where), queries, estimate=estimate)

    def aggregate(
        self, validation: Any, *, by: Any = None, reduction: str = "mean", where: Any = None
    ) -> Scores:
        """The influence of every row on a whole validation set, or on each group of it, as ``TracInCP.aggregate`` has it.

        Args:
            validation: Validation rows.
            by: The group of each row, whole numbers; ``"label"``: its label; None: all rows are one group.
            reduction: ``"mean"``: the influence on a group's mean loss; ``"sum"``: on its sum.
            where: As for ``top_k``.

        Returns:
            ``values`` [groups, rows]; ``query_ids`` are the groups in ascending order.

        Raises:
            OptionError: ``by`` is no list of whole numbers, or of another length, or there are no labels; an unknown
                ``reduction``.
        """
        return answers.aggregate(self._question("aggregate", where), validation, by, reduction)

    def self_influence(self, *, where: Any = None) -> SelfInfluence:
        """score(z, z) of every row, from the norms of full gradients: no projection is in it.

        Args:
            where: As for ``top_k``.

        Returns:
            ``values`` [rows that ``where`` keeps].

        Raises:
            OptionError: Under ``normalize``, where every row has the same.
        """
        return answers.self_influence(self._question("self_influence", where))

    def _asked(self, verb: str) -> TracInCP:
        if self._method is None:
            raise OptionError(f"{verb} needs the model: Index.open(folder, method).")
        return self._method

    def _question(self, verb: str, where: Any) -> Asked:
        return Asked.of(self._contents, self._asked(verb), self._train, where)


def _source(method: TracInCP | None, train: Any) -> RowSource:
    if method is None:
        return open_rows(train, name="train", batch_size="auto")
    settings = method.settings
    return open_rows(train, name="train", batch_size=settings.batch_size, collate=settings.collate)


def _require_method(method: Any) -> TracInCP:
    if not isinstance(method, TracInCP):
        raise OptionError(
            f"Index: method is a {type(method).__name__}. Give tracin.TracInCP(task, trajectory)."
        )
    return method


def _choices(method: Any, projection: Any, dtype: str, shard_rows: int) -> Choices:
    method = _require_method(method)
    if isinstance(projection, int) and not isinstance(projection, bool):
        projection = Projection(projection)
    projection = projection or method.settings.projection or Projection(FEATURES)
    if not isinstance(projection, Projection):
        raise OptionError(
            f"Index: projection is {projection!r}. Give a number of features or tracin.Projection(size=...)."
        )
    if dtype not in DTYPES:
        raise OptionError(f"Index: dtype is {dtype!r}. Choose one of {', '.join(DTYPES)}.")
    return Choices(projection, dtype, whole_number(shard_rows, "Index: shard_rows", 1))


def _executor(workers: Any) -> Executor:
    if isinstance(workers, Executor):
        return workers
    whole_number(workers, "Index: workers", 1)
    return Here() if workers == 1 else Processes(workers)
