"""Local files: what they hold, and what is said where they are missing, damaged or unsafe."""

from __future__ import annotations

import gzip
import io
import pickle
import sys
from types import ModuleType

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tracin.errors import DataError, MissingExtraError
from tracin.evaluation.mislabelled import readers
from tracin.evaluation.mislabelled.readers import read_cifar10, read_idx_folder

HELP = "Get them somewhere."


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, dtype=">i4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def pictures(n, shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(folder, zipped, n=5, dot="-"):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(("train", "t10k")):
        for name, array in (
            (f"{part}-images{dot}idx3-ubyte", pictures(n + seed, (4, 3), seed)),
            (f"{part}-labels{dot}idx1-ubyte", np.arange(n + seed)),
        ):
            content = idx(array)
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("under", ["", "data", "MNIST/raw"])
def test_idx_files(tmp_path, zipped, under):
    write_idx(tmp_path / under, zipped)
    train, test = read_idx_folder(tmp_path, HELP)
    assert np.array_equal(train.pictures, pictures(5, (4, 3), 0)[:, None])
    assert np.array_equal(test.pictures, pictures(6, (4, 3), 1)[:, None])
    assert train.labels.tolist() == list(range(5))
    assert test.labels.tolist() == list(range(6))


def test_idx_files_with_a_dot_in_their_names(tmp_path):
    write_idx(tmp_path, zipped=False, dot=".")
    assert len(read_idx_folder(tmp_path, HELP)[0].labels) == 5


def test_a_folder_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"none is not there\. Get them somewhere"):
        read_idx_folder(tmp_path / "none", HELP)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*Get them somewhere"):
        read_idx_folder(tmp_path, HELP)


def test_damaged_idx_files_are_named(tmp_path):
    write_idx(tmp_path, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte says \(5, 4, 3\).*cut short"):
        read_idx_folder(tmp_path, HELP)
    path.write_bytes(b"\0\0\x0d\x03" + whole[4:])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte is no idx file"):
        read_idx_folder(tmp_path, HELP)
    path.write_bytes(whole)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no t10k-labels-idx1-ubyte"):
        read_idx_folder(tmp_path, HELP)
    write_idx(tmp_path, zipped=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(DataError, match=r"ubyte\.gz cannot be read"):
        read_idx_folder(tmp_path, HELP)


def test_pictures_and_labels_of_different_lengths(tmp_path):
    write_idx(tmp_path, zipped=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(4)))
    with pytest.raises(DataError, match="5 pictures and 4 labels"):
        read_idx_folder(tmp_path, HELP)


def cifar_rows(n, seed):
    return np.arange(n) % 10, pictures(n, (3, 32, 32), seed)


def write_bin(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        labels, images = cifar_rows(3, number)
        rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(3, -1)], 1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


@pytest.mark.parametrize("under", ["", "cifar-10-batches-bin"])
def test_cifar_binary(tmp_path, under):
    write_bin(tmp_path / under)
    train, test = read_cifar10(tmp_path)
    assert train.pictures.shape == (15, 3, 32, 32)
    assert np.array_equal(train.pictures[3:6], cifar_rows(3, 1)[1])
    assert np.array_equal(test.pictures, cifar_rows(3, 5)[1])
    assert train.labels.tolist() == [0, 1, 2] * 5


def test_cifar_cut_short(tmp_path):
    write_bin(tmp_path)
    path = tmp_path / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_4\.bin is no whole number of rows"):
        read_cifar10(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_4\.bin cannot be read"):
        read_cifar10(tmp_path)


def encoded(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(folder, picture="img"):
    for seed, part in enumerate(("train", "test")):
        labels, images = cifar_rows(4, seed)
        rows = [
            {picture: {"bytes": encoded(image), "path": None}, "label": int(label)}
            for image, label in zip(images, labels, strict=True)
        ]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / f"{part}-00000-of-00001.parquet"
        )


def test_cifar_parquet(tmp_path):
    write_parquet(tmp_path)
    train, test = read_cifar10(tmp_path)
    assert np.array_equal(train.pictures, cifar_rows(4, 0)[1])
    assert np.array_equal(test.pictures, cifar_rows(4, 1)[1])
    assert test.labels.tolist() == [0, 1, 2, 3]


def test_cifar_parquet_of_something_else(tmp_path, monkeypatch):
    write_parquet(tmp_path, picture="photo")
    with pytest.raises(DataError, match="other columns"):
        read_cifar10(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tracin\[eval\]'"):
        read_cifar10(tmp_path)


def rewrite(folder, change):
    """Change the pictures of the test rows, each given as its bytes."""
    path = folder / "test-00000-of-00001.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[2]["img"]["bytes"] = change(rows[2]["img"]["bytes"])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda content: b"no picture", "the picture of row 2 cannot be read"),
        (lambda content: content[:200], "the picture of row 2 cannot be read"),
        (lambda content: content[:40] + b"\0\0\0" + content[43:], "the picture of row 2 cannot be read"),
        (lambda content: encoded(pictures(1, (3, 16, 16), 0)[0]), "of one size, and are 3x16x16 and 3x32x32"),
    ],
    ids=["no picture", "cut short", "broken chunk", "another size"],
)
def test_damaged_pictures_are_named(tmp_path, change, fact):
    write_parquet(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(DataError, match=rf"test-00000-of-00001\.parquet: .*{fact}"):
        read_cifar10(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    write_parquet(tmp_path)
    path = tmp_path / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet cannot be read"):
        read_cifar10(tmp_path)


class Bomb:
    """A pickle that would leave a trace if it were opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_the_python_version_is_never_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    for place in (tmp_path, folder):
        with pytest.raises(DataError, match=r"not opened here.*cifar-10-binary\.tar\.gz"):
            read_cifar10(place)
    assert not (tmp_path / "opened").exists()


def test_torchvision_reads_the_python_version(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"")
    asked = []

    class CIFAR10:
        def __init__(self, root, train, download):
            asked.append((root, train, download))
            labels, images = cifar_rows(3, int(train))
            self.data, self.targets = images.transpose(0, 2, 3, 1), labels.tolist()

    module = ModuleType("torchvision.datasets")
    module.CIFAR10 = CIFAR10
    monkeypatch.setattr(readers, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    train, test = read_cifar10(tmp_path)
    assert asked == [(str(tmp_path), True, False), (str(tmp_path), False, False)]
    assert np.array_equal(train.pictures, cifar_rows(3, 1)[1])
    assert np.array_equal(test.pictures, cifar_rows(3, 0)[1])


class Part:
    """A split as ``datasets`` has it."""

    def __init__(self, seed):
        labels, images = cifar_rows(3, seed)
        self.rows = {
            "img": [Image.fromarray(image.transpose(1, 2, 0)) for image in images],
            "label": labels.tolist(),
        }
        self.column_names = list(self.rows)

    def __getitem__(self, name):
        return self.rows[name]


def test_datasets_where_it_is_installed(tmp_path, monkeypatch):
    module = ModuleType("datasets")
    module.load_dataset = lambda name: {"train": Part(0), "test": Part(1)}
    module.load_from_disk = lambda folder: {"train": Part(2), "test": Part(3)}
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(readers, "find_spec", lambda name: object())
    with pytest.warns(UserWarning, match="downloading uoft-cs/cifar10"):
        assert np.array_equal(read_cifar10(None)[1].pictures, cifar_rows(3, 1)[1])
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert np.array_equal(read_cifar10(tmp_path)[0].pictures, cifar_rows(3, 2)[1])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="pip install datasets"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    "error", [ConnectionError("no way out"), pyarrow.ArrowInvalid("not arrow"), KeyError("img")]
)
def test_datasets_that_fails(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    module = ModuleType("datasets")
    module.load_dataset = module.load_from_disk = fail
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(readers, "find_spec", lambda name: object())
    told = rf"{type(error).__name__}.*cifar-10-binary\.tar\.gz"
    with (
        pytest.warns(UserWarning, match="downloading"),
        pytest.raises(DataError, match=f"uoft-cs/cifar10: {told}"),
    ):
        read_cifar10(None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=f"{tmp_path}: {told}"):
        read_cifar10(tmp_path)


def test_cifar_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs data_folder.*cifar-10-binary\.tar\.gz"):
        read_cifar10(None)
    with pytest.raises(DataError, match="none is not there"):
        read_cifar10(tmp_path / "none")
    with pytest.raises(DataError, match="no format that is known"):
        read_cifar10(tmp_path)
