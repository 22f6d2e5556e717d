"""What all tests share: hypothesis without a stopwatch, and no GPU test without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from tracin.scoring import order, passes, plan, top_k

# Small models run faster on one thread, and the workers share the cores.
torch.set_num_threads(1)

settings.register_profile("tracin", deadline=None, print_blob=True)
settings.load_profile("tracin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def smallest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are held one batch at a time, as in a run whose memory is nearly full."""
    for module in (passes, plan, top_k):
        monkeypatch.setattr(module, "query_budget", lambda *_: 0)


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a dataset makes are made anew for each checkpoint, as where memory keeps neither them nor parameters."""
    monkeypatch.setattr(order, "order_of", lambda **_: order.Order("checkpoints", 0, 1))
