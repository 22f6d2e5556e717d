"""Pictures from local files: idx (MNIST, Fashion-MNIST) and the formats in which CIFAR-10 is kept."""

from __future__ import annotations

import gzip
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tracin.errors import DataError, MissingExtraError

__all__ = ["Pictures", "read_cifar10", "read_idx_folder"]

_TRAIN, _TEST = "train", "t10k"
_CIFAR_ROW = 1 + 3 * 32 * 32
_CIFAR_BINARY = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_HELP = (
    f"Unpack the binary version ({_CIFAR_BINARY}) and give data_folder=cifar-10-batches-bin. Parquet files "
    "(train-*.parquet, test-*.parquet) and a folder saved by datasets work too."
)
_HUB = "uoft-cs/cifar10"
_DAMAGED = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, zlib.error, struct.error)
"""What PIL (a SyntaxError for a broken PNG), pyarrow and datasets raise over files that they cannot read."""


class Pictures(NamedTuple):
    """Pictures [n, channels, height, width] from 0 to 255, and their classes [n]."""

    pictures: np.ndarray
    labels: np.ndarray


def read_idx_folder(folder: Path, how_to_get: str) -> tuple[Pictures, Pictures]:
    """Training and test pictures of a folder with four idx files, zipped or not.

    Args:
        folder: The folder, or the one above ``data``, ``raw`` or ``MNIST/raw``.
        how_to_get: What an error says about getting the files.

    Returns:
        Train, test.

    Raises:
        DataError: The folder or a file is missing or damaged.
    """
    if not folder.is_dir():
        raise DataError(f"the folder {folder} is not there. {how_to_get}")
    for place in (
        folder,
        folder / "data",
        folder / "raw",
        folder / "MNIST" / "raw",
        folder / "FashionMNIST" / "raw",
    ):
        if _idx_file(place, _TRAIN, "images", 3) is not None:
            return _idx_part(place, _TRAIN, how_to_get), _idx_part(place, _TEST, how_to_get)
    raise DataError(f"{folder} has no train-images-idx3-ubyte, zipped (.gz) or not. {how_to_get}")


def _idx_file(folder: Path, part: str, what: str, dimensions: int) -> Path | None:
    names = [f"{part}-{what}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in (".gz", "")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_part(folder: Path, part: str, how_to_get: str) -> Pictures:
    arrays = []
    for what, dimensions in (("images", 3), ("labels", 1)):
        path = _idx_file(folder, part, what, dimensions)
        if path is None:
            raise DataError(
                f"{folder} has no {part}-{what}-idx{dimensions}-ubyte, zipped (.gz) or not. {how_to_get}"
            )
        arrays.append(_idx(path, dimensions))
    pictures, labels = arrays
    if len(pictures) != len(labels):
        raise DataError(
            f"{folder}: {part} has {len(pictures)} pictures and {len(labels)} labels. {how_to_get}"
        )
    return Pictures(pictures[:, None], labels)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8, the number of dimensions, each as a big-endian int32, then the bytes."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Get the file again.") from error
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < 4 + 4 * dimensions:
        raise DataError(f"{path} is no idx file of bytes in {dimensions} dimensions. Get the file again.")
    shape = tuple(np.frombuffer(content, dtype=">i4", count=dimensions, offset=4).tolist())
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
    if len(values) != np.prod(shape):
        raise DataError(
            f"{path} says {shape} and holds {len(values)} bytes: it is cut short. Get the file again."
        )
    return values.reshape(shape)


def read_cifar10(folder: Path | None) -> tuple[Pictures, Pictures]:
    """Training and test pictures of CIFAR-10, from a folder or, without one, through ``datasets``.

    Binary files, Parquet files, a folder that ``datasets`` saved, and, where torchvision is installed, the Python
    version, whose checksums torchvision compares before it reads them. A pickle is never opened here. ``datasets`` may
    download; a warning says so before.

    Args:
        folder: The folder; None asks ``datasets``, where it is installed.

    Returns:
        Train, test.

    Raises:
        DataError: No such folder, none of these formats, or a damaged file.
    """
    if folder is None:
        if find_spec("datasets") is None:
            raise DataError(f"data='cifar10' needs data_folder. {_CIFAR_HELP}")
        module = import_module("datasets")
        warnings.warn(
            f"cifar10 comes through datasets, as no folder is given: downloading {_HUB}, unless it is in its cache.",
            stacklevel=2,
        )
        return _from_datasets(lambda: module.load_dataset(_HUB), _HUB)
    if not folder.is_dir():
        raise DataError(f"the folder {folder} is not there. {_CIFAR_HELP}")
    for place in (folder, folder / "cifar-10-batches-bin"):
        if (place / "test_batch.bin").is_file():
            train = [_cifar_bin(place / f"data_batch_{number}.bin") for number in range(1, 6)]
            return Pictures(*map(np.concatenate, zip(*train, strict=True))), _cifar_bin(
                place / "test_batch.bin"
            )
    for place in (folder, folder / "plain_text", folder / "data"):
        if list(place.glob("train-*.parquet")):
            return _parquet(place, "train"), _parquet(place, "test")
    if (folder / "dataset_dict.json").is_file():
        module = _datasets(folder)
        return _from_datasets(lambda: module.load_from_disk(str(folder)), str(folder))
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").is_file():
            return _python_version(place)
    raise DataError(f"{folder} holds CIFAR-10 in no format that is known here. {_CIFAR_HELP}")


def _cifar_bin(path: Path) -> Pictures:
    try:
        values = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. {_CIFAR_HELP}") from error
    if len(values) == 0 or len(values) % _CIFAR_ROW:
        raise DataError(
            f"{path} is no whole number of rows of {_CIFAR_ROW} bytes: it is cut short. {_CIFAR_HELP}"
        )
    rows = values.reshape(-1, _CIFAR_ROW)
    return Pictures(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])


def _parquet(folder: Path, part: str) -> Pictures:
    try:
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'tracin[eval]'") from error
    files = sorted(folder.glob(f"{part}-*.parquet"))
    if not files:
        raise DataError(f"{folder} has no {part}-*.parquet. {_CIFAR_HELP}")
    return Pictures(
        *map(np.concatenate, zip(*(_parquet_file(file, read_table) for file in files), strict=True))
    )


def _parquet_file(file: Path, read_table: Callable[[Path], Any]) -> Pictures:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            "pictures in Parquet files need pillow: pip install 'tracin[plot]'"
        ) from error
    try:
        rows = read_table(file).to_pylist()
    except _DAMAGED as error:
        raise DataError(f"{file} cannot be read: {error}. Get the file again.") from error
    pictures, labels = [], []
    for number, row in enumerate(rows):
        try:
            content = row.get("img", row.get("image"))["bytes"]
            labels.append(int(row["label"]))
            pictures.append(_pixels(Image.open(io.BytesIO(content))))
        except (KeyError, TypeError) as error:
            raise DataError(f"{file} has other columns than img (bytes) and label. {_CIFAR_HELP}") from error
        except _DAMAGED as error:
            raise DataError(
                f"{file}: the picture of row {number} cannot be read: {error}. Get the file again."
            ) from error
    return _stacked(pictures, labels, str(file))


def _pixels(picture: Any) -> np.ndarray:
    """A picture of PIL as [3, height, width]."""
    return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


def _stacked(pictures: Sequence[np.ndarray], labels: Sequence[int], where: str) -> Pictures:
    shapes = sorted({picture.shape for picture in pictures})
    if len(shapes) != 1:
        sizes = " and ".join("x".join(map(str, shape)) for shape in shapes[:2]) or "none"
        raise DataError(f"{where}: the pictures must be of one size, and are {sizes}. {_CIFAR_HELP}")
    return Pictures(np.stack(pictures), np.asarray(labels))


def _datasets(folder: Path) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise MissingExtraError(
            f"{folder} was saved by datasets, which reads it: pip install datasets"
        ) from error


def _from_datasets(load: Callable[[], Any], where: str) -> tuple[Pictures, Pictures]:
    parts = []
    try:
        found = load()
        for name in ("train", "test"):
            part = found[name]
            key = "img" if "img" in part.column_names else "image"
            pictures = [_pixels(picture) for picture in part[key]]
            parts.append(_stacked(pictures, part["label"], f"{where}, {name}"))
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, *_DAMAGED) as error:
        told = " ".join(str(error).split())
        raise DataError(
            f"datasets gives no CIFAR-10 from {where}: {type(error).__name__}: {told}. {_CIFAR_HELP}"
        ) from error
    return parts[0], parts[1]


def _python_version(folder: Path) -> tuple[Pictures, Pictures]:
    if folder.name != "cifar-10-batches-py" or find_spec("torchvision") is None:
        raise DataError(
            f"{folder} holds the Python version of CIFAR-10: pickles, which can run code when they are opened, and are "
            f"not opened here. {_CIFAR_HELP}"
        )
    try:
        kind = import_module("torchvision.datasets").CIFAR10
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"torchvision, which would read {folder}, does not import: {error}. {_CIFAR_HELP}"
        ) from error
    try:
        sides: Sequence[Any] = [
            kind(str(folder.parent), train=train, download=False) for train in (True, False)
        ]
    except RuntimeError as error:
        raise DataError(f"torchvision refuses {folder}: {error} {_CIFAR_HELP}") from error
    train, test = (Pictures(side.data.transpose(0, 3, 1, 2), np.asarray(side.targets)) for side in sides)
    return train, test
