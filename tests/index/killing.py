"""Kills builds of an index at random moments, twenty times, then lets one end, and compares with an undisturbed one.

A process that has torch loaded forks the builds, so that a try takes milliseconds. Run by ``test_building.py``.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parent))

from indexing import files, method, rows  # noqa: E402

import tracin  # noqa: E402
from tracin.index.kept.storage import PARTIAL  # noqa: E402

TIMES, ROWS = 20, 400


def build(folder: Path) -> None:
    tracin.Index.build(method(), rows(ROWS, 1), folder, projection=64, shard_rows=10)


def forked(folder: Path, *, half_a_file: bool = False) -> int:
    """A child that builds; with ``half_a_file`` it kills itself while it writes its third file."""
    child = os.fork()
    if child:
        return child
    if half_a_file:
        write, calls = os.write, []

        def dying(handle: int, content: memoryview) -> int:
            calls.append(handle)
            if len(calls) == 3:
                write(handle, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(handle, content)

        os.write = dying
    try:
        build(folder)
    except BaseException as error:  # noqa: BLE001
        print(f"error={error!r}".replace(" ", "_"), flush=True)
        os._exit(1)
    os._exit(0)


def ended(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def shards(folder: Path) -> int:
    return sum(path.name.startswith("c0") for path in folder.iterdir())


def until_shards(folder: Path, wanted: int, child: int) -> None:
    """Wait for so many shards, as long as the child lives."""
    while (
        shards(folder) < wanted and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.0005)


def main(place: Path) -> int:
    chance = random.Random(0)
    start = time.perf_counter()
    if ended(forked(place / "whole")):
        return 1
    whole, seconds = files(place / "whole"), time.perf_counter() - start
    folder = place / "killed"
    if ended(forked(folder, half_a_file=True)) != -signal.SIGKILL:
        return 1
    halves = sum(name.startswith(PARTIAL) for name in files(folder))
    killed = unfinished = 0
    while killed < TIMES:
        child = forked(folder)
        # So many shards further, however fast the machine is, and then at any moment.
        until_shards(folder, shards(folder) + chance.randrange(4), child)
        time.sleep(chance.uniform(0, seconds / len(whole)))
        os.kill(child, signal.SIGKILL)
        if ended(child) != -signal.SIGKILL:  # it was done before
            for name in chance.sample(sorted(set(files(folder)) - {"manifest.json"}), len(whole) // 2):
                (folder / name).unlink()
            continue
        killed += 1
        unfinished += 0 < shards(folder) < len(whole) - 2
    if ended(forked(folder)):
        return 1
    print(
        f"killed={killed}", f"unfinished={unfinished}", f"halves={halves}", f"same={files(folder) == whole}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
