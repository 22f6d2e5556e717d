"""One thread computes, and each question is computed once."""

from __future__ import annotations

import threading

import pytest

from tracin.explorer.working import BusyError, Worker


@pytest.fixture
def worker():
    found = Worker(held=2, waiting=3)
    yield found
    found.close()


def test_who_asks_meanwhile_gets_the_same_answer(worker):
    go, calls = threading.Event(), []

    def work() -> int:
        go.wait(10)
        calls.append(threading.current_thread().name)
        return 7

    futures = [worker.ask("a", work) for _ in range(5)]
    go.set()
    assert [future.result(10) for future in futures] == [7] * 5
    assert len(calls) == 1
    assert calls[0].startswith("tracin explorer")


def test_one_thing_is_computed_at_a_time(worker):
    running, most = [0], []

    def work() -> None:
        running[0] += 1
        most.append(running[0])
        running[0] -= 1

    for future in [worker.ask(at, work) for at in range(3)]:
        future.result(10)
    assert most == [1, 1, 1]


def test_a_failure_is_not_kept(worker):
    with pytest.raises(ZeroDivisionError):
        worker.ask("a", lambda: 1 / 0).result(10)
    assert worker.ask("a", lambda: 2).result(10) == 2


def test_the_oldest_answers_go(worker):
    calls = []
    for key in ("a", "b", "c", "a"):
        worker.ask(key, lambda key=key: calls.append(key)).result(10)
    assert calls == ["a", "b", "c", "a"]
    worker.ask("c", lambda: calls.append("again")).result(10)
    assert "again" not in calls


def test_too_many_questions_are_refused(worker):
    go = threading.Event()
    futures = [worker.ask(at, lambda: go.wait(10)) for at in range(3)]
    with pytest.raises(BusyError, match="3 explanations wait"):
        worker.ask("more", lambda: None)
    go.set()
    for future in futures:
        future.result(10)
    assert worker.ask("more", lambda: 1).result(10) == 1


def test_what_waits_is_cancelled_at_the_end():
    worker, go = Worker(), threading.Event()
    first = worker.ask(1, lambda: go.wait(10))
    second = worker.ask(2, lambda: 2)
    closing = threading.Thread(target=worker.close)
    closing.start()
    go.set()
    closing.join(10)
    assert first.done()
    assert second.cancelled() or second.result() == 2
