"""A server in a process of its own, and pages of a real browser that remember every complaint."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = os.environ.get("TRACIN_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
READY = "tracin: ready at "
MAIN = "import sys; from tracin.cli import main; sys.exit(main())"
PATIENCE = 15_000
"""Milliseconds for anything to appear."""


@contextmanager
def served(what: Path, *options: str, environment: dict[str, str], patience: float = 240) -> Iterator[str]:
    """``tracin serve`` on a free port; yields its address, and ends it afterwards."""
    command = [sys.executable, "-c", MAIN, "serve", str(what), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout is not None
    output = process.stdout

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield _address(lines, patience)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        reader.join(10)
        output.close()


def _address(lines: queue.Queue[str | None], patience: float) -> str:
    told = []
    while True:
        line = lines.get(timeout=patience)
        assert line is not None, f"the server ended: {''.join(told)}"
        told.append(line)
        if line.startswith(READY):
            return line.removeprefix(READY).strip()


@dataclass
class Visit:
    """A page and what went wrong on it: errors of scripts, refusals of the content policy, answers that failed."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)

    def _console(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(f"{message.type}: {message.text}")

    def _dialog(self, dialog: Any) -> None:
        if dialog.type == "beforeunload":  # the page asks, as decisions are not saved yet
            dialog.accept()
            return
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        """Fail on any complaint that was not expected."""
        left = [each for each in self.complaints if not any(part in each for part in self.allowed)]
        assert left == []

    def is_narrow_enough(self) -> bool:
        """Whether nothing reaches out of the window sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def until(page: Any, expression: str) -> None:
    """Wait for a truth about the page. Playwright's own way needs eval, which the page's policy refuses."""
    ends = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < ends, f"never true: {expression}"
        page.wait_for_timeout(20)


def meddle(page: Any, address: str, answer: Callable[[Any], None], seen: str) -> None:
    """Answer ``address`` in the server's place, from when the page itself sees it.

    A page that is loaded already may send its next request past a route that was set just now. ``seen`` is what the
    page's own request comes to: its status, or "failed".
    """
    page.route(f"**/{address}", answer)
    until(
        page,
        f"fetch('{address}').then((answer) => String(answer.status), () => 'failed').then((seen) => seen === '{seen}')",
    )


def one_by_one(visit: Visit, keys: Sequence[str]) -> None:
    """Press keys and wait after each until its decision is on the server."""
    for key in keys:
        visit.page.keyboard.press(key)
        visit.page.wait_for_selector(".saved.good")
