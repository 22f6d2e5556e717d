r"""One shard: the projected gradients of some rows at one checkpoint, as a safetensors file.

    features  [r, d]  P g_c(z), float32; or float16, of unit length
    scales    [r]     the lengths that float16 features were divided by
    norms     [r, G]  ‖g_c(z)‖² of each group of parameters, float32: full gradients, not projected
    checksums [r]     one float64 per row of data, so that rows that change between checkpoints are found

No rate is in them. The header carries the digest of the manifest, the fingerprint of the segment's rows, and a digest of
every tensor, so that a tensor can be read by itself and is never read wrong. The name says the checkpoint and the rows.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tracin.errors import IndexFolderError
from tracin.index.kept.manifest import Manifest, Segment
from tracin.index.kept.storage import Storage
from tracin.shapes import Float

__all__ = [
    "DTYPES",
    "Shard",
    "Unit",
    "decoded",
    "encoded",
    "first_row",
    "read_checksums",
    "read_features",
    "read_norms",
    "read_shard",
    "units",
]

DTYPES = {"float32": torch.float32, "float16": torch.float16}
_NAMES = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
HEADER = "tracin"
HEADER_BYTES = 1 << 20  # more than any header of ours
FORMAT = "tracin.index.shard"


@dataclass(frozen=True, order=True)
class Unit:
    """One piece of work: the rows ``start`` to ``stop`` at a checkpoint; ``fingerprint`` is that of their segment."""

    checkpoint: int
    start: int
    stop: int
    fingerprint: str | None = field(default=None, compare=False)

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """The shard's file."""
        return f"c{self.checkpoint:04d}-{self.start:012d}-{self.stop:012d}.safetensors"


def first_row(name: str) -> int | None:
    """The first row of a shard, by the name of its file; None: the file is no shard."""
    found = re.fullmatch(r"c\d{4,}-(\d{12,})-\d{12,}\.safetensors", name)
    return None if found is None else int(found[1])


@dataclass(frozen=True)
class Shard:
    """What a shard holds, as it is computed: nothing weighted."""

    features: Float[Tensor, "r d"]
    norms: Float[Tensor, "r g"]
    checksums: Float[Tensor, " r"] | None


def units(manifest: Manifest, segments: Sequence[Segment]) -> list[Unit]:
    """All pieces of work of an index, checkpoint by checkpoint.

    Args:
        manifest: How many checkpoints, and rows per shard.
        segments: The rows.

    Returns:
        The units in order.
    """
    return [
        Unit(checkpoint, start, min(start + manifest.shard_rows, segment.stop), segment.fingerprint)
        for checkpoint in range(len(manifest.checkpoints))
        for segment in segments
        for start in range(segment.start, segment.stop, manifest.shard_rows)
    ]


def _tensor_digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def decoded(features: Tensor, scales: Tensor | None) -> Tensor:
    """Features in float32."""
    values = features.to(torch.float32)
    return values if scales is None else values * scales[:, None]


def encoded(shard: Shard, unit: Unit, manifest: Manifest) -> bytes:
    """A shard as the bytes of its file; the same shard gives the same bytes.

    Args:
        shard: Its tensors.
        unit: Which checkpoint and rows.
        manifest: Dtype and digest.

    Returns:
        The file's content.
    """
    features = shard.features.to(torch.float32)
    tensors = {"norms": shard.norms.to(torch.float32).contiguous()}
    if manifest.dtype == "float16":
        scales = torch.linalg.vector_norm(features, dim=1)
        features = features / torch.where(scales > 0, scales, 1.0)[:, None]
        tensors["scales"] = scales
    tensors["features"] = features.to(DTYPES[manifest.dtype]).contiguous()
    if shard.checksums is not None:
        tensors["checksums"] = shard.checksums
    content = {
        "format": FORMAT,
        "manifest": manifest.digest,
        "unit": [unit.checkpoint, unit.start, unit.stop],
        "rows": unit.fingerprint,
        "digests": {name: _tensor_digest(_bytes_of(tensor)) for name, tensor in sorted(tensors.items())},
    }
    return save(tensors, metadata={HEADER: json.dumps(content, sort_keys=True)})


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of a shard lie in its file."""

    entries: dict[str, tuple[torch.dtype, list[int], int, int]]
    digests: dict[str, str]
    size: int


def _damaged(storage: Storage, unit: Unit, why: str) -> IndexFolderError:
    return IndexFolderError(
        f"{storage.where}/{unit.name} is damaged: {why}. Run index build again with the same command: it makes this shard anew."
    )


def _layout(storage: Storage, unit: Unit, manifest: Manifest) -> _Layout:
    """Read and check a shard's header."""
    head = bytes(storage.read(unit.name, 0, 8))
    if len(head) < 8:
        raise _damaged(storage, unit, "it is cut short")
    (length,) = struct.unpack("<Q", head)
    if length > HEADER_BYTES:
        raise _damaged(storage, unit, "its header is not ours")
    try:
        header: dict[str, Any] = json.loads(bytes(storage.read(unit.name, 8, 8 + length)).decode())
        content = json.loads(header.pop("__metadata__")[HEADER])
        told, rows = (content["format"], content["manifest"], content["unit"]), content["rows"]
        digests = dict(content["digests"])
        entries = {
            name: (_NAMES[entry["dtype"]], list(entry["shape"]), 8 + length + start, 8 + length + stop)
            for name, entry in header.items()
            for start, stop in [entry["data_offsets"]]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise _damaged(storage, unit, "its header cannot be read") from cause
    if told != (FORMAT, manifest.digest, [unit.checkpoint, unit.start, unit.stop]):
        raise _damaged(storage, unit, "it belongs to another index")
    if rows != unit.fingerprint:
        raise _damaged(storage, unit, "it was made of other rows")
    expected = _shapes(unit, manifest)
    if {
        name: (dtype, shape) for name, (dtype, shape, _, _) in entries.items() if name != "checksums"
    } != expected:
        raise _damaged(storage, unit, "its tensors are not those of this index")
    size = storage.size(unit.name)
    if max(stop for *_, stop in entries.values()) != size:
        raise _damaged(storage, unit, f"it has {size} bytes, and another number was written")
    return _Layout(entries, digests, size)


def _shapes(unit: Unit, manifest: Manifest) -> dict[str, tuple[torch.dtype, list[int]]]:
    found = {
        "features": (DTYPES[manifest.dtype], [unit.rows, manifest.size]),
        "norms": (torch.float32, [unit.rows, len(manifest.groups)]),
    }
    return found | ({"scales": (torch.float32, [unit.rows])} if manifest.dtype == "float16" else {})


def _tensor(storage: Storage, unit: Unit, layout: _Layout, name: str) -> Tensor:
    dtype, shape, start, stop = layout.entries[name]
    content = storage.read(unit.name, start, stop)
    if len(content) != stop - start or _tensor_digest(content) != layout.digests.get(name):
        raise _damaged(storage, unit, f"the {name} are not those that were written")
    if not content:
        return torch.empty(shape, dtype=dtype)
    buffer = bytearray(content) if content.readonly else content
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def read_features(storage: Storage, unit: Unit, manifest: Manifest) -> Float[Tensor, "r d"]:
    """The features of a shard in float32.

    Args:
        storage: The index's folder.
        unit: Which shard.
        manifest: The index's manifest.

    Returns:
        Features [r, d].

    Raises:
        IndexFolderError: The shard is missing, cut short, damaged, or of another index.
    """
    layout = _layout(storage, unit, manifest)
    scales = _tensor(storage, unit, layout, "scales") if "scales" in layout.entries else None
    return decoded(_tensor(storage, unit, layout, "features"), scales)


def read_norms(storage: Storage, unit: Unit, manifest: Manifest) -> Float[Tensor, "r g"]:
    """The squared norms of a shard's full gradients, by group of parameters.

    Args:
        storage: The index's folder.
        unit: Which shard.
        manifest: The index's manifest.

    Returns:
        Squared norms [r, G].

    Raises:
        IndexFolderError: The shard is missing, cut short, damaged, or of another index.
    """
    return _tensor(storage, unit, _layout(storage, unit, manifest), "norms").clone()


def read_checksums(storage: Storage, unit: Unit, manifest: Manifest) -> Float[Tensor, " r"] | None:
    """The checksums of a shard's rows of data, where it has them.

    Args:
        storage: The index's folder.
        unit: Which shard.
        manifest: The index's manifest.

    Returns:
        One number per row, or None.

    Raises:
        IndexFolderError: The shard is missing, cut short, damaged, or of another index.
    """
    layout = _layout(storage, unit, manifest)
    return _tensor(storage, unit, layout, "checksums").clone() if "checksums" in layout.entries else None


def read_shard(storage: Storage, unit: Unit, manifest: Manifest) -> Shard:
    """All of a shard, every digest compared.

    Args:
        storage: The index's folder.
        unit: Which shard.
        manifest: The index's manifest.

    Returns:
        The shard, features in float32.

    Raises:
        IndexFolderError: The shard is missing, cut short, damaged, or of another index.
    """
    layout = _layout(storage, unit, manifest)
    tensors = {name: _tensor(storage, unit, layout, name) for name in layout.entries}
    checksums = tensors.get("checksums")
    return Shard(decoded(tensors["features"], tensors.get("scales")), tensors["norms"], checksums)
