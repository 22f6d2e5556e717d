"""The example studies run as they are, on small settings: they train once, atomically, and every command takes them."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tracin.cli import main
from tracin.errors import UserCodeError
from tracin.study import load_study

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FASHION = Path("/usr/share/datasets/fashion-mnist")
has_fashion = pytest.mark.skipif(
    not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist"
)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Few epochs, checkpoints in the test's own folder."""
    settings = {
        "TRACIN_RUNS": str(tmp_path / "runs"),
        "DIGITS_EPOCHS": "2",
        "DIABETES_EPOCHS": "6",
        "FASHION_EPOCHS": "1",
        "FASHION_ROWS": "300",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def commands(name, out, *, query=("--query", "2")):
    file = str(EXAMPLES / name)
    for args in (
        ["audit", file, "--out", str(out)],
        ["explain", file, *query],
        ["verify", file],
        ["plan", file],
    ):
        assert main([*args, "--quiet", "--device", "cpu"]) == 0, args


def test_digits(small, capsys):
    commands("digits.py", small / "out")
    assert "of 1,438 training rows" in capsys.readouterr().out


def test_diabetes(small, capsys):
    commands("diabetes.py", small / "out")
    told = capsys.readouterr().out
    assert "of 342 training rows" in told
    assert "progression" in told
    with (small / "out" / "suspects.csv").open() as lines:
        assert "label" not in lines.readline()


@has_fashion
def test_fashion_mnist(small, capsys):
    commands("fashion_mnist.py", small / "out", query=("--query", "2", "--target", "Ankle boot"))
    assert "Trouser" in capsys.readouterr().out
    study = load_study(EXAMPLES / "fashion_mnist.py")
    assert len(study.test[1]) == 10_000
    picture = study.shown("train", 0)
    assert picture.shape == (28, 28)
    assert torch.equal((picture * 255).round(), (picture * 255).round().clamp(0, 255))
    raw = gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes())[16 : 16 + 784]
    assert np.abs(picture.numpy().reshape(-1) * 255 - np.frombuffer(raw, np.uint8)).max() < 0.01


def test_fashion_mnist_says_where_its_files_come_from(small, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(small / "nowhere"))
    with pytest.raises(UserCodeError, match=r"apt-get install dataset-fashion-mnist.*FASHION_MNIST"):
        load_study(EXAMPLES / "fashion_mnist.py")
    assert not (small / "runs").exists()


def test_fashion_mnist_reads_any_folder(small, monkeypatch):
    """Idx files written here, zipped and plain."""
    monkeypatch.setenv("FASHION_MNIST", str(small))
    rng = np.random.default_rng(0)
    for name, n in (("train", 300), ("t10k", 40)):
        pictures = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        header = bytes([0, 0, 8, 3]) + np.array(pictures.shape, dtype=">i4").tobytes()
        (small / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pictures.tobytes()))
        labels = bytes([0, 0, 8, 1]) + np.array([n], dtype=">i4").tobytes() + bytes(i % 10 for i in range(n))
        (small / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    study = load_study(EXAMPLES / "fashion_mnist.py")
    assert study.train[1][:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert len(study.test[0]) == 40


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_training_happens_once(small, name):
    first = load_study(EXAMPLES / f"{name}.py")
    files = {path: path.stat().st_mtime_ns for path in (small / "runs").rglob("*") if path.is_file()}
    assert files
    second = load_study(EXAMPLES / f"{name}.py")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert first.trajectory.fingerprint() == second.trajectory.fingerprint()


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_same_seed_same_weights(small, name):
    states = []
    for _ in range(2):
        states.append(load_study(EXAMPLES / f"{name}.py").trajectory[-1].load())
        shutil.rmtree(small / "runs")
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["digits", "diabetes", "fashion_mnist"])
def test_a_training_cut_short_leaves_nothing(small, name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def stopped(train, folder, seed):
        folder.mkdir(parents=True)
        (folder / "step-00000001.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    module.fit = stopped
    with pytest.raises(KeyboardInterrupt):
        module.trained(None, module.FOLDER)
    assert list((small / "runs").iterdir()) == []


def test_fit_trains_what_it_is_given(small):
    study = load_study(EXAMPLES / "digits.py")
    assert study.fit is not None
    subset = (study.train[0][:200], study.train[1][:200])
    again = study.fit(subset, small / "again", 1)
    assert len(again) == len(study.trajectory)
    assert not torch.equal(again[-1].load()["9.bias"], study.trajectory[-1].load()["9.bias"])
