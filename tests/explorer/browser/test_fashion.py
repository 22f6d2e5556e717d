"""The same way through the pages of Fashion-MNIST."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from explorer.browser.driving import ROOT, served
from explorer.browser.journeys import explain_and_follow, relabel_ten

FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FASHION.is_dir(), reason="needs the Debian package dataset-fashion-mnist"),
]


@pytest.fixture(scope="module")
def fashion(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    with served(
        ROOT / "examples" / "fashion_mnist.py",
        "--decisions",
        str(folder / "decisions.jsonl"),
        environment={"TRACIN_RUNS": str(folder / "runs"), "FASHION_ROWS": "1000", "FASHION_EPOCHS": "4"},
    ) as address:
        yield address


def test_a_wrong_prediction_is_explained_and_a_proponent_followed(fashion, visit):
    explain_and_follow(fashion, visit)


def test_ten_suspects_are_relabelled_by_keyboard_and_exported(fashion, visit):
    relabel_ten(fashion, visit)
