"""What an index was made from, written once: its configuration, the fingerprints behind it, and the versions.

``manifest.json`` holds what every shard depends on. Two builds with the same manifest make the same bytes; one that
differs is refused with the differences named. The rows come in segments: the first of ``build``, and one of each
``append``, each with a file of its own, so that nothing is ever written twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tracin.errors import IndexFolderError
from tracin.index.kept.storage import Storage

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "Manifest",
    "Segment",
    "read_manifest",
    "read_segments",
    "segment_name",
]

FORMAT, VERSION = "tracin.index", 2
MANIFEST = "manifest.json"
SEGMENT = "segment-"

WORDS = {
    "model": "the model",
    "loss": "the loss",
    "parameters": "the traced parameters",
    "checkpoints": "the checkpoints",
    "projection": "the projection",
    "dtype": "the dtype of the features",
    "shard_rows": "shard_rows",
    "precision": "the precision",
    "groups": "the groups of parameters with rates of their own",
}


@dataclass(frozen=True)
class Manifest:
    """The configuration of an index.

    Attributes:
        model: The model's class.
        loss: The loss function's name.
        parameters: Shape of each traced parameter, in order.
        checkpoints: For each checkpoint: name, step, rates, and a digest of the model's state.
        projection: Size, seed and kind.
        features: Features of each parameter; their sum is d.
        groups: Parameters that share all their rates; squared norms are kept for each group.
        dtype: ``"float32"``, or ``"float16"`` with a scale per row.
        precision: In which the gradients were computed.
        shard_rows: Rows of a shard.
        batch_rows: Rows of a batch within a shard, of every build into this folder; told, never compared.
        made_with: Versions, threads and device; told, never compared.
    """

    model: str
    loss: str
    parameters: dict[str, list[int]]
    checkpoints: list[dict[str, Any]]
    projection: dict[str, Any]
    features: dict[str, int]
    groups: list[list[str]]
    dtype: str
    precision: str
    shard_rows: int
    batch_rows: int
    made_with: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Features d of a row at one checkpoint."""
        return sum(self.features.values())

    def compared(self) -> dict[str, Any]:
        """What two builds must agree in."""
        return {name: value for name, value in asdict(self).items() if name != "made_with"}

    @property
    def digest(self) -> str:
        """A hash of what is compared, which every shard carries."""
        return _digest(self.compared())

    def differences(self, other: Manifest) -> list[str]:
        """What differs, in words: here, and there.

        Args:
            other: Another manifest.

        Returns:
            One line for each difference.
        """
        mine, theirs = self.compared(), other.compared()
        told = []
        for name, word in WORDS.items():
            if name in mine and mine[name] != theirs[name]:
                here, there = _first_difference(mine[name], theirs[name])
                told.append(f"{word}: {here} in the index, {there} now")
        return told

    def to_bytes(self) -> bytes:
        """The file's content."""
        content = {"format": FORMAT, "version": VERSION, "digest": self.digest, **asdict(self)}
        return (json.dumps(content, indent=1) + "\n").encode()


def _first_difference(mine: Any, theirs: Any) -> tuple[str, str]:
    """Two values cut down to where they differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            if mine.get(key) != theirs.get(key):
                here, there = _first_difference(mine.get(key, "nothing"), theirs.get(key, "nothing"))
                return f"{key} {here}", f"{key} {there}"
        return "another order", "this one"
    if isinstance(mine, list) and isinstance(theirs, list):
        if len(mine) != len(theirs):
            return f"{len(mine)} of them", f"{len(theirs)}"
        for at, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            if one != other:
                here, there = _first_difference(one, other)
                return f"number {at}: {here}", f"{there}"
    return _shown(mine), _shown(theirs)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(content: Any) -> str:
    # Unsorted: features lie in the order of the parameters.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def segment_name(start: int) -> str:
    """The file of the segment that begins with a row."""
    return f"{SEGMENT}{start:012d}.json"


@dataclass(frozen=True)
class Segment:
    """Consecutive rows that were added at once.

    Attributes:
        start: Id of the first row.
        rows: How many.
        fingerprint: Of some of the rows' content; None where rows have none.
        columns: The sidecar's columns, empty without one.
        sidecar_digest: A hash of the sidecar's file; None without one.
    """

    start: int
    rows: int
    fingerprint: str | None = None
    columns: tuple[str, ...] = ()
    sidecar_digest: str | None = None

    @property
    def stop(self) -> int:
        """Id after the last row."""
        return self.start + self.rows

    @property
    def name(self) -> str:
        """The segment's file."""
        return segment_name(self.start)

    @property
    def sidecar(self) -> str:
        """The file of its columns."""
        return f"rows-{self.start:012d}.parquet"

    def to_bytes(self) -> bytes:
        """The file's content."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return (json.dumps(content, indent=1) + "\n").encode()


def _parsed(storage: Storage, name: str) -> dict[str, Any]:
    path = f"{storage.where}/{name}"
    try:
        content = json.loads(bytes(storage.read(name)).decode())
    except ValueError as cause:
        raise IndexFolderError(
            f"{path} is damaged ({cause}). Build the index again in an empty folder."
        ) from cause
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise IndexFolderError(
            f"{path} is no file of a tracin index. Give the folder that index build wrote."
        )
    version = content.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise IndexFolderError(
            f"{path} is of format {version}, and this tracin reads {VERSION}: "
            + ("upgrade tracin." if newer else "build the index again in an empty folder.")
        )
    return content


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of an index.

    Args:
        storage: Its folder.

    Returns:
        The manifest.

    Raises:
        IndexFolderError: There is none, or it is damaged, or of another version.
    """
    if MANIFEST not in storage.names():
        raise IndexFolderError(
            f"{storage.where} holds no index: {MANIFEST} is not there. Give the folder that index build wrote."
        )
    content = _parsed(storage, MANIFEST)
    wanted = {f.name for f in fields(Manifest)}
    found = None
    with suppress(TypeError, AttributeError, ValueError):
        found = Manifest(**{name: value for name, value in content.items() if name in wanted})
    if found is None or content.get("digest") != found.digest:
        raise IndexFolderError(
            f"{storage.where}/{MANIFEST} is damaged: its content is not what was written. Build the index again in an "
            "empty folder."
        )
    return found


def read_segments(storage: Storage) -> list[Segment]:
    """The rows of an index, segment by segment.

    Args:
        storage: Its folder.

    Returns:
        Segments in order, from row 0 without a gap.

    Raises:
        IndexFolderError: One is missing or damaged.
    """
    names = sorted(name for name in storage.names() if name.startswith(SEGMENT) and name.endswith(".json"))
    segments: list[Segment] = []
    for name in names:
        content = _parsed(storage, name)
        segment = None
        with suppress(KeyError, TypeError, ValueError):
            segment = Segment(
                content["start"],
                content["rows"],
                content["fingerprint"],
                tuple(content["columns"]),
                content["sidecar_digest"],
            )
        if segment is None or segment.name != name or segment.rows < 1:
            raise IndexFolderError(
                f"{storage.where}/{name} is damaged. Build the index again in an empty folder."
            )
        segments.append(segment)
    _refuse_gaps(storage, segments)
    return segments


def _refuse_gaps(storage: Storage, segments: Sequence[Segment]) -> None:
    expected = 0
    for segment in segments:
        if segment.start != expected:
            raise IndexFolderError(
                f"{storage.where}: the segment of rows from {expected} is missing. Restore {SEGMENT}{expected:012d}.json, or "
                "build the index again in an empty folder."
            )
        expected = segment.stop
