"""A run that cannot fit in ``memory=`` is refused before it computes, and the message says what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tracin
from scoring.common import M, N, handmade, method, rows
from tracin.errors import MemoryLimitError
from tracin.scoring.memory import watched

Rows = tuple[Tensor, Tensor]
VERBS: dict[str, Callable[[tracin.TracInCP, Rows, Rows], Any]] = {
    "influence": lambda chosen, train, queries: chosen.influence(train, queries),
    "top_k": lambda chosen, train, queries: chosen.top_k(train, queries, k=50),
    "self_influence": lambda chosen, train, _: chosen.self_influence(train),
    "aggregate": lambda chosen, train, queries: chosen.aggregate(
        train, queries, by=torch.arange(len(queries[0]))
    ),
}


def many(part: Rows, times: int) -> Rows:
    return torch.cat([part[0]] * times), torch.cat([part[1]] * times)


def test_scores_that_do_not_fit_are_refused_and_the_mends_fit() -> None:
    queries = many(rows(M, 2), 200)
    with pytest.raises(MemoryLimitError, match=f"{200 * M:,} queries × {N} train rows") as caught:
        method(memory="40KiB").influence(rows(N, 1), queries)
    told = str(caught.value)
    asked = re.search(r"memory='(\w+)'", told)
    assert asked is not None
    assert "at a time" in told
    assert method(memory=asked.group(1)).influence(rows(N, 1), queries).values.shape == (200 * M, N)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    large = many(rows(N, 1), 500)
    with pytest.raises(MemoryLimitError, match=r"a batch of 5,500 rows") as caught:
        method(memory="100KiB", batch_size=5500).self_influence(large)
    smaller = re.search(r"batch_size=(\d+)", str(caught.value))
    assert smaller is not None
    found = method(memory="100KiB", batch_size=int(smaller.group(1))).self_influence(large)
    assert len(found.values) == 5500


def test_gradients_that_are_multiplied_out_count() -> None:
    asked, states, data = handmade(1 << 18, 60)
    chosen = tracin.TracInCP(asked, states, memory="100MiB", batch_size=60, device="cpu", progress=False)
    with pytest.raises(MemoryLimitError, match=r"a batch of 60 rows takes about 120 MiB.* batch_size=32"):
        chosen.self_influence(data)


def test_nothing_is_computed_before_the_refusal() -> None:
    calls = []
    chosen = method(memory="4KiB")
    handle = chosen.task.model.register_forward_hook(lambda *_: calls.append(1))
    queries = many(rows(M, 2), 200)
    with pytest.raises(MemoryLimitError):
        chosen.influence(rows(N, 1), queries)
    handle.remove()
    assert len(calls) <= 3, "the probe runs a few rows; a batch or a check would be more"


@pytest.mark.parametrize("verb", ["influence", "top_k", "aggregate"])
def test_the_result_is_not_held_before_the_refusal(verb: str) -> None:
    train, queries = many(rows(N, 1), 200), many(rows(M, 2), 200)
    with watched(torch.device("cpu")) as found, pytest.raises(MemoryLimitError):
        VERBS[verb](method(memory=1_500_000), train, queries)
    # The probe takes 140 kB, the results 17.6 MB and 1.6 MB.
    assert found.peak < 1_000_000


@pytest.mark.parametrize("batch_size", ["auto", 4])
@pytest.mark.parametrize("verb", VERBS)
def test_the_first_mend_is_never_refused_again(verb: str, batch_size: Any) -> None:
    train, queries = many(rows(N, 1), 27), many(rows(M, 2), 7)
    with pytest.raises(MemoryLimitError, match=f"^{verb}: ") as caught:
        VERBS[verb](method(memory="1KiB", batch_size=batch_size), train, queries)
    asked = re.search(r"memory='(\w+)'", str(caught.value))
    assert asked is not None
    VERBS[verb](method(memory=asked.group(1), batch_size=batch_size), train, queries)


@pytest.mark.parametrize("verb", VERBS)
def test_batches_of_our_size_are_shortened_to_what_the_result_leaves(verb: str) -> None:
    train, queries = many(rows(N, 1), 27), many(rows(M, 2), 7)
    least = {"influence": 83_160, "top_k": 56_000, "self_influence": 2_376, "aggregate": 83_160}[verb]
    tight = VERBS[verb](method(memory=least + 4_000, batch_size="auto"), train, queries)
    roomy = VERBS[verb](method(), train, queries)
    lists = (
        [(tight.proponents, roomy.proponents), (tight.opponents, roomy.opponents)] if verb == "top_k" else []
    )
    for found, truth in lists or [(tight, roomy)]:
        torch.testing.assert_close(found.values, truth.values, rtol=1e-10, atol=1e-12)


def test_what_is_too_large_is_told_as_the_verb_holds_it() -> None:
    train, queries = many(rows(N, 1), 20), many(rows(M, 2), 20)
    told = {}
    for verb, ask in VERBS.items():
        with pytest.raises(MemoryLimitError) as caught:
            ask(method(memory=1_700, batch_size=1), train, queries)
        told[verb] = str(caught.value)
    assert "the scores of 100 queries × 220 train rows take 172 KiB" in told["influence"]
    assert "two lists of 50 rows for each of 100 queries take 156 KiB" in told["top_k"]
    assert "the scores of 220 train rows take 1.7 KiB" in told["self_influence"]
    assert "the scores of 100 groups × 220 train rows take 172 KiB" in told["aggregate"]


def test_shorter_lists_and_fewer_groups_at_a_time_are_mends() -> None:
    train, queries = many(rows(N, 1), 20), many(rows(M, 2), 20)
    with pytest.raises(MemoryLimitError) as caught:
        VERBS["top_k"](method(memory="40KiB"), train, queries)
    shorter = re.search(r"k=(\d+): shorter lists", str(caught.value))
    assert shorter is not None
    method(memory="40KiB").top_k(train, queries, k=int(shorter.group(1)))
    with pytest.raises(MemoryLimitError) as caught:
        VERBS["aggregate"](method(memory="40KiB"), train, queries)
    each = re.search(r"(\d+) groups at a time", str(caught.value))
    assert each is not None
    some = int(each.group(1))
    VERBS["aggregate"](method(memory="40KiB"), train, (queries[0][:some], queries[1][:some]))
