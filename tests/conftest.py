"""What all tests share: shapes checked at run time, hypothesis without a stopwatch, and no GPU test without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

SOURCE = Path(__file__).resolve().parent.parent / "src"


def modules_with_shapes() -> list[str]:
    """The modules whose annotations have shapes. Plain types are the type checker's, and checking them takes half of a test."""
    paths = [path for path in SOURCE.rglob("*.py") if "from tracin.shapes import" in path.read_text("utf-8")]
    return [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in paths]


# Before anything imports them.
jaxtyping.install_import_hook(modules_with_shapes(), "beartype.beartype")

# Small models run faster on one thread, and the workers share the cores; so do the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("tracin", deadline=None, print_blob=True)
settings.load_profile("tracin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As for a user: no check of annotations before our own messages come up, and none that draws from ``random``."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are held one batch at a time, as in a run whose memory is nearly full."""
    for module in ("passes", "planning", "top_k"):
        monkeypatch.setattr(f"tracin.scoring.{module}.query_budget", lambda *_: 0)
