"""How far a run is: nothing when turned off, plain lines off a terminal, a bar on one."""

from __future__ import annotations

import io

import pytest

from tracin import progress as module
from tracin.progress import Progress, progress


class Stream(io.TextIOWrapper):
    """A standard error stream that is, or is not, a terminal."""

    name, mode = "stderr", "w"

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def written(self) -> str:
        """What stands on it."""
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def stream(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Stream:
    made = Stream(terminal)
    monkeypatch.setattr(module.sys, "stderr", made)
    return made


@pytest.mark.parametrize("terminal", [True, False])
def test_turned_off_it_says_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    err = stream(monkeypatch, terminal)
    with progress("influence", 10, show=False) as bar:
        bar.advance(4)
        bar.grow(5)
    assert (bar.done, bar.total) == (4, 15)
    assert err.written() == ""


def test_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    err = stream(monkeypatch, terminal=False)
    with progress("influence", 100, show=True) as bar:
        for seconds, rows in ((5, 10), (6, 10), (5, 20), (14, 10), (90, 40), (60, 10)):
            clock[0] += seconds
            bar.advance(rows)
    assert err.written().splitlines() == [
        "influence: 20%, 0:44 left",  # 11 s for 20 rows, 80 to go
        "influence: 50%, 0:30 left",  # 30 s for 50 rows
        "influence: 90%, 0:13 left",  # 120 s for 90 rows
    ], "a line at most every ten seconds, and none when all is done"


def test_a_run_that_grows(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    err = stream(monkeypatch, terminal=False)
    with progress("top-k", 10, show=True) as bar:
        bar.grow(90)
        clock[0] += 3600
        bar.advance(10)
    assert err.written() == "top-k: 10%, 9:00:00 left\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0:00"), (59.6, "1:00"), (61.0, "1:01"), (3600.0, "1:00:00"), (36061.0, "10:01:01")],
)
def test_spans(seconds: float, expected: str) -> None:
    assert module._span(seconds) == expected


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    err = stream(monkeypatch, terminal=True)
    monkeypatch.setenv("TERM", "xterm")
    with progress("influence", 10, show=True) as bar:
        assert isinstance(bar, Progress)
        bar.advance(4)
        bar.grow(10)
        bar.advance(16)
    assert (bar.done, bar.total) == (20, 20)
    assert "influence" in err.written()


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_passes_through(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream(monkeypatch, terminal)
    with pytest.raises(KeyboardInterrupt), progress("influence", 10, show=True):
        raise KeyboardInterrupt
