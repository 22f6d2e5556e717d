"""Processes that decide on the rows of one log: two at once, and such as are killed, at random and in the middle of a line.

A process that has torch loaded forks them, so that a try takes milliseconds. Prints what was acknowledged and what of it is
there. Run by ``test_killing.py``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from tracin.audit import Audit, Cutoff
from tracin.explorer.decisions import ConflictError, DecisionLog

ROWS, RANDOM, TORN, EACH = 50, 20, 5, 20


def audit(rows: int = ROWS) -> Audit:
    """An audit of rows of three classes."""
    return Audit(
        score=torch.linspace(0, 1, rows, dtype=torch.float64),
        is_issue=torch.zeros(rows, dtype=torch.bool),
        signals={},
        cutoff=Cutoff(0.5, "half"),
        given_labels=torch.arange(rows) % 3,
        classes=3,
    )


def decide(log: DecisionLog, row: int, action: str) -> tuple[int, str, int]:
    """Decide on a row, again after each conflict: the place, the id, and how many conflicts there were."""
    name, now = str(uuid.uuid4()), log.decided().get(row)
    seen, conflicts = None if now is None else now.seq, 0
    while True:
        try:
            return log.decide(name, row, action, None, seen).seq, name, conflicts
        except ConflictError as conflict:
            seen = None if conflict.now is None else conflict.now.seq
            conflicts += 1


def contend(path: Path, pipe: int, action: str) -> None:
    """Decide on all rows in two threads, while another process does the same."""
    log = DecisionLog(path, audit())

    def work(thread: int) -> None:
        for row in range(EACH * thread, EACH * thread + EACH):
            seq, name, conflicts = decide(log, row, action)
            os.write(pipe, f"{seq} {name} {conflicts}\n".encode())

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def go_on(path: Path, pipe: int, *, torn: bool) -> None:
    """Decide until the end; with ``torn`` die within the third line."""
    log = DecisionLog(path, audit())
    write, lines = os.write, []

    def dying(handle: int, content: bytes) -> int:
        lines.append(content)
        if len(lines) == 3:
            write(handle, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, content)

    if torn:
        os.write = dying
    while True:
        seq, name, conflicts = decide(log, random.randrange(ROWS), random.choice(["keep", "remove"]))
        write(pipe, f"{seq} {name} {conflicts}\n".encode())


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A child at work, and where it tells what was acknowledged."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            work(write_end)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write_end)
    return child, read_end


def killed(path: Path, *, torn: bool) -> str:
    """What a child acknowledged before it was killed."""
    child, read_end = forked(lambda pipe: go_on(path, pipe, torn=torn))
    with os.fdopen(read_end) as answers:
        first = answers.readline()
        if not torn:
            time.sleep(random.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        rest = answers.read()
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"a child ended by itself: {status}")
    return first + rest


def contested(path: Path) -> str:
    """What two children acknowledged that decided on the same rows."""
    children = [
        forked(lambda pipe, action=action: contend(path, pipe, action)) for action in ("keep", "remove")
    ]
    told = ""
    for child, read_end in children:
        with os.fdopen(read_end) as answers:
            told += answers.read()
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("a child failed")
    return told


def judged(path: Path, told: str) -> dict[str, int]:
    """How many decisions were acknowledged, how many of them are missing, and how many there are."""
    log = DecisionLog(path, audit())
    lines = path.read_bytes().splitlines()[1:]
    there = {(entry["seq"], entry["id"]) for entry in map(json.loads, lines)}
    parts = [line.split() for line in told.split("\n")[:-1]]
    wanted = [(int(seq), name) for seq, name, _ in parts]
    return {
        "acknowledged": len(wanted),
        "missing": len([pair for pair in wanted if pair not in there]),
        "entries": log.seq,
        "rows": len(log.decided()),
        "conflicts": sum(int(conflicts) for *_, conflicts in parts),
    }


def main(folder: Path) -> None:
    random.seed(0)
    contest = judged(folder / "contest.jsonl", contested(folder / "contest.jsonl"))
    told = "".join(killed(folder / "kills.jsonl", torn=torn) for torn in [False] * RANDOM + [True] * TORN)
    print(json.dumps({"contest": contest, "kills": judged(folder / "kills.jsonl", told)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
