"""Reads rows ahead and checks what came, without the type checks of the tests. Run by ``test_prefetch.py``."""

from __future__ import annotations

import random
import threading
from typing import Any

import torch
from torch.utils.data import Dataset

from tracin.data import open_rows
from tracin.errors import UserCodeError


class Rows(Dataset):
    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.threads, self.inside = fails_at, set(), 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> Any:
        self.inside += 1
        assert self.inside == 1, "two threads at once"
        self.threads.add(threading.get_ident())
        if row == self.fails_at:
            self.inside -= 1
            raise KeyError("no such file")
        self.inside -= 1
        return torch.tensor([float(row)]), row % 3


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tracin reads")]


def test_the_rows_are_the_same_and_no_thread_is_left() -> None:
    data = Rows()
    rows = open_rows(data, name="train", batch_size=7)
    for _ in range(2):
        found = torch.cat([batch.value[0][:, 0] for batch in rows.batches()])
        assert found.tolist() == list(range(40))
        assert readers() == []
    assert len(data.threads) > 1, "nothing was read ahead"


def test_a_consumer_that_stops_ends_the_thread() -> None:
    rows = open_rows(Rows(), name="train", batch_size=3)
    batches = rows.batches()
    for _ in range(4):
        next(batches)
    batches.close()
    assert readers() == []


def test_an_error_comes_at_its_batch_and_names_the_row() -> None:
    rows = open_rows(Rows(fails_at=25), name="train", batch_size=5)
    started: list[int] = []
    error = None
    try:
        started.extend(batch.start for batch in rows.batches())
    except UserCodeError as found:
        error = found
    assert error is not None, "no error"
    assert "KeyError on row 25" in str(error)
    assert isinstance(error.__cause__, KeyError)
    assert started == [0, 5, 10, 15, 20]
    assert readers() == []


def test_random_states_are_left_alone() -> None:
    before, python = torch.get_rng_state(), random.getstate()
    for _ in open_rows(Rows(), name="train", batch_size=7).batches():
        pass
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()


if __name__ == "__main__":
    test_the_rows_are_the_same_and_no_thread_is_left()
    test_a_consumer_that_stops_ends_the_thread()
    test_an_error_comes_at_its_batch_and_names_the_row()
    test_random_states_are_left_alone()
