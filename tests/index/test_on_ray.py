"""A real Ray cluster of two nodes on this machine: workers that exit and a node that goes change nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tracin
from index.indexing import M, N, files, method, rows
from tracin.index.kept.storage import PARTIAL
from tracin.index.making.on_ray import Ray

ray = pytest.importorskip("ray")

OPTIONS = {"projection": 64, "shard_rows": 10}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # Ray's own
    pytest.mark.xdist_group("ray"),
]


@contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one CPU each, on loopback alone, which Ray would exchange for another address of this machine."""
    services = pytest.importorskip("ray._private.services")
    monkeypatch.setattr(services, "get_node_ip_address", lambda address=None: "127.0.0.1")
    cluster_utils = pytest.importorskip("ray.cluster_utils")

    here = Path(__file__).resolve().parents[1]
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    node = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
    found = cluster_utils.Cluster(
        initialize_head=True, head_node_args={**node, "object_store_memory": 100 << 20}
    )
    try:
        found.second = found.add_node(num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=100 << 20)
        paths = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(here), *_source()])}}
        ray.init(address=found.address, _node_ip_address="127.0.0.1", runtime_env=paths, log_to_driver=False)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _source() -> list[str]:
    return [str(Path(tracin.__file__).resolve().parents[1])]


class Slow(torch.utils.data.Dataset):
    """Rows that take a moment; the first process that reads row 33 exits."""

    def __init__(self, mark: Path | None) -> None:
        self.rows, self.mark, self.home = rows(N, 1), mark, os.getpid()

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        if self.mark is not None and os.getpid() != self.home:
            time.sleep(0.002)
            if row == 33 and not self.mark.exists():
                self.mark.write_text("gone")
                os._exit(1)
        return self.rows[0][row], self.rows[1][row]


def test_a_lost_worker_and_a_lost_node_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = rows(M, 2)
    alone = tracin.Index.build(method(), Slow(None), tmp_path / "alone", **OPTIONS)
    mark = tmp_path / "mark"
    with cluster(monkeypatch) as nodes:
        gone = threading.Event()

        def lose_a_node() -> None:
            while not mark.exists() or len(files(tmp_path / "ray")) < 6:
                time.sleep(0.02)
            nodes.remove_node(nodes.second, allow_graceful=False)
            gone.set()

        thread = threading.Thread(target=lose_a_node, daemon=True)
        thread.start()
        together = tracin.Index.build(method(), Slow(mark), tmp_path / "ray", **OPTIONS, workers=Ray())
        thread.join(timeout=20)
        assert mark.exists(), "no worker was lost"
        assert gone.is_set(), "no node was lost"
        mine, theirs = alone.top_k(queries, 4), together.top_k(queries, 4, workers=Ray())
    assert torch.equal(mine.proponents.ids, theirs.proponents.ids)
    whole = {
        name: content for name, content in files(tmp_path / "ray").items() if not name.startswith(PARTIAL)
    }
    assert whole == files(tmp_path / "alone")
    # A worker of the lost node can die after the build, in the middle of a file that nobody needs.
    tracin.Index.build(method(), Slow(None), tmp_path / "ray", **OPTIONS)
    assert files(tmp_path / "ray") == whole, "the next build removes what dead writers left"
    assert torch.equal(mine.proponents.values, theirs.proponents.values)
    assert torch.equal(mine.opponents.values, theirs.opponents.values)
