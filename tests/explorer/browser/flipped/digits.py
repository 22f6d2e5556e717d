"""The digits example with one label in twenty made wrong on purpose: what the pictures of the guide show."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch

FLIPS = 72
EXAMPLE = Path(__file__).resolve().parents[4] / "examples" / "digits.py"


def example():
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def study():
    digits = example()
    (x, y), _ = digits.data()
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(len(y), generator=generator)[:FLIPS]
    labels = y.clone()
    labels[rows] = (y[rows] + torch.randint(1, 10, (FLIPS,), generator=generator)) % 10
    trained = digits.trained((x, labels), digits.FOLDER.with_name("flipped-digits"))
    return replace(digits.study(), train=(x, labels), trajectory=trained)
