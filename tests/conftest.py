"""What all tests share: hypothesis without a stopwatch, and no GPU test without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

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
